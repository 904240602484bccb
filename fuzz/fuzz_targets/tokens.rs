//! A token file.
#![no_main]

mod file;

use libfuzzer_sys::fuzz_target;
use moepress::tokens::read_token_file;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut windows) = read_token_file(&file::file("tokens", bytes)) else { return };
    assert_eq!(windows.ids.len(), windows.count * windows.length);
    assert!(windows.mask.as_ref().is_none_or(|m| m.len() == windows.ids.len()));
    let _ = (windows.check(64, 512), windows.sha256(), windows.real_tokens());
    windows.truncate_files(1);
    assert_eq!(windows.ids.len(), windows.length);
});
