//! What takes the place of attention in some layers, and keeps a state of fixed size instead of keys: gated delta networks
//! and short convolutions.

use super::cache::LayerCache;
use super::layer::{Linear, Scratch};
use super::source::{AttentionSource, DeltaInput};
use crate::architecture::{Activation, GatedDelta};
use crate::backend::{Backend, Batch, DeltaGates, HeadLayout, Result};
use crate::checkpoint::{Dtype, Tensor};

/// A gated delta network.
pub(super) struct Delta<B: Backend> {
    spec: GatedDelta,
    input: Input<B>,
    kernel: B::Vector,
    log_rates: B::Vector,
    dt_bias: B::Vector,
    norm: B::Vector,
    output: Linear<B>,
}

/// Projections of the input, see [`DeltaInput`].
enum Input<B: Backend> {
    ByKeyHead { qkvz: Linear<B>, ba: Linear<B> },
    Separate { qkv: Linear<B>, zba: [Linear<B>; 3] },
    LowRankGates { qkv: [Linear<B>; 3], b: Linear<B>, z: [Linear<B>; 2], a: [Linear<B>; 2] },
}

/// A convolution between two gates.
pub(super) struct Convolution<B: Backend> {
    /// Of the residual stream.
    width: usize,
    input: Linear<B>,
    kernel: B::Vector,
    bias: Option<B::Vector>,
    output: Linear<B>,
}

/// A kernel `[K, channels]` from those that are stored, `[channels of each, 1, K]`.
pub(super) fn kernel<B: Backend>(backend: &B, stored: &[Tensor]) -> Result<B::Vector> {
    let mut values = Vec::new();
    for part in stored {
        values.extend(part.to_f32()?);
    }
    let length = stored[0].shape()[2];
    let channels = values.len() / length;
    let transposed = (0..length).flat_map(|j| (0..channels).map(move |c| c * length + j));
    let transposed: Vec<f32> = transposed.map(|entry| values[entry]).collect();
    backend.vector(&Tensor::from_f32("", Dtype::F32, vec![length, channels], &transposed))
}

impl<B: Backend> Delta<B> {
    pub(super) fn prepare(backend: &B, spec: GatedDelta, source: &AttentionSource) -> Result<Self> {
        let AttentionSource::GatedDelta { input, kernels, log_rates, dt_bias, norm, output } = source else {
            unreachable!("a layer's source is read by its own spec")
        };
        let linear = |source| Linear::prepare(backend, source);
        Ok(Delta {
            spec,
            input: match input {
                DeltaInput::ByKeyHead { qkvz, ba } => {
                    Input::ByKeyHead { qkvz: linear(qkvz)?, ba: linear(ba)? }
                }
                DeltaInput::Separate { qkv, zba: [z, b, a] } => {
                    Input::Separate { qkv: linear(qkv)?, zba: [linear(z)?, linear(b)?, linear(a)?] }
                }
                DeltaInput::LowRankGates { qkv: [q, k, v], b, z: [z1, z2], a: [a1, a2] } => {
                    Input::LowRankGates {
                        qkv: [linear(q)?, linear(k)?, linear(v)?],
                        b: linear(b)?,
                        z: [linear(z1)?, linear(z2)?],
                        a: [linear(a1)?, linear(a2)?],
                    }
                }
            },
            kernel: kernel(backend, kernels)?,
            log_rates: backend.vector(log_rates)?,
            dt_bias: backend.vector(dt_bias)?,
            norm: backend.vector(norm)?,
            output: linear(output)?,
        })
    }

    /// Reads `scratch.normed`, writes `scratch.out`; begins with the state in `cache`, and leaves it the next one.
    pub(super) fn apply(
        &self,
        backend: &B,
        eps: f32,
        batch: &Batch,
        s: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        let (tail, heads) = LayerCache::tail_and_heads(cache);
        // As transformers does: padding before a text then leaves no trace in the state.
        backend.clear_padding(&mut s.normed, batch)?;
        // From here on `query` is q, k and v, `gate` z, `key` b and `value` a.
        self.project(backend, batch, s)?;
        backend.causal_convolution(&s.query, &self.kernel, None, true, tail, batch, &mut s.up)?;
        let gates =
            DeltaGates { b: &mut s.key, a: &mut s.value, log_rates: &self.log_rates, dt_bias: &self.dt_bias };
        backend.gated_delta_rule(&mut s.up, gates, self.spec, heads, batch, &mut s.attended)?;
        backend.rms_norm_heads(&mut s.attended, &self.norm, eps)?;
        if self.spec.kimi {
            backend.sigmoid_gate(&mut s.attended, &s.gate)?;
            return self.output.apply(backend, &s.attended, &mut s.out);
        }
        // silu(z) times the normed heads, as a gated MLP has it.
        backend.activate(&mut s.gate, Some(&s.attended), Activation::SwiGlu)?;
        self.output.apply(backend, &s.gate, &mut s.out)
    }

    fn project(&self, backend: &B, batch: &Batch, s: &mut Scratch<B>) -> Result<()> {
        let (qkvz, ba) = match &self.input {
            Input::ByKeyHead { qkvz, ba } => (qkvz, ba),
            Input::Separate { qkv, zba: [z, b, a] } => {
                qkv.apply(backend, &s.normed, &mut s.query)?;
                z.apply(backend, &s.normed, &mut s.gate)?;
                b.apply(backend, &s.normed, &mut s.key)?;
                return a.apply(backend, &s.normed, &mut s.value);
            }
            Input::LowRankGates { qkv, b, z: [z1, z2], a: [a1, a2] } => {
                let width = self.spec.all_values();
                backend.resize(&mut s.query, batch.tokens(), 3 * width)?;
                for (i, part) in qkv.iter().enumerate() {
                    part.apply(backend, &s.normed, &mut s.up)?;
                    let whole = HeadLayout { heads: 1, stride: width, start: 0 };
                    backend.copy_heads(&s.up, whole, width, &mut s.query, i * width)?;
                }
                z1.apply(backend, &s.normed, &mut s.up)?;
                z2.apply(backend, &s.up, &mut s.gate)?;
                a1.apply(backend, &s.normed, &mut s.up)?;
                a2.apply(backend, &s.up, &mut s.value)?;
                return b.apply(backend, &s.normed, &mut s.key);
            }
        };
        let GatedDelta { key_heads, value_heads, key_dim, .. } = self.spec;
        let (tokens, keys, values) = (batch.tokens(), key_heads * key_dim, self.spec.all_values());
        // Of one key head.
        let (own_heads, own_values) = (value_heads / key_heads, values / key_heads);
        let stride = 2 * (key_dim + own_values);
        let heads = |start: usize| HeadLayout { heads: key_heads, stride, start };
        qkvz.apply(backend, &s.normed, &mut s.up)?;
        backend.resize(&mut s.query, tokens, self.spec.qkv_dim())?;
        backend.copy_heads(&s.up, heads(0), key_dim, &mut s.query, 0)?;
        backend.copy_heads(&s.up, heads(key_dim), key_dim, &mut s.query, keys)?;
        backend.copy_heads(&s.up, heads(2 * key_dim), own_values, &mut s.query, 2 * keys)?;
        backend.resize(&mut s.gate, tokens, values)?;
        backend.copy_heads(&s.up, heads(2 * key_dim + own_values), own_values, &mut s.gate, 0)?;
        ba.apply(backend, &s.normed, &mut s.up)?;
        for (start, part) in [(0, &mut s.key), (own_heads, &mut s.value)] {
            let heads = HeadLayout { heads: key_heads, stride: 2 * own_heads, start };
            backend.resize(part, tokens, value_heads)?;
            backend.copy_heads(&s.up, heads, own_heads, part, 0)?;
        }
        Ok(())
    }
}

impl<B: Backend> Convolution<B> {
    pub(super) fn prepare(backend: &B, source: &AttentionSource) -> Result<Self> {
        let AttentionSource::ShortConvolution { input, kernel: stored, bias, output } = source else {
            unreachable!("a layer's source is read by its own spec")
        };
        Ok(Convolution {
            width: stored.shape()[0],
            input: Linear::prepare(backend, input)?,
            kernel: kernel(backend, std::slice::from_ref(stored))?,
            bias: bias.as_ref().map(|bias| backend.vector(bias)).transpose()?,
            output: Linear::prepare(backend, output)?,
        })
    }

    /// Reads `scratch.normed`, writes `scratch.out`; begins with the state in `cache`, and leaves it the next one.
    pub(super) fn apply(
        &self,
        backend: &B,
        batch: &Batch,
        s: &mut Scratch<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Result<()> {
        let tail = cache.map(|cache| &mut cache.state().tail);
        backend.clear_padding(&mut s.normed, batch)?;
        self.input.apply(backend, &s.normed, &mut s.up)?;
        for (i, part) in [&mut s.key, &mut s.gate, &mut s.value].into_iter().enumerate() {
            let third = HeadLayout { heads: 1, stride: self.width, start: i * self.width };
            backend.resize(part, batch.tokens(), self.width)?;
            backend.copy_heads(&s.up, third, self.width, part, 0)?;
        }
        backend.multiply(&mut s.value, &s.key)?;
        let bias = self.bias.as_ref();
        backend.causal_convolution(&s.value, &self.kernel, bias, false, tail, batch, &mut s.attended)?;
        backend.multiply(&mut s.attended, &s.gate)?;
        self.output.apply(backend, &s.attended, &mut s.out)
    }
}
