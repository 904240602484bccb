use super::super::ExpertStorage;
use super::{Architecture, Common, Config, Defaults, GroupedAttention, Names, NormKind, Result};
use super::{moe_layer, renormalised_if, required_section, rope_of};

/// Section of the config with the keys of the experts.
const EXPERTS: &[&str] = &["ffn_config"];

/// DBRX (Databricks, 2024): one clamped projection to queries, keys and values, layer norms without biases, and experts one
/// below the other.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let attention = required_section(config, "attn_config")?;
    let experts = required_section(config, EXPERTS[0])?;
    if let Some(activation) = experts.section("ffn_act_fn")? {
        activation.require("name", "silu")?;
    }
    let renormalised = experts.mentions("moe_normalize_expert_weights").then(|| {
        experts.require("moe_normalize_expert_weights", 1)?;
        Ok(experts.get("moe_normalize_expert_weights").is_some())
    });
    let renormalised = renormalised.transpose()?.unwrap_or(true);
    let defaults = Defaults { max_positions: config.size_or("max_seq_len", 2048)?, ..Defaults::USUAL };
    // transformers 5 reads the base of the rotation here and then takes another, which no published model was trained with.
    let rope = match attention.float_opt("rope_theta")? {
        Some(rope_theta) => rope_of(&attention, Defaults { rope_theta, ..defaults }, None)?,
        None => rope_of(config, defaults, config.section("rope_parameters")?)?,
    };
    let common = Common {
        config,
        family: "dbrx",
        defaults,
        hidden_size: config.positive("d_model")?,
        layers: config.positive("n_layers")?,
        heads: config.positive("n_heads")?,
        rope,
        names: names(),
        expert_count_keys: vec!["moe_num_experts"],
        experts: experts.positive("moe_num_experts")?,
        top_k: experts.positive("moe_top_k")?,
        norm_eps: 1e-5,
    };
    let attention = GroupedAttention {
        kv_heads: attention.positive_or("kv_n_heads", 1)?,
        clip: attention.above_zero("clip_qkv")?.map(|c| c as f32),
        ..common.grouped()?
    };
    let moe = common.moe(experts.positive("ffn_hidden_size")?, renormalised_if(renormalised));
    let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
    architecture.norm = NormKind::Layer { bias: false };
    architecture.config_section = EXPERTS;
    Ok(architecture)
}

fn names() -> Names {
    Names {
        model: "transformer.",
        embedding: "wte",
        layers: "blocks",
        input_norm: "norm_attn_norm.norm_1",
        post_attention_norm: "norm_attn_norm.norm_2",
        final_norm: "norm_f",
        attention: "norm_attn_norm.attn",
        fused_qkv: Some("Wqkv"),
        attention_output: "out_proj",
        moe: "ffn",
        fused_moe: "ffn",
        router: ["router.layer"; 2],
        projections: ["w1", "v1", "w2"],
        storage: ExpertStorage::Stacked,
        ..Names::default()
    }
}
