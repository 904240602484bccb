//! What planning has to know about a checkpoint: sizes, never weights.

use serde::{Deserialize, Serialize};

use super::Projection;

/// The sizes of one checkpoint. Stored with the statistics, so that planning needs no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Family name, as in [`crate::architecture::Architecture::family`].
    pub family: String,
    /// SHA-256 of `config.json` and the tensor index, in hexadecimal: two checkpoints with the same
    /// identity have the same tensors in the same places.
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
    /// Whether the experts have no up matrix.
    #[serde(default)]
    pub ungated: bool,
    /// Expert groups of a group-limited router; 1 where there is no limit.
    pub groups: usize,
    /// Groups kept per token by a group-limited router; 1 where there is no limit.
    pub top_groups: usize,
    /// Parameters of one routed expert: its matrices and their biases.
    pub expert_parameters: u64,
    /// Stored bytes of one routed expert, scales of packed weights included.
    pub expert_bytes: u64,
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

impl MoeProfile {
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
    /// Parameters of all routed experts.
    pub fn routed_parameters(&self) -> u64 {
        self.moe_layers.iter().map(|l| l.experts as u64 * l.expert_parameters).sum()
    }

    /// Stored bytes of all routed experts.
    pub fn routed_bytes(&self) -> u64 {
        self.moe_layers.iter().map(|l| l.experts as u64 * l.expert_bytes).sum()
    }

    /// Parameters that one token touches: everything but the routed experts it does not choose.
    pub fn active_parameters(&self) -> u64 {
        let idle = |l: &MoeProfile| (l.experts - l.top_k.min(l.experts)) as u64 * l.expert_parameters;
        self.parameters - self.moe_layers.iter().map(idle).sum::<u64>()
    }
}
