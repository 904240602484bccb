use super::mamba::check_count;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupedAttention, KvHeads, LayerSpec,
    MoeSpec, Names, OutputGate, Pairing, QkNorm, Result, RouterSpec, SharedSpec, Span, WeightRule,
};
use super::{attending_layers, expert_layers, feed_forward, rope_of, window};

/// Laguna (Poolside, 2026): gated attention whose layers differ in number of heads, and a rotation for each kind of them.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        shared: ["shared_expert", "shared_experts"],
        choice_bias: ["experts.e_score_correction_bias", "gate.e_score_correction_bias"],
        ..Names::default()
    };
    config.require("moe_apply_router_weight_on_input", false)?;
    config.require("moe_router_logit_softcapping", 0)?;
    let sections = config.section("rope_parameters")?;
    let section = |kind: &str| match &sections {
        None => Ok(None),
        Some(sections) => sections.section(kind),
    };
    let sliding =
        Defaults { norm_eps: 1e-6, kv_heads: KvHeads::Fixed(8), head_dim: Some(128), ..Defaults::USUAL };
    // Only without sections of its own does a layer that attends to everything rotate half of a head.
    let rotated = if sections.is_some() { 1.0 } else { 0.5 };
    let full = Defaults { rope_theta: 500_000.0, rotated, ..sliding };
    let common = Common::read_with(config, "laguna", names, full, section("full_attention")?)?;
    let sliding_rope = rope_of(config, sliding, section("sliding_attention")?)?;
    let bias = config.flag_or("attention_bias", false)?;
    let full = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        output_gate: OutputGate::Softplus { per_head: gates_heads(config)? },
        ..common.grouped()?
    };
    let sliding = GroupedAttention {
        rope: Some(sliding_rope.of_head(full.head_dim, Pairing::Halves)?),
        span: if config.mentions("sliding_window") { window(config)? } else { Span::Window(512) },
        ..full.clone()
    };
    let layers = common.layers;
    let attends = attending_layers(config, layers, "sliding_attention", Some(&|_| true))?;
    let heads = config.sizes(HEADS)?.unwrap_or_else(|| vec![common.heads; layers]);
    check_count(HEADS, heads.len(), layers)?;
    if heads.contains(&0) {
        return Err(Error::invalid(HEADS, "has a 0, expected at least 1"));
    }
    let scale = config.float_or("moe_routed_scaling_factor", 1.0)? as f32;
    let weights = WeightRule::Renormalised { added: 0.0, least: 0.0, scale };
    let moe = MoeSpec {
        router: RouterSpec::biased_sigmoid(common.top_k, weights),
        shared: Some(SharedSpec::of_width(config.positive_or("shared_expert_intermediate_size", 512)?)),
        ..common.moe(config.positive_or("moe_intermediate_size", 512)?, weights)
    };
    let sparse = expert_layers(config, layers, 1)?;
    let dense_width = config.positive_or("intermediate_size", 8192)?;
    common.architecture(|l| {
        let attention = if attends[l] { &full } else { &sliding };
        LayerSpec {
            attention: AttentionSpec::Grouped(GroupedAttention { heads: heads[l], ..attention.clone() }),
            feed_forward: feed_forward(sparse[l], &moe, dense_width),
        }
    })
}

/// Number of query heads of every layer.
const HEADS: &str = "num_attention_heads_per_layer";

/// Whether the gate has one number for each head.
fn gates_heads(config: &Config) -> Result<bool> {
    match config.get("gating") {
        None => Ok(true),
        Some(value) if *value == true || value == "per-head" => Ok(true),
        Some(value) if value == "per-element" => Ok(false),
        Some(value) => {
            let what = format!("is {value}; known: true, \"per-head\", \"per-element\"");
            Err(Error::invalid("gating", what))
        }
    }
}
