//! Finding the tensors of a state space model.

use super::Result;
use super::find::Finder;
use super::source::AttentionSource;
use crate::architecture::Mamba2;

impl Finder<'_> {
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
