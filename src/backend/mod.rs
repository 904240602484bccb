//! The operations that the forward pass needs, and who provides them.
//!
//! A [`Backend`] is a stream-ordered executor: every operation is enqueued, reads and writes buffers that the caller
//! allocated, and takes its sizes from arguments that the host knows. How many tokens an expert receives is known to
//! the backend alone; only the downloads, [`Backend::routes`] and [`Backend::moments`] wait for results. So a
//! GPU can run a whole layer without a host synchronisation, and the CPU is one implementation among others.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod form;
mod moments;

pub use form::{Base, Expert, Linear, Matrix, Mlp, RouterWeights, StoredExpert};
pub use moments::{Moment, MomentDims, Moments};

use crate::architecture::{Activation, GatedDelta, Mamba2, Rope, RouterSpec, Span, Temperature};
use crate::checkpoint::{Tensor, Weight};

/// What can go wrong while computing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A weight that cannot be prepared.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The device asked for is not there.
    #[error("--device {device}: {reason}")]
    Device {
        /// What was asked for.
        device: String,
        /// Why it cannot be had, and what would do.
        reason: String,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Windows of equal length that pass a layer together. Row `w · length + p` of a buffer is position `start + p` of
/// window w.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window.
    pub length: usize,
    /// `false` for padding, one entry per token; `None` where nothing is padding.
    pub mask: Option<Vec<bool>>,
    /// Input file of each window.
    pub files: Vec<u32>,
    /// Position of the first token; above 0 where a cache holds the keys of those before it.
    pub start: usize,
    /// Tokens of the whole text of which these are a part: what LongRoPE goes by.
    pub text_length: usize,
}

impl Batch {
    /// Tokens `start .. start + length` of one text of `text_length` tokens.
    pub fn piece(start: usize, length: usize, text_length: usize) -> Self {
        Batch { windows: 1, length, mask: None, files: Vec::new(), start, text_length }
    }

    /// Number of tokens, padding included.
    pub fn tokens(&self) -> usize {
        self.windows * self.length
    }

    /// Whether token `t` is real.
    pub fn is_real(&self, t: usize) -> bool {
        self.mask.as_ref().is_none_or(|m| m[t])
    }
}

/// What a head sees as keys and values.
#[derive(Debug)]
pub enum Keys<'a, B> {
    /// One key and one value row per token, `kv_heads` heads each.
    Grouped {
        /// Keys.
        key: &'a B,
        /// Values.
        value: &'a B,
        /// Key and value heads; query heads share them in order.
        kv_heads: usize,
    },
    /// Keys and values expanded from a latent: per head `[nope | value]` in one buffer, and one rotated key part that
    /// all heads share.
    Latent {
        /// `[tokens, heads · (nope_dim + value_dim)]`.
        expanded: &'a B,
        /// Buffer whose columns from `rope_start` on are the shared rotated key part.
        shared: &'a B,
        /// First column of the shared part.
        rope_start: usize,
        /// Width of the part without rotation.
        nope_dim: usize,
    },
}

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Width of a query head.
    pub query_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Further factor of the scores, by the query's position.
    pub temperature: Option<Temperature>,
    /// Which earlier keys are visible.
    pub span: Span,
    /// Position of the first row of keys and values in every window.
    pub first_key: usize,
    /// Position behind the last one.
    pub end_key: usize,
}

/// What takes part in an attention besides queries, keys and values.
#[derive(Debug)]
pub struct AttentionTerms<'a, V> {
    /// One more logit for each head's softmax, neither scaled nor masked, whose probability is left out.
    pub sinks: Option<&'a V>,
    /// Biases of the scaled scores, `[heads, 2 · reach + 1]`: of a key at distance d = key − query entry
    /// reach + max(−reach, min(d, reach)) of the head's row.
    pub bias: Option<&'a V>,
    /// `false` for padding, one entry per row of keys; `None` where nothing is padding.
    pub mask: Option<&'a [bool]>,
}

/// Sizes of multi-head latent attention in its absorbed form.
#[derive(Clone, Copy, Debug)]
pub struct LatentShape {
    /// Heads.
    pub heads: usize,
    /// Width of the latent.
    pub latent_dim: usize,
    /// Part of a head without rotation.
    pub nope_dim: usize,
    /// Part of a head with rotation.
    pub rope_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
}

impl LatentShape {
    /// Rows of the expansion that belong to one head: its keys, then its values.
    pub fn expanded_dim(&self) -> usize {
        self.nope_dim + self.value_dim
    }
}

/// Where in a row the rotated elements lie: `heads` times `dim` columns, each head `stride` wide, beginning at `start`.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    /// Number of heads in a row.
    pub heads: usize,
    /// Distance between heads.
    pub stride: usize,
    /// First rotated column of head 0.
    pub start: usize,
}

/// What decides how much a token changes the states of a gated delta network.
#[derive(Debug)]
pub struct DeltaGates<'a, B, V> {
    /// b, `[tokens, value_heads]`.
    pub b: &'a mut B,
    /// a, `[tokens, value_heads]`, or `[tokens, value_heads · key_dim]` in Kimi Delta Attention.
    pub a: &'a mut B,
    /// A_log of every value head.
    pub log_rates: &'a V,
    /// dt_bias, one for each a of a token.
    pub dt_bias: &'a V,
}

/// What a state space model needs besides x, B and C.
#[derive(Debug)]
pub struct ScanTerms<'a, B, V> {
    /// What Δ is made of, `[tokens, heads]`.
    pub steps: &'a mut B,
    /// dt_bias of every head.
    pub dt_bias: &'a V,
    /// exp(A_log) of every head.
    pub rates: &'a V,
    /// D of every head.
    pub skip: &'a V,
}

/// What a state space model with a state for every channel needs besides x.
#[derive(Debug)]
pub struct ChannelTerms<'a, B, V> {
    /// What Δ is made of, `[tokens, channels]`.
    pub steps: &'a mut B,
    /// B, `[tokens, state_dim]`.
    pub b: &'a B,
    /// C, `[tokens, state_dim]`.
    pub c: &'a B,
    /// exp(A_log), `[state_dim, channels]`.
    pub rates: &'a V,
    /// D of every channel.
    pub skip: &'a V,
}

/// A routing rule with the facts that dropping experts changes.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterRule {
    /// The family's rule.
    pub spec: RouterSpec,
    /// Group of each router row; all 0 where there is no group limit.
    pub group_of: Vec<u32>,
    /// Whether the row may be chosen. A row that may not behaves as if its logit were −∞, which is the same, bit for
    /// bit, as not having the row.
    pub live: Vec<bool>,
}

/// The chosen experts of every token, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routes {
    /// Experts per token.
    pub top_k: usize,
    /// Router logits, `[tokens, experts]`.
    pub logits: Vec<f32>,
    /// Chosen experts, `[tokens, top_k]`, in the order of choice: by descending weight, unless a bias that the weights
    /// do not see takes part in the choice, or experts have factors. [`Routes::SKIPPED`] for one that is left out.
    pub ids: Vec<u32>,
    /// Combine weights as used, `[tokens, top_k]`.
    pub weights: Vec<f32>,
}

impl Routes {
    /// In place of the number of an expert that [`Skip`](crate::architecture::Skip) or its capacity leaves out; its weight
    /// is 0.
    pub const SKIPPED: u32 = u32::MAX;
}

/// The operations of a forward pass. Buffers are matrices of f32 values, one row per token, in the backend's memory
/// (which may hold them in another type); weights keep their stored type.
pub trait Backend: Sync {
    /// A matrix of activations.
    type Buffer: Send + Sync;
    /// A prepared weight matrix `[out, in]`.
    type Weight: Send + Sync;
    /// A prepared vector: a norm's weight or a bias.
    type Vector: Send + Sync;
    /// Cosines and sines of a rotary embedding.
    type Rotation: Send + Sync;
    /// A prepared router.
    type Router: Send + Sync;
    /// The prepared experts of a layer.
    type Experts: Send + Sync;
    /// Chosen experts of one batch, and the workspace of the expert computation.
    type Routing: Send;
    /// Running statistics of one MoE layer.
    type Observer: Send;

    /// The device in words, such as `cpu`.
    fn device(&self) -> String;
    /// What decides about the last bits of results, in words: those of an interrupted run go together only with what has the
    /// same.
    fn arithmetic(&self) -> String {
        self.device()
    }

    /// An empty buffer.
    fn buffer(&self) -> Self::Buffer;
    /// Gives `buffer` the shape `[rows, cols]`; contents are undefined afterwards. Allocates only where it was never
    /// as large.
    fn resize(&self, buffer: &mut Self::Buffer, rows: usize, cols: usize) -> Result<()>;
    /// Copies host rows into a buffer.
    fn upload(&self, host: &[f32], rows: usize, cols: usize, buffer: &mut Self::Buffer) -> Result<()>;
    /// Makes `out` a copy of `x`.
    fn copy(&self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Copies `count` rows of `x`, from row `start` on, into `out`.
    fn copy_rows(&self, x: &Self::Buffer, start: usize, count: usize, out: &mut Self::Buffer) -> Result<()>;
    /// Copies the rows of `x` over the rows of `out` from `row` on, into its first columns.
    fn write_rows(&self, x: &Self::Buffer, out: &mut Self::Buffer, row: usize) -> Result<()>;
    /// Gives `buffer` `rows` rows, the first `count` of which are what was in it from row `start` on; the others are
    /// undefined. Memory that has to grow does so by a factor, lest a cache be copied for every token.
    fn keep_rows(&self, buffer: &mut Self::Buffer, start: usize, count: usize, rows: usize) -> Result<()>;
    /// Copies the heads of `x` that `heads` says, `width` columns of each, side by side into the columns of `out` from
    /// `column` on; `out` has as many rows.
    fn copy_heads(
        &self,
        x: &Self::Buffer,
        heads: HeadLayout,
        width: usize,
        out: &mut Self::Buffer,
        column: usize,
    ) -> Result<()>;
    /// Sets the rows of padding to 0.
    fn clear_padding(&self, x: &mut Self::Buffer, batch: &Batch) -> Result<()>;
    /// Waits, then appends a buffer to `host`, row-major.
    fn download_to(&self, buffer: &Self::Buffer, host: &mut Vec<f32>) -> Result<()>;
    /// Waits, then copies a buffer to the host, row-major.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>> {
        let mut host = Vec::new();
        self.download_to(buffer, &mut host)?;
        Ok(host)
    }

    /// Prepares a matrix `[out, in]`.
    fn weight(&self, weight: &Weight) -> Result<Self::Weight>;
    /// Prepares a vector.
    fn vector(&self, tensor: &Tensor) -> Result<Self::Vector>;
    /// Prepares a rotary embedding for positions below `length`.
    fn rotation(&self, rope: &Rope, length: usize) -> Result<Self::Rotation>;
    /// Prepares a router.
    fn router(&self, weights: &RouterWeights, rule: RouterRule) -> Result<Self::Router>;
    /// Prepares the experts of a layer.
    fn experts(&self, experts: &[StoredExpert], base: &Base<Weight>) -> Result<Self::Experts>;
    /// An empty routing.
    fn routing(&self) -> Self::Routing;
    /// Statistics of zero tokens.
    fn observer(&self, dims: MomentDims, second: &[Moment]) -> Result<Self::Observer>;

    /// Rows of `table` by id.
    fn embed(&self, table: &Self::Weight, ids: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// x / √(mean(x²) + ε) ∘ weight over the first `weight.len()` columns of `x`; with a bias, the layer norm
    /// (x − mean(x)) / √(var(x) + ε) ∘ weight + bias (Ba et al., arXiv 1607.06450).
    fn norm(
        &self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        bias: Option<&Self::Vector>,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The former in place, over each consecutive `weight.len()` columns on their own.
    fn rms_norm_heads(&self, x: &mut Self::Buffer, weight: &Self::Vector, eps: f32) -> Result<()>;
    /// The same over `groups` parts of a row, each with its own part of the weight.
    fn rms_norm_groups(
        &self,
        x: &mut Self::Buffer,
        weight: &Self::Vector,
        groups: usize,
        eps: f32,
    ) -> Result<()>;
    /// x Wᵀ (+ bias), of the first columns of `x`, as many as W has.
    fn linear(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Clamps to ± `limit`.
    fn clamp(&self, x: &mut Self::Buffer, limit: f32) -> Result<()>;
    /// Rotates the heads of every row by the row's position.
    fn rotate(
        &self,
        x: &mut Self::Buffer,
        rotation: &Self::Rotation,
        heads: HeadLayout,
        batch: &Batch,
    ) -> Result<()>;
    /// Attention within each window, to the keys that the span says; padding is invisible.
    fn attend(
        &self,
        query: &Self::Buffer,
        keys: Keys<'_, Self::Buffer>,
        terms: AttentionTerms<'_, Self::Vector>,
        shape: AttentionShape,
        batch: &Batch,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The queries of latent attention against the latent itself (DeepSeek-V2, arXiv 2405.04434, §2.1.2): per head,
    /// `[nope | rope]` becomes `[W_kᵀ nope | rope]`, where W_k `[nope_dim, latent_dim]` are the head's first rows in
    /// `expand`. The scores of these queries and the cached `[latent | rope]` are those of the expanded keys.
    fn absorb_queries(
        &self,
        query: &Self::Buffer,
        expand: &Self::Weight,
        shape: LatentShape,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The values of latent attention from sums of latents, `latent_dim` columns per head: W_v times these, where W_v
    /// `[value_dim, latent_dim]` are the head's last rows in `expand`.
    fn expand_values(
        &self,
        sums: &Self::Buffer,
        expand: &Self::Weight,
        shape: LatentShape,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// A causal depthwise convolution over each window: column c of row t becomes Σⱼ kernel\[j, c\] · x\[t − K + 1 + j, c\]
    /// (+ bias\[c\]) for a kernel `[K, channels]`, rows before the window being 0; with `silu` followed by x · σ(x).
    /// With a `tail`, of one window: what stands before the batch is in it, unless the batch begins at position 0, and
    /// afterwards it holds the last K − 1 rows, `[K − 1, channels]`.
    #[expect(clippy::too_many_arguments, reason = "a layer with a state")]
    fn causal_convolution(
        &self,
        x: &Self::Buffer,
        kernel: &Self::Vector,
        bias: Option<&Self::Vector>,
        silu: bool,
        tail: Option<&mut Self::Buffer>,
        batch: &Batch,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The gated delta rule of every value head over each window, see [`GatedDelta`]. `qkv` holds q, k and v of a token,
    /// heads side by side; q and k are divided by their length, √(Σ x² + 10⁻⁶), in place. `gates.b` and `gates.a` become
    /// β and α in place. `out` `[tokens, value_heads · value_dim]`.
    /// With a `state`, of one window: heads begin with it, unless the batch begins at position 0, and afterwards it is
    /// theirs, `[value_heads · key_dim, value_dim]`. All in f32.
    fn gated_delta_rule(
        &self,
        qkv: &mut Self::Buffer,
        gates: DeltaGates<'_, Self::Buffer, Self::Vector>,
        shape: GatedDelta,
        state: Option<&mut Self::Buffer>,
        batch: &Batch,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The state space model of every head over each window, see [`Mamba2`]. `x` holds x, B and C of a token, heads and
    /// groups side by side; `terms.steps` become Δ in place. `out` `[tokens, heads · head_dim]`.
    /// With a `state`, of one window: heads begin with it, unless the batch begins at position 0, and afterwards it is
    /// theirs, `[heads · state_dim, head_dim]`. All in f32.
    fn mamba2_scan(
        &self,
        x: &Self::Buffer,
        terms: ScanTerms<'_, Self::Buffer, Self::Vector>,
        shape: Mamba2,
        state: Option<&mut Self::Buffer>,
        batch: &Batch,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The state space model of every channel of `x` over each window, see [`Mamba`](crate::architecture::Mamba);
    /// `terms.steps` become Δ in place. With a `state` as above, `[state_dim, channels]`. All in f32.
    fn mamba_scan(
        &self,
        x: &Self::Buffer,
        terms: ChannelTerms<'_, Self::Buffer, Self::Vector>,
        state: Option<&mut Self::Buffer>,
        batch: &Batch,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// The activation of gate and, where it is gated, up into `gate`.
    fn activate(
        &self,
        gate: &mut Self::Buffer,
        up: Option<&Self::Buffer>,
        activation: Activation,
    ) -> Result<()>;
    /// x · `factor`, in place.
    fn scale(&self, x: &mut Self::Buffer, factor: f32) -> Result<()>;
    /// x += y.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;
    /// x ∘ y into `x`, both of one shape.
    fn multiply(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;
    /// Multiplies `x` by the sigmoid of `gate`: element by element, or each row by its entry where `gate` has one column.
    fn sigmoid_gate(&self, x: &mut Self::Buffer, gate: &Self::Buffer) -> Result<()>;
    /// Multiplies `x` by ln(1 + eᵍ) of `gate`, each entry of which is that of as many neighbours in a row as there are for it.
    fn softplus_gate(&self, x: &mut Self::Buffer, gate: &Self::Buffer) -> Result<()>;
    /// Multiplies `x` by the softmax of each row of `gate`, which takes its place: a row of `x` is `turns` times one part for
    /// each entry.
    fn mix_experts(&self, x: &mut Self::Buffer, gate: &mut Self::Buffer, turns: usize) -> Result<()>;

    /// Router logits, chosen experts and combine weights for every row of `x`.
    fn route(&self, x: &Self::Buffer, router: &Self::Router, routing: &mut Self::Routing) -> Result<()>;
    /// Leaves out, in every window of `batch`, the tokens of an expert behind the first `capacity` that chose it; padding
    /// counts. Their ids become [`Routes::SKIPPED`] and their weights 0.
    fn limit_tokens(&self, routing: &mut Self::Routing, capacity: usize, batch: &Batch) -> Result<()>;
    /// Σ_k w_k · expert_k(x), or Σ_k expert_k(w_k · x) where the rule says so, for every row of `x`; with an observer,
    /// measures on the way.
    fn run_experts(
        &self,
        x: &Self::Buffer,
        experts: &Self::Experts,
        routing: &mut Self::Routing,
        out: &mut Self::Buffer,
        observe: Option<(&mut Self::Observer, &Batch)>,
    ) -> Result<()>;
    /// Runs every expert on the given rows of `x`, of the tokens that [`Backend::route`] saw last, and adds the outputs to
    /// [`Moment::SampleOutputSum`].
    fn observe_all(
        &self,
        x: &Self::Buffer,
        rows: &[usize],
        experts: &Self::Experts,
        routing: &mut Self::Routing,
        observer: &mut Self::Observer,
    ) -> Result<()>;

    /// Runs every expert on the given rows of `x`, of the tokens that [`Backend::route`] saw last, waits, and returns for
    /// each of the rows the inner products of the experts' outputs, without combine weights (where weights multiply
    /// inputs: of the outputs that the expert has for this token): the lower triangle, row-major, so that (a, b) with
    /// b ≤ a stands at a(a + 1)/2 + b. With `extra`, `[rows, hidden]`, one more vector per row stands behind the
    /// outputs. With `behind`, outputs first pass that matrix, and the vectors have as many values as it has rows.
    fn output_grams(
        &self,
        x: &Self::Buffer,
        rows: &[usize],
        behind: Option<&Self::Weight>,
        extra: Option<&[f32]>,
        experts: &Self::Experts,
        routing: &mut Self::Routing,
    ) -> Result<Vec<f32>>;

    /// Waits, then returns what [`Backend::route`] decided.
    fn routes(&self, routing: &Self::Routing) -> Result<Routes>;
    /// Waits, then returns what was observed.
    fn moments(&self, observer: Self::Observer) -> Result<Moments>;
}
