//! One layer: x += attention(norm(x)); x += feed_forward(norm(x)); in some families with norms behind attention and
//! feed-forward part instead, or as well, or with a factor of the result, or with halves that read the same; behind an
//! encoder, with an attention to its output between the two; in some families one of the halves alone.
//!
//! Where the halves read the same, x is twice as wide between them: the residual stream as the attention saw it, and what
//! the attention adds.

use std::sync::Arc;

use super::Result;
use super::attention::Attention;
use super::cache::{CrossCache, LayerCache};
use super::feed_forward::FeedForward;
use super::source::{LayerSource, LinearSource, MoeSource, NormSource};
use super::stream::{Chunk, Memory};
use crate::architecture::{Architecture, NormPlacement};
use crate::backend::{Backend, Batch, Error as BackendError, HeadLayout, Result as BackendResult, Routes};
use crate::checkpoint::{Dtype, Tensor};

/// A layer prepared for a backend.
pub struct Layer<B: Backend> {
    input_norm: Option<Norm<B>>,
    attention_output_norm: Option<Norm<B>>,
    post_attention_norm: Option<Norm<B>>,
    feed_forward_output_norm: Option<Norm<B>>,
    eps: f32,
    /// Width of the residual stream, where the halves read the same.
    parallel: Option<usize>,
    /// Factor of what the halves add.
    residual_scale: f32,
    /// Factor of the residual stream in the end.
    scale: Option<f32>,
    attention: Attention<B>,
    /// To the encoder's output, with the norm before it.
    cross: Option<(Norm<B>, Attention<B>)>,
    /// Behind the encoder, in the first layer of a decoder.
    encoder_norm: Option<Norm<B>>,
    pub(super) feed_forward: FeedForward<B>,
}

/// A norm: RMS, or with a bias a layer norm.
pub(super) struct Norm<B: Backend> {
    weight: B::Vector,
    bias: Option<B::Vector>,
}

/// A linear map with an optional bias.
pub(super) struct Linear<B: Backend> {
    pub(super) weight: B::Weight,
    bias: Option<B::Vector>,
}

/// Buffers that all layers share; they grow to the largest batch and stay.
pub struct Scratch<B: Backend> {
    pub(super) normed: B::Buffer,
    /// Inputs of router and shared expert, where these are not `normed`.
    pub(super) router_input: B::Buffer,
    pub(super) shared_input: B::Buffer,
    /// What routed experts read and write, where that is a latent.
    pub(super) latent: [B::Buffer; 2],
    pub(super) query: B::Buffer,
    pub(super) key: B::Buffer,
    pub(super) value: B::Buffer,
    pub(super) attended: B::Buffer,
    pub(super) out: B::Buffer,
    pub(super) shared: B::Buffer,
    pub(super) gate: B::Buffer,
    pub(super) up: B::Buffer,
    pub(super) scalar: B::Buffer,
    halves: B::Buffer,
    /// Routing of the last MoE layer that ran.
    pub routing: B::Routing,
}

impl<B: Backend> Scratch<B> {
    /// Empty buffers.
    pub fn new(backend: &B) -> Self {
        let buffer = || backend.buffer();
        Scratch {
            normed: buffer(),
            router_input: buffer(),
            shared_input: buffer(),
            latent: [buffer(), buffer()],
            query: buffer(),
            key: buffer(),
            value: buffer(),
            attended: buffer(),
            out: buffer(),
            shared: buffer(),
            gate: buffer(),
            up: buffer(),
            scalar: buffer(),
            halves: buffer(),
            routing: backend.routing(),
        }
    }
}

/// What to measure while a layer runs.
pub struct Observation<'a, B: Backend> {
    /// Where the sums go.
    pub observer: &'a mut B::Observer,
    /// Rows of the batch on which every expert is run.
    pub sample: &'a [usize],
}

/// The feed-forward half of a layer with experts, see [`Layer::dissect`].
#[derive(Clone, Debug)]
pub struct Dissected {
    /// Input of all routed experts, `[tokens, hidden]`, or where they work on a latent `[tokens, latent]`.
    pub input: Vec<f32>,
    /// What the router decided.
    pub routes: Routes,
    /// Sum of the chosen experts' weighted outputs, behind the map out of a latent, `[tokens, hidden]`.
    pub routed: Vec<f32>,
    /// Output of the shared expert, `[tokens, hidden]`, where there is one that is added to that sum as it is.
    pub shared: Option<Vec<f32>>,
}

impl<B: Backend> Linear<B> {
    pub(super) fn prepare(backend: &B, source: &LinearSource) -> BackendResult<Self> {
        let bias = source.bias.as_ref().map(|b| backend.vector(b)).transpose()?;
        Ok(Linear { weight: backend.weight(&source.weight)?, bias })
    }

    pub(super) fn apply(&self, backend: &B, x: &B::Buffer, out: &mut B::Buffer) -> BackendResult<()> {
        backend.linear(x, &self.weight, self.bias.as_ref(), out)
    }
}

/// What a norm multiplies by: its stored weight, or 1 + that.
pub(super) fn norm_weight(stored: &Tensor, zero_centred: bool) -> BackendResult<Tensor> {
    if !zero_centred {
        return Ok(stored.clone());
    }
    let weight: Vec<f32> = stored.to_f32()?.into_iter().map(|w| 1.0 + w).collect();
    Ok(Tensor::from_f32("", Dtype::F32, stored.shape().to_vec(), &weight))
}

impl<B: Backend> Norm<B> {
    fn prepare(backend: &B, source: &NormSource, zero_centred: bool) -> BackendResult<Self> {
        let bias = source.bias.as_ref().map(|b| backend.vector(b)).transpose()?;
        Ok(Norm { weight: backend.vector(&norm_weight(&source.weight, zero_centred)?)?, bias })
    }

    pub(super) fn apply(
        &self,
        backend: &B,
        x: &B::Buffer,
        eps: f32,
        out: &mut B::Buffer,
    ) -> BackendResult<()> {
        backend.norm(x, &self.weight, self.bias.as_ref(), eps, out)
    }
}

impl<B: Backend> Layer<B> {
    /// Prepares a layer; its positions are rotated by `rotation`.
    pub(super) fn prepare(
        backend: &B,
        architecture: &Architecture,
        source: &LayerSource,
        rotation: Option<Arc<B::Rotation>>,
    ) -> Result<Self> {
        let spec = &architecture.layers[source.layer].attention;
        let centred = architecture.zero_centred_norms;
        let norm = |source: &NormSource| Norm::prepare(backend, source, centred);
        let norm_where = |source: &Option<NormSource>| source.as_ref().map(norm).transpose();
        let is_parallel = architecture.norm_placement == NormPlacement::BeforeBoth;
        let before_feed_forward = if is_parallel { &source.input_norm } else { &source.post_attention_norm };
        Ok(Layer {
            input_norm: norm_where(&source.input_norm)?,
            attention_output_norm: norm_where(&source.attention_output_norm)?,
            post_attention_norm: norm_where(before_feed_forward)?,
            feed_forward_output_norm: norm_where(&source.feed_forward_output_norm)?,
            eps: architecture.norm_eps,
            parallel: is_parallel.then_some(architecture.hidden_size),
            residual_scale: architecture.residual_scale,
            scale: match &source.scale {
                None => None,
                Some(stored) => stored.to_f32().map_err(BackendError::from)?.first().copied(),
            },
            attention: Attention::prepare(backend, spec, &source.attention, rotation, centred)?,
            cross: match &source.cross {
                None => None,
                Some((cross_norm, attention)) => {
                    let attention = Attention::prepare(backend, spec, attention, None, centred)?;
                    Some((norm(cross_norm)?, attention))
                }
            },
            encoder_norm: norm_where(&source.encoder_norm)?,
            feed_forward: FeedForward::prepare(backend, source, architecture.norm_eps, norm)?,
        })
    }

    /// Whether the layer has a router.
    pub fn is_moe(&self) -> bool {
        matches!(self.feed_forward, FeedForward::Moe(_))
    }

    /// Advances the residual stream of `chunk` by this layer. Enqueues only.
    pub fn forward(
        &self,
        backend: &B,
        chunk: &mut Chunk<B>,
        scratch: &mut Scratch<B>,
        observe: Option<Observation<'_, B>>,
    ) -> Result<()> {
        self.attend(backend, chunk, scratch)?;
        self.feed(backend, &mut chunk.x, &chunk.batch, scratch, observe)
    }

    /// Before the first layer of a decoder, the residual stream of the encoder becomes its output, and that of the decoder
    /// takes its place; otherwise does nothing. [`Layer::attend`] does so by itself.
    pub fn enter(&self, backend: &B, chunk: &mut Chunk<B>) -> Result<()> {
        if let Some(norm) = &self.encoder_norm
            && chunk.is_in_encoder()
        {
            let mut x = backend.buffer();
            norm.apply(backend, &chunk.x, self.eps, &mut x)?;
            chunk.begin_decoder(x);
        }
        Ok(())
    }

    /// The attention half.
    pub fn attend(&self, backend: &B, chunk: &mut Chunk<B>, scratch: &mut Scratch<B>) -> Result<()> {
        self.enter(backend, chunk)?;
        let Chunk { x, batch, memory, .. } = chunk;
        self.attend_behind(backend, x, batch, memory.as_ref(), scratch)
    }

    /// The attention half on any residual stream `x`; `memory` is what a decoder sees of its encoder.
    pub(crate) fn attend_behind(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        memory: Option<&Memory<B>>,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        self.attend_with(backend, x, batch, scratch, None)?;
        if let (Some((norm, attention)), Some(memory)) = (&self.cross, memory) {
            norm.apply(backend, x, self.eps, &mut scratch.normed)?;
            attention.apply_cross(backend, batch, memory, scratch)?;
            backend.add(x, &scratch.out)?;
        }
        Ok(())
    }

    /// As [`Layer::forward`] for the next tokens of one text, of which `cache` holds the earlier ones; adds these to it.
    /// Behind an encoder, `cross` has what [`Layer::cross_cache`] gave. Enqueues only.
    pub fn extend(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        cache: &mut LayerCache<B>,
        cross: Option<&CrossCache<B>>,
    ) -> Result<()> {
        self.attend_with(backend, x, batch, scratch, Some(cache))?;
        if let (Some((norm, attention)), Some(cache)) = (&self.cross, cross) {
            norm.apply(backend, x, self.eps, &mut scratch.normed)?;
            attention.apply_cached_cross(backend, batch, cache, scratch)?;
            backend.add(x, &scratch.out)?;
        }
        self.feed(backend, x, batch, scratch, None)
    }

    /// Keys and values of an encoder's output `[tokens, hidden]`, where the layer attends to one.
    pub fn cross_cache(
        &self,
        backend: &B,
        memory: &B::Buffer,
        tokens: usize,
    ) -> Result<Option<CrossCache<B>>> {
        let cache = self.cross.as_ref().map(|(_, attention)| attention.cross_cache(backend, memory, tokens));
        Ok(cache.transpose()?)
    }

    /// The norm behind the encoder, which the first layer of a decoder has.
    pub(super) fn finish_encoder(&self, backend: &B, x: &B::Buffer, out: &mut B::Buffer) -> Result<()> {
        if let Some(norm) = &self.encoder_norm {
            norm.apply(backend, x, self.eps, out)?;
        }
        Ok(())
    }

    /// An empty cache for this layer.
    pub fn cache(&self, backend: &B) -> Result<LayerCache<B>> {
        Ok(self.attention.cache(backend)?)
    }

    /// The self-attention on any residual stream `x`; with a cache, for the next tokens.
    pub(crate) fn attend_with(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        if matches!(self.attention, Attention::None) {
            return Ok(());
        }
        self.enter_half(backend, self.input_norm.as_ref(), x, scratch)?;
        self.attention.apply(backend, self.eps, batch, scratch, cache)?;
        match self.parallel {
            None => self.leave_half(backend, self.attention_output_norm.as_ref(), x, scratch),
            Some(width) => keep_beside(backend, x, width, batch, scratch),
        }
    }

    /// The feed-forward half.
    pub fn feed(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        observe: Option<Observation<'_, B>>,
    ) -> Result<()> {
        if matches!(self.feed_forward, FeedForward::None) {
            return Ok(());
        }
        self.enter_feed_forward(backend, x, scratch)?;
        self.feed_forward.apply(backend, batch, scratch, observe)?;
        self.leave_feed_forward(backend, x, batch, scratch)
    }

    /// The input of the feed-forward part into `scratch.normed`, and those of its parts.
    fn enter_feed_forward(&self, backend: &B, x: &B::Buffer, scratch: &mut Scratch<B>) -> Result<()> {
        self.enter_half(backend, self.post_attention_norm.as_ref(), x, scratch)?;
        match &self.feed_forward {
            FeedForward::Moe(moe) => Ok(moe.enter(backend, x, scratch)?),
            FeedForward::Dense(_) | FeedForward::None => Ok(()),
        }
    }

    /// Adds the output of the feed-forward part in `scratch.out` to `x`.
    fn leave_feed_forward(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        if let Some(width) = self.parallel {
            join(backend, x, width, batch, scratch)?;
        }
        self.leave_half(backend, self.feed_forward_output_norm.as_ref(), x, scratch)?;
        match self.scale {
            None => Ok(()),
            Some(scale) => Ok(backend.scale(x, scale)?),
        }
    }

    fn enter_half(
        &self,
        backend: &B,
        norm: Option<&Norm<B>>,
        x: &B::Buffer,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        match norm {
            Some(norm) => Ok(norm.apply(backend, x, self.eps, &mut scratch.normed)?),
            None => Ok(backend.copy(x, &mut scratch.normed)?),
        }
    }

    fn leave_half(
        &self,
        backend: &B,
        norm: Option<&Norm<B>>,
        x: &mut B::Buffer,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        if let Some(norm) = norm {
            norm.apply(backend, &scratch.out, self.eps, &mut scratch.normed)?;
            std::mem::swap(&mut scratch.out, &mut scratch.normed);
        }
        if self.residual_scale != 1.0 {
            backend.scale(&mut scratch.out, self.residual_scale)?;
        }
        Ok(backend.add(x, &scratch.out)?)
    }

    /// By what factor the output of the feed-forward part enters the residual stream; `None` where a norm lies between.
    pub fn output_factor(&self) -> Option<f32> {
        let own = match &self.feed_forward {
            FeedForward::Moe(moe) => moe.output_scale,
            FeedForward::Dense(_) | FeedForward::None => 1.0,
        };
        self.feed_forward_output_norm.is_none().then_some(own * self.residual_scale)
    }

    /// The residual stream behind the attention half, `[tokens, hidden]` on the host.
    pub fn behind_attention(&self, backend: &B, x: &B::Buffer) -> Result<Vec<f32>> {
        let values = backend.download(x)?;
        Ok(match self.parallel {
            None => values,
            Some(width) => {
                let rows = values.chunks_exact(2 * width).map(|row| row.split_at(width));
                rows.flat_map(|(x, attended)| x.iter().zip(attended).map(|(x, a)| x + a)).collect()
            }
        })
    }

    /// What routed experts, or a dense MLP, see of the residual stream `x`: `[tokens, hidden]` on the host, or of routed
    /// experts on a latent `[tokens, latent]`.
    pub fn feed_input(&self, backend: &B, x: &B::Buffer, scratch: &mut Scratch<B>) -> Result<Vec<f32>> {
        self.enter_feed_forward(backend, x, scratch)?;
        let input = match &self.feed_forward {
            FeedForward::Moe(moe) => moe.expert_input(backend, scratch)?,
            FeedForward::Dense(_) | FeedForward::None => &scratch.normed,
        };
        Ok(backend.download(input)?)
    }

    /// Another router for the layer's experts, such as one that cannot choose some of them.
    ///
    /// # Errors
    /// Where a token might find too few experts.
    pub fn router(backend: &B, l: usize, source: &MoeSource) -> Result<B::Router> {
        source.check_choices(l)?;
        Ok(backend.router(&source.router, source.rule())?)
    }

    /// The feed-forward half with another router; the layer must have one.
    pub fn feed_with(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        router: &B::Router,
    ) -> Result<()> {
        self.enter_feed_forward(backend, x, scratch)?;
        if let FeedForward::Moe(moe) = &self.feed_forward {
            moe.apply(backend, batch, scratch, Some(router), None)?;
        }
        self.leave_feed_forward(backend, x, batch, scratch)
    }

    /// Routes the feed-forward half's input, with `router` or the layer's own, whatever the capacity of experts; leaves `x`
    /// as it is. The layer must have
    /// a router.
    pub fn route(
        &self,
        backend: &B,
        x: &B::Buffer,
        scratch: &mut Scratch<B>,
        router: Option<&B::Router>,
    ) -> Result<Routes> {
        self.enter_feed_forward(backend, x, scratch)?;
        if let FeedForward::Moe(moe) = &self.feed_forward {
            moe.route(backend, scratch, router)?;
        }
        Ok(backend.routes(&scratch.routing)?)
    }

    /// The routed experts' output, without shared experts, for what [`Layer::route`] just routed: `[tokens, hidden]` on
    /// the host.
    pub fn routed_output(&self, backend: &B, scratch: &mut Scratch<B>) -> Result<Vec<f32>> {
        if let FeedForward::Moe(moe) = &self.feed_forward {
            moe.run_routed(backend, scratch, None)?;
        }
        Ok(backend.download(&scratch.out)?)
    }

    /// [`Backend::output_grams`] of the given rows of what [`Layer::route`] just routed.
    pub fn output_grams(
        &self,
        backend: &B,
        rows: &[usize],
        extra: Option<&[f32]>,
        scratch: &mut Scratch<B>,
    ) -> Result<Vec<f32>> {
        match &self.feed_forward {
            FeedForward::Moe(moe) => Ok(moe.output_grams(backend, rows, extra, scratch)?),
            FeedForward::Dense(_) | FeedForward::None => Ok(Vec::new()),
        }
    }

    /// What the experts of a layer see, decide and give, without changing the residual stream `x`: [`Layer::feed`] taken
    /// apart, on the host, with room for every token where experts have a capacity. `None` where the layer has no router.
    pub fn dissect(&self, backend: &B, x: &B::Buffer, scratch: &mut Scratch<B>) -> Result<Option<Dissected>> {
        let FeedForward::Moe(moe) = &self.feed_forward else { return Ok(None) };
        self.enter_feed_forward(backend, x, scratch)?;
        moe.route(backend, scratch, None)?;
        moe.run_routed(backend, scratch, None)?;
        let routed = backend.download(&scratch.out)?;
        let has_shared = moe.adds_shared() && moe.shared(backend, scratch)?;
        Ok(Some(Dissected {
            input: backend.download(moe.expert_input(backend, scratch)?)?,
            routes: backend.routes(&scratch.routing)?,
            routed,
            shared: has_shared.then(|| backend.download(&scratch.shared)).transpose()?,
        }))
    }
}

/// Puts the attention's output in `scratch.out` beside the residual stream.
fn keep_beside<B: Backend>(
    backend: &B,
    x: &mut B::Buffer,
    width: usize,
    batch: &Batch,
    scratch: &mut Scratch<B>,
) -> Result<()> {
    let whole = HeadLayout { heads: 1, stride: width, start: 0 };
    backend.resize(&mut scratch.halves, batch.tokens(), 2 * width)?;
    backend.copy_heads(x, whole, width, &mut scratch.halves, 0)?;
    backend.copy_heads(&scratch.out, whole, width, &mut scratch.halves, width)?;
    std::mem::swap(x, &mut scratch.halves);
    Ok(())
}

/// Adds to the residual stream what stands beside it.
fn join<B: Backend>(
    backend: &B,
    x: &mut B::Buffer,
    width: usize,
    batch: &Batch,
    scratch: &mut Scratch<B>,
) -> Result<()> {
    let Scratch { halves, attended, .. } = scratch;
    let half = |start: usize| HeadLayout { heads: 1, stride: 2 * width, start };
    for (start, part) in [(0, &mut *halves), (width, &mut *attended)] {
        backend.resize(part, batch.tokens(), width)?;
        backend.copy_heads(x, half(start), width, part, 0)?;
    }
    backend.add(halves, attended)?;
    std::mem::swap(x, halves);
    Ok(())
}
