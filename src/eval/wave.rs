//! Windows that pass the model together, and the logits of some of their positions.

use std::sync::Arc;

use super::{Result, Skipping};
use crate::backend::Backend;
use crate::model::{Chunk, Head, HeadScratch, LayerSource, Model, Stream};
use crate::progress::Progress;
use crate::tokens::Windows;

/// Tokens, padding included, that pass the whole model together, roughly: whole windows, at least one. It bounds
/// memory whatever the amount of text (the residual stream of 64 Ki tokens takes 512 MiB at a hidden size of 2048),
/// and every wave reads each weight once. Fixed, so that results do not depend on the machine.
pub const TOKENS_PER_WAVE: usize = 1 << 16;

/// A position that predicts a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Row of the position among all rows of the wave.
    pub(super) row: usize,
    /// The token that follows.
    pub(super) target: u32,
    /// The window or sequence that it belongs to.
    pub(super) owner: usize,
}

/// The residual stream of some windows after the last layer.
pub(super) struct Wave<'m, B: Backend> {
    model: &'m Model<'m, B>,
    chunks: Vec<Chunk<B>>,
    head: Arc<Head<B>>,
    work: HeadScratch<B>,
    picked: B::Buffer,
    /// Rows of the chunk that was downloaded last, `[tokens, hidden]`.
    hidden: Vec<f32>,
    /// Its index, and the row of the wave that it begins with.
    downloaded: Option<(usize, usize)>,
}

impl<'m, B: Backend> Wave<'m, B> {
    /// Runs `parts`, at least one, through all layers. Windows are equally long within a part; the rows of a wave are
    /// those of its parts, one after the other. Layers that skip experts are counted in `skipping`. One step of progress per layer, whose
    /// pages are released after use.
    pub(super) fn run(
        model: &'m Model<'m, B>,
        parts: &[Windows],
        skipping: &mut Skipping,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let (backend, checkpoint) = (model.backend(), model.checkpoint());
        // Rotary tables as long as these windows, whatever length `model` was made for.
        let length = parts.iter().map(Windows::longest).max().unwrap_or(0);
        let sized = Model::new(checkpoint, backend, length)?;
        let mut stream = Stream::new(&sized, &parts[0])?;
        let mut windows = parts[0].count;
        for part in &parts[1..] {
            for mut chunk in Stream::new(&sized, part)?.chunks {
                chunk.first_window += windows;
                stream.chunks.push(chunk);
            }
            windows += part.count;
        }
        for l in 0..sized.architecture().layers.len() {
            let source = LayerSource::open(checkpoint, sized.architecture(), l)?;
            let layer = sized.prepare(&source)?;
            let skips = source.moe().is_some_and(|moe| moe.spec.skip.is_some());
            stream.advance(&layer, |chunk, scratch| {
                if skips {
                    skipping.add(l, &backend.routes(&scratch.routing)?, &chunk.batch);
                }
                Ok(())
            })?;
            drop(layer);
            source.release();
            progress.step("");
        }
        Ok(Wave::behind(model, stream.chunks, Arc::new(model.head()?)))
    }

    /// Chunks that have passed all layers, and the head of `model`.
    pub(super) fn behind(model: &'m Model<'m, B>, chunks: Vec<Chunk<B>>, head: Arc<Head<B>>) -> Self {
        let backend = model.backend();
        Wave {
            model,
            chunks,
            head,
            work: HeadScratch::new(backend),
            picked: backend.buffer(),
            hidden: Vec::new(),
            downloaded: None,
        }
    }

    /// Places whose logits are worth computing at a time.
    pub(super) fn block(&self) -> usize {
        self.head.block_rows()
    }

    /// Logits `[places, vocabulary]` of places in ascending order of rows, on the host. The rows are gathered by way
    /// of the host, so that the head runs on full blocks of them however few of a window's positions are asked for.
    pub(super) fn logits(&mut self, places: &[Place]) -> Result<Vec<f32>> {
        let backend = self.model.backend();
        let hidden_size = self.model.architecture().hidden_size;
        let mut rows = Vec::with_capacity(places.len() * hidden_size);
        for place in places {
            let start = (place.row - self.download(place.row)?) * hidden_size;
            rows.extend_from_slice(&self.hidden[start..start + hidden_size]);
        }
        backend.upload(&rows, places.len(), hidden_size, &mut self.picked)?;
        Ok(self.head.logits(backend, &self.picked, 0, places.len(), &mut self.work)?)
    }

    /// Brings the chunk of `row` to the host, unless it is there, and returns the row that it begins with.
    fn download(&mut self, row: usize) -> Result<usize> {
        let (mut index, mut first) = self.downloaded.filter(|(_, first)| *first <= row).unwrap_or((0, 0));
        while row >= first + self.chunks[index].batch.tokens() {
            first += self.chunks[index].batch.tokens();
            index += 1;
        }
        if self.downloaded != Some((index, first)) {
            self.hidden = self.model.backend().download(&self.chunks[index].x)?;
            self.downloaded = Some((index, first));
        }
        Ok(first)
    }

    /// Ends the wave and lets the operating system drop the pages of the head.
    pub(super) fn end(self) {
        let (model, name) = (self.model, self.head_name());
        drop(self);
        if let Some(table) = model.checkpoint().get(&name) {
            table.release();
        }
    }

    fn head_name(&self) -> String {
        let architecture = self.model.architecture();
        if architecture.tied_embeddings {
            architecture.names.embedding()
        } else {
            architecture.names.head_weight()
        }
    }
}
