//! One layer's experts brought back towards the original's routed output.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::layer::{Data, TrainedLayer};
use super::sparse::{self, LoSparse, Schedule};
use super::{adam, least_squares};

/// How a layer is trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Training {
    /// Sweeps of closed-form least squares over the last factors; 0 leaves them out.
    pub sweeps: usize,
    /// Ridge of the least squares, as a share of the mean diagonal entry of the Gram matrix.
    pub ridge: f64,
    /// Steps of Adam; 0 leaves it out.
    pub steps: usize,
    /// Largest step of a value, as a share of the root mean square of its matrix.
    pub rate: f64,
    /// Tokens of a step.
    pub batch: usize,
    /// Seed of the order of the tokens.
    pub seed: u64,
}

impl Default for Training {
    fn default() -> Self {
        Training { sweeps: 2, ridge: 1e-2, steps: 400, rate: 0.02, batch: 1024, seed: 0 }
    }
}

/// How far a layer's routed output is from the original's: ‖difference‖² / ‖original‖² over the tokens held out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct LayerLoss {
    /// Before.
    pub before: f64,
    /// With the least squares alone.
    pub least_squares: f64,
    /// At the end; never above `before`, unless rows of a sparse matrix went on the way.
    pub after: f64,
}

/// How many times held-out tokens judge during the steps of Adam.
const JUDGEMENTS: usize = 10;

/// Trains `layer` and leaves the values in it that were best on the held-out tokens, as they will be stored: those that it
/// came with, if nothing was better. With `sparse`, rows of all S go on that schedule first, and what is left of the layer
/// is what counts from then on.
///
/// # Errors
/// Names the expert whose normal equations cannot be solved.
pub(super) fn train(
    layer: &mut TrainedLayer,
    data: &Data,
    training: &Training,
    sparse: Option<&Schedule>,
    seed: u64,
) -> Result<LayerLoss, (usize, crate::linalg::Error)> {
    let mut best = layer.snapshot();
    let judge = |layer: &mut TrainedLayer| {
        let stored = layer.snapshot();
        let masters = layer.swap(stored);
        let loss = layer.loss(data, &data.held_out);
        (loss, layer.swap(masters))
    };
    let (before, _) = judge(layer);
    let mut loss = LayerLoss { before, least_squares: before, after: before };
    let consider = |layer: &mut TrainedLayer, best: &mut Vec<Vec<f32>>, loss: &mut LayerLoss| {
        let (found, stored) = judge(layer);
        // A loss that is no number is not better.
        if found < loss.after {
            (loss.after, *best) = (found, stored);
        }
    };
    // The rows that go are not known yet: what is left out last must not be leant on first.
    if sparse.is_none() && training.sweeps > 0 {
        let mut rest = layer.residual(data, &data.training);
        for _ in 0..training.sweeps {
            least_squares::sweep(layer, data, &data.training, &mut rest, training.ridge)?;
            consider(layer, &mut best, &mut loss);
        }
        loss.least_squares = loss.after;
        // Adam goes on from the best of them.
        layer.swap(best.clone());
    }

    let energy = data.energy(&data.training) / data.training.len().max(1) as f64;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order = data.training.clone();
    let mut next = order.len();
    let mut losparse = sparse.map(|schedule| LoSparse::new(layer, *schedule));
    let every = training.steps.div_ceil(JUDGEMENTS).max(1);
    for t in 1..=training.steps {
        let size = training.batch.min(order.len());
        if next + size > order.len() {
            order.shuffle(&mut rng);
            next = 0;
        }
        let batch = &order[next..next + size];
        next += size;
        let factor = 1.0 / (size as f64 * if energy > 0.0 { energy } else { 1.0 });
        layer.gradients(data, batch, factor);
        if let Some(losparse) = &mut losparse {
            losparse.observe(layer);
        }
        let rate = training.rate * adam::schedule(t, training.steps);
        for parameter in layer.parameters() {
            adam::step(parameter, t, rate);
        }
        match &mut losparse {
            // Rows are still going: only the end counts.
            Some(losparse) => losparse.prune(layer, t, training.steps),
            None if t % every == 0 || t == training.steps => consider(layer, &mut best, &mut loss),
            None => {}
        }
    }
    if sparse.is_some() {
        sparse::drop_empty_rows(layer);
        (loss.after, best) = judge(layer);
        let mut rest = layer.residual(data, &data.training);
        for _ in 0..training.sweeps {
            least_squares::sweep(layer, data, &data.training, &mut rest, training.ridge)?;
            consider(layer, &mut best, &mut loss);
        }
    }
    layer.swap(best);
    Ok(loss)
}
