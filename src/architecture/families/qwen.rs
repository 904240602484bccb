use super::super::ExpertStorage;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, Pairing, QkNorm, Result, SharedSpec, Span, WeightRule,
};
use super::{
    attending_layers, expert_layers, feed_forward, required_section, rope_of, weight_rule, window,
    within_images,
};

const DEFAULTS: Defaults = Defaults { norm_eps: 1e-6, max_positions: 32768, ..Defaults::USUAL };

/// Which layers of a Qwen model have experts: not in `mlp_only_layers`, and every `decoder_sparse_step`-th.
pub(super) fn sparse_layers(config: &Config) -> Result<impl Fn(usize) -> bool + use<>> {
    let dense = config.sizes("mlp_only_layers")?.unwrap_or_default();
    let step = config.size_or("decoder_sparse_step", 1)?.max(1);
    Ok(move |l: usize| !dense.contains(&l) && (l + 1).is_multiple_of(step))
}

/// The window of a Qwen model, where it is switched on.
fn sliding_window(config: &Config) -> Result<Span> {
    match config.flag_or("use_sliding_window", false)? {
        false => Ok(Span::Full),
        true if config.mentions("sliding_window") => window(config),
        true => Ok(Span::Window(4096)),
    }
}

/// Qwen1.5-MoE and Qwen2-57B-A14B (arXiv 2407.10671).
pub(super) fn qwen2(config: &Config) -> Result<Architecture> {
    let names = Names { shared: ["shared_expert"; 2], ..Names::default() };
    let defaults = Defaults { kv_heads: KvHeads::Fixed(16), ..DEFAULTS };
    let common = Common::read(config, "qwen2_moe", names, defaults)?;
    let attention = GroupedAttention { qkv_bias: config.flag_or("qkv_bias", true)?, ..common.grouped()? };
    let window = sliding_window(config)?;
    let first_full = config.size_or("max_window_layers", 28)?;
    let layer_types = config.strings("layer_types")?;
    let slides = |l: usize| match &layer_types {
        Some(types) => types.get(l).is_some_and(|t| t == "sliding_attention"),
        // As transformers 5 fills in the types that a config leaves out.
        None => l.is_multiple_of(2) && l < first_full,
    };
    let shared_width = config.positive("shared_expert_intermediate_size")?;
    let moe = MoeSpec {
        shared: Some(SharedSpec { gated: true, ..SharedSpec::of_width(shared_width) }),
        ..common.moe(config.positive("moe_intermediate_size")?, weight_rule(config, false)?)
    };
    let sparse = sparse_layers(config)?;
    let width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(GroupedAttention {
            span: if slides(l) { window } else { Span::Full },
            ..attention.clone()
        }),
        feed_forward: feed_forward(sparse(l), &moe, width),
    })
}

/// Qwen3-VL: the language model within a model of text and images. Text alone has the same positions on every axis of its
/// rotation.
pub(super) fn qwen3_vl(config: &Config) -> Result<Architecture> {
    within_images(config, false, |text| {
        let names =
            Names { model: "model.language_model.", storage: ExpertStorage::Transposed, ..Names::default() };
        let defaults = Defaults {
            rope_theta: 500_000.0,
            max_positions: 128_000,
            kv_heads: KvHeads::Fixed(16),
            ..DEFAULTS
        };
        text.require("norm_topk_prob", true)?;
        let common = Common::read(text, "qwen3_vl_moe", names, defaults)?;
        qwen3_layers(common, Span::Full, WeightRule::RENORMALISED)
    })
}

/// Qwen3-Omni: the language model of the thinker, within a model that hears, sees and speaks. Text alone has the same
/// positions on every axis of its rotation.
pub(super) fn qwen3_omni(config: &Config) -> Result<Architecture> {
    const SECTION: &[&str] = &["thinker_config", "text_config"];
    let mut architecture = within_images(&required_section(config, SECTION[0])?, false, |text| {
        let names = Names {
            model: "thinker.model.",
            head: "thinker.lm_head",
            other_model: Some(["thinker.model.language_model.", "thinker.lm_head"]),
            ..Names::default()
        };
        let defaults = Defaults { rope_theta: 1e6, kv_heads: KvHeads::Fixed(4), ..DEFAULTS };
        let common = Common::read(text, "qwen3_omni_moe", names, defaults)?;
        qwen3_layers(common, Span::Full, weight_rule(text, true)?)
    })?;
    architecture.config_section = SECTION;
    Ok(architecture)
}

/// Mellum 2 (JetBrains, 2026): Qwen3 MoE with a rotation for each kind of attention.
pub(super) fn mellum(config: &Config) -> Result<Architecture> {
    let defaults = Defaults {
        rope_theta: 500_000.0,
        max_positions: 131_072,
        kv_heads: KvHeads::Fixed(4),
        head_dim: Some(128),
        ..DEFAULTS
    };
    let section = |kind: &str| match config.section("rope_parameters")? {
        None => Ok(None),
        Some(section) => section.section(kind),
    };
    let full_rope = section("full_attention")?;
    let common = Common::read_with(config, "mellum", Names::default(), defaults, full_rope)?;
    let sliding = Defaults { rope_theta: 10_000.0, ..defaults };
    let sliding_rope = rope_of(config, sliding, section("sliding_attention")?)?;
    let bias = config.flag_or("attention_bias", false)?;
    let full =
        GroupedAttention { qkv_bias: bias, output_bias: bias, qk_norm: QkNorm::PerHead, ..common.grouped()? };
    let sliding = GroupedAttention {
        rope: Some(sliding_rope.of_head(full.head_dim, Pairing::Halves)?),
        span: if config.mentions("sliding_window") { window(config)? } else { Span::Window(1024) },
        ..full.clone()
    };
    let moe = common.moe(config.positive("moe_intermediate_size")?, weight_rule(config, true)?);
    let attends = attending_layers(config, common.layers, "sliding_attention", Some(&|_| true))?;
    let sparse = expert_layers(config, common.layers, 0)?;
    let width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(if attends[l] { full.clone() } else { sliding.clone() }),
        feed_forward: feed_forward(sparse[l], &moe, width),
    })
}

/// Qwen3 MoE (arXiv 2505.09388).
pub(super) fn qwen3(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { kv_heads: KvHeads::Fixed(4), ..DEFAULTS };
    let common = Common::read(config, "qwen3_moe", Names::default(), defaults)?;
    qwen3_layers(common, sliding_window(config)?, weight_rule(config, false)?)
}

/// Attention with a norm of each query and key head, and experts where the config says.
fn qwen3_layers(common: Common<'_>, span: Span, weights: WeightRule) -> Result<Architecture> {
    let config = common.config;
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        span,
        ..common.grouped()?
    };
    let moe = common.moe(config.positive("moe_intermediate_size")?, weights);
    let sparse = sparse_layers(config)?;
    let width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse(l), &moe, width),
    })
}
