use super::super::LatentAttention;
use super::feed_forward;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupLimit, GroupScore, LayerSpec, MoeSpec,
    Names, Pairing, Result, WeightRule,
};

const DEFAULTS: Defaults = Defaults { norm_eps: 1e-6, ..Defaults::USUAL };

fn names() -> Names {
    Names { shared: "shared_experts", ..Names::default() }
}

/// DeepSeek-V2 (arXiv 2405.04434).
pub(super) fn v2(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 2048, ..DEFAULTS };
    let common = Common::read(config, "deepseek_v2", names(), defaults)?;
    config.require("scoring_func", "softmax")?;
    let method = config.get("topk_method").map(|_| config.string("topk_method")).transpose()?;
    let groups = match method.as_deref() {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => Some(GroupLimit {
            count: config.positive("n_group")?,
            kept: config.positive("topk_group")?,
            score: GroupScore::Largest,
        }),
        Some(other) => {
            let what = format!("is `{other}`; known: greedy, group_limited_greedy");
            return Err(Error::invalid("topk_method", what));
        }
    };
    // DeepSeek's own code renormalises instead of scaling when norm_topk_prob is true.
    let weights = if config.flag_or("norm_topk_prob", false)? {
        WeightRule::RENORMALISED
    } else {
        WeightRule::Scaled(config.float_or("routed_scaling_factor", 1.0)? as f32)
    };
    let width = config.positive("moe_intermediate_size")?;
    let mut moe =
        MoeSpec { shared: common.shared("n_shared_experts", 2, width)?, ..common.moe(width, weights) };
    moe.router.groups = groups;
    let mut architecture = layers(common, &moe, Pairing::Adjacent, 0)?;
    architecture.mlp_bias = config.flag_or("mlp_bias", false)?;
    Ok(architecture)
}

/// DeepSeek-V3 and R1 (arXiv 2412.19437), Moonlight, and Kimi-K2 (arXiv 2507.20534), which has a `model_type` of its own.
/// Layers for multi-token prediction are not part of the forward pass.
pub(super) fn v3(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 4096, ..DEFAULTS };
    let common = Common::read(config, "deepseek_v3", names(), defaults)?;
    config.require("scoring_func", "sigmoid")?;
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([8, 4], 2.5, true)?,
        shared: common.shared("n_shared_experts", 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let adjacent = config.flag_or("rope_interleave", true)?;
    layers(common, &moe, if adjacent { Pairing::Adjacent } else { Pairing::Halves }, 3)
}

/// Latent attention everywhere, and experts from layer `first_k_dense_replace` on.
fn layers(common: Common<'_>, moe: &MoeSpec, pairing: Pairing, default_first: usize) -> Result<Architecture> {
    let config = common.config;
    let nope_dim = config.positive("qk_nope_head_dim")?;
    let rope_dim = config.positive("qk_rope_head_dim")?;
    let mscale = common.rope.attention_mscale()?;
    let attention = LatentAttention {
        heads: common.heads,
        // Only a `null` means a full matrix.
        query_rank: match config.size_opt("q_lora_rank")? {
            None if !config.mentions("q_lora_rank") => Some(1536),
            rank => rank,
        },
        latent_dim: config.positive("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: config.positive("v_head_dim")?,
        bias: config.flag_or("attention_bias", false)?,
        rope: common.rope.rope(rope_dim, pairing)?,
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * mscale * mscale) as f32,
        latent_eps: 1e-6,
    };
    let first = config.size_or("first_k_dense_replace", default_first)?;
    let frequency = config.size_or("moe_layer_freq", 1)?.max(1);
    let width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Latent(attention.clone()),
        feed_forward: feed_forward(l >= first && l.is_multiple_of(frequency), moe, width),
    })
}
