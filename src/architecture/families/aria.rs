use super::super::ExpertStorage;
use super::{
    Architecture, Choice, Common, Config, Defaults, GroupedAttention, MoeSpec, Names, Result, RouterSpec,
    WeightRule,
};
use super::{as_language_model, moe_layer, within_images};

/// Aria (arXiv 2410.05993): the language model within a model of text and images.
pub(super) fn read(config: &Config) -> Result<Architecture> {
    within_images(config, false, |text| {
        let names = Names {
            router: ["router"; 2],
            fused: [["experts.fc1.weight"; 2], ["experts.fc2.weight"; 2]],
            shared: ["shared_experts"; 2],
            storage: ExpertStorage::Fused { interleaved: false },
            ..Names::default()
        };
        let defaults = Defaults { norm_eps: 1e-6, max_positions: 2048, ..Defaults::USUAL };
        let common = Common::read(text, "aria", as_language_model(names), defaults)?;
        let bias = text.flag_or("attention_bias", false)?;
        let attention = GroupedAttention { qkv_bias: bias, output_bias: bias, ..common.grouped()? };
        let width = text.positive("intermediate_size")?;
        // The largest logits, and the softmax over them alone: the renormalised softmax over all.
        let moe = MoeSpec {
            router: RouterSpec {
                choice: Choice::Logit,
                ..RouterSpec::softmax(common.top_k, WeightRule::RENORMALISED)
            },
            shared: common.shared("moe_num_shared_experts", 2, width)?,
            ..common.moe(width, WeightRule::RENORMALISED)
        };
        let mut architecture = common.architecture(|_| moe_layer(&attention, &moe))?;
        architecture.mlp_bias = text.flag_or("mlp_bias", false)?;
        Ok(architecture)
    })
}
