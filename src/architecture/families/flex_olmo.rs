use super::{Architecture, Common, Config, Defaults, GroupedAttention, Names, NormPlacement, QkNorm, Result};
use super::{moe_layer, weight_rule};

/// FlexOlmo (arXiv 2507.07024): the experts of OLMoE in layers with the norms of OLMo 2.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        attention_output_norm: "post_attention_layernorm",
        feed_forward_output_norm: ["post_feedforward_layernorm"; 2],
        ..Names::default()
    };
    let defaults = Defaults { rope_theta: 500_000.0, norm_eps: 1e-6, max_positions: 4096, ..Defaults::USUAL };
    let common = Common::read(config, "flex_olmo", names, defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention =
        GroupedAttention { qkv_bias: bias, output_bias: bias, qk_norm: QkNorm::Whole, ..common.grouped()? };
    let moe = common.moe(config.positive("intermediate_size")?, weight_rule(config, false)?);
    let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
    architecture.norm_placement = NormPlacement::Behind;
    Ok(architecture)
}
