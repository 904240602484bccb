//! Which stored matrix every module of an adapter updates.

use std::collections::BTreeMap;

use crate::architecture::{Architecture, ExpertStorage, Projection};
use crate::checkpoint::Checkpoint;
use crate::recover::adapter::{Adapter, Delta, Update, some};
use crate::recover::{Error, Result};

/// Updates of one stored matrix, by its name without suffix; an expert's part of a fused tensor has its index.
pub(super) type Updates = BTreeMap<String, Vec<Part>>;

/// A matrix, or some of the rows of one that holds gate and up.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) delta: Delta,
    /// Entry of the first dimension of a tensor of all experts.
    pub(super) entry: Option<usize>,
    /// Whether that tensor holds the transposes.
    pub(super) transposed: bool,
}

/// Where the adapter's matrices go.
pub(super) struct Resolved {
    pub(super) updates: Updates,
    /// Matrices of experts that the checkpoint has no more.
    pub(super) skipped: usize,
}

/// Finds the stored matrix of every update.
///
/// # Errors
/// Names the modules that the checkpoint does not have, and updates of other shapes than their matrices.
pub(super) fn resolve(
    adapter: &Adapter,
    checkpoint: &Checkpoint,
    architecture: &Architecture,
) -> Result<Resolved> {
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
    let (names, d, p) = (&architecture.names, architecture.expert_io(moe), moe.width);
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
            let rows = |down: bool| checkpoint.get(&names.fused(l, down)[0])?.shape().get(1).copied();
            let transposed = match names.storage {
                ExpertStorage::Separate
                | ExpertStorage::WithImages
                | ExpertStorage::OutputMajor
                | ExpertStorage::Stacked => false,
                // One of the two is not square.
                ExpertStorage::Transposed => [rows(false), rows(true)] != [Some(2 * p), Some(d)],
                ExpertStorage::Fused { .. } => true,
            };
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
