use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec, MoeSpec,
    Names, QkNorm, Result, Span, WeightRule,
};
use super::{feed_forward, window};

/// dots.llm1 (arXiv 2506.05767): the attention of Qwen3 and the experts of DeepSeek-V3. Its configs write the method of
/// choice under `scoring_func`; scores are always sigmoids.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names { shared: ["shared_experts"; 2], ..Names::default() };
    let defaults =
        Defaults { norm_eps: 1e-6, max_positions: 2048, kv_heads: KvHeads::Fixed(32), ..Defaults::USUAL };
    let common = Common::read(config, "dots1", names, defaults)?;
    let bias = config.flag_or("attention_bias", false)?;
    let attention =
        GroupedAttention { qkv_bias: bias, output_bias: bias, qk_norm: QkNorm::PerHead, ..common.grouped()? };
    let window = if config.mentions("sliding_window") { window(config)? } else { Span::Window(4096) };
    let first_sliding = config.size_or("max_window_layers", 62)?;
    let layer_types = config.strings("layer_types")?;
    let slides = |l: usize| match &layer_types {
        Some(types) => types.get(l).is_some_and(|t| t == "sliding_attention"),
        None => l >= first_sliding,
    };
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: common.biased_sigmoid([1, 1], 1.0, false)?,
        shared: common.shared("n_shared_experts", 0, width)?,
        ..common.moe(width, WeightRule::RENORMALISED)
    };
    let first = config.size_or("first_k_dense_replace", 0)?;
    let dense_width = config.positive("intermediate_size")?;
    common.architecture(|l| {
        let span = if slides(l) { window } else { Span::Full };
        LayerSpec {
            attention: AttentionSpec::Grouped(GroupedAttention { span, ..attention.clone() }),
            feed_forward: feed_forward(l >= first, &moe, dense_width),
        }
    })
}
