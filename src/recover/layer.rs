//! The routed experts of one layer in training, and the tokens that they are trained on.

use rayon::prelude::*;

use super::expert::{Trace, Trained};
use super::map::Parameter;

/// No expert: a slot that is skipped, or whose weight went to an earlier slot of the same expert.
pub(super) const NONE: u32 = u32::MAX;

/// Inputs, routing and targets of the tokens that count.
#[derive(Clone, Debug, Default)]
pub(super) struct Data {
    pub(super) hidden_size: usize,
    pub(super) top_k: usize,
    /// Combine weights multiply the experts' inputs instead of their outputs.
    pub(super) weighs_input: bool,
    /// `[tokens, hidden]`.
    pub(super) x: Vec<f32>,
    /// What the weighted outputs should add up to, `[tokens, hidden]`.
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
    /// Row `t` of an array `[tokens, hidden]`.
    pub(super) fn row<'a>(&self, array: &'a [f32], t: u32) -> &'a [f32] {
        let start = t as usize * self.hidden_size;
        &array[start..start + self.hidden_size]
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

    /// Inputs of `pairs`, `[pairs, hidden]`.
    pub(super) fn inputs(&self, batch: &[u32], pairs: &[Pair]) -> Vec<f32> {
        let mut inputs = Vec::with_capacity(pairs.len() * self.hidden_size);
        for pair in pairs {
            let row = self.row(&self.x, batch[pair.row as usize]);
            inputs.extend(row.iter().map(|v| v * pair.scale));
        }
        inputs
    }

    /// Σ ‖target‖² over `batch`.
    pub(super) fn energy(&self, batch: &[u32]) -> f64 {
        batch.iter().map(|&t| square(self.row(&self.target, t))).sum()
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
        // In the order of the experts, so that sums do not depend on who was done first.
        for Passed { pairs, y, .. } in &passed {
            for (pair, y) in pairs.iter().zip(y.chunks_exact(data.hidden_size)) {
                let start = pair.row as usize * data.hidden_size;
                let row = &mut out[start..start + data.hidden_size];
                row.iter_mut().zip(y).for_each(|(o, y)| *o += sign * pair.weight * y);
            }
        }
        passed
    }

    /// target − outputs for the tokens `batch`, `[batch, hidden]`.
    pub(super) fn residual(&self, data: &Data, batch: &[u32]) -> Vec<f32> {
        let rows: Vec<&[u32]> = batch.chunks(TOKENS).collect();
        let mut all = Vec::with_capacity(batch.len() * data.hidden_size);
        for batch in rows {
            let mut rest: Vec<f32> = batch.iter().flat_map(|&t| data.row(&data.target, t)).copied().collect();
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
        let mut error: Vec<f32> = batch.iter().flat_map(|&t| data.row(&data.target, t)).map(|v| -v).collect();
        let passed = self.outputs(data, batch, 1.0, &mut error);
        let loss = square(&error);
        let d = data.hidden_size;
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
