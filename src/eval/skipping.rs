//! How many experts run, in models that skip some of those that the router chose.

use serde::Serialize;

use crate::backend::{Batch, Routes};

/// Experts that ran, over all tokens that are not padding and all layers that skip experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Skipping {
    /// Share of the chosen experts that were left out.
    pub skipped: f64,
    /// Every layer that skips experts.
    pub layers: Vec<LayerSkipping>,
}

/// Experts that ran in one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LayerSkipping {
    /// 0-based decoder layer.
    pub layer: usize,
    /// Experts that the router chooses for a token.
    pub top_k: usize,
    /// Mean number of them that ran.
    pub mean_active: f64,
    /// Tokens.
    #[serde(skip)]
    tokens: u64,
    /// Experts that ran for all of them.
    #[serde(skip)]
    active: u64,
}

impl Skipping {
    /// Adds what `routes` of layer `layer` show; padding does not count.
    pub(super) fn add(&mut self, layer: usize, routes: &Routes, batch: &Batch) {
        let position = self.layers.partition_point(|l| l.layer < layer);
        if self.layers.get(position).is_none_or(|l| l.layer != layer) {
            self.layers
                .insert(position, LayerSkipping { layer, top_k: routes.top_k, ..LayerSkipping::default() });
        }
        let sums = &mut self.layers[position];
        for (_, ids) in routes.ids.chunks_exact(routes.top_k).enumerate().filter(|(t, _)| batch.is_real(*t)) {
            sums.tokens += 1;
            sums.active += ids.iter().filter(|id| **id != Routes::SKIPPED).count() as u64;
        }
    }

    /// The shares; `None` where no layer skips experts.
    pub(super) fn finish(mut self) -> Option<Self> {
        for layer in &mut self.layers {
            layer.mean_active = layer.active as f64 / layer.tokens as f64;
        }
        let chosen: u64 = self.layers.iter().map(|l| l.tokens * l.top_k as u64).sum();
        let active: u64 = self.layers.iter().map(|l| l.active).sum();
        self.skipped = 1.0 - active as f64 / chosen as f64;
        (chosen > 0).then_some(self)
    }
}
