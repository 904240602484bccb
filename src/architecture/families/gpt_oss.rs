use super::super::ExpertStorage;
use super::{
    Activation, Architecture, Choice, Common, Config, Defaults, GroupedAttention, KvHeads, MoeSpec, Names,
    Result, RouterSpec, Span, WeightRule,
};
use super::{moe_layer, window};

/// What an absent rotary section means.
const YARN: &str = r#"{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
    "original_max_position_embeddings": 4096}"#;

/// Slope of the sigmoid in the experts' activation.
const SLOPE: f64 = 1.702;

/// gpt-oss (arXiv 2508.10925).
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        router: ["router"; 2],
        storage: ExpertStorage::Fused { interleaved: true },
        ..Names::default()
    };
    let defaults = Defaults {
        rope_theta: 150_000.0,
        rope_section: Some(YARN),
        kv_heads: KvHeads::Fixed(8),
        head_dim: Some(64),
        ..Defaults::USUAL
    };
    let common = Common::read(config, "gpt_oss", names, defaults)?;
    let bias = config.flag_or("attention_bias", true)?;
    let attention = GroupedAttention { qkv_bias: bias, output_bias: bias, sinks: true, ..common.grouped()? };
    let window = if config.mentions("sliding_window") { window(config)? } else { Span::Window(128) };
    let layer_types = config.strings("layer_types")?;
    let slides = |l: usize| match &layer_types {
        Some(types) => types.get(l).is_some_and(|t| t == "sliding_attention"),
        None => l.is_multiple_of(2),
    };
    // The largest logits, and the softmax over them alone: the renormalised softmax over all.
    let router = RouterSpec {
        bias: true,
        choice: Choice::Logit,
        ..RouterSpec::softmax(common.top_k, WeightRule::RENORMALISED)
    };
    let limit = config.above_zero("swiglu_limit")?.unwrap_or(7.0) as f32;
    let slope = config.float_or("swiglu_alpha", SLOPE)? as f32;
    let moe = MoeSpec {
        activation: Activation::ClampedSwiGlu { limit, slope },
        expert_bias: true,
        router,
        ..common.moe(config.positive("intermediate_size")?, WeightRule::RENORMALISED)
    };
    common.architecture(|l| {
        let span = if slides(l) { window } else { Span::Full };
        moe_layer(&GroupedAttention { span, ..attention.clone() }, &moe)
    })
}
