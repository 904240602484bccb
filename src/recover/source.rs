//! From stored experts to experts in training and back.

use std::sync::Arc;

use super::expert::{Trained, TrainedMlp};
use super::layer::TrainedLayer;
use super::map::{Map, Parameter, Part};
use crate::backend::{Expert, Linear, Matrix, StoredExpert};
use crate::checkpoint::{Result, Tensor, Weight};
use crate::model::MoeSource;

type StoredMap = Linear<Matrix<Weight>, Tensor>;

impl TrainedLayer {
    /// The experts of `moe`. Packed matrices (FP8, MXFP4) are not trained: a stock checkpoint could not hold the result.
    /// Nor is a base that experts share.
    pub(super) fn new(moe: &MoeSource) -> Result<Self> {
        let bases = moe.base.each_ref().map(|base| base.as_ref().map(|base| Arc::from(base.to_f32())));
        let [gate, up, down] = bases.each_ref().map(Option::as_ref);
        let expert = |expert: &StoredExpert| {
            Ok(match expert {
                Expert::Mlp(mlp) => Trained::Mlp(Box::new(TrainedMlp {
                    gate: map(&mlp.gate, gate)?,
                    up: mlp.up.as_ref().map(|m| map(m, up)).transpose()?,
                    down: map(&mlp.down, down)?,
                    activation: mlp.activation,
                })),
                Expert::Constant(vector) => {
                    let values = vector.to_f32()?;
                    Trained::Constant(Parameter::new(values, vector.len(), vector.dtype(), 1.0))
                }
                Expert::Alias(_) | Expert::None => Trained::Idle,
            })
        };
        Ok(TrainedLayer { experts: moe.experts.iter().map(expert).collect::<Result<_>>()? })
    }

    /// Puts the values into `moe`, which the layer came from; what is not trained stays as it was stored.
    pub(super) fn write_to(&self, moe: &mut MoeSource) {
        for (stored, trained) in moe.experts.iter_mut().zip(&self.experts) {
            match (stored, trained) {
                (Expert::Mlp(stored), Trained::Mlp(trained)) => {
                    let maps =
                        std::iter::once(&mut stored.gate).chain(&mut stored.up).chain([&mut stored.down]);
                    let values = std::iter::once(&trained.gate).chain(&trained.up).chain([&trained.down]);
                    for (stored, trained) in maps.zip(values) {
                        stored.weight = matrix(&stored.weight, trained);
                    }
                }
                (Expert::Constant(vector), Trained::Constant(c)) => {
                    *vector =
                        Tensor::from_f32(vector.name(), vector.dtype(), vector.shape().to_vec(), &c.values);
                }
                _ => {}
            }
        }
    }
}

/// Whether anything of the expert is trained.
pub(super) fn is_trainable(layer: &TrainedLayer) -> bool {
    layer.experts.iter().any(Trained::is_trainable)
}

/// The matrices of an expert that are trained as they are.
pub(super) fn dense_matrices(expert: &StoredExpert) -> impl Iterator<Item = &Weight> {
    let maps = if let Expert::Mlp(mlp) = expert { Some(mlp.maps()) } else { None };
    maps.into_iter().flatten().filter_map(|map| match &map.weight {
        Matrix::Dense(weight) if !weight.is_packed() => Some(weight),
        _ => None,
    })
}

/// The map as the sum of its parts; `base` is what a difference stands beside.
fn map(stored: &StoredMap, base: Option<&Arc<[f32]>>) -> Result<Map> {
    let product = |u: &Weight, v: &Weight| Part::Product { u: parameter(u), v: parameter(v) };
    let (parts, outputs, inputs) = match &stored.weight {
        Matrix::Dense(w) if w.is_packed() => (vec![Part::Fixed(w.to_f32().into())], w.rows(), w.cols()),
        Matrix::Dense(w) => (vec![Part::Dense(parameter(w))], w.rows(), w.cols()),
        Matrix::LowRank { u, v } => (vec![product(u, v)], u.rows(), v.cols()),
        Matrix::LowRankRows { u, v, rows, s } => {
            let rows = Part::Rows { rows: rows.clone(), s: parameter(s) };
            (vec![product(u, v), rows], u.rows(), v.cols())
        }
        Matrix::Delta { u, v } => {
            let base = base.map(|base| Part::Fixed(Arc::clone(base)));
            (base.into_iter().chain([product(u, v)]).collect(), u.rows(), v.cols())
        }
    };
    let bias = stored.bias.as_ref().map(Tensor::to_f32).transpose()?;
    Ok(Map { inputs, outputs, parts, bias })
}

fn parameter(weight: &Weight) -> Parameter {
    let scale = 1.0 / (weight.cols().max(1) as f32).sqrt();
    Parameter::new(weight.to_f32(), weight.cols(), weight.replacement_dtype(), scale)
}

/// The stored matrix with the values of `map`.
fn matrix(stored: &Matrix<Weight>, map: &Map) -> Matrix<Weight> {
    match (stored, &map.parts[..]) {
        (Matrix::Dense(w), [Part::Dense(p)]) => Matrix::Dense(weight(w, p)),
        (Matrix::LowRank { u, v }, [Part::Product { u: pu, v: pv }]) => {
            Matrix::LowRank { u: weight(u, pu), v: weight(v, pv) }
        }
        (
            Matrix::LowRankRows { u, v, s, .. },
            [Part::Product { u: pu, v: pv }, Part::Rows { rows, s: ps }],
        ) => {
            let rows = rows.clone();
            Matrix::LowRankRows { u: weight(u, pu), v: weight(v, pv), rows, s: weight(s, ps) }
        }
        (Matrix::Delta { u, v }, [.., Part::Product { u: pu, v: pv }]) => {
            Matrix::Delta { u: weight(u, pu), v: weight(v, pv) }
        }
        // What was split while it was trained.
        (Matrix::Dense(w), [Part::Product { u, v }, Part::Rows { rows, .. }]) if rows.is_empty() => {
            Matrix::LowRank { u: weight(w, u), v: weight(w, v) }
        }
        (Matrix::Dense(w), [Part::Product { u, v }, Part::Rows { rows, s }]) => {
            Matrix::LowRankRows { u: weight(w, u), v: weight(w, v), rows: rows.clone(), s: weight(w, s) }
        }
        _ => stored.clone(),
    }
}

/// `stored` with other values.
fn weight(stored: &Weight, p: &Parameter) -> Weight {
    let tensor = Tensor::from_f32(stored.name(), p.dtype, vec![p.rows(), p.cols], &p.values);
    Weight::plain(tensor).unwrap_or_else(|_| unreachable!("a matrix of plain numbers"))
}
