//! State space models, which some layers have in place of attention.

/// Mamba-2 (Dao and Gu, arXiv 2405.21060, §7). One linear map of the layer's input gives a gate z, then x, B and C, then a
/// number a for every head; x, B and C pass a causal depthwise convolution and SiLU. Then each head has a state S
/// `[state_dim, head_dim]` that every token decays, adds its x to at its B, and reads at its C:
///
/// S ← exp(−exp(A_log) Δ) S + B ⊗ Δ x; y = Cᵀ S + D x,
///
/// with Δ = softplus(a + dt_bias), kept within limits. An RMS norm of y ∘ silu(z), group by group, and a linear map follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mamba2 {
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of B and of C.
    pub state_dim: usize,
    /// Groups of heads, each with a B and a C; the heads of a group follow each other.
    pub groups: usize,
    /// Tokens that the convolution sees: the own one and those right before it.
    pub kernel: usize,
    /// Whether the convolution has a bias.
    pub convolution_bias: bool,
    /// Whether the projections of input and output have biases.
    pub projection_bias: bool,
    /// Smallest and largest Δ.
    pub step_limits: [f32; 2],
}

impl Mamba2 {
    /// Width of all heads.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of x, B and C side by side.
    pub fn channels(&self) -> usize {
        self.width() + 2 * self.groups * self.state_dim
    }

    /// Width of z, of x, B and C, and of a side by side.
    pub fn projected(&self) -> usize {
        self.width() + self.channels() + self.heads
    }
}

/// Mamba (Gu and Dao, arXiv 2312.00752, §3) with the norms of Jamba (arXiv 2403.19887). One linear map of the layer's input
/// gives x and a gate z; x passes a causal depthwise convolution and SiLU; a linear map of the result gives a step of low
/// rank, B and C, each of which an RMS norm follows. Then each channel of x has a state s `[state_dim]`:
///
/// s ← exp(−exp(A_log) Δ) ∘ s + Δ x B; y = C · s + D x,
///
/// with Δ the softplus of a linear map of the step. A linear map of y ∘ silu(z) follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mamba {
    /// Channels.
    pub width: usize,
    /// Width of B and of C.
    pub state_dim: usize,
    /// Width of the step of low rank.
    pub step_rank: usize,
    /// Tokens that the convolution sees: the own one and those right before it.
    pub kernel: usize,
    /// Whether the convolution has a bias.
    pub convolution_bias: bool,
    /// Whether the projections of input and output have biases.
    pub projection_bias: bool,
}
