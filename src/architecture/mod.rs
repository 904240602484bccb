//! What a `config.json` says, as data: the kind of attention, router and experts of each layer, and how the
//! tensors are called. A family is a table that maps its own keys and names to this, and nothing more.

mod config;
mod error;
mod families;
mod names;
mod packing;
mod profile;
mod rope;
mod router;
mod skip;
mod state_space;

pub use error::Error;
pub use names::{ExpertStorage, Names, Projection};
pub use packing::Packing;
pub use profile::{ExpertSize, MoeProfile, Profile};
pub use rope::{DynamicRope, LongRope, Pairing, Rope};
pub use router::{Choice, GroupLimit, GroupScore, RouterSpec, Scoring, WeightRule, WeightTarget};
pub use skip::{Skip, SkipThreshold};
pub use state_space::{Mamba, Mamba2};

use config::Config;
pub(crate) use config::parse_json;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// A MoE language model, decoder-only or with an encoder: everything that its forward pass depends on, except the weights.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each says whether a checkpoint has tensors of one kind")]
pub struct Architecture {
    /// Family, as in `model_type`.
    pub family: &'static str,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence that the model's positions cover; `usize::MAX` where no layer has positions.
    pub max_positions: usize,
    /// ε of the layer norms and the final norm.
    pub norm_eps: f32,
    /// What kind of norms these are.
    pub norm: NormKind,
    /// Whether these norms, and those of queries and keys, multiply by 1 + weight.
    pub zero_centred_norms: bool,
    /// Where the norms of a layer stand.
    pub norm_placement: NormPlacement,
    /// Factor of the embeddings.
    pub embedding_scale: f32,
    /// Factor of what a layer's two halves add to the residual stream.
    pub residual_scale: f32,
    /// Whether each layer has a number that it multiplies the residual stream by in the end.
    pub layer_scales: bool,
    /// Between the matrices of the MLPs of dense layers and shared experts.
    pub dense_activation: Activation,
    /// Whether the MLPs of dense layers and shared experts have biases.
    pub mlp_bias: bool,
    /// Whether the output head is the embedding table.
    pub tied_embeddings: bool,
    /// Whether the output head has a bias.
    pub head_bias: bool,
    /// The layers: those of the encoder, where there is one, and then those of the decoder. One numbering for all.
    pub layers: Vec<LayerSpec>,
    /// Number of layers that form an encoder; 0 in a decoder-only model.
    pub encoder_layers: usize,
    /// Factor of the final hidden state before the output head.
    pub head_scale: f32,
    /// Bound of the logits: z becomes cap · tanh(z / cap) (Gemma 2, arXiv 2408.00118, §2).
    pub logit_cap: Option<f32>,
    /// Tensor names.
    pub names: Names,
    /// Where the section of `config.json` is that speaks of the language model, or of its experts: the keys that lead to
    /// it, none where the whole file does.
    pub config_section: &'static [&'static str],
    /// Keys of `config.json` (or its section) that hold the number of routed experts.
    pub expert_count_keys: Vec<&'static str>,
    /// How packed weights are stored, where the config speaks of any.
    pub packing: Option<Packing>,
}

/// Kind of the norms of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x / √(mean(x²) + ε) ∘ weight (Zhang and Sennrich, arXiv 1910.07467).
    Rms,
    /// (x − mean(x)) / √(var(x) + ε) ∘ weight, plus a bias (Ba et al., arXiv 1607.06450).
    Layer {
        /// Whether there is a bias.
        bias: bool,
    },
}

/// Where the norms of a layer stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and feed-forward part.
    Before,
    /// Behind both, on what they add to the residual stream (OLMo 2, arXiv 2501.00656, §3.1).
    Behind,
    /// Before and behind both (Gemma 2, arXiv 2408.00118, §2).
    Around,
    /// Before both, and behind routed and shared experts together (A.X K1).
    BeforeAndBehindExperts,
    /// One before both, which read the same: x + attention(norm(x)) + feed_forward(norm(x)) (GPT-J, Wang and Komatsuzaki,
    /// 2021).
    BeforeBoth,
    /// Before and behind both, and in layers with experts around each part of the feed-forward half as well: routed
    /// experts and shared expert have one before and one behind them each, and the router has one, divided by √hidden
    /// (Gemma 4). The one behind the half is that of their sum.
    AroundParts,
}

impl NormPlacement {
    /// Whether there is a norm before the attention.
    pub fn is_before(self) -> bool {
        self != NormPlacement::Behind
    }

    /// Whether the feed-forward part has one of its own before it.
    pub fn is_before_feed_forward(self) -> bool {
        self.is_before() && self != NormPlacement::BeforeBoth
    }

    /// Whether there is one behind the attention.
    pub fn is_behind_attention(self) -> bool {
        matches!(self, NormPlacement::Behind | NormPlacement::Around | NormPlacement::AroundParts)
    }

    /// Whether there is one behind the feed-forward part of a layer, with experts or not.
    pub fn is_behind_feed_forward(self, has_experts: bool) -> bool {
        self.is_behind_attention() || self == NormPlacement::BeforeAndBehindExperts && has_experts
    }
}

/// One layer.
#[derive(Clone, Debug)]
pub struct LayerSpec {
    /// Self-attention, or what takes its place.
    pub attention: AttentionSpec,
    /// Feed-forward part.
    pub feed_forward: FeedForwardSpec,
}

/// What mixes the tokens of a layer: self-attention, or an operation with a state of fixed size in its place.
#[derive(Clone, Debug)]
pub enum AttentionSpec {
    /// Multi-head or grouped-query attention.
    Grouped(GroupedAttention),
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1).
    Latent(LatentAttention),
    /// Linear attention by the gated delta rule (Qwen3-Next).
    GatedDelta(GatedDelta),
    /// A short convolution between two gates (LFM2).
    ShortConvolution(ShortConvolution),
    /// A state space model with a decay for every element of its state (Mamba, as Jamba has it).
    Mamba(Mamba),
    /// A state space model with one decay per head (Mamba-2).
    Mamba2(Mamba2),
    /// Nothing: the layer is a feed-forward part alone (Nemotron-H).
    None,
}

impl QkNorm {
    /// Whether it takes place after the rotation.
    pub fn is_rotated(self) -> bool {
        matches!(self, QkNorm::PerHeadRotated | QkNorm::Unweighted)
    }
}

impl AttentionSpec {
    /// The rotary embedding, if there is one.
    pub fn rope(&self) -> Option<&Rope> {
        match self {
            AttentionSpec::Grouped(attention) => attention.rope.as_ref(),
            AttentionSpec::Latent(attention) => attention.rope.as_ref(),
            AttentionSpec::GatedDelta(_)
            | AttentionSpec::ShortConvolution(_)
            | AttentionSpec::Mamba(_)
            | AttentionSpec::Mamba2(_)
            | AttentionSpec::None => None,
        }
    }

    /// Whether it depends on the positions of tokens, by a rotation or in its scores, and not on their order alone.
    pub fn has_positions(&self) -> bool {
        let of_scores = match self {
            AttentionSpec::Grouped(attention) => attention.bias.is_some() || attention.temperature.is_some(),
            AttentionSpec::Latent(attention) => attention.temperature.is_some(),
            AttentionSpec::GatedDelta(_)
            | AttentionSpec::ShortConvolution(_)
            | AttentionSpec::Mamba(_)
            | AttentionSpec::Mamba2(_)
            | AttentionSpec::None => false,
        };
        of_scores || self.rope().is_some()
    }

    /// Whether the layer keeps keys of earlier tokens, not a state of fixed size.
    pub fn is_attention(&self) -> bool {
        matches!(self, AttentionSpec::Grouped(_) | AttentionSpec::Latent(_))
    }
}

/// A gated delta network (Yang et al., arXiv 2412.06464): queries, keys and values pass a causal depthwise convolution and
/// SiLU; then each value head has a state S `[key_dim, value_dim]` that every token decays by α, corrects towards its
/// value at its key by β, and reads at its query:
///
/// S ← α S; S ← S + k ⊗ β (v − kᵀS); o = qᵀS,
///
/// with q and k of length 1, q further divided by √key_dim, β = σ(b) and α = exp(−exp(A_log) · softplus(a + dt_bias)).
/// An RMS norm of every head and a gate silu(z) follow. In Kimi Delta Attention (arXiv 2510.26692) every element of a key
/// has its own a, dt_bias and α, which decays that row of S, and the gate is σ(z).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedDelta {
    /// Query and key heads.
    pub key_heads: usize,
    /// Value heads, a multiple; those that share a key head follow each other.
    pub value_heads: usize,
    /// Width of a query or key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Tokens that the convolution sees: the own one and those right before it.
    pub kernel: usize,
    /// Whether α and the gate are those of Kimi Delta Attention.
    pub kimi: bool,
    /// How the projections of the layer's input are stored.
    pub projections: DeltaProjections,
}

impl GatedDelta {
    /// Width of queries, keys and values side by side.
    pub fn qkv_dim(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.all_values()
    }

    /// Number of α, and of a, per token.
    pub fn decays(&self) -> usize {
        self.value_heads * if self.kimi { self.key_dim } else { 1 }
    }

    /// Width of all value heads.
    pub fn all_values(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

/// How the projections of a gated delta network are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaProjections {
    /// Two matrices, by key heads: the rows of q, k, v and z, and those of b and a, of one key head and its value heads
    /// follow each other (Qwen3-Next).
    ByKeyHead,
    /// One matrix for q, k and v, whose heads follow each other, and one each for z, b and a (Qwen3.5).
    Separate,
    /// One matrix each, and one convolution each, for q, k and v; one matrix for b, two for z and for a, between which
    /// there are as many numbers as in a head (Kimi Linear).
    LowRankGates,
}

/// C ∘ conv(B ∘ x), where B, C and x are linear maps of the layer's input, as wide as the residual stream, and the
/// convolution is causal and depthwise (LFM2 Technical Report, arXiv 2511.23404).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortConvolution {
    /// Tokens that the convolution sees: the own one and those right before it.
    pub kernel: usize,
    /// Whether the projections and the convolution have biases.
    pub bias: bool,
}

/// Multi-head or grouped-query attention: softmax(scale · q kᵀ) v with `heads / kv_heads` query heads per key head.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each says whether a part is there")]
pub struct GroupedAttention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a query or key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor of the values.
    pub value_scale: f32,
    /// Whether the key projection gives the values as well: keys before their norm and rotation (Gemma 4).
    pub keys_as_values: bool,
    /// Whether every value head has an RMS norm without a weight.
    pub value_norm: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// RMS norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Clamp of q, k and v to ± this (OLMoE).
    pub clip: Option<f32>,
    /// Rotary embedding of the first elements of every head; `None` for a layer without positions.
    pub rope: Option<Rope>,
    /// Which earlier keys are visible.
    pub span: Span,
    /// Whether each head has an attention sink: one more logit in its softmax, with no value behind it (gpt-oss).
    pub sinks: bool,
    /// Factor of the scores.
    pub scale: f32,
    /// Further factor of the scores that grows with the position.
    pub temperature: Option<Temperature>,
    /// Bias of the scores by relative position.
    pub bias: Option<RelativeBias>,
    /// Whether an attention of the same sizes to the encoder's output follows.
    pub cross: bool,
    /// What the heads' outputs are multiplied by, element by element, before the output projection.
    pub output_gate: OutputGate,
}

/// A learned bias of the scores for every head and class of relative positions (T5, arXiv 1910.10683, §2.1). All layers
/// of an encoder or decoder share those of its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativeBias {
    /// Number of classes.
    pub buckets: usize,
    /// Distance from which on all are one class.
    pub max_distance: usize,
    /// Whether keys after the query have classes of their own.
    pub bidirectional: bool,
}

impl RelativeBias {
    /// The class of a key at `distance` = key − query.
    pub fn bucket(self, distance: isize) -> usize {
        let (count, first, distance) = if self.bidirectional {
            let half = self.buckets / 2;
            (half, if distance > 0 { half } else { 0 }, distance.unsigned_abs())
        } else {
            (self.buckets, 0, (-distance).max(0) as usize)
        };
        let exact = count / 2;
        if distance < exact {
            return first + distance;
        }
        // In f32, as the models were trained with.
        let ratio = (distance as f32 / exact as f32).ln()
            / (self.max_distance as f64 / exact as f64).ln() as f32
            * (count - exact) as f32;
        first + (exact + ratio as usize).min(count - 1)
    }
}

/// Which keys a query sees, but for the last kind among those that are not after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Span {
    /// All.
    #[default]
    Full,
    /// A sliding window: those with q − k < window.
    Window(usize),
    /// Those in the same chunk: ⌊q / chunk⌋ = ⌊k / chunk⌋ (Llama 4).
    Chunk(usize),
    /// All, and those after it as well: in an encoder, and of a decoder towards the encoder.
    Bidirectional,
}

impl Span {
    /// The first position that the query at `position` sees.
    pub fn first(self, position: usize) -> usize {
        match self {
            Span::Full | Span::Bidirectional => 0,
            Span::Window(window) => (position + 1).saturating_sub(window),
            Span::Chunk(chunk) => position / chunk * chunk,
        }
    }

    /// Behind the last position that the query at `position` sees among `end`.
    pub fn end(self, position: usize, end: usize) -> usize {
        if self == Span::Bidirectional { end } else { position + 1 }
    }
}

/// Scores of the query at position p are multiplied by ln(1 + ⌊(p + first) / interval⌋) · strength + 1 (Nakanishi, arXiv
/// 2501.19399, as Llama 4 uses it).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Number of the first position: 1 for Llama 4, 0 for Mistral.
    pub first: f32,
    /// Positions per step.
    pub interval: f32,
    /// Size of a step.
    pub strength: f32,
}

impl Temperature {
    /// The factor at `position`.
    pub fn at(self, position: usize) -> f32 {
        ((position as f32 + self.first) / self.interval).floor().ln_1p() * self.strength + 1.0
    }
}

/// The gate of what the heads of an attention give: the sigmoid of a projection of the layer's input, element by element
/// (Qiu et al., arXiv 2505.06708), or another function of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// No gate.
    None,
    /// The query projection gives it, behind the query of each head (Qwen3-Next).
    BehindQuery,
    /// It has a projection of its own (AFMoE).
    Separate,
    /// It has a projection of its own, of which it is ln(1 + eˣ) (Laguna).
    Softplus {
        /// Whether all elements of a head have the same.
        per_head: bool,
    },
    /// The heads are those of several attentions, whose outputs are mixed: it has a projection of its own to a number for
    /// each of these experts, of which it is the softmax (BAM, arXiv 2408.08274, eq. 4).
    Experts {
        /// Number of experts.
        count: usize,
        /// How many times each expert has a turn: the heads that it has in one follow each other, and so do the experts.
        turns: usize,
    },
}

/// RMS norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    None,
    /// Over each head on its own (Qwen3).
    PerHead,
    /// Over each head on its own, after the rotation (Hunyuan).
    PerHeadRotated,
    /// Over the whole projection (OLMoE).
    Whole,
    /// Over each head on its own, after the rotation and without a weight (Llama 4).
    Unweighted,
}

/// Multi-head latent attention.
#[derive(Clone, Debug)]
pub struct LatentAttention {
    /// Heads.
    pub heads: usize,
    /// Rank of the query projection; `None` for one full matrix.
    pub query_rank: Option<usize>,
    /// Width of the latent that keys and values are expanded from.
    pub latent_dim: usize,
    /// Part of a head without rotation.
    pub nope_dim: usize,
    /// Part of a head with rotation; its key is shared by all heads.
    pub rope_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Whether the down-projections and the output projection have biases.
    pub bias: bool,
    /// Rotary embedding of the `rope_dim` part; `None` for a model without positions.
    pub rope: Option<Rope>,
    /// Factor of the scores.
    pub scale: f32,
    /// Further factor of the scores that grows with the position.
    pub temperature: Option<Temperature>,
    /// ε of the latent norms; not the layer norms' ε.
    pub latent_eps: f32,
}

/// Feed-forward part of a layer.
#[derive(Clone, Debug)]
pub enum FeedForwardSpec {
    /// One MLP.
    Dense {
        /// Intermediate width.
        width: usize,
    },
    /// Router and experts.
    Moe(MoeSpec),
    /// Nothing: the layer is an attention, or what takes its place, alone (Nemotron-H).
    None,
}

/// Router and experts of a layer.
#[derive(Clone, Debug)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: usize,
    /// Intermediate width of a routed expert.
    pub width: usize,
    /// Width of what routed experts read and write, where that is a projection of the residual stream (the LatentMoE
    /// of Nemotron 3); router and shared expert see the stream itself.
    pub latent: Option<usize>,
    /// Between the matrices of a routed expert.
    pub activation: Activation,
    /// Whether the matrices of a routed expert have biases.
    pub expert_bias: bool,
    /// The routing rule.
    pub router: RouterSpec,
    /// Most tokens of a window that an expert takes, the first ones that choose it; the layer gives 0 for the others
    /// (Switch Transformer, arXiv 2101.03961, eq. 3, whose capacity is a number here). `None`: all.
    pub capacity: Option<usize>,
    /// The shared expert, if any.
    pub shared: Option<SharedSpec>,
}

/// What an MLP does with its gate g and its up projection u, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    /// silu(g) · u (Shazeer, arXiv 2002.05202).
    #[default]
    SwiGlu,
    /// g' · σ(slope · g') · (u' + 1), where g' = min(g, limit) and u' = u clamped to ± limit (gpt-oss, arXiv 2508.10925).
    ClampedSwiGlu {
        /// Bound of gate and up.
        limit: f32,
        /// Factor within the sigmoid.
        slope: f32,
    },
    /// gelu(g) · u with GELU by its tanh approximation (Shazeer, arXiv 2002.05202).
    GeGluTanh,
    /// max(g, 0), without an up projection (Switch Transformer, arXiv 2101.03961).
    Relu,
    /// max(g, 0)², without an up projection (So et al., arXiv 2109.08668, §3).
    SquaredRelu,
    /// g · Φ(g) with Φ by its tanh approximation, without an up projection (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
}

impl Activation {
    /// Whether the MLP has an up projection, which this multiplies the gate's activation by.
    pub fn is_gated(self) -> bool {
        matches!(self, Activation::SwiGlu | Activation::ClampedSwiGlu { .. } | Activation::GeGluTanh)
    }
}

/// The shared expert: an MLP that every token passes, with the activation of dense layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedSpec {
    /// Intermediate width.
    pub width: usize,
    /// Whether its output is multiplied by the sigmoid of a learned scalar per token (Qwen2-MoE).
    pub gated: bool,
    /// Whether the mean of its output and that of routed experts is taken, not their sum.
    pub averaged: bool,
}

impl SharedSpec {
    /// One without a gate whose output is added.
    pub fn of_width(width: usize) -> Self {
        SharedSpec { width, gated: false, averaged: false }
    }
}

impl Architecture {
    /// Width of what the routed experts of `moe` read and write.
    pub fn expert_io(&self, moe: &MoeSpec) -> usize {
        moe.latent.unwrap_or(self.hidden_size)
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Names the key and what would be right; for an unknown family, lists the known ones.
    pub fn from_config(text: &str) -> Result<Self> {
        let config = Config::parse(text)?;
        let family: String = config.string("model_type")?;
        let read = families::FAMILIES.iter().find(|(name, _)| *name == family);
        let (_, read) = read.ok_or_else(|| Error::UnknownFamily { family, known: families() })?;
        let mut architecture = read(&config)?;
        architecture.packing = Packing::read(&config)?;
        let mut section = config;
        for key in architecture.config_section {
            let Some(inner) = section.section(key)? else { break };
            architecture.packing = architecture.packing.or(Packing::read(&inner)?);
            section = inner;
        }
        if !architecture.layers.iter().any(|layer| layer.attention.has_positions()) {
            architecture.max_positions = usize::MAX;
        }
        architecture.check()?;
        Ok(architecture)
    }

    /// The MoE layers with their 0-based numbers.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers.iter().enumerate().filter_map(|(l, layer)| match &layer.feed_forward {
            FeedForwardSpec::Moe(moe) => Some((l, moe)),
            FeedForwardSpec::Dense { .. } | FeedForwardSpec::None => None,
        })
    }

    /// The MoE spec of layer `layer`, if it has one.
    pub fn moe(&self, layer: usize) -> Option<&MoeSpec> {
        match &self.layers.get(layer)?.feed_forward {
            FeedForwardSpec::Moe(moe) => Some(moe),
            FeedForwardSpec::Dense { .. } | FeedForwardSpec::None => None,
        }
    }

    /// Whether layer `l` is one of an encoder.
    pub fn in_encoder(&self, l: usize) -> bool {
        l < self.encoder_layers
    }

    /// Name of the table that the output head multiplies by.
    pub fn head_table(&self) -> String {
        if self.tied_embeddings { self.names.embedding() } else { self.names.head_weight() }
    }

    fn check(&self) -> Result<()> {
        if self.layers.is_empty() {
            return Err(Error::invalid("num_hidden_layers", "is 0, expected at least 1"));
        }
        for spec in &self.layers {
            if let AttentionSpec::GatedDelta(delta) = spec.attention {
                check_delta(delta)?;
            }
            if let AttentionSpec::Mamba2(mamba) = spec.attention {
                check_groups(mamba)?;
            }
            if let AttentionSpec::Grouped(a) = &spec.attention
                && (a.kv_heads == 0 || a.heads % a.kv_heads != 0)
            {
                let (kv, heads) = (a.kv_heads, a.heads);
                let what = format!("is {kv}, expected a divisor of num_attention_heads = {heads}");
                return Err(Error::invalid("num_key_value_heads", what));
            }
            if let AttentionSpec::Grouped(a) = &spec.attention
                && let Some(rotated) = a.rope.as_ref().map(Rope::dim).filter(|&dim| dim > a.head_dim)
            {
                let what = format!("gives {rotated} rotated elements to heads of width {}", a.head_dim);
                return Err(Error::invalid("partial_rotary_factor", what));
            }
        }
        for (_, moe) in self.moe_layers() {
            let (k, experts) = (moe.router.top_k, moe.experts);
            if k == 0 || k > experts {
                let what = format!("is {k}, expected 1 to {experts} (the number of experts)");
                return Err(Error::invalid("num_experts_per_tok", what));
            }
            if let Some(GroupLimit { count, kept, .. }) = moe.router.groups {
                if count == 0 || count > GroupLimit::MAX_GROUPS || experts % count != 0 {
                    let most = GroupLimit::MAX_GROUPS;
                    let what = format!("is {count}, expected a divisor of {experts} experts, at most {most}");
                    return Err(Error::invalid("n_group", what));
                }
                if kept == 0 || kept > count || kept * (experts / count) < k {
                    let what = format!(
                        "is {kept}: {kept} groups of {} experts cannot hold {k} choices",
                        experts / count
                    );
                    return Err(Error::invalid("topk_group", what));
                }
            }
        }
        self.check_numbers()
    }

    /// Errors where a number would make every activation NaN.
    fn check_numbers(&self) -> Result<()> {
        if self.max_positions == 0 {
            return Err(Error::invalid("max_position_embeddings", "is 0, expected at least 1"));
        }
        let eps = self.norm_eps;
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(Error::invalid("rms_norm_eps", format!("is {eps}, expected 0 or a little more")));
        }
        for (key, factor) in [
            ("embedding_multiplier", self.embedding_scale),
            ("residual_multiplier", self.residual_scale),
            ("logits_scaling", self.head_scale),
        ] {
            if !factor.is_finite() {
                return Err(Error::invalid(key, "gives a factor that is not finite"));
            }
        }
        for spec in &self.layers {
            let (rope, scale, clip) = match &spec.attention {
                AttentionSpec::Grouped(a) => (Option::<&Rope>::from(&a.rope), a.scale, a.clip),
                AttentionSpec::Latent(a) => (Option::<&Rope>::from(&a.rope), a.scale, None),
                AttentionSpec::GatedDelta(_)
                | AttentionSpec::ShortConvolution(_)
                | AttentionSpec::Mamba(_)
                | AttentionSpec::Mamba2(_)
                | AttentionSpec::None => continue,
            };
            if let Some(clip) = clip.filter(|c| c.is_nan() || *c <= 0.0) {
                return Err(Error::invalid("clip_qkv", format!("is {clip}, expected more than 0")));
            }
            let finite = |r: &Rope| {
                r.magnitude.is_finite() && r.inverse_frequencies.iter().all(|frequency| frequency.is_finite())
            };
            if !scale.is_finite() || !rope.is_none_or(finite) {
                let what = "gives frequencies or an attention scale that are not finite";
                return Err(Error::invalid("rope_scaling", what));
            }
        }
        Ok(())
    }
}

/// Errors where value heads cannot share key heads evenly.
fn check_delta(delta: GatedDelta) -> Result<()> {
    let (keys, values) = (delta.key_heads, delta.value_heads);
    if values.is_multiple_of(keys) {
        return Ok(());
    }
    let what = format!("is {keys}, expected a divisor of linear_num_value_heads = {values}");
    Err(Error::invalid("linear_num_key_heads", what))
}

/// Errors where heads cannot share B and C evenly.
fn check_groups(mamba: Mamba2) -> Result<()> {
    let Mamba2 { heads, groups, .. } = mamba;
    if heads.is_multiple_of(groups) {
        return Ok(());
    }
    let what = format!("is {groups}, expected a divisor of the {heads} heads");
    Err(Error::invalid("n_groups", what))
}

/// The `model_type` values that moepress reads.
pub fn families() -> Vec<&'static str> {
    families::FAMILIES.iter().map(|(name, _)| *name).collect()
}
