//! Planning and compressing in one call each.

use std::collections::BTreeMap;
use std::path::Path;

use moepress::backend::Expert;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as CalibrateOptions, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Options, Report, compress};
use moepress::model::{HeadScratch, Layer, LayerSource, Model, Stream};
use moepress::plan::{Budget, Plan, Request, method};
use moepress::tokens::Windows;

use super::windows;

pub fn tokens() -> Windows {
    let ids: Vec<f64> = (0..96u32).map(|i| f64::from((i * 37 + i * i * 5) % 64)).collect();
    windows(&ids, 4)
}

pub fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
}

pub fn plan(model: &Path, name: &str, budget: Option<Budget>, set: &[(&str, &str)]) -> Plan {
    plan_on(model, &tokens(), name, budget, set)
}

/// The same with statistics of other tokens.
pub fn plan_on(
    model: &Path,
    tokens: &Windows,
    name: &str,
    budget: Option<Budget>,
    set: &[(&str, &str)],
) -> Plan {
    let checkpoint = Checkpoint::open(model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let opened = Model::new(&checkpoint, &Cpu, 24).unwrap();
    let statistics =
        calibrate(&opened, tokens, &CalibrateOptions::default(), &dir.path().join("s"), &mut ()).unwrap();
    let moments = statistics.first_moments().unwrap();
    let request = Request {
        statistics: Some(&moments),
        budget,
        options: &options(set),
        ..Request::new(statistics.profile())
    };
    method(name).unwrap().plan(&request).unwrap()
}

pub fn apply(model: &Path, plan: &Plan, options: &Options<'_>, out: &Path) -> Result<Report, String> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 24).unwrap();
    compress(&model, plan, options, out, &mut ()).map_err(|e| e.to_string())
}

/// The original with the plan's dropped experts masked to −∞.
pub fn masked(dir: &Path, plan: &Plan, windows: &Windows) -> Vec<f32> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let mut stream = Stream::new(&model, windows).unwrap();
    for l in 0..model.architecture().layers.len() {
        let source = LayerSource::open(&checkpoint, model.architecture(), l).unwrap();
        let layer = model.prepare(&source).unwrap();
        let router = plan.layers.iter().find(|p| p.layer == l).map(|plan| {
            let mut moe = source.moe().unwrap().clone();
            plan.dropped().for_each(|e| moe.experts[e] = Expert::None);
            Layer::router(&Cpu, l, &moe).unwrap()
        });
        stream.advance_with(&layer, router.as_ref()).unwrap();
    }
    let head = model.head().unwrap();
    let mut work = HeadScratch::new(&Cpu);
    let logits =
        |c: &moepress::model::Chunk<Cpu>| head.logits(&Cpu, &c.x, 0, c.batch.tokens(), &mut work).unwrap();
    stream.chunks.iter().flat_map(logits).collect()
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(p).unwrap()))
        .collect()
}
