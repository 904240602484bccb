use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, QkNorm, Result, WeightRule,
};
use super::{feed_forward, within_images};

/// GLM-4.5 and its successors (arXiv 2508.06471). Layers for multi-token prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let common = Common::read(config, "glm4_moe", names(), DEFAULTS)?;
    let normed = config.flag_or("use_qk_norm", false)?;
    let first = config.size_or("first_k_dense_replace", 1)?;
    layers(common, if normed { QkNorm::PerHead } else { QkNorm::None }, first)
}

/// GLM-4.5V: the language model within a model of text and images. Text alone has the same positions on every axis of its
/// rotation.
pub(super) fn of_images(config: &Config) -> Result<Architecture> {
    let mut tied = false;
    let mut architecture = within_images(config, false, |text| {
        tied = text.flag_or("tie_word_embeddings", false)?;
        let defaults = Defaults { max_positions: 65536, ..DEFAULTS };
        let names = Names { model: "model.language_model.", ..names() };
        let common = Common::read(text, "glm4v_moe", names, defaults)?;
        let first = text.size_or("first_k_dense_replace", 1)?;
        layers(common, QkNorm::None, first)
    })?;
    // Older files say it of the language model alone.
    architecture.tied_embeddings |= tied;
    Ok(architecture)
}

/// Solar Open (Upstage, 2026): GLM-4.5 rotated as a whole, with experts in every layer.
pub(super) fn solar(config: &Config) -> Result<Architecture> {
    config.require("use_qk_norm", false)?;
    config.require("first_k_dense_replace", 0)?;
    let defaults = Defaults { rope_theta: 1e6, rotated: 1.0, head_dim: Some(128), ..DEFAULTS };
    layers(Common::read(config, "solar_open", names(), defaults)?, QkNorm::None, 0)
}

const DEFAULTS: Defaults = Defaults { rotated: 0.5, kv_heads: KvHeads::Fixed(8), ..Defaults::USUAL };

fn names() -> Names {
    Names { shared: ["shared_experts"; 2], ..Names::default() }
}

/// Grouped-query attention everywhere, and experts from layer `first` on.
fn layers(common: Common<'_>, qk_norm: QkNorm, first: usize) -> Result<Architecture> {
    let config = common.config;
    let attention = GroupedAttention {
        qkv_bias: config.flag_or("attention_bias", common.family == "glm4v_moe")?,
        qk_norm,
        ..common.grouped()?
    };
    config.require("scoring_func", "sigmoid")?;
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 1.0, true)?,
        shared: common.shared("n_shared_experts", 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let dense_width = match first {
        0 => width,
        _ => config.positive("intermediate_size")?,
    };
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(l >= first, &moe, dense_width),
    })
}
