use super::super::{DeltaProjections, GatedDelta, LatentAttention};
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, LayerSpec, MoeSpec, Names, Result,
    RouterSpec, WeightRule,
};
use super::{feed_forward, group_limit, scaled_rule};

/// Kimi Linear (arXiv 2510.26692): layers of Kimi Delta Attention, with latent attention without positions among them.
/// Keys have the names of the published config or those of transformers.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        moe: "block_sparse_moe",
        projections: ["w1", "w3", "w2"],
        shared: ["shared_experts"; 2],
        delta: "self_attn",
        ..Names::default()
    };
    let common = Common::read(config, "kimi_linear", names, Defaults::USUAL)?;
    let key = |names: [&'static str; 2]| config.first(&names).unwrap_or(names[0]);
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: router(&common, key)?,
        shared: common.shared(key(["num_shared_experts", "n_shared_experts"]), 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let latent = AttentionSpec::Latent(latent(&common)?);
    let delta = AttentionSpec::GatedDelta(delta(config)?);
    let attends = attending_layers(config, common.layers)?;
    let sparse = sparse_layers(config, common.layers)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: if attends[l] { latent.clone() } else { delta.clone() },
        feed_forward: feed_forward(sparse[l], &moe, dense_width),
    })
}

/// As DeepSeek-V3's, under other names.
fn router(common: &Common<'_>, key: impl Fn([&'static str; 2]) -> &'static str) -> Result<RouterSpec> {
    let config = common.config;
    config.require("moe_router_activation_func", "sigmoid")?;
    let scale = config.float_or("routed_scaling_factor", 2.446)? as f32;
    let weights = scaled_rule(config.flag_or(key(["moe_renormalize", "norm_topk_prob"]), true)?, scale);
    let groups = group_limit(config, key(["num_expert_group", "n_group"]), [1, 1])?;
    Ok(RouterSpec { groups, ..RouterSpec::biased_sigmoid(common.top_k, weights) })
}

fn latent(common: &Common<'_>) -> Result<LatentAttention> {
    let config = common.config;
    if !config.flag_or("mla_use_nope", true)? {
        return Err(Error::invalid("mla_use_nope", "is false, only true is supported here"));
    }
    let nope_dim = config.positive_or("qk_nope_head_dim", 128)?;
    let rope_dim = config.positive_or("qk_rope_head_dim", 64)?;
    Ok(LatentAttention {
        heads: common.heads,
        query_rank: config.size_opt("q_lora_rank")?,
        latent_dim: config.positive_or("kv_lora_rank", 512)?,
        nope_dim,
        rope_dim,
        value_dim: config.positive_or("v_head_dim", 128)?,
        bias: config.flag_or("attention_bias", false)?,
        rope: None,
        scale: ((nope_dim + rope_dim) as f64).powf(-0.5) as f32,
        temperature: None,
        latent_eps: 1e-6,
    })
}

/// Section of a published config that speaks of Kimi Delta Attention.
const SECTION: &str = "linear_attn_config";

/// Its sizes, in the section or beside it.
fn delta(config: &Config) -> Result<GatedDelta> {
    let section = config.section(SECTION)?;
    let size = |inside: &str, beside: &str, default: usize| match &section {
        Some(section) if section.get(inside).is_some() => section.positive(inside),
        _ => config.positive_or(beside, default),
    };
    let heads = size("num_heads", "linear_num_heads", 32)?;
    let dim = size("head_dim", "linear_head_dim", 128)?;
    Ok(GatedDelta {
        key_heads: heads,
        value_heads: heads,
        key_dim: dim,
        value_dim: dim,
        kernel: size("short_conv_kernel_size", "linear_conv_kernel_dim", 4)?,
        kimi: true,
        projections: DeltaProjections::LowRankGates,
    })
}

/// Whether each layer attends to all earlier tokens: by `layer_types`, or as the section lists layers, from 1 on.
fn attending_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    let section = config.section(SECTION)?;
    let (full, delta) = match &section {
        Some(section) => (section.sizes("full_attn_layers")?, section.sizes("kda_layers")?),
        None => (None, None),
    };
    let (Some(full), Some(delta)) = (full, delta) else {
        let every_fourth = |l: usize| l > 0 && l.is_multiple_of(4);
        return super::attending_layers(config, layers, "linear_attention", Some(&every_fourth));
    };
    let attends = |l: usize| match (full.contains(&(l + 1)), delta.contains(&(l + 1))) {
        (true, false) => Ok(true),
        (false, true) => Ok(false),
        (both, _) => {
            let lists = if both { "both" } else { "neither" };
            let what = format!("lists layer {} in {lists} of full_attn_layers and kda_layers", l + 1);
            Err(Error::invalid(SECTION, what))
        }
    };
    (0..layers).map(attends).collect()
}

/// Whether each layer has experts: by `mlp_layer_types`, or from `first_k_dense_replace` on.
fn sparse_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    const KEY: &str = "mlp_layer_types";
    let Some(types) = config.strings(KEY)? else {
        let first = config.size_or("first_k_dense_replace", 1)?;
        let frequency = config.positive_or("moe_layer_freq", 1)?;
        return Ok((0..layers).map(|l| l >= first && l.is_multiple_of(frequency)).collect());
    };
    let sparse: Vec<bool> = types.iter().map(|kind| kind == "sparse").collect();
    let known = types.iter().all(|kind| ["sparse", "dense"].contains(&kind.as_str()));
    if known && types.len() == layers {
        return Ok(sparse);
    }
    Err(Error::invalid(KEY, format!("expected `dense` or `sparse` for each of {layers} layers")))
}
