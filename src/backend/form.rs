//! The forms that an expert can take: all that layers, kernels and files know about compression.

/// One linear map W `[out, in]`.
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
}

/// A SwiGLU MLP: W_down(silu(W_gate x) ∘ W_up x).
#[derive(Clone, Debug)]
pub struct Mlp<M> {
    /// W_gate, `[width, hidden]`.
    pub gate: M,
    /// W_up, `[width, hidden]`.
    pub up: M,
    /// W_down, `[hidden, width]`.
    pub down: M,
}

/// One expert slot of a layer. A layer is a list of these in any mixture, one per router row.
#[derive(Clone, Debug)]
pub enum Expert<W> {
    /// Three matrices, each dense or low rank.
    Mlp(Mlp<Matrix<W>>),
    /// The weights of another slot, which must not be an alias itself. A token that chooses both adds the two combine
    /// weights and runs the expert once.
    Alias(usize),
    /// A constant vector `[hidden]`, whatever the input (MoNE, arXiv 2507.00390).
    Constant(W),
    /// Nothing: the router must never choose it.
    None,
}

impl<M> Mlp<M> {
    /// The matrices in the order gate, up, down.
    pub fn matrices(&self) -> [&M; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Applies `f` to the three matrices.
    pub fn try_map<N, E>(&self, mut f: impl FnMut(&M) -> Result<N, E>) -> Result<Mlp<N>, E> {
        Ok(Mlp { gate: f(&self.gate)?, up: f(&self.up)?, down: f(&self.down)? })
    }
}

impl<W> Matrix<W> {
    /// The stored tensors: one, or the two factors.
    pub fn parts(&self) -> Vec<&W> {
        match self {
            Matrix::Dense(w) => vec![w],
            Matrix::LowRank { u, v } => vec![u, v],
        }
    }
}

impl<W> Expert<W> {
    /// Name of the form, as `inspect` shows it.
    pub fn form(&self) -> &'static str {
        match self {
            Expert::Mlp(mlp) if mlp.matrices().iter().any(|m| matches!(m, Matrix::LowRank { .. })) => {
                "low_rank"
            }
            Expert::Mlp(_) => "dense",
            Expert::Alias(_) => "alias",
            Expert::Constant(_) => "constant",
            Expert::None => "none",
        }
    }

    /// The stored tensors.
    pub fn parts(&self) -> Vec<&W> {
        match self {
            Expert::Mlp(mlp) => mlp.matrices().iter().flat_map(|m| m.parts()).collect(),
            Expert::Constant(vector) => vec![vector],
            Expert::Alias(_) | Expert::None => Vec::new(),
        }
    }
}
