//! A checkpoint written anew with other experts, a layer at a time, resumable.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Error, LayerLoss, Result};
use crate::architecture::Architecture;
use crate::calibrate::Residual;
use crate::checkpoint::{Checkpoint, LayerEntry, Manifest, read_file, write_atomic};
use crate::compress::{
    Layout, Output, PLAN_FILE, RECOVERY_FILE, manifest_entry, origin_mark, other_tensors, outside_layers,
    take_up_finished,
};
use crate::model::{LayerSource, inspect};
use crate::progress::Progress;

/// Changes the experts of every layer, in order.
pub(super) trait Pass {
    /// Goes on where an earlier run was stopped, after at most `done` layers; returns after how many.
    fn restore(&mut self, work: &Residual, done: usize) -> Result<usize>;

    /// Changes one layer; returns how good it became, where that was measured, and a few words about it.
    fn layer(&mut self, source: &mut LayerSource) -> Result<(Option<LayerLoss>, String)>;

    /// Leaves on disk what [`Pass::restore`] needs after `done` layers.
    fn save(&self, work: &Residual, done: usize) -> Result<()>;
}

/// One finished layer.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Record {
    /// 0-based layer.
    pub(super) layer: usize,
    /// How good it became.
    pub(super) loss: Option<LayerLoss>,
    /// Its entry in `moepress.json`.
    entry: Option<LayerEntry>,
}

/// The result of a rewrite.
pub(super) struct Rewritten {
    pub(super) layers: Vec<Record>,
    pub(super) bytes: u64,
    pub(super) routed_parameters: u64,
}

/// What is rewritten, and as what.
pub(super) struct Rewrite<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) architecture: &'a Architecture,
    pub(super) layout: Layout,
    /// Everything that the result depends on; begins with `moepress `.
    pub(super) key: String,
    /// The checkpoints that it depends on.
    pub(super) sources: &'a [&'a Checkpoint],
    /// The work in a word, for progress.
    pub(super) task: &'a str,
}

impl Rewrite<'_> {
    /// Writes the new folder `out`; a run that was stopped goes on after the last finished layer.
    pub(super) fn run(
        &self,
        out: &Path,
        progress: &mut dyn Progress,
        pass: &mut dyn Pass,
    ) -> Result<Rewritten> {
        let Rewrite { checkpoint, architecture, layout, key, sources, task } = self;
        Output::check_name(out)?;
        let mark = origin_mark(key);
        if Output::is_complete(out, &mark, sources) {
            Residual::open(out, key, sources, &mut ())?.remove()?;
            return finished(out);
        }
        let mut work = Residual::open(out, key, sources, progress)?;
        let partial = work.path("result");
        if work.is_finished() {
            if take_up_finished(&partial, out)?.is_some() {
                work.remove()?;
                return finished(out);
            }
            work.begin()?;
        }
        Output::check(out)?;
        let layers = architecture.layers.len();
        let output = Output::create(partial.clone(), layers + 1)?;
        let read = |l: usize| output.has_shard(l).then(|| read_record(&work, l)).flatten();
        let mut records: Vec<Record> = (0..layers).map_while(read).collect();
        records.truncate(pass.restore(&work, records.len())?);

        progress.begin(&format!("{task}: layer"), layers);
        for _ in 0..records.len() {
            progress.step("done before");
        }
        for l in records.len()..layers {
            let mut source = LayerSource::open(checkpoint, architecture, l)?;
            let original = source.clone();
            let (loss, detail) = pass.layer(&mut source)?;
            let mut tensors = other_tensors(checkpoint, architecture, &original);
            let moe = source.moe();
            tensors.extend(moe.iter().flat_map(|moe| layout.tensors(&architecture.names, l, moe)));
            let record = Record { layer: l, loss, entry: moe.map(|moe| manifest_entry(l, moe)) };
            write_atomic(&work.path(&record_name(l)), json!(record).to_string().as_bytes())?;
            records.push(record);
            output.write_shard(l, &tensors)?;
            original.release();
            pass.save(&work, l + 1)?;
            progress.step(&detail);
        }
        output.write_shard(layers, &outside_layers(checkpoint, architecture, layout))?;
        let manifest = (*layout == Layout::Moepress).then(|| {
            let origin = checkpoint.manifest().map_or(serde_json::Value::Null, |m| m.origin.clone());
            let layers = records.iter().filter_map(|r| r.entry.clone()).collect();
            Manifest { moepress: 1, origin, layers }.to_json()
        });
        let plan =
            read_file(&checkpoint.dir().join(PLAN_FILE)).ok().and_then(|text| String::from_utf8(text).ok());
        write_atomic(
            &partial.join(RECOVERY_FILE),
            json!({ "task": task, "layers": records }).to_string().as_bytes(),
        )?;
        sources.iter().try_for_each(|source| source.check_unchanged())?;
        output.finish(checkpoint, checkpoint.config(), manifest.as_deref(), plan.as_deref(), &mark)?;
        let rewritten = finished(&partial)?;
        work.finish()?;
        Output::place(out, &partial)?;
        work.remove()?;
        progress.end();
        Ok(rewritten)
    }
}

/// The layout of `checkpoint` itself.
pub(super) fn own_layout(checkpoint: &Checkpoint) -> Layout {
    match checkpoint.manifest() {
        Some(_) => Layout::Moepress,
        None => Layout::HuggingFace { config: checkpoint.config().into(), keeps_multi_token: true },
    }
}

/// What a finished folder holds.
fn finished(out: &Path) -> Result<Rewritten> {
    #[derive(Deserialize)]
    struct Said {
        layers: Vec<Record>,
    }
    let checkpoint = Checkpoint::open(out)?;
    let inspection = inspect(&checkpoint)?;
    let path = out.join(RECOVERY_FILE);
    let said = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Said>(&text).ok());
    let said = said.ok_or_else(|| Error::Adapter { path, what: "cannot be read".into() })?;
    Ok(Rewritten {
        layers: said.layers,
        bytes: inspection.bytes.total,
        routed_parameters: inspection.parameters.routed_experts,
    })
}

fn record_name(l: usize) -> String {
    format!("record-{l:05}.json")
}

fn read_record(work: &Residual, l: usize) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(work.path(&record_name(l))).ok()?).ok()
}
