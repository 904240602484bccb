//! State space models in place of attention.

use super::cache::LayerCache;
use super::layer::{Linear, Scratch};
use super::recurrent::kernel;
use super::source::AttentionSource;
use crate::architecture::{self, Activation};
use crate::backend::{Backend, Batch, ChannelTerms, HeadLayout, Result, ScanTerms};
use crate::checkpoint::{Dtype, Tensor};

/// Mamba.
pub(super) struct Mamba<B: Backend> {
    spec: architecture::Mamba,
    input: Linear<B>,
    kernel: B::Vector,
    kernel_bias: Option<B::Vector>,
    parameters: Linear<B>,
    norms: [B::Vector; 3],
    step: Linear<B>,
    rates: B::Vector,
    skip: B::Vector,
    output: Linear<B>,
}

/// Mamba-2.
pub(super) struct Mamba2<B: Backend> {
    spec: architecture::Mamba2,
    input: Linear<B>,
    kernel: B::Vector,
    kernel_bias: Option<B::Vector>,
    rates: B::Vector,
    dt_bias: B::Vector,
    skip: B::Vector,
    norm: B::Vector,
    output: Linear<B>,
}

/// exp(A_log) of `rows` heads or channels, with these in the last dimension.
fn rates<B: Backend>(backend: &B, log_rates: &Tensor, rows: usize) -> Result<B::Vector> {
    let stored = log_rates.to_f32()?;
    let cols = stored.len() / rows;
    let transposed = (0..cols).flat_map(|col| stored[col..].iter().step_by(cols));
    let rates: Vec<f32> = transposed.map(|rate| rate.exp()).collect();
    backend.vector(&Tensor::from_f32("", Dtype::F32, vec![cols, rows], &rates))
}

/// Copies the columns of `x` into buffers of the given widths, one after the other.
fn split<B: Backend, const N: usize>(
    backend: &B,
    x: &B::Buffer,
    batch: &Batch,
    parts: [(usize, &mut B::Buffer); N],
) -> Result<()> {
    let mut start = 0;
    for (width, part) in parts {
        backend.resize(part, batch.tokens(), width)?;
        backend.copy_heads(x, HeadLayout { heads: 1, stride: width, start }, width, part, 0)?;
        start += width;
    }
    Ok(())
}

impl<B: Backend> Mamba<B> {
    pub(super) fn prepare(backend: &B, spec: architecture::Mamba, source: &AttentionSource) -> Result<Self> {
        let AttentionSource::Mamba {
            input,
            kernel: stored,
            kernel_bias,
            parameters,
            norms: [step_norm, b_norm, c_norm],
            step,
            log_rates,
            skip,
            output,
        } = source
        else {
            unreachable!("a layer's source is read by its own spec")
        };
        Ok(Mamba {
            spec,
            input: Linear::prepare(backend, input)?,
            kernel: kernel(backend, std::slice::from_ref(stored))?,
            kernel_bias: kernel_bias.as_ref().map(|bias| backend.vector(bias)).transpose()?,
            parameters: Linear::prepare(backend, parameters)?,
            norms: [backend.vector(step_norm)?, backend.vector(b_norm)?, backend.vector(c_norm)?],
            step: Linear::prepare(backend, step)?,
            rates: rates(backend, log_rates, spec.width)?,
            skip: backend.vector(skip)?,
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
        let (tail, channels) = LayerCache::tail_and_heads(cache);
        let architecture::Mamba { width, state_dim, step_rank, .. } = self.spec;
        backend.clear_padding(&mut s.normed, batch)?;
        self.input.apply(backend, &s.normed, &mut s.up)?;
        split(backend, &s.up, batch, [(width, &mut s.query), (width, &mut s.gate)])?;
        let bias = self.kernel_bias.as_ref();
        // `key` is x behind the convolution, `gate` z.
        backend.causal_convolution(&s.query, &self.kernel, bias, true, tail, batch, &mut s.key)?;
        backend.clear_padding(&mut s.key, batch)?;
        self.parameters.apply(backend, &s.key, &mut s.up)?;
        // `query` is the step, `value` B and `scalar` C.
        let parts = [(step_rank, &mut s.query), (state_dim, &mut s.value), (state_dim, &mut s.scalar)];
        split(backend, &s.up, batch, parts)?;
        for (part, norm) in [&mut s.query, &mut s.value, &mut s.scalar].into_iter().zip(&self.norms) {
            backend.rms_norm_heads(part, norm, eps)?;
        }
        self.step.apply(backend, &s.query, &mut s.up)?;
        let terms = ChannelTerms {
            steps: &mut s.up,
            b: &s.value,
            c: &s.scalar,
            rates: &self.rates,
            skip: &self.skip,
        };
        backend.mamba_scan(&s.key, terms, channels, batch, &mut s.attended)?;
        // y times silu(z), as a gated MLP has it.
        backend.activate(&mut s.gate, Some(&s.attended), Activation::SwiGlu)?;
        self.output.apply(backend, &s.gate, &mut s.out)
    }
}

impl<B: Backend> Mamba2<B> {
    pub(super) fn prepare(backend: &B, spec: architecture::Mamba2, source: &AttentionSource) -> Result<Self> {
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
            rates: rates(backend, log_rates, spec.heads)?,
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
        let (tail, heads) = LayerCache::tail_and_heads(cache);
        backend.clear_padding(&mut s.normed, batch)?;
        self.input.apply(backend, &s.normed, &mut s.up)?;
        let (width, channels) = (self.spec.width(), self.spec.channels());
        let parts = [(width, &mut s.gate), (channels, &mut s.query), (self.spec.heads, &mut s.value)];
        split(backend, &s.up, batch, parts)?;
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
