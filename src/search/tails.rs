//! The weights of chosen experts, over all tokens.

use super::state::State;
use crate::backend::{Backend, Batch, Expert, Routes};
use crate::model::{FeedForwardSource, LayerSource, Result, Stream};
use crate::plan::Tails;

impl<B: Backend> State<'_, '_, B> {
    /// The weights of every layer, in the model that has lost the experts `dropped` of each.
    pub(super) fn tails(&mut self, dropped: &[Vec<usize>]) -> Result<Vec<Tails>> {
        let (model, backend) = (self.model, self.model.backend());
        let architecture = model.architecture();
        let mut stream = Stream::new(model, self.windows)?;
        let mut lost = dropped.iter();
        let mut tails = Vec::with_capacity(dropped.len());
        self.progress.begin("plan: skipping, layer", architecture.layers.len());
        for l in 0..architecture.layers.len() {
            let mut source = LayerSource::open(model.checkpoint(), architecture, l)?;
            let mut collector = Collector::default();
            if let FeedForwardSource::Moe(moe) = &mut source.feed_forward {
                moe.spec.skip = None;
                for &e in lost.next().into_iter().flatten() {
                    moe.experts[e] = Expert::None;
                }
            }
            let layer = model.prepare(&source)?;
            stream.advance(&layer, |chunk, scratch| {
                if layer.is_moe() {
                    collector.add(&backend.routes(&scratch.routing)?, &chunk.batch);
                }
                Ok(())
            })?;
            if layer.is_moe() {
                tails.push(collector.finish());
            }
            drop(layer);
            source.release();
            self.progress.step("");
        }
        self.progress.end();
        Ok(tails)
    }
}

/// Collects the weights of one layer.
#[derive(Default)]
struct Collector {
    ratios: Vec<f64>,
    /// For i from 1 to k − 1 one number per token.
    after: Vec<Vec<f64>>,
}

impl Collector {
    /// Adds the tokens of a batch that are not padding.
    fn add(&mut self, routes: &Routes, batch: &Batch) {
        let k = routes.top_k;
        self.after.resize(k - 1, Vec::new());
        for (_, weights) in routes.weights.chunks_exact(k).enumerate().filter(|(t, _)| batch.is_real(*t)) {
            let mut weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
            weights.sort_by(|a, b| b.total_cmp(a));
            let sum: f64 = weights.iter().sum();
            for (i, shares) in (1..).zip(&mut self.after) {
                shares.push(weights[i..].iter().sum::<f64>() / sum);
            }
            if k == 2 {
                self.ratios.push(weights[1] / weights[0]);
            }
        }
    }

    fn finish(self) -> Tails {
        let ratio = (!self.ratios.is_empty()).then(|| median(self.ratios));
        Tails { ratio, after: self.after.into_iter().map(median).collect() }
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        n if n.is_multiple_of(2) => f64::midpoint(values[n / 2 - 1], values[n / 2]),
        n => values[n / 2],
    }
}
