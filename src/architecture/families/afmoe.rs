use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, LayerSpec, MoeSpec, Names,
    NormPlacement, OutputGate, QkNorm, Result, RouterSpec, Span,
};
use super::{attending_layers, feed_forward, scaled_rule, window};

/// Trinity (AFMoE, Arcee 2025): norms around attention and experts, gated attention, and no positions in layers that attend
/// to everything.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        attention_output_norm: "post_attention_layernorm",
        post_attention_norm: "pre_mlp_layernorm",
        feed_forward_output_norm: ["post_mlp_layernorm"; 2],
        router: ["router.gate"; 2],
        choice_bias: ["expert_bias"; 2],
        shared: ["shared_experts"; 2],
        ..Names::default()
    };
    let defaults = Defaults { max_positions: 16384, head_dim: Some(128), ..Defaults::USUAL };
    let common = Common::read(config, "afmoe", names, defaults)?;
    config.require("score_func", "sigmoid")?;
    config.require("route_norm", true)?;
    for key in ["n_group", "topk_group", "num_expert_groups", "num_limited_groups"] {
        config.require(key, 1)?;
    }
    let bias = config.flag_or("attention_bias", false)?;
    let window = if config.mentions("sliding_window") { window(config)? } else { Span::Window(1024) };
    let local = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        span: window,
        output_gate: OutputGate::Separate,
        ..common.grouped()?
    };
    let global = GroupedAttention { rope: None, span: Span::Full, ..local.clone() };
    let every = config.positive_or("global_attn_every_n_layers", 4)?;
    let is_global = |l: usize| (l + 1).is_multiple_of(every);
    let attends = attending_layers(config, common.layers, "sliding_attention", Some(&is_global))?;
    let scale = config.float_or("route_scale", 1.0)? as f32;
    let weights = scaled_rule(true, scale);
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: RouterSpec::biased_sigmoid(common.top_k, weights),
        shared: common.shared("num_shared_experts", 2, width)?,
        ..common.moe(width, weights)
    };
    let first = config.size_or("num_dense_layers", 1)?;
    let dense_width = config.positive("intermediate_size")?;
    let hidden_size = common.hidden_size;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(if attends[l] { global.clone() } else { local.clone() }),
        feed_forward: feed_forward(l >= first, &moe, dense_width),
    })?;
    architecture.norm_placement = NormPlacement::Around;
    if config.flag_or("mup_enabled", false)? {
        architecture.embedding_scale = (hidden_size as f64).sqrt() as f32;
    }
    Ok(architecture)
}
