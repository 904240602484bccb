//! Spectra of expert matrices, for planners that choose ranks by them.

use crate::architecture::{Architecture, Projection};
use crate::backend::{Expert, Matrix as Form, Moment};
use crate::calibrate::Statistics;
use crate::checkpoint::Checkpoint;
use crate::linalg::{self, Matrix};
use crate::model::{self, LayerSource};
use crate::plan::SpectrumSource;

/// Spectra of a checkpoint's experts: of W, or of W C Wᵀ where statistics hold the second moments C.
#[derive(Debug)]
pub struct WeightSpectra<'a> {
    checkpoint: &'a Checkpoint,
    architecture: &'a Architecture,
    statistics: Option<&'a Statistics>,
}

impl<'a> WeightSpectra<'a> {
    /// Spectra of the experts of `checkpoint`; whitened where `statistics` is given and holds
    /// [`Moment::InputGram`] and [`Moment::HiddenGram`].
    pub fn new(
        checkpoint: &'a Checkpoint,
        architecture: &'a Architecture,
        statistics: Option<&'a Statistics>,
    ) -> Self {
        let measured = |s: &&Statistics| s.has(Moment::InputGram) && s.has(Moment::HiddenGram);
        WeightSpectra { checkpoint, architecture, statistics: statistics.filter(measured) }
    }
}

impl SpectrumSource for WeightSpectra<'_> {
    fn spectrum(&self, layer: usize, expert: usize, matrix: Projection) -> Result<Vec<f64>, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let source = LayerSource::locate(self.checkpoint, self.architecture, layer).map_err(|e| text(&e))?;
        let slot = source.moe().and_then(|moe| moe.experts.get(expert)).ok_or("there is no such expert")?;
        let Expert::Mlp(mlp) = slot else { return Err(format!("is {} and has no matrices", slot.form())) };
        let map = mlp.map(matrix).ok_or_else(|| format!("has no {} matrix", matrix.name()))?;
        let Form::Dense(weight) = &map.weight else {
            return Err("is low rank already".into());
        };
        weight.check_finite().map_err(|e| text(&model::Error::from(e).of(self.checkpoint)))?;
        let (rows, cols) = (weight.rows(), weight.cols());
        let w = Matrix::from_f32(rows, cols, &weight.to_f32()).map_err(|e| text(&e))?;
        let moment = if matrix == Projection::Down { Moment::HiddenGram } else { Moment::InputGram };
        let gram = match self.statistics {
            None => None,
            Some(statistics) => {
                let moments = statistics.moments(layer, &[moment]).map_err(|e| text(&e))?;
                let all = moments.get(moment).ok_or("has no second moments")?;
                if all.len() != moments.dims().experts * cols * cols {
                    return Err("is not of full width; start from the original checkpoint".into());
                }
                let gram = all[expert * cols * cols..(expert + 1) * cols * cols].to_vec();
                Some(Matrix::new(cols, cols, gram).map_err(|e| text(&e))?)
            }
        };
        linalg::spectrum(&w, gram.as_ref()).map_err(|e| text(&e))
    }
}
