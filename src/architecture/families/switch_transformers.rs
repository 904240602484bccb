//! Switch Transformer (Fedus et al., arXiv 2101.03961): T5 with a router and experts in some layers of encoder and
//! decoder.

use super::{
    Activation, Architecture, AttentionSpec, Config, Error, FeedForwardSpec, GroupedAttention, LayerSpec,
    MoeSpec, Names, NormKind, NormPlacement, OutputGate, QkNorm, Result, RouterSpec, Span, WeightRule,
};
use crate::architecture::RelativeBias;
use crate::architecture::rope::MOST_POSITIONS;

/// Tokens beyond `expert_capacity` are dropped, as in training and in transformers 4. Its successor ignores the number;
/// `null` says so here.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let encoder_layers = config.size_or("num_layers", 12)?;
    let decoder_layers = match config.size_opt("num_decoder_layers")? {
        Some(layers) => layers,
        // Only a `null` means as many.
        None if config.mentions("num_decoder_layers") => encoder_layers,
        None => 12,
    };
    config.require("router_dtype", "float32")?;
    if encoder_layers == 0 || decoder_layers == 0 {
        let key = if encoder_layers == 0 { "num_layers" } else { "num_decoder_layers" };
        return Err(Error::invalid(key, "is 0, expected at least 1"));
    }
    let activation = match config.get("dense_act_fn").and_then(|v| v.as_str()).unwrap_or("relu") {
        "relu" => Activation::Relu,
        "gelu_new" => Activation::GeluTanh,
        other => {
            let what = format!("is `{other}`; known: relu, gelu_new");
            return Err(Error::invalid("dense_act_fn", what));
        }
    };
    let heads = config.positive("num_heads")?;
    let buckets = config.size_or("relative_attention_num_buckets", 32)?;
    let max_distance = config.size_or("relative_attention_max_distance", 128)?;
    if buckets < 4 || !buckets.is_multiple_of(4) {
        let what = format!("is {buckets}, expected a multiple of 4");
        return Err(Error::invalid("relative_attention_num_buckets", what));
    }
    if max_distance <= buckets / 2 {
        let what = format!("is {max_distance}, expected more than {}", buckets / 2);
        return Err(Error::invalid("relative_attention_max_distance", what));
    }
    let hidden_size = config.positive("d_model")?;
    let head_dim = config.size_or("d_kv", 64)?;
    if head_dim == 0 {
        return Err(Error::invalid("d_kv", "is 0, expected at least 1"));
    }
    let width = config.positive("d_ff")?;
    let moe = MoeSpec {
        experts: config.positive("num_experts")?,
        width,
        latent: None,
        activation,
        expert_bias: false,
        router: RouterSpec {
            bias: config.flag_or("router_bias", false)?,
            ..RouterSpec::softmax(1, WeightRule::Scaled(1.0))
        },
        capacity: capacity(config)?,
        shared: None,
    };
    let tied_embeddings = config.flag_or("tie_word_embeddings", true)?;
    let steps = [
        sparse_step(config, "num_sparse_encoder_layers", encoder_layers)?,
        sparse_step(config, "num_sparse_decoder_layers", decoder_layers)?,
    ];
    let layer = |l: usize| {
        let in_encoder = l < encoder_layers;
        let (i, step) = if in_encoder { (l, steps[0]) } else { (l - encoder_layers, steps[1]) };
        let sparse = step == 1 || (step > 0 && i % step == 1);
        LayerSpec {
            attention: AttentionSpec::Grouped(GroupedAttention {
                heads,
                kv_heads: heads,
                head_dim,
                value_dim: head_dim,
                value_scale: 1.0,
                keys_as_values: false,
                value_norm: false,
                qkv_bias: false,
                output_bias: false,
                qk_norm: QkNorm::None,
                clip: None,
                rope: None,
                span: if in_encoder { Span::Bidirectional } else { Span::Full },
                sinks: false,
                scale: 1.0,
                temperature: None,
                bias: Some(RelativeBias { buckets, max_distance, bidirectional: in_encoder }),
                cross: !in_encoder,
                output_gate: OutputGate::None,
            }),
            feed_forward: if sparse {
                FeedForwardSpec::Moe(moe.clone())
            } else {
                FeedForwardSpec::Dense { width }
            },
        }
    };
    Ok(Architecture {
        family: "switch_transformers",
        vocabulary: config.positive("vocab_size")?,
        hidden_size,
        max_positions: MOST_POSITIONS,
        norm_eps: config.float_or("layer_norm_epsilon", 1e-6)? as f32,
        norm: NormKind::Rms,
        zero_centred_norms: false,
        norm_placement: NormPlacement::Before,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        layer_scales: false,
        dense_activation: activation,
        mlp_bias: false,
        tied_embeddings,
        head_bias: false,
        layers: (0..encoder_layers + decoder_layers).map(layer).collect(),
        encoder_layers,
        head_scale: if tied_embeddings { (hidden_size as f64).powf(-0.5) as f32 } else { 1.0 },
        logit_cap: None,
        names: Names {
            model: "",
            router: ["router.classifier"; 2],
            projections: ["wi", "", "wo"],
            t5: Some(encoder_layers),
            ..Names::default()
        },
        config_section: &[],
        expert_count_keys: vec!["num_experts"],
        packing: None,
    })
}

/// Most tokens of a window that an expert takes; `None` for a `null`.
fn capacity(config: &Config) -> Result<Option<usize>> {
    match config.size_opt("expert_capacity")? {
        Some(0) => Err(Error::invalid("expert_capacity", "is 0, expected at least 1, or null for no limit")),
        None if !config.mentions("expert_capacity") => Ok(Some(64)),
        capacity => Ok(capacity),
    }
}

/// Every how many layers have experts: a step of n ≥ 2 means those whose number is 1 modulo n.
fn sparse_step(config: &Config, key: &str, layers: usize) -> Result<usize> {
    match config.size_or(key, 3)? {
        0 => Ok(layers),
        sparse => Ok(layers / sparse),
    }
}
