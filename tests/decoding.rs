//! Texts that grow piece by piece: the same logits as in one pass, for every family and every kind of attention.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::{Mutant, data, read, run, shape, shared, windows};
use moepress::architecture::{AttentionSpec, LayerSpec};
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::Checkpoint;
use moepress::model::{Decoder, Model};
use serde_json::json;

/// The absorbed form of latent attention sums in another order.
const TOLERANCE: f64 = 1e-4;

/// Logits of one text given in pieces of the lengths in `pieces`, over and over: for every piece the number of tokens
/// so far, and its logits `[tokens, vocabulary]`.
fn in_pieces(dir: &Path, ids: &[u32], pieces: &[usize]) -> Vec<(usize, Vec<f32>)> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, ids.len()).unwrap();
    let decoder = Decoder::new(&model, &mut ()).unwrap();
    let mut sequence = decoder.sequence().unwrap();
    let mut logits = Vec::new();
    let mut lengths = pieces.iter().cycle();
    while sequence.ids().len() < ids.len() {
        let start = sequence.ids().len();
        let end = ids.len().min(start + lengths.next().unwrap());
        logits.push((end, sequence.extend_all(&ids[start..end]).unwrap().to_vec()));
    }
    logits
}

/// Every way to cut each text gives the logits of the whole; where no attention is latent, bit for bit.
fn check(dir: &Path, ids: &[f64], count: usize) {
    let whole = windows(ids, count);
    let architecture = moepress::model::open_architecture(&Checkpoint::open(dir).unwrap()).unwrap();
    let latent = architecture.layers.iter().any(|l| matches!(l.attention, AttentionSpec::Latent(_)));
    // LongRoPE rotates a text by its length: shorter ones are not the beginnings of longer ones.
    let long = |l: &LayerSpec| l.attention.rope()?.long.as_ref().map(|long| long.positions);
    let short = architecture.layers.iter().find_map(long).filter(|&p| p < whole.length).unwrap_or(0);
    let vocabulary = architecture.vocabulary;
    let expected = run(dir, &whole).logits;
    let per_window = whole.length * vocabulary;
    for (ids, expected) in whole.ids.chunks_exact(whole.length).zip(expected.chunks_exact(per_window)) {
        for pieces in [&[1][..], &[whole.length], &[5], &[2, whole.length - 2], &[2, 1, 7, 1, 1]] {
            let mut compared = 0;
            for (end, found) in in_pieces(dir, ids, pieces).iter().filter(|(end, _)| *end > short) {
                let expected = &expected[end * vocabulary - found.len()..end * vocabulary];
                let differences = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
                let largest = differences.fold(0.0, f64::max);
                let most = if latent { TOLERANCE } else { 0.0 };
                assert!(largest <= most, "{} in pieces of {pieces:?}: off by {largest:.1e}", dir.display());
                compared += found.len();
            }
            assert!(compared >= (whole.length - short) * vocabulary);
        }
    }
}

fn check_golden(dir: &Path, golden: &Path) {
    let ids = read(golden, "input_ids");
    check(dir, &ids, shape(golden, "input_ids").unwrap()[0]);
}

/// Ids below 64, as all checkpoints of the repository know them.
fn some_ids(count: usize) -> Vec<f64> {
    (0..count as u32).map(|i| f64::from((i.wrapping_mul(2_654_435_761) >> 9) % 64)).collect()
}

#[test]
fn every_family() {
    let mut seen = 0;
    for entry in std::fs::read_dir(data("")).unwrap() {
        let dir = entry.unwrap().path();
        let golden = dir.join("golden.safetensors");
        // Some do not continue texts, of others the past would change with every token.
        let differs = |name: &&str| shape(&golden, name).is_some();
        if golden.exists() && !["decoder_input_ids", "decoded_logits"].iter().any(differs) {
            check_golden(&dir, &golden);
            seen += 1;
        }
    }
    assert!(seen >= 47, "only {seen} checkpoints");
}

/// The larger fixtures, where they are.
#[test]
fn shared_fixtures() {
    let Some(fixtures) = shared("fixtures") else { return };
    for entry in std::fs::read_dir(fixtures).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("pub").exists() && shape(&dir.join("golden.safetensors"), "decoder_input_ids").is_none() {
            check_golden(&dir.join("pub"), &dir.join("golden.safetensors"));
        }
    }
}

/// Windows of several lengths, all shorter than the text, so that old keys are dropped more than once.
#[test]
fn sliding_windows() {
    for window in [1, 2, 7, 16] {
        let mutant = Mutant::of("mixtral_sliding_window");
        mutant.set_config("sliding_window", json!(window));
        check(mutant.path(), &some_ids(100), 1);
        let mutant = Mutant::of("gpt_oss");
        mutant.set_config("sliding_window", json!(window));
        check(mutant.path(), &some_ids(100), 1);
    }
}

#[test]
fn chunks() {
    for chunk in [1, 3, 16] {
        let mutant = Mutant::of("llama4_text");
        mutant.set_config("attention_chunk_size", json!(chunk));
        check(mutant.path(), &some_ids(70), 1);
    }
}

/// Positions beyond the first training's length, where YaRN and llama3 scaling bend the frequencies.
#[test]
fn scaled_rotations() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16});
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    for scaling in [llama3, yarn] {
        let mutant = Mutant::of("qwen3_moe");
        mutant.set_config("rope_scaling", scaling);
        check(mutant.path(), &some_ids(60), 1);
    }
    for name in ["deepseek_v2", "deepseek_v3_fp8"] {
        check(&data(name), &some_ids(90), 1);
    }
}

/// A text that outgrows the short divisors is rotated by the long ones from its first token on.
/// Where the rotation follows the length of the text, keys in the cache stay as they were when it was shorter.
#[test]
fn dynamic_rotation_is_that_of_each_step() {
    let dir = data("qwen3_moe_dynamic");
    let golden = dir.join("golden.safetensors");
    let texts = windows(&read(&golden, "input_ids"), 2);
    let expected = read(&golden, "decoded_logits");
    let per_text = expected.len() / 2;
    for (ids, expected) in texts.ids.chunks_exact(texts.length).zip(expected.chunks_exact(per_text)) {
        let mut pieces = vec![1; texts.length - 5];
        pieces[0] = 6;
        let found = in_pieces(&dir, ids, &pieces).into_iter().flat_map(|(_, logits)| logits);
        let difference = found.zip(expected).map(|(a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
        assert!(difference < TOLERANCE, "off by {difference:.1e}");
    }
}

#[test]
fn longrope_across_its_boundary() {
    let mutant = Mutant::of("qwen3_moe");
    let short: Vec<f64> = (0..6).map(|i| 1.0 + 0.1 * f64::from(i)).collect();
    let long: Vec<f64> = (0..6).map(|i| 2.0 + f64::from(i)).collect();
    mutant.set_config(
        "rope_scaling",
        json!({"rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 20, "factor": 4.0}),
    );
    let ids: Vec<u32> = some_ids(40).into_iter().map(|id| id as u32).collect();
    // The logits after a text of n tokens are the last ones of a pass over these n.
    let checkpoint = Checkpoint::open(mutant.path()).unwrap();
    let model = Model::new(&checkpoint, &Cpu, ids.len()).unwrap();
    let decoder = Decoder::new(&model, &mut ()).unwrap();
    let mut sequence = decoder.sequence().unwrap();
    for n in 1..=ids.len() {
        let found = sequence.extend(&ids[n - 1..n]).unwrap();
        let as_floats: Vec<f64> = ids[..n].iter().map(|&id| f64::from(id)).collect();
        let expected = run(mutant.path(), &windows(&as_floats, 1)).logits;
        assert_eq!(found, &expected[expected.len() - found.len()..], "after {n} tokens");
    }
}

/// A router would choose experts without a word.
#[test]
fn routers_that_are_not_finite_are_refused() {
    let mutant = Mutant::of("mixtral");
    let router = "model.layers.1.block_sparse_moe.gate.weight";
    mutant.edit_values(router, |values| values[3] = f32::NAN);
    let checkpoint = Checkpoint::open(mutant.path()).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 16).unwrap();
    let message = Decoder::new(&model, &mut ()).err().unwrap().to_string();
    let expected = format!("layer 1: {router} holds NaN at flat index 3; weights must be finite");
    assert!(message.ends_with(&expected), "{message}");
}
