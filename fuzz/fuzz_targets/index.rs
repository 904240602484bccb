//! `model.safetensors.index.json`, in a folder whose one shard holds the tensors `a` and `b`.
#![no_main]

mod file;

use libfuzzer_sys::fuzz_target;
use moepress::checkpoint::Checkpoint;

const SHARD: &[u8] = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}} "#;

fuzz_target!(|text: &[u8]| {
    let length = (SHARD.len() as u64).to_le_bytes();
    file::file("one.safetensors", &[&length[..], SHARD, &[0; 2]].concat());
    file::file("config.json", b"{}");
    let index = file::file("model.safetensors.index.json", text);
    if let Some(Ok(checkpoint)) = index.parent().map(Checkpoint::open) {
        assert!(checkpoint.tensor_count() > 0);
        let _ = (checkpoint.identity(), checkpoint.bytes(), checkpoint.files().count());
    }
});
