//! `moepress.json`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use moepress::checkpoint::Manifest;

fuzz_target!(|text: &str| {
    let path = Path::new("moepress.json");
    let Ok(layout) = Manifest::parse(path, text) else { return };
    let again =
        Manifest::parse(path, &layout.to_json()).expect("what was read can be written and read again");
    assert_eq!(again, layout);
});
