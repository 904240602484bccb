use super::moe_layer;
use super::{
    Architecture, Common, Config, Defaults, Error, GroupedAttention, KvHeads, MoeSpec, Names, QkNorm, Result,
    RouterSpec, WeightRule,
};

/// `MiniMax`-M2 (2025). Published configs say with `rotary_dim` how much of a head is rotated, which transformers 5.17 passes
/// over (transformers issue 48241). Modules for multi-token prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        moe: "block_sparse_moe",
        choice_bias: ["e_score_correction_bias"; 2],
        projections: ["w1", "w3", "w2"],
        ..Names::default()
    };
    let head_dim = config.positive_or("head_dim", 128)?;
    let rotated = config.positive_or("rotary_dim", head_dim)?;
    if rotated > head_dim {
        let what = format!("is {rotated}, expected at most head_dim = {head_dim}");
        return Err(Error::invalid("rotary_dim", what));
    }
    let defaults = Defaults {
        rope_theta: 5e6,
        // In the middle of what is rounded down to this number, lest the quotient fall short of it.
        rotated: ((rotated as f64 + 0.5) / head_dim as f64).min(1.0),
        norm_eps: 1e-6,
        max_positions: 196_608,
        kv_heads: KvHeads::Fixed(8),
        head_dim: Some(128),
        ..Defaults::USUAL
    };
    config.require("scoring_func", "sigmoid")?;
    config.require("qk_norm_type", "per_layer")?;
    for key in ["use_routing_bias", "use_qk_norm"] {
        config.require(key, true)?;
    }
    for key in ["shared_intermediate_size", "sliding_window"] {
        config.require(key, 0)?;
    }
    if config.sizes("attn_type_list")?.is_some_and(|kinds| kinds.iter().any(|&kind| kind != 1)) {
        return Err(Error::invalid(
            "attn_type_list",
            "has layers without softmax attention; expected 1 only",
        ));
    }
    let common = Common::read(config, "minimax_m2", names, defaults)?;
    let attention = GroupedAttention { qk_norm: QkNorm::Whole, ..common.grouped()? };
    let moe = MoeSpec {
        router: RouterSpec::biased_sigmoid(common.top_k, WeightRule::RENORMALISED),
        ..common.moe(config.positive("intermediate_size")?, WeightRule::RENORMALISED)
    };
    common.architecture(|_| moe_layer(&attention, &moe))
}
