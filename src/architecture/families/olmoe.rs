use super::{Architecture, Common, Config, Defaults, GroupedAttention, Names, QkNorm, Result};
use super::{moe_layer, weight_rule};

/// OLMoE (arXiv 2409.02060); `intermediate_size` is the width of one expert.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 4096, ..Defaults::USUAL };
    let common = Common::read(config, "olmoe", Names::default(), defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Whole,
        clip: config.above_zero("clip_qkv")?.map(|c| c as f32),
        ..common.grouped()?
    };
    let moe = common.moe(config.positive("intermediate_size")?, weight_rule(config, false)?);
    common.architecture(|_| moe_layer(&attention, &moe))
}
