use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, QkNorm, Result, Span, WeightRule,
};
use super::{attending_layers, expert_layers, feed_forward, window};

/// K-EXAONE (2026): the experts of DeepSeek-V3; where there is a window, layers that attend to everything have no positions.
/// Layers for multi-token prediction are not part of the forward pass.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        shared: ["shared_experts"; 2],
        choice_bias: ["e_score_correction_bias", "gate.e_score_correction_bias"],
        ..Names::default()
    };
    let defaults = Defaults { max_positions: 2048, kv_heads: KvHeads::Fixed(32), ..Defaults::USUAL };
    let common = Common::read(config, "exaone_moe", names, defaults)?;
    config.require("scoring_func", "sigmoid")?;
    let layers = common.layers;
    let window = if config.mentions("sliding_window") { window(config)? } else { Span::Window(4096) };
    let attends: Vec<bool> = if window == Span::Full {
        vec![false; layers]
    } else {
        let pattern = match config.get("layer_types") {
            None => config.positive_or("sliding_window_pattern", 4)?,
            Some(_) => 1,
        };
        attending_layers(config, layers, "sliding_attention", Some(&|l| (l + 1).is_multiple_of(pattern)))?
    };
    let sliding = GroupedAttention { qk_norm: QkNorm::PerHead, span: window, ..common.grouped()? };
    let full = GroupedAttention { rope: None, span: Span::Full, ..sliding.clone() };
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 2.5, true)?,
        shared: common.shared("num_shared_experts", 1, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let sparse = expert_layers(config, layers, config.size_or("first_k_dense_replace", 1)?)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(if attends[l] { full.clone() } else { sliding.clone() }),
        feed_forward: feed_forward(sparse[l], &moe, dense_width),
    })
}
