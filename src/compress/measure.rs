//! Second moments and scores measured while compressing, from a residual stream that advances with the layers.

use super::Result;
use crate::backend::{Backend, Moment, MomentDims, Moments};
use crate::calibrate::Residual;
use crate::model::{LayerSource, Model, Observation, Stream};
use crate::tokens::Windows;

/// A residual stream that follows the compression.
pub(super) struct Follower<'a, 'm, B: Backend> {
    model: &'a Model<'m, B>,
    stream: Stream<'m, B>,
    second: Vec<Moment>,
    /// Whether later layers see the compressed earlier ones.
    propagate: bool,
}

impl<'a, 'm, B: Backend> Follower<'a, 'm, B> {
    pub(super) fn new(
        model: &'a Model<'m, B>,
        windows: &Windows,
        second: Vec<Moment>,
        propagate: bool,
    ) -> Result<Self> {
        Ok(Follower { model, stream: Stream::new(model, windows)?, second, propagate })
    }

    /// Puts the stream where the last run left it; returns the number of finished layers.
    pub(super) fn restore(&mut self, work: &Residual) -> Result<usize> {
        let architecture = self.model.architecture();
        let (hidden, encoder) = (architecture.hidden_size, architecture.encoder_layers);
        Ok(work.restore(self.model.backend(), &mut self.stream, hidden, encoder)?)
    }

    /// Records that `done` layers are finished.
    pub(super) fn save(&self, work: &Residual, done: usize) -> Result<()> {
        Ok(work.save(self.model.backend(), &self.stream, done)?)
    }

    /// Measures the original layer on the stream. Unless the stream propagates, it then stands behind the layer;
    /// otherwise it stands between the layer's attention and its experts, and [`Follower::leave`] has to follow.
    pub(super) fn measure(&mut self, source: &LayerSource) -> Result<Option<Moments>> {
        let backend = self.model.backend();
        let layer = self.model.prepare(source)?;
        let Some(moe) = source.moe() else {
            self.stream.advance(&layer, |_, _| Ok(()))?;
            return Ok(None);
        };
        let architecture = self.model.architecture();
        let dims = MomentDims {
            experts: moe.experts.len(),
            hidden_size: architecture.hidden_size,
            width: architecture.moe(source.layer).map_or(0, |m| m.width),
            files: self
                .stream
                .chunks
                .iter()
                .flat_map(|c| &c.batch.files)
                .max()
                .map_or(0, |f| *f as usize + 1),
        };
        let mut observer = backend.observer(dims, &self.second)?;
        let mut copy = backend.buffer();
        let Stream { chunks, scratch, .. } = &mut self.stream;
        for chunk in chunks {
            layer.attend(backend, chunk, scratch)?;
            let observe = Some(Observation { observer: &mut observer, sample: &[] });
            if self.propagate {
                backend.copy_rows(&chunk.x, 0, chunk.batch.tokens(), &mut copy)?;
                layer.feed(backend, &mut copy, &chunk.batch, scratch, observe)?;
            } else {
                layer.feed(backend, &mut chunk.x, &chunk.batch, scratch, observe)?;
            }
        }
        Ok(Some(backend.moments(observer)?))
    }

    /// Passes the compressed experts of a layer, where the stream propagates.
    pub(super) fn leave(&mut self, compressed: &LayerSource) -> Result<()> {
        if !self.propagate || compressed.moe().is_none() {
            return Ok(());
        }
        let layer = self.model.prepare(compressed)?;
        let Stream { chunks, scratch, .. } = &mut self.stream;
        for chunk in chunks {
            layer.feed(self.model.backend(), &mut chunk.x, &chunk.batch, scratch, None)?;
        }
        Ok(())
    }
}
