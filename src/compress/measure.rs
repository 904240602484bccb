//! Second moments, scores and inputs measured while compressing, from a residual stream that advances with the layers.

use super::apply::Observed;
use super::{Inputs, Result};
use crate::backend::{Backend, Moment, MomentDims, Moments};
use crate::calibrate::{Residual, check_finite};
use crate::model::{LayerSource, Model, Observation, Stream};
use crate::tokens::Windows;

/// A residual stream that follows the compression.
pub(super) struct Follower<'a, 'm, B: Backend> {
    model: &'a Model<'m, B>,
    stream: Stream<'m, B>,
    wanted: Wanted,
    /// Whether later layers see the compressed earlier ones.
    propagate: bool,
    /// Tokens that pass a layer, padding included: of an encoder, and of what predicts.
    tokens: [usize; 2],
}

/// What is measured beside the ordinary moments.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    /// Second moments.
    pub(super) second: Vec<Moment>,
    /// Inputs of experts.
    pub(super) inputs: bool,
}

impl Wanted {
    /// Adds what `other` wants.
    pub(super) fn join(&mut self, other: Wanted) {
        self.second.extend(other.second.into_iter().filter(|m| !self.second.contains(m)).collect::<Vec<_>>());
        self.inputs |= other.inputs;
    }
}

/// What was measured of a layer.
pub(super) struct Measurement {
    pub(super) moments: Moments,
    inputs: Option<Inputs>,
}

impl Measurement {
    pub(super) fn observed(&self) -> Observed<'_> {
        Observed { moments: Some(&self.moments), inputs: self.inputs.as_ref() }
    }
}

impl<'a, 'm, B: Backend> Follower<'a, 'm, B> {
    pub(super) fn new(
        model: &'a Model<'m, B>,
        windows: &Windows,
        wanted: Wanted,
        propagate: bool,
    ) -> Result<Self> {
        let tokens = [true, false].map(|in_encoder| windows.of_layer(in_encoder));
        let tokens = tokens.map(|windows| windows.count * windows.length);
        Ok(Follower { model, stream: Stream::new(model, windows)?, wanted, propagate, tokens })
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
    pub(super) fn measure(&mut self, source: &LayerSource) -> Result<Option<Measurement>> {
        let backend = self.model.backend();
        let layer = self.model.prepare(source)?;
        let Some(moe) = source.moe() else {
            self.stream.advance(&layer, |_, _| Ok(()))?;
            return Ok(None);
        };
        let architecture = self.model.architecture();
        let spec = architecture.moe(source.layer);
        let hidden_size = spec.map_or(architecture.hidden_size, |moe| architecture.expert_io(moe));
        let dims = MomentDims {
            experts: moe.experts.len(),
            hidden_size,
            width: spec.map_or(0, |moe| moe.width),
            files: self
                .stream
                .chunks
                .iter()
                .flat_map(|c| &c.batch.files)
                .max()
                .map_or(0, |f| *f as usize + 1),
        };
        let mut observer = backend.observer(dims, &self.wanted.second)?;
        let mut copy = backend.buffer();
        let inputs = self.wanted.inputs.then(|| Inputs::new(Vec::new(), hidden_size));
        let mut inputs = inputs.transpose()?;
        let [encoder, decoder] = self.tokens;
        let tokens = if architecture.in_encoder(source.layer) { encoder } else { decoder };
        let (step, mut passed) = (tokens.div_ceil(Inputs::TOKENS).max(1), 0);
        let Stream { chunks, scratch, .. } = &mut self.stream;
        for chunk in chunks {
            layer.attend(backend, chunk, scratch)?;
            if let Some(inputs) = &mut inputs {
                let rows = layer.feed_input(backend, &chunk.x, scratch)?;
                for row in (0..chunk.batch.tokens()).filter(|&t| chunk.batch.is_real(t)) {
                    if passed % step == 0 {
                        inputs.push(&rows, row);
                    }
                    passed += 1;
                }
            }
            let observe = Some(Observation { observer: &mut observer, sample: &[] });
            if self.propagate {
                backend.copy_rows(&chunk.x, 0, chunk.batch.tokens(), &mut copy)?;
                layer.feed(backend, &mut copy, &chunk.batch, scratch, observe)?;
            } else {
                layer.feed(backend, &mut chunk.x, &chunk.batch, scratch, observe)?;
            }
        }
        let moments = backend.moments(observer)?;
        check_finite(source.layer, &moments)?;
        Ok(Some(Measurement { moments, inputs }))
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
