//! Granite MoE (IBM, 2024): factors of embeddings, scores, residual stream and logits.

use super::super::{ExpertStorage, Mamba2};
use super::mamba::{UNLIMITED_STEPS, check_count, kinds};
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, Error, GroupedAttention, LayerSpec,
    MoeSpec, Names, Pairing, Result, RouterSpec, SharedSpec, Span, WeightRule,
};
use super::{attending_layers, moe_layer, rope_of, window};

const DEFAULTS: Defaults = Defaults { norm_eps: 1e-6, max_positions: 2048, ..Defaults::USUAL };

/// Granite 3.0 and 3.1 with experts.
pub(super) fn plain(config: &Config) -> Result<Architecture> {
    attending(config, "granitemoe", 0)
}

/// The same with a shared expert.
pub(super) fn shared(config: &Config) -> Result<Architecture> {
    let width = config.size_or("shared_intermediate_size", 0)?;
    attending(config, "granitemoeshared", width)
}

/// Granite 4.0: layers of Mamba-2, with layers of attention among them.
pub(super) fn hybrid(config: &Config) -> Result<Architecture> {
    let width = config.positive_or("shared_intermediate_size", 1024)?;
    let key = config.first(&["layer_types", "layers_block_type"]).unwrap_or("layer_types");
    let layers = config.positive("num_hidden_layers")?;
    let words =
        [("mamba", false), ("linear_attention", false), ("attention", true), ("full_attention", true)];
    let attends = kinds(config, key, &words)?.unwrap_or_else(|| vec![false; layers]);
    check_count(key, attends.len(), layers)?;
    let mamba = if attends.contains(&false) { Some(mamba(config)?) } else { None };
    // Only the word "rope" switches positions on.
    let rotates = config.get("position_embedding_type").and_then(|v| v.as_str()) == Some("rope");
    read(config, "granitemoehybrid", width, |l, attention, moe| {
        let mut layer = moe_layer(attention, moe);
        match (mamba, &mut layer.attention) {
            (Some(mamba), mixer) if !attends[l] => *mixer = AttentionSpec::Mamba2(mamba),
            (_, AttentionSpec::Grouped(attention)) if !rotates => attention.rope = None,
            _ => {}
        }
        layer
    })
}

fn mamba(config: &Config) -> Result<Mamba2> {
    // Published models have one. With more, versions of transformers norm either each on its own or all together.
    config.require("mamba_n_groups", 1)?;
    let width = config.positive_or("mamba_expand", 2)? * config.positive("hidden_size")?;
    let heads = config.positive_or("mamba_n_heads", 128)?;
    let head_dim = match config.get("mamba_d_head").and_then(|v| v.as_str()) {
        Some("auto") => width / heads,
        None if config.get("mamba_d_head").is_none() => width / heads,
        _ => config.positive("mamba_d_head")?,
    };
    if heads * head_dim != width {
        let what = format!(
            "is {heads}: {heads} heads of {head_dim} are not mamba_expand · hidden_size = {width} wide"
        );
        return Err(Error::invalid("mamba_n_heads", what));
    }
    Ok(Mamba2 {
        heads,
        head_dim,
        state_dim: config.positive_or("mamba_d_state", 256)?,
        groups: 1,
        kernel: config.positive_or("mamba_d_conv", 4)?,
        convolution_bias: config.flag_or("mamba_conv_bias", true)?,
        projection_bias: config.flag_or("mamba_proj_bias", false)?,
        step_limits: config.limits("time_step_limit", UNLIMITED_STEPS)?.map(|limit| limit as f32),
    })
}

/// Granite Swash (2026): attention sinks, layers that attend within a window, and a rotation of its own for each layer, or
/// none.
pub(super) fn sliding(config: &Config) -> Result<Architecture> {
    const BASES: &str = "layer_rope_theta";
    let mut architecture =
        attending(config, "granitemoe_swa", config.size_or("shared_intermediate_size", 0)?)?;
    let count = architecture.layers.len();
    let attends = attending_layers(config, count, "sliding_attention", Some(&|l| l.is_multiple_of(4)))?;
    let window = if config.mentions("sliding_window") { window(config)? } else { Span::Window(128) };
    let bases = config.floats(BASES)?;
    check_count(BASES, bases.as_ref().map_or(count, Vec::len), count)?;
    let rope = rope_of(config, DEFAULTS, config.section("rope_parameters")?)?;
    for (l, layer) in architecture.layers.iter_mut().enumerate() {
        let AttentionSpec::Grouped(attention) = &mut layer.attention else { continue };
        attention.sinks = true;
        attention.span = if attends[l] { Span::Full } else { window };
        attention.rope = match &bases {
            None => continue,
            Some(bases) if bases[l] == 0.0 => None,
            Some(bases) => {
                Some(rope.with_theta(BASES, bases[l])?.of_head(attention.head_dim, Pairing::Halves)?)
            }
        };
    }
    // Published as transformers 5 names them.
    let names = &mut architecture.names;
    names.router = [names.router[1]; 2];
    names.fused = names.fused.map(|[_, own]| [own; 2]);
    Ok(architecture)
}

/// A model of which all layers attend.
fn attending(config: &Config, family: &'static str, shared_width: usize) -> Result<Architecture> {
    read(config, family, shared_width, |_, attention, moe| moe_layer(attention, moe))
}

fn read(
    config: &Config,
    family: &'static str,
    shared_width: usize,
    layer: impl Fn(usize, &GroupedAttention, &MoeSpec) -> LayerSpec,
) -> Result<Architecture> {
    let names = Names {
        moe: "block_sparse_moe",
        fused_moe: "block_sparse_moe",
        router: ["router.layer", "router"],
        fused: [
            ["input_linear.weight", "experts.gate_up_proj"],
            ["output_linear.weight", "experts.down_proj"],
        ],
        shared_gate_up: Some(["shared_mlp.input_linear", "shared_mlp.output_linear"]),
        storage: ExpertStorage::OutputMajor,
        ..Names::default()
    };
    let common = Common::read(config, family, names, DEFAULTS)?;
    let factor = |key: &str| config.float_or(key, 1.0);
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        scale: factor("attention_multiplier")? as f32,
        ..common.grouped()?
    };
    // The largest logits, and the softmax over them alone: the renormalised softmax over all.
    let moe = MoeSpec {
        router: RouterSpec {
            choice: Choice::Logit,
            ..RouterSpec::softmax(common.top_k, WeightRule::RENORMALISED)
        },
        shared: (shared_width > 0).then_some(SharedSpec::of_width(shared_width)),
        ..common.moe(config.positive("intermediate_size")?, WeightRule::RENORMALISED)
    };
    let mut architecture = common.architecture(|l| layer(l, &attention, &moe))?;
    architecture.embedding_scale = factor("embedding_multiplier")? as f32;
    architecture.residual_scale = factor("residual_multiplier")? as f32;
    architecture.head_scale = (1.0 / config.above_zero("logits_scaling")?.unwrap_or(1.0)) as f32;
    Ok(architecture)
}
