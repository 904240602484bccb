use super::super::Mamba;
use super::feed_forward;
use super::{
    Architecture, AttentionSpec, Common, Config, Defaults, Error, GroupedAttention, KvHeads, LayerSpec,
    Names, Result, WeightRule,
};

/// Jamba (arXiv 2403.19887): layers of Mamba, with layers of attention without positions among them; experts in every other
/// layer.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names {
        post_attention_norm: "pre_ff_layernorm",
        final_norm: "final_layernorm",
        feed_forward: "feed_forward",
        moe: "feed_forward",
        fused_moe: "feed_forward",
        router: ["router"; 2],
        ..Names::default()
    };
    config.require("mamba_inner_layernorms", true)?;
    let defaults = Defaults { norm_eps: 1e-6, kv_heads: KvHeads::Fixed(8), ..Defaults::USUAL };
    let common = Common::read(config, "jamba", names, defaults)?;
    let attention = AttentionSpec::Grouped(GroupedAttention { rope: None, ..common.grouped()? });
    let mamba = AttentionSpec::Mamba(mamba(config, common.hidden_size)?);
    let width = config.positive("intermediate_size")?;
    let moe = common.moe(width, WeightRule::Scaled(1.0));
    let attends = every(config, ["attn_layer_period", "attn_layer_offset"], [8, 4])?;
    let sparse = every(config, ["expert_layer_period", "expert_layer_offset"], [2, 1])?;
    let has_experts = common.experts > 1;
    common.architecture(|l| LayerSpec {
        attention: if attends(l) { attention.clone() } else { mamba.clone() },
        feed_forward: feed_forward(has_experts && sparse(l), &moe, width),
    })
}

fn mamba(config: &Config, hidden_size: usize) -> Result<Mamba> {
    const RANK: &str = "mamba_dt_rank";
    let automatic = config.get(RANK).is_none_or(|rank| rank.as_str() == Some("auto"));
    Ok(Mamba {
        width: config.positive_or("mamba_expand", 2)? * hidden_size,
        state_dim: config.positive_or("mamba_d_state", 16)?,
        step_rank: if automatic { hidden_size.div_ceil(16) } else { config.positive(RANK)? },
        kernel: config.positive_or("mamba_d_conv", 4)?,
        convolution_bias: config.flag_or("mamba_conv_bias", true)?,
        projection_bias: config.flag_or("mamba_proj_bias", false)?,
    })
}

/// Which layers are those whose number is the offset modulo the period.
fn every(config: &Config, keys: [&str; 2], [period, offset]: [usize; 2]) -> Result<impl Fn(usize) -> bool> {
    let period = config.positive_or(keys[0], period)?;
    let offset = config.size_or(keys[1], offset)?;
    if offset >= period {
        let what = format!("is {offset}, expected less than {} = {period}", keys[0]);
        return Err(Error::invalid(keys[1], what));
    }
    Ok(move |l: usize| l % period == offset)
}
