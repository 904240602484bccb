//! A token's result is the same bits whatever runs beside it: other windows, later tokens, more threads, other
//! instructions. That is what makes a cached or a batched run agree with a plain one.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::command::{command, outcome};
use common::{data, read, run, shape, windows};
use moepress::backend::cpu::Isa;
use moepress::tokens::{Windows, write_token_file};

const MODELS: [&str; 13] = [
    "mixtral_sliding_window",
    "qwen2_moe",
    "olmoe_clip",
    "deepseek_v2_lite_sharded_bf16",
    "qwen3_next",
    "lfm2_moe_fused",
    "kimi_linear_fused",
    "gemma4",
    "cohere2_moe",
    "granitemoehybrid_mamba",
    "jamba_fused",
    "nemotron_h",
    "laguna",
];

/// Logits of the given windows, `[count, length, vocabulary]`.
fn logits(model: &str, windows: &Windows) -> Vec<f32> {
    run(&data(model), windows).logits
}

/// The golden inputs of a model: ids and their number of windows.
fn inputs(model: &str) -> (Vec<f64>, usize) {
    let golden = data(model).join("golden.safetensors");
    (read(&golden, "input_ids"), shape(&golden, "input_ids").unwrap()[0])
}

#[test]
fn a_window_does_not_depend_on_the_others() {
    for model in MODELS {
        let (ids, count) = inputs(model);
        let all = logits(model, &windows(&ids, count));
        let (length, size) = (ids.len() / count, all.len() / count);
        for w in 0..count {
            let alone = logits(model, &windows(&ids[w * length..(w + 1) * length], 1));
            assert_eq!(alone, all[w * size..(w + 1) * size], "{model}: window {w}");
        }
    }
}

#[test]
fn a_token_does_not_depend_on_later_ones() {
    for model in MODELS {
        let (ids, count) = inputs(model);
        let ids = &ids[..ids.len() / count];
        let all = logits(model, &windows(ids, 1));
        for length in [1, 2, 3, 5, ids.len() - 1] {
            let prefix = logits(model, &windows(&ids[..length], 1));
            assert_eq!(prefix, all[..prefix.len()], "{model}: {length} tokens");
        }
    }
}

#[test]
fn threads_change_nothing() {
    for model in MODELS {
        let (ids, count) = inputs(model);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| logits(model, &windows(&ids, count)))
        };
        let one = with(1);
        assert_eq!(with(2), one, "{model}");
        assert_eq!(with(8), one, "{model}");
    }
}

#[test]
fn instructions_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("tokens"), folder.path().join("out"));
    for model in MODELS {
        let (ids, count) = inputs(model);
        write_token_file(&tokens, &windows(&ids, count)).unwrap();
        let with = |isa: Isa| {
            let mut run = command(["run", "--quiet"]);
            run.env("MOEPRESS_CPU_ISA", isa.name()).arg(data(model));
            run.arg("--tokens").arg(&tokens).arg("--out").arg(&out);
            outcome(run).ok();
            read(&out, "logits")
        };
        let results: Vec<_> = Isa::available().filter(|isa| isa.agrees()).map(with).collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{model}");
    }
}
