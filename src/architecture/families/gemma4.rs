//! Gemma 4 with experts (Google, 2026): a dense MLP beside routed experts, each part of a layer between norms of its own.

use super::super::ExpertStorage;
use super::{
    Activation, Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupedAttention, KvHeads,
    MoeSpec, Names, NormPlacement, Pairing, QkNorm, Result, RouterSpec, SharedSpec, Span, WeightRule,
};
use super::{FeedForwardSpec, LayerSpec};
use super::{attending_layers, rope_of, within_images};

const DEFAULTS: Defaults = Defaults {
    norm_eps: 1e-6,
    rope_section: Some(
        r#"{"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}"#,
    ),
    kv_heads: KvHeads::Fixed(4),
    head_dim: Some(256),
    tied: true,
    ..Defaults::USUAL
};

/// Gemma 4 as published: the language model within a model of text, images and sounds. Of these, only images would change
/// what text sees of other tokens.
pub(super) fn published(config: &Config) -> Result<Architecture> {
    within_images(config, true, |text| {
        read(text, "gemma4", Names { model: "model.language_model.", ..names() })
    })
}

/// The language model on its own.
pub(super) fn text(config: &Config) -> Result<Architecture> {
    read(config, "gemma4_text", names())
}

fn names() -> Names {
    Names {
        attention_output_norm: "post_attention_layernorm",
        post_attention_norm: "pre_feedforward_layernorm_2",
        feed_forward_output_norm: ["post_feedforward_layernorm"; 2],
        part_norms: [
            "router.scale",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
        ],
        layer_scale: "layer_scalar",
        moe: "",
        fused_moe: "",
        router: ["router.proj"; 2],
        expert_scales: "router.per_expert_scale",
        shared: ["mlp"; 2],
        storage: ExpertStorage::OutputMajor,
        ..Names::default()
    }
}

fn read(config: &Config, family: &'static str, names: Names) -> Result<Architecture> {
    if !config.flag_or("enable_moe_block", false)? {
        return Err(Error::invalid("enable_moe_block", "is not true: a model without experts"));
    }
    config.require("hidden_activation", "gelu_pytorch_tanh")?;
    config.require("num_kv_shared_layers", 0)?;
    if config.size_or("hidden_size_per_layer_input", 256)? != 0 {
        let what = "is not 0: embeddings of their own for each layer are not supported";
        return Err(Error::invalid("hidden_size_per_layer_input", what));
    }
    if config.get("use_bidirectional_attention").is_some_and(|kind| kind != "vision") {
        let what = "is not \"vision\" or null: only images may attend to later tokens";
        return Err(Error::invalid("use_bidirectional_attention", what));
    }
    let section = |kind: &str| match config.section("rope_parameters")? {
        None => Ok(None),
        Some(section) => section.section(kind),
    };
    let common = Common::read_with(config, family, names, DEFAULTS, section("full_attention")?)?;
    let local_rope =
        rope_of(config, Defaults { rope_section: None, ..DEFAULTS }, section("sliding_attention")?)?;
    let local = local_attention(&common)?;
    let layers = common.layers;
    let mut attends =
        attending_layers(config, layers, "sliding_attention", Some(&|l| (l + 1).is_multiple_of(6)))?;
    // Whatever the list says of the last layer.
    attends[layers - 1] = true;
    let keys_as_values = config.flag_or("attention_k_eq_v", false)?;
    let sizes = head_sizes(config, &attends, keys_as_values, &local)?;
    let attention = |(&is_global, &[head_dim, kv_heads]): (&bool, &[usize; 2])| {
        let rope = if is_global { &common.rope } else { &local_rope };
        Ok(GroupedAttention {
            kv_heads,
            head_dim,
            value_dim: head_dim,
            keys_as_values: keys_as_values && is_global,
            rope: Some(rope.of_head(head_dim, Pairing::Halves)?),
            span: if is_global { Span::Full } else { local.span },
            ..local.clone()
        })
    };
    let attention = attends.iter().zip(&sizes).map(attention).collect::<Result<Vec<_>>>()?;
    let moe = MoeSpec {
        activation: Activation::GeGluTanh,
        router: RouterSpec {
            expert_scales: true,
            ..RouterSpec::softmax(common.top_k, WeightRule::RENORMALISED)
        },
        shared: Some(SharedSpec::of_width(config.positive("intermediate_size")?)),
        ..common.moe(config.positive("moe_intermediate_size")?, WeightRule::RENORMALISED)
    };
    let embedding_scale = (common.hidden_size as f64).sqrt() as f32;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention[l].clone()),
        feed_forward: FeedForwardSpec::Moe(moe.clone()),
    })?;
    architecture.norm_placement = NormPlacement::AroundParts;
    architecture.dense_activation = Activation::GeGluTanh;
    architecture.embedding_scale = embedding_scale;
    architecture.layer_scales = true;
    architecture.logit_cap = config.above_zero("final_logit_softcapping")?.map(|cap| cap as f32);
    Ok(architecture)
}

fn local_attention(common: &Common<'_>) -> Result<GroupedAttention> {
    let config = common.config;
    let bias = config.flag_or("attention_bias", false)?;
    Ok(GroupedAttention {
        value_norm: true,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        span: Span::Window(config.positive_or("sliding_window", 512)?),
        scale: 1.0,
        ..common.grouped()?
    })
}

/// Width and number of the key heads of every layer: those that attend to all have wider ones, and where keys are values
/// fewer; or as in the list that transformers 5 writes instead.
fn head_sizes(
    config: &Config,
    attends: &[bool],
    keys_as_values: bool,
    local: &GroupedAttention,
) -> Result<Vec<[usize; 2]>> {
    let usual = [local.head_dim, local.kv_heads];
    let Some(listed) = config.section("per_layer_config")? else {
        let head_dim = config.positive_or("global_head_dim", 512)?;
        let heads = config.size_opt("num_global_key_value_heads")?.filter(|_| keys_as_values);
        let global = [head_dim, heads.unwrap_or(local.kv_heads)];
        return Ok(attends.iter().map(|&is_global| if is_global { global } else { usual }).collect());
    };
    let own = |l: usize| {
        let Some(own) = listed.section(&l.to_string())? else { return Ok(usual) };
        if let Some(key) = own.keys().find(|key| !["head_dim", "num_key_value_heads"].contains(key)) {
            return Err(Error::invalid(&format!("per_layer_config.{l}.{key}"), "is not supported"));
        }
        Ok([own.positive_or("head_dim", usual[0])?, own.positive_or("num_key_value_heads", usual[1])?])
    };
    (0..attends.len()).map(own).collect()
}
