use super::{
    Architecture, Common, Config, Defaults, Error, GroupedAttention, KvHeads, MoeSpec, Names, NormKind,
    Result, Scoring, WeightRule,
};
use super::{moe_layer, window};

/// Phi-3.5-MoE (arXiv 2404.14219).
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        moe: "block_sparse_moe",
        router: ["gate", "router"],
        projections: ["w1", "w3", "w2"],
        ..Names::default()
    };
    let defaults = Defaults { rope_theta: 1e6, kv_heads: KvHeads::Fixed(8), ..Defaults::USUAL };
    let common = Common::read(config, "phimoe", names, defaults)?;
    if common.top_k != 2 {
        let what = format!("is {}, but this router chooses 2 experts", common.top_k);
        return Err(Error::invalid("num_experts_per_tok", what));
    }
    if !["default", "longrope"].contains(&common.rope.kind()) {
        let what = format!("is `{}`; known for this family: default, longrope", common.rope.kind());
        return Err(Error::invalid("rope_scaling.rope_type", what));
    }
    let bias = config.flag_or("attention_bias", false)?;
    let attention =
        GroupedAttention { qkv_bias: bias, output_bias: bias, span: window(config)?, ..common.grouped()? };
    let threshold = (2.0 * config.float_or("router_jitter_noise", 0.01)?) as f32;
    let mut moe: MoeSpec = common.moe(config.positive("intermediate_size")?, WeightRule::Scaled(1.0));
    moe.router.scoring = Scoring::SparseMixer { threshold };
    let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
    architecture.norm = NormKind::Layer { bias: true };
    architecture.head_bias = config.flag_or("lm_head_bias", false)?;
    Ok(architecture)
}
