use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupedAttention, KvHeads, LayerSpec,
    MoeSpec, Names, QkNorm, Result, WeightRule,
};
use super::{feed_forward, weight_rule_of_several};

fn names() -> Names {
    Names {
        embedding: "word_embeddings",
        attention: "attention",
        fused_qkv: Some("query_key_value"),
        attention_output: "dense",
        qk_norms: ["query_layernorm", "key_layernorm"],
        choice_bias: ["gate.expert_bias"; 2],
        shared: ["shared_experts"; 2],
        ..Names::default()
    }
}

/// Ling and Ring (arXiv 2503.05139), which transformers does not have: the attention of Llama, its inputs by one matrix, and
/// a softmax router. From 2.0 on queries and keys have norms, and choices are those of DeepSeek-V3. Layers for multi-token
/// prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    for key in ["norm_head", "multi_gate"] {
        config.require(key, false)?;
    }
    let is_second = is_second(config)?;
    let defaults = Defaults { max_positions: if is_second { 32768 } else { 16384 }, ..Defaults::USUAL };
    let common = Common::read(config, "bailing_moe", names(), defaults)?;
    let normed = config.flag_or("use_qk_norm", is_second)?;
    let attention = GroupedAttention {
        qkv_bias: config.flag_or("use_qkv_bias", false)?,
        output_bias: config.flag_or("use_bias", !is_second)?,
        qk_norm: if normed { QkNorm::PerHead } else { QkNorm::None },
        ..common.grouped()?
    };
    let width = config.positive("moe_intermediate_size")?;
    let shared = common.shared("num_shared_experts", 0, width)?;
    let moe = if is_second {
        config.require("moe_router_enable_expert_bias", true)?;
        let router = common.biased_sigmoid([8, 4], 2.5, true)?;
        MoeSpec { router, shared, ..common.moe(width, WeightRule::RENORMALISED) }
    } else {
        MoeSpec { shared, ..common.moe(width, weight_rule_of_several(&common, true)?) }
    };
    let first = config.size_or("first_k_dense_replace", 0)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(l >= first, &moe, dense_width),
    })
}

/// Sarvam 30B (2026): Ling 2.0 with other defaults. transformers has its own names for some keys.
pub(super) fn sarvam(config: &Config) -> Result<Architecture> {
    config.require("use_bias", false)?;
    config.require("moe_router_enable_expert_bias", true)?;
    for key in ["score_function", "scoring_func"] {
        config.require(key, "sigmoid")?;
    }
    let defaults = Defaults {
        rope_theta: 8e6,
        norm_eps: 1e-6,
        kv_heads: KvHeads::Fixed(4),
        head_dim: Some(64),
        ..Defaults::USUAL
    };
    let rewritten = || Names { shared: ["shared_experts"; 2], ..Names::default() };
    let names = Names { rewritten: Some(rewritten), ..names() };
    let common = Common::read(config, "sarvam_moe", names, defaults)?;
    let normed = config.flag_or("use_qk_norm", true)?;
    let bias = config.first(&["attention_bias", "use_qkv_bias"]).unwrap_or("attention_bias");
    let attention = GroupedAttention {
        qkv_bias: config.flag_or(bias, false)?,
        qk_norm: if normed { QkNorm::PerHead } else { QkNorm::None },
        ..common.grouped()?
    };
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 2.5, true)?,
        shared: common.shared(shared_count(config), 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let first = config.size_or("first_k_dense_replace", 1)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(l >= first, &moe, dense_width),
    })
}

/// The key for the number of shared experts in a config of Sarvam, as published or as transformers writes it.
pub(super) fn shared_count(config: &Config) -> &'static str {
    config.first(&["n_shared_experts", "num_shared_experts"]).unwrap_or("n_shared_experts")
}

/// Both versions have one `model_type` in published configs.
fn is_second(config: &Config) -> Result<bool> {
    const SCORES: &str = "score_function";
    match config.get(SCORES).map(|_| config.string(SCORES)).transpose()?.as_deref() {
        None => {
            let classes = config.strings("architectures")?.unwrap_or_default();
            Ok(classes.iter().any(|class| class.starts_with("BailingMoeV2")))
        }
        Some("softmax") => Ok(false),
        Some("sigmoid") => Ok(true),
        Some(other) => Err(Error::invalid(SCORES, format!("is `{other}`; known: sigmoid, softmax"))),
    }
}
