//! The forward pass, written once: a checkpoint and its architecture, run on any [`Backend`], a layer at a time.

mod attention;
mod cache;
mod decode;
mod error;
mod feed_forward;
mod find;
mod find_experts;
mod find_fused;
mod find_mamba;
mod inspect;
mod layer;
mod mamba;
mod profile;
mod recurrent;
mod run;
mod source;
mod stream;

pub use cache::{CrossCache, LayerCache};
pub use decode::{Decoder, Sequence};
pub use error::Error;
pub use inspect::{
    AttentionSummary, ByteCounts, Inspection, MoeSummary, ParameterCounts, RouterSummary, StateSummary,
    inspect,
};
pub use layer::{Dissected, Layer, Observation, Scratch};
pub use profile::profile;
pub use run::{RunSize, run};
pub use source::{
    AttentionSource, DeltaInput, FeedForwardSource, LayerSource, LinearSource, MoeSource, NormSource,
    PartNorms,
};
pub use stream::{Chunk, Memory, Stream, TOKENS_PER_CHUNK};

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::architecture::{Architecture, Names, NormKind, Rope};
use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, Dtype, Tensor, Weight};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// A checkpoint that can be run on `backend`. Layers are loaded one by one with [`Model::layer`].
pub struct Model<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    architecture: Architecture,
    backend: &'a B,
    length: usize,
    rotations: Mutex<Rotations<B>>,
}

/// The rotary embeddings that layers have asked for; most models have one or two.
type Rotations<B> = Vec<(Rope, Arc<<B as Backend>::Rotation>)>;

impl<'a, B: Backend> Model<'a, B> {
    /// A model for windows of up to `length` tokens.
    ///
    /// # Errors
    /// What is wrong with the config, or a `length` beyond the model's positions.
    pub fn new(checkpoint: &'a Checkpoint, backend: &'a B, length: usize) -> Result<Self> {
        let architecture = open_architecture(checkpoint)?;
        let max_positions = architecture.max_positions;
        if length > max_positions {
            return Err(crate::tokens::Error::TooLong { length, max_positions }.into());
        }
        Ok(Model { checkpoint, architecture, backend, length, rotations: Mutex::default() })
    }

    /// The architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The backend.
    pub fn backend(&self) -> &'a B {
        self.backend
    }

    /// Most tokens of a window or text.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Loads and prepares layer `l`.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen or not finite.
    pub fn layer(&self, l: usize) -> Result<Layer<B>> {
        let source = LayerSource::open(self.checkpoint, &self.architecture, l)?;
        self.prepare(&source)
    }

    /// Prepares a layer whose tensors are at hand, such as one with compressed experts.
    pub fn prepare(&self, source: &LayerSource) -> Result<Layer<B>> {
        let rope = self.architecture.layers[source.layer].attention.rope();
        let rotation = rope.map(|rope| self.rotation(rope)).transpose()?;
        Layer::prepare(self.backend, &self.architecture, source, rotation)
    }

    /// The prepared rotary embedding, shared by all layers that have it.
    fn rotation(&self, rope: &Rope) -> Result<Arc<B::Rotation>> {
        let mut rotations = self.rotations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rotation)) = rotations.iter().find(|(known, _)| known == rope) {
            return Ok(rotation.clone());
        }
        let rotation = Arc::new(self.backend.rotation(rope, self.length)?);
        rotations.push((rope.clone(), rotation.clone()));
        Ok(rotation)
    }

    /// Whether a text of `total` tokens rotates its first `held` otherwise than a text of `held` tokens does.
    fn rotation_changes(&self, held: usize, total: usize) -> bool {
        let mut ropes = self.architecture.layers.iter().filter_map(|layer| layer.attention.rope());
        ropes.any(|rope| {
            rope.long.as_ref().is_some_and(|l| held > 0 && held <= l.positions && l.positions < total)
        })
    }

    /// Whether all layers rotate texts of `a` and of `b` tokens by the same frequencies.
    pub(crate) fn rotates_alike(&self, a: usize, b: usize) -> bool {
        let mut ropes = self.architecture.layers.iter().filter_map(|layer| layer.attention.rope());
        ropes.all(|rope| rope.is_same_for(a, b))
    }

    /// The embedding table `[vocabulary, hidden]`.
    pub fn embedding(&self) -> Result<Weight> {
        self.table(&self.architecture.names.embedding())
    }

    /// The embedding table of the encoder, or of the decoder behind one. Where embeddings are not tied, transformers 5
    /// lets each have its own; older checkpoints hold copies of the shared one.
    pub fn own_embedding(&self, of_encoder: bool) -> Result<Weight> {
        let name = self.architecture.names.own_embedding(of_encoder);
        let has_own = !self.architecture.tied_embeddings && self.checkpoint.get(&name).is_some();
        if has_own { self.table(&name) } else { self.embedding() }
    }

    /// The residual stream of the tokens `ids` before the first layer, into `out`.
    pub(super) fn embed(&self, table: &B::Weight, ids: &[u32], out: &mut B::Buffer) -> Result<()> {
        self.backend.embed(table, ids, out)?;
        match self.architecture.embedding_scale {
            1.0 => Ok(()),
            scale => Ok(self.backend.scale(out, scale)?),
        }
    }

    /// The output head: final norm and projection.
    pub fn head(&self) -> Result<Head<B>> {
        // After the last layer, as before every other one.
        self.checkpoint.check_unchanged()?;
        let Architecture { hidden_size, vocabulary, norm: kind, head_bias, ref names, .. } =
            self.architecture;
        let tensor = |name: &str, length: usize| {
            let found = self.checkpoint.tensor(name).and_then(|tensor| {
                tensor.check_shape(&[length])?;
                tensor.check_float()?;
                tensor.check_finite()?;
                Ok(tensor)
            });
            found.map_err(|e| Error::from(e).of(self.checkpoint))
        };
        let vector = |name: &str, length: usize| Ok::<_, Error>(self.backend.vector(&tensor(name, length)?)?);
        let norm = names.final_norm();
        let norm_bias = match kind {
            NormKind::Rms => None,
            NormKind::Layer { bias: true } => Some(vector(&format!("{norm}.bias"), hidden_size)?),
            NormKind::Layer { bias: false } => Some(self.backend.vector(&find::no_bias(hidden_size))?),
        };
        // A factor of the head's input is one of the norm's weight.
        let weight = tensor(&format!("{norm}.weight"), hidden_size)?;
        let weight = layer::norm_weight(&weight, self.architecture.zero_centred_norms)?;
        let weight = match self.architecture.head_scale {
            1.0 => weight,
            scale => {
                let scaled: Vec<f32> = weight.to_f32()?.into_iter().map(|w| w * scale).collect();
                Tensor::from_f32("", Dtype::F32, vec![hidden_size], &scaled)
            }
        };
        Ok(Head {
            norm: self.backend.vector(&weight)?,
            norm_bias,
            eps: self.architecture.norm_eps,
            weight: self.backend.weight(&self.table(&self.architecture.head_table())?)?,
            bias: head_bias.then(|| vector(&names.head_bias(), vocabulary)).transpose()?,
            cap: self.architecture.logit_cap,
            vocabulary,
        })
    }

    fn table(&self, name: &str) -> Result<Weight> {
        let found = self.checkpoint.tensor(name).and_then(|table| {
            table.check_shape(&[self.architecture.vocabulary, self.architecture.hidden_size])?;
            let table = Weight::plain(table)?;
            table.check_finite()?;
            Ok(table)
        });
        found.map_err(|e| Error::from(e).of(self.checkpoint))
    }
}

/// Reads the architecture of a checkpoint and checks that its layout file, if any, fits.
///
/// # Errors
/// Names the file and key.
pub fn open_architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let dir = checkpoint.dir().to_path_buf();
    let mut architecture = Architecture::from_config(checkpoint.config())
        .map_err(|source| Error::Architecture { dir: dir.clone(), source })?;
    let names = &architecture.names;
    let within = names.other_model.map(|[model, head]| Names { model, head, ..names.clone() });
    if let Some(other) = within.or_else(|| Some(names.rewritten?()))
        && checkpoint.get(&names.embedding()).is_none()
        && checkpoint.get(&other.embedding()).is_some()
    {
        architecture.names = other;
    }
    if architecture.tied_embeddings && architecture.encoder_layers == 0 {
        architecture.tied_embeddings = !has_own_head(checkpoint, &architecture);
    }
    for entry in checkpoint.manifest().iter().flat_map(|m| &m.layers) {
        let l = entry.layer;
        let Some(moe) = architecture.moe(l) else {
            let what = format!("layer {l} is listed, but config.json gives it no experts");
            return Err(Error::Layout { dir, what });
        };
        if let Some(e) = entry.experts.iter().map(|e| e.expert).find(|e| *e >= moe.experts) {
            let what = format!(
                "layer {l}: expert {e} is listed, but config.json has experts 0 to {}",
                moe.experts - 1
            );
            return Err(Error::Layout { dir, what });
        }
    }
    Ok(architecture)
}

/// Whether a checkpoint whose config ties the head to the embedding has another head all the same; transformers then
/// takes that one.
fn has_own_head(checkpoint: &Checkpoint, architecture: &Architecture) -> bool {
    let head = checkpoint.get(&architecture.names.head_weight());
    let embedding = checkpoint.get(&architecture.names.embedding());
    let (Some(head), Some(embedding)) = (head, embedding) else { return false };
    let differs = head.dtype() != embedding.dtype() || head.bytes() != embedding.bytes();
    head.release();
    embedding.release();
    differs
}

/// Final norm and output projection.
pub struct Head<B: Backend> {
    norm: B::Vector,
    norm_bias: Option<B::Vector>,
    eps: f32,
    weight: B::Weight,
    bias: Option<B::Vector>,
    /// Bound of the logits.
    cap: Option<f32>,
    vocabulary: usize,
}

impl<B: Backend> Head<B> {
    /// Values in a block of logits: 64 MiB of f32.
    const BLOCK: usize = 1 << 24;

    /// Rows of logits that are worth computing at a time.
    pub fn block_rows(&self) -> usize {
        (Head::<B>::BLOCK / self.vocabulary.max(1)).clamp(16, 1024)
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Logits `[count, vocabulary]` of `count` rows of the residual stream `x`, from row `start` on, on the host.
    pub fn logits(
        &self,
        backend: &B,
        x: &B::Buffer,
        start: usize,
        count: usize,
        work: &mut HeadScratch<B>,
    ) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.append_logits(backend, x, start, count, work, &mut logits)?;
        Ok(logits)
    }

    /// As [`Head::logits`], appended to `logits`.
    pub fn append_logits(
        &self,
        backend: &B,
        x: &B::Buffer,
        start: usize,
        count: usize,
        work: &mut HeadScratch<B>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        backend.copy_rows(x, start, count, &mut work.rows)?;
        let Head { norm, norm_bias, eps, weight, bias, cap, .. } = self;
        backend.norm(&work.rows, norm, norm_bias.as_ref(), *eps, &mut work.normed)?;
        backend.linear(&work.normed, weight, bias.as_ref(), &mut work.logits)?;
        let first = logits.len();
        backend.download_to(&work.logits, logits)?;
        if let Some(cap) = *cap {
            logits[first..].par_iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(())
    }
}

/// Buffers of [`Head::logits`].
pub struct HeadScratch<B: Backend> {
    rows: B::Buffer,
    normed: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> HeadScratch<B> {
    /// Empty buffers.
    pub fn new(backend: &B) -> Self {
        HeadScratch { rows: backend.buffer(), normed: backend.buffer(), logits: backend.buffer() }
    }
}
