//! LoRA adapters merged into a checkpoint: into full matrices, or into the factors of low-rank ones.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::adapter::{Adapter, Delta, Update, some};
use super::rewrite::own_layout;
use super::{Error, Result};
use crate::architecture::{Architecture, ExpertStorage, Projection};
use crate::calibrate::Residual;
use crate::checkpoint::{Checkpoint, ExpertForm, Manifest, Tensor, hex, read_file};
use crate::compress::{Layout, Output, PLAN_FILE, origin_mark, outside_layers};
use crate::linalg::{Matrix, truncated_svd};
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

/// Updates of one stored matrix, by its name without suffix; an expert's part of a fused tensor has its index.
type Updates = BTreeMap<String, Vec<Part>>;

/// A matrix, or some of the rows of one that holds gate and up.
#[derive(Clone, Debug)]
struct Part {
    delta: Delta,
    /// Entry of the first dimension of a tensor of all experts.
    entry: Option<usize>,
    /// Whether that tensor holds the transposes.
    transposed: bool,
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
    let mut work = Residual::open(out, &key, &[checkpoint], &mut ())?;
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

/// Where the adapter's matrices go.
struct Resolved {
    updates: Updates,
    skipped: usize,
}

fn resolve(adapter: &Adapter, checkpoint: &Checkpoint, architecture: &Architecture) -> Result<Resolved> {
    let mut resolved = Resolved { updates: Updates::new(), skipped: 0 };
    let mut unknown = Vec::new();
    for update in &adapter.updates {
        let invalid = |what: String| Error::Adapter { path: adapter.path.clone(), what };
        let stem = published(&update.module, architecture);
        if stored_shape(checkpoint, &stem).is_some() {
            if update.experts() != 1 {
                let (module, rank, rows) = (&update.module, update.rank, update.experts() * update.rank);
                return Err(invalid(format!(
                    "{module}: lora_A has {rows} rows, adapter_config.json says rank {rank}"
                )));
            }
            let part = Part { delta: update.delta(0)?, entry: None, transposed: false };
            resolved.updates.entry(stem).or_default().push(part);
        } else if let Some(l) = fused_layer(&update.module, architecture) {
            fused(update, l, checkpoint, architecture, &mut resolved).map_err(invalid)?;
        } else if is_dropped(&stem, checkpoint, architecture) {
            resolved.skipped += 1;
        } else {
            unknown.push(update.module.clone());
        }
    }
    if !unknown.is_empty() {
        return Err(Error::Adapter {
            path: adapter.path.clone(),
            what: format!(
                "updates modules that {} does not have: {}; expected the names of its tensors",
                checkpoint.dir().display(),
                some(&unknown)
            ),
        });
    }
    for (stem, parts) in &resolved.updates {
        let Some((rows, cols)) = stored_shape(checkpoint, stem) else { continue };
        for part in parts.iter().filter(|p| p.entry.is_none()) {
            if (part.delta.outputs, part.delta.inputs) != (rows, cols) {
                return Err(Error::Adapter {
                    path: adapter.path.clone(),
                    what: format!(
                        "{stem}: updates a matrix [{}, {}], the checkpoint has [{rows}, {cols}]",
                        part.delta.outputs, part.delta.inputs
                    ),
                });
            }
        }
    }
    Ok(resolved)
}

/// The published name of a module that transformers 5 calls otherwise.
fn published(module: &str, architecture: &Architecture) -> String {
    let names = &architecture.names;
    let routers = architecture.moe_layers().map(|(l, _)| names.routers(l));
    let renamed = routers.into_iter().find(|[_, fused]| fused == module);
    renamed.map_or_else(|| module.to_string(), |[published, _]| published)
}

/// Rows and columns of the matrix `stem`, stored whole or in factors.
fn stored_shape(checkpoint: &Checkpoint, stem: &str) -> Option<(usize, usize)> {
    let shape = |suffix: &str| match checkpoint.get(&format!("{stem}.{suffix}"))?.shape() {
        [rows, cols] => Some((*rows, *cols)),
        _ => None,
    };
    shape("weight").or_else(|| Some((shape("u")?.0, shape("v")?.1)))
}

/// The layer whose fused experts are the module, however many parameters are wrapped.
fn fused_layer(module: &str, architecture: &Architecture) -> Option<usize> {
    let mut module = module;
    while let Some(inner) = module.strip_suffix(".base_layer") {
        module = inner;
    }
    let is = |l: usize| {
        architecture.names.experts(l).iter().any(|prefix| prefix.strip_suffix('.') == Some(module))
    };
    architecture.moe_layers().map(|(l, _)| l).find(|&l| is(l))
}

/// Whether `stem` is a matrix of an expert that the checkpoint has no more.
fn is_dropped(stem: &str, checkpoint: &Checkpoint, architecture: &Architecture) -> bool {
    let entries = checkpoint.manifest().iter().flat_map(|m| &m.layers).collect::<Vec<_>>();
    architecture.moe_layers().any(|(l, moe)| {
        let Some(entry) = entries.iter().find(|e| e.layer == l) else { return false };
        let gone = |e: &usize| entry.experts.iter().all(|kept| kept.expert != *e);
        (0..moe.experts).filter(gone).any(|e| stem.starts_with(&architecture.names.expert_prefix(l, e)))
    })
}

/// Updates of the experts of layer `l`, of gate and up together or of down.
fn fused(
    update: &Update,
    l: usize,
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    resolved: &mut Resolved,
) -> std::result::Result<(), String> {
    let Some(moe) = architecture.moe(l) else { return Ok(()) };
    let (names, d, p) = (&architecture.names, architecture.hidden_size, moe.width);
    let module = &update.module;
    if update.experts() != moe.experts {
        let (found, expected) = (update.experts(), moe.experts);
        return Err(format!("{module}: updates {found} experts, config.json has {expected}"));
    }
    // PEFT knows of gpt-oss that its parameters are transposed, of Llama 4 not.
    let swapped = names.storage == ExpertStorage::Fused { interleaved: false };
    let interleaved = names.storage == ExpertStorage::Fused { interleaved: true };
    for e in 0..moe.experts {
        let delta = update.delta(e).map_err(|e| e.to_string())?;
        let delta = if swapped { delta.transposed() } else { delta };
        let down = match (delta.outputs, delta.inputs) {
            (out, input) if (out, input) == (2 * p, d) => false,
            (out, input) if (out, input) == (d, p) => true,
            (out, input) => {
                return Err(format!(
                    "{module}: updates matrices [{out}, {input}], expected [{}, {d}] (gate and up) or [{d}, {p}] (down)",
                    2 * p
                ));
            }
        };
        let stored = names.fused(l, down).into_iter().find(|name| checkpoint.get(name).is_some());
        if let Some(name) = stored {
            let transposed = names.storage != ExpertStorage::Separate;
            let part = Part { delta, entry: Some(e), transposed };
            resolved.updates.entry(name).or_default().push(part);
            continue;
        }
        let parts = if down {
            vec![(Projection::Down, delta)]
        } else {
            let rows = |first: usize| {
                let row = move |r: usize| if interleaved { 2 * r + first } else { first * p + r };
                delta.rows((0..p).map(row))
            };
            vec![(Projection::Gate, rows(0)), (Projection::Up, rows(1))]
        };
        for (projection, delta) in parts {
            let stem = names.expert(l, e, projection);
            if stored_shape(checkpoint, &stem).is_some() {
                let part = Part { delta, entry: None, transposed: false };
                resolved.updates.entry(stem).or_default().push(part);
            } else if is_dropped(&stem, checkpoint, architecture) {
                resolved.skipped += 1;
            } else {
                return Err(format!("{module}: the checkpoint has no {stem}.weight to update"));
            }
        }
    }
    Ok(())
}

/// The tensor with what belongs to it added. The ranks of factors that changed go into `ranks`, by stem.
fn updated(
    tensor: &Tensor,
    checkpoint: &Checkpoint,
    updates: &Updates,
    rank: LoraRank,
    ranks: &mut BTreeMap<String, usize>,
) -> Result<Tensor> {
    let name = tensor.name();
    if let Some(parts) = updates.get(name) {
        return of_all_experts(tensor, parts);
    }
    let Some((stem, suffix)) = name.rsplit_once('.') else { return Ok(tensor.clone()) };
    let Some(parts) = updates.get(stem) else { return Ok(tensor.clone()) };
    match suffix {
        "weight" => {
            let mut sum = matrix(tensor)?;
            for part in parts {
                add(&mut sum, &part.delta)?;
            }
            Ok(like(tensor, sum.rows(), sum.cols(), &sum.to_f32()))
        }
        "u" | "v" => {
            let [u, v] = ["u", "v"].map(|s| checkpoint.tensor(&format!("{stem}.{s}")));
            let (u, v) = factors(&u?, &v?, parts, rank)?;
            ranks.insert(stem.into(), v.rows());
            let m = if suffix == "u" { u } else { v };
            Ok(like(tensor, m.rows(), m.cols(), &m.to_f32()))
        }
        _ => Ok(tensor.clone()),
    }
}

fn of_all_experts(tensor: &Tensor, parts: &[Part]) -> Result<Tensor> {
    check_plain(tensor)?;
    let mut values = tensor.to_f32()?;
    let [_, rows, cols] = *tensor.shape() else { return Ok(tensor.clone()) };
    for Part { delta, entry, transposed } in parts {
        let delta = if *transposed { delta.clone().transposed() } else { delta.clone() };
        if (delta.outputs, delta.inputs) != (rows, cols) {
            let what = format!(
                "holds matrices [{rows}, {cols}], the adapter updates [{}, {}]",
                delta.outputs, delta.inputs
            );
            return Err(Error::Adapter { path: tensor.name().into(), what });
        }
        let start = entry.unwrap_or(0) * rows * cols;
        let entry = &mut values[start..start + rows * cols];
        let mut sum = to_matrix(rows, cols, entry)?;
        add(&mut sum, &delta)?;
        entry.copy_from_slice(&sum.to_f32());
    }
    Ok(Tensor::from_f32(tensor.name(), tensor.dtype(), tensor.shape().to_vec(), &values))
}

/// U and V with the updates.
fn factors(u: &Tensor, v: &Tensor, parts: &[Part], rank: LoraRank) -> Result<(Matrix, Matrix)> {
    let (mut u, mut v) = (matrix(u)?, matrix(v)?);
    let before = v.rows();
    for Part { delta, .. } in parts {
        let columns =
            |r: usize| u.row(r).iter().copied().chain(wide(&delta.b[r * delta.rank..(r + 1) * delta.rank]));
        let wider = (0..u.rows()).flat_map(columns).collect();
        let longer = v.as_slice().iter().copied().chain(wide(&delta.a)).collect();
        u = new_matrix(u.rows(), u.cols() + delta.rank, wider)?;
        v = new_matrix(v.rows() + delta.rank, v.cols(), longer)?;
    }
    if rank == LoraRank::Enlarge {
        return Ok((u, v));
    }
    let product = u.matmul(&v).map_err(numbers)?;
    let truncated = truncated_svd(&product, before).map_err(numbers)?;
    Ok((truncated.u, truncated.v))
}

fn wide(values: &[f32]) -> impl Iterator<Item = f64> {
    values.iter().map(|v| f64::from(*v))
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn numbers(error: crate::linalg::Error) -> Error {
    Error::Request(error.to_string())
}

fn new_matrix(rows: usize, cols: usize, values: Vec<f64>) -> Result<Matrix> {
    Matrix::new(rows, cols, values).map_err(numbers)
}

fn to_matrix(rows: usize, cols: usize, values: &[f32]) -> Result<Matrix> {
    Matrix::from_f32(rows, cols, values).map_err(numbers)
}

fn matrix(tensor: &Tensor) -> Result<Matrix> {
    check_plain(tensor)?;
    to_matrix(tensor.shape()[0], tensor.shape()[1], &tensor.to_f32()?)
}

fn check_plain(tensor: &Tensor) -> Result<()> {
    tensor.check_float().map_err(|_| {
        let what = "is packed; an adapter can be merged into f32, f16 or bf16 numbers only".into();
        Error::Adapter { path: tensor.name().into(), what }
    })
}

/// sum += B A.
fn add(sum: &mut Matrix, delta: &Delta) -> Result<()> {
    let (b, a) =
        (to_matrix(delta.outputs, delta.rank, &delta.b)?, to_matrix(delta.rank, delta.inputs, &delta.a)?);
    let product = b.matmul(&a).map_err(numbers)?;
    sum.as_mut_slice().iter_mut().zip(product.as_slice()).for_each(|(s, p)| *s += p);
    Ok(())
}

fn like(tensor: &Tensor, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    Tensor::from_f32(tensor.name(), tensor.dtype(), vec![rows, cols], values)
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
