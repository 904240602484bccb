//! Models whose experts have other forms, against reference perplexities, where the reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::reference::Reference;

/// Constants from our own statistics in place of the experts that the score of the paper chooses, and others.
#[test]
fn novices_have_the_reference_perplexity() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        for (score, percent) in [("mone-frequency", 25), ("mone-soft", 50), ("frequency", 25), ("reap", 50)] {
            let key = format!("novice.{}.{percent}", score.replace('-', "_"));
            let plan = reference.plan("mone", f64::from(percent) / 100.0, &[("score", score)]);
            let expected = reference.evaluations[&key]["routed_params"].as_u64();
            let expected = expected.or(reference.evaluations["evaluations"][&key]["routed_params"].as_u64());
            assert_eq!(Some(plan.expected.routed_parameters), expected, "{name}: {key}");
            let difference = reference.difference(&plan, &key);
            assert!(difference.abs() < 5e-6, "{name}: {key} is off by {difference:.1e}");
        }
    }
}
