//! State space models in place of attention.

use super::cache::LayerCache;
use super::layer::{Linear, Scratch};
use super::recurrent::kernel;
use super::source::AttentionSource;
use crate::architecture::{Activation, Mamba2 as Spec};
use crate::backend::{Backend, Batch, HeadLayout, Result, ScanTerms};
use crate::checkpoint::{Dtype, Tensor};

/// Mamba-2.
pub(super) struct Mamba2<B: Backend> {
    spec: Spec,
    input: Linear<B>,
    kernel: B::Vector,
    kernel_bias: Option<B::Vector>,
    rates: B::Vector,
    dt_bias: B::Vector,
    skip: B::Vector,
    norm: B::Vector,
    output: Linear<B>,
}

/// exp(A_log).
fn rates<B: Backend>(backend: &B, log_rates: &Tensor) -> Result<B::Vector> {
    let rates: Vec<f32> = log_rates.to_f32()?.into_iter().map(f32::exp).collect();
    backend.vector(&Tensor::from_f32("", Dtype::F32, log_rates.shape().to_vec(), &rates))
}

impl<B: Backend> Mamba2<B> {
    pub(super) fn prepare(backend: &B, spec: Spec, source: &AttentionSource) -> Result<Self> {
        let AttentionSource::Mamba2 {
            input,
            kernel: stored,
            kernel_bias,
            log_rates,
            dt_bias,
            skip,
            norm,
            output,
        } = source
        else {
            unreachable!("a layer's source is read by its own spec")
        };
        Ok(Mamba2 {
            spec,
            input: Linear::prepare(backend, input)?,
            kernel: kernel(backend, std::slice::from_ref(stored))?,
            kernel_bias: kernel_bias.as_ref().map(|bias| backend.vector(bias)).transpose()?,
            rates: rates(backend, log_rates)?,
            dt_bias: backend.vector(dt_bias)?,
            skip: backend.vector(skip)?,
            norm: backend.vector(norm)?,
            output: Linear::prepare(backend, output)?,
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
        let (tail, heads) = match cache.map(LayerCache::state) {
            None => (None, None),
            Some(state) => (Some(&mut state.tail), Some(&mut state.heads)),
        };
        backend.clear_padding(&mut s.normed, batch)?;
        self.input.apply(backend, &s.normed, &mut s.up)?;
        let (width, channels) = (self.spec.width(), self.spec.channels());
        let parts = [
            (0, width, &mut s.gate),
            (width, channels, &mut s.query),
            (width + channels, self.spec.heads, &mut s.value),
        ];
        for (start, width, part) in parts {
            backend.resize(part, batch.tokens(), width)?;
            backend.copy_heads(&s.up, HeadLayout { heads: 1, stride: width, start }, width, part, 0)?;
        }
        // `query` is x, B and C, `key` the same behind the convolution, `gate` z and `value` a.
        let bias = self.kernel_bias.as_ref();
        backend.causal_convolution(&s.query, &self.kernel, bias, true, tail, batch, &mut s.key)?;
        // The bias would leave a trace of padding before a text.
        backend.clear_padding(&mut s.key, batch)?;
        let terms =
            ScanTerms { steps: &mut s.value, dt_bias: &self.dt_bias, rates: &self.rates, skip: &self.skip };
        backend.mamba2_scan(&s.key, terms, self.spec, heads, batch, &mut s.attended)?;
        // y times silu(z), as a gated MLP has it.
        backend.activate(&mut s.gate, Some(&s.attended), Activation::SwiGlu)?;
        backend.rms_norm_groups(&mut s.gate, &self.norm, self.spec.groups, eps)?;
        self.output.apply(backend, &s.gate, &mut s.out)
    }
}
