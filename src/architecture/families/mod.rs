//! The families: one function each, from config keys to [`Architecture`].

mod afmoe;
mod aria;
mod bailing_moe;
mod bam;
mod cohere2_moe;
mod dbrx;
mod deepseek;
mod dots1;
mod ernie4_5_moe;
mod exaone_moe;
mod flex_olmo;
mod gemma4;
mod glm4_moe;
mod gpt_oss;
mod granite;
mod hunyuan_v1_moe;
mod hy_v3;
mod jamba;
mod kimi_linear;
mod laguna;
mod lfm2_moe;
mod llama4;
mod mamba;
mod mimo_v2_flash;
mod minimax_m2;
mod mixtral;
mod nemotron_h;
mod olmoe;
mod phimoe;
mod qwen;
mod qwen3_next;
mod switch_transformers;
mod wrapped;

use super::config::Config;
use super::rope::{RopeConfig, RopeDefaults};
use super::{
    Activation, Architecture, AttentionSpec, Choice, Error, FeedForwardSpec, GroupLimit, GroupScore,
    GroupedAttention, LayerSpec, MoeSpec, Names, NormKind, NormPlacement, OutputGate, Pairing, QkNorm,
    Result, RouterSpec, Scoring, SharedSpec, Span, WeightRule,
};

type Read = fn(&Config) -> Result<Architecture>;

pub(super) const FAMILIES: [(&str, Read); 62] = [
    ("afmoe", afmoe::read),
    ("aria", aria::read),
    ("axk1", deepseek::axk1),
    ("bailing_moe", bailing_moe::read),
    ("bailing_moe_v2", bailing_moe::read),
    ("bam", bam::read),
    ("cohere2_moe", cohere2_moe::read),
    ("dbrx", dbrx::read),
    ("deepseek", deepseek::v1),
    ("deepseek_v2", deepseek::v2),
    ("deepseek_v3", deepseek::v3),
    ("deepseek_v32", deepseek::v32),
    ("dots1", dots1::read),
    ("ernie4_5_moe", ernie4_5_moe::read),
    ("ernie4_5_moe_vl", ernie4_5_moe::of_images_as_published),
    ("ernie4_5_vl_moe", ernie4_5_moe::of_images),
    ("exaone_moe", exaone_moe::read),
    ("flex_olmo", flex_olmo::read),
    ("gemma4", gemma4::published),
    ("gemma4_text", gemma4::text),
    ("glm4_moe", glm4_moe::read),
    ("glm4_moe_lite", deepseek::glm_lite),
    ("glm_moe_dsa", deepseek::glm_dsa),
    ("glm4v_moe", glm4_moe::of_images),
    ("gpt_oss", gpt_oss::read),
    ("granitemoe", granite::plain),
    ("granitemoe_swa", granite::sliding),
    ("granitemoehybrid", granite::hybrid),
    ("granitemoeshared", granite::shared),
    ("hunyuan_v1_moe", hunyuan_v1_moe::read),
    ("hy_v3", hy_v3::read),
    ("internvl", wrapped::internvl),
    ("internvl_chat", wrapped::internvl_chat),
    ("jamba", jamba::read),
    ("kimi_k2", deepseek::v3),
    ("kimi_k25", wrapped::kimi_k25),
    ("kimi_linear", kimi_linear::read),
    ("kimi_vl", wrapped::kimi_vl),
    ("laguna", laguna::read),
    ("lfm2_moe", lfm2_moe::read),
    ("llama4", llama4::published),
    ("llama4_text", llama4::text),
    ("mellum", qwen::mellum),
    ("mimo_v2_flash", mimo_v2_flash::read),
    ("minimax_m2", minimax_m2::read),
    ("mistral3", deepseek::mistral_of_images),
    ("mistral4", deepseek::mistral),
    ("mixtral", mixtral::read),
    ("nemotron_h", nemotron_h::read),
    ("olmoe", olmoe::read),
    ("phimoe", phimoe::read),
    ("qwen2_moe", qwen::qwen2),
    ("qwen3_moe", qwen::qwen3),
    ("qwen3_5_moe", qwen3_next::published),
    ("qwen3_5_moe_text", qwen3_next::text),
    ("qwen3_next", qwen3_next::read),
    ("qwen3_omni_moe", qwen::qwen3_omni),
    ("qwen3_vl_moe", qwen::qwen3_vl),
    ("sarvam_mla", deepseek::sarvam),
    ("sarvam_moe", bailing_moe::sarvam),
    ("solar_open", glm4_moe::solar),
    ("switch_transformers", switch_transformers::read),
];

const EXPERT_COUNTS: [&str; 4] = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];
const CHOICE_COUNTS: [&str; 5] =
    ["num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts"];

/// What an absent key means; silent in transformers, and different from family to family.
#[derive(Clone, Copy)]
struct Defaults {
    rope_theta: f64,
    /// Share of a head that is rotated.
    rotated: f64,
    /// Text of the rotary section.
    rope_section: Option<&'static str>,
    norm_eps: f64,
    max_positions: usize,
    kv_heads: KvHeads,
    /// Where it is not hidden_size / num_attention_heads.
    head_dim: Option<usize>,
    tied: bool,
}

/// What an absent `num_key_value_heads` means.
#[derive(Clone, Copy)]
enum KvHeads {
    AsHeads,
    Fixed(usize),
}

impl Defaults {
    const USUAL: Defaults = Defaults {
        rope_theta: 1e4,
        rotated: 1.0,
        rope_section: None,
        norm_eps: 1e-5,
        max_positions: 131_072,
        kv_heads: KvHeads::AsHeads,
        head_dim: None,
        tied: false,
    };
}

/// Keys that every family has, with the family's silent defaults.
struct Common<'c> {
    config: &'c Config,
    family: &'static str,
    defaults: Defaults,
    hidden_size: usize,
    layers: usize,
    heads: usize,
    rope: RopeConfig,
    names: Names,
    expert_count_keys: Vec<&'static str>,
    experts: usize,
    top_k: usize,
    norm_eps: f64,
}

impl<'c> Common<'c> {
    fn read(config: &'c Config, family: &'static str, names: Names, defaults: Defaults) -> Result<Self> {
        Common::read_with(config, family, names, defaults, config.section("rope_parameters")?)
    }

    /// As [`Common::read`] with another section in place of `rope_parameters`.
    fn read_with(
        config: &'c Config,
        family: &'static str,
        names: Names,
        defaults: Defaults,
        rope: Option<Config>,
    ) -> Result<Self> {
        config.require("hidden_act", "silu")?;
        let present = |key: &&str| config.get(key).is_some();
        let expert_count_keys: Vec<_> = EXPERT_COUNTS.into_iter().filter(present).collect();
        let count_key =
            expert_count_keys.first().ok_or_else(|| Error::invalid("num_experts", "is missing"))?;
        let top_k_key = config.first(&CHOICE_COUNTS).unwrap_or(CHOICE_COUNTS[0]);
        Ok(Common {
            family,
            defaults,
            hidden_size: config.positive("hidden_size")?,
            layers: layer_count(config)?,
            heads: config.positive("num_attention_heads")?,
            rope: rope_of(config, defaults, rope)?,
            names,
            experts: config.positive(count_key)?,
            top_k: match config.uniform_size(top_k_key)? {
                Some(count) => count,
                None => config.positive(top_k_key)?,
            },
            norm_eps: config.float_or("rms_norm_eps", defaults.norm_eps)?,
            expert_count_keys,
            config,
        })
    }

    fn head_dim(&self) -> Result<usize> {
        let Common { config, heads, hidden_size, .. } = *self;
        match (config.size_opt("head_dim")?, self.defaults.head_dim) {
            (Some(0), _) => Err(Error::invalid("head_dim", "is 0, expected at least 2")),
            (Some(dim), _) => Ok(dim),
            // A `null` means the quotient even where an absent key does not.
            (None, Some(dim)) if !config.mentions("head_dim") => Ok(dim),
            _ if hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
            _ => {
                let what = format!("is {heads}, expected a divisor of hidden_size = {hidden_size}");
                Err(Error::invalid("num_attention_heads", what))
            }
        }
    }

    /// Plain grouped-query attention without biases or norms, rotated in halves; families change what they have
    /// otherwise.
    fn grouped(&self) -> Result<GroupedAttention> {
        let head_dim = self.head_dim()?;
        let kv_heads = match self.defaults.kv_heads {
            // A `null` means as many as query heads even where an absent key does not.
            KvHeads::Fixed(heads) if !self.config.mentions("num_key_value_heads") => heads,
            _ => self.heads,
        };
        Ok(GroupedAttention {
            heads: self.heads,
            kv_heads: self.config.size_or("num_key_value_heads", kv_heads)?,
            head_dim,
            value_dim: head_dim,
            value_scale: 1.0,
            keys_as_values: false,
            value_norm: false,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
            rope: Some(self.rope.of_head(head_dim, Pairing::Halves)?),
            span: Span::Full,
            sinks: false,
            scale: (head_dim as f64).powf(-0.5) as f32,
            temperature: None,
            bias: None,
            cross: false,
            output_gate: OutputGate::None,
        })
    }

    /// Experts of this width behind a softmax router, without a shared expert.
    fn moe(&self, width: usize, weights: WeightRule) -> MoeSpec {
        MoeSpec {
            capacity: None,
            experts: self.experts,
            width,
            latent: None,
            activation: Activation::SwiGlu,
            expert_bias: false,
            router: RouterSpec::softmax(self.top_k, weights),
            shared: None,
        }
    }

    /// The router of DeepSeek-V3 and GLM-4.5: sigmoid scores; a bias that only choices see; the groups with the largest
    /// sums of two choice values (DeepSeek-V3, arXiv 2412.19437, §2.1.2). The defaults are those of `n_group`,
    /// `topk_group`, `routed_scaling_factor` and `norm_topk_prob`.
    fn biased_sigmoid(&self, [groups, kept]: [usize; 2], scale: f64, norm: bool) -> Result<RouterSpec> {
        let config = self.config;
        config.require("topk_method", "noaux_tc")?;
        let scale = config.float_or("routed_scaling_factor", scale)? as f32;
        let groups = group_limit(config, "n_group", [groups, kept])?;
        let weights = scaled_rule(config.flag_or("norm_topk_prob", norm)?, scale);
        Ok(RouterSpec { groups, ..RouterSpec::biased_sigmoid(self.top_k, weights) })
    }

    /// A shared expert as wide as the number of routed ones that `key` says; one MLP, however many that are.
    fn shared(&self, key: &str, default: usize, width: usize) -> Result<Option<SharedSpec>> {
        let count = self.config.size_or(key, default)?;
        Ok((count > 0).then_some(SharedSpec::of_width(count * width)))
    }

    fn architecture(self, layer: impl Fn(usize) -> LayerSpec) -> Result<Architecture> {
        Ok(Architecture {
            family: self.family,
            vocabulary: self.config.positive("vocab_size")?,
            hidden_size: self.hidden_size,
            max_positions: self.rope.max_positions(),
            norm_eps: self.norm_eps as f32,
            norm: NormKind::Rms,
            zero_centred_norms: false,
            norm_placement: NormPlacement::Before,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            layer_scales: false,
            dense_activation: Activation::SwiGlu,
            mlp_bias: false,
            tied_embeddings: self.config.flag_or("tie_word_embeddings", self.defaults.tied)?,
            head_bias: false,
            layers: (0..self.layers).map(layer).collect(),
            encoder_layers: 0,
            head_scale: 1.0,
            logit_cap: None,
            names: self.names,
            config_section: &[],
            expert_count_keys: self.expert_count_keys,
            packing: None,
        })
    }
}

/// `num_hidden_layers`, which transformers 5 does not write for a family whose layers it lists.
fn layer_count(config: &Config) -> Result<usize> {
    match config.strings("layers_block_type")? {
        Some(kinds) if config.get("num_hidden_layers").is_none() => Ok(kinds.len()),
        _ => config.positive("num_hidden_layers"),
    }
}

/// Renormalised where `norm_topk_prob` says so; where it is absent, as `absent` says.
fn weight_rule(config: &Config, absent: bool) -> Result<WeightRule> {
    Ok(renormalised_if(config.flag_or("norm_topk_prob", absent)?))
}

/// The same for routers that never renormalise a single weight.
fn weight_rule_of_several(common: &Common<'_>, absent: bool) -> Result<WeightRule> {
    let rule = weight_rule(common.config, absent)?;
    Ok(if common.top_k == 1 { renormalised_if(false) } else { rule })
}

/// The scores of the chosen, renormalised or as they are.
fn renormalised_if(renormalise: bool) -> WeightRule {
    if renormalise { WeightRule::RENORMALISED } else { WeightRule::Scaled(1.0) }
}

/// DeepSeek-V3's weights: the scores of the chosen, renormalised or not, times `scale`.
fn scaled_rule(renormalise: bool, scale: f32) -> WeightRule {
    if renormalise {
        WeightRule::Renormalised { added: 1e-20, least: 0.0, scale }
    } else {
        WeightRule::Scaled(scale)
    }
}

/// DeepSeek-V3's limit to the groups with the largest sums of two choice values, where there is more than one. The defaults
/// are those of `count_key` and `topk_group`.
fn group_limit(config: &Config, count_key: &str, [groups, kept]: [usize; 2]) -> Result<Option<GroupLimit>> {
    let count = config.size_or(count_key, groups)?;
    let limit =
        GroupLimit { count, kept: config.size_or("topk_group", kept)?, score: GroupScore::TwoLargest };
    Ok((count != 1).then_some(limit))
}

/// The rotary embedding that `section` says, which stands in for `rope_parameters`.
fn rope_of(config: &Config, defaults: Defaults, section: Option<Config>) -> Result<RopeConfig> {
    let Defaults { rope_theta: theta, rotated: partial, rope_section: default, .. } = defaults;
    let max_positions = config.size_or("max_position_embeddings", defaults.max_positions)?;
    RopeConfig::read(config, section, RopeDefaults { theta, partial, section: default }, max_positions)
}

/// Whether each layer attends to all earlier tokens, by `layer_types`: `full_attention`, or else `other`. `absent` says so
/// where a config has no such list.
fn attending_layers(
    config: &Config,
    layers: usize,
    other: &str,
    absent: Option<&dyn Fn(usize) -> bool>,
) -> Result<Vec<bool>> {
    layers_of_kind(config, "layer_types", layers, ["full_attention", other], absent)
}

/// Whether each layer has experts, by `mlp_layer_types`; where a config has no such list, those from `first` on have.
fn expert_layers(config: &Config, layers: usize, first: usize) -> Result<Vec<bool>> {
    listed_layers(config, layers, &|l| l >= first)
}

/// The same for a family whose configs without the list say it in another way.
fn listed_layers(config: &Config, layers: usize, absent: &dyn Fn(usize) -> bool) -> Result<Vec<bool>> {
    layers_of_kind(config, "mlp_layer_types", layers, ["sparse", "dense"], Some(absent))
}

/// Which layers the list `key` calls by the first of two names; the others have the second.
fn layers_of_kind(
    config: &Config,
    key: &str,
    layers: usize,
    [yes, no]: [&str; 2],
    absent: Option<&dyn Fn(usize) -> bool>,
) -> Result<Vec<bool>> {
    let Some(kinds) = config.strings(key)? else {
        let absent = absent.ok_or_else(|| Error::invalid(key, "is missing"))?;
        return Ok((0..layers).map(absent).collect());
    };
    if kinds.len() != layers {
        let what = format!("has {} entries, expected {layers}, as num_hidden_layers says", kinds.len());
        return Err(Error::invalid(key, what));
    }
    let is = |(l, kind): (usize, &String)| match kind.as_str() {
        kind if kind == yes => Ok(true),
        kind if kind == no => Ok(false),
        kind => {
            let what = format!("is `{kind}` in layer {l}, expected `{yes}` or `{no}`");
            Err(Error::invalid(key, what))
        }
    };
    kinds.iter().enumerate().map(is).collect()
}

/// The section `key`, without which there is no model.
fn required_section(config: &Config, key: &str) -> Result<Config> {
    config.section(key)?.ok_or_else(|| Error::invalid(key, "is missing"))
}

/// Section of the config of a model of text and images that speaks of its language model.
const TEXT_SECTION: &[&str] = &["text_config"];

/// The language model within a model of text and images, as `read` reads it from its section of the config; whether the
/// head is the embedding table where the config does not say.
fn within_images(
    config: &Config,
    tied: bool,
    read: impl FnOnce(&Config) -> Result<Architecture>,
) -> Result<Architecture> {
    let mut architecture = read(&required_section(config, TEXT_SECTION[0])?)?;
    architecture.config_section = TEXT_SECTION;
    // transformers ties as the whole model says, of which not every config does.
    architecture.tied_embeddings = config.flag_or("tie_word_embeddings", tied)?;
    Ok(architecture)
}

/// `names` of a language model that is published as a part called so, of which transformers 5 turns the names around.
fn as_language_model(mut names: Names) -> Names {
    names.model = "language_model.model.";
    names.head = "language_model.lm_head";
    names.other_model = Some(["model.language_model.", "lm_head"]);
    names
}

/// The window that `sliding_window` says, if it says one.
fn window(config: &Config) -> Result<Span> {
    Ok(match config.size_opt("sliding_window")? {
        None | Some(0) => Span::Full,
        Some(window) => Span::Window(window),
    })
}

fn feed_forward(sparse: bool, moe: &MoeSpec, dense_width: usize) -> FeedForwardSpec {
    if sparse { FeedForwardSpec::Moe(moe.clone()) } else { FeedForwardSpec::Dense { width: dense_width } }
}

/// A layer of grouped-query attention and experts.
fn moe_layer(attention: &GroupedAttention, moe: &MoeSpec) -> LayerSpec {
    LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: FeedForwardSpec::Moe(moe.clone()),
    }
}
