//! Sizes that no file has: whatever a config, a header or a plan claims, the answer is one line, at once, and takes no more
//! memory than the file itself would.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;
use std::process::Command;

use common::Mutant;
use common::command::{Outcome, outcome};
use common::generate;
use serde_json::{Value, json};

/// `moepress` in `dir` with 2 GB of address space, threads included, and half a minute of time.
fn limited(dir: &Path, arguments: &str) -> Outcome {
    let mut command = Command::new("timeout");
    command.args(["30", "sh", "-c", "ulimit -v 2000000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_moepress")]);
    command.args(arguments.split(' ')).arg("--quiet").current_dir(dir).env("RAYON_NUM_THREADS", "2");
    outcome(command)
}

#[test]
fn configs_of_models_that_cannot_exist() {
    const KEYS: [&str; 12] = [
        "num_hidden_layers",
        "num_experts",
        "num_experts_per_tok",
        "hidden_size",
        "vocab_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "head_dim",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
    ];
    let values = [
        json!(u64::MAX),
        json!(1u64 << 40),
        json!(1u64 << 31),
        json!(1_000_000_000),
        // The most that is read as a number.
        json!(1 << 24),
        json!(-1),
        json!(1.5),
        json!(1e308),
        json!("8"),
        json!([8]),
        json!("A".repeat(1_000_000)),
    ];
    for key in KEYS {
        for value in &values {
            let model = Mutant::of("qwen2_moe");
            model.set_config(key, value.clone());
            generate::tokens(&model.file("tokens"), 1, 8, 64);
            let whole = value.as_u64().is_some_and(|v| v == 1 << 24);
            // More positions and a longer period of layers with experts than are used contradict nothing.
            if whole && ["max_position_embeddings", "decoder_sparse_step"].contains(&key) {
                continue;
            }
            for command in ["inspect .", "run . --tokens tokens --out out"] {
                let message = limited(model.path(), command).error(1);
                assert!(message.len() < 4000, "{key}: {} bytes of message", message.len());
                assert!(!model.file("out").exists() && !model.file("out.incomplete").exists(), "{key}");
            }
        }
    }
}

#[test]
fn all_sizes_at_their_largest() {
    let model = Mutant::of("qwen2_moe");
    for key in
        ["num_experts", "vocab_size", "moe_intermediate_size", "hidden_size", "max_position_embeddings"]
    {
        model.set_config(key, json!(1 << 24));
    }
    model.set_config("num_hidden_layers", json!(4096));
    limited(model.path(), "inspect .").error(1);
    limited(model.path(), "plan --method random --remove 0.5 --model . --out plan").error(1);
}

/// A safetensors file with `header` in the place of one, whose length is said to be `length`.
fn file(header: &[u8], length: Option<u64>) -> Vec<u8> {
    [&length.unwrap_or(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat()
}

#[test]
fn headers_of_files_that_cannot_exist() {
    let tensor = |shape: &str, end: &str| {
        format!("{{\"ids\": {{\"dtype\": \"I32\", \"shape\": {shape}, \"data_offsets\": [0, {end}]}}}}")
            .into_bytes()
    };
    let deep = |open: &str| format!("{{\"ids\": {}", open.repeat(200_000)).into_bytes();
    let files = [
        file(b"{}", Some(1 << 63)),
        file(b"{}", Some(u64::MAX)),
        file(b"{}", Some(100_000_000)),
        file(&tensor("[4294967296, 4294967296]", "8"), None),
        file(&tensor("[4611686018427387904, 4]", "8"), None),
        file(&tensor("[0, 4611686018427387904]", "0"), None),
        file(&tensor("[1, 2]", "9223372036854775815"), None),
        file(&tensor("[-1, 2]", "8"), None),
        file(&tensor("[1e3, 2]", "8"), None),
        file(&deep("["), None),
        file(&deep("{\"a\": "), None),
        vec![0; 1000],
    ];
    for (i, bytes) in files.iter().enumerate() {
        let model = Mutant::of("qwen2_moe");
        std::fs::write(model.file("bad"), bytes).unwrap();
        std::fs::write(model.file("model.safetensors"), bytes).unwrap();
        for command in
            ["inspect .", "merge bad bad --out out", "plan --method reap --remove 0.4 --stats bad --out out"]
        {
            let message = limited(model.path(), command).error(1);
            assert!(!message.is_empty() && !model.file("out").exists(), "file {i}");
        }
        let sound = Mutant::of("qwen2_moe");
        std::fs::write(sound.file("bad"), bytes).unwrap();
        let message = limited(sound.path(), "run . --tokens bad --out out").error(1);
        assert!(message.starts_with("bad: "), "file {i}: {message}");
    }
}

#[test]
fn plans_of_experts_that_cannot_exist() {
    let model = Mutant::of("qwen2_moe");
    let write = |plan: &Value| std::fs::write(model.file("plan"), plan.to_string()).unwrap();
    limited(model.path(), "plan --method low-rank --remove 0.4 --set whiten=false --model . --out sound")
        .ok();
    let sound: Value = serde_json::from_slice(&std::fs::read(model.file("sound")).unwrap()).unwrap();
    let cases: [(&str, Value, &str); 6] = [
        ("/layers/0/layer", json!(1_000_000_000), "layer 1000000000: not a MoE layer"),
        ("/layers/0/experts/0/expert", json!(1u64 << 60), "the layer has 6 experts, 0 to 5"),
        ("/layers/0/experts/0/rank/gate", json!(1u64 << 60), "expected 1 to 16 for matrices of 16 × 32"),
        ("/layers/0/top_k", json!(1u64 << 60), "with 6 experts left to choose from; use 1 to 6"),
        ("/layers/0/experts", json!([]), "no expert is left to choose from"),
        (
            "/layers/0/experts",
            Value::Array(vec![sound["layers"][0]["experts"][0].clone(); 300_000]),
            "listed twice",
        ),
    ];
    for (place, value, expected) in cases {
        let mut plan = sound.clone();
        *plan.pointer_mut(place).unwrap() = value;
        write(&plan);
        let message = limited(model.path(), "compress . --plan plan --out out").error(1);
        assert!(message.contains(expected), "{message}");
        assert!(!model.file("out").exists() && !model.file("out.partial").exists(), "{place}");
    }
}
