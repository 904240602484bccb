use super::{
    Architecture, Common, Config, Defaults, Error, GroupedAttention, Names, NormKind, NormPlacement,
    OutputGate, Pairing, Result,
};
use super::{moe_layer, weight_rule, window};

/// Most attentions of a layer.
const MOST_ATTENTIONS: usize = 1024;

/// Branch-Attend-Mix (arXiv 2408.08274, §3), as [`crate::upcycle`] makes it of dense models of `dense_model_type`; there is
/// no other format. Head counts are those of one attention expert.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let dense = config.string("dense_model_type")?;
    let is_parallel = match dense.as_str() {
        "llama" | "mistral" => false,
        "cohere" => true,
        other => {
            let what = format!("is `{other}`, expected `llama`, `mistral` or `cohere`");
            return Err(Error::invalid("dense_model_type", what));
        }
    };
    let common = Common::read(config, "bam", Names::default(), Defaults::USUAL)?;
    let count = config.positive("num_attention_experts")?;
    if count > MOST_ATTENTIONS {
        let what = format!("is {count}, expected at most {MOST_ATTENTIONS}");
        return Err(Error::invalid("num_attention_experts", what));
    }
    let one = common.grouped()?;
    let shares = config.flag_or("shared_key_values", false)?;
    let pairing = if is_parallel { Pairing::Adjacent } else { Pairing::Halves };
    let attention = GroupedAttention {
        heads: count * one.heads,
        kv_heads: if shares { one.kv_heads } else { count * one.kv_heads },
        rope: Some(common.rope.of_head(one.head_dim, pairing)?),
        span: window(config)?,
        output_gate: OutputGate::Experts { count, turns: if shares { one.kv_heads } else { 1 } },
        ..one
    };
    let moe = common.moe(config.positive("intermediate_size")?, weight_rule(config, false)?);
    let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
    if is_parallel {
        architecture.norm = NormKind::Layer { bias: false };
        architecture.norm_eps = config.float_or("layer_norm_eps", 1e-5)? as f32;
        architecture.norm_placement = NormPlacement::BeforeBoth;
        architecture.head_scale = config.float_or("logit_scale", 1.0)? as f32;
    }
    Ok(architecture)
}
