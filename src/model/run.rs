//! A forward pass whose results are kept: logits and, on request, what every layer did.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Chunk, Head, HeadScratch, LayerSource, Model, Result, Scratch, Stream, TOKENS_PER_CHUNK};
use crate::architecture::{FeedForwardSpec, LayerSpec};
use crate::backend::{Backend, Routes};
use crate::checkpoint::{Dtype, SafetensorsWriter};
use crate::progress::Progress;
use crate::tokens::Windows;

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
            FeedForwardSpec::Dense { .. } | FeedForwardSpec::None => architecture.hidden_size,
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

/// Tokens, padding included, that pass the whole model together, roughly: whole windows, at least one. It bounds memory
/// whatever the number of windows; the weights are read once for each.
const TOKENS_PER_PASS: usize = 1 << 16;

/// Runs `windows` through the model and writes a safetensors file: `logits` f32 `[windows, length, vocabulary]`, and
/// with `trace` for every layer `layers.{l}.hidden` f32 `[windows, length, hidden]`, the residual stream behind it, and
/// where it has a router `layers.{l}.router_logits` f32 `[tokens, experts]`, `layers.{l}.top_k_ids` i32 and
/// `layers.{l}.top_k_weights` f32 `[tokens, k]`, largest weight first. Ids are rows of the router. Everything is written
/// as it is found; logits that are not finite are warned of.
///
/// # Errors
/// Ids outside the vocabulary, windows longer than the model's positions, what is wrong with a layer's tensors, and a
/// file that cannot be written; it is then as it was before.
pub fn run<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    trace: bool,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let architecture = model.architecture();
    windows.check(architecture.vocabulary, architecture.max_positions)?;
    windows.check_decoder(architecture.family, architecture.encoder_layers > 0)?;
    // Before the layers, so that a head that does not fit costs no time.
    let head = model.head()?;
    let per_chunk = (TOKENS_PER_CHUNK / windows.longest()).max(1);
    // Whole chunks, so that results do not depend on where a pass ends.
    let per_pass = (TOKENS_PER_PASS / windows.longest() / per_chunk).max(1) * per_chunk;
    let passes = windows.count.div_ceil(per_pass);
    let mut results = Results {
        model,
        windows,
        file: SafetensorsWriter::create(out, &BTreeMap::new(), tensors(model, windows, trace)?)?,
        first_window: 0,
        not_finite: None,
    };
    for (pass, first) in (0..windows.count).step_by(per_pass).enumerate() {
        let task = if passes == 1 { "run".into() } else { format!("run {}/{passes}", pass + 1) };
        progress.begin(&format!("{task}: layer"), architecture.layers.len());
        results.first_window = first;
        let part = windows.slice(first, per_pass.min(windows.count - first));
        let mut stream = Stream::new(model, &part)?;
        for l in 0..architecture.layers.len() {
            let source = LayerSource::open(model.checkpoint(), architecture, l)?;
            let layer = model.prepare(&source)?;
            stream.advance(&layer, |chunk, scratch| {
                if trace { results.layer(l, layer.is_moe(), chunk, scratch) } else { Ok(()) }
            })?;
            drop(layer);
            source.release();
            progress.step("");
        }
        let mut work = HeadScratch::new(model.backend());
        progress.begin(&format!("{task}: logits"), stream.chunks.len());
        for chunk in &stream.chunks {
            results.logits(&head, chunk, &mut work)?;
            progress.step("");
        }
    }
    progress.end();
    if let Some(token) = results.not_finite {
        let (dir, length) = (model.checkpoint().dir().display(), windows.predicted().length);
        let (window, position) = (token / length, token % length);
        progress.warn(&format!("{dir}: window {window}, position {position}: the logits are not finite"));
    }
    model.checkpoint().check_unchanged()?;
    Ok(results.file.commit()?)
}

/// Names, types and shapes of everything that [`run`] writes.
fn tensors<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    trace: bool,
) -> Result<Vec<(String, Dtype, Vec<usize>)>> {
    let architecture = model.architecture();
    let predicted = windows.predicted();
    let shape = vec![predicted.count, predicted.length, architecture.vocabulary];
    let mut tensors = vec![("logits".to_string(), Dtype::F32, shape)];
    for l in (0..architecture.layers.len()).filter(|_| trace) {
        let Windows { count, length, .. } = *windows.of_layer(architecture.in_encoder(l));
        let mut add = |what: &str, dtype, shape| tensors.push((name(l, what), dtype, shape));
        add("hidden", Dtype::F32, vec![count, length, architecture.hidden_size]);
        let source = LayerSource::locate(model.checkpoint(), architecture, l)?;
        if let Some(moe) = source.moe() {
            add("router_logits", Dtype::F32, vec![count * length, moe.experts.len()]);
            add("top_k_ids", Dtype::I32, vec![count * length, moe.spec.top_k]);
            add("top_k_weights", Dtype::F32, vec![count * length, moe.spec.top_k]);
        }
    }
    Ok(tensors)
}

fn name(l: usize, what: &str) -> String {
    format!("layers.{l}.{what}")
}

/// The file that the results go to.
struct Results<'a, 'm, B: Backend> {
    model: &'a Model<'m, B>,
    windows: &'a Windows,
    file: SafetensorsWriter,
    /// Of the pass at hand.
    first_window: usize,
    /// The first token that counts and has logits that are not finite.
    not_finite: Option<usize>,
}

impl<B: Backend> Results<'_, '_, B> {
    /// Writes values of consecutive tokens, the first of them being the `token`-th of all.
    fn write<T: bytemuck::NoUninit>(
        &mut self,
        name: &str,
        token: usize,
        per_token: usize,
        values: &[T],
    ) -> Result<()> {
        let start = token as u64 * per_token as u64 * size_of::<T>() as u64;
        Ok(self.file.write(name, start, bytemuck::cast_slice(values))?)
    }

    /// Number of the first token of a chunk, in which windows have `length` tokens.
    fn first_token(&self, chunk: &Chunk<B>, length: usize) -> usize {
        (self.first_window + chunk.first_window) * length
    }

    /// What layer `l` did to `chunk`.
    fn layer(&mut self, l: usize, is_moe: bool, chunk: &Chunk<B>, scratch: &Scratch<B>) -> Result<()> {
        let (architecture, backend) = (self.model.architecture(), self.model.backend());
        let length = self.windows.of_layer(architecture.in_encoder(l)).length;
        let (first, tokens) = (self.first_token(chunk, length), chunk.batch.tokens());
        self.write(&name(l, "hidden"), first, architecture.hidden_size, &backend.download(&chunk.x)?)?;
        if is_moe {
            let routes = by_weight(backend.routes(&scratch.routing)?);
            let experts = routes.logits.len() / tokens.max(1);
            self.write(&name(l, "router_logits"), first, experts, &routes.logits)?;
            // Those that are skipped are written as −1, which has the same bits.
            self.write(&name(l, "top_k_ids"), first, routes.top_k, &routes.ids)?;
            self.write(&name(l, "top_k_weights"), first, routes.top_k, &routes.weights)?;
        }
        Ok(())
    }

    /// The logits of `chunk`, behind the last layer.
    fn logits(&mut self, head: &Head<B>, chunk: &Chunk<B>, work: &mut HeadScratch<B>) -> Result<()> {
        let (vocabulary, backend) = (self.model.architecture().vocabulary, self.model.backend());
        let (first, tokens) =
            (self.first_token(chunk, self.windows.predicted().length), chunk.batch.tokens());
        for start in (0..tokens).step_by(head.block_rows()) {
            let count = head.block_rows().min(tokens - start);
            let logits = head.logits(backend, &chunk.x, start, count, work)?;
            self.write("logits", first + start, vocabulary, &logits)?;
            let is_bad = |(row, logits): (usize, &[f32])| {
                chunk.batch.is_real(start + row) && logits.iter().any(|logit| !logit.is_finite())
            };
            if self.not_finite.is_none() {
                let bad = logits.chunks_exact(vocabulary).enumerate().position(is_bad);
                self.not_finite = bad.map(|row| first + start + row);
            }
        }
        Ok(())
    }
}

/// Every token's choices with the largest weight first, which is not the order of choice where a bias takes part in it.
fn by_weight(mut routes: Routes) -> Routes {
    let tokens = routes.ids.chunks_exact_mut(routes.top_k).zip(routes.weights.chunks_exact_mut(routes.top_k));
    for (ids, weights) in tokens {
        let mut slots: Vec<(u32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        slots.sort_by(|a, b| b.1.total_cmp(&a.1));
        for ((id, weight), slot) in ids.iter_mut().zip(weights).zip(slots) {
            (*id, *weight) = slot;
        }
    }
    routes
}
