//! What planners ask about weights beyond spectra.

use std::path::Path;

use rayon::prelude::*;

use crate::architecture::{Architecture, Projection};
use crate::backend::{Expert, Matrix as Form};
use crate::checkpoint::Checkpoint;
use crate::model::{self, LayerSource, open_architecture};
use crate::plan::{OutlierSource, RouterSource};

/// The weights of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    architecture: &'a Architecture,
}

impl<'a> Weights<'a> {
    /// The weights of `checkpoint`.
    pub fn new(checkpoint: &'a Checkpoint, architecture: &'a Architecture) -> Self {
        Weights { checkpoint, architecture }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl OutlierSource for Weights<'_> {
    fn outliers(&self, layer: usize, input: &[f64], hidden: &[f64], factor: f64) -> Result<f64, String> {
        let source = LayerSource::open(self.checkpoint, self.architecture, layer).map_err(text)?;
        let moe = source.moe().ok_or("has no experts")?;
        let experts = moe.experts.len();
        let (d, p) = (input.len() / experts, hidden.len() / experts);
        // Sums of one expert: of A, and how many entries lie above a threshold.
        let each = |e: usize, threshold: f64| -> Result<(f64, u64, u64), String> {
            let Expert::Mlp(mlp) = &moe.experts[e] else { return Ok((0.0, 0, 0)) };
            let (mut sum, mut above, mut entries) = (0.0, 0, 0);
            for (projection, map) in mlp.named() {
                let squares = match projection {
                    Projection::Down => &hidden[e * p..][..p],
                    _ => &input[e * d..][..d],
                };
                let Form::Dense(weight) = &map.weight else {
                    return Err(format!(
                        "expert {e} is {}; outliers are counted in dense experts",
                        moe.experts[e].form()
                    ));
                };
                let norms: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
                for row in weight.to_f32().chunks_exact(weight.cols()) {
                    for (w, norm) in row.iter().zip(&norms) {
                        let a = f64::from(w.abs()) * norm;
                        sum += a;
                        above += u64::from(a > threshold);
                    }
                }
                entries += weight.len() as u64;
            }
            Ok((sum, above, entries))
        };
        let all = |threshold: f64| -> Result<(f64, u64, u64), String> {
            let parts: Vec<_> =
                (0..experts).into_par_iter().map(|e| each(e, threshold)).collect::<Result<_, _>>()?;
            Ok(parts.iter().fold((0.0, 0, 0), |all, part| (all.0 + part.0, all.1 + part.1, all.2 + part.2)))
        };
        let (sum, _, entries) = all(f64::INFINITY)?;
        let mean = sum / entries.max(1) as f64;
        let (_, above, _) = all(factor * mean)?;
        source.release();
        Ok(above as f64 / entries.max(1) as f64)
    }
}

impl RouterSource for Weights<'_> {
    fn row_norms(&self, layer: usize, other: Option<&Path>) -> Result<Vec<f64>, String> {
        let Some(dir) = other else { return row_norms(self.checkpoint, self.architecture, layer) };
        let checkpoint = Checkpoint::open(dir).map_err(text)?;
        let architecture = open_architecture(&checkpoint).map_err(text)?;
        let (ours, theirs) = (self.architecture, &architecture);
        if (theirs.family, theirs.hidden_size, theirs.layers.len())
            != (ours.family, ours.hidden_size, ours.layers.len())
        {
            let problem =
                "is another model than the one that was fine-tuned: family, layers or hidden size differ";
            return Err(format!("{}: {problem}", dir.display()));
        }
        row_norms(&checkpoint, &architecture, layer)
    }
}

fn row_norms(checkpoint: &Checkpoint, architecture: &Architecture, layer: usize) -> Result<Vec<f64>, String> {
    let source = LayerSource::locate(checkpoint, architecture, layer).map_err(text)?;
    let no_router = || format!("{}: has no router", checkpoint.dir().display());
    let router = &source.moe().ok_or_else(no_router)?.router.weight;
    router.check_finite().map_err(|e| text(model::Error::from(e).of(checkpoint)))?;
    let values = router.to_f32().map_err(text)?;
    let norm = |row: &[f32]| row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt();
    Ok(values.chunks_exact(architecture.hidden_size).map(norm).collect())
}
