//! Finding the tensors of a state space model.

use super::Result;
use super::find::Finder;
use super::source::AttentionSource;
use crate::architecture::{Mamba, Mamba2};

impl Finder<'_> {
    pub(super) fn mamba(&self, spec: Mamba, d: usize) -> Result<AttentionSource> {
        let Mamba { width, state_dim, step_rank, .. } = spec;
        let name = |parameter: &str| self.architecture.names.mamba(self.l, parameter);
        let norm = |parameter: &str, width: usize| self.numbers(&name(parameter), &[width]);
        let bias = spec.projection_bias;
        Ok(AttentionSource::Mamba {
            input: self.linear(&name("in_proj"), 2 * width, d, bias)?,
            kernel: self.numbers(&name("conv1d.weight"), &[width, 1, spec.kernel])?,
            kernel_bias: self.bias(&name("conv1d"), width, spec.convolution_bias)?,
            parameters: self.linear(&name("x_proj"), step_rank + 2 * state_dim, width, false)?,
            norms: [
                norm("dt_layernorm.weight", step_rank)?,
                norm("b_layernorm.weight", state_dim)?,
                norm("c_layernorm.weight", state_dim)?,
            ],
            step: self.linear(&name("dt_proj"), width, step_rank, true)?,
            log_rates: self.numbers(&name("A_log"), &[width, state_dim])?,
            skip: self.numbers(&name("D"), &[width])?,
            output: self.linear(&name("out_proj"), d, width, bias)?,
        })
    }

    pub(super) fn mamba2(&self, spec: Mamba2, d: usize) -> Result<AttentionSource> {
        let name = |parameter: &str| self.architecture.names.mamba(self.l, parameter);
        let per_head = |parameter: &str| self.numbers(&name(parameter), &[spec.heads]);
        let (channels, bias) = (spec.channels(), spec.projection_bias);
        Ok(AttentionSource::Mamba2 {
            input: self.linear(&name("in_proj"), spec.projected(), d, bias)?,
            kernel: self.numbers(&name("conv1d.weight"), &[channels, 1, spec.kernel])?,
            kernel_bias: self.bias(&name("conv1d"), channels, spec.convolution_bias)?,
            log_rates: per_head("A_log")?,
            dt_bias: per_head("dt_bias")?,
            skip: per_head("D")?,
            norm: self.numbers(&name("norm.weight"), &[spec.width()])?,
            output: self.linear(&name("out_proj"), d, spec.width(), bias)?,
        })
    }
}
