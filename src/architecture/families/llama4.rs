use super::super::{ExpertStorage, Temperature, WeightTarget};
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, Error, GroupedAttention, KvHeads,
    LayerSpec, MoeSpec, Names, Pairing, QkNorm, Result, RouterSpec, Scoring, SharedSpec, Span, WeightRule,
};
use super::{TEXT_SECTION, feed_forward, required_section};

/// Llama 4 as published: the language model within a model of text and images.
pub(super) fn published(config: &Config) -> Result<Architecture> {
    let text = required_section(config, TEXT_SECTION[0])?;
    let names = Names { model: "language_model.model.", head: "language_model.lm_head", ..names() };
    let mut architecture = read(&text, "llama4", names)?;
    architecture.config_section = TEXT_SECTION;
    Ok(architecture)
}

/// The language model of Llama 4 on its own.
pub(super) fn text(config: &Config) -> Result<Architecture> {
    read(config, "llama4_text", names())
}

fn names() -> Names {
    Names {
        feed_forward: "feed_forward",
        moe: "feed_forward",
        router: ["router"; 2],
        shared: ["shared_expert"; 2],
        storage: ExpertStorage::Fused { interleaved: false },
        ..Names::default()
    }
}

fn read(config: &Config, family: &'static str, names: Names) -> Result<Architecture> {
    let defaults = Defaults {
        rope_theta: 500_000.0,
        kv_heads: KvHeads::Fixed(8),
        head_dim: Some(128),
        ..Defaults::USUAL
    };
    let common = Common::read(config, family, names, defaults)?;
    let layers = common.layers;
    let rotated = rotated_layers(config, layers)?;
    let chunk = match (config.mentions("attention_chunk_size"), config.size_opt("attention_chunk_size")?) {
        (false, _) => Span::Chunk(8192),
        (true, None | Some(0)) => Span::Full,
        (true, Some(chunk)) => Span::Chunk(chunk),
    };
    let layer_types = config.strings("layer_types")?;
    let is_chunked = |l: usize| match &layer_types {
        Some(types) => types.get(l).is_some_and(|t| t == "chunked_attention"),
        None => rotated[l],
    };
    let bias = config.flag_or("attention_bias", false)?;
    let plain = common.grouped()?;
    let rope = common.rope.of_head(plain.head_dim, Pairing::Adjacent)?;
    let with_positions = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: if config.flag_or("use_qk_norm", true)? { QkNorm::Unweighted } else { QkNorm::None },
        rope: Some(rope),
        ..plain
    };
    // The first published configs have a number here.
    let tuning = match config.size_opt("attn_temperature_tuning") {
        Ok(Some(number)) => number != 0,
        _ => config.flag_or("attn_temperature_tuning", true)?,
    };
    let temperature = Temperature {
        first: 1.0,
        interval: config.above_zero("floor_scale")?.unwrap_or(8192.0) as f32,
        strength: config.float_or("attn_scale", 0.1)? as f32,
    };
    let without_positions = GroupedAttention {
        qk_norm: QkNorm::None,
        rope: None,
        temperature: tuning.then_some(temperature),
        ..with_positions.clone()
    };

    let width = config.positive("intermediate_size")?;
    let router = RouterSpec {
        scoring: Scoring::Sigmoid,
        choice: Choice::Logit,
        target: WeightTarget::Input,
        ..RouterSpec::softmax(common.top_k, WeightRule::Scaled(1.0))
    };
    let moe = MoeSpec {
        router,
        shared: Some(SharedSpec::of_width(width)),
        ..common.moe(width, WeightRule::Scaled(1.0))
    };
    let listed = config.sizes("moe_layers")?;
    let step = config.size_or("interleave_moe_layer_step", 1)?.max(1);
    let sparse = |l: usize| match &listed {
        Some(listed) => listed.contains(&l),
        None => (l + 1).is_multiple_of(step),
    };
    let dense_width = config.size_or("intermediate_size_mlp", 16384)?;
    common.architecture(|l| {
        let attention = if rotated[l] { &with_positions } else { &without_positions };
        let span = if is_chunked(l) { chunk } else { Span::Full };
        LayerSpec {
            attention: AttentionSpec::Grouped(GroupedAttention { span, ..attention.clone() }),
            feed_forward: feed_forward(sparse(l), &moe, dense_width),
        }
    })
}

/// Which layers rotate queries and keys: those with a 1 in `no_rope_layers`, or all but every
/// `no_rope_layer_interval`-th.
fn rotated_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    match config.sizes("no_rope_layers")? {
        Some(flags) if flags.len() >= layers => Ok(flags.iter().take(layers).map(|&f| f != 0).collect()),
        Some(flags) if !flags.is_empty() => {
            let what = format!("has {} entries for {layers} layers", flags.len());
            Err(Error::invalid("no_rope_layers", what))
        }
        _ => {
            let interval = config.size_or("no_rope_layer_interval", 4)?.max(1);
            Ok((0..layers).map(|l| !(l + 1).is_multiple_of(interval)).collect())
        }
    }
}
