//! The calibration pass: against reference statistics, over halves of the data, stopped and resumed, with padding.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};

use common::{data, read, shape, shared, windows};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Moment, Moments};
use moepress::calibrate::{Options, Sample, Statistics, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::model::Model;
use moepress::progress::Progress;
use moepress::tokens::{SourceFile, Windows};
use serde_json::Value;

fn measure(model: &Path, windows: &Windows, options: &Options, out: &Path) -> Statistics {
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    calibrate(&model, windows, options, out, &mut ()).unwrap()
}

/// Largest |a − b| / max(|b|, scale of b).
fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0.0f64, |m, v| m.max(v.abs())) * 1e-6 + f64::MIN_POSITIVE;
    a.iter().zip(b).map(|(x, y)| (x - y).abs() / y.abs().max(scale)).fold(0.0, f64::max)
}

/// ‖a − b‖ / ‖b‖.
fn frobenius(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(x, y)| x - y)) / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Every sum that the reference has, within the tolerance that it recommends for a float32 engine.
#[test]
fn statistics_equal_the_reference() {
    let Some(shared) = shared("reference") else { return };
    for model in ["mixtral", "qwen2_moe", "deepseek_v2"] {
        let reference = shared.join(model);
        let tokens = reference.join("tokens.safetensors");
        let windows = windows(&read(&tokens, "calib"), shape(&tokens, "calib").unwrap()[0]);
        let out = tempfile::tempdir().unwrap();
        let options = Options { second: Moment::SECOND.to_vec(), sample: Sample::All };
        let checkpoint = shared.join("../models").join(model);
        let found = measure(&checkpoint, &windows, &options, &out.path().join("stats.safetensors"));
        let expected: Value =
            serde_json::from_str(&std::fs::read_to_string(reference.join("stats.json")).unwrap()).unwrap();
        let arrays = reference.join("stats.safetensors");
        for (i, layer) in expected["layers"].as_array().unwrap().iter().enumerate() {
            let l = layer["layer"].as_u64().unwrap() as usize;
            let moments = found.moments(l, &Moment::ALL).unwrap();
            let name = format!("{model} layer {l}");
            if !counts_are_equal(&name, &moments, layer) {
                // A token on the fence went the other way, and takes its share of every sum with it.
                break;
            }
            compare_sums(&name, &moments, layer);
            compare_vectors(&name, &moments, &arrays, i);
            compare_grams(&name, &moments, &arrays, layer, l);
        }
    }
}

/// Whether the counts are the reference's. They may differ by tokens whose choice is closer than float32 can tell, of
/// which the reference counts those with a margin below 1e-5.
fn counts_are_equal(name: &str, moments: &Moments, layer: &Value) -> bool {
    let found = moments.get(Moment::Count).unwrap();
    let moved: f64 = found.iter().zip(numbers(&layer["N"])).map(|(a, b)| (a - b).abs()).sum();
    let undecided = layer["routing_margin"]["below_1e_5"].as_f64().unwrap();
    assert!(moved <= 2.0 * undecided, "{name}: {moved} choices differ, {undecided} tokens are undecided");
    moved == 0.0
}

fn compare_sums(name: &str, moments: &Moments, layer: &Value) {
    let pairs = [
        (Moment::GateSum, "sum_g", 1e-5),
        (Moment::GateSqSum, "sum_g2", 1e-5),
        (Moment::NormSum, "sum_f", 1e-5),
        (Moment::NormSqSum, "sum_f2", 1e-5),
        (Moment::GateNormSum, "sum_gf", 1e-5),
        (Moment::GateNormSqSum, "sum_g2f2", 1e-5),
        (Moment::SoftCount, "soft_all", 1e-5),
        (Moment::MaxNorm, "max_f", 1e-5),
        (Moment::MaxAbs, "max_abs_out", 1e-5),
    ];
    for (moment, key, tolerance) in pairs {
        let off = relative(moments.get(moment).unwrap(), &numbers(&layer[key]));
        assert!(off <= tolerance, "{name}: {key} is off by {off:.1e}");
    }
    let norm = moments.get(Moment::RoutedSqSum).unwrap()[0].sqrt();
    let expected = layer["routed_norm"].as_f64().unwrap();
    assert!((norm / expected - 1.0).abs() < 1e-5, "{name}: routed_norm {norm}, expected {expected}");
}

/// Entry `i` of the first dimension of a reference array.
fn slice(path: &Path, tensor: &str, i: usize) -> Vec<f64> {
    let all = read(path, tensor);
    let size = all.len() / shape(path, tensor).unwrap()[0];
    all[i * size..(i + 1) * size].to_vec()
}

fn compare_vectors(name: &str, moments: &Moments, arrays: &Path, i: usize) {
    let e = moments.dims().experts;
    let d = moments.dims().hidden_size;
    let count = moments.get(Moment::Count).unwrap();
    let tokens = moments.get(Moment::SampleCount).unwrap()[0];
    let mean = |moment: Moment, n: &dyn Fn(usize) -> f64| -> Vec<f64> {
        let sums = moments.get(moment).unwrap();
        sums.iter().enumerate().map(|(j, s)| if n(j / d) > 0.0 { s / n(j / d) } else { 0.0 }).collect()
    };
    let by_count = |e: usize| count[e];
    let outputs = mean(Moment::OutputSum, &by_count);
    let squares = mean(Moment::OutputSqSum, &by_count);
    let variance: Vec<f64> = squares.iter().zip(&outputs).map(|(s, m)| s - m * m).collect();
    let logits = moments.get(Moment::RouterGram).unwrap();
    let cosine = |j: usize| logits[j] / (logits[(j / e) * (e + 1)] * logits[(j % e) * (e + 1)]).sqrt();
    let cosines: Vec<f64> = (0..e * e).map(cosine).collect();
    let checks = [
        ("mean_out", outputs),
        ("mean_out_all", mean(Moment::SampleOutputSum, &|_| tokens)),
        ("mean_gated_out", mean(Moment::GateOutputSum, &by_count)),
        ("var_out", variance),
        ("coactivation", moments.get(Moment::CoActivation).unwrap().to_vec()),
        ("router_logit_cosine", cosines),
    ];
    for (tensor, found) in checks {
        let off = frobenius(&found, &slice(arrays, tensor, i));
        assert!(off < 1e-5, "{name}: {tensor} is off by {off:.1e}");
    }
}

fn compare_grams(name: &str, moments: &Moments, arrays: &Path, layer: &Value, l: usize) {
    let grams = [
        (Moment::InputGram, "Cx"),
        (Moment::GateInputGram, "Hx"),
        (Moment::HiddenGram, "Cz"),
        (Moment::GateHiddenGram, "Hz"),
    ];
    for (moment, key) in grams {
        let all = moments.get(moment).unwrap();
        let size = all.len() / moments.dims().experts;
        let side = size.isqrt();
        let trace = |gram: &[f64]| (0..side).map(|j| gram[j * (side + 1)]).sum::<f64>();
        let traces: Vec<f64> = all.chunks_exact(size).map(trace).collect();
        let norms: Vec<f64> =
            all.chunks_exact(size).map(|g| g.iter().map(|v| v * v).sum::<f64>().sqrt()).collect();
        assert!(relative(&traces, &numbers(&layer["gram_traces"][key])) < 1e-5, "{name}: traces of {key}");
        let fro = &layer["gram_traces"][format!("{key}_fro")];
        if !fro.is_null() {
            assert!(relative(&norms, &numbers(fro)) < 1e-5, "{name}: norms of {key}");
        }
    }
    let first = format!("gram_Cx.layer{l}");
    if shape(arrays, &first).is_some() {
        let expected = read(arrays, &first);
        let off = frobenius(&moments.get(Moment::InputGram).unwrap()[..expected.len()], &expected);
        assert!(off < 1e-5, "{name}: input Gram is off by {off:.1e}");
        let expected = read(arrays, &format!("gram_Hz.layer{l}.expert0"));
        let off = frobenius(&moments.get(Moment::GateHiddenGram).unwrap()[..expected.len()], &expected);
        assert!(off < 1e-5, "{name}: gated hidden Gram is off by {off:.1e}");
    }
}

/// Some windows of the small model's vocabulary.
fn random_windows(count: usize, length: usize, seed: u32) -> Windows {
    let id = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 16) % 64;
    Windows {
        ids: (0..(count * length) as u32).map(id).collect(),
        mask: None,
        count,
        length,
        files: vec![SourceFile { name: format!("part {seed}"), windows: count }],
        decoder: None,
    }
}

fn join(a: &Windows, b: &Windows) -> Windows {
    Windows {
        ids: [&a.ids[..], &b.ids].concat(),
        count: a.count + b.count,
        files: [&a.files[..], &b.files].concat(),
        ..a.clone()
    }
}

fn all_moments(statistics: &Statistics) -> Vec<Moments> {
    let layers = statistics.profile().moe_layers.iter();
    layers.map(|l| statistics.moments(l.layer, &Moment::ALL).unwrap()).collect()
}

#[test]
fn statistics_of_disjoint_tokens_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (random_windows(5, 24, 1), random_windows(3, 24, 2));
    let options = Options { second: Moment::SECOND.to_vec(), sample: Sample::PerWindow(7) };
    let at = |name: &str| dir.path().join(name);
    let model = data("qwen2_moe");
    let whole = measure(&model, &join(&a, &b), &options, &at("whole"));
    let parts = [measure(&model, &a, &options, &at("a")), measure(&model, &b, &options, &at("b"))];
    Statistics::merge(&parts, &at("sum")).unwrap();
    let sum = Statistics::open(&at("sum")).unwrap();
    assert_eq!(sum.tokens().tokens, whole.tokens().tokens);
    assert_eq!(sum.tokens().files, whole.tokens().files);
    for (found, expected) in all_moments(&sum).iter().zip(&all_moments(&whole)) {
        for (moment, values) in found.iter() {
            // Other chunks give other shapes of matrix products, so f32 activations differ in their last bits.
            let off = frobenius(values, expected.get(moment).unwrap());
            assert!(off < 1e-6, "{moment:?} is off by {off:.1e}");
        }
    }
    let same = [measure(&model, &a, &options, &at("c")), measure(&model, &a, &options, &at("d"))];
    let error = Statistics::merge(&same, &at("e")).unwrap_err().to_string();
    assert!(error.contains("same tokens"), "{error}");
    assert!(!at("e").exists());
}

/// Stops the pass by panicking after some layers, as close to a kill as one process gets.
struct StopAfter(usize);

impl Progress for StopAfter {
    fn step(&mut self, _: &str) {
        assert!(self.0 > 0, "stopped");
        self.0 -= 1;
    }
}

#[test]
fn a_stopped_pass_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let windows = random_windows(4, 24, 3);
    let options = Options { second: vec![Moment::InputGram], ..Options::default() };
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    measure(&data("qwen2_moe"), &windows, &options, &at("once"));
    let expected = std::fs::read(at("once")).unwrap();
    let checkpoint = Checkpoint::open(data("qwen2_moe")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 24).unwrap();
    let layers = model.architecture().layers.len();
    for stop in 0..layers {
        let out = at(&format!("stopped {stop}"));
        let run = || calibrate(&model, &windows, &options, &out, &mut StopAfter(stop));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert!(!out.exists());
        calibrate(&model, &windows, &options, &out, &mut ()).unwrap();
        assert!(std::fs::read(&out).unwrap() == expected, "stopped after {stop} layers");
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().all(|e| {
        let name = e.unwrap().file_name().into_string().unwrap();
        !name.ends_with(".partial") && !name.ends_with(".incomplete")
    }));
}

/// Work of another model or of other tokens is not taken up.
#[test]
fn a_partial_result_of_other_tokens_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options::default();
    let (a, b) = (random_windows(4, 24, 3), random_windows(4, 24, 4));
    let out = dir.path().join("stats");
    let checkpoint = Checkpoint::open(data("qwen2_moe")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 24).unwrap();
    let run = || calibrate(&model, &a, &options, &out, &mut StopAfter(1));
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
    measure(&data("qwen2_moe"), &b, &options, &out);
    measure(&data("qwen2_moe"), &b, &options, &dir.path().join("fresh"));
    assert!(std::fs::read(&out).unwrap() == std::fs::read(dir.path().join("fresh")).unwrap());
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let windows = random_windows(6, 24, 5);
    let options = Options { second: Moment::SECOND.to_vec(), ..Options::default() };
    let bytes = |threads: usize| {
        let out = dir.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| measure(&data("deepseek_v2"), &windows, &options, &out));
        std::fs::read(out).unwrap()
    };
    let one = bytes(1);
    assert!(one == bytes(2));
    assert!(one == bytes(8));
}

/// Windows longer than the model was prepared for are an error, as is what comes after them in the same way.
#[test]
fn windows_longer_than_the_model_was_prepared_for() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(data("qwen2_moe")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 16).unwrap();
    let windows = random_windows(2, 24, 7);
    let error = calibrate(&model, &windows, &Options::default(), &dir.path().join("s"), &mut ()).unwrap_err();
    let expected = "a text of 24 tokens is longer than the 16 that the model was prepared for";
    assert_eq!(error.to_string(), expected);
    for odd in [
        Windows { count: 3, ..windows.clone() },
        Windows { length: 0, ..windows.clone() },
        Windows { mask: Some(vec![true; 5]), ..windows.clone() },
        Windows { files: Vec::new(), ..windows.clone() },
        Windows { count: usize::MAX, length: 2, ..windows.clone() },
    ] {
        let error = calibrate(&model, &odd, &Options::default(), &dir.path().join("s"), &mut ()).unwrap_err();
        assert!(
            error.to_string().starts_with("ids, mask, decoder and files do not all belong to"),
            "{error}"
        );
    }
}

/// Models that differ in a router alone are two models.
#[test]
fn identity_tells_routers_apart() {
    let other = common::Mutant::of("qwen2_moe");
    let identity = |dir: &Path| Checkpoint::open(dir).unwrap().identity();
    assert_eq!(identity(other.path()), identity(&data("qwen2_moe")));
    other.edit_values("model.layers.1.mlp.gate.weight", |values| values.iter_mut().for_each(|v| *v += 0.5));
    assert_ne!(identity(other.path()), identity(&data("qwen2_moe")));
}

/// Right padding changes nothing, whatever ids it has.
#[test]
fn padding_never_counts() {
    let dir = tempfile::tempdir().unwrap();
    let plain = random_windows(3, 20, 6);
    let mut padded = Windows { ids: Vec::new(), length: 27, ..plain.clone() };
    let mut mask = Vec::new();
    for window in plain.ids.chunks_exact(20) {
        padded.ids.extend(window.iter().copied().chain([9; 7]));
        mask.extend((0..27).map(|p| p < 20));
    }
    padded.mask = Some(mask);
    let options = Options { second: Moment::SECOND.to_vec(), sample: Sample::All };
    let a = measure(&data("mixtral"), &plain, &options, &dir.path().join("a"));
    let b = measure(&data("mixtral"), &padded, &options, &dir.path().join("b"));
    assert_eq!(a.tokens().tokens, b.tokens().tokens);
    for (x, y) in all_moments(&a).iter().zip(&all_moments(&b)) {
        for (moment, values) in x.iter() {
            let off = frobenius(y.get(moment).unwrap(), values);
            assert!(off < 1e-6, "{moment:?} is off by {off:.1e}");
        }
    }
}
