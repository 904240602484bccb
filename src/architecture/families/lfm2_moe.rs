use super::super::ShortConvolution;
use super::{
    Architecture, AttentionSpec, Choice, Common, Config, Defaults, GroupedAttention, KvHeads, LayerSpec,
    MoeSpec, Names, QkNorm, Result, RouterSpec, WeightRule,
};
use super::{attending_layers, feed_forward};

/// LFM2 with experts (LFM2 Technical Report, arXiv 2511.23404): short convolutions with layers of attention among them.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let matrices = ["w1", "w3", "w2"];
    let names = Names {
        input_norm: "operator_norm",
        post_attention_norm: "ffn_norm",
        final_norm: "embedding_norm",
        attention_output: "out_proj",
        qk_norms: ["q_layernorm", "k_layernorm"],
        feed_forward: "feed_forward",
        dense: matrices,
        moe: "feed_forward",
        fused_moe: "feed_forward",
        choice_bias: ["expert_bias"; 2],
        projections: matrices,
        ..Names::default()
    };
    let defaults = Defaults {
        rope_theta: 1e6,
        max_positions: 128_000,
        kv_heads: KvHeads::Fixed(8),
        tied: true,
        ..Defaults::USUAL
    };
    let common = Common::read(config, "lfm2_moe", names, defaults)?;
    let attends = attending_layers(config, common.layers, "conv", None)?;
    let attention =
        AttentionSpec::Grouped(GroupedAttention { qk_norm: QkNorm::PerHead, ..common.grouped()? });
    let convolution = AttentionSpec::ShortConvolution(ShortConvolution {
        kernel: config.positive_or("conv_L_cache", 3)?,
        bias: config.flag_or("conv_bias", false)?,
    });
    let moe = MoeSpec {
        router: router(config, common.top_k)?,
        ..common.moe(config.positive("moe_intermediate_size")?, WeightRule::RENORMALISED)
    };
    let first_sparse = config.size_or("num_dense_layers", 2)?;
    let dense_width = config.positive("intermediate_size")?;
    let mut architecture = common.architecture(|l| LayerSpec {
        attention: if attends[l] { attention.clone() } else { convolution.clone() },
        feed_forward: feed_forward(l >= first_sparse, &moe, dense_width),
    })?;
    architecture.norm_eps = config.float_or("norm_eps", 1e-5)? as f32;
    // The older key wins, as in transformers.
    architecture.tied_embeddings = config.flag_or("tie_embedding", architecture.tied_embeddings)?;
    Ok(architecture)
}

/// Sigmoid scores, and where `use_expert_bias` says so a bias that only choices see.
fn router(config: &Config, top_k: usize) -> Result<RouterSpec> {
    let scale = config.float_or("routed_scaling_factor", 1.0)? as f32;
    let weights = if config.flag_or("norm_topk_prob", true)? {
        WeightRule::Renormalised { added: 1e-6, least: 0.0, scale }
    } else {
        WeightRule::Scaled(scale)
    };
    let biased = config.flag_or("use_expert_bias", true)?;
    let choice = if biased { Choice::BiasedScore } else { Choice::Score };
    Ok(RouterSpec { choice, ..RouterSpec::biased_sigmoid(top_k, weights) })
}
