//! Compressed trained models against reference perplexities, where the reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::reference::Reference;
use moepress::backend::Moment;
use moepress::plan::Action;

/// The experts that the reference dropped, dropped: same numbers up to float32 rounding.
#[test]
fn pruned_models_have_the_reference_perplexity() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        for key in ["prune.random1.25", "prune.frequency.50", "prune.reap.25", "prune_global.seer_soft.25"] {
            let mut plan = reference.plan("random", 0.25, &[]);
            for layer in &mut plan.layers {
                let dropped = reference.dropped[key][layer.layer.to_string()].as_array().unwrap();
                let dropped: Vec<u64> = dropped.iter().map(|e| e.as_u64().unwrap()).collect();
                for expert in &mut layer.experts {
                    let drop = dropped.contains(&(expert.expert as u64));
                    expert.action = if drop { Action::Drop } else { Action::Keep };
                }
            }
            let difference = reference.difference(&plan, key);
            assert!(difference.abs() < 5e-6, "{name}: {key} is off by {difference:.1e}");
        }
    }
}

/// Factors computed from our own statistics, stored in f32.
#[test]
fn low_rank_models_have_the_reference_perplexity() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name, &[Moment::InputGram, Moment::HiddenGram]) else { return };
        for (key, remove, whiten) in [
            ("low_rank.plain.25", 0.25, "false"),
            ("low_rank.plain.50", 0.5, "false"),
            ("low_rank.whitened.25", 0.25, "true"),
            ("low_rank.whitened.50", 0.5, "true"),
        ] {
            let plan = reference.plan("low-rank", remove, &[("whiten", whiten), ("factor_dtype", "f32")]);
            let difference = reference.difference(&plan, key);
            assert!(difference.abs() < 5e-6, "{name}: {key} is off by {difference:.1e}");
        }
        // Factors rounded to the weights' bf16 stay within what the reference grants a recomputed plan.
        let (key, plan) = ("low_rank.whitened.50", reference.plan("low-rank", 0.5, &[]));
        std::fs::remove_dir_all(reference.work.path().join(key)).unwrap();
        let difference = reference.difference(&plan, key);
        assert!(difference.abs() < 5e-4, "{name}: {key} in bf16 is off by {difference:.1e}");
    }
}
