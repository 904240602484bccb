//! Experts aligned by what their hidden neurons are on tokens.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::command::moepress;
use common::compress::{apply, files, plan, tokens};
use common::{data, encoder_windows};
use moepress::architecture::{Activation, Projection};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Expert, Linear, Matrix, Mlp, StoredExpert};
use moepress::calibrate::{Options as CalibrateOptions, calibrate};
use moepress::checkpoint::{Checkpoint, Dtype, Tensor, Weight};
use moepress::compress::{Inputs, LayoutChoice, Lockstep, Matching, Options, align};
use moepress::linalg::{Matrix as Dense, assignment};
use moepress::model::{LayerSource, LinearSource, Model, open_architecture, profile};
use moepress::plan::{Budget, Plan};

/// Numbers without structure, from −1 to 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn linear(rows: usize, cols: usize, values: &[f32], bias: Option<&[f32]>) -> LinearSource {
    let tensor = Tensor::from_f32("w", Dtype::F32, vec![rows, cols], values);
    let bias = bias.map(|values| Tensor::from_f32("b", Dtype::F32, vec![rows], values));
    Linear { weight: Weight::plain(tensor).unwrap(), bias }
}

fn expert(width: usize, d: usize, activation: Activation, biased: bool, seed: u64) -> Mlp<LinearSource> {
    let map = |rows: usize, cols: usize, seed: u64| {
        let bias = noise(rows, seed + 100);
        linear(rows, cols, &noise(rows * cols, seed), biased.then_some(&bias[..]))
    };
    let up = activation.is_gated().then(|| map(width, d, 7 * seed + 1));
    Mlp { gate: map(width, d, 7 * seed), up, down: map(d, width, 7 * seed + 2), activation }
}

/// Activations `[neuron][token]` in f64.
fn hidden(mlp: &Mlp<LinearSource>, x: &[f32], d: usize) -> Vec<Vec<f64>> {
    let apply = |map: &LinearSource, neuron: usize, x: &[f32]| -> f64 {
        let weight = map.weight.to_f32();
        let bias = map.bias.as_ref().map_or(0.0, |b| b.to_f32().unwrap()[neuron]);
        let terms = weight[neuron * d..(neuron + 1) * d].iter().zip(x);
        terms.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() + f64::from(bias)
    };
    let value = |neuron: usize, x: &[f32]| {
        let g = apply(&mlp.gate, neuron, x);
        let u = mlp.up.as_ref().map_or(0.0, |up| apply(up, neuron, x));
        let gelu = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        };
        match mlp.activation {
            Activation::SwiGlu => g / (1.0 + (-g).exp()) * u,
            Activation::ClampedSwiGlu { limit, slope } => {
                let (limit, slope) = (f64::from(limit), f64::from(slope));
                let g = g.min(limit);
                g / (1.0 + (-slope * g).exp()) * (u.clamp(-limit, limit) + 1.0)
            }
            Activation::Relu => g.max(0.0),
            Activation::SquaredRelu => g.max(0.0).powi(2),
            Activation::GeluTanh => gelu(g),
            Activation::GeGluTanh => gelu(g) * u,
        }
    };
    (0..mlp.gate.weight.rows()).map(|i| x.chunks_exact(d).map(|x| value(i, x)).collect()).collect()
}

/// The weights of every neuron, one after the other.
fn weights(mlp: &Mlp<LinearSource>) -> Vec<Vec<f64>> {
    let width = mlp.gate.weight.rows();
    let neuron = |i: usize| {
        let mut all = Vec::new();
        for projection in Projection::ALL {
            let Some(map) = mlp.map(projection) else { continue };
            let (values, cols) = (map.weight.to_f32(), map.weight.cols());
            match projection {
                Projection::Down => all.extend(values.iter().skip(i).step_by(width)),
                _ => all.extend(&values[i * cols..(i + 1) * cols]),
            }
            if projection != Projection::Down {
                all.extend(map.bias.iter().map(|b| b.to_f32().unwrap()[i]));
            }
        }
        all.into_iter().map(f64::from).collect()
    };
    (0..width).map(neuron).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn centred(v: &[f64]) -> Vec<f64> {
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    v.iter().map(|v| v - mean).collect()
}

fn decorrelation(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (centred(a), centred(b));
    1.0 - dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let unit = |v: &[f64]| -> Vec<f64> {
        let norm = dot(v, v).sqrt();
        v.iter().map(|v| if norm > 0.0 { v / norm } else { 0.0 }).collect()
    };
    let (a, b) = (unit(a), unit(b));
    a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

/// Costs of orders and the best of them, from definitions in f64: with and without a gate, with biases, with a neuron that
/// never fires, over more tokens than are in memory at a time.
#[test]
fn the_best_order_is_that_of_the_definitions() {
    let clamped = Activation::ClampedSwiGlu { limit: 1.5, slope: 1.702 };
    let (width, d, n) = (12, 8, 1500);
    for (activation, biased) in [
        (Activation::SwiGlu, false),
        (clamped, true),
        (Activation::Relu, false),
        (Activation::GeluTanh, false),
        (Activation::SquaredRelu, false),
    ] {
        let x = noise(n * d, 3);
        let inputs = Inputs::new(x.clone(), d).unwrap();
        assert_eq!(inputs.tokens(), n);
        let reference = expert(width, d, activation, biased, 1);
        let mut member = expert(width, d, activation, biased, 2);
        if activation == Activation::SwiGlu {
            let mut gate = member.gate.weight.to_f32();
            gate[..d].fill(0.0);
            member.gate = linear(width, d, &gate, None);
        }
        let active = [&reference, &member].map(|mlp| hidden(mlp, &x, d));
        let stored = [&reference, &member].map(weights);
        let both = |i: usize, j: usize| {
            distance(&active[0][i], &active[1][j]) + distance(&stored[0][i], &stored[1][j])
        };
        let alone = |i: usize, j: usize| {
            let value = decorrelation(&active[0][i], &active[1][j]);
            if value.is_nan() { 1.0 } else { value }
        };
        for matching in [Matching::Activations(&inputs), Matching::Both(&inputs)] {
            let cost = |i, j| if matches!(matching, Matching::Both(_)) { both(i, j) } else { alone(i, j) };
            let found = align(&reference, &member, matching).unwrap();
            let costs = (0..width * width).map(|at| cost(at / width, at % width)).collect();
            let best = assignment(Dense::new(width, width, costs).unwrap()).unwrap();
            let sum = |order: &[usize]| (0..width).map(|i| cost(i, order[i])).sum::<f64>();
            for (value, expected, what) in [
                (found.cost, sum(&found.permutation), "cost"),
                (found.unaligned_cost, sum(&(0..width).collect::<Vec<_>>()), "stored order"),
                (found.cost, sum(&best), "best"),
            ] {
                assert!((value - expected).abs() < 1e-5, "{activation:?}, {what}: {value} for {expected}");
            }
            assert!(found.cost < found.unaligned_cost);
        }
    }
}

/// On inputs that fill half of the space only, weights may be anything in the other half: a member that is the reference
/// with other such weights, its neurons in another order, is recognised by what it does.
#[test]
fn activations_see_through_weights_that_no_input_meets() {
    let (width, d, n) = (24, 16, 300);
    let reference = expert(width, d, Activation::SwiGlu, false, 5);
    let order: Vec<usize> = (0..width).map(|i| (i * 7 + 2) % width).collect();
    let disguised = |map: &LinearSource, seed: u64| {
        let own = map.weight.to_f32();
        let mut rows: Vec<f32> = noise(width * d, seed).iter().map(|v| 3.0 * v).collect();
        for (row, &i) in rows.chunks_exact_mut(d).zip(&order) {
            row[..d / 2].copy_from_slice(&own[i * d..i * d + d / 2]);
        }
        linear(width, d, &rows, None)
    };
    let member = Mlp {
        gate: disguised(&reference.gate, 11),
        up: reference.up.as_ref().map(|up| disguised(up, 12)),
        down: linear(d, width, &noise(d * width, 13), None),
        activation: Activation::SwiGlu,
    };
    let mut x = noise(n * d, 4);
    x.chunks_exact_mut(d).for_each(|row| row[d / 2..].fill(0.0));
    let inputs = Inputs::new(x, d).unwrap();
    let planted: Vec<usize> = (0..width).map(|i| order.iter().position(|o| *o == i).unwrap()).collect();
    let right = |matching| {
        let found = align(&reference, &member, matching).unwrap().permutation;
        found.iter().zip(&planted).filter(|(a, b)| a == b).count()
    };
    assert_eq!(right(Matching::Activations(&inputs)), width);
    assert_eq!(right(Matching::Both(&inputs)), width);
    let by_weights = right(Matching::Weights);
    assert!(by_weights < width / 2, "{by_weights} of {width} neurons found by weights");
}

/// Shapes that do not fit are said.
#[test]
fn what_cannot_be_compared() {
    let a = expert(4, 8, Activation::SwiGlu, false, 1);
    let says = |inputs: &Inputs| align(&a, &a, Matching::Both(inputs)).unwrap_err().to_string();
    assert_eq!(
        says(&Inputs::new(Vec::new(), 8).unwrap()),
        "0 tokens of 8 numbers cannot be run on these experts"
    );
    assert_eq!(
        says(&Inputs::new(vec![0.0; 20], 4).unwrap()),
        "5 tokens of 4 numbers cannot be run on these experts"
    );
    let ragged = Inputs::new(vec![0.0; 20], 8).unwrap_err().to_string();
    assert_eq!(ragged, "20 values are no rows of 8 inputs");
}

const MOEPRESS: LayoutChoice = LayoutChoice::Moepress;

fn merging(model: &Path, name: &str, set: &[(&str, &str)]) -> Plan {
    plan(model, name, Some(Budget::Remove(0.5)), set)
}

/// Every family's experts, in a stream that follows the original or the compressed layers: the bytes are the same on any
/// number of threads and in company of other plans, and others than by weights.
#[test]
fn merging_by_activations_while_compressing() {
    let out = tempfile::tempdir().unwrap();
    let (calibration, mut differ) = (tokens(), 0);
    for (name, propagate) in [
        ("mixtral", "false"),
        ("qwen2_moe", "true"),
        ("gpt_oss_mxfp4", "false"),
        ("llama4_text", "false"),
        ("phimoe", "true"),
    ] {
        let model = data(name);
        let by = |kind: &str| merging(&model, "ream", &[("align_by", kind), ("propagate", propagate)]);
        let options = Options { tokens: Some(&calibration), layout: MOEPRESS, ..Options::default() };
        let compressed = |plan: &Plan, threads: usize| {
            let dir = out.path().join(format!("{name}-{threads}-{}", plan.options["align_by"]));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| apply(&model, plan, &options, &dir)).unwrap();
            files(&dir)["model.safetensors"].clone()
        };
        let both = by("both");
        let one = compressed(&both, 1);
        assert!(one == compressed(&both, 8), "{name}: threads");
        differ += usize::from(one != compressed(&by("weights"), 1));
        differ += usize::from(one != compressed(&by("activations"), 1));

        // Beside a plan that asks for second moments, and one that needs nothing.
        let checkpoint = Checkpoint::open(&model).unwrap();
        let opened = Model::new(&checkpoint, &Cpu, calibration.longest()).unwrap();
        let profile = profile(&checkpoint, opened.architecture()).unwrap();
        let whitened = plan(&model, "low-rank", Some(Budget::Remove(0.5)), &[]);
        let weights = by("weights");
        let plans = [&weights, &whitened, &both];
        let (mut lockstep, outcomes) = Lockstep::new(&opened, &profile, &plans, &options).unwrap();
        let takes_part = outcomes.iter().filter(|o| o.is_ok()).count();
        let alone = Checkpoint::open(out.path().join(format!("{name}-1-\"both\""))).unwrap();
        for l in 0..opened.architecture().layers.len() {
            let source = LayerSource::open(&checkpoint, opened.architecture(), l).unwrap();
            let own = LayerSource::open(&alone, &open_architecture(&alone).unwrap(), l).unwrap();
            lockstep
                .layer(&source, |i, layer| {
                    let layer = layer?;
                    if let (true, Some(moe), Some(own)) = (i + 1 == takes_part, layer.source.moe(), own.moe())
                    {
                        for (a, b) in moe.experts.iter().zip(&own.experts) {
                            assert_eq!(values(a), values(b), "{name}, layer {l}");
                        }
                    }
                    Ok::<_, moepress::compress::Error>(())
                })
                .unwrap();
        }
    }
    assert!(differ > 5, "{differ} of 10 results differ from the one by both");
}

/// What an expert holds, as numbers.
fn values(expert: &StoredExpert) -> Vec<Vec<f32>> {
    let Expert::Mlp(mlp) = expert else { return Vec::new() };
    let maps = mlp.maps().map(|m| match &m.weight {
        Matrix::Dense(weight) => weight.to_f32(),
        other => panic!("{other:?}"),
    });
    maps.collect()
}

/// Encoder and decoder have tokens of their own.
#[test]
fn merging_by_activations_in_both_stacks() {
    let model = data("switch_transformers");
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let windows = encoder_windows(&model.join("golden.safetensors"));
    let opened = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let path = dir.path().join("s");
    let statistics = calibrate(&opened, &windows, &CalibrateOptions::default(), &path, &mut ()).unwrap();
    let moments = statistics.first_moments().unwrap();
    let set = common::compress::options(&[("align_by", "activations")]);
    let request = moepress::plan::Request {
        statistics: Some(&moments),
        budget: Some(Budget::Remove(0.5)),
        options: &set,
        ..moepress::plan::Request::new(statistics.profile())
    };
    let plan = moepress::plan::method("m-smoe").unwrap().plan(&request).unwrap();
    let options = Options { tokens: Some(&windows), ..Options::default() };
    let out = dir.path().join("out");
    moepress::compress::compress(&opened, &plan, &options, &out, &mut ()).unwrap();
    assert!(Checkpoint::open(&out).is_ok());
}

/// Statistics do not hold what every expert does on every token.
#[test]
fn activations_need_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let plan = merging(&model, "m-smoe", &[("align_by", "both")]);
    let file = dir.path().join("plan.json");
    std::fs::write(&file, plan.to_json()).unwrap();
    let out = dir.path().join("out");
    let path = |p: &Path| p.to_string_lossy().into_owned();
    let words = ["compress", &path(&model), "--plan", &path(&file), "--out", &path(&out)];
    let message = moepress(words).error(1);
    assert_eq!(
        message,
        "the plan aligns merged experts by their activations, which are computed while compressing: give \
         --tokens, or plan with --set align_by=weights"
    );
    assert!(!out.exists());
}
