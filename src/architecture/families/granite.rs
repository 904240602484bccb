//! Granite MoE (IBM, 2024): factors of embeddings, scores, residual stream and logits.

use super::super::ExpertStorage;
use super::moe_layer;
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, Error, GroupedAttention, LayerSpec,
    MoeSpec, Names, Result, RouterSpec, SharedSpec, WeightRule,
};

/// Granite 3.0 and 3.1 with experts.
pub(super) fn plain(config: &Config) -> Result<Architecture> {
    read(config, "granitemoe", 0)
}

/// The same with a shared expert.
pub(super) fn shared(config: &Config) -> Result<Architecture> {
    let width = config.size_or("shared_intermediate_size", 0)?;
    read(config, "granitemoeshared", width)
}

/// Granite 4.0, where all layers attend.
pub(super) fn hybrid(config: &Config) -> Result<Architecture> {
    for key in ["layer_types", "layers_block_type"] {
        let kinds = config.strings(key)?.unwrap_or_default();
        if let Some(kind) =
            kinds.iter().find(|kind| !["attention", "full_attention"].contains(&kind.as_str()))
        {
            return Err(Error::invalid(key, format!("has `{kind}` layers, only \"attention\" is supported")));
        }
    }
    if config.first(&["layer_types", "layers_block_type"]).is_none() {
        let what = "is missing, which means Mamba layers; only \"attention\" layers are supported";
        return Err(Error::invalid("layer_types", what));
    }
    let width = config.positive_or("shared_intermediate_size", 1024)?;
    let mut architecture = read(config, "granitemoehybrid", width)?;
    // Only the word "rope" switches positions on.
    if config.get("position_embedding_type").and_then(|v| v.as_str()) != Some("rope") {
        for LayerSpec { attention, .. } in &mut architecture.layers {
            if let AttentionSpec::Grouped(attention) = attention {
                attention.rope = None;
            }
        }
    }
    Ok(architecture)
}

fn read(config: &Config, family: &'static str, shared_width: usize) -> Result<Architecture> {
    let names = Names {
        moe: "block_sparse_moe",
        fused_moe: "block_sparse_moe",
        router: ["router.layer", "router"],
        fused: [
            ["input_linear.weight", "experts.gate_up_proj"],
            ["output_linear.weight", "experts.down_proj"],
        ],
        shared_gate_up: Some(["shared_mlp.input_linear", "shared_mlp.output_linear"]),
        storage: ExpertStorage::OutputMajor,
        ..Names::default()
    };
    let defaults = Defaults { norm_eps: 1e-6, max_positions: 2048, ..Defaults::USUAL };
    let common = Common::read(config, family, names, defaults)?;
    let factor = |key: &str| config.float_or(key, 1.0);
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        scale: factor("attention_multiplier")? as f32,
        ..common.grouped()?
    };
    // The largest logits, and the softmax over them alone: the renormalised softmax over all.
    let moe = MoeSpec {
        router: RouterSpec {
            choice: Choice::Logit,
            ..RouterSpec::softmax(common.top_k, WeightRule::RENORMALISED)
        },
        shared: (shared_width > 0).then_some(SharedSpec::of_width(shared_width)),
        ..common.moe(config.positive("intermediate_size")?, WeightRule::RENORMALISED)
    };
    let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
    architecture.embedding_scale = factor("embedding_multiplier")? as f32;
    architecture.residual_scale = factor("residual_multiplier")? as f32;
    architecture.head_scale = (1.0 / config.above_zero("logits_scaling")?.unwrap_or(1.0)) as f32;
    Ok(architecture)
}
