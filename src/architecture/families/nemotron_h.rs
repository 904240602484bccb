use super::super::Mamba2;
use super::mamba::{UNLIMITED_STEPS, check_count, kinds};
use super::{
    Activation, Architecture, AttentionSpec, Common, Config, Defaults, Error, FeedForwardSpec,
    GroupedAttention, KvHeads, LayerSpec, MoeSpec, Names, Result, SharedSpec, WeightRule,
};

/// What a layer is; one half of what other families call a layer.
#[derive(Clone, Copy)]
enum Kind {
    Mamba,
    Attention,
    Moe,
    Mlp,
}

/// Nemotron-H (arXiv 2504.03624) with experts: layers that are Mamba-2, attention without positions, experts or an MLP alone,
/// with max(x, 0)² between two matrices. The experts of Nemotron 3 Super work on a latent.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let matrices = ["up_proj", "", "down_proj"];
    let names = Names {
        model: "backbone.",
        other_model: Some(["model.", "lm_head"]),
        embedding: "embeddings",
        input_norm: "norm",
        post_attention_norm: "norm",
        final_norm: "norm_f",
        attention: "mixer",
        mamba: "mixer",
        feed_forward: "mixer",
        dense: matrices,
        moe: "mixer",
        fused_moe: "mixer",
        projections: matrices,
        fused: [["experts.up_proj"; 2], ["experts.down_proj"; 2]],
        latent: ["fc1_latent_proj", "fc2_latent_proj"],
        shared: ["shared_experts"; 2],
        ..Names::default()
    };
    for (key, only) in [("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")] {
        config.require(key, only)?;
    }
    // transformers passes over biases of the attention.
    config.require("attention_bias", false)?;
    let defaults = Defaults { kv_heads: KvHeads::Fixed(8), head_dim: Some(128), ..Defaults::USUAL };
    let common = Common::read(config, "nemotron_h", names, defaults)?;
    let kinds = layer_kinds(config, common.layers)?;
    let attention = GroupedAttention { rope: None, ..common.grouped()? };
    let mamba = mamba(config)?;
    let moe = moe(&common)?;
    let width = config.positive_or("intermediate_size", 21504)?;
    let mixer = |attention| LayerSpec { attention, feed_forward: FeedForwardSpec::None };
    let mlp = |feed_forward| LayerSpec { attention: AttentionSpec::None, feed_forward };
    let mut architecture = common.architecture(|l| match kinds[l] {
        Kind::Mamba => mixer(AttentionSpec::Mamba2(mamba)),
        Kind::Attention => mixer(AttentionSpec::Grouped(attention.clone())),
        Kind::Moe => mlp(FeedForwardSpec::Moe(moe.clone())),
        Kind::Mlp => mlp(FeedForwardSpec::Dense { width }),
    })?;
    architecture.norm_eps = config.float_or("layer_norm_epsilon", 1e-5)? as f32;
    architecture.dense_activation = Activation::SquaredRelu;
    architecture.mlp_bias = config.flag_or("mlp_bias", false)?;
    Ok(architecture)
}

/// By a list of words, or as published a letter for each layer.
fn layer_kinds(config: &Config, layers: usize) -> Result<Vec<Kind>> {
    const PATTERN: &str = "hybrid_override_pattern";
    let words = [
        ("linear_attention", Kind::Mamba),
        ("mamba", Kind::Mamba),
        ("full_attention", Kind::Attention),
        ("attention", Kind::Attention),
        ("moe", Kind::Moe),
        ("mlp", Kind::Mlp),
    ];
    for key in ["layers_block_type", "layer_types"] {
        if let Some(kinds) = kinds(config, key, &words)? {
            check_count(key, kinds.len(), layers)?;
            return Ok(kinds);
        }
    }
    let kind = |(l, letter): (usize, char)| match letter {
        'M' => Ok(Kind::Mamba),
        '*' => Ok(Kind::Attention),
        'E' => Ok(Kind::Moe),
        '-' => Ok(Kind::Mlp),
        other => {
            let what = format!("is `{other}` in layer {l}, expected one of `M`, `*`, `E`, `-`");
            Err(Error::invalid(PATTERN, what))
        }
    };
    let pattern = config.string(PATTERN)?;
    check_count(PATTERN, pattern.chars().count(), layers)?;
    pattern.chars().enumerate().map(kind).collect()
}

/// transformers keeps Δ above `time_step_min`, and passes over `time_step_limit`, which the published code goes by.
fn mamba(config: &Config) -> Result<Mamba2> {
    let least_step = config.float_or("time_step_min", 0.001)?;
    let [least, most] = config.limits("time_step_limit", UNLIMITED_STEPS)?;
    if least > 0.0 || most < 1e30 {
        let what = format!("is from {least} to {most}, only 0 to infinity is supported here");
        return Err(Error::invalid("time_step_limit", what));
    }
    Ok(Mamba2 {
        heads: config.positive_or("mamba_num_heads", 128)?,
        head_dim: config.positive_or("mamba_head_dim", 64)?,
        state_dim: config.positive_or("ssm_state_size", 128)?,
        groups: config.positive_or("n_groups", 8)?,
        kernel: config.positive_or("conv_kernel", 4)?,
        convolution_bias: config.flag_or("use_conv_bias", true)?,
        projection_bias: config.flag_or("use_bias", false)?,
        step_limits: [least_step as f32, f32::INFINITY],
    })
}

/// The router of DeepSeek-V3 and a shared expert of its own width.
fn moe(common: &Common<'_>) -> Result<MoeSpec> {
    let config = common.config;
    let shared = config.positive_or("moe_shared_expert_intermediate_size", 7688)?;
    let latent = config.get("moe_latent_size").map(|_| config.positive("moe_latent_size")).transpose()?;
    Ok(MoeSpec {
        latent,
        activation: Activation::SquaredRelu,
        router: common.biased_sigmoid([1, 1], 1.0, true)?,
        shared: Some(SharedSpec::of_width(shared)),
        ..common.moe(config.positive_or("moe_intermediate_size", 7688)?, WeightRule::RENORMALISED)
    })
}
