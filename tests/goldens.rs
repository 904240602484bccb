//! The forward pass against outputs of transformers 5.17 (5.24 of families that this lacks): every family, layer by layer.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::{Mutant, data, encoder_windows, golden_windows, max_difference, read, run, shape, shared};

/// f32 against f32 in another summation order; any single rule got wrong moves the logits by 4e-3 or more.
const TOLERANCE: f64 = 1e-4;

/// Compares the checkpoint in `dir` with `golden`; returns what is off.
fn compare(dir: &Path, golden: &Path) -> Vec<String> {
    let windows = golden_windows(golden);
    let trace = run(dir, &windows);
    // What a model makes of padding means nothing.
    let real = |token: usize| windows.mask.as_ref().is_none_or(|mask| mask[token]);
    let largest = |found: &[f32], expected: &[f64]| {
        let width = expected.len() / windows.ids.len();
        let rows = found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate();
        rows.filter(|(t, _)| real(*t)).map(|(_, (a, b))| max_difference(a, b)).fold(0.0, f64::max)
    };
    let mut off = Vec::new();
    // The last hidden state of a golden file is taken after the final norm, so it is covered by the logits.
    for (l, hidden) in trace.hidden.iter().enumerate().take(trace.hidden.len() - 1) {
        let expected = read(golden, &format!("hidden.{l}"));
        let scale = (expected.iter().map(|v| v * v).sum::<f64>() / expected.len() as f64).sqrt().max(1.0);
        let difference = largest(hidden, &expected) / scale;
        if difference > TOLERANCE {
            off.push(format!("hidden state after layer {l} is off by {difference:.1e}"));
        }
    }
    let difference = largest(&trace.logits, &read(golden, "logits"));
    if difference > TOLERANCE {
        off.push(format!("logits are off by {difference:.1e}"));
    }
    off
}

fn check(dir: &Path, golden: &Path) {
    let off = compare(dir, golden);
    assert!(off.is_empty(), "{}: {}", dir.display(), off.join("; "));
}

macro_rules! repository_goldens {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            let dir = data(stringify!($name));
            check(&dir, &dir.join("golden.safetensors"));
        }
    )*};
}

repository_goldens!(
    mixtral,
    mixtral_sliding_window,
    qwen2_moe,
    qwen3_moe,
    qwen3_moe_fused,
    qwen3_moe_dynamic,
    olmoe_clip,
    deepseek,
    bailing_moe,
    bailing_moe_v2,
    bam_cohere,
    bam_llama,
    deepseek_v2,
    deepseek_v2_lite_sharded_bf16,
    deepseek_v3,
    deepseek_v3_fp8,
    glm4_moe,
    gpt_oss,
    gpt_oss_mxfp4,
    phimoe,
    dots1,
    ernie4_5_moe,
    ernie4_5_vl_moe,
    ernie4_5_vl_moe_fused,
    llama4_text,
    qwen3_next,
    qwen3_next_padded,
    qwen3_5_moe,
    qwen3_5_moe_text,
    kimi_linear,
    kimi_linear_fused,
    lfm2_moe,
    lfm2_moe_fused,
    granitemoe,
    granitemoeshared,
    granitemoeshared_fused,
    granitemoe_swa,
    granitemoehybrid,
    granitemoehybrid_mamba,
    granitemoehybrid_mamba_fused,
    jamba,
    jamba_fused,
    nemotron_h,
    nemotron_h_fused,
    nemotron_h_latent,
    minimax_m2,
    glm4_moe_lite,
    axk1,
    deepseek_v32,
    glm_moe_dsa,
    mistral4,
    mistral3,
    hunyuan_v1_moe,
    cohere2_moe,
    cohere2_moe_fused,
    aria,
    dbrx,
    flex_olmo,
    gemma4,
    gemma4_text,
    afmoe,
    sarvam_mla,
    sarvam_moe,
    sarvam_moe_fused,
    solar_open,
    exaone_moe,
    hy_v3,
    hy_v3_fused,
    mimo_v2_flash,
    laguna,
    laguna_fused,
    mellum,
    qwen3_omni_moe,
    qwen3_omni_moe_fused,
    qwen3_vl_moe,
    qwen3_vl_moe_fused,
    glm4v_moe,
);

/// A model with an encoder: its layers, then the decoder's.
fn check_encoder_decoder(dir: &Path) {
    let golden = dir.join("golden.safetensors");
    let trace = run(dir, &encoder_windows(&golden));
    let encoder = (0..99).take_while(|l| shape(&golden, &format!("hidden.{l}")).is_some()).count() - 1;
    let decoder = trace.hidden.len() - 1 - encoder;
    let layers = (0..encoder).map(|l| (l, format!("hidden.{l}")));
    // The embeddings of the decoder come in with its first layer.
    let layers = layers.chain((1..decoder).map(|l| (encoder + l, format!("decoder.hidden.{l}"))));
    for (l, name) in layers {
        let difference = max_difference(&trace.hidden[l], &read(&golden, &name));
        assert!(difference < TOLERANCE, "{}: {name} is off by {difference:.1e}", dir.display());
    }
    let difference = max_difference(&trace.logits, &read(&golden, "logits"));
    assert!(difference < TOLERANCE, "{}: logits are off by {difference:.1e}", dir.display());
}

#[test]
fn switch_transformers() {
    check_encoder_decoder(&data("switch_transformers"));
}

#[test]
fn switch_transformers_untied() {
    check_encoder_decoder(&data("switch_transformers_untied"));
}

/// A config may say that the head is the embedding table while the file has another head: that one counts.
#[test]
fn a_head_of_its_own_is_not_tied() {
    let model = Mutant::of("mixtral");
    model.set_config("tie_word_embeddings", serde_json::json!(true));
    check(model.path(), &data("mixtral").join("golden.safetensors"));
}

/// The larger fixtures, where they are.
#[test]
fn shared_fixtures() {
    let Some(fixtures) = shared("fixtures") else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(fixtures).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let known = moepress::architecture::families().iter().any(|family| name.starts_with(family));
        // Their golden files have other names.
        if known && !name.starts_with("switch") {
            check(&dir.join("pub"), &dir.join("golden.safetensors"));
            seen += 1;
        }
    }
    assert!(seen >= 5, "only {seen} fixtures of known families");
}
