//! Compressed trained models against reference perplexities, where the reference data is.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{read, shape, shared, windows};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as Calibration, Statistics, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Options, compress};
use moepress::eval::perplexity;
use moepress::model::Model;
use moepress::plan::{Action, Budget, Plan, Request, method};
use moepress::tokens::Windows;
use serde_json::Value;

struct Reference {
    model: PathBuf,
    evaluations: Value,
    dropped: Value,
    calibration: Windows,
    evaluation: Windows,
    statistics: Statistics,
    work: tempfile::TempDir,
}

impl Reference {
    fn open(name: &str) -> Option<Self> {
        let dir = shared("reference")?.join(name);
        let json = |file: &str| -> Value {
            serde_json::from_str(&std::fs::read_to_string(dir.join(file)).unwrap()).unwrap()
        };
        let model = dir.join("../../models").join(name);
        let tokens = dir.join("tokens.safetensors");
        let load = |key: &str| windows(&read(&tokens, key), shape(&tokens, key).unwrap()[0]);
        let (calibration, evaluation) = (load("calib"), load("eval"));
        let work = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let opened = Model::new(&checkpoint, &Cpu, calibration.length).unwrap();
        let options =
            Calibration { second: vec![Moment::InputGram, Moment::HiddenGram], ..Default::default() };
        let statistics = calibrate(&opened, &calibration, &options, &work.path().join("s"), &mut ()).unwrap();
        let evaluations = json("evaluations.json");
        let dropped = json("pruning.json")["dropped"].clone();
        Some(Reference { model, evaluations, dropped, calibration, evaluation, statistics, work })
    }

    fn plan(&self, name: &str, remove: f64, set: &[(&str, &str)]) -> Plan {
        let options: BTreeMap<String, String> = set.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let moments = self.statistics.first_moments().unwrap();
        let request = Request {
            statistics: Some(&moments),
            budget: Some(Budget::Remove(remove)),
            options: &options,
            ..Request::new(self.statistics.profile())
        };
        method(name).unwrap().plan(&request).unwrap()
    }

    /// Mean NLL of the compressed model minus that of the reference called `key`.
    fn difference(&self, plan: &Plan, key: &str) -> f64 {
        let out = self.work.path().join(key);
        let checkpoint = Checkpoint::open(&self.model).unwrap();
        let model = Model::new(&checkpoint, &Cpu, self.calibration.length).unwrap();
        let options = Options { statistics: Some(&self.statistics), ..Options::default() };
        compress(&model, plan, &options, &out, &mut ()).unwrap();
        nll(&out, &self.evaluation) - self.expected(key)
    }

    fn expected(&self, key: &str) -> f64 {
        let entry = &self.evaluations[key];
        let entry = if entry.is_null() { &self.evaluations["evaluations"][key] } else { entry };
        entry["nll_overall"].as_f64().unwrap()
    }
}

fn nll(model: &Path, evaluation: &Windows) -> f64 {
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, evaluation.length).unwrap();
    perplexity(&model, evaluation, &mut ()).unwrap().overall.nll
}

/// The experts that the reference dropped, dropped: same numbers up to float32 rounding.
#[test]
fn pruned_models_have_the_reference_perplexity() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name) else { return };
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
        let Some(reference) = Reference::open(name) else { return };
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
