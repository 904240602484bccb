//! How `quantization_config` says that weights are packed.

use super::{Config, Error, Result};

/// What to do about weights that cannot be read.
const REMEDY: &str = "take the checkpoint that it was made from, or dequantise it first";

/// Packed storage of weights, from `quantization_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// FP8 e4m3 with scales.
    Fp8 {
        /// Rows and columns of the blocks that have a scale each; `None` where matrices or their rows do.
        block: Option<[usize; 2]>,
    },
    /// MXFP4 experts.
    Mxfp4,
    /// Four-bit integers with a scale for each group of columns.
    Int4 {
        /// Columns of a group; `None` where each row has one scale.
        group: Option<usize>,
    },
}

impl Packing {
    /// The blocks of DeepSeek-V3, and of all who followed.
    pub const USUAL_FP8_BLOCK: [usize; 2] = [128, 128];

    /// What `quantization_config` says, if there is one.
    ///
    /// # Errors
    /// Names the key that says something that is not supported.
    pub(super) fn read(config: &Config) -> Result<Option<Packing>> {
        let Some(section) = config.section("quantization_config")? else { return Ok(None) };
        let key = |name: &str| format!("quantization_config.{name}");
        match section.string("quant_method")?.as_str() {
            "mxfp4" => Ok(Some(Packing::Mxfp4)),
            "fp8" => match section.sizes("weight_block_size")?.as_deref() {
                Some(&[rows, cols]) if rows > 0 && cols > 0 => {
                    Ok(Some(Packing::Fp8 { block: Some([rows, cols]) }))
                }
                None => Ok(Some(Packing::Fp8 { block: None })),
                _ => Err(Error::invalid(&key("weight_block_size"), "expected two numbers above 0")),
            },
            "compressed-tensors" => compressed_tensors(&section).map(Some),
            other => {
                let what = format!(
                    "is `{other}`; known: fp8, mxfp4, compressed-tensors with FP8 or packed four-bit weights; {REMEDY}"
                );
                Err(Error::invalid(&key("quant_method"), what))
            }
        }
    }
}

/// What `config_groups` of the compressed-tensors format say: weights packed in one way for all groups.
fn compressed_tensors(section: &Config) -> Result<Packing> {
    let key = "quantization_config.config_groups";
    let groups = section.section("config_groups")?.ok_or_else(|| Error::invalid(key, "is missing"))?;
    let mut packing = None;
    for name in groups.keys() {
        let group = groups.section(name)?;
        let weights = group.as_ref().map(|group| group.section("weights")).transpose()?.flatten();
        let weights = weights.ok_or_else(|| Error::invalid(key, "has a group without weights"))?;
        let found = compressed_weights(&weights, key)?;
        if matches!(found, Packing::Int4 { .. }) {
            let format = group.as_ref().filter(|group| group.mentions("format")).unwrap_or(section);
            format.require("format", "pack-quantized")?;
        }
        if packing.is_some_and(|packing| packing != found) {
            return Err(Error::invalid(
                key,
                "has groups with scales of different kinds; only one is supported",
            ));
        }
        packing = Some(found);
    }
    packing.ok_or_else(|| Error::invalid(key, "is empty"))
}

/// What `weights` of a group say.
fn compressed_weights(weights: &Config, key: &str) -> Result<Packing> {
    let [kind, strategy] = ["type", "strategy"].map(|k| weights.string(k));
    let (kind, strategy, bits) = (kind?, strategy?, weights.size("num_bits")?);
    match (kind.as_str(), bits, strategy.as_str()) {
        ("float", 8, "tensor" | "channel") => Ok(Packing::Fp8 { block: None }),
        ("float", 8, "block") => match weights.sizes("block_structure")?.as_deref() {
            Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Packing::Fp8 { block: Some([rows, cols]) }),
            _ => Err(Error::invalid(key, "has a block_structure that is not two numbers above 0")),
        },
        ("int", 4, "group" | "channel") => {
            weights.require("symmetric", true)?;
            let order = weights.get("actorder").map(|_| weights.string("actorder")).transpose()?;
            if !matches!(order.as_deref(), None | Some("weight" | "static")) {
                let what = format!("has weights in another order of columns (actorder); {REMEDY}");
                return Err(Error::invalid(key, what));
            }
            let group = (strategy == "group").then(|| weights.positive("group_size")).transpose()?;
            match group {
                Some(group) if group % 2 == 1 => {
                    Err(Error::invalid(key, format!("has a group_size of {group}, expected an even number")))
                }
                group => Ok(Packing::Int4 { group }),
            }
        }
        _ => {
            let what = format!(
                "has {bits}-bit weights of type {kind} by {strategy}; known: 8-bit float by tensor, channel or block, 4-bit \
                 int by group or channel; {REMEDY}"
            );
            Err(Error::invalid(key, what))
        }
    }
}
