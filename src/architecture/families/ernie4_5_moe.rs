use super::feed_forward;
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, GroupedAttention, LayerSpec, MoeSpec,
    Names, Pairing, Result, RouterSpec, WeightRule,
};

/// ERNIE 4.5 text models (ERNIE 4.5 Technical Report, 2025).
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        shared: ["shared_experts"; 2],
        choice_bias: ["moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"],
        choice_bias_is_row: true,
        ..Names::default()
    };
    let defaults = Defaults { rope_theta: 500_000.0, tied: true, ..Defaults::USUAL };
    let common = Common::read(config, "ernie4_5_moe", names, defaults)?;
    let bias = config.flag_or("use_bias", false)?;
    let plain = common.grouped()?;
    let attention = GroupedAttention {
        qkv_bias: bias,
        output_bias: bias,
        rope: Some(common.rope.of_head(plain.head_dim, Pairing::Adjacent)?),
        ..plain
    };
    let least = config.float_or("moe_norm_min", 1e-12)? as f32;
    let weights = WeightRule::Renormalised { added: 0.0, least, scale: 1.0 };
    let width = config.positive("moe_intermediate_size")?;
    let moe = MoeSpec {
        router: RouterSpec { choice: Choice::BiasedScore, ..RouterSpec::softmax(common.top_k, weights) },
        shared: common.shared("moe_num_shared_experts", 2, width)?,
        ..common.moe(width, weights)
    };
    let start = config.size_or("moe_layer_start_index", 1)?;
    let interval = config.size_or("moe_layer_interval", 1)?.max(1);
    // −1 is the last layer.
    let end = config.float_or("moe_layer_end_index", -1.0)?;
    let sparse =
        |l: usize| (l + 1).is_multiple_of(interval) && l >= start && (end == -1.0 || l as f64 <= end);
    let dense_width = config.positive("intermediate_size")?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: AttentionSpec::Grouped(attention.clone()),
        feed_forward: feed_forward(sparse(l), &moe, dense_width),
    })?;
    architecture.mlp_bias = bias;
    architecture.head_bias = bias;
    Ok(architecture)
}
