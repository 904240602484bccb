//! A plan, alone and against a checkpoint.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moepress::architecture::{ExpertSize, MoeProfile, Profile};
use moepress::plan::Plan;

fn profile() -> Profile {
    let layer = |layer| MoeProfile {
        layer,
        experts: 6,
        top_k: 2,
        width: 16,
        latent: None,
        ungated: false,
        groups: 3,
        top_groups: 2,
        expert_parameters: 3 * 16 * 32,
        expert_bytes: 2 * 3 * 16 * 32,
        each: Vec::new(),
        dense_widths: Vec::new(),
        base: ExpertSize::default(),
        matrix_bytes: [2 * 16 * 32; 3],
        factor_bytes: 2,
        router_parameters: 32,
        router_bytes: 64,
    };
    Profile {
        family: "deepseek_v2".into(),
        identity: "0".into(),
        layers: 3,
        hidden_size: 32,
        parameters: 100_000,
        bytes: 200_000,
        header_bytes: 1000,
        tensors: 50,
        moe_layers: vec![layer(1), layer(2)],
    }
}

fuzz_target!(|text: &str| {
    let Ok(plan) = Plan::from_json(text) else { return };
    let _ = plan.expect(&profile());
    let again = Plan::from_json(&plan.to_json()).expect("what was read can be written and read again");
    assert_eq!(again, plan);
});
