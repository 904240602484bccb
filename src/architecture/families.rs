//! The families: one function each, from config keys to [`Architecture`].

use super::config::Config;
use super::rope::{Pairing, RopeConfig};
use super::{
    Architecture, AttentionSpec, Error, FeedForwardSpec, GroupLimit, GroupedAttention, LatentAttention,
    LayerSpec, MoeSpec, Names, QkNorm, Result, RouterSpec, SharedSpec, WeightRule,
};

type Read = fn(&Config) -> Result<Architecture>;

pub(super) const FAMILIES: [(&str, Read); 5] = [
    ("deepseek_v2", deepseek_v2),
    ("mixtral", mixtral),
    ("olmoe", olmoe),
    ("qwen2_moe", qwen2_moe),
    ("qwen3_moe", qwen3_moe),
];

const MLP_PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const EXPERT_COUNTS: [&str; 4] = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];

/// What an absent key means; silent in transformers, and different from family to family.
#[derive(Clone, Copy)]
struct Defaults {
    rope_theta: f64,
    norm_eps: f64,
    max_positions: usize,
}

/// Keys that every family has, with the family's silent defaults.
struct Common<'c> {
    config: &'c Config,
    family: &'static str,
    hidden_size: usize,
    layers: usize,
    heads: usize,
    max_positions: usize,
    rope: RopeConfig,
    names: Names,
    expert_count_keys: Vec<&'static str>,
    experts: usize,
    top_k: usize,
    norm_eps: f64,
}

impl<'c> Common<'c> {
    fn read(config: &'c Config, family: &'static str, names: Names, defaults: Defaults) -> Result<Self> {
        config.require("hidden_act", "silu")?;
        let max_positions = config.size_or("max_position_embeddings", defaults.max_positions)?;
        let present = |key: &&str| config.get(key).is_some();
        let expert_count_keys: Vec<_> = EXPERT_COUNTS.into_iter().filter(present).collect();
        let count_key =
            expert_count_keys.first().ok_or_else(|| Error::invalid("num_experts", "is missing"))?;
        Ok(Common {
            family,
            hidden_size: config.positive("hidden_size")?,
            layers: config.positive("num_hidden_layers")?,
            heads: config.positive("num_attention_heads")?,
            max_positions,
            rope: RopeConfig::read(config, defaults.rope_theta, max_positions)?,
            names,
            experts: config.positive(count_key)?,
            top_k: config.positive("num_experts_per_tok")?,
            norm_eps: config.float_or("rms_norm_eps", defaults.norm_eps)?,
            expert_count_keys,
            config,
        })
    }

    /// Plain grouped-query attention without biases or norms; families add theirs. `kv_heads` is what an absent
    /// `num_key_value_heads` means.
    fn grouped(&self, kv_heads: usize) -> Result<GroupedAttention> {
        let Common { config, heads, hidden_size, .. } = *self;
        let head_dim = match config.size_opt("head_dim")? {
            Some(0) => return Err(Error::invalid("head_dim", "is 0, expected at least 2")),
            Some(dim) => dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                let what = format!("is {heads}, expected a divisor of hidden_size = {hidden_size}");
                return Err(Error::invalid("num_attention_heads", what));
            }
        };
        Ok(GroupedAttention {
            heads,
            kv_heads: config.size_or("num_key_value_heads", kv_heads)?,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
            rope: self.rope.rope(head_dim, Pairing::Halves)?,
            window: None,
            scale: (head_dim as f64).powf(-0.5) as f32,
        })
    }

    fn moe(&self, width: usize, weights: WeightRule) -> MoeSpec {
        let router = RouterSpec { top_k: self.top_k, weights, groups: None };
        MoeSpec { experts: self.experts, width, router, shared: None }
    }

    fn architecture(self, tied: bool, layer: impl Fn(usize) -> LayerSpec) -> Result<Architecture> {
        Ok(Architecture {
            family: self.family,
            vocabulary: self.config.positive("vocab_size")?,
            hidden_size: self.hidden_size,
            max_positions: self.max_positions,
            norm_eps: self.norm_eps as f32,
            mlp_bias: false,
            tied_embeddings: self.config.flag_or("tie_word_embeddings", tied)?,
            layers: (0..self.layers).map(layer).collect(),
            names: self.names,
            expert_count_keys: self.expert_count_keys,
        })
    }
}

/// Renormalised where `norm_topk_prob` says so; absent means no.
fn weight_rule(config: &Config) -> Result<WeightRule> {
    Ok(if config.flag_or("norm_topk_prob", false)? {
        WeightRule::Renormalised
    } else {
        WeightRule::Scaled(1.0)
    })
}

/// Which layers of a Qwen model have experts: not in `mlp_only_layers`, and every `decoder_sparse_step`-th.
fn qwen_sparse(config: &Config) -> Result<impl Fn(usize) -> bool + use<>> {
    let dense = config.sizes("mlp_only_layers")?.unwrap_or_default();
    let step = config.size_or("decoder_sparse_step", 1)?.max(1);
    Ok(move |l: usize| !dense.contains(&l) && (l + 1).is_multiple_of(step))
}

/// The window of a Qwen model, where it is switched on.
fn sliding_window(config: &Config) -> Result<Option<usize>> {
    let window =
        if config.flag_or("use_sliding_window", false)? { config.size_opt("sliding_window")? } else { None };
    Ok(window.filter(|&w| w > 0))
}

fn mixtral(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "block_sparse_moe", projections: ["w1", "w3", "w2"], shared: "" };
    let defaults = Defaults { rope_theta: 1e6, norm_eps: 1e-5, max_positions: 131_072 };
    let common = Common::read(config, "mixtral", names, defaults)?;
    let window = config.size_opt("sliding_window")?.filter(|&w| w > 0);
    let attention = GroupedAttention { window, ..common.grouped(8)? };
    let moe = common.moe(config.positive("intermediate_size")?, WeightRule::Renormalised);
    common.architecture(false, |_| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: FeedForwardSpec::Moe(moe.clone()),
    })
}

fn olmoe(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "mlp", projections: MLP_PROJECTIONS, shared: "" };
    let defaults = Defaults { rope_theta: 1e4, norm_eps: 1e-5, max_positions: 2048 };
    let common = Common::read(config, "olmoe", names, defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Whole,
        clip: config.float_opt("clip_qkv")?.map(|c| c as f32),
        ..common.grouped(common.heads)?
    };
    let moe = common.moe(config.positive("intermediate_size")?, weight_rule(config)?);
    common.architecture(false, |_| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: FeedForwardSpec::Moe(moe.clone()),
    })
}

fn qwen2_moe(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "mlp", projections: MLP_PROJECTIONS, shared: "shared_expert" };
    let defaults = Defaults { rope_theta: 1e4, norm_eps: 1e-6, max_positions: 32768 };
    let common = Common::read(config, "qwen2_moe", names, defaults)?;
    let attention = GroupedAttention { qkv_bias: config.flag_or("qkv_bias", true)?, ..common.grouped(16)? };
    let window = sliding_window(config)?;
    let first_full = config.size_or("max_window_layers", 28)?;
    let layer_types = config.strings("layer_types")?;
    let slides = |l: usize| match &layer_types {
        Some(types) => types.get(l).is_some_and(|t| t == "sliding_attention"),
        // As transformers 5 fills in the types that a config leaves out.
        None => l.is_multiple_of(2) && l < first_full,
    };
    let shared_width = config.positive("shared_expert_intermediate_size")?;
    let moe = MoeSpec {
        shared: Some(SharedSpec { width: shared_width, gated: true }),
        ..common.moe(config.positive("moe_intermediate_size")?, weight_rule(config)?)
    };
    let sparse = qwen_sparse(config)?;
    let width = config.positive("intermediate_size")?;
    common.architecture(false, |l| LayerSpec {
        attention: AttentionSpec::Grouped(GroupedAttention {
            window: window.filter(|_| slides(l)),
            ..attention.clone()
        }),
        feed_forward: feed_forward(sparse(l), &moe, width),
    })
}

fn qwen3_moe(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "mlp", projections: MLP_PROJECTIONS, shared: "" };
    let defaults = Defaults { rope_theta: 1e4, norm_eps: 1e-6, max_positions: 32768 };
    let common = Common::read(config, "qwen3_moe", names, defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let window = sliding_window(config)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        window,
        ..common.grouped(4)?
    };
    let moe = common.moe(config.positive("moe_intermediate_size")?, weight_rule(config)?);
    let sparse = qwen_sparse(config)?;
    let width = config.positive("intermediate_size")?;
    common.architecture(false, |l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse(l), &moe, width),
    })
}

fn deepseek_v2(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "mlp", projections: MLP_PROJECTIONS, shared: "shared_experts" };
    let defaults = Defaults { rope_theta: 1e4, norm_eps: 1e-6, max_positions: 2048 };
    let common = Common::read(config, "deepseek_v2", names, defaults)?;
    config.require("scoring_func", "softmax")?;
    let nope_dim = config.positive("qk_nope_head_dim")?;
    let rope_dim = config.positive("qk_rope_head_dim")?;
    let mscale = common.rope.attention_mscale()?;
    let attention = LatentAttention {
        heads: common.heads,
        query_rank: config.size_opt("q_lora_rank")?,
        latent_dim: config.positive("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: config.positive("v_head_dim")?,
        bias: config.flag_or("attention_bias", false)?,
        rope: common.rope.rope(rope_dim, Pairing::Adjacent)?,
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * mscale * mscale) as f32,
        latent_eps: 1e-6,
    };
    let groups = match config.get("topk_method").map(|_| config.string("topk_method")).transpose()?.as_deref()
    {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => {
            Some(GroupLimit { count: config.positive("n_group")?, kept: config.positive("topk_group")? })
        }
        Some(other) => {
            return Err(Error::invalid(
                "topk_method",
                format!("is `{other}`; known: greedy, group_limited_greedy"),
            ));
        }
    };
    let moe_width = config.positive("moe_intermediate_size")?;
    // DeepSeek's own code renormalises instead of scaling when norm_topk_prob is true.
    let weights = match weight_rule(config)? {
        WeightRule::Scaled(_) => WeightRule::Scaled(config.float_or("routed_scaling_factor", 1.0)? as f32),
        renormalised @ WeightRule::Renormalised => renormalised,
    };
    let mut moe = common.moe(moe_width, weights);
    moe.router.groups = groups;
    // n shared experts are one MLP, n times as wide.
    let shared = config.size_or("n_shared_experts", 2)?;
    moe.shared = (shared > 0).then_some(SharedSpec { width: shared * moe_width, gated: false });
    let first = config.size_or("first_k_dense_replace", 0)?;
    let frequency = config.size_or("moe_layer_freq", 1)?.max(1);
    let width = config.positive("intermediate_size")?;
    let mut architecture = common.architecture(false, |l| LayerSpec {
        attention: AttentionSpec::Latent(attention.clone()),
        feed_forward: feed_forward(l >= first && l % frequency == 0, &moe, width),
    })?;
    architecture.mlp_bias = config.flag_or("mlp_bias", false)?;
    Ok(architecture)
}

fn feed_forward(sparse: bool, moe: &MoeSpec, dense_width: usize) -> FeedForwardSpec {
    if sparse { FeedForwardSpec::Moe(moe.clone()) } else { FeedForwardSpec::Dense { width: dense_width } }
}
