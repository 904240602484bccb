//! Finding the experts of a stock checkpoint: separate, or stored together in one of several ways, plain or packed.

use super::find::Finder;
use super::find_experts::{Kind, assemble};
use super::{Error, Result};
use crate::architecture::{ExpertStorage, MoeSpec, Projection};
use crate::backend::{Linear, Matrix, StoredExpert};
use crate::checkpoint::{Dtype, Stride, Tensor, Weight};

/// The tensors that hold all experts of a layer together, where the family's own layout has such.
#[derive(Default)]
pub(super) struct Fused {
    pub(super) tensors: Vec<Tensor>,
    /// Whether they are `[experts, out, in]`.
    pub(super) output_major: bool,
}

impl Finder<'_> {
    /// The experts of a stock checkpoint, and the tensors that hold them together where the family's own layout does.
    pub(super) fn all_experts(&self, moe: &MoeSpec) -> Result<(Vec<StoredExpert>, Fused)> {
        let [gate_up, down] = [false, true].map(|down| self.architecture.names.fused(self.l, down));
        match self.architecture.names.storage {
            // Only the layout that transformers 5 can write has tensors of these names.
            ExpertStorage::Separate | ExpertStorage::WithImages
                if self.checkpoint.get(&gate_up[1]).is_some() =>
            {
                Ok((self.rewritten(moe, &gate_up[1], &down[1])?, Fused::default()))
            }
            ExpertStorage::Separate | ExpertStorage::WithImages => self.separate(moe),
            ExpertStorage::OutputMajor => {
                let names = [self.either(&gate_up, ""), self.either(&down, "")];
                // Packed ones come apart.
                if self.checkpoint.get(names[0]).is_none() && self.has_separate() {
                    return self.separate(moe);
                }
                self.output_major_stacks(moe, names)
            }
            ExpertStorage::Stacked => self.stacked(moe),
            ExpertStorage::Transposed if self.is_output_major(moe, [&gate_up[0], &down[0]]) => {
                self.output_major_stacks(moe, [&gate_up[0], &down[0]])
            }
            storage @ (ExpertStorage::Transposed | ExpertStorage::Fused { .. }) => {
                let interleaved = storage == ExpertStorage::Fused { interleaved: true };
                let (experts, tensors) = self.fused(moe, &gate_up[0], &down[0], interleaved)?;
                Ok((experts, Fused { tensors, output_major: false }))
            }
        }
    }

    /// One tensor per expert and matrix.
    fn separate(&self, moe: &MoeSpec) -> Result<(Vec<StoredExpert>, Fused)> {
        let experts = (0..moe.experts).map(|e| self.expert(e, moe, moe.width, [Kind::Dense; 3]));
        Ok((experts.collect::<Result<_>>()?, Fused::default()))
    }

    fn has_separate(&self) -> bool {
        self.checkpoint.get(&self.weight_name(0, Projection::Gate)).is_some()
    }

    /// Experts whose own layout is [`ExpertStorage::OutputMajor`], and the tensors with these names.
    fn output_major_stacks(&self, moe: &MoeSpec, names: [&str; 2]) -> Result<(Vec<StoredExpert>, Fused)> {
        let experts = self.rewritten(moe, names[0], names[1])?;
        let suffixes = ["", "_scale_inv", "_activation_scale"];
        let stored = names.iter().flat_map(|name| suffixes.map(|suffix| format!("{name}{suffix}")));
        let tensors: Vec<_> = stored.filter_map(|name| self.checkpoint.get(&name).cloned()).collect();
        if let Some(odd) = tensors.iter().find(|t| t.shape().first() != Some(&moe.experts)) {
            let (name, shape) = (odd.name(), odd.shape());
            let what =
                format!("{name} has shape {shape:?}, expected an entry for each of {} experts", moe.experts);
            return Err(Error::Inconsistent { layer: self.l, what });
        }
        Ok((experts, Fused { tensors, output_major: true }))
    }

    /// Experts one below the other; the tensors come with an entry for each expert.
    fn stacked(&self, moe: &MoeSpec) -> Result<(Vec<StoredExpert>, Fused)> {
        let (n, d, width) = (moe.experts, self.architecture.expert_io(moe), moe.width);
        let stack = |p| {
            let stored = self.numbers(&self.architecture.names.stacked(self.l, p), &[n * width, d])?;
            Ok(stored.split_rows(n))
        };
        let tensors = Projection::ALL.into_iter().map(stack).collect::<Result<Vec<Tensor>>>()?;
        let experts = (0..n).map(|e| {
            let map = |p: Projection| {
                let own = tensors[p as usize].entry(e);
                let weight = match p {
                    Projection::Gate | Projection::Up => Weight::plain(own),
                    Projection::Down => Weight::input_major(own, Stride::ALL, d),
                };
                let weight = weight.map_err(|e| self.error(e))?.renamed(self.weight_name(e, p));
                Ok(Linear { weight: Matrix::Dense(weight), bias: None })
            };
            assemble(moe, map)
        });
        let experts = experts.collect::<Result<_>>()?;
        Ok((experts, Fused { tensors, output_major: false }))
    }

    /// Whether matrices that a family publishes input-major are stored as transformers 5 holds them in memory.
    fn is_output_major(&self, moe: &MoeSpec, [gate_up, down]: [&str; 2]) -> bool {
        let (n, d, width) = (moe.experts, self.architecture.expert_io(moe), moe.width);
        let has =
            |name: &str, shape: [usize; 3]| self.checkpoint.get(name).is_some_and(|t| t.shape() == shape);
        // One of the two is not square.
        has(gate_up, [n, 2 * width, d]) && has(down, [n, d, width])
    }

    /// Experts that transformers 5 fused: gate rows, then up rows, where there are such.
    fn rewritten(&self, moe: &MoeSpec, gate_up: &str, down: &str) -> Result<Vec<StoredExpert>> {
        let (d, width) = (self.architecture.expert_io(moe), moe.width);
        let parts = if moe.activation.is_gated() { 2 } else { 1 };
        let gate_up = self.output_major(gate_up, [moe.experts, parts * width, d])?;
        let down = self.output_major(down, [moe.experts, d, width])?;
        let experts = (0..moe.experts).map(|e| {
            let map = |p: Projection| {
                let weight = match p {
                    Projection::Gate => gate_up.weight(e, 0, width),
                    Projection::Up => gate_up.weight(e, width, width),
                    Projection::Down => down.weight(e, 0, d),
                };
                let weight = weight.map_err(|e| self.error(e))?;
                Ok(Linear { weight: Matrix::Dense(weight.renamed(self.weight_name(e, p))), bias: None })
            };
            assemble(moe, map)
        });
        experts.collect()
    }

    /// The matrices of all experts under one name, `[experts, out, input]`; in FP8 with `{name}_scale_inv` `[experts, blocks
    /// of rows, blocks of columns]`.
    fn output_major(&self, name: &str, shape: [usize; 3]) -> Result<OutputMajor> {
        let values = self.tensor(name, &shape)?;
        if values.dtype() != Dtype::F8_E4M3 {
            return Ok(OutputMajor { values, scales: None });
        }
        let [experts, out, input] = shape;
        let name_of_scales = format!("{name}_scale_inv");
        let stored = self.checkpoint.get(&name_of_scales);
        if self.declared_fp8_block().is_none()
            && let Some(scales) = stored.filter(|s| s.shape().first() == Some(&experts) && s.len() == experts)
        {
            return Ok(OutputMajor { values, scales: Some((scales.clone(), None)) });
        }
        let block = self.fp8_block();
        let blocks = [experts, out.div_ceil(block[0]), input.div_ceil(block[1])];
        let scales = self.tensor(&name_of_scales, &blocks)?;
        Ok(OutputMajor { values, scales: Some((scales, Some(block))) })
    }

    /// Experts of a family that publishes them fused: input-major, or packed and output-major.
    fn fused(
        &self,
        moe: &MoeSpec,
        gate_up: &str,
        down: &str,
        interleaved: bool,
    ) -> Result<(Vec<StoredExpert>, Vec<Tensor>)> {
        let (n, d, width) = (moe.experts, self.architecture.expert_io(moe), moe.width);
        let stacks = [self.stack(gate_up, [n, 2 * width, d])?, self.stack(down, [n, d, width])?];
        let biases = if moe.expert_bias {
            let gate_up = self.numbers(&format!("{gate_up}_bias"), &[n, 2 * width])?;
            Some([gate_up, self.numbers(&format!("{down}_bias"), &[n, d])?])
        } else {
            None
        };
        let step = if interleaved { 2 } else { 1 };
        let experts = (0..n).map(|e| {
            let map = |p: Projection| {
                let (which, out, rows) = match p {
                    Projection::Gate => (0, width, Stride { first: 0, step }),
                    Projection::Up => (0, width, Stride { first: if interleaved { 1 } else { width }, step }),
                    Projection::Down => (1, d, Stride::ALL),
                };
                let weight = stacks[which].weight(e, rows, out).map_err(|e| self.error(e))?;
                let bias = |tensors: &[Tensor; 2]| {
                    let name = self.weight_name(e, p).replace(".weight", ".bias");
                    tensors[which].entry(e).select_rows(&rows.indices(out)).renamed(name)
                };
                Ok(Linear {
                    weight: Matrix::Dense(weight.renamed(self.weight_name(e, p))),
                    bias: biases.as_ref().map(bias),
                })
            };
            assemble(moe, map)
        });
        let experts = experts.collect::<Result<_>>()?;
        let stored = stacks.into_iter().flat_map(Stack::tensors);
        Ok((experts, stored.chain(biases.into_iter().flatten()).collect()))
    }

    /// The matrices of all experts under one name: `[experts, out, input]` once they are decoded.
    fn stack(&self, name: &str, [experts, out, input]: [usize; 3]) -> Result<Stack> {
        let blocks = format!("{name}_blocks");
        if self.checkpoint.get(&blocks).is_none() {
            return Ok(Stack::InputMajor(self.numbers(name, &[experts, input, out])?));
        }
        if !input.is_multiple_of(32) {
            let what = format!("{blocks}: rows of {input} values cannot be MXFP4, whose blocks have 32");
            return Err(Error::Inconsistent { layer: self.l, what });
        }
        Ok(Stack::Mxfp4 {
            blocks: self.tensor(&blocks, &[experts, out, input / 32, 16])?,
            scales: self.tensor(&format!("{name}_scales"), &[experts, out, input / 32])?,
        })
    }
}

/// The matrices of all experts as transformers 5 fuses them.
struct OutputMajor {
    /// `[experts, out, in]`.
    values: Tensor,
    /// Of FP8, and the rows and columns of a block; one for each expert where there are no blocks.
    scales: Option<(Tensor, Option<[usize; 2]>)>,
}

impl OutputMajor {
    /// `count` rows of expert `e` from `first` on.
    fn weight(&self, e: usize, first: usize, count: usize) -> crate::checkpoint::Result<Weight> {
        let values = self.values.entry(e);
        let whole = match &self.scales {
            None => Weight::plain(values),
            Some((scales, block)) => {
                let block = block.unwrap_or([values.shape()[0], values.shape()[1]]);
                Weight::fp8(values, scales.entry(e), block)
            }
        };
        whole?.part(first, count)
    }
}

/// The matrices of all experts in one tensor, or one and its scales.
enum Stack {
    /// `[experts, in, out]`.
    InputMajor(Tensor),
    Mxfp4 {
        /// `[experts, out, in / 32, 16]`.
        blocks: Tensor,
        /// `[experts, out, in / 32]`.
        scales: Tensor,
    },
}

impl Stack {
    /// `count` output rows of expert `e`.
    fn weight(&self, e: usize, rows: Stride, count: usize) -> crate::checkpoint::Result<Weight> {
        match self {
            Stack::InputMajor(tensor) => Weight::input_major(tensor.entry(e), rows, count),
            Stack::Mxfp4 { blocks, scales } => Weight::mxfp4(blocks.entry(e), scales.entry(e), rows, count),
        }
    }

    fn tensors(self) -> Vec<Tensor> {
        match self {
            Stack::InputMajor(tensor) => vec![tensor],
            Stack::Mxfp4 { blocks, scales } => vec![blocks, scales],
        }
    }
}
