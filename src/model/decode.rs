//! A model with all layers at hand, and texts that grow token by token.

use super::cache::LayerCache;
use super::{Error, Head, HeadScratch, Layer, LayerSource, Model, Result, Scratch, TOKENS_PER_CHUNK};
use crate::backend::{Backend, Batch};
use crate::progress::Progress;
use crate::tokens;

/// All layers of a model, prepared once. Weights stay where the backend keeps them; on the CPU that is the memory map,
/// and only what is used is read.
pub struct Decoder<'m, B: Backend> {
    model: &'m Model<'m, B>,
    embedding: B::Weight,
    layers: Vec<Layer<B>>,
    head: Head<B>,
}

impl<'m, B: Backend> Decoder<'m, B> {
    /// Prepares every layer for texts of up to the model's length. Shapes and types are checked; whether all weights are
    /// finite is not, for that would read them all: see [`Decoder::check_finite`].
    ///
    /// # Errors
    /// Names the layer and tensor that do not fit; a model with an encoder.
    pub fn new(model: &'m Model<'m, B>, progress: &mut dyn Progress) -> Result<Self> {
        let architecture = model.architecture();
        if architecture.encoder_layers > 0 {
            return Err(Error::HasEncoder { family: architecture.family });
        }
        let embedding = model.backend().weight(&model.embedding()?)?;
        let head = model.head()?;
        progress.begin("load: layer", architecture.layers.len());
        let layers = (0..architecture.layers.len()).map(|l| {
            let layer = model.prepare(&LayerSource::locate(model.checkpoint(), architecture, l)?);
            progress.step("");
            layer
        });
        let layers = layers.collect::<Result<_>>()?;
        progress.end();
        Ok(Decoder { model, embedding, layers, head })
    }

    /// The model.
    pub fn model(&self) -> &'m Model<'m, B> {
        self.model
    }

    /// Reads every weight and errors where one is not finite: what to ask when logits are not.
    ///
    /// # Errors
    /// Names the layer and tensor.
    pub fn check_finite(&self) -> Result<()> {
        let model = self.model;
        (0..self.layers.len()).try_for_each(|l| {
            LayerSource::open(model.checkpoint(), model.architecture(), l).map(|source| source.release())
        })
    }

    /// An empty text.
    pub fn sequence(&self) -> Result<Sequence<'_, B>> {
        let backend = self.model.backend();
        Ok(Sequence {
            decoder: self,
            ids: Vec::new(),
            caches: self.layers.iter().map(|layer| layer.cache(backend)).collect::<Result<_>>()?,
            x: backend.buffer(),
            scratch: Scratch::new(backend),
            head_scratch: HeadScratch::new(backend),
            logits: Vec::new(),
        })
    }
}

/// One text and the caches of all layers. Buffers grow to the largest piece and stay, so that a token allocates nothing
/// but what the caches grow by.
pub struct Sequence<'d, B: Backend> {
    decoder: &'d Decoder<'d, B>,
    ids: Vec<u32>,
    caches: Vec<LayerCache<B>>,
    x: B::Buffer,
    scratch: Scratch<B>,
    head_scratch: HeadScratch<B>,
    logits: Vec<f32>,
}

impl<B: Backend> Sequence<'_, B> {
    /// The tokens so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Appends tokens and returns the logits `[vocabulary]` after the last one.
    ///
    /// # Errors
    /// No tokens, ids outside the vocabulary, or a text longer than the model was made for; the text is then as before.
    pub fn extend(&mut self, ids: &[u32]) -> Result<&[f32]> {
        self.advance(ids, false)?;
        Ok(&self.logits)
    }

    /// Appends tokens and returns the logits `[tokens, vocabulary]` after each of them.
    ///
    /// # Errors
    /// As [`Sequence::extend`].
    pub fn extend_all(&mut self, ids: &[u32]) -> Result<&[f32]> {
        self.advance(ids, true)?;
        Ok(&self.logits)
    }

    fn advance(&mut self, ids: &[u32], all: bool) -> Result<()> {
        let held = self.ids.len();
        self.check(ids)?;
        self.ids.extend_from_slice(ids);
        let total = self.ids.len();
        // With other frequencies the keys so far are rotated wrongly, and everything after them differs too.
        let restart = self.decoder.model.rotation_changes(held, total);
        if restart {
            self.caches.iter_mut().for_each(LayerCache::clear);
        }
        self.logits.clear();
        let first = if restart { 0 } else { held };
        for start in (first..total).step_by(TOKENS_PER_CHUNK) {
            let end = total.min(start + TOKENS_PER_CHUNK);
            self.run(start, end, total)?;
            let wanted = if all { held } else { total - 1 };
            self.append_logits(wanted.max(start)..end, start)?;
        }
        Ok(())
    }

    /// Errors unless `ids` can follow.
    fn check(&self, ids: &[u32]) -> Result<()> {
        let model = self.decoder.model;
        let length = self.ids.len() + ids.len();
        if ids.is_empty() {
            return Err(tokens::Error::NoTokens.into());
        }
        if length > model.length() {
            return Err(tokens::Error::TextTooLong { length, most: model.length() }.into());
        }
        let vocabulary = model.architecture().vocabulary;
        match ids.iter().position(|&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(i) => {
                let (id, position) = (i64::from(ids[i]), self.ids.len() + i);
                Err(tokens::Error::IdOutOfRange { id, window: 0, position, vocabulary }.into())
            }
        }
    }

    /// Advances tokens `start .. end` through all layers.
    fn run(&mut self, start: usize, end: usize, total: usize) -> Result<()> {
        let Decoder { model, embedding, layers, .. } = self.decoder;
        let backend = model.backend();
        let batch = Batch::piece(start, end - start, total);
        backend.embed(embedding, &self.ids[start..end], &mut self.x)?;
        for (layer, cache) in layers.iter().zip(&mut self.caches) {
            layer.extend(backend, &mut self.x, &batch, &mut self.scratch, cache)?;
        }
        Ok(())
    }

    /// Adds the logits after the tokens of `wanted` that the piece beginning at `start` has.
    fn append_logits(&mut self, wanted: std::ops::Range<usize>, start: usize) -> Result<()> {
        let Decoder { model, head, .. } = self.decoder;
        let backend = model.backend();
        for first in wanted.clone().step_by(head.block_rows()) {
            let count = head.block_rows().min(wanted.end - first);
            head.append_logits(
                backend,
                &self.x,
                first - start,
                count,
                &mut self.head_scratch,
                &mut self.logits,
            )?;
        }
        Ok(())
    }
}
