use super::super::ExpertStorage;
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, Error, GroupedAttention, KvHeads,
    LayerSpec, MoeSpec, Names, Pairing, Result, RouterSpec, WeightRule,
};
use super::{expert_layers, feed_forward, layer_count, within_images};

const DEFAULTS: Defaults = Defaults { rope_theta: 500_000.0, tied: true, ..Defaults::USUAL };

/// ERNIE 4.5 text models (ERNIE 4.5 Technical Report, 2025).
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        shared: ["shared_experts"; 2],
        choice_bias: ["moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"],
        choice_bias_is_row: true,
        ..Names::default()
    };
    let common = Common::read(config, "ernie4_5_moe", names, DEFAULTS)?;
    let start = config.size_or("moe_layer_start_index", 1)?;
    let interval = config.size_or("moe_layer_interval", 1)?.max(1);
    // −1 is the last layer.
    let end = config.float_or("moe_layer_end_index", -1.0)?;
    let sparse =
        |l: usize| (l + 1).is_multiple_of(interval) && l >= start && (end == -1.0 || l as f64 <= end);
    let width = config.positive("moe_intermediate_size")?;
    let mut architecture = layers(common, width, sparse)?;
    architecture.head_bias = config.flag_or("use_bias", false)?;
    Ok(architecture)
}

/// ERNIE 4.5 VL: the language model within a model of text and images, which has a router and experts for each of the two.
/// Text alone has the same positions on every axis of its rotation.
pub(super) fn of_images(config: &Config) -> Result<Architecture> {
    within_images(config, true, |text| {
        let layers = layer_count(text)?;
        let sparse = expert_layers(text, layers, 1)?;
        language_model(text, "ernie4_5_vl_moe", |l| sparse[l])
    })
}

/// The same as first published, with all keys side by side, and some that have a number for text and one for images.
pub(super) fn of_images_as_published(config: &Config) -> Result<Architecture> {
    for key in ["num_key_value_heads", "rms_norm_eps", "rope_theta", WIDTHS] {
        if config.get(key).is_none() {
            return Err(Error::invalid(key, "is missing"));
        }
    }
    config.require("compression_ratio", 1)?;
    config.require("moe_gate_act", "softmax")?;
    config.require("moe_norm_gate_logits", true)?;
    for key in ["moe_group_experts", "moe_num_attn_experts", "moe_use_token_type_bias"] {
        config.require(key, false)?;
    }
    let last = layer_count(config)?.saturating_sub(1);
    let interval = config.size_or("moe_layer_interval", 2)?.max(1);
    let same = |key: &str| same_for_both(key, pair(key, config.sizes(key)?)?);
    let (first, experts) = (same("moe_layer_start_index")?, same("moe_num_experts")?);
    // −1 is the last layer, and so is what is behind it.
    let end = |l: f64| if l == -1.0 { last } else { last.min(l as usize) };
    let key = "moe_layer_end_index";
    let end = same_for_both(key, pair(key, config.floats(key)?)?.map(end))?;
    let shared = config.size_or("moe_num_shared_experts", 0)?;
    let text = config.with("moe_num_experts", experts).with("moe_num_shared_experts", shared);
    let mut architecture = language_model(&text, "ernie4_5_moe_vl", |l| {
        (l + 1).is_multiple_of(interval) && (first..=end).contains(&l)
    })?;
    architecture.tied_embeddings = config.flag_or("tie_word_embeddings", false)?;
    Ok(architecture)
}

const WIDTHS: &str = "moe_intermediate_size";

fn language_model(
    config: &Config,
    family: &'static str,
    sparse: impl Fn(usize) -> bool,
) -> Result<Architecture> {
    let names = Names {
        other_model: Some(["model.language_model.", "lm_head"]),
        fused_moe: "mlp.text_moe",
        shared: ["shared_experts"; 2],
        router: ["text_moe.gate", "gate"],
        choice_bias: [
            "text_moe.gate.moe_statics.e_score_correction_bias",
            "gate.moe_statics.e_score_correction_bias",
        ],
        choice_bias_is_row: true,
        storage: ExpertStorage::WithImages,
        ..Names::default()
    };
    let defaults = Defaults { kv_heads: KvHeads::Fixed(4), ..DEFAULTS };
    let common = Common::read(config, family, names, defaults)?;
    if common.rope.kind() != "default" {
        let what = format!("is `{}`; known for this family: default", common.rope.kind());
        return Err(Error::invalid("rope_parameters.rope_type", what));
    }
    let sections = ["rope_parameters", "rope_scaling"].map(|key| config.section(key));
    for section in [Ok(Some(config.clone()))].into_iter().chain(sections) {
        section?.map_or(Ok(()), |section| section.require("partial_rotary_factor", 1))?;
    }
    let [width, _] = pair(WIDTHS, config.sizes(WIDTHS)?.or_else(|| Some(vec![1536, 512])))?;
    layers(common, width, sparse)
}

/// A number for text and one for images.
fn pair<T: Copy>(key: &str, numbers: Option<Vec<T>>) -> Result<[T; 2]> {
    let numbers = numbers.unwrap_or_default();
    <[T; 2]>::try_from(&numbers[..]).map_err(|_| {
        let what = format!("has {} numbers, expected one for text and one for images", numbers.len());
        Error::invalid(key, what)
    })
}

fn same_for_both(key: &str, [text, images]: [usize; 2]) -> Result<usize> {
    if text != images {
        let what = format!("is {text} for text and {images} for images, expected the same");
        return Err(Error::invalid(key, what));
    }
    Ok(text)
}

/// Grouped-query attention everywhere, and experts of `width` where `sparse` says.
fn layers(common: Common<'_>, width: usize, sparse: impl Fn(usize) -> bool) -> Result<Architecture> {
    let config = common.config;
    let bias = config.flag_or("use_bias", false)?;
    let plain = common.grouped()?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        rope: Some(common.rope.of_head(plain.head_dim, Pairing::Adjacent)?),
        ..plain
    };
    let least = config.float_or("moe_norm_min", 1e-12)? as f32;
    let weights = WeightRule::Renormalised { added: 0.0, least, scale: 1.0 };
    let moe = MoeSpec {
        router: RouterSpec { choice: Choice::BiasedScore, ..RouterSpec::softmax(common.top_k, weights) },
        shared: common.shared("moe_num_shared_experts", 2, width)?,
        ..common.moe(width, weights)
    };
    let dense_width = config.positive("intermediate_size")?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse(l), &moe, dense_width),
    })?;
    architecture.mlp_bias = bias;
    Ok(architecture)
}
