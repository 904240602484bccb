//! Finding router and experts of a layer: separate or fused, plain or packed, stock or in the moepress layout.

use super::find::Finder;
use super::source::{LinearSource, MoeSource};
use super::{Error, Result};
use crate::architecture::{Choice, ExpertStorage, MoeSpec, Projection};
use crate::backend::{Base, Expert, Linear, Matrix, Mlp, RouterWeights, StoredExpert};
use crate::checkpoint::{Dtype, ExpertEntry, ExpertForm, LayerEntry, Stride, Tensor, Weight};

impl Finder<'_> {
    pub(super) fn moe(&self, moe: &MoeSpec) -> Result<MoeSource> {
        let (l, d) = (self.l, self.architecture.hidden_size);
        let names = &self.architecture.names;
        let entry = self.checkpoint.manifest().and_then(|m| m.layers.iter().find(|entry| entry.layer == l));
        let mut spec = moe.router.clone();
        let mut base = [None, None, None];
        let (experts, fused, numbers) = if let Some(entry) = entry {
            spec.top_k = entry.top_k;
            spec.skip = entry.skip;
            let numbers: Vec<usize> = entry.experts.iter().map(|e| e.expert).collect();
            let experts = self.listed_experts(entry, moe, &numbers)?;
            base = self.base(moe, &experts)?;
            (experts, Fused::default(), numbers)
        } else {
            let (experts, fused) = self.all_experts(moe)?;
            (experts, fused, (0..moe.experts).collect())
        };
        let shared = match moe.shared {
            None => None,
            Some(shared) => {
                let gate = || {
                    let gate = self.numbers(&names.shared_gate(l), &[1, d])?;
                    Weight::plain(gate).map_err(|e| self.error(e))
                };
                let gate = shared.gated.then(gate).transpose()?;
                Some((self.shared_mlp(shared.width)?, gate))
            }
        };
        let source = MoeSource {
            router: self.router(moe, experts.len())?,
            spec,
            capacity: moe.capacity,
            experts,
            base,
            width: moe.width,
            numbers,
            original_experts: moe.experts,
            shared,
            fused: fused.tensors,
            fused_output_major: fused.output_major,
        };
        source.check_choices(l)?;
        Ok(source)
    }

    /// The shared expert, whichever way it is stored.
    fn shared_mlp(&self, width: usize) -> Result<Mlp<LinearSource>> {
        let (names, d) = (&self.architecture.names, self.architecture.hidden_size);
        let Some([gate_up, down]) = names.shared_gate_up(self.l) else {
            return self.mlp(width, |p| {
                let both = names.shared(self.l, p);
                self.either(&both, ".weight").to_string()
            });
        };
        let stored = self.numbers(&format!("{gate_up}.weight"), &[2 * width, d])?;
        let rows = |first: usize| {
            let weight = Weight::plain(stored.rows(first, width)).map_err(|e| self.error(e))?;
            Ok::<_, Error>(Linear { weight, bias: None })
        };
        Ok(Mlp {
            gate: rows(0)?,
            up: Some(rows(width)?),
            down: self.linear(&down, d, width, false)?,
            activation: self.architecture.dense_activation,
        })
    }

    fn router(&self, moe: &MoeSpec, experts: usize) -> Result<RouterWeights> {
        let (l, names) = (self.l, &self.architecture.names);
        let routers = names.routers(l);
        let router = self.either(&routers, ".weight");
        let choice_bias = || {
            let stored = names.choice_biases(l);
            let name = self.either(&stored, "");
            if names.choice_bias_is_row {
                Ok(self.numbers(name, &[1, experts])?.entry(0))
            } else {
                self.numbers(name, &[experts])
            }
        };
        Ok(RouterWeights {
            weight: self.numbers(&format!("{router}.weight"), &[experts, self.architecture.hidden_size])?,
            bias: self.bias(router, experts, moe.router.bias)?,
            choice_bias: (moe.router.choice == Choice::BiasedScore).then(choice_bias).transpose()?,
        })
    }

    /// The experts of a stock checkpoint, and the tensors that hold them together where the family's own layout does.
    fn all_experts(&self, moe: &MoeSpec) -> Result<(Vec<StoredExpert>, Fused)> {
        let [gate_up, down] = [false, true].map(|down| self.architecture.names.fused(self.l, down));
        match self.architecture.names.storage {
            // Only the layout that transformers 5 can write has tensors of these names.
            ExpertStorage::Separate if self.checkpoint.get(&gate_up[1]).is_some() => {
                Ok((self.rewritten(moe, &gate_up[1], &down[1])?, Fused::default()))
            }
            ExpertStorage::Separate => self.separate(moe),
            ExpertStorage::OutputMajor => {
                let names = [self.either(&gate_up, ""), self.either(&down, "")];
                // Packed ones come apart.
                if self.checkpoint.get(names[0]).is_none() && self.has_separate() {
                    return self.separate(moe);
                }
                self.output_major_stacks(moe, names)
            }
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
        let tensors = stored.filter_map(|name| self.checkpoint.get(&name).cloned()).collect();
        Ok((experts, Fused { tensors, output_major: true }))
    }

    /// Whether matrices that a family publishes input-major are stored as transformers 5 holds them in memory.
    fn is_output_major(&self, moe: &MoeSpec, [gate_up, down]: [&str; 2]) -> bool {
        let (n, d, width) = (moe.experts, self.architecture.hidden_size, moe.width);
        let has =
            |name: &str, shape: [usize; 3]| self.checkpoint.get(name).is_some_and(|t| t.shape() == shape);
        // One of the two is not square.
        has(gate_up, [n, 2 * width, d]) && has(down, [n, d, width])
    }

    /// Experts that transformers 5 fused: gate rows, then up rows.
    fn rewritten(&self, moe: &MoeSpec, gate_up: &str, down: &str) -> Result<Vec<StoredExpert>> {
        let (d, width) = (self.architecture.hidden_size, moe.width);
        let gate_up = self.output_major(gate_up, [moe.experts, 2 * width, d], width)?;
        let down = self.output_major(down, [moe.experts, d, width], d)?;
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

    /// The matrices of all experts under one name, `[experts, out, input]`, each made of parts of `part` rows; in FP8 with
    /// `{name}_scale_inv` `[experts, blocks of rows, blocks of columns]`.
    fn output_major(&self, name: &str, shape: [usize; 3], part: usize) -> Result<OutputMajor> {
        let values = self.tensor(name, &shape)?;
        if values.dtype() != Dtype::F8_E4M3 {
            return Ok(OutputMajor { values, scales: None });
        }
        let [experts, out, input] = shape;
        let name_of_scales = format!("{name}_scale_inv");
        let stored = self.checkpoint.get(&name_of_scales);
        if self.declared_fp8_block().is_none()
            && let Some(scales) = stored.filter(|scales| scales.len() == experts)
        {
            return Ok(OutputMajor { values, scales: Some((scales.clone(), None)) });
        }
        let block = self.fp8_block();
        if part != out && !part.is_multiple_of(block[0]) {
            let what = format!(
                "{name}: gate and up of {part} rows share a block of scales; expected a multiple of {}",
                block[0]
            );
            return Err(Error::Inconsistent { layer: self.l, what });
        }
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
        let (n, d, width) = (moe.experts, self.architecture.hidden_size, moe.width);
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

    fn weight_name(&self, e: usize, p: Projection) -> String {
        format!("{}.weight", self.architecture.names.expert(self.l, e, p))
    }

    /// The experts of a checkpoint in the moepress layout.
    fn listed_experts(
        &self,
        entry: &LayerEntry,
        moe: &MoeSpec,
        numbers: &[usize],
    ) -> Result<Vec<StoredExpert>> {
        let inconsistent = |what: String| Error::Inconsistent { layer: self.l, what };
        let width = |entry: &ExpertEntry| match entry.width {
            Some(width) if width > moe.width => {
                let (e, most) = (entry.expert, moe.width);
                Err(inconsistent(format!(
                    "expert {e} has width {width}, expected at most {most}, that of config.json"
                )))
            }
            width => Ok(width.unwrap_or(moe.width)),
        };
        let expert = |entry: &ExpertEntry| match &entry.form {
            ExpertForm::Dense => self.expert(entry.expert, moe, width(entry)?, [Kind::Dense; 3]),
            ExpertForm::LowRank { rank, rows } => {
                let [gate, up, down] = [0, 1, 2].map(|p| match (rank.all()[p], rows.all()[p]) {
                    (None, _) => Kind::Dense,
                    (Some(rank), None) => Kind::LowRank(rank),
                    (Some(rank), Some(rows)) => Kind::LowRankRows { rank, rows },
                });
                self.expert(entry.expert, moe, width(entry)?, [gate, up, down])
            }
            ExpertForm::Delta { rank } => {
                let kinds = rank.all().map(|rank| rank.map_or(Kind::Dense, Kind::Delta));
                self.expert(entry.expert, moe, moe.width, kinds)
            }
            ExpertForm::Alias { of } => match numbers.iter().position(|n| n == of) {
                Some(slot) => Ok(Expert::Alias(slot)),
                None => Err(inconsistent(format!("expert {} is an alias of nothing", entry.expert))),
            },
            ExpertForm::Constant => {
                let name = format!("{}constant", self.architecture.names.expert_prefix(self.l, entry.expert));
                Ok(Expert::Constant(self.numbers(&name, &[self.architecture.hidden_size])?))
            }
        };
        entry.experts.iter().map(expert).collect()
    }

    /// The base of those experts that are differences from one.
    fn base(&self, moe: &MoeSpec, experts: &[StoredExpert]) -> Result<Base<Weight>> {
        let (d, width) = (self.architecture.hidden_size, moe.width);
        let mut base = [None, None, None];
        for p in Projection::ALL {
            let is_delta = |expert: &StoredExpert| match expert {
                Expert::Mlp(mlp) => mlp.map(p).is_some_and(|map| map.weight.is_delta()),
                _ => false,
            };
            if experts.iter().any(is_delta) {
                let (out, input) = if p == Projection::Down { (d, width) } else { (width, d) };
                base[p as usize] = Some(self.weight(&self.architecture.names.base(self.l, p), out, input)?);
            }
        }
        Ok(base)
    }

    /// The numbers of the dense rows of a matrix with `out` rows.
    fn row_numbers(&self, name: &str, count: usize, out: usize) -> Result<Vec<u32>> {
        let rows = self.tensor(name, &[count])?.to_i32().map_err(|e| self.error(e))?;
        let rows: Vec<u32> = rows.into_iter().map(|row| u32::try_from(row).unwrap_or(u32::MAX)).collect();
        let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || rows.last().is_some_and(|row| *row as usize >= out) {
            let what = format!("{name}: expected row numbers from 0 to {}, ascending, each once", out - 1);
            return Err(Error::Inconsistent { layer: self.l, what });
        }
        Ok(rows)
    }

    /// Expert `e` of `width`, its tensors on their own.
    fn expert(&self, e: usize, moe: &MoeSpec, width: usize, kinds: [Kind; 3]) -> Result<StoredExpert> {
        let d = self.architecture.hidden_size;
        let map = |p: Projection| -> Result<_> {
            let stem = self.architecture.names.expert(self.l, e, p);
            let (out, input) = if p == Projection::Down { (d, width) } else { (width, d) };
            let factor = |name: &str, shape: [usize; 2]| {
                let tensor = self.numbers(&format!("{stem}.{name}"), &shape)?;
                Weight::plain(tensor).map_err(|e| self.error(e))
            };
            let u = |rank| factor("u", [out, rank]);
            let v = |rank| factor("v", [rank, input]);
            let weight = match kinds[p as usize] {
                Kind::Dense => Matrix::Dense(self.weight(&stem, out, input)?),
                Kind::LowRank(rank) => Matrix::LowRank { u: u(rank)?, v: v(rank)? },
                Kind::Delta(rank) => Matrix::Delta { u: u(rank)?, v: v(rank)? },
                Kind::LowRankRows { rank, rows } => Matrix::LowRankRows {
                    u: u(rank)?,
                    v: v(rank)?,
                    rows: self.row_numbers(&format!("{stem}.rows"), rows, out)?,
                    s: factor("s", [rows, input])?,
                },
            };
            Ok(Linear { weight, bias: self.bias(&stem, out, moe.expert_bias)? })
        };
        assemble(moe, map)
    }
}

/// The tensors that hold all experts of a layer together, where the family's own layout has such.
#[derive(Default)]
struct Fused {
    tensors: Vec<Tensor>,
    /// Whether they are `[experts, out, in]`.
    output_major: bool,
}

/// How a matrix is stored.
#[derive(Clone, Copy)]
enum Kind {
    Dense,
    LowRank(usize),
    LowRankRows { rank: usize, rows: usize },
    Delta(usize),
}

/// The expert whose linear maps are these.
fn assemble(
    moe: &MoeSpec,
    map: impl Fn(Projection) -> Result<Linear<Matrix<Weight>, Tensor>>,
) -> Result<StoredExpert> {
    let up = || map(Projection::Up);
    Ok(Expert::Mlp(Mlp {
        gate: map(Projection::Gate)?,
        up: moe.activation.is_gated().then(up).transpose()?,
        down: map(Projection::Down)?,
        activation: moe.activation,
    }))
}

/// The matrices of all experts as transformers 5 fuses them.
struct OutputMajor {
    /// `[experts, out, in]`.
    values: Tensor,
    /// Of FP8, and the rows and columns of a block; one for each expert where there are no blocks.
    scales: Option<(Tensor, Option<[usize; 2]>)>,
}

impl OutputMajor {
    /// `count` rows of expert `e` from `first` on, where a block begins.
    fn weight(&self, e: usize, first: usize, count: usize) -> crate::checkpoint::Result<Weight> {
        let values = self.values.entry(e).rows(first, count);
        match &self.scales {
            None => Weight::plain(values),
            Some((scales, None)) => {
                let whole = [count, values.shape()[1]];
                Weight::fp8(values, scales.entry(e), whole)
            }
            Some((scales, Some(block))) => {
                let scales = scales.entry(e).rows(first / block[0], count.div_ceil(block[0]));
                Weight::fp8(values, scales, *block)
            }
        }
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
