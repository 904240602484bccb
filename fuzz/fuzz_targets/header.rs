//! A safetensors file: the header, and the tensors that it promises.
#![no_main]

mod file;

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use moepress::checkpoint::Shard;

fuzz_target!(|bytes: &[u8]| {
    let Ok(shard) = Shard::open(&file::file("header", bytes)) else { return };
    for tensor in Arc::new(shard).tensors() {
        assert_eq!(tensor.bytes().len() * 8, tensor.len() * tensor.dtype().bitsize());
        let _ = tensor.check_finite();
        let _ = tensor.to_f32();
    }
});
