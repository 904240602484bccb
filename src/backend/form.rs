//! The forms that an expert can take: all that layers, kernels and files know about compression.

use crate::architecture::{Activation, Projection};
use crate::checkpoint::{Tensor, Weight};

/// One weight matrix W `[out, in]`.
#[derive(Clone, Debug)]
pub enum Matrix<W> {
    /// W itself.
    Dense(W),
    /// W = U·V, computed as U(V x).
    LowRank {
        /// `[out, rank]`.
        u: W,
        /// `[rank, in]`.
        v: W,
    },
    /// W = U·V and a few dense rows: U(V x), to which S x is added at these rows (LoSparse, arXiv 2306.11222).
    LowRankRows {
        /// `[out, rank]`.
        u: W,
        /// `[rank, in]`.
        v: W,
        /// The rows, ascending, each below `out`.
        rows: Vec<u32>,
        /// `[rows, in]`.
        s: W,
    },
    /// W = B + U·V with the [`Base`] B of the layer (D²-MoE, arXiv 2502.17298).
    Delta {
        /// `[out, rank]`.
        u: W,
        /// `[rank, in]`.
        v: W,
    },
}

/// The matrices that the experts of a layer share, in the order gate, up, down: `Some` where an expert has a
/// [`Matrix::Delta`] there.
pub type Base<W> = [Option<W>; 3];

/// One linear map: W x, plus a bias where there is one. `M` is its matrix, `V` a vector.
#[derive(Clone, Debug)]
pub struct Linear<M, V> {
    /// W, `[out, in]`.
    pub weight: M,
    /// `[out]`.
    pub bias: Option<V>,
}

/// An MLP: down(activation(gate(x), up(x))), or without a gate, where `gate` is the only map before the activation,
/// down(activation(gate(x))).
#[derive(Clone, Debug)]
pub struct Mlp<L> {
    /// `[width, hidden]`.
    pub gate: L,
    /// `[width, hidden]`; there exactly where the activation is gated.
    pub up: Option<L>,
    /// `[hidden, width]`.
    pub down: L,
    /// Between them.
    pub activation: Activation,
}

/// One expert slot of a layer. A layer is a list of these in any mixture, one per router row.
#[derive(Clone, Debug)]
pub enum Expert<W, V> {
    /// Three linear maps, each dense or low rank.
    Mlp(Mlp<Linear<Matrix<W>, V>>),
    /// The weights of another slot, which must not be an alias itself. A token that chooses both adds the two combine
    /// weights and runs the expert once (or twice, where combine weights multiply the input).
    Alias(usize),
    /// A constant vector `[hidden]`, whatever the input (MoNE, arXiv 2507.00390).
    Constant(V),
    /// Nothing: the router must never choose it.
    None,
}

/// An expert as stored.
pub type StoredExpert = Expert<Weight, Tensor>;

/// The tensors of a router.
#[derive(Clone, Debug)]
pub struct RouterWeights {
    /// `[experts, hidden]`.
    pub weight: Tensor,
    /// Bias of the logits, `[experts]`.
    pub bias: Option<Tensor>,
    /// Bias that only choices see, `[experts]`.
    pub choice_bias: Option<Tensor>,
    /// Factors of the combine weights, `[experts]`.
    pub expert_scales: Option<Tensor>,
}

impl RouterWeights {
    /// The tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weight).chain(&self.bias).chain(&self.choice_bias).chain(&self.expert_scales)
    }

    /// The router of the experts listed in `keep`, in that order; copied.
    #[must_use]
    pub fn select(&self, keep: &[usize]) -> Self {
        let select = |tensor: &Tensor| tensor.select_rows(keep);
        RouterWeights {
            weight: select(&self.weight),
            bias: self.bias.as_ref().map(select),
            choice_bias: self.choice_bias.as_ref().map(select),
            expert_scales: self.expert_scales.as_ref().map(select),
        }
    }
}

impl<L> Mlp<L> {
    /// The linear maps that there are, in the order gate, up, down.
    pub fn maps(&self) -> impl Iterator<Item = &L> {
        self.named().map(|(_, map)| map)
    }

    /// The linear maps that there are, with their names.
    pub fn named(&self) -> impl Iterator<Item = (Projection, &L)> {
        Projection::ALL.into_iter().filter_map(|p| Some((p, self.map(p)?)))
    }

    /// The linear map of this name, if there is one.
    pub fn map(&self, projection: Projection) -> Option<&L> {
        match projection {
            Projection::Gate => Some(&self.gate),
            Projection::Up => self.up.as_ref(),
            Projection::Down => Some(&self.down),
        }
    }

    /// Applies `f` to the linear maps.
    pub fn try_map<N, E>(&self, mut f: impl FnMut(&L) -> Result<N, E>) -> Result<Mlp<N>, E> {
        self.try_map_named(|_, map| f(map))
    }

    /// Applies `f` to the linear maps and their names.
    pub fn try_map_named<N, E>(
        &self,
        mut f: impl FnMut(Projection, &L) -> Result<N, E>,
    ) -> Result<Mlp<N>, E> {
        Ok(Mlp {
            gate: f(Projection::Gate, &self.gate)?,
            up: self.up.as_ref().map(|up| f(Projection::Up, up)).transpose()?,
            down: f(Projection::Down, &self.down)?,
            activation: self.activation,
        })
    }
}

impl<W> Matrix<W> {
    /// The stored weights: one, or the two factors.
    pub fn parts(&self) -> Vec<&W> {
        match self {
            Matrix::Dense(w) => vec![w],
            Matrix::LowRank { u, v } | Matrix::Delta { u, v } => vec![u, v],
            Matrix::LowRankRows { u, v, s, .. } => vec![u, v, s],
        }
    }

    /// U and V, where there are any.
    pub fn factors(&self) -> Option<(&W, &W)> {
        match self {
            Matrix::Dense(_) => None,
            Matrix::LowRank { u, v } | Matrix::Delta { u, v } | Matrix::LowRankRows { u, v, .. } => {
                Some((u, v))
            }
        }
    }

    /// The part that has a row for every output.
    pub fn left(&self) -> &W {
        match self {
            Matrix::Dense(w) => w,
            Matrix::LowRank { u, .. } | Matrix::Delta { u, .. } | Matrix::LowRankRows { u, .. } => u,
        }
    }

    /// The dense rows beside the factors.
    pub fn rows(&self) -> &[u32] {
        if let Matrix::LowRankRows { rows, .. } = self { rows } else { &[] }
    }

    /// Whether the base of the layer is part of it.
    pub fn is_delta(&self) -> bool {
        matches!(self, Matrix::Delta { .. })
    }

    /// The same form of other weights.
    pub fn try_map<N, E>(&self, mut f: impl FnMut(&W) -> Result<N, E>) -> Result<Matrix<N>, E> {
        Ok(match self {
            Matrix::Dense(w) => Matrix::Dense(f(w)?),
            Matrix::LowRank { u, v } => Matrix::LowRank { u: f(u)?, v: f(v)? },
            Matrix::Delta { u, v } => Matrix::Delta { u: f(u)?, v: f(v)? },
            Matrix::LowRankRows { u, v, rows, s } => {
                Matrix::LowRankRows { u: f(u)?, v: f(v)?, rows: rows.clone(), s: f(s)? }
            }
        })
    }
}

impl<W, V> Expert<W, V> {
    /// Name of the form, as `inspect` shows it.
    pub fn form(&self) -> &'static str {
        match self {
            Expert::Mlp(mlp) => {
                let any = |wanted: fn(&Matrix<W>) -> bool| mlp.maps().any(|m| wanted(&m.weight));
                match () {
                    () if any(Matrix::is_delta) => "delta",
                    () if any(|m| !m.rows().is_empty()) => "low_rank_rows",
                    () if any(|m| m.factors().is_some()) => "low_rank",
                    () => "dense",
                }
            }
            Expert::Alias(_) => "alias",
            Expert::Constant(_) => "constant",
            Expert::None => "none",
        }
    }

    /// The stored matrices.
    pub fn weights(&self) -> Vec<&W> {
        match self {
            Expert::Mlp(mlp) => mlp.maps().flat_map(|m| m.weight.parts()).collect(),
            _ => Vec::new(),
        }
    }

    /// The stored vectors: biases, or the constant.
    pub fn vectors(&self) -> Vec<&V> {
        match self {
            Expert::Mlp(mlp) => mlp.maps().filter_map(|m| m.bias.as_ref()).collect(),
            Expert::Constant(vector) => vec![vector],
            Expert::Alias(_) | Expert::None => Vec::new(),
        }
    }
}

impl StoredExpert {
    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        let weights = self.weights().into_iter().map(|w| w.len() as u64).sum::<u64>();
        weights + self.vectors().into_iter().map(|v| v.len() as u64).sum::<u64>()
    }

    /// Hidden width; 0 where there is none.
    pub fn width(&self) -> usize {
        if let Expert::Mlp(mlp) = self { mlp.gate.weight.left().rows() } else { 0 }
    }

    /// Stored bytes, scales of packed weights and the numbers of dense rows included.
    pub fn bytes(&self) -> u64 {
        let weights = self.weights().into_iter().map(Weight::bytes).sum::<u64>();
        let rows = if let Expert::Mlp(mlp) = self {
            mlp.maps().map(|m| 4 * m.weight.rows().len() as u64).sum()
        } else {
            0
        };
        weights + rows + self.vectors().into_iter().map(|v| v.bytes().len() as u64).sum::<u64>()
    }
}
