//! Reference models: their tokens, our statistics of them, and the numbers that compressed models should have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as Calibration, Statistics, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Options, compress};
use moepress::eval::{Evaluation, perplexity};
use moepress::model::Model;
use moepress::plan::{Budget, Plan, Request, method};
use moepress::tokens::Windows;
use serde_json::Value;

use super::{read, shape, shared, windows};

/// One reference model.
pub struct Reference {
    /// Folder of the reference outputs.
    pub dir: PathBuf,
    pub model: PathBuf,
    pub evaluations: Value,
    pub dropped: Value,
    pub calibration: Windows,
    pub evaluation: Windows,
    pub statistics: Statistics,
    pub work: tempfile::TempDir,
}

impl Reference {
    /// The model `name` with the second moments `second` measured; `None` where the data is missing.
    pub fn open(name: &str, second: &[Moment]) -> Option<Self> {
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
        let opened = Model::new(&checkpoint, &Cpu, calibration.longest()).unwrap();
        let options = Calibration { second: second.to_vec(), ..Default::default() };
        let statistics = calibrate(&opened, &calibration, &options, &work.path().join("s"), &mut ()).unwrap();
        let evaluations = json("evaluations.json");
        let dropped = json("pruning.json")["dropped"].clone();
        Some(Reference { dir, model, evaluations, dropped, calibration, evaluation, statistics, work })
    }

    pub fn plan(&self, name: &str, remove: f64, set: &[(&str, &str)]) -> Plan {
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
    pub fn difference(&self, plan: &Plan, key: &str) -> f64 {
        let out = self.work.path().join(key);
        self.compress(plan, &out);
        nll(&out, &self.evaluation) - self.expected(key)
    }

    /// Carries a plan out, with our own statistics.
    pub fn compress(&self, plan: &Plan, out: &Path) {
        let checkpoint = Checkpoint::open(&self.model).unwrap();
        let model = Model::new(&checkpoint, &Cpu, self.calibration.longest()).unwrap();
        let options = Options { statistics: Some(&self.statistics), ..Options::default() };
        compress(&model, plan, &options, out, &mut ()).unwrap();
    }

    /// What the reference says about the model called `key`; null where there is none.
    pub fn entry(&self, key: &str) -> &Value {
        let entry = &self.evaluations[key];
        if entry.is_null() { &self.evaluations["evaluations"][key] } else { entry }
    }

    pub fn expected(&self, key: &str) -> f64 {
        self.entry(key)["nll_overall"].as_f64().unwrap()
    }
}

/// Mean NLL of a model on the evaluation windows.
pub fn nll(model: &Path, evaluation: &Windows) -> f64 {
    evaluate(model, evaluation).overall.nll
}

/// A model on the evaluation windows.
pub fn evaluate(model: &Path, evaluation: &Windows) -> Evaluation {
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, evaluation.longest()).unwrap();
    perplexity(&model, evaluation, &mut ()).unwrap()
}
