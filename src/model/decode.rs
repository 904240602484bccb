//! A model with all layers at hand, and texts that grow token by token.

use super::cache::{CrossCache, LayerCache};
use super::{Error, Head, HeadScratch, Layer, LayerSource, Model, Result, Scratch, TOKENS_PER_CHUNK};
use crate::backend::{Backend, Batch};
use crate::progress::Progress;
use crate::tokens;

/// All layers of a model, prepared once. Weights stay where the backend keeps them; on the CPU that is the memory map,
/// and only what is used is read.
pub struct Decoder<'m, B: Backend> {
    model: &'m Model<'m, B>,
    embedding: B::Weight,
    /// Of an encoder, where there is one.
    encoder_embedding: Option<B::Weight>,
    /// Those of the encoder first.
    layers: Vec<Layer<B>>,
    head: Head<B>,
}

impl<'m, B: Backend> Decoder<'m, B> {
    /// Prepares every layer for texts of up to the model's length. Shapes and types are checked, and whether routers and
    /// vectors are finite; whether all weights are is not, for that would read them all: see [`Decoder::check_finite`].
    ///
    /// # Errors
    /// Names the layer and tensor that do not fit or are not finite.
    pub fn new(model: &'m Model<'m, B>, progress: &mut dyn Progress) -> Result<Self> {
        let architecture = model.architecture();
        let has_encoder = architecture.encoder_layers > 0;
        let stored = if has_encoder { model.own_embedding(false)? } else { model.embedding()? };
        let embedding = model.backend().weight(&stored)?;
        let own = has_encoder.then(|| model.own_embedding(true)).transpose()?;
        let encoder_embedding = own.map(|stored| model.backend().weight(&stored)).transpose()?;
        let head = model.head()?;
        progress.begin("load: layer", architecture.layers.len());
        let layers = (0..architecture.layers.len()).map(|l| {
            let source = LayerSource::locate(model.checkpoint(), architecture, l)?;
            source.check_vectors(model.checkpoint())?;
            let layer = model.prepare(&source);
            progress.step("");
            layer
        });
        let layers = layers.collect::<Result<_>>()?;
        progress.end();
        Ok(Decoder { model, embedding, encoder_embedding, layers, head })
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
    ///
    /// # Errors
    /// A model with an encoder: see [`Decoder::sequence_behind`].
    pub fn sequence(&self) -> Result<Sequence<'_, B>> {
        let architecture = self.model.architecture();
        if architecture.encoder_layers > 0 {
            return Err(Error::Encoder { family: architecture.family, has: true });
        }
        self.empty(Vec::new())
    }

    /// An empty text behind an encoder that has read `source`. Its first token is to be the decoder's start token.
    ///
    /// # Errors
    /// A model without an encoder; no tokens, or ids outside the vocabulary.
    pub fn sequence_behind(&self, source: &[u32]) -> Result<Sequence<'_, B>> {
        let architecture = self.model.architecture();
        let Some(embedding) = &self.encoder_embedding else {
            return Err(Error::Encoder { family: architecture.family, has: false });
        };
        if source.is_empty() {
            return Err(tokens::Error::NoTokens.into());
        }
        check_ids(source, 0, architecture.vocabulary)?;
        let (encoder, decoder) = self.layers.split_at(architecture.encoder_layers);
        let backend = self.model.backend();
        let (mut x, mut memory, mut scratch) = (backend.buffer(), backend.buffer(), Scratch::new(backend));
        let batch = Batch::piece(0, source.len(), source.len());
        self.model.embed(embedding, source, &mut x)?;
        for layer in encoder {
            layer.attend_with(backend, &mut x, &batch, &mut scratch, None)?;
            layer.feed(backend, &mut x, &batch, &mut scratch, None)?;
        }
        if let Some(layer) = decoder.first() {
            layer.finish_encoder(backend, &x, &mut memory)?;
        }
        let caches = decoder.iter().map(|layer| layer.cross_cache(backend, &memory, source.len()));
        self.empty(caches.collect::<Result<_>>()?)
    }

    fn empty(&self, cross: Vec<Option<CrossCache<B>>>) -> Result<Sequence<'_, B>> {
        let backend = self.model.backend();
        Ok(Sequence {
            decoder: self,
            ids: Vec::new(),
            caches: self.own_layers().iter().map(|layer| layer.cache(backend)).collect::<Result<_>>()?,
            cross,
            x: backend.buffer(),
            scratch: Scratch::new(backend),
            head_scratch: HeadScratch::new(backend),
            logits: Vec::new(),
        })
    }

    /// The layers that texts pass: those of the decoder.
    fn own_layers(&self) -> &[Layer<B>] {
        &self.layers[self.model.architecture().encoder_layers..]
    }
}

/// Errors at the first of `ids`, which stand from position `start` on, that is outside the vocabulary.
fn check_ids(ids: &[u32], start: usize, vocabulary: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(i) => {
            let (id, position) = (i64::from(ids[i]), start + i);
            Err(tokens::Error::IdOutOfRange { id, window: 0, position, vocabulary }.into())
        }
    }
}

/// One text and the caches of all layers. Buffers grow to the largest piece and stay, so that a token allocates nothing
/// but what the caches grow by.
pub struct Sequence<'d, B: Backend> {
    decoder: &'d Decoder<'d, B>,
    ids: Vec<u32>,
    caches: Vec<LayerCache<B>>,
    /// Behind an encoder, one for each layer.
    cross: Vec<Option<CrossCache<B>>>,
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
        check_ids(ids, self.ids.len(), model.architecture().vocabulary)
    }

    /// Advances tokens `start .. end` through all layers.
    fn run(&mut self, start: usize, end: usize, total: usize) -> Result<()> {
        let Decoder { model, embedding, .. } = self.decoder;
        let backend = model.backend();
        let batch = Batch::piece(start, end - start, total);
        model.embed(embedding, &self.ids[start..end], &mut self.x)?;
        let cross = self.cross.iter().map(Option::as_ref).chain(std::iter::repeat(None));
        for ((layer, cache), cross) in self.decoder.own_layers().iter().zip(&mut self.caches).zip(cross) {
            layer.extend(backend, &mut self.x, &batch, &mut self.scratch, cache, cross)?;
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
