//! What planning has to know about a checkpoint: sizes, never weights.

use serde::{Deserialize, Serialize};

use super::Projection;

/// The sizes of one checkpoint. Stored with the statistics, so that planning needs no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Family name, as in [`crate::architecture::Architecture::family`].
    pub family: String,
    /// [`crate::checkpoint::Checkpoint::identity`] of the checkpoint.
    pub identity: String,
    /// Decoder layers, dense ones included.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Parameters of the whole checkpoint.
    pub parameters: u64,
    /// Bytes of all tensors of the checkpoint.
    pub bytes: u64,
    /// Bytes of all safetensors headers; grows with the number of tensors.
    pub header_bytes: u64,
    /// Number of tensors.
    pub tensors: u64,
    /// The layers that have a router, in order.
    pub moe_layers: Vec<MoeProfile>,
}

/// The sizes of one MoE layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoeProfile {
    /// 0-based decoder layer.
    pub layer: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Intermediate width of a routed expert.
    pub width: usize,
    /// Width of what its routed experts read and write, where that is not the hidden size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<usize>,
    /// Whether the experts have no up matrix.
    #[serde(default)]
    pub ungated: bool,
    /// Expert groups of a group-limited router; 1 where there is no limit.
    pub groups: usize,
    /// Groups kept per token by a group-limited router; 1 where there is no limit.
    pub top_groups: usize,
    /// Parameters of one routed expert: its matrices and their biases. Of experts that differ, the mean, rounded down.
    pub expert_parameters: u64,
    /// Stored bytes of one routed expert, scales of packed weights included. Of experts that differ, the mean, rounded down.
    pub expert_bytes: u64,
    /// The size of every expert, where they differ, as in a checkpoint that was compressed before; else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub each: Vec<ExpertSize>,
    /// Where not every expert has dense matrices of `width` channels: of every expert how many channels its dense matrices
    /// have, `None` where it has other ones or none of its own. Else empty, and in statistics of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dense_widths: Vec<Option<usize>>,
    /// What experts share that are differences from a base.
    #[serde(default)]
    pub base: ExpertSize,
    /// Stored bytes of its gate, up and down matrix; 0 where that is not known, or not the same in all experts.
    #[serde(default)]
    pub matrix_bytes: [u64; 3],
    /// Bytes per number of what replaces a matrix, such as its factors, where no other type is asked for: as the
    /// matrix has, but 2 where it is packed. 0 where that is not known, or not the same for all.
    #[serde(default)]
    pub factor_bytes: u64,
    /// Parameters of the router per expert: its weight row and biases.
    pub router_parameters: u64,
    /// Stored bytes of the router per expert.
    pub router_bytes: u64,
}

/// The size of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertSize {
    /// Parameters.
    pub parameters: u64,
    /// Stored bytes.
    pub bytes: u64,
    /// Of an alias, which has neither, the expert whose weights it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias_of: Option<usize>,
}

impl MoeProfile {
    /// The size of expert `e`.
    pub fn expert(&self, e: usize) -> ExpertSize {
        let alike =
            ExpertSize { parameters: self.expert_parameters, bytes: self.expert_bytes, alias_of: None };
        self.each.get(e).copied().unwrap_or(alike)
    }

    /// Channels of expert `e`, whose matrices are all dense and its own; `None` where they are not, or where that is not
    /// known and it is smaller than a dense expert.
    pub fn dense_width(&self, e: usize, expert_io: usize) -> Option<usize> {
        match self.dense_widths.get(e) {
            Some(width) => *width,
            None if u128::from(self.expert(e).parameters) < self.dense_values(expert_io) => None,
            None => Some(self.width),
        }
    }

    /// Numbers in the matrices of an expert whose matrices are all dense and of `width` channels, for inputs of
    /// `expert_io`, see [`Profile::expert_io`].
    pub fn dense_values(&self, expert_io: usize) -> u128 {
        u128::from(self.matrices()) * expert_io as u128 * self.width as u128
    }

    /// The size of all routed experts and their base.
    pub fn routed(&self) -> ExpertSize {
        let add = |a: ExpertSize, b: ExpertSize| ExpertSize {
            parameters: a.parameters + b.parameters,
            bytes: a.bytes + b.bytes,
            alias_of: None,
        };
        (0..self.experts).map(|e| self.expert(e)).fold(self.base, add)
    }

    /// The matrices that a dense expert has.
    pub fn projections(&self) -> &'static [Projection] {
        if self.ungated { &[Projection::Gate, Projection::Down] } else { &Projection::ALL }
    }

    /// Number of matrices of a dense expert.
    pub fn matrices(&self) -> u64 {
        self.projections().len() as u64
    }
}

impl Profile {
    /// Width of what the routed experts of `layer` read and write.
    pub fn expert_io(&self, layer: &MoeProfile) -> usize {
        layer.latent.unwrap_or(self.hidden_size)
    }

    /// Parameters of all routed experts.
    pub fn routed_parameters(&self) -> u64 {
        self.moe_layers.iter().map(|l| l.routed().parameters).sum()
    }

    /// Stored bytes of all routed experts.
    pub fn routed_bytes(&self) -> u64 {
        self.moe_layers.iter().map(|l| l.routed().bytes).sum()
    }
}
