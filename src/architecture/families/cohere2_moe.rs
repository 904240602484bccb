use super::super::Scoring;
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, Error, GroupedAttention, LayerSpec,
    MoeSpec, Names, NormKind, NormPlacement, Pairing, Result, RouterSpec, SharedSpec, Span, WeightRule,
};
use super::{attending_layers, expert_layers, feed_forward, renormalised_if};

/// Command A+ (Cohere, 2026): attention and experts read the same norm; layers that attend to everything have no positions,
/// unless they are dense.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names { shared: ["shared_experts"; 2], ..Names::default() };
    let defaults = Defaults { max_positions: 8192, head_dim: Some(128), tied: true, ..Defaults::USUAL };
    let common = Common::read(config, "cohere2_moe", names, defaults)?;
    let layers = common.layers;
    let dense = config.size_or("first_k_dense_replace", 0)?;
    let dense_pattern = config.positive_or("prefix_dense_sliding_window_pattern", 1)?;
    let pattern = config.positive_or("sliding_window_pattern", 4)?;
    let is_full = |l: usize| match l.checked_sub(dense) {
        None => (l + 1).is_multiple_of(dense_pattern),
        Some(l) => (l + 1).is_multiple_of(pattern),
    };
    let attends = attending_layers(config, layers, "sliding_attention", Some(&is_full))?;
    let sparse = expert_layers(config, layers, dense)?;

    if config.mentions("sliding_window") && config.get("sliding_window").is_none() {
        return Err(Error::invalid("sliding_window", "is null, expected a number"));
    }
    let bias = config.flag_or("attention_bias", false)?;
    let plain = common.grouped()?;
    let full = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        rope: Some(common.rope.of_head(plain.head_dim, Pairing::Adjacent)?),
        ..plain
    };
    let sliding =
        GroupedAttention { span: Span::Window(config.positive_or("sliding_window", 4096)?), ..full.clone() };
    let without_positions = GroupedAttention { rope: None, ..full.clone() };
    let attention = |l: usize| match (attends[l], sparse[l]) {
        (false, _) => &sliding,
        (true, false) if dense_pattern == 1 => &full,
        (true, _) => &without_positions,
    };

    let width = config.positive("intermediate_size")?;
    let shared = common.shared("num_shared_experts", 0, width)?;
    let averaged = one_of(config, "shared_expert_combination_strategy", ["average", "sum"])?;
    let moe = MoeSpec {
        router: router(&common)?,
        shared: shared.map(|shared| SharedSpec { averaged, ..shared }),
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let dense_width = config.positive_or("prefix_dense_intermediate_size", width)?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention(l).clone()),
        feed_forward: feed_forward(sparse[l], &moe, dense_width),
    })?;
    // Which of the two keys has a number says what kind of norms there are.
    if config.get("rms_norm_eps").is_none() {
        architecture.norm = NormKind::Layer { bias: false };
        architecture.norm_eps = config.float_or("layer_norm_eps", 1e-5)? as f32;
    }
    architecture.norm_placement = NormPlacement::BeforeBoth;
    architecture.head_scale = config.float_or("logit_scale", 0.0625)? as f32;
    Ok(architecture)
}

/// The largest logits, and either the softmax over them alone or their sigmoids.
fn router(common: &Common<'_>) -> Result<RouterSpec> {
    let config = common.config;
    let is_softmax = one_of(config, "expert_selection_fn", ["softmax", "sigmoid"])?;
    let renormalise = is_softmax || config.flag_or("norm_topk_prob", true)?;
    let weights = renormalised_if(renormalise);
    Ok(RouterSpec {
        scoring: if is_softmax { Scoring::Softmax } else { Scoring::Sigmoid },
        choice: Choice::Logit,
        ..RouterSpec::softmax(common.top_k, weights)
    })
}

/// Whether `key` has the first of two values, which it also has where it is absent.
fn one_of(config: &Config, key: &str, [first, second]: [&str; 2]) -> Result<bool> {
    match config.get(key).map(|value| value.as_str()) {
        None => Ok(true),
        Some(Some(value)) if value == first => Ok(true),
        Some(Some(value)) if value == second => Ok(false),
        Some(_) => Err(Error::invalid(key, format!("is neither `{first}` nor `{second}`"))),
    }
}
