//! Models whose experts have other forms, against reference perplexities, where the reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::read;
use common::reference::Reference;
use moepress::backend::cpu::Cpu;
use moepress::backend::{Backend, Expert, Moment};
use moepress::checkpoint::Checkpoint;
use moepress::linalg::{Matrix, Refit, refit_columns, ridge_leverage};
use moepress::model::{FeedForwardSource, LayerSource, Model, Stream};
use moepress::plan::Criterion;
use serde_json::Value;

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
        (&mixtral, "d2-moe", 25, &[("align", "true")], "d2.frequency.aligned", 5e-4),
        (&qwen, "d2-moe", 50, &[("align", "true"), ("base", "gram")], "d2.gram.aligned", 5e-4),
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
        channel_losses(&reference);
        channel_layer_error(&reference);
    }
}

fn results(reference: &Reference, key: &str) -> Value {
    let text = std::fs::read_to_string(reference.dir.join("channels.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["results"][key]["layers"].clone()
}

/// What every expert of the first layer loses, Σ g² ‖W z − W' z_S‖² = tr((W − W') H (W − W')ᵀ), with the channels that the
/// reference kept and each of the three down matrices.
fn channel_losses(reference: &Reference) {
    let checkpoint = Checkpoint::open(&reference.model).unwrap();
    let architecture = moepress::model::open_architecture(&checkpoint).unwrap();
    let source = LayerSource::open(&checkpoint, &architecture, 0).unwrap();
    let FeedForwardSource::Moe(moe) = &source.feed_forward else { unreachable!("a MoE layer") };
    let moments = reference.statistics.moments(0, &Moment::ALL).unwrap();
    let grams = moments.get(Moment::GateHiddenGram).unwrap();
    let kinds = [
        ("plain", Refit::Plain, 1e-5),
        ("refit", Refit::LeastSquares, 1e-3),
        ("anchored", Refit::Anchored, 1e-3),
    ];
    for key in ["camera.50", "leverage_relative.25"] {
        let kept = read(&reference.dir.join("channels.safetensors"), &format!("keep.{key}"));
        let results = &results(reference, key)[0];
        for (e, expert) in moe.experts.iter().enumerate() {
            let Expert::Mlp(mlp) = expert else { unreachable!("a dense expert") };
            let w = mlp.down.weight.left();
            let p = w.cols();
            let w = Matrix::from_f32(w.rows(), p, &w.to_f32()).unwrap();
            let h = Matrix::new(p, p, grams[e * p * p..(e + 1) * p * p].to_vec()).unwrap();
            let own = &kept[e * p..(e + 1) * p];
            let keep: Vec<usize> = (0..p).filter(|&c| own[c] != 0.0).collect();
            for (name, kind, bound) in kinds {
                let fitted = refit_columns(&w, Some(&h), &keep, kind).unwrap();
                let mut rest = w.clone();
                for i in 0..w.rows() {
                    let row = &mut rest.as_mut_slice()[i * p..(i + 1) * p];
                    keep.iter().zip(fitted.row(i)).for_each(|(&c, v)| row[c] -= v);
                }
                let weighted = rest.matmul(&h).unwrap();
                let pairs = rest.as_slice().iter().zip(weighted.as_slice());
                let found: f64 = pairs.map(|(a, b)| a * b).sum();
                let expected = results[format!("expert_loss_{name}")][e].as_f64().unwrap();
                let name = format!("{key}, {name}, expert {e}");
                assert!((found - expected).abs() <= bound * expected + 1e-6, "{name}: {found} {expected}");
            }
        }
    }
}

/// How far the output of the whole first layer moves on the calibration tokens.
fn channel_layer_error(reference: &Reference) {
    let set = [("criterion", "energy"), ("allocate", "uniform")];
    let plan = reference.plan("camera", 0.5, &set);
    let out = reference.work.path().join("layer error");
    reference.compress(&plan, &out);
    let first = |dir: &Path| -> Vec<f32> {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let model = Model::new(&checkpoint, &Cpu, reference.calibration.longest()).unwrap();
        let mut stream = Stream::new(&model, &reference.calibration).unwrap();
        stream.advance(&model.layer(0).unwrap(), |_, _| Ok(())).unwrap();
        stream.chunks.iter().flat_map(|c| Cpu.download(&c.x).unwrap()).collect()
    };
    let (original, narrow) = (first(&reference.model), first(&out));
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    let found = original.iter().zip(&narrow).map(square).sum::<f64>().sqrt();
    let expected = results(reference, "energy.50")[0]["layer_error_plain"]["single"].as_f64().unwrap();
    assert!((found / expected - 1.0).abs() < 1e-4, "{found} instead of {expected}");
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
