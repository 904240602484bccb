use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupedAttention, KvHeads, LayerSpec,
    MoeSpec, Names, Result, Span, WeightRule,
};
use super::{attending_layers, expert_layers, feed_forward, rope_of};

const DEFAULTS: Defaults = Defaults {
    rope_theta: 5e6,
    rotated: 0.334,
    kv_heads: KvHeads::Fixed(4),
    head_dim: Some(192),
    ..Defaults::USUAL
};

/// MiMo-V2-Flash (arXiv 2601.02780): layers with a sliding window have sinks, twice the key heads and a rotation of their
/// own. Layers for multi-token prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names { sinks: ["attention_sink_bias", "sinks"], ..Names::default() };
    let section = |kind: &str| match config.section("rope_parameters")? {
        None => Ok(None),
        Some(section) => section.section(kind),
    };
    config.require("scoring_func", "sigmoid")?;
    config.require("n_shared_experts", 0)?;
    let full_rope = section("full_attention")?;
    let common = Common::read_with(config, "mimo_v2_flash", names, DEFAULTS, full_rope)?;
    let sliding_theta = config.float_or("swa_rope_theta", 1e4)?;
    let sliding_rope = if config.get("rope_parameters").is_some() {
        rope_of(config, DEFAULTS, section("sliding_attention")?)?
    } else {
        rope_of(&config.without("rope_theta"), Defaults { rope_theta: sliding_theta, ..DEFAULTS }, None)?
    };
    let full = GroupedAttention {
        value_dim: config.positive_or("v_head_dim", 128)?,
        // Only a `null` means no factor.
        value_scale: match config.float_opt("attention_value_scale")? {
            None if !config.mentions("attention_value_scale") => 0.707,
            scale => scale.unwrap_or(1.0) as f32,
        },
        qkv_bias: config.flag_or("attention_bias", false)?,
        ..common.grouped()?
    };
    // Beside the tokens before a token that the published key counts, a window has the token itself.
    let window = match config.size_opt("sliding_window_size")? {
        Some(before) => before + 1,
        None => config.positive_or("sliding_window", 129)?,
    };
    let sliding = GroupedAttention {
        kv_heads: 2 * full.kv_heads,
        rope: Some(sliding_rope.of_head(full.head_dim, super::Pairing::Halves)?),
        span: Span::Window(window),
        sinks: true,
        ..full.clone()
    };
    let published = [
        ("swa_num_attention_heads", full.heads),
        ("swa_num_key_value_heads", sliding.kv_heads),
        ("swa_head_dim", full.head_dim),
        ("swa_v_head_dim", full.value_dim),
    ];
    for (key, expected) in published {
        config.require(key, expected)?;
    }
    config.require("add_swa_attention_sink_bias", true)?;
    config.require("add_full_attention_sink_bias", false)?;
    let layers = common.layers;
    let pattern = per_layer(config, "hybrid_layer_pattern", layers)?;
    let usual = |l: usize| match &pattern {
        Some(sliding) => sliding[l] == 0,
        None => l == 0 || (l + 1).is_multiple_of(6),
    };
    let attends = attending_layers(config, layers, "sliding_attention", Some(&usual))?;
    let sparse = match (config.get("mlp_layer_types"), per_layer(config, "moe_layer_freq", layers)?) {
        (None, Some(list)) => list.iter().map(|&experts| experts != 0).collect(),
        _ => expert_layers(config, layers, 1)?,
    };
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 1.0, true)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(if attends[l] { full.clone() } else { sliding.clone() }),
        feed_forward: feed_forward(sparse[l], &moe, dense_width),
    })
}

/// A list with a number for every layer.
fn per_layer(config: &Config, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
    match config.sizes(key)? {
        Some(list) if list.len() != layers => {
            Err(Error::invalid(key, format!("has {} entries for {layers} layers", list.len())))
        }
        list => Ok(list),
    }
}
