use super::super::{ExpertStorage, LatentAttention, Temperature};
use super::bailing_moe::shared_count;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupLimit, GroupScore, GroupedAttention,
    LayerSpec, MoeSpec, Names, NormPlacement, Pairing, Result, WeightRule,
};
use super::{
    as_language_model, expert_layers, feed_forward, group_limit, listed_layers, scaled_rule,
    weight_rule_of_several, within_images,
};

const DEFAULTS: Defaults = Defaults { norm_eps: 1e-6, ..Defaults::USUAL };

fn names() -> Names {
    Names { shared: ["shared_experts"; 2], ..Names::default() }
}

/// DeepSeekMoE (arXiv 2401.06066), which transformers does not have: the attention of Llama, and weights without a factor.
pub(super) fn v1(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 2048, ..DEFAULTS };
    let common = Common::read(config, "deepseek", names(), defaults)?;
    config.require("scoring_func", "softmax")?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention = GroupedAttention { qkv_bias: bias, output_bias: bias, ..common.grouped()? };
    let weights = weight_rule_of_several(&common, false)?;
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec { shared: common.shared("n_shared_experts", 0, width)?, ..common.moe(width, weights) };
    let sparse = later_layers(config, 0)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse(l), &moe, dense_width),
    })
}

/// DeepSeek-V2 (arXiv 2405.04434).
pub(super) fn v2(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 2048, ..DEFAULTS };
    let common = Common::read(config, "deepseek_v2", names(), defaults)?;
    config.require("scoring_func", "softmax")?;
    let method = config.get("topk_method").map(|_| config.string("topk_method")).transpose()?;
    let groups = match method.as_deref() {
        None | Some("greedy") => None,
        Some("group_limited_greedy") => Some(GroupLimit {
            count: config.positive("n_group")?,
            kept: config.positive("topk_group")?,
            score: GroupScore::Largest,
        }),
        Some(other) => {
            let what = format!("is `{other}`; known: greedy, group_limited_greedy");
            return Err(Error::invalid("topk_method", what));
        }
    };
    // DeepSeek's own code renormalises instead of scaling when norm_topk_prob is true.
    let weights = if config.flag_or("norm_topk_prob", false)? {
        WeightRule::RENORMALISED
    } else {
        WeightRule::Scaled(config.float_or("routed_scaling_factor", 1.0)? as f32)
    };
    let width = config.positive("moe_intermediate_size")?;
    let mut moe =
        MoeSpec { shared: common.shared("n_shared_experts", 2, width)?, ..common.moe(width, weights) };
    moe.router.groups = groups;
    let sparse = later_layers(config, 0)?;
    let mut architecture = layers(common, &moe, Pairing::Adjacent, 1536, sparse)?;
    architecture.mlp_bias = config.flag_or("mlp_bias", false)?;
    Ok(architecture)
}

/// DeepSeek-V3 and R1 (arXiv 2412.19437), Moonlight, and Kimi-K2 (arXiv 2507.20534), which has a `model_type` of its own.
/// Layers for multi-token prediction are not part of the forward pass.
pub(super) fn v3(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 4096, ..DEFAULTS };
    let common = Common::read(config, "deepseek_v3", names(), defaults)?;
    let moe = biased_moe(&common, [8, 4], 2.5)?;
    layers(common, &moe, pairing(config)?, 1536, later_layers(config, 3)?)
}

/// DeepSeek-V3.2 (arXiv 2512.02556).
pub(super) fn v32(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 163_840, ..DEFAULTS };
    sparse_attention(Common::read(config, "deepseek_v32", names(), defaults)?, [8, 4], 1536)
}

/// GLM-5 (2026): the layers of DeepSeek-V3.2.
pub(super) fn glm_dsa(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { norm_eps: 1e-5, max_positions: 202_752, ..DEFAULTS };
    sparse_attention(Common::read(config, "glm_moe_dsa", names(), defaults)?, [1, 1], 2048)
}

/// DeepSeek-V3 with indexers that choose `index_topk` keys for every query. A text of at most as many tokens loses none by
/// that, so that is how long texts can be; indexers do not run.
fn sparse_attention(common: Common<'_>, groups: [usize; 2], query_rank: usize) -> Result<Architecture> {
    let config = common.config;
    config.require("rope_interleave", true)?;
    let chosen = config.positive_or("index_topk", 2048)?;
    let moe = biased_moe(&common, groups, 2.5)?;
    let first = config.size_or("first_k_dense_replace", 3)?;
    let sparse = expert_layers(config, common.layers, first)?;
    let mut architecture = layers(common, &moe, Pairing::Adjacent, query_rank, |l| sparse[l])?;
    architecture.max_positions = architecture.max_positions.min(chosen);
    Ok(architecture)
}

/// A.X K1 (SK Telecom, 2026): DeepSeek-V3 with a norm behind the experts.
pub(super) fn axk1(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { max_positions: 32768, ..DEFAULTS };
    let names =
        Names { feed_forward_output_norm: ["post_mlp_layernorm", "mlp.post_mlp_layernorm"], ..names() };
    let common = Common::read(config, "axk1", names, defaults)?;
    let moe = biased_moe(&common, [8, 4], 2.5)?;
    let later = later_layers(config, 1)?;
    let sparse = listed_layers(config, common.layers, &later)?;
    let mut architecture = layers(common, &moe, pairing(config)?, 1536, |l| sparse[l])?;
    architecture.norm_placement = NormPlacement::BeforeAndBehindExperts;
    Ok(architecture)
}

/// Sarvam 105B (2026): the layers of DeepSeek-V3.
pub(super) fn sarvam(config: &Config) -> Result<Architecture> {
    config.require("score_function", "sigmoid")?;
    let defaults = Defaults { max_positions: 4096, ..DEFAULTS };
    let mut common = Common::read(config, "sarvam_mla", names(), defaults)?;
    common.rope = common.rope.with_name_of_yarn("deepseek_yarn");
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        shared: common.shared(shared_count(config), 1, width)?,
        ..biased_moe(&common, [1, 1], 2.5)?
    };
    layers(common, &moe, pairing(config)?, None, later_layers(config, 1)?)
}

/// GLM-4.7-Flash (2026): the layers of DeepSeek-V3. Layers for multi-token prediction are not part of the forward pass.
pub(super) fn glm_lite(config: &Config) -> Result<Architecture> {
    let defaults = Defaults { norm_eps: 1e-5, max_positions: 202_752, ..DEFAULTS };
    config.require("partial_rotary_factor", 1)?;
    let common = Common::read(config, "glm4_moe_lite", names(), defaults)?;
    let moe = biased_moe(&common, [1, 1], 1.8)?;
    let first = config.size_or("first_k_dense_replace", 1)?;
    let sparse = expert_layers(config, common.layers, first)?;
    layers(common, &moe, pairing(config)?, 768, |l| sparse[l])
}

/// What an absent rotary section of Mistral 4 means.
const MISTRAL_ROPE: &str = r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1}"#;

/// Mistral 4 (2026): latent attention whose scores grow with the position, and a softmax router.
pub(super) fn mistral(config: &Config) -> Result<Architecture> {
    read_mistral(config, "mistral4", Names { storage: ExpertStorage::OutputMajor, ..names() })
}

/// Mistral 4 as published, within a model of text and images.
pub(super) fn mistral_of_images(config: &Config) -> Result<Architecture> {
    within_images(config, true, |text| {
        text.require("model_type", "mistral4")?;
        let names = Names { storage: ExpertStorage::OutputMajor, ..names() };
        read_mistral(text, "mistral3", as_language_model(names))
    })
}

fn read_mistral(config: &Config, family: &'static str, names: Names) -> Result<Architecture> {
    let defaults = Defaults { rope_section: Some(MISTRAL_ROPE), max_positions: 1_048_576, ..DEFAULTS };
    let common = Common::read(config, family, names, defaults)?;
    let number = |key: &str| match common.rope.number(key)? {
        Some(number) => Ok(number as f32),
        None => Err(Error::invalid(&format!("rope_parameters.{key}"), "is missing")),
    };
    let temperature = Temperature {
        first: 0.0,
        interval: number("original_max_position_embeddings")?,
        strength: number("llama_4_scaling_beta")?,
    };
    let scale = config.float_or("routed_scaling_factor", 1.0)? as f32;
    let weights = scaled_rule(config.flag_or("norm_topk_prob", true)?, scale);
    let width = config.positive("moe_intermediate_size")?;
    let mut moe =
        MoeSpec { shared: common.shared("n_shared_experts", 1, width)?, ..common.moe(width, weights) };
    moe.router.groups = group_limit(config, "n_group", [1, 1])?;
    let mut architecture = layers(common, &moe, pairing(config)?, 1024, later_layers(config, 0)?)?;
    for layer in &mut architecture.layers {
        if let AttentionSpec::Latent(attention) = &mut layer.attention {
            attention.temperature = Some(temperature);
        }
    }
    Ok(architecture)
}

/// The experts of DeepSeek-V3; the defaults are those of `n_group`, `topk_group` and `routed_scaling_factor`.
fn biased_moe(common: &Common<'_>, groups: [usize; 2], scale: f64) -> Result<MoeSpec> {
    let config = common.config;
    config.require("scoring_func", "sigmoid")?;
    let width = config.positive("moe_intermediate_size")?;
    Ok(MoeSpec {
        router: common.biased_sigmoid(groups, scale, true)?,
        shared: common.shared("n_shared_experts", 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    })
}

fn pairing(config: &Config) -> Result<Pairing> {
    Ok(if config.flag_or("rope_interleave", true)? { Pairing::Adjacent } else { Pairing::Halves })
}

/// Every `moe_layer_freq`-th layer from `first_k_dense_replace` on.
fn later_layers(config: &Config, default_first: usize) -> Result<impl Fn(usize) -> bool + use<>> {
    let first = config.size_or("first_k_dense_replace", default_first)?;
    let frequency = config.size_or("moe_layer_freq", 1)?.max(1);
    Ok(move |l: usize| l >= first && l.is_multiple_of(frequency))
}

/// Latent attention everywhere, with queries of rank `query_rank`, or one full matrix, unless the config says otherwise, and
/// experts where `sparse` says.
fn layers(
    common: Common<'_>,
    moe: &MoeSpec,
    pairing: Pairing,
    query_rank: impl Into<Option<usize>>,
    sparse: impl Fn(usize) -> bool,
) -> Result<Architecture> {
    let config = common.config;
    let nope_dim = config.positive("qk_nope_head_dim")?;
    let rope_dim = config.positive("qk_rope_head_dim")?;
    let mscale = common.rope.attention_mscale()?;
    let attention = LatentAttention {
        heads: common.heads,
        // Only a `null` means a full matrix.
        query_rank: match config.size_opt("q_lora_rank")? {
            None if !config.mentions("q_lora_rank") => query_rank.into(),
            rank => rank,
        },
        latent_dim: config.positive("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: config.positive("v_head_dim")?,
        bias: config.flag_or("attention_bias", false)?,
        rope: Some(common.rope.rope(rope_dim, pairing)?),
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * mscale * mscale) as f32,
        temperature: None,
        latent_eps: 1e-6,
    };
    let width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Latent(attention.clone()),
        feed_forward: feed_forward(sparse(l), moe, width),
    })
}
