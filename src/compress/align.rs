//! Which hidden neuron of one expert corresponds to which of another.
//!
//! The hidden neurons of an expert may stand in any order: permuting the rows of gate and up and the columns of down
//! alike leaves its function as it is. Experts that are to be averaged are brought into the order in which their neurons
//! are nearest to each other: weight matching (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836, §3.2), here over all
//! matrices of an MLP together, three of a gated one, as in MC-SMoE (arXiv 2310.01334, §3.1) over two.

use rayon::prelude::*;

use crate::architecture::Projection;
use crate::backend::Mlp;
use crate::backend::cpu::{multiply, transpose};
use crate::checkpoint::Tensor;
use crate::linalg::{Matrix, assignment};
use crate::model::LinearSource;

use super::{Error, Result};

/// How the hidden neurons of an expert are brought into the order of another's.
#[derive(Clone, Debug, PartialEq)]
pub struct Alignment {
    /// For each hidden neuron of the reference the neuron that takes its place.
    pub permutation: Vec<usize>,
    /// Σ over neurons of the squared distance to the reference's neuron: its row of gate, its row of up and its column
    /// of down, and their biases.
    pub cost: f64,
    /// The same in the order in which they are stored.
    pub unaligned_cost: f64,
}

/// Aligns `member` to `reference`, both dense and of one shape. Of orders that are equally near the stored one is kept.
/// Costs are summed in f32 products and f64; the same on any number of threads.
///
/// # Errors
/// [`Error::Missing`] where the shapes differ or a value is not finite.
pub fn align(reference: &Mlp<LinearSource>, member: &Mlp<LinearSource>) -> Result<Alignment> {
    let (width, other) = (reference.gate.weight.rows(), member.gate.weight.rows());
    if width != other {
        return Err(Error::Missing(format!("{other} hidden neurons cannot be aligned to {width}")));
    }
    let mut costs = vec![0.0; width * width];
    for part in Part::ALL {
        let (Some(a), Some(b)) = (part.of(reference)?, part.of(member)?) else { continue };
        subtract_products(&a, &b, &mut costs);
    }
    let costs = Matrix::new(width, width, costs);
    let permutation = costs.and_then(assignment).map_err(|e| Error::Missing(e.to_string()))?;
    let (mut cost, mut unaligned_cost) = (0.0, 0.0);
    for part in Part::ALL {
        let (Some(a), Some(b)) = (part.of(reference)?, part.of(member)?) else { continue };
        cost += a.distance(&b, |i| permutation[i]);
        unaligned_cost += a.distance(&b, |i| i);
    }
    if cost < unaligned_cost {
        return Ok(Alignment { permutation, cost, unaligned_cost });
    }
    Ok(Alignment { permutation: (0..width).collect(), cost: unaligned_cost, unaligned_cost })
}

/// Bytes that [`align`] takes for experts of this size.
pub(super) fn memory(width: usize, hidden_size: usize) -> usize {
    // Costs in f64 with one product in f32; two parts in f32, one of them also before it is transposed.
    width * (12 * width + 12 * hidden_size)
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

/// costs[i, j] −= ⟨a[i], b[j]⟩. The squared norms that make it half the squared distance do not depend on the
/// assignment.
fn subtract_products(a: &Rows, b: &Rows, costs: &mut [f64]) {
    let mut products = vec![0.0; costs.len()];
    multiply(&a.values, &b.values, a.cols, false, &mut products);
    costs.par_iter_mut().zip(&products).with_min_len(1 << 14).for_each(|(c, p)| *c -= f64::from(*p));
}
