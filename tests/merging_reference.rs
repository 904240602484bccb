//! Trained models merged as the reference merged them: alignments, stored means, layer errors and perplexities, where the
//! reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{read, shape, shared, windows};
use moepress::architecture::{Architecture, Projection};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Backend, Expert, Linear, Matrix, Mlp, StoredExpert};
use moepress::calibrate::{Options as Calibration, Sample, Statistics, calibrate};
use moepress::checkpoint::{Checkpoint, Dtype};
use moepress::compress::{FactorOptions, Matching, Options, align, apply_layer, compress};
use moepress::eval::perplexity;
use moepress::model::{FeedForwardSource, LayerSource, LinearSource, Model, MoeSource, open_architecture};
use moepress::plan::{Action, Budget, LayerPlan, Plan, Request, method};
use moepress::tokens::Windows;
use serde_json::Value;

/// A reference model.
struct Reference {
    dir: PathBuf,
    model: PathBuf,
    calibration: Windows,
}

impl Reference {
    fn open(name: &str) -> Option<Self> {
        let dir = shared("reference")?.join(name);
        let tokens = dir.join("tokens.safetensors");
        let count = shape(&tokens, "calib").unwrap()[0];
        let calibration = windows(&read(&tokens, "calib"), count);
        Some(Reference { model: dir.join("../../models").join(name), dir, calibration })
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.dir.join(file)).unwrap()).unwrap()
    }

    /// Statistics of the calibration tokens with every expert run on each.
    fn statistics(&self, path: &Path) -> Statistics {
        let checkpoint = Checkpoint::open(&self.model).unwrap();
        let model = Model::new(&checkpoint, &Cpu, self.calibration.longest()).unwrap();
        let options = Calibration { sample: Sample::All, ..Default::default() };
        calibrate(&model, &self.calibration, &options, path, &mut ()).unwrap()
    }
}

/// The plan of `name` with `percent` % of the experts merged away.
fn plan(statistics: &Statistics, name: &str, percent: &str, set: &[(&str, &str)]) -> Plan {
    let moments = statistics.first_moments().unwrap();
    let options: BTreeMap<String, String> = set.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let request = Request {
        statistics: Some(&moments),
        budget: Some(Budget::Remove(percent.parse::<f64>().unwrap() / 100.0)),
        options: &options,
        ..Request::new(statistics.profile())
    };
    method(name).unwrap().plan(&request).unwrap()
}

fn moe(checkpoint: &Checkpoint, architecture: &Architecture, l: usize) -> MoeSource {
    LayerSource::open(checkpoint, architecture, l).unwrap().moe().unwrap().clone()
}

fn dense(expert: &StoredExpert) -> Mlp<LinearSource> {
    let Expert::Mlp(mlp) = expert else { panic!("{}", expert.form()) };
    mlp.try_map(|m| {
        let Matrix::Dense(w) = &m.weight else { return Err("not dense") };
        Ok(Linear { weight: w.clone(), bias: m.bias.clone() })
    })
    .unwrap()
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

/// Total costs within 1e-6 of the reference, and the permutation its own wherever the cost is.
#[test]
fn alignments_are_those_of_the_reference() {
    for name in ["mixtral", "qwen2_moe", "deepseek_v2"] {
        let Some(reference) = Reference::open(name) else { return };
        let checkpoint = Checkpoint::open(&reference.model).unwrap();
        let architecture = open_architecture(&checkpoint).unwrap();
        let permutations = reference.dir.join("mc_smoe.safetensors");
        let json = reference.json("mc_smoe.json");
        let mut same = 0;
        let mut all = 0;
        for layer in json["variants"]["exact.50"]["layers"].as_array().unwrap() {
            let l = layer["layer"].as_u64().unwrap() as usize;
            let moe = moe(&checkpoint, &architecture, l);
            for entry in layer["alignment"].as_array().unwrap() {
                let number = |key: &str| entry[key].as_u64().unwrap() as usize;
                let (target, member) = (number("ref"), number("expert"));
                let found =
                    align(&dense(&moe.experts[target]), &dense(&moe.experts[member]), Matching::Weights)
                        .unwrap();
                for (cost, key) in [(found.cost, "cost_aligned"), (found.unaligned_cost, "cost_identity")] {
                    let expected = entry[key].as_f64().unwrap();
                    let place = format!("{name} layer {l}: {member} to {target}: {key}");
                    assert!((cost - expected).abs() <= 1e-6 * expected, "{place}: {cost}, not {expected}");
                }
                let key = format!("perm.layer{l}.ref{target}.expert{member}");
                let expected: Vec<usize> =
                    read(&permutations, &key).into_iter().map(|p| p as usize).collect();
                all += 1;
                same += usize::from(found.permutation == expected);
            }
        }
        assert!(all > 8 && same + 1 >= all, "{name}: {same} of {all} permutations are the reference's");
    }
}

/// Means of every group, plain and aligned: norms, sums and entries.
#[test]
fn means_are_those_of_the_reference() {
    for name in ["mixtral", "qwen2_moe", "deepseek_v2"] {
        let Some(reference) = Reference::open(name) else { return };
        let checkpoint = Checkpoint::open(&reference.model).unwrap();
        let architecture = open_architecture(&checkpoint).unwrap();
        let json = reference.json("mc_smoe.json");
        for (i, layer) in json["variants"]["exact.50"]["layers"].as_array().unwrap().iter().enumerate() {
            let l = layer["layer"].as_u64().unwrap() as usize;
            let frequency = &json["frequency"][i];
            let moe = moe(&checkpoint, &architecture, l);
            let groups: Vec<Vec<usize>> = layer["groups"].as_array().unwrap().iter().map(numbers).collect();
            let mut plan = LayerPlan::new(l, 1, vec![Action::Keep; moe.experts.len()]);
            for group in &groups {
                let total: f64 = group.iter().map(|e| frequency[e].as_f64().unwrap()).sum();
                for &e in &group[1..] {
                    let weight = frequency[e].as_f64().unwrap() / total;
                    plan.experts[e].action = Action::Merge { into: group[0], weight };
                }
            }
            for (key, align) in [("merged_aligned", true), ("merged_unaligned", false)] {
                let options = FactorOptions { align, merge_dtype: Some(Dtype::F32), ..Default::default() };
                let merged = apply_layer(&plan, &moe, None, options).unwrap();
                for (group, expected) in groups.iter().zip(layer[key].as_array().unwrap()) {
                    let mlp = dense(&merged.moe.experts[group[0]]);
                    for p in Projection::ALL {
                        let weight = &mlp.map(p).unwrap().weight;
                        let (values, cols) = (weight.to_f32(), weight.cols());
                        let expected = &expected[p.name().trim_end_matches("_proj")];
                        let number = |key: &str| expected[key].as_f64().unwrap();
                        let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                        let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
                        let last = f64::from(values[values.len() - 1]);
                        for (found, key) in [
                            (norm, "fro"),
                            (sum, "sum"),
                            (f64::from(values[0]), "e00"),
                            (f64::from(values[cols + 2]), "e12"),
                            (last, "last"),
                        ] {
                            let off = (found - number(key)).abs();
                            assert!(
                                off <= 1e-5 * number("fro"),
                                "{name} layer {l} {group:?} {p:?} {key}: {off}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Plans from our own statistics give the reference's layer errors and, on the first windows of every domain, its losses.
#[test]
fn merged_models_have_the_reference_errors_and_losses() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name) else { return };
        let work = tempfile::tempdir().unwrap();
        let statistics = reference.statistics(&work.path().join("s"));
        for (method, json, kind, aligned, percent, set) in [
            ("m-smoe", "mc_smoe", "exact", true, "25", &[][..]),
            ("m-smoe", "mc_smoe", "exact", true, "50", &[]),
            ("m-smoe", "mc_smoe", "exact", false, "50", &[]),
            ("m-smoe", "mc_smoe", "strict", true, "50", &[("grouping", "strict")]),
            ("hc-smoe", "hc_smoe", "all", false, "25", &[]),
            ("hc-smoe", "hc_smoe", "all", false, "50", &[]),
            ("hc-smoe", "hc_smoe", "all", true, "50", &[]),
            ("hc-smoe", "hc_smoe", "routed", false, "25", &[("basis", "routed")]),
            ("hc-smoe", "hc_smoe", "routed", true, "50", &[("basis", "routed")]),
        ] {
            let flag = if aligned { "true" } else { "false" };
            let set = [set, &[("align", flag), ("merge_dtype", "f32")]].concat();
            let plan = plan(&statistics, method, percent, &set);
            let variant = match (method, aligned) {
                (_, true) => "aligned",
                ("m-smoe", false) => "unaligned",
                (_, false) => "plain",
            };
            let key = format!("{json}.{kind}.{variant}.{percent}");
            let expected = &reference.json(&format!("{json}.json"))["variants"][format!("{kind}.{percent}")];
            if percent == "50" {
                let which = if aligned { "error_aligned" } else { "error" };
                compare_errors(&reference, &plan, expected, which, &key);
            }
            compare_losses(&reference, &plan, &key, &work.path().join(&key));
        }
    }
}

/// Error of every merged layer on its original inputs, relative to the layer's routed output.
fn compare_errors(reference: &Reference, plan: &Plan, expected: &Value, which: &str, key: &str) {
    let checkpoint = Checkpoint::open(&reference.model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, reference.calibration.longest()).unwrap();
    let mut stream = moepress::model::Stream::new(&model, &reference.calibration).unwrap();
    let options = FactorOptions {
        align: plan.options["align"].as_bool().unwrap(),
        merge_dtype: Some(Dtype::F32),
        ..Default::default()
    };
    for l in 0..model.architecture().layers.len() {
        let source = LayerSource::open(&checkpoint, model.architecture(), l).unwrap();
        let position = plan.layers.iter().position(|p| p.layer == l).unwrap();
        let mut merged = source.clone();
        let FeedForwardSource::Moe(moe) = &mut merged.feed_forward else { panic!("layer {l} is dense") };
        *moe = apply_layer(&plan.layers[position], moe, None, options).unwrap().moe;
        let (original, merged) = (model.prepare(&source).unwrap(), model.prepare(&merged).unwrap());
        // Attention and shared experts are the same on both sides, so they cancel.
        let before: Vec<Vec<f32>> = stream.chunks.iter().map(|c| Cpu.download(&c.x).unwrap()).collect();
        stream.advance(&original, |_, _| Ok(())).unwrap();
        let after: Vec<Vec<f32>> = stream.chunks.iter().map(|c| Cpu.download(&c.x).unwrap()).collect();
        let hidden = model.architecture().hidden_size;
        let upload = |stream: &mut moepress::model::Stream<'_, Cpu>, from: &[Vec<f32>]| {
            for (chunk, rows) in stream.chunks.iter_mut().zip(from) {
                Cpu.upload(rows, rows.len() / hidden, hidden, &mut chunk.x).unwrap();
            }
        };
        upload(&mut stream, &before);
        stream.advance(&merged, |_, _| Ok(())).unwrap();
        let mut square = 0.0;
        for (chunk, after) in stream.chunks.iter().zip(&after) {
            let rows = Cpu.download(&chunk.x).unwrap();
            square += rows.iter().zip(after).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        upload(&mut stream, &after);
        let layer = &expected["layers"][position];
        let layer = if layer[which].is_null() { &layer["error_unaligned"] } else { &layer[which] };
        let single = layer["single"].as_f64().unwrap();
        let scale = if single > 0.0 { single / layer["relative"].as_f64().unwrap() } else { 1.0 };
        let off = (square.sqrt() - single).abs();
        assert!(
            off <= 1e-5 * single + 1e-5 * scale,
            "{key} layer {l}: {} instead of {single}",
            square.sqrt()
        );
    }
}

/// Losses of the first window of every domain.
fn compare_losses(reference: &Reference, plan: &Plan, key: &str, out: &Path) {
    let checkpoint = Checkpoint::open(&reference.model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, reference.calibration.longest()).unwrap();
    compress(&model, plan, &Options::default(), out, &mut ()).unwrap();
    let tokens = reference.dir.join("tokens.safetensors");
    let ids = read(&tokens, "eval");
    let (count, length) = (120, ids.len() / 120);
    let expected = read(&reference.dir.join("evaluations.safetensors"), key);
    let compressed = Checkpoint::open(out).unwrap();
    let compressed = Model::new(&compressed, &Cpu, length).unwrap();
    for w in (0..count).step_by(24) {
        let window = windows(&ids[w * length..(w + 1) * length], 1);
        let found = perplexity(&compressed, &window, &mut ()).unwrap().overall.nll;
        let off = (found - expected[w]).abs();
        assert!(off < 2e-5, "{key} window {w}: {found} instead of {}", expected[w]);
    }
}
