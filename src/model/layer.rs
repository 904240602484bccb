//! One decoder layer: x += attention(norm(x)); x += feed_forward(norm(x)).

use super::Result;
use super::feed_forward::FeedForward;
use super::source::{AttentionSource, LayerSource, LinearSource, NormSource};
use crate::architecture::{Architecture, AttentionSpec, GroupedAttention, LatentAttention, QkNorm, Span};
use crate::backend::{AttentionShape, Backend, Batch, HeadLayout, Keys, Result as BackendResult};
use crate::checkpoint::{Dtype, Tensor};

/// A decoder layer prepared for a backend.
pub struct Layer<B: Backend> {
    input_norm: Norm<B>,
    post_attention_norm: Norm<B>,
    eps: f32,
    attention: Attention<B>,
    rotation: Option<B::Rotation>,
    pub(super) feed_forward: FeedForward<B>,
}

/// A norm: RMS, or with a bias a layer norm.
struct Norm<B: Backend> {
    weight: B::Vector,
    bias: Option<B::Vector>,
}

/// A linear map with an optional bias.
pub(super) struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Vector>,
}

enum Attention<B: Backend> {
    Grouped {
        spec: GroupedAttention,
        qkv: [Linear<B>; 3],
        norms: Option<[B::Vector; 2]>,
        sinks: Option<B::Vector>,
        output: Linear<B>,
    },
    Latent {
        spec: LatentAttention,
        query: Linear<B>,
        query_latent: Option<(Linear<B>, B::Vector)>,
        latent: Linear<B>,
        latent_norm: B::Vector,
        expand: Linear<B>,
        output: Linear<B>,
    },
}

/// Buffers that all layers share; they grow to the largest batch and stay.
pub struct Scratch<B: Backend> {
    pub(super) normed: B::Buffer,
    query: B::Buffer,
    key: B::Buffer,
    value: B::Buffer,
    attended: B::Buffer,
    pub(super) out: B::Buffer,
    pub(super) shared: B::Buffer,
    pub(super) gate: B::Buffer,
    pub(super) up: B::Buffer,
    pub(super) scalar: B::Buffer,
    /// Routing of the last MoE layer that ran.
    pub routing: B::Routing,
}

impl<B: Backend> Scratch<B> {
    /// Empty buffers.
    pub fn new(backend: &B) -> Self {
        let buffer = || backend.buffer();
        Scratch {
            normed: buffer(),
            query: buffer(),
            key: buffer(),
            value: buffer(),
            attended: buffer(),
            out: buffer(),
            shared: buffer(),
            gate: buffer(),
            up: buffer(),
            scalar: buffer(),
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

impl<B: Backend> Linear<B> {
    pub(super) fn prepare(backend: &B, source: &LinearSource) -> BackendResult<Self> {
        let bias = source.bias.as_ref().map(|b| backend.vector(b)).transpose()?;
        Ok(Linear { weight: backend.weight(&source.weight)?, bias })
    }

    pub(super) fn apply(&self, backend: &B, x: &B::Buffer, out: &mut B::Buffer) -> BackendResult<()> {
        backend.linear(x, &self.weight, self.bias.as_ref(), out)
    }
}

impl<B: Backend> Norm<B> {
    fn prepare(backend: &B, source: &NormSource) -> BackendResult<Self> {
        let bias = source.bias.as_ref().map(|b| backend.vector(b)).transpose()?;
        Ok(Norm { weight: backend.vector(&source.weight)?, bias })
    }

    fn apply(&self, backend: &B, x: &B::Buffer, eps: f32, out: &mut B::Buffer) -> BackendResult<()> {
        backend.norm(x, &self.weight, self.bias.as_ref(), eps, out)
    }
}

impl<B: Backend> Layer<B> {
    /// Prepares a layer for windows of up to `length` tokens.
    pub(super) fn prepare(
        backend: &B,
        architecture: &Architecture,
        source: &LayerSource,
        length: usize,
    ) -> Result<Self> {
        let spec = &architecture.layers[source.layer].attention;
        let rope = match spec {
            AttentionSpec::Grouped(a) => a.rope.as_ref(),
            AttentionSpec::Latent(a) => Some(&a.rope),
        };
        Ok(Layer {
            input_norm: Norm::prepare(backend, &source.input_norm)?,
            post_attention_norm: Norm::prepare(backend, &source.post_attention_norm)?,
            eps: architecture.norm_eps,
            attention: Attention::prepare(backend, spec, &source.attention)?,
            rotation: rope.map(|rope| backend.rotation(rope, length)).transpose()?,
            feed_forward: FeedForward::prepare(backend, source)?,
        })
    }

    /// Whether the layer has a router.
    pub fn is_moe(&self) -> bool {
        matches!(self.feed_forward, FeedForward::Moe(_))
    }

    /// Advances the residual stream `x`, `[tokens, hidden]`, by this layer. Enqueues only.
    pub fn forward(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        observe: Option<Observation<'_, B>>,
    ) -> Result<()> {
        self.attend(backend, x, batch, scratch)?;
        self.feed(backend, x, batch, scratch, observe)
    }

    /// The attention half.
    pub fn attend(
        &self,
        backend: &B,
        x: &mut B::Buffer,
        batch: &Batch,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        self.input_norm.apply(backend, x, self.eps, &mut scratch.normed)?;
        match &self.attention {
            Attention::Grouped { .. } => self.grouped(backend, batch, scratch)?,
            Attention::Latent { .. } => self.latent(backend, batch, scratch)?,
        }
        Ok(backend.add(x, &scratch.out)?)
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
        self.post_attention_norm.apply(backend, x, self.eps, &mut scratch.normed)?;
        self.feed_forward.apply(backend, batch, scratch, observe)?;
        Ok(backend.add(x, &scratch.out)?)
    }

    fn grouped(&self, backend: &B, batch: &Batch, s: &mut Scratch<B>) -> Result<()> {
        let Attention::Grouped { spec, qkv: [q, k, v], norms, sinks, output } = &self.attention else {
            return Ok(());
        };
        q.apply(backend, &s.normed, &mut s.query)?;
        k.apply(backend, &s.normed, &mut s.key)?;
        v.apply(backend, &s.normed, &mut s.value)?;
        let norm = |s: &mut Scratch<B>| match norms {
            None => Ok(()),
            Some([q_norm, k_norm]) => {
                backend.rms_norm_heads(&mut s.query, q_norm, self.eps)?;
                backend.rms_norm_heads(&mut s.key, k_norm, self.eps)
            }
        };
        if spec.qk_norm != QkNorm::Unweighted {
            norm(s)?;
        }
        if let Some(limit) = spec.clip {
            for buffer in [&mut s.query, &mut s.key, &mut s.value] {
                backend.clamp(buffer, limit)?;
            }
        }
        let heads = |heads: usize| HeadLayout { heads, stride: spec.head_dim, start: 0 };
        if let Some(rotation) = &self.rotation {
            backend.rotate(&mut s.query, rotation, heads(spec.heads), batch)?;
            backend.rotate(&mut s.key, rotation, heads(spec.kv_heads), batch)?;
        }
        if spec.qk_norm == QkNorm::Unweighted {
            norm(s)?;
        }
        let shape = AttentionShape {
            heads: spec.heads,
            query_dim: spec.head_dim,
            value_dim: spec.head_dim,
            scale: spec.scale,
            temperature: spec.temperature,
            span: spec.span,
        };
        let keys = Keys::Grouped { key: &s.key, value: &s.value, kv_heads: spec.kv_heads };
        backend.attend(&s.query, keys, sinks.as_ref(), shape, batch, &mut s.attended)?;
        Ok(output.apply(backend, &s.attended, &mut s.out)?)
    }

    fn latent(&self, backend: &B, batch: &Batch, s: &mut Scratch<B>) -> Result<()> {
        let Attention::Latent { spec, query, query_latent, latent, latent_norm, expand, output } =
            &self.attention
        else {
            return Ok(());
        };
        match query_latent {
            None => query.apply(backend, &s.normed, &mut s.query)?,
            Some((down, norm)) => {
                down.apply(backend, &s.normed, &mut s.key)?;
                backend.norm(&s.key, norm, None, spec.latent_eps, &mut s.value)?;
                query.apply(backend, &s.value, &mut s.query)?;
            }
        }
        // `key`: the latent, then the shared rotated key. `value`: the latent alone, normed.
        latent.apply(backend, &s.normed, &mut s.key)?;
        backend.norm(&s.key, latent_norm, None, spec.latent_eps, &mut s.value)?;
        expand.apply(backend, &s.value, &mut s.up)?;
        let query_dim = spec.nope_dim + spec.rope_dim;
        let query_heads = HeadLayout { heads: spec.heads, stride: query_dim, start: spec.nope_dim };
        let shared = HeadLayout { heads: 1, stride: spec.rope_dim, start: spec.latent_dim };
        if let Some(rotation) = &self.rotation {
            backend.rotate(&mut s.query, rotation, query_heads, batch)?;
            backend.rotate(&mut s.key, rotation, shared, batch)?;
        }
        let shape = AttentionShape {
            heads: spec.heads,
            query_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            temperature: None,
            span: Span::Full,
        };
        let keys = Keys::Latent {
            expanded: &s.up,
            shared: &s.key,
            rope_start: spec.latent_dim,
            nope_dim: spec.nope_dim,
        };
        backend.attend(&s.query, keys, None, shape, batch, &mut s.attended)?;
        Ok(output.apply(backend, &s.attended, &mut s.out)?)
    }
}

impl<B: Backend> Attention<B> {
    fn prepare(backend: &B, spec: &AttentionSpec, source: &AttentionSource) -> BackendResult<Self> {
        let linear = |source: &LinearSource| Linear::prepare(backend, source);
        Ok(match (spec, source) {
            (
                AttentionSpec::Grouped(spec),
                AttentionSource::Grouped { qkv: [q, k, v], norms, sinks, output },
            ) => {
                let ones = Tensor::from_f32("", Dtype::F32, vec![spec.head_dim], &vec![1.0; spec.head_dim]);
                let norms = match (norms, spec.qk_norm) {
                    (Some([q, k]), _) => Some([backend.vector(q)?, backend.vector(k)?]),
                    (None, QkNorm::Unweighted) => Some([backend.vector(&ones)?, backend.vector(&ones)?]),
                    (None, _) => None,
                };
                let qkv = [linear(q)?, linear(k)?, linear(v)?];
                let sinks = sinks.as_ref().map(|s| backend.vector(s)).transpose()?;
                Attention::Grouped { spec: spec.clone(), qkv, norms, sinks, output: linear(output)? }
            }
            (
                AttentionSpec::Latent(spec),
                AttentionSource::Latent { query, query_latent, latent, latent_norm, expand, output },
            ) => Attention::Latent {
                spec: spec.clone(),
                query: linear(query)?,
                query_latent: match query_latent {
                    None => None,
                    Some((down, norm)) => Some((linear(down)?, backend.vector(norm)?)),
                },
                latent: linear(latent)?,
                latent_norm: backend.vector(latent_norm)?,
                expand: linear(expand)?,
                output: linear(output)?,
            },
            _ => unreachable!("a layer's source is read by its own spec"),
        })
    }
}
