use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, QkNorm, Result, RouterSpec,
};
use super::{expert_layers, feed_forward, scaled_rule};

/// Hunyuan 3 (2026): the attention of Qwen3 and the router of DeepSeek-V3, without groups. Layers for multi-token
/// prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        router: ["router.gate", "gate"],
        choice_bias: ["expert_bias", "e_score_correction_bias"],
        shared: ["shared_mlp", "shared_experts"],
        ..Names::default()
    };
    let defaults = Defaults {
        rope_theta: 11_158_840.0,
        kv_heads: KvHeads::Fixed(8),
        head_dim: Some(128),
        ..Defaults::USUAL
    };
    for key in ["qk_norm", "moe_router_use_sigmoid", "route_norm"] {
        config.require(key, true)?;
    }
    let common = Common::read(config, "hy_v3", names, defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention =
        GroupedAttention { qkv_bias: bias, output_bias: bias, qk_norm: QkNorm::PerHead, ..common.grouped()? };
    let scale = config.float_or("router_scaling_factor", 2.826)? as f32;
    let weights = scaled_rule(true, scale);
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: RouterSpec::biased_sigmoid(common.top_k, weights),
        shared: common.shared("num_shared_experts", 1, width)?,
        ..common.moe(width, weights)
    };
    let sparse = expert_layers(config, common.layers, config.size_or("first_k_dense_replace", 1)?)?;
    let dense_width = config.positive("intermediate_size")?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse[l], &moe, dense_width),
    })?;
    architecture.mlp_bias = config.flag_or("mlp_bias", false)?;
    Ok(architecture)
}
