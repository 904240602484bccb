//! `config.json`, to an architecture.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moepress::architecture::Architecture;

fuzz_target!(|text: &str| {
    if let Ok(architecture) = Architecture::from_config(text) {
        assert!(!architecture.layers.is_empty());
        assert!(architecture.moe_layers().all(|(_, moe)| (1..=moe.experts).contains(&moe.router.top_k)));
    }
});
