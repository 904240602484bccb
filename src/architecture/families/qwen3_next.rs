use super::super::{DeltaProjections, ExpertStorage, GatedDelta};
use super::qwen::sparse_layers;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, FeedForwardSpec, GroupedAttention, KvHeads,
    LayerSpec, MoeSpec, Names, OutputGate, QkNorm, Result, SharedSpec, WeightRule,
};
use super::{TEXT_SECTION, attending_layers, feed_forward, required_section, weight_rule};

const DEFAULTS: Defaults = Defaults {
    rotated: 0.25,
    norm_eps: 1e-6,
    max_positions: 32768,
    kv_heads: KvHeads::Fixed(2),
    head_dim: Some(256),
    ..Defaults::USUAL
};

/// Qwen3-Next: three layers of gated delta networks, then one of gated attention, and so on.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let common = Common::read(config, "qwen3_next", names(), DEFAULTS)?;
    let moe = moe(&common, weight_rule(config, true)?)?;
    let sparse = sparse_layers(config)?;
    let dense_width = config.positive_or("intermediate_size", 5632)?;
    architecture(common, DeltaProjections::ByKeyHead, |l| feed_forward(sparse(l), &moe, dense_width))
}

/// Qwen3.5 as published: the language model within a model of text and images.
pub(super) fn published(config: &Config) -> Result<Architecture> {
    let text = required_section(config, TEXT_SECTION[0])?;
    let names =
        Names { model: "model.language_model.", other_model: Some(["model.", "lm_head"]), ..text_names() };
    let mut architecture = read_text(&text, "qwen3_5_moe", names)?;
    architecture.config_section = TEXT_SECTION;
    architecture.tied_embeddings = config.flag_or("tie_word_embeddings", false)?;
    Ok(architecture)
}

/// The language model of Qwen3.5 on its own; its tensors may keep the names that they have in the whole model.
pub(super) fn text(config: &Config) -> Result<Architecture> {
    let names = Names { other_model: Some(["model.language_model.", "lm_head"]), ..text_names() };
    read_text(config, "qwen3_5_moe_text", names)
}

fn read_text(config: &Config, family: &'static str, names: Names) -> Result<Architecture> {
    let common = Common::read(config, family, names, DEFAULTS)?;
    let moe = moe(&common, WeightRule::RENORMALISED)?;
    architecture(common, DeltaProjections::Separate, |_| FeedForwardSpec::Moe(moe.clone()))
}

fn names() -> Names {
    Names { shared: ["shared_expert"; 2], ..Names::default() }
}

fn text_names() -> Names {
    Names { storage: ExpertStorage::OutputMajor, ..names() }
}

fn moe(common: &Common<'_>, weights: WeightRule) -> Result<MoeSpec> {
    let config = common.config;
    let shared = config.positive_or("shared_expert_intermediate_size", 512)?;
    Ok(MoeSpec {
        shared: Some(SharedSpec { gated: true, ..SharedSpec::of_width(shared) }),
        ..common.moe(config.positive_or("moe_intermediate_size", 512)?, weights)
    })
}

fn architecture(
    common: Common<'_>,
    projections: DeltaProjections,
    feed_forward: impl Fn(usize) -> FeedForwardSpec,
) -> Result<Architecture> {
    let config = common.config;
    let bias = config.flag_or("attention_bias", false)?;
    let attention = AttentionSpec::Grouped(GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        output_gate: OutputGate::BehindQuery,
        ..common.grouped()?
    });
    let delta = AttentionSpec::GatedDelta(GatedDelta {
        key_heads: config.positive_or("linear_num_key_heads", 16)?,
        value_heads: config.positive_or("linear_num_value_heads", 32)?,
        key_dim: config.positive_or("linear_key_head_dim", 128)?,
        value_dim: config.positive_or("linear_value_head_dim", 128)?,
        kernel: config.positive_or("linear_conv_kernel_dim", 4)?,
        kimi: false,
        projections,
    });
    let interval = config.positive_or("full_attention_interval", 4)?;
    let every = |l: usize| (l + 1).is_multiple_of(interval);
    let attends = attending_layers(config, common.layers, "linear_attention", Some(&every))?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: if attends[l] { attention.clone() } else { delta.clone() },
        feed_forward: feed_forward(l),
    })?;
    architecture.zero_centred_norms = true;
    Ok(architecture)
}
