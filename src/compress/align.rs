//! Which hidden neuron of one expert corresponds to which of another.
//!
//! The hidden neurons of an expert may stand in any order: permuting the rows of gate and up and the columns of down
//! alike leaves its function as it is. Experts that are to be averaged are brought into the order in which their neurons
//! are nearest to each other: by their weights ("Git Re-Basin", Ainsworth et al., arXiv 2209.04836, §3.2), here over all
//! matrices of an MLP together, three of a gated one, as in MC-SMoE (arXiv 2310.01334, §3.1) over two; by what they are on
//! common tokens (the same, §3.1); or by both, as REAM does (arXiv 2604.04356).

use rayon::prelude::*;

use super::activations::{Inputs, Products, products};

use crate::architecture::Projection;
use crate::backend::Mlp;
use crate::backend::cpu::transpose;
use crate::checkpoint::Tensor;
use crate::linalg::{Matrix, assignment};
use crate::model::LinearSource;

use super::{Error, Result};

/// How the hidden neurons of an expert are brought into the order of another's.
#[derive(Clone, Debug, PartialEq)]
pub struct Alignment {
    /// For each hidden neuron of the reference the neuron that takes its place.
    pub permutation: Vec<usize>,
    /// Σ over neurons of the distance to the reference's neuron, as [`Matching`] defines it.
    pub cost: f64,
    /// The same in the order in which they are stored.
    pub unaligned_cost: f64,
}

/// By what two hidden neurons are compared. The weights of a neuron are its row of gate, its row of up and its column of
/// down, and its biases; its activations are its values on some tokens, which both experts run on.
#[derive(Clone, Copy, Debug)]
pub enum Matching<'a> {
    /// The squared distance of their weights.
    Weights,
    /// 1 − Pearson's correlation of their activations, as in the published code of MC-SMoE, there on the tokens that chose
    /// both experts. A neuron that is the same on all tokens correlates with none.
    Activations(&'a Inputs),
    /// The distance of their activations plus that of their weights, each divided by its norm (0 stays 0): the published
    /// code of REAM, but for the 64 principal components to which that first reduces weights.
    Both(&'a Inputs),
}

impl Matching<'_> {
    fn inputs(&self) -> Option<&Inputs> {
        match self {
            Matching::Weights => None,
            Matching::Activations(inputs) | Matching::Both(inputs) => Some(inputs),
        }
    }
}

/// Aligns `member` to `reference`, both dense and of one shape. Of orders that are equally near the stored one is kept.
/// Costs are summed in f32 products and f64; the same on any number of threads.
///
/// # Errors
/// [`Error::Missing`] where the shapes differ, there is no token to run on, or a value is not finite.
pub fn align(
    reference: &Mlp<LinearSource>,
    member: &Mlp<LinearSource>,
    matching: Matching<'_>,
) -> Result<Alignment> {
    let (width, other) = (reference.gate.weight.rows(), member.gate.weight.rows());
    if width != other {
        return Err(Error::Missing(format!("{other} hidden neurons cannot be aligned to {width}")));
    }
    let active = matching.inputs().map(|inputs| products(reference, member, inputs)).transpose()?;
    let costs = match (matching, &active) {
        (Matching::Activations(_), Some(active)) => active.decorrelations(),
        (_, active) => {
            let weights = weights(reference, member)?;
            match active {
                // The squared norms that make it half the squared distance do not depend on the assignment.
                None => weights.dot.iter().map(|p| -p).collect(),
                Some(active) => {
                    let both = active.distances().into_iter().zip(weights.distances());
                    both.map(|(a, w)| a + w).collect()
                }
            }
        }
    };
    let sum = |of: &dyn Fn(usize) -> usize| (0..width).map(|i| costs[i * width + of(i)]).sum::<f64>();
    let solve = |costs: &[f64]| {
        let costs = Matrix::new(width, width, costs.to_vec());
        costs.and_then(assignment).map_err(|e| Error::Missing(e.to_string()))
    };
    let permutation = solve(&costs)?;
    let (cost, unaligned_cost) = match matching {
        Matching::Weights => {
            (distance(reference, member, |i| permutation[i])?, distance(reference, member, |i| i)?)
        }
        _ => (sum(&|i| permutation[i]), sum(&|i| i)),
    };
    if cost < unaligned_cost {
        return Ok(Alignment { permutation, cost, unaligned_cost });
    }
    Ok(Alignment { permutation: (0..width).collect(), cost: unaligned_cost, unaligned_cost })
}

/// Σ over neurons i of the squared distance of the weights of neuron i of `reference` and of(i) of `member`.
fn distance(
    reference: &Mlp<LinearSource>,
    member: &Mlp<LinearSource>,
    of: impl Fn(usize) -> usize + Sync,
) -> Result<f64> {
    let mut cost = 0.0;
    for part in Part::ALL {
        let (Some(a), Some(b)) = (part.of(reference)?, part.of(member)?) else { continue };
        cost += a.distance(&b, &of);
    }
    Ok(cost)
}

/// The inner products of the weights of all pairs of neurons.
fn weights(reference: &Mlp<LinearSource>, member: &Mlp<LinearSource>) -> Result<Products> {
    let mut sums = Products::new(reference.gate.weight.rows());
    for part in Part::ALL {
        let (Some(a), Some(b)) = (part.of(reference)?, part.of(member)?) else { continue };
        sums.add(&a.values, &b.values, a.cols);
    }
    Ok(sums)
}

/// Bytes that [`align`] takes for experts of this size.
pub(super) fn memory(width: usize, hidden_size: usize, matching: Matching<'_>) -> usize {
    // Costs in f64 twice with one product in f32; two parts in f32, one of them also before it is transposed.
    width * (20 * width + 12 * hidden_size)
        + matching.inputs().map_or(0, |inputs| inputs.memory(width, hidden_size))
}

/// What belongs to hidden neurons.
#[derive(Clone, Copy)]
enum Part {
    Matrix(Projection),
    Biases,
}

/// One part of every hidden neuron, `[neurons, cols]`.
struct Rows {
    values: Vec<f32>,
    cols: usize,
}

impl Part {
    const ALL: [Part; 4] = [
        Part::Matrix(Projection::Gate),
        Part::Matrix(Projection::Up),
        Part::Matrix(Projection::Down),
        Part::Biases,
    ];

    /// This part of the neurons of `mlp`; `None` where it has none.
    fn of(self, mlp: &Mlp<LinearSource>) -> Result<Option<Rows>> {
        let Part::Matrix(projection) = self else {
            let maps = std::iter::once(&mlp.gate).chain(&mlp.up);
            let Some(biases) = maps.map(|map| map.bias.as_ref()).collect::<Option<Vec<_>>>() else {
                return Ok(None);
            };
            let vectors =
                biases.into_iter().map(Tensor::to_f32).collect::<crate::checkpoint::Result<Vec<_>>>()?;
            let values = (0..vectors[0].len()).flat_map(|i| vectors.iter().map(move |vector| vector[i]));
            return Ok(Some(Rows { values: values.collect(), cols: vectors.len() }));
        };
        let Some(map) = mlp.map(projection) else { return Ok(None) };
        let weight = &map.weight;
        let cols = weight.cols();
        let values = weight.to_f32();
        Ok(Some(match projection {
            Projection::Gate | Projection::Up => Rows { values, cols },
            Projection::Down => Rows { values: transpose(&values, cols), cols: weight.rows() },
        }))
    }
}

impl Rows {
    /// Σ over neurons i of ‖self[i] − other[of(i)]‖².
    fn distance(&self, other: &Rows, of: impl Fn(usize) -> usize + Sync) -> f64 {
        let row = |(i, a): (usize, &[f32])| -> f64 {
            let b = &other.values[of(i) * self.cols..][..self.cols];
            a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
        };
        // Gathered before they are added, so that the order of the sum is fixed.
        let rows: Vec<f64> = self.values.par_chunks_exact(self.cols).enumerate().map(row).collect();
        rows.iter().sum()
    }
}
