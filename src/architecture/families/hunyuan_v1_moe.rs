use super::moe_layer;
use super::{
    Architecture, Common, Config, Defaults, Error, GroupedAttention, MoeSpec, Names, Pairing, QkNorm, Result,
    SharedSpec, WeightRule,
};

/// Hunyuan-A13B (2025): every layer has experts and a shared one of their width. Lists with a number for every layer have to
/// repeat one number.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        router: ["gate.wg"; 2],
        qk_norms: ["query_layernorm", "key_layernorm"],
        shared: ["shared_mlp"; 2],
        ..Names::default()
    };
    for key in ["use_cla", "mlp_bias", "use_mla"] {
        config.require(key, false)?;
    }
    for key in ["use_qk_norm", "use_mixed_mlp_moe", "norm_topk_prob"] {
        config.require(key, true)?;
    }
    config.require("moe_layer_num_skipped", 0)?;
    let width = config.positive("intermediate_size")?;
    for (key, expected) in [("moe_intermediate_size", width), ("num_shared_expert", 1)] {
        if let Some(size) = config.uniform_size(key)?.filter(|size| *size != expected) {
            return Err(Error::invalid(key, format!("is {size}, only {expected} is supported here")));
        }
    }
    let common =
        Common::read(config, "hunyuan_v1_moe", names, Defaults { max_positions: 2048, ..Defaults::USUAL })?;
    let bias = config.flag_or("attention_bias", false)?;
    let head_dim = common.head_dim()?;
    let common = Common { rope: common.rope.with_alpha(head_dim)?, ..common };
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHeadRotated,
        rope: Some(common.rope.rope(head_dim, Pairing::Halves)?),
        ..common.grouped()?
    };
    let moe =
        MoeSpec { shared: Some(SharedSpec::of_width(width)), ..common.moe(width, WeightRule::RENORMALISED) };
    common.architecture(|_| moe_layer(&attention, &moe))
}
