//! LoRA adapters merged into a checkpoint: into full matrices, or into the factors of low-rank ones.

mod resolve;
mod update;

use resolve::{Resolved, resolve};
use update::updated;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::adapter::{Adapter, Update};
use super::rewrite::own_layout;
use super::{Error, Result};
use crate::architecture::{Architecture, Projection};
use crate::calibrate::Residual;
use crate::checkpoint::{Checkpoint, ExpertForm, Manifest, hex, read_file};
use crate::compress::{Layout, Output, PLAN_FILE, origin_mark, outside_layers};
use crate::model::{inspect, open_architecture};
use crate::progress::Progress;

/// What becomes of the rank of a matrix that is stored in factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraRank {
    /// U ← [U, s B] and V ← [V; A]: exact, with a rank larger by that of the adapter.
    #[default]
    Enlarge,
    /// The same, truncated to the rank that it had by SVD.
    Keep,
}

/// What merging did; its JSON form is that of `moepress recover --lora`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoraReport {
    /// Matrices that were updated.
    pub matrices: usize,
    /// Matrices of the adapter whose experts were dropped from the checkpoint.
    pub skipped: usize,
    /// Bytes of all tensors of the result.
    pub bytes: u64,
    /// `hf` or `moepress`.
    pub layout: &'static str,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Merges the PEFT adapter in the folder `adapter` into `checkpoint` and writes the result to the new folder `out`.
///
/// Modules of the adapter are found by name: one per matrix, or one per layer for the experts of models that
/// transformers 5 holds as fused parameters. Numbers of experts are those of the checkpoint's tensors.
///
/// # Errors
/// Names the adapter's file and the modules that the checkpoint does not have, or the matrix that cannot be updated.
pub fn merge_lora(
    checkpoint: &Checkpoint,
    adapter: &Path,
    rank: LoraRank,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<LoraReport> {
    let start = Instant::now();
    let architecture = open_architecture(checkpoint)?;
    let adapter = Adapter::open(adapter)?;
    let Resolved { updates, skipped } = resolve(&adapter, checkpoint, &architecture)?;
    let layout = own_layout(checkpoint);
    let report = |bytes: u64| LoraReport {
        matrices: updates.values().map(Vec::len).sum(),
        skipped,
        bytes,
        layout: layout.name(),
        seconds: start.elapsed().as_secs_f64(),
    };

    Output::check_name(out)?;
    let weights = read_file(&adapter.path);
    let weights =
        weights.map_err(|source| crate::checkpoint::Error::Io { path: adapter.path.clone(), source })?;
    let digest = hex(&<sha2::Sha256 as sha2::Digest>::digest(&weights));
    drop(weights);
    let scales: Vec<String> = adapter.updates.iter().map(Update::describe).collect();
    let key = format!("moepress lora 1\n{}\n{digest}\n{scales:?}\n{rank:?}\n", checkpoint.identity());
    let mark = origin_mark(&key);
    let finished = || Ok::<_, Error>(inspect(&Checkpoint::open(out)?)?.bytes.total);
    if Output::is_complete(out, &mark, &[checkpoint]) {
        Residual::open(out, &key, &[checkpoint], &mut ())?.remove()?;
        return Ok(report(finished()?));
    }
    let mut work = Residual::open(out, &key, &[checkpoint], progress)?;
    // Layers do not depend on each other, and all of them are quickly done again.
    work.begin()?;
    Output::check(out)?;
    let layers = architecture.layers.len();
    let partial = work.path("result");
    let output = Output::create(partial.clone(), layers + 1)?;
    progress.begin("merge: layer", layers);
    let names = &architecture.names;
    let mut ranks = BTreeMap::new();
    for l in 0..layers {
        let prefix = names.layer(l);
        let own = checkpoint.tensors().filter(|t| t.name().starts_with(&prefix));
        let tensors =
            own.map(|t| updated(t, checkpoint, &updates, rank, &mut ranks)).collect::<Result<Vec<_>>>()?;
        output.write_shard(l, &tensors)?;
        progress.step("");
    }
    let outside = outside_layers(checkpoint, &architecture, &layout);
    let outside = outside.iter().map(|t| updated(t, checkpoint, &updates, rank, &mut ranks));
    output.write_shard(layers, &outside.collect::<Result<Vec<_>>>()?)?;
    let manifest = checkpoint.manifest().map(|m| with_ranks(m, &architecture, &ranks).to_json());
    let manifest = manifest.filter(|_| layout == Layout::Moepress);
    let plan =
        read_file(&checkpoint.dir().join(PLAN_FILE)).ok().and_then(|text| String::from_utf8(text).ok());
    checkpoint.check_unchanged()?;
    output.finish(checkpoint, checkpoint.config(), manifest.as_deref(), plan.as_deref(), &mark)?;
    work.finish()?;
    Output::place(out, &partial)?;
    work.remove()?;
    progress.end();
    Ok(report(finished()?))
}

/// The layout file with the ranks that changed.
fn with_ranks(manifest: &Manifest, architecture: &Architecture, ranks: &BTreeMap<String, usize>) -> Manifest {
    let mut manifest = manifest.clone();
    for layer in &mut manifest.layers {
        for entry in &mut layer.experts {
            let (ExpertForm::LowRank { rank, .. } | ExpertForm::Delta { rank }) = &mut entry.form else {
                continue;
            };
            let fields = [&mut rank.gate, &mut rank.up, &mut rank.down];
            for (field, projection) in fields.into_iter().zip(Projection::ALL) {
                let stem = architecture.names.expert(layer.layer, entry.expert, projection);
                if let Some(rank) = ranks.get(&stem) {
                    *field = Some(*rank);
                }
            }
        }
    }
    if let Some(origin) = manifest.origin.as_object_mut() {
        origin.insert("lora".into(), json!(true));
    }
    manifest
}
