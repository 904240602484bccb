//! What the hidden neurons of two experts are on the same tokens.

use rayon::prelude::*;

use super::{Error, Result};
use crate::backend::Mlp;
use crate::backend::cpu::{activate, add_bias, multiply, transpose};
use crate::checkpoint::Weight;
use crate::model::LinearSource;

/// Inputs of a layer's experts, on which experts are compared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// `[tokens, hidden]`, row-major.
    values: Vec<f32>,
    hidden_size: usize,
}

/// Tokens whose activations are in memory at a time.
const PIECE: usize = 1024;

impl Inputs {
    /// Most tokens that a layer is measured on, evenly spaced among those there are; as many as REAM's published code
    /// draws at random. In memory they take 4 bytes per token and number of the residual stream: 268 MB at 2048.
    pub const TOKENS: usize = 32768;

    /// Inputs `[tokens, hidden]`, row-major.
    ///
    /// # Errors
    /// [`Error::Missing`] where the values are no such matrix.
    pub fn new(values: Vec<f32>, hidden_size: usize) -> Result<Self> {
        if hidden_size == 0 || !values.len().is_multiple_of(hidden_size) {
            let count = values.len();
            return Err(Error::Missing(format!("{count} values are no rows of {hidden_size} inputs")));
        }
        Ok(Inputs { values, hidden_size })
    }

    /// Their number.
    pub fn tokens(&self) -> usize {
        self.values.len() / self.hidden_size.max(1)
    }

    /// Bytes that a comparison of two experts takes beside these inputs.
    pub(super) fn memory(&self, width: usize, hidden_size: usize) -> usize {
        // Gate, up and the transpose of one expert, and what is left of the other; gate and up of both.
        16 * self.tokens().min(PIECE) * width + 16 * width * hidden_size
    }

    /// Adds row `row` of `rows`.
    pub(super) fn push(&mut self, rows: &[f32], row: usize) {
        self.values.extend_from_slice(&rows[row * self.hidden_size..(row + 1) * self.hidden_size]);
    }
}

/// Gate and up of an expert, ready to run on tokens.
struct Hidden<'a> {
    mlp: &'a Mlp<LinearSource>,
    /// Weights `[width, hidden]` and biases.
    maps: Vec<(Vec<f32>, Option<Vec<f32>>)>,
}

impl<'a> Hidden<'a> {
    fn new(mlp: &'a Mlp<LinearSource>) -> Result<Self> {
        let map = |map: &LinearSource| -> Result<_> {
            let bias = map.bias.as_ref().map(crate::checkpoint::Tensor::to_f32).transpose()?;
            Ok((Weight::to_f32(&map.weight), bias))
        };
        let maps = std::iter::once(&mlp.gate).chain(&mlp.up).map(map).collect::<Result<_>>()?;
        Ok(Hidden { mlp, maps })
    }

    /// `[width, tokens]` for `x [tokens, hidden]`.
    fn run(&self, x: &[f32], hidden_size: usize) -> Vec<f32> {
        let width = self.mlp.gate.weight.rows();
        let mut outputs = self.maps.iter().map(|(weight, bias)| {
            let mut out = vec![0.0; x.len() / hidden_size * width];
            multiply(x, weight, hidden_size, false, &mut out);
            if let Some(bias) = bias {
                add_bias(&mut out, bias);
            }
            out
        });
        let mut hidden = outputs.next().unwrap_or_default();
        let up = outputs.next().unwrap_or_default();
        activate(&mut hidden, &up, self.mlp.activation);
        transpose(&hidden, width)
    }
}

/// The inner products of the activations of all pairs of neurons on `inputs`.
pub(super) fn products(
    reference: &Mlp<LinearSource>,
    member: &Mlp<LinearSource>,
    inputs: &Inputs,
) -> Result<Products> {
    let d = inputs.hidden_size;
    if inputs.tokens() == 0 || reference.gate.weight.cols() != d || member.gate.weight.cols() != d {
        let what = format!("{} tokens of {d} numbers cannot be run on these experts", inputs.tokens());
        return Err(Error::Missing(what));
    }
    let (reference, member) = (Hidden::new(reference)?, Hidden::new(member)?);
    let mut sums = Products::new(reference.mlp.gate.weight.rows());
    for x in inputs.values.chunks(PIECE * d) {
        sums.add(&reference.run(x, d), &member.run(x, d), x.len() / d);
    }
    Ok(sums)
}

/// Sums over some terms of two sets of vectors aᵢ and bⱼ, as many of each.
pub(super) struct Products {
    /// Σ aᵢ bⱼ at i · count + j.
    pub(super) dot: Vec<f64>,
    /// Σ a, Σ a², Σ b, Σ b², `count` of each.
    sums: [Vec<f64>; 4],
    terms: usize,
}

impl Products {
    pub(super) fn new(count: usize) -> Self {
        Products { dot: vec![0.0; count * count], sums: std::array::from_fn(|_| vec![0.0; count]), terms: 0 }
    }

    /// Adds `terms` terms of every vector, `[count, terms]`.
    pub(super) fn add(&mut self, a: &[f32], b: &[f32], terms: usize) {
        let mut products = vec![0.0; self.dot.len()];
        multiply(a, b, terms, false, &mut products);
        self.dot
            .par_iter_mut()
            .zip(&products)
            .with_min_len(1 << 14)
            .for_each(|(sum, p)| *sum += f64::from(*p));
        let [a_sum, a_square, b_sum, b_square] = &mut self.sums;
        for (values, sum, square) in [(a, a_sum, a_square), (b, b_sum, b_square)] {
            let rows = values.par_chunks_exact(terms).zip(sum).zip(square);
            rows.for_each(|((row, sum), square)| {
                for v in row.iter().map(|v| f64::from(*v)) {
                    *sum += v;
                    *square += v * v;
                }
            });
        }
        self.terms += terms;
    }

    /// 1 − Pearson's correlation of every pair; 1 where one of the two is constant.
    pub(super) fn decorrelations(&self) -> Vec<f64> {
        let n = self.terms as f64;
        let [a_sum, a_square, b_sum, b_square] = &self.sums;
        // What rounding leaves of a constant vector is none.
        let deviation = |sum: &f64, square: &f64| (square - sum * sum / n).max(1e-12 * square).sqrt();
        let deviations = |sums: &[f64], squares: &[f64]| -> Vec<f64> {
            sums.iter().zip(squares).map(|(sum, square)| deviation(sum, square)).collect()
        };
        let (a, b) = (deviations(a_sum, a_square), deviations(b_sum, b_square));
        self.pairs(|i, j, dot| {
            let scale = a[i] * b[j];
            if scale > 0.0 { 1.0 - (dot - a_sum[i] * b_sum[j] / n) / scale } else { 1.0 }
        })
    }

    /// The distance of every pair, each vector divided by its norm; a vector of zeros stays one.
    pub(super) fn distances(&self) -> Vec<f64> {
        let [_, a, _, b] = &self.sums;
        let unit = |square: f64| if square > 0.0 { 1.0 } else { 0.0 };
        self.pairs(|i, j, dot| {
            let scale = (a[i] * b[j]).sqrt();
            let cosine = if scale > 0.0 { dot / scale } else { 0.0 };
            (unit(a[i]) + unit(b[j]) - 2.0 * cosine).max(0.0).sqrt()
        })
    }

    fn pairs(&self, value: impl Fn(usize, usize, f64) -> f64 + Sync) -> Vec<f64> {
        let count = self.sums[0].len();
        let pair = |(index, dot): (usize, &f64)| value(index / count, index % count, *dot);
        self.dot.par_iter().enumerate().with_min_len(1 << 14).map(pair).collect()
    }
}
