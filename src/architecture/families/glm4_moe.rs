use super::feed_forward;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, QkNorm, Result, WeightRule,
};

/// GLM-4.5 and its successors (arXiv 2508.06471). Layers for multi-token prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names { shared: "shared_experts", ..Names::default() };
    let defaults = Defaults { rotated: 0.5, kv_heads: KvHeads::Fixed(8), ..Defaults::USUAL };
    let common = Common::read(config, "glm4_moe", names, defaults)?;
    let normed = config.flag_or("use_qk_norm", false)?;
    let attention = GroupedAttention {
        qkv_bias: config.flag_or("attention_bias", false)?,
        qk_norm: if normed { QkNorm::PerHead } else { QkNorm::None },
        ..common.grouped()?
    };
    config.require("scoring_func", "sigmoid")?;
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 1.0, true)?,
        shared: common.shared("n_shared_experts", 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let first = config.size_or("first_k_dense_replace", 1)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(l >= first, &moe, dense_width),
    })
}
