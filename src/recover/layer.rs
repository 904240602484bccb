//! The routed experts of one layer in training, and the tokens that they are trained on.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use super::expert::{Trace, Trained};
use super::map::Parameter;
use crate::backend::cpu::{multiply, transpose};
use crate::linalg::{self, Threads, solve_semidefinite};

/// No expert: a slot that is skipped, or whose weight went to an earlier slot of the same expert.
pub(super) const NONE: u32 = u32::MAX;

/// Inputs, routing and targets of the tokens that count.
#[derive(Clone, Debug, Default)]
pub(super) struct Data {
    pub(super) hidden_size: usize,
    /// Where the experts read and write a latent, the map behind them.
    pub(super) expansion: Option<Expansion>,
    pub(super) top_k: usize,
    /// Combine weights multiply the experts' inputs instead of their outputs.
    pub(super) weighs_input: bool,
    /// `[tokens, hidden]`, or `[tokens, latent]`.
    pub(super) x: Vec<f32>,
    /// What the weighted outputs should add up to, behind the expansion where there is one, `[tokens, hidden]`.
    pub(super) target: Vec<f32>,
    /// Slots whose weights are run, `[tokens, top_k]`; [`NONE`] runs nothing.
    pub(super) ids: Vec<u32>,
    /// Combine weights, `[tokens, top_k]`.
    pub(super) weights: Vec<f32>,
    /// Tokens that are trained on.
    pub(super) training: Vec<u32>,
    /// Tokens that only judge.
    pub(super) held_out: Vec<u32>,
}

/// F in a layer's output F Σ g f(x), where the experts f read and write a latent. Its bias is in the targets.
#[derive(Clone, Debug)]
pub(super) struct Expansion {
    pub(super) latent: usize,
    /// F, `[hidden, latent]`.
    pub(super) matrix: Vec<f32>,
    /// Fᵀ, `[latent, hidden]`.
    transposed: Vec<f32>,
    /// F⁺, `[latent, hidden]`: F⁺ y is the latent whose output is nearest to y.
    inverse: Vec<f32>,
}

impl Expansion {
    /// Of `matrix [hidden, latent]`.
    ///
    /// # Errors
    /// A matrix that is not finite, or whose squares are not.
    pub(super) fn new(matrix: Vec<f32>, latent: usize) -> Result<Self, linalg::Error> {
        let inverse = pseudo_inverse(&matrix, latent)?;
        Ok(Expansion { latent, transposed: transpose(&matrix, latent), inverse, matrix })
    }

    /// F and F⁺ of some coordinates of the latent alone, `[hidden, rows]` and `[rows, hidden]`.
    ///
    /// # Errors
    /// Those of [`Expansion::new`].
    pub(super) fn of(&self, rows: &[u32]) -> Result<[Vec<f32>; 2], linalg::Error> {
        if rows.len() == self.latent {
            return Ok([self.matrix.clone(), self.inverse.clone()]);
        }
        let columns = self.matrix.chunks_exact(self.latent);
        let some: Vec<f32> = columns.flat_map(|row| rows.iter().map(|&r| row[r as usize])).collect();
        let inverse = pseudo_inverse(&some, rows.len())?;
        Ok([some, inverse])
    }
}

/// The pseudo-inverse (FᵀF)⁻¹Fᵀ `[cols, rows]` of `matrix [rows, cols]`.
fn pseudo_inverse(matrix: &[f32], cols: usize) -> Result<Vec<f32>, linalg::Error> {
    let values: Vec<f64> = matrix.iter().map(|v| f64::from(*v)).collect();
    let f = MatRef::from_row_major_slice(&values, matrix.len() / cols, cols);
    let mut normal = Mat::zeros(cols, cols);
    // One thread: faer's parallel sums depend on how many there are.
    matmul(normal.as_mut(), Accum::Replace, f.transpose(), f, 1.0, Par::Seq);
    let inverse = solve_semidefinite(normal.as_ref(), f.transpose(), Threads::All)?;
    Ok(inverse.row_iter().flat_map(|row| row.iter().map(|v| *v as f32)).collect())
}

/// A token of a batch and an expert that it runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    /// Position in the batch.
    pub(super) row: u32,
    /// Coefficient of the output.
    pub(super) weight: f32,
    /// Factor of the input.
    pub(super) scale: f32,
}

impl Data {
    /// Width of what the experts read and write.
    pub(super) fn expert_io(&self) -> usize {
        self.expansion.as_ref().map_or(self.hidden_size, |e| e.latent)
    }

    /// The input of token `t`.
    pub(super) fn input(&self, t: u32) -> &[f32] {
        let (start, width) = (t as usize * self.expert_io(), self.expert_io());
        &self.x[start..start + width]
    }

    /// The target of token `t`.
    pub(super) fn wanted(&self, t: u32) -> &[f32] {
        let start = t as usize * self.hidden_size;
        &self.target[start..start + self.hidden_size]
    }

    /// The pairs of the tokens `batch` by expert, in the order of the batch.
    pub(super) fn pairs(&self, batch: &[u32], experts: usize) -> Vec<Vec<Pair>> {
        let mut pairs = vec![Vec::new(); experts];
        for (row, &token) in batch.iter().enumerate() {
            let slots = token as usize * self.top_k..(token as usize + 1) * self.top_k;
            for (&id, &g) in self.ids[slots.clone()].iter().zip(&self.weights[slots]) {
                if id != NONE {
                    let (weight, scale) = if self.weighs_input { (1.0, g) } else { (g, 1.0) };
                    pairs[id as usize].push(Pair { row: row as u32, weight, scale });
                }
            }
        }
        pairs
    }

    /// Inputs of `pairs`, `[pairs, hidden]` or `[pairs, latent]`.
    pub(super) fn inputs(&self, batch: &[u32], pairs: &[Pair]) -> Vec<f32> {
        let mut inputs = Vec::with_capacity(pairs.len() * self.expert_io());
        for pair in pairs {
            let row = self.input(batch[pair.row as usize]);
            inputs.extend(row.iter().map(|v| v * pair.scale));
        }
        inputs
    }

    /// Σ ‖target‖² over `batch`.
    pub(super) fn energy(&self, batch: &[u32]) -> f64 {
        batch.iter().map(|&t| square(self.wanted(t))).sum()
    }
}

/// Σ v².
pub(super) fn square(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}

/// The experts of a layer, one entry per router row.
#[derive(Clone, Debug)]
pub(super) struct TrainedLayer {
    pub(super) experts: Vec<Trained>,
}

/// Tokens whose activations are in memory at a time where a pass is over all of them.
pub(super) const TOKENS: usize = 4096;

impl TrainedLayer {
    /// Adds `sign` × the weighted outputs of the experts for the tokens `batch` to `out [batch, hidden]`.
    pub(super) fn add_outputs(&self, data: &Data, batch: &[u32], sign: f32, out: &mut [f32]) {
        self.outputs(data, batch, sign, out);
    }

    fn outputs(&self, data: &Data, batch: &[u32], sign: f32, out: &mut [f32]) -> Vec<Passed> {
        let pairs = data.pairs(batch, self.experts.len());
        let run = |(expert, pairs): (&Trained, Vec<Pair>)| {
            let x = data.inputs(batch, &pairs);
            let (y, trace) = expert.forward(&x, pairs.len());
            Passed { pairs, x, y, trace }
        };
        let passed: Vec<Passed> = self.experts.par_iter().zip(pairs).map(run).collect();
        let width = data.expert_io();
        // In the order of the experts, so that sums do not depend on who was done first.
        let add = |out: &mut [f32]| {
            for Passed { pairs, y, .. } in &passed {
                for (pair, y) in pairs.iter().zip(y.chunks_exact(width)) {
                    let start = pair.row as usize * width;
                    let row = &mut out[start..start + width];
                    row.iter_mut().zip(y).for_each(|(o, y)| *o += sign * pair.weight * y);
                }
            }
        };
        match &data.expansion {
            None => add(out),
            Some(expansion) => {
                let mut sums = vec![0.0; batch.len() * width];
                add(&mut sums);
                multiply(&sums, &expansion.matrix, width, true, out);
            }
        }
        passed
    }

    /// target − outputs for the tokens `batch`, `[batch, hidden]`.
    pub(super) fn residual(&self, data: &Data, batch: &[u32]) -> Vec<f32> {
        let rows: Vec<&[u32]> = batch.chunks(TOKENS).collect();
        let mut all = Vec::with_capacity(batch.len() * data.hidden_size);
        for batch in rows {
            let mut rest: Vec<f32> = batch.iter().flat_map(|&t| data.wanted(t)).copied().collect();
            self.add_outputs(data, batch, -1.0, &mut rest);
            all.extend(rest);
        }
        all
    }

    /// ‖target − outputs‖² / ‖target‖² over the tokens `batch`, with the weights as they are; 0 where nothing is to be
    /// met.
    pub(super) fn loss(&self, data: &Data, batch: &[u32]) -> f64 {
        let parts = batch.chunks(TOKENS).map(|part| square(&self.residual(data, part)));
        let (loss, energy) = (parts.sum::<f64>(), data.energy(batch));
        if energy > 0.0 { loss / energy } else { loss }
    }

    /// The gradients of Σ ‖outputs − target‖² · `factor` over the tokens `batch`; returns Σ ‖outputs − target‖².
    pub(super) fn gradients(&mut self, data: &Data, batch: &[u32], factor: f64) -> f64 {
        let mut error: Vec<f32> = batch.iter().flat_map(|&t| data.wanted(t)).map(|v| -v).collect();
        let passed = self.outputs(data, batch, 1.0, &mut error);
        let loss = square(&error);
        if let Some(expansion) = &data.expansion {
            let mut back = vec![0.0; batch.len() * expansion.latent];
            multiply(&error, &expansion.transposed, data.hidden_size, false, &mut back);
            error = back;
        }
        let d = data.expert_io();
        self.experts.par_iter_mut().zip(passed).for_each(|(expert, Passed { pairs, x, trace, .. })| {
            let mut dy = Vec::with_capacity(pairs.len() * d);
            for pair in &pairs {
                let slope = (2.0 * factor) as f32 * pair.weight;
                let start = pair.row as usize * d;
                dy.extend(error[start..start + d].iter().map(|e| slope * e));
            }
            expert.backward(&x, &trace, &dy);
        });
        loss
    }

    /// Everything that is trained, in a fixed order.
    pub(super) fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.experts.iter_mut().flat_map(Trained::parameters).collect()
    }

    /// The values as they will be stored.
    pub(super) fn snapshot(&mut self) -> Vec<Vec<f32>> {
        self.parameters().into_iter().map(|p| p.stored()).collect()
    }

    /// Puts the values of a snapshot in place and returns those that were there.
    pub(super) fn swap(&mut self, snapshot: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
        let swapped = self.parameters().into_iter().zip(snapshot);
        swapped.map(|(p, values)| std::mem::replace(&mut p.values, values)).collect()
    }
}

/// A batch's way through one expert.
struct Passed {
    pairs: Vec<Pair>,
    x: Vec<f32>,
    y: Vec<f32>,
    trace: Trace,
}
