//! The attention half of a layer, or what takes its place, with and without a cache of earlier tokens.

use std::sync::Arc;

use super::cache::{CrossCache, LayerCache, Rows, State};
use super::feed_forward::NOTHING;
use super::layer::{Linear, Scratch, norm_weight};
use super::mamba::{Mamba, Mamba2};
use super::recurrent::{Convolution, Delta};
use super::source::{AttentionSource, LinearSource};
use super::stream::Memory;
use crate::architecture::{
    AttentionSpec, GroupedAttention, LatentAttention, OutputGate, QkNorm, RelativeBias, Span,
};
use crate::backend::{AttentionShape, AttentionTerms, Backend, Batch, HeadLayout, Keys, LatentShape, Result};
use crate::checkpoint::{Dtype, Tensor};

pub(super) enum Attention<B: Backend> {
    Grouped(Grouped<B>),
    Latent(Latent<B>),
    Delta(Delta<B>),
    Convolution(Convolution<B>),
    Mamba(Mamba<B>),
    Mamba2(Mamba2<B>),
    None,
}

pub(super) struct Grouped<B: Backend> {
    spec: GroupedAttention,
    query: Linear<B>,
    key: Linear<B>,
    /// `None` where keys are values.
    value: Option<Linear<B>>,
    norms: Option<[B::Vector; 2]>,
    /// Ones, where values have a norm.
    value_norm: Option<B::Vector>,
    sinks: Option<B::Vector>,
    bias: Option<B::Vector>,
    gate: Option<Linear<B>>,
    output: Linear<B>,
    rotation: Option<Arc<B::Rotation>>,
}

#[expect(clippy::struct_field_names, reason = "the names of the field")]
pub(super) struct Latent<B: Backend> {
    spec: LatentAttention,
    query: Linear<B>,
    query_latent: Option<(Linear<B>, B::Vector)>,
    latent: Linear<B>,
    latent_norm: B::Vector,
    expand: Linear<B>,
    output: Linear<B>,
    rotation: Option<Arc<B::Rotation>>,
}

impl<B: Backend> Attention<B> {
    pub(super) fn prepare(
        backend: &B,
        spec: &AttentionSpec,
        source: &AttentionSource,
        rotation: Option<Arc<B::Rotation>>,
        zero_centred: bool,
    ) -> Result<Self> {
        let linear = |source: &LinearSource| Linear::prepare(backend, source);
        Ok(match (spec, source) {
            (
                AttentionSpec::Grouped(spec),
                AttentionSource::Grouped { query, key, value, norms, sinks, bias, gate, output },
            ) => {
                let ones = |dim: usize| {
                    backend.vector(&Tensor::from_f32("", Dtype::F32, vec![dim], &vec![1.0; dim]))
                };
                let norms = match (norms, spec.qk_norm) {
                    (Some([q, k]), _) => {
                        let norm = |stored: &Tensor| backend.vector(&norm_weight(stored, zero_centred)?);
                        Some([norm(q)?, norm(k)?])
                    }
                    (None, QkNorm::Unweighted) => Some([ones(spec.head_dim)?, ones(spec.head_dim)?]),
                    (None, _) => None,
                };
                Attention::Grouped(Grouped {
                    spec: spec.clone(),
                    query: linear(query)?,
                    key: linear(key)?,
                    value: value.as_ref().map(linear).transpose()?,
                    norms,
                    value_norm: spec.value_norm.then(|| ones(spec.value_dim)).transpose()?,
                    sinks: sinks.as_ref().map(|s| backend.vector(s)).transpose()?,
                    bias: match (spec.bias, bias) {
                        (Some(spec), Some(stored)) => Some(backend.vector(&bias_table(spec, stored)?)?),
                        _ => None,
                    },
                    gate: gate.as_ref().map(linear).transpose()?,
                    output: linear(output)?,
                    rotation,
                })
            }
            (
                AttentionSpec::Latent(spec),
                AttentionSource::Latent { query, query_latent, latent, latent_norm, expand, output },
            ) => Attention::Latent(Latent {
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
                rotation,
            }),
            (AttentionSpec::GatedDelta(spec), source) => {
                Attention::Delta(Delta::prepare(backend, *spec, source)?)
            }
            (AttentionSpec::ShortConvolution(_), source) => {
                Attention::Convolution(Convolution::prepare(backend, source)?)
            }
            (AttentionSpec::Mamba(spec), source) => Attention::Mamba(Mamba::prepare(backend, *spec, source)?),
            (AttentionSpec::Mamba2(spec), source) => {
                Attention::Mamba2(Mamba2::prepare(backend, *spec, source)?)
            }
            (AttentionSpec::None, AttentionSource::None) => Attention::None,
            _ => unreachable!("a layer's source is read by its own spec"),
        })
    }

    /// An empty cache for this attention.
    pub(super) fn cache(&self, backend: &B) -> Result<LayerCache<B>> {
        let buffer = |cols: usize| -> Result<B::Buffer> {
            let mut buffer = backend.buffer();
            backend.resize(&mut buffer, 0, cols)?;
            Ok(buffer)
        };
        Ok(match self {
            Attention::Grouped(Grouped { spec, .. }) => {
                let [keys, values] = [spec.head_dim, spec.value_dim].map(|dim| spec.kv_heads * dim);
                let rows = Rows::Grouped { keys: buffer(keys)?, values: buffer(values)? };
                LayerCache::new(rows, spec.span)
            }
            Attention::Latent(Latent { spec, .. }) => {
                LayerCache::new(Rows::Latent(buffer(spec.latent_dim + spec.rope_dim)?), Span::Full)
            }
            Attention::Delta(_)
            | Attention::Convolution(_)
            | Attention::Mamba(_)
            | Attention::Mamba2(_)
            | Attention::None => {
                let state = State { tail: backend.buffer(), heads: backend.buffer() };
                LayerCache::new(Rows::State(state), Span::Full)
            }
        })
    }

    /// Reads `scratch.normed`, writes `scratch.out`; queries see what `cache` holds, and it takes up the new tokens.
    pub(super) fn apply(
        &self,
        backend: &B,
        eps: f32,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        match self {
            Attention::Grouped(grouped) => grouped.apply(backend, eps, batch, scratch, cache),
            Attention::Latent(latent) => latent.apply(backend, batch, scratch, cache),
            Attention::Delta(delta) => delta.apply(backend, eps, batch, scratch, cache),
            Attention::Convolution(convolution) => convolution.apply(backend, batch, scratch, cache),
            Attention::Mamba(mamba) => mamba.apply(backend, eps, batch, scratch, cache),
            Attention::Mamba2(mamba) => mamba.apply(backend, eps, batch, scratch, cache),
            Attention::None => unreachable!("{NOTHING}"),
        }
    }

    /// Reads `scratch.normed`, writes `scratch.out`; queries see all tokens of the encoder's output.
    pub(super) fn apply_cross(
        &self,
        backend: &B,
        batch: &Batch,
        memory: &Memory<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        match self {
            Attention::Grouped(grouped) => grouped.apply_cross(backend, batch, memory, scratch),
            _ => unreachable!("{OTHER_CROSS}"),
        }
    }

    /// Keys and values of the encoder's output `memory` of `tokens` tokens, for [`Attention::apply_cached_cross`].
    pub(super) fn cross_cache(
        &self,
        backend: &B,
        memory: &B::Buffer,
        tokens: usize,
    ) -> Result<CrossCache<B>> {
        let Attention::Grouped(grouped) = self else { unreachable!("{OTHER_CROSS}") };
        let mut cache = CrossCache { keys: backend.buffer(), values: backend.buffer(), tokens };
        grouped.keys_and_values(backend, memory, &mut cache.keys, &mut cache.values)?;
        Ok(cache)
    }

    /// As [`Attention::apply_cross`] for one text, with the keys and values at hand.
    pub(super) fn apply_cached_cross(
        &self,
        backend: &B,
        batch: &Batch,
        cache: &CrossCache<B>,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let Attention::Grouped(grouped) = self else { unreachable!("{OTHER_CROSS}") };
        grouped.query.apply(backend, &s.normed, &mut s.query)?;
        let keys = [&cache.keys, &cache.values];
        grouped.attend_cross(backend, batch, &s.query, keys, cache.tokens, None, &mut s.attended)?;
        grouped.output.apply(backend, &s.attended, &mut s.out)
    }
}

/// What only grouped attention does.
const OTHER_CROSS: &str = "no family has another attention to an encoder";

/// `[heads, 2 · reach + 1]` from the stored `[buckets, heads]`; beyond the reach all distances are in one class.
fn bias_table(spec: RelativeBias, stored: &Tensor) -> Result<Tensor> {
    let heads = stored.shape()[1];
    let values = stored.to_f32()?;
    let reach = spec.max_distance as isize;
    let row = |head: usize| (-reach..=reach).map(move |distance| spec.bucket(distance) * heads + head);
    let table: Vec<f32> = (0..heads).flat_map(row).map(|entry| values[entry]).collect();
    Ok(Tensor::from_f32("", Dtype::F32, vec![heads, table.len() / heads], &table))
}

impl<B: Backend> Grouped<B> {
    fn apply(
        &self,
        backend: &B,
        eps: f32,
        batch: &Batch,
        s: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        let Grouped { spec, query: q, norms, value_norm, sinks, bias, gate, output, rotation, .. } = self;
        if spec.output_gate == OutputGate::BehindQuery {
            q.apply(backend, &s.normed, &mut s.up)?;
            let pairs = |start: usize| HeadLayout { heads: spec.heads, stride: 2 * spec.head_dim, start };
            for (start, part) in [(0, &mut s.query), (spec.head_dim, &mut s.gate)] {
                backend.resize(part, batch.tokens(), spec.heads * spec.head_dim)?;
                backend.copy_heads(&s.up, pairs(start), spec.head_dim, part, 0)?;
            }
        } else {
            q.apply(backend, &s.normed, &mut s.query)?;
        }
        self.keys_and_values(backend, &s.normed, &mut s.key, &mut s.value)?;
        if let Some(ones) = value_norm {
            backend.rms_norm_heads(&mut s.value, ones, eps)?;
        }
        if spec.value_scale != 1.0 {
            backend.scale(&mut s.value, spec.value_scale)?;
        }
        let norm = |s: &mut Scratch<B>| match norms {
            None => Ok(()),
            Some([q_norm, k_norm]) => {
                backend.rms_norm_heads(&mut s.query, q_norm, eps)?;
                backend.rms_norm_heads(&mut s.key, k_norm, eps)
            }
        };
        if !spec.qk_norm.is_rotated() {
            norm(s)?;
        }
        if let Some(limit) = spec.clip {
            for buffer in [&mut s.query, &mut s.key, &mut s.value] {
                backend.clamp(buffer, limit)?;
            }
        }
        let heads = |heads: usize| HeadLayout { heads, stride: spec.head_dim, start: 0 };
        if let Some(rotation) = rotation {
            backend.rotate(&mut s.query, rotation, heads(spec.heads), batch)?;
            backend.rotate(&mut s.key, rotation, heads(spec.kv_heads), batch)?;
        }
        if spec.qk_norm.is_rotated() {
            norm(s)?;
        }
        let mut mask = None;
        let (first_key, key, value) = match cache {
            None => {
                mask = batch.mask.as_deref();
                (batch.start, &s.key, &s.value)
            }
            Some(cache) => {
                cache.append(backend, batch, |rows, at| match rows {
                    Rows::Grouped { keys, values } => {
                        backend.write_rows(&s.key, keys, at)?;
                        backend.write_rows(&s.value, values, at)
                    }
                    _ => unreachable!("a layer's cache is made by itself"),
                })?;
                match cache.rows() {
                    Rows::Grouped { keys, values } => (cache.first(), keys, values),
                    _ => unreachable!("a layer's cache is made by itself"),
                }
            }
        };
        let end_key = batch.start + batch.length;
        let shape = AttentionShape { first_key, end_key, ..Self::shape(spec) };
        let keys = Keys::Grouped { key, value, kv_heads: spec.kv_heads };
        let terms = AttentionTerms { sinks: sinks.as_ref(), bias: bias.as_ref(), mask };
        backend.attend(&s.query, keys, terms, shape, batch, &mut s.attended)?;
        if let Some(gate) = gate {
            gate.apply(backend, &s.normed, &mut s.gate)?;
        }
        match spec.output_gate {
            OutputGate::None => {}
            OutputGate::BehindQuery | OutputGate::Separate => {
                backend.sigmoid_gate(&mut s.attended, &s.gate)?;
            }
            OutputGate::Softplus { .. } => backend.softplus_gate(&mut s.attended, &s.gate)?,
            OutputGate::Experts { turns, .. } => backend.mix_experts(&mut s.attended, &mut s.gate, turns)?,
        }
        output.apply(backend, &s.attended, &mut s.out)
    }

    /// Keys and values of `x`, before norms and rotation.
    fn keys_and_values(
        &self,
        backend: &B,
        x: &B::Buffer,
        keys: &mut B::Buffer,
        values: &mut B::Buffer,
    ) -> Result<()> {
        self.key.apply(backend, x, keys)?;
        match &self.value {
            Some(value) => value.apply(backend, x, values),
            None => backend.copy(keys, values),
        }
    }

    fn shape(spec: &GroupedAttention) -> AttentionShape {
        AttentionShape {
            heads: spec.heads,
            query_dim: spec.head_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            temperature: spec.temperature,
            span: spec.span,
            first_key: 0,
            end_key: 0,
        }
    }

    /// Attention of `scratch.normed` to all tokens of `memory`, into `scratch.out`.
    fn apply_cross(&self, backend: &B, batch: &Batch, memory: &Memory<B>, s: &mut Scratch<B>) -> Result<()> {
        let Grouped { query, output, .. } = self;
        query.apply(backend, &s.normed, &mut s.query)?;
        self.keys_and_values(backend, &memory.x, &mut s.key, &mut s.value)?;
        let (length, mask) = (memory.batch.length, memory.batch.mask.as_deref());
        self.attend_cross(backend, batch, &s.query, [&s.key, &s.value], length, mask, &mut s.attended)?;
        output.apply(backend, &s.attended, &mut s.out)
    }

    /// Attention of `query` to `length` tokens of the encoder's output in every window, whose keys and values are given.
    #[expect(clippy::too_many_arguments, reason = "two sides with their sizes")]
    fn attend_cross(
        &self,
        backend: &B,
        batch: &Batch,
        query: &B::Buffer,
        [key, value]: [&B::Buffer; 2],
        length: usize,
        mask: Option<&[bool]>,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let spec = &self.spec;
        let shape = AttentionShape { span: Span::Bidirectional, end_key: length, ..Self::shape(spec) };
        let keys = Keys::Grouped { key, value, kv_heads: spec.kv_heads };
        let terms = AttentionTerms { sinks: None, bias: None, mask };
        backend.attend(query, keys, terms, shape, batch, out)
    }
}

impl<B: Backend> Latent<B> {
    fn apply(
        &self,
        backend: &B,
        batch: &Batch,
        s: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        let Latent { spec, query, query_latent, latent, latent_norm, output, rotation, .. } = self;
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
        let query_dim = spec.nope_dim + spec.rope_dim;
        let query_heads = HeadLayout { heads: spec.heads, stride: query_dim, start: spec.nope_dim };
        let shared = HeadLayout { heads: 1, stride: spec.rope_dim, start: spec.latent_dim };
        if let Some(rotation) = rotation {
            backend.rotate(&mut s.query, rotation, query_heads, batch)?;
            backend.rotate(&mut s.key, rotation, shared, batch)?;
        }
        match cache {
            None => {
                self.expand.apply(backend, &s.value, &mut s.up)?;
                self.attend_expanded(backend, batch, batch.start, &s.query, &s.up, &s.key, &mut s.attended)?;
            }
            Some(cache) => {
                cache.append(backend, batch, |rows, at| match rows {
                    Rows::Latent(rows) => {
                        backend.write_rows(&s.key, rows, at)?;
                        backend.write_rows(&s.value, rows, at)
                    }
                    _ => unreachable!("a layer's cache is made by itself"),
                })?;
                let Rows::Latent(rows) = cache.rows() else {
                    unreachable!("a layer's cache is made by itself")
                };
                if self.absorbs(batch.length, cache.held()) {
                    self.attend_absorbed(backend, batch, rows, s)?;
                } else {
                    self.expand.apply(backend, rows, &mut s.up)?;
                    let first = cache.first();
                    self.attend_expanded(backend, batch, first, &s.query, &s.up, rows, &mut s.attended)?;
                }
            }
        }
        output.apply(backend, &s.attended, &mut s.out)
    }

    /// Whether `queries` against `keys` cached latents cost fewer multiplications in the absorbed form, where heads are
    /// wider, than with all keys and values expanded anew, which a few queries do not pay back.
    fn absorbs(&self, queries: usize, keys: usize) -> bool {
        let LatentAttention { latent_dim, nope_dim, rope_dim, value_dim, .. } = self.spec;
        let expansion = latent_dim * (nope_dim + value_dim);
        let absorbed = queries * (expansion + keys * (2 * latent_dim + rope_dim));
        let expanded = keys * (expansion + queries * (nope_dim + rope_dim + value_dim));
        absorbed < expanded
    }

    fn attend_expanded(
        &self,
        backend: &B,
        batch: &Batch,
        first_key: usize,
        query: &B::Buffer,
        expanded: &B::Buffer,
        shared: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<()> {
        let LatentAttention { latent_dim, nope_dim, rope_dim, value_dim, .. } = self.spec;
        let shape = self.shape(batch, nope_dim + rope_dim, value_dim, first_key);
        let keys = Keys::Latent { expanded, shared, rope_start: latent_dim, nope_dim };
        let mask = batch.mask.as_deref();
        backend.attend(query, keys, AttentionTerms { sinks: None, bias: None, mask }, shape, batch, out)
    }

    /// Attention over the latents themselves: one key head `[latent | rope]`, whose first part is the value as well.
    fn attend_absorbed(
        &self,
        backend: &B,
        batch: &Batch,
        rows: &B::Buffer,
        s: &mut Scratch<B>,
    ) -> Result<()> {
        let LatentAttention { heads, latent_dim, nope_dim, rope_dim, value_dim, .. } = self.spec;
        let dims = LatentShape { heads, latent_dim, nope_dim, rope_dim, value_dim };
        backend.absorb_queries(&s.query, &self.expand.weight, dims, &mut s.gate)?;
        // The latent of all tokens is visible, so the first row is that of position 0.
        let shape = self.shape(batch, latent_dim + rope_dim, latent_dim, 0);
        let keys = Keys::Grouped { key: rows, value: rows, kv_heads: 1 };
        let terms = AttentionTerms { sinks: None, bias: None, mask: None };
        backend.attend(&s.gate, keys, terms, shape, batch, &mut s.up)?;
        backend.expand_values(&s.up, &self.expand.weight, dims, &mut s.attended)
    }

    fn shape(&self, batch: &Batch, query_dim: usize, value_dim: usize, first_key: usize) -> AttentionShape {
        AttentionShape {
            heads: self.spec.heads,
            query_dim,
            value_dim,
            scale: self.spec.scale,
            temperature: self.spec.temperature,
            span: Span::Full,
            first_key,
            end_key: batch.start + batch.length,
        }
    }
}
