//! Streaming: the residual stream of all tokens advances a layer at a time, so that memory holds one layer of weights
//! whatever the depth of the model, and every weight is read once.

use super::{Layer, Model, Observation, Result, Scratch};
use crate::backend::{Backend, Batch, Result as BackendResult};
use crate::checkpoint::Weight;
use crate::tokens::Windows;

/// Tokens that pass a layer together, roughly: whole windows, at least one. Fixed, so that sums over chunks and
/// therefore results do not depend on the machine.
pub const TOKENS_PER_CHUNK: usize = 2048;

/// Some consecutive windows and their residual stream.
pub struct Chunk<B: Backend> {
    /// Index of the first window.
    pub first_window: usize,
    /// Shape, padding and origin.
    pub batch: Batch,
    /// Residual stream, `[tokens, hidden]`; of the encoder, where there is one, and then of the decoder.
    pub x: B::Buffer,
    /// The encoder's output, once the decoder has begun.
    pub memory: Option<Memory<B>>,
    /// The decoder's tokens, embedded, until it begins.
    decoder: Option<(B::Buffer, Batch)>,
}

/// What a decoder sees of its encoder.
pub struct Memory<B: Backend> {
    /// Output, `[tokens, hidden]`.
    pub x: B::Buffer,
    /// Shape and padding.
    pub batch: Batch,
}

impl<B: Backend> Chunk<B> {
    /// Whether the decoder is still to begin.
    pub(super) fn is_in_encoder(&self) -> bool {
        self.decoder.is_some()
    }

    /// Makes `memory` the encoder's output, and the decoder's tokens the residual stream.
    pub fn begin_decoder(&mut self, memory: B::Buffer) {
        if let Some((x, batch)) = self.decoder.take() {
            let batch = std::mem::replace(&mut self.batch, batch);
            self.memory = Some(Memory { x: memory, batch });
            self.x = x;
        }
    }
}

/// The residual stream of a set of windows, between two layers.
pub struct Stream<'m, B: Backend> {
    backend: &'m B,
    /// The windows, in order.
    pub chunks: Vec<Chunk<B>>,
    /// Buffers of the layers.
    pub scratch: Scratch<B>,
}

impl<'m, B: Backend> Stream<'m, B> {
    /// Embeds `windows`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, windows longer than the model's positions or than it was prepared for, a missing
    /// embedding.
    pub fn new(model: &Model<'m, B>, windows: &Windows) -> Result<Self> {
        let architecture = model.architecture();
        windows.check(architecture.vocabulary, architecture.max_positions)?;
        if windows.longest() > model.length() {
            let (length, most) = (windows.longest(), model.length());
            return Err(crate::tokens::Error::TextTooLong { length, most }.into());
        }
        windows.check_decoder(architecture.family, architecture.encoder_layers > 0)?;
        let backend = model.backend();
        let stored = match &windows.decoder {
            None => vec![model.embedding()?],
            Some(_) => vec![model.own_embedding(true)?, model.own_embedding(false)?],
        };
        let tables = stored.iter().map(|table| backend.weight(table)).collect::<BackendResult<Vec<_>>>()?;
        let embed = |table: &B::Weight, windows: &Windows, first: usize, count: usize| -> Result<_> {
            let batch = batch(windows, first, count);
            let start = first * windows.length;
            let mut x = backend.buffer();
            model.embed(table, &windows.ids[start..start + batch.tokens()], &mut x)?;
            Ok((x, batch))
        };
        let longest = windows.length.max(windows.decoder.as_ref().map_or(1, |d| d.length));
        let per_chunk = (TOKENS_PER_CHUNK / longest).max(1);
        let chunks = (0..windows.count).step_by(per_chunk).map(|first_window| {
            let count = per_chunk.min(windows.count - first_window);
            let (x, batch) = embed(&tables[0], windows, first_window, count)?;
            let decoder =
                windows.decoder.as_ref().map(|d| embed(&tables[1], d, first_window, count)).transpose()?;
            Ok(Chunk { first_window, batch, x, memory: None, decoder })
        });
        let chunks = chunks.collect::<Result<_>>()?;
        stored.iter().for_each(Weight::release);
        Ok(Stream { backend, chunks, scratch: Scratch::new(backend) })
    }

    /// Advances every chunk by `layer`; `after` sees each chunk and the scratch buffers with its routing.
    pub fn advance(
        &mut self,
        layer: &Layer<B>,
        mut after: impl FnMut(&Chunk<B>, &Scratch<B>) -> Result<()>,
    ) -> Result<()> {
        for chunk in &mut self.chunks {
            layer.forward(self.backend, chunk, &mut self.scratch, None)?;
            after(chunk, &self.scratch)?;
        }
        Ok(())
    }

    /// Advances every chunk by `layer`; with `router` in place of the layer's own, where it is given.
    pub fn advance_with(&mut self, layer: &Layer<B>, router: Option<&B::Router>) -> Result<()> {
        let Some(router) = router else { return self.advance(layer, |_, _| Ok(())) };
        for chunk in &mut self.chunks {
            layer.attend(self.backend, chunk, &mut self.scratch)?;
            layer.feed_with(self.backend, &mut chunk.x, &chunk.batch, &mut self.scratch, router)?;
        }
        Ok(())
    }

    /// Advances every chunk by `layer` and measures on the way; `sample` lists the rows of a chunk on which every
    /// expert is run.
    pub fn observe(
        &mut self,
        layer: &Layer<B>,
        observer: &mut B::Observer,
        mut sample: impl FnMut(&Chunk<B>) -> Vec<usize>,
    ) -> Result<()> {
        for chunk in &mut self.chunks {
            layer.enter(self.backend, chunk)?;
            let rows = sample(chunk);
            let observation = Observation { observer: &mut *observer, sample: &rows };
            layer.forward(self.backend, chunk, &mut self.scratch, Some(observation))?;
        }
        Ok(())
    }
}

/// Windows `first .. first + count` as a batch.
fn batch(windows: &Windows, first: usize, count: usize) -> Batch {
    let tokens = first * windows.length..(first + count) * windows.length;
    Batch {
        windows: count,
        length: windows.length,
        mask: windows.mask.as_ref().map(|m| m[tokens].to_vec()),
        files: windows.file_of_windows()[first..first + count].to_vec(),
        start: 0,
        text_length: windows.length,
    }
}
