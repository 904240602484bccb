use super::{Architecture, Common, Config, Defaults, GroupedAttention, KvHeads, Names, Result, WeightRule};
use super::{moe_layer, window};

/// Mixtral (arXiv 2401.04088).
pub(super) fn read(config: &Config) -> Result<Architecture> {
    let names = Names { moe: "block_sparse_moe", projections: ["w1", "w3", "w2"], ..Names::default() };
    let defaults = Defaults { rope_theta: 1e6, kv_heads: KvHeads::Fixed(8), ..Defaults::USUAL };
    let common = Common::read(config, "mixtral", names, defaults)?;
    let attention = GroupedAttention { span: window(config)?, ..common.grouped()? };
    let moe = common.moe(config.positive("intermediate_size")?, WeightRule::RENORMALISED);
    common.architecture(|_| moe_layer(&attention, &moe))
}
