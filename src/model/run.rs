//! A forward pass whose results are kept: logits and, on request, what every layer did.

use std::collections::BTreeMap;
use std::path::Path;

use super::{HeadScratch, LayerSource, Model, Result, Stream};
use crate::architecture::{FeedForwardSpec, LayerSpec};
use crate::backend::{Backend, Routes};
use crate::checkpoint::{Entry, write_safetensors};
use crate::progress::Progress;
use crate::tokens::Windows;

/// Results of [`run`].
#[derive(Clone, Debug)]
pub struct RunOutput {
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window; of the decoder's, behind an encoder.
    pub length: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// `[windows, length, vocabulary]`.
    pub logits: Vec<f32>,
    /// Every layer, where a trace was asked for.
    pub layers: Vec<LayerTrace>,
}

/// What one layer did.
#[derive(Clone, Debug, Default)]
pub struct LayerTrace {
    /// Tokens per window that pass the layer.
    pub length: usize,
    /// Residual stream after the layer, `[windows, length, hidden]`.
    pub hidden: Vec<f32>,
    /// Routing of all tokens, where the layer has a router. Ids are rows of the router.
    pub routes: Option<Routes>,
}

/// How large the results of [`run`] will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunSize {
    /// Bytes of the logits.
    pub logits: u64,
    /// Bytes of the trace, as `config.json` has the layers; a compressed router makes it smaller.
    pub trace: u64,
}

impl RunSize {
    /// Sizes for `windows` windows of `length` tokens.
    pub fn of<B: Backend>(model: &Model<'_, B>, windows: &Windows) -> Self {
        let architecture = model.architecture();
        let values = |layer: &FeedForwardSpec| match layer {
            FeedForwardSpec::Dense { .. } => architecture.hidden_size,
            FeedForwardSpec::Moe(moe) => architecture.hidden_size + moe.experts + 2 * moe.router.top_k,
        };
        let bytes = |windows: &Windows, per_token: usize| {
            (windows.count * windows.length) as u64 * 4 * per_token as u64
        };
        let layer = |(l, layer): (usize, &LayerSpec)| {
            bytes(windows.of_layer(architecture.in_encoder(l)), values(&layer.feed_forward))
        };
        RunSize {
            logits: bytes(windows.predicted(), architecture.vocabulary),
            trace: architecture.layers.iter().enumerate().map(layer).sum(),
        }
    }
}

/// Runs `windows` through the model, a layer at a time, and keeps the logits and, with `trace`, the residual stream
/// after every layer and every router's decisions.
///
/// # Errors
/// Ids outside the vocabulary, windows longer than the model's positions, and what is wrong with a layer's tensors.
pub fn run<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    trace: bool,
    progress: &mut dyn Progress,
) -> Result<RunOutput> {
    let (architecture, backend) = (model.architecture(), model.backend());
    let mut stream = Stream::new(model, windows)?;
    // Before the layers, so that a head that does not fit costs no time.
    let head = model.head()?;
    let mut layers = Vec::new();
    progress.begin("run: layer", architecture.layers.len());
    for l in 0..architecture.layers.len() {
        let source = LayerSource::open(model.checkpoint(), architecture, l)?;
        let layer = model.prepare(&source)?;
        let length = windows.of_layer(architecture.in_encoder(l)).length;
        let mut traced = LayerTrace { length, ..LayerTrace::default() };
        stream.advance(&layer, |chunk, scratch| {
            if trace {
                traced.hidden.extend(backend.download(&chunk.x)?);
                if layer.is_moe() {
                    traced.append_routes(backend.routes(&scratch.routing)?);
                }
            }
            Ok(())
        })?;
        if trace {
            layers.push(traced);
        }
        drop(layer);
        source.release();
        progress.step("");
    }
    progress.end();
    let mut work = HeadScratch::new(backend);
    let mut logits = Vec::with_capacity(windows.predicted().ids.len() * architecture.vocabulary);
    progress.begin("run: logits", stream.chunks.len());
    for chunk in &stream.chunks {
        let tokens = chunk.batch.tokens();
        for start in (0..tokens).step_by(head.block_rows()) {
            let count = head.block_rows().min(tokens - start);
            logits.extend(head.logits(backend, &chunk.x, start, count, &mut work)?);
        }
        progress.step("");
    }
    progress.end();
    Ok(RunOutput {
        windows: windows.count,
        length: windows.predicted().length,
        hidden_size: architecture.hidden_size,
        vocabulary: architecture.vocabulary,
        logits,
        layers,
    })
}

impl LayerTrace {
    fn append_routes(&mut self, routes: Routes) {
        match &mut self.routes {
            None => self.routes = Some(routes),
            Some(all) => {
                all.logits.extend(routes.logits);
                all.ids.extend(routes.ids);
                all.weights.extend(routes.weights);
            }
        }
    }
}

impl RunOutput {
    /// Writes a safetensors file: `logits` f32 `[windows, length, vocabulary]`, and for every traced layer
    /// `layers.{l}.hidden` f32 `[windows, length, hidden]`, `layers.{l}.router_logits` f32 `[tokens, experts]`,
    /// `layers.{l}.top_k_ids` i32 and `layers.{l}.top_k_weights` f32 `[tokens, k]`, largest weight first.
    ///
    /// # Errors
    /// Names the file; it is then as it was before.
    pub fn write(&self, path: &Path) -> Result<()> {
        let shape = |length: usize, width: usize| vec![self.windows, length, width];
        let ids: Vec<Vec<i32>> = self
            .layers
            .iter()
            .map(|layer| layer.routes.iter().flat_map(|r| &r.ids).map(|&id| id as i32).collect())
            .collect();
        let mut entries = vec![Entry::f32("logits", shape(self.length, self.vocabulary), &self.logits)];
        for (l, (layer, ids)) in self.layers.iter().zip(&ids).enumerate() {
            let name = |what: &str| format!("layers.{l}.{what}");
            let tokens = self.windows * layer.length;
            entries.push(Entry::f32(name("hidden"), shape(layer.length, self.hidden_size), &layer.hidden));
            if let Some(routes) = &layer.routes {
                let chosen = vec![tokens, routes.top_k];
                let experts = routes.logits.len() / tokens.max(1);
                entries.push(Entry::f32(name("router_logits"), vec![tokens, experts], &routes.logits));
                entries.push(Entry::i32(name("top_k_ids"), chosen.clone(), ids));
                entries.push(Entry::f32(name("top_k_weights"), chosen, &routes.weights));
            }
        }
        Ok(write_safetensors(path, &BTreeMap::new(), entries)?)
    }
}
