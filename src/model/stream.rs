//! Streaming: the residual stream of all tokens advances a layer at a time, so that memory holds one layer of weights
//! whatever the depth of the model, and every weight is read once.

use super::{Layer, Model, Observation, Result, Scratch};
use crate::backend::{Backend, Batch};
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
    /// Residual stream, `[tokens, hidden]`.
    pub x: B::Buffer,
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
    /// Ids outside the vocabulary, windows longer than the model's positions, a missing embedding.
    pub fn new(model: &Model<'m, B>, windows: &Windows) -> Result<Self> {
        let architecture = model.architecture();
        windows.check(architecture.vocabulary, architecture.max_positions)?;
        let backend = model.backend();
        let stored = model.embedding()?;
        let table = backend.weight(&stored)?;
        let chunks = batches(windows).into_iter().map(|(first_window, batch)| {
            let start = first_window * windows.length;
            let mut x = backend.buffer();
            backend.embed(&table, &windows.ids[start..start + batch.tokens()], &mut x)?;
            Ok(Chunk { first_window, batch, x })
        });
        let chunks = chunks.collect::<Result<_>>()?;
        stored.release();
        Ok(Stream { backend, chunks, scratch: Scratch::new(backend) })
    }

    /// Advances every chunk by `layer`; `after` sees each chunk and the scratch buffers with its routing.
    pub fn advance(
        &mut self,
        layer: &Layer<B>,
        mut after: impl FnMut(&Chunk<B>, &Scratch<B>) -> Result<()>,
    ) -> Result<()> {
        for chunk in &mut self.chunks {
            layer.forward(self.backend, &mut chunk.x, &chunk.batch, &mut self.scratch, None)?;
            after(chunk, &self.scratch)?;
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
            let rows = sample(chunk);
            let observation = Observation { observer: &mut *observer, sample: &rows };
            layer.forward(self.backend, &mut chunk.x, &chunk.batch, &mut self.scratch, Some(observation))?;
        }
        Ok(())
    }
}

/// Cuts windows into chunks of about [`TOKENS_PER_CHUNK`] tokens.
fn batches(windows: &Windows) -> Vec<(usize, Batch)> {
    let per_chunk = (TOKENS_PER_CHUNK / windows.length.max(1)).max(1);
    let files = windows.file_of_windows();
    let starts = (0..windows.count).step_by(per_chunk);
    starts
        .map(|first| {
            let count = per_chunk.min(windows.count - first);
            let tokens = first * windows.length..(first + count) * windows.length;
            let batch = Batch {
                windows: count,
                length: windows.length,
                mask: windows.mask.as_ref().map(|m| m[tokens].to_vec()),
                files: files[first..first + count].to_vec(),
                start: 0,
                text_length: windows.length,
            };
            (first, batch)
        })
        .collect()
}
