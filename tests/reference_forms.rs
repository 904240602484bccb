//! Models whose experts have other forms, against reference perplexities, where the reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::read;
use common::reference::Reference;
use moepress::backend::Moment;
use moepress::linalg::{Matrix, ridge_leverage};
use moepress::plan::Criterion;

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

const SECOND: [Moment; 3] = [Moment::InputGram, Moment::HiddenGram, Moment::GateHiddenGram];

/// Narrow experts and shared bases, chosen and fitted from our own statistics. Weights that are copied have the
/// reference's numbers; those that are computed are stored in bf16, as the model's are.
#[test]
fn channels_and_bases_have_the_reference_perplexity() {
    let Some(mixtral) = Reference::open("mixtral", &SECOND) else { return };
    let Some(qwen) = Reference::open("qwen2_moe", &SECOND) else { return };
    for (reference, method, percent, set, key, bound) in [
        // Of mixtral the reference leaves one expert no channel at all, where here every expert keeps one.
        (&qwen, "camera", 25, &[][..], "channels.camera_layer.plain", 5e-6),
        (
            &mixtral,
            "camera",
            50,
            &[("allocate", "uniform"), ("refit", "refit")],
            "channels.camera.refit",
            5e-4,
        ),
        (&mixtral, "modegpt", 25, &[("refit", "anchored")], "channels.leverage_relative.anchored", 5e-4),
        (
            &qwen,
            "camera",
            50,
            &[("criterion", "energy"), ("allocate", "uniform")],
            "channels.energy.plain",
            5e-6,
        ),
        (&qwen, "modegpt", 25, &[("criterion", "leverage-unit")], "channels.leverage_unit.refit", 5e-4),
        (&mixtral, "d2-moe", 25, &[("factor_dtype", "f32")], "d2.frequency.plain", 5e-4),
        (&mixtral, "d2-moe", 50, &[("base", "gram")], "d2.gram.plain", 5e-4),
        (&qwen, "d2-moe", 25, &[("base", "mean")], "d2.mean.plain", 5e-4),
    ] {
        let key = format!("{key}.{percent}");
        let plan = reference.plan(method, f64::from(percent) / 100.0, set);
        let entry = &reference.evaluations[&key];
        let entry = if entry.is_null() { &reference.evaluations["evaluations"][&key] } else { entry };
        assert_eq!(Some(plan.expected.routed_parameters), entry["routed_params"].as_u64(), "{key}");
        let difference = reference.difference(&plan, &key);
        assert!(difference.abs() < bound, "{key} is off by {difference:.1e}");
    }
    for reference in [mixtral, qwen] {
        channel_scores(&reference);
    }
}

/// Scores of all channels, relative to the largest of their layer.
fn channel_scores(reference: &Reference) {
    let file = reference.dir.join("channels.safetensors");
    let expected = |name: &str| read(&file, &format!("score.{name}"));
    let names = ["camera", "energy", "leverage_unit", "leverage_relative"];
    let expected = names.map(expected);
    let profile = reference.statistics.profile();
    for (i, layer) in profile.moe_layers.iter().enumerate() {
        let moments = reference.statistics.moments(layer.layer, &Moment::ALL).unwrap();
        let of = |moment| moments.get(moment).unwrap();
        let (p, experts) = (layer.width, layer.experts);
        let energies = |criterion: Criterion| {
            criterion.energies(of(Moment::GateHiddenSqSum), of(Moment::GateHiddenMax), of(Moment::DownNormSq))
        };
        let leverage = |unit: bool| -> Vec<f64> {
            let expert = |e: usize| {
                let n = of(Moment::Count)[e].max(1.0);
                let c = of(Moment::HiddenGram)[e * p * p..(e + 1) * p * p].iter().map(|v| v / n).collect();
                let c = Matrix::new(p, p, c).unwrap();
                let trace: f64 = (0..p).map(|j| c.row(j)[j]).sum();
                ridge_leverage(&c, if unit { 1.0 } else { trace / p as f64 }).unwrap()
            };
            (0..experts).flat_map(expert).collect()
        };
        let found =
            [energies(Criterion::Camera), energies(Criterion::Energy), leverage(true), leverage(false)];
        for ((name, found), expected) in names.iter().zip(&found).zip(&expected) {
            let expected = &expected[i * experts * p..(i + 1) * experts * p];
            let scale = expected.iter().copied().fold(0.0, f64::max);
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-4 * scale, "layer {}: {name}: {worst} of {scale}", layer.layer);
        }
    }
}
