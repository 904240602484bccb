//! What becomes of one expert.

use serde::Serialize;

use crate::architecture::Projection;

/// Ranks of the three matrices; `None` means that this matrix stays dense. Numbers of dense rows are written alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ranks {
    /// Rank of `W_gate`.
    pub gate: Option<usize>,
    /// Rank of `W_up`.
    pub up: Option<usize>,
    /// Rank of `W_down`.
    pub down: Option<usize>,
}

impl Ranks {
    /// The same rank, or dense, for all three matrices.
    pub fn uniform(rank: Option<usize>) -> Self {
        Ranks { gate: rank, up: rank, down: rank }
    }

    /// Rank of one matrix.
    pub fn get(&self, matrix: Projection) -> Option<usize> {
        match matrix {
            Projection::Gate => self.gate,
            Projection::Up => self.up,
            Projection::Down => self.down,
        }
    }

    /// The rank of one matrix, for writing.
    pub fn get_mut(&mut self, matrix: Projection) -> &mut Option<usize> {
        match matrix {
            Projection::Gate => &mut self.gate,
            Projection::Up => &mut self.up,
            Projection::Down => &mut self.down,
        }
    }

    /// Whether no matrix is factorised.
    pub fn is_dense(&self) -> bool {
        Projection::ALL.iter().all(|&m| self.get(m).is_none())
    }
}

/// The hidden channels of an expert that are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Channels {
    /// So many; which ones is decided while compressing.
    Count(usize),
    /// These, in ascending order.
    List(Vec<usize>),
}

impl Channels {
    /// Number of channels kept.
    pub fn count(&self) -> usize {
        match self {
            Channels::Count(count) => *count,
            Channels::List(list) => list.len(),
        }
    }
}

/// What becomes of one expert. In the plan file the variant is the field `action` and its fields stand
/// beside.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// The expert stays as it is.
    Keep,
    /// The expert and its router row go; the router never chooses it.
    Drop,
    /// The expert's weights go into another expert of the layer; the router keeps its row, and what it sends
    /// here is sent there.
    Merge {
        /// The expert that takes it in: one that is neither dropped nor merged itself.
        into: usize,
        /// Share of this expert in the weighted mean, 0 to 1; the target's own share is what all experts
        /// merged into it leave of 1.
        weight: f64,
    },
    /// The expert becomes one vector, its mean output; the router keeps its row.
    Constant,
    /// Some of the matrices `[out, in]` become products of `[out, r]` and `[r, in]`, to which a few dense rows may be
    /// added.
    LowRank {
        /// Rank of each matrix.
        rank: Ranks,
        /// Number of dense rows of each matrix, where it has a rank: those that the product does worst at, chosen while
        /// compressing. In the file it may be left out.
        #[serde(skip_serializing_if = "Ranks::is_dense")]
        rows: Ranks,
    },
    /// The hidden width shrinks.
    Channels {
        /// The channels kept.
        keep: Channels,
    },
    /// Each matrix becomes the layer's shared base plus a product of `[out, r]` and `[r, in]`.
    Delta {
        /// The rank `r` of the three differences from the base.
        rank: usize,
    },
}

impl Action {
    /// Low rank without dense rows.
    pub fn low_rank(rank: Ranks) -> Self {
        Action::LowRank { rank, rows: Ranks::default() }
    }

    /// The variant as it stands in the plan file.
    pub fn name(&self) -> &'static str {
        match self {
            Action::Keep => "keep",
            Action::Drop => "drop",
            Action::Merge { .. } => "merge",
            Action::Constant => "constant",
            Action::LowRank { .. } => "low_rank",
            Action::Channels { .. } => "channels",
            Action::Delta { .. } => "delta",
        }
    }

    /// Whether something is still stored for the expert alone: neither dropped nor merged.
    pub fn is_stored(&self) -> bool {
        !matches!(self, Action::Drop | Action::Merge { .. })
    }
}
