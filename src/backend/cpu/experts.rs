//! The experts of a layer: tokens sorted by expert, one GEMM per matrix and expert, combined in slot order.

use rayon::prelude::*;

use super::linear::{CpuWeight, add_linear, linear};
use super::pointwise::{activate, add_bias};
use super::{CpuBuffer, CpuRouting};
use crate::backend::{Base, Expert, Linear, Matrix, Mlp, Result, Routes, StoredExpert};
use crate::checkpoint::{Tensor, Weight};

/// The prepared experts of a layer, one per router row.
#[derive(Clone, Debug)]
pub struct CpuExperts {
    experts: Vec<Prepared>,
    /// The slot whose weights each slot runs: itself unless it is an alias.
    canonical: Vec<u32>,
    /// What the experts share that are differences from it.
    base: Base<CpuWeight>,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are the large one")]
enum Prepared {
    Mlp(Mlp<CpuLinear>),
    Constant(Vec<f32>),
    /// An alias, or nothing: no token is ever sorted here.
    Idle,
}

impl Prepared {
    fn is_gated(&self) -> bool {
        matches!(self, Prepared::Mlp(Mlp { up: Some(_), .. }))
    }
}

type CpuLinear = Linear<Matrix<CpuWeight>, Vec<f32>>;

/// Buffers of one expert computation. A *pair* is a token and one of its experts; pairs are sorted by expert, and by
/// token within an expert.
#[derive(Clone, Debug, Default)]
pub(super) struct Workspace {
    /// First pair of each expert, `[experts + 1]`.
    pub(super) offsets: Vec<usize>,
    /// Token of each pair.
    pub(super) pair_token: Vec<u32>,
    /// Combine weight of each pair; those of duplicates are added up.
    pub(super) pair_weight: Vec<f32>,
    /// Factor of each pair's input; empty where combine weights multiply outputs.
    pub(super) pair_scale: Vec<f32>,
    /// Pair of each token and slot, `[tokens, top_k]`; [`Workspace::NO_PAIR`] for a duplicate or one left out.
    pub(super) slot_pair: Vec<u32>,
    /// Inputs, `[pairs, hidden]`.
    input: Vec<f32>,
    /// Hidden vectors, expert after expert, `[pairs of the expert, its width]`.
    pub(super) hidden: Vec<f32>,
    up: Vec<f32>,
    /// First value of each expert in `hidden`.
    pub(super) hidden_starts: Vec<usize>,
    /// Intermediate of the low-rank matrices, or outputs of their dense rows.
    rank: Vec<f32>,
    /// Products of all tokens with the bases of gate and up, `[tokens, width]`.
    base_in: [Vec<f32>; 2],
    /// Sums of the hidden vectors that go through the base of down, each times its combine weight, `[tokens, width]`.
    base_hidden: Vec<f32>,
    /// Outputs without combine weight, `[pairs, hidden]`.
    pub(super) output: Vec<f32>,
}

impl Workspace {
    const NO_PAIR: u32 = u32::MAX;
}

impl CpuExperts {
    pub(super) fn new(experts: &[StoredExpert], base: &Base<Weight>) -> Result<Self> {
        let prepare = |expert: &StoredExpert| {
            Ok(match expert {
                Expert::Mlp(mlp) => Prepared::Mlp(mlp.try_map(prepare_map)?),
                Expert::Constant(vector) => Prepared::Constant(vector.to_f32()?),
                Expert::Alias(_) | Expert::None => Prepared::Idle,
            })
        };
        let canonical = experts.iter().enumerate().map(|(e, expert)| match expert {
            Expert::Alias(of) => *of as u32,
            _ => e as u32,
        });
        Ok(CpuExperts {
            canonical: canonical.collect(),
            experts: experts.iter().map(prepare).collect::<Result<_>>()?,
            base: base.each_ref().map(|base| base.as_ref().map(CpuWeight::new)),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.experts.len()
    }

    /// The slot whose weights slot `e` runs.
    pub(super) fn canonical(&self, e: usize) -> usize {
        self.canonical[e] as usize
    }

    /// Width of expert `e`'s hidden vector; 0 where it has none.
    pub(super) fn width(&self, e: usize) -> usize {
        match &self.experts[e] {
            Prepared::Mlp(mlp) => mlp.gate.weight.left().rows(),
            _ => 0,
        }
    }

    /// Whether the base of down is part of expert `e`.
    fn shares_down(&self, e: usize) -> bool {
        matches!(&self.experts[e], Prepared::Mlp(mlp) if mlp.down.weight.is_delta())
    }

    /// Runs every pair of `routing`; the outputs are left in its workspace.
    pub(super) fn run(&self, x: &CpuBuffer, routing: &mut CpuRouting) {
        self.sort(routing);
        let work = &mut routing.work;
        let d = x.cols;
        let pairs = work.pair_token.len();
        work.input.resize(pairs * d, 0.0);
        work.output.resize(pairs * d, 0.0);
        let rows = work.input.par_chunks_exact_mut(d).zip(&work.pair_token);
        rows.with_min_len(16).for_each(|(row, &token)| row.copy_from_slice(x.row(token as usize)));
        let scaled = work.input.par_chunks_exact_mut(d).zip(&work.pair_scale);
        scaled.with_min_len(16).for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));

        for (base, out) in self.base.iter().zip(&mut work.base_in) {
            if let Some(base) = base {
                out.resize(x.rows * base.rows(), 0.0);
                linear(&x.data, base.cols(), base, out);
            }
        }

        let count = |e: usize| work.offsets[e + 1] - work.offsets[e];
        let sizes: Vec<_> = (0..self.len()).map(|e| (count(e), self.width(e), self.rank(e))).collect();
        let gated: Vec<_> = self.experts.iter().map(Prepared::is_gated).map(usize::from).collect();
        work.hidden_starts.clear();
        work.hidden_starts.extend(sizes.iter().scan(0, |start, (n, width, _)| {
            let this = *start;
            *start += n * width;
            Some(this)
        }));
        work.hidden.resize(sizes.iter().map(|(n, width, _)| n * width).sum(), 0.0);
        work.up.resize(sizes.iter().zip(&gated).map(|((n, width, _), gated)| n * width * gated).sum(), 0.0);
        work.rank.resize(sizes.iter().map(|(n, _, rank)| n * rank).sum(), 0.0);
        let (mut input, mut hidden, mut up) = (&work.input[..], &mut work.hidden[..], &mut work.up[..]);
        let (mut rank, mut output) = (&mut work.rank[..], &mut work.output[..]);
        let mut jobs = Vec::with_capacity(self.len());
        for (((e, expert), &(n, width, r)), gated) in self.experts.iter().enumerate().zip(&sizes).zip(&gated)
        {
            let pairs = work.offsets[e]..work.offsets[e + 1];
            let job = Job {
                expert,
                base: BaseRows {
                    products: [&work.base_in[0], &work.base_in[1]],
                    tokens: &work.pair_token[pairs.clone()],
                    scales: work.pair_scale.get(pairs).unwrap_or(&[]),
                },
                input: input.split_off(..n * d).unwrap_or_default(),
                hidden: hidden.split_off_mut(..n * width).unwrap_or_default(),
                up: up.split_off_mut(..n * width * gated).unwrap_or_default(),
                rank: rank.split_off_mut(..n * r).unwrap_or_default(),
                output: output.split_off_mut(..n * d).unwrap_or_default(),
            };
            if n > 0 {
                jobs.push(job);
            }
        }
        jobs.into_par_iter().for_each(Job::run);
    }

    /// Largest rank, or number of dense rows beside factors, among the expert's matrices.
    fn rank(&self, e: usize) -> usize {
        let Prepared::Mlp(mlp) = &self.experts[e] else { return 0 };
        let rank = |m: &CpuLinear| m.weight.factors().map_or(0, |(_, v)| v.rows().max(m.weight.rows().len()));
        mlp.maps().map(rank).max().unwrap_or(0)
    }

    /// out\[t\] += B Σ weight · z over the token's pairs whose down matrix is a difference from the base B: since down is
    /// linear, one product per token does for all of its experts.
    pub(super) fn add_base(&self, routing: &mut CpuRouting, out: &mut [f32]) {
        let Some(base) = &self.base[2] else { return };
        let CpuRouting { ids, work, top_k, .. } = routing;
        let width = base.cols();
        let Workspace { offsets, pair_weight, slot_pair, hidden, hidden_starts, base_hidden, .. } = work;
        base_hidden.resize(ids.len() / *top_k * width, 0.0);
        let tokens = base_hidden
            .par_chunks_exact_mut(width)
            .zip(ids.par_chunks_exact(*top_k))
            .zip(slot_pair.par_chunks_exact(*top_k));
        tokens.with_min_len(8).for_each(|((sum, ids), pairs)| {
            sum.fill(0.0);
            for (&id, &pair) in ids.iter().zip(pairs).filter(|(_, pair)| **pair != Workspace::NO_PAIR) {
                let (e, pair) = (self.canonical(id as usize), pair as usize);
                if self.shares_down(e) {
                    let start = hidden_starts[e] + (pair - offsets[e]) * width;
                    let weight = pair_weight[pair];
                    for (s, z) in sum.iter_mut().zip(&hidden[start..start + width]) {
                        *s += weight * z;
                    }
                }
            }
        });
        add_linear(base_hidden, base.cols(), base, out);
    }

    /// Adds the base's share to the outputs of single pairs, which running and combining them does without.
    pub(super) fn complete(&self, routing: &mut CpuRouting, hidden_size: usize) {
        let Some(base) = &self.base[2] else { return };
        let Workspace { offsets, hidden, hidden_starts, output, .. } = &mut routing.work;
        for e in (0..self.len()).filter(|&e| self.shares_down(e)) {
            let n = offsets[e + 1] - offsets[e];
            let hidden = &hidden[hidden_starts[e]..hidden_starts[e] + n * base.cols()];
            add_linear(
                hidden,
                base.cols(),
                base,
                &mut output[offsets[e] * hidden_size..offsets[e + 1] * hidden_size],
            );
        }
    }

    /// Counting sort of the pairs by expert, stable in token order.
    fn sort(&self, routing: &mut CpuRouting) {
        let CpuRouting { ids, weights, work, top_k, weighs_input, .. } = routing;
        let Workspace { offsets, pair_token, pair_weight, pair_scale, slot_pair, .. } = work;
        offsets.clear();
        offsets.resize(self.len() + 1, 0);
        slot_pair.clear();
        slot_pair.resize(ids.len(), Workspace::NO_PAIR);
        let expert = |id: u32| self.canonical.get(id as usize).copied().unwrap_or(Routes::SKIPPED);
        // The earlier slot of the same token with the same weights, if any; different inputs have to run on their own.
        let earlier = |ids: &[u32], slot: usize| {
            let same = |&id: &u32| expert(id) == expert(ids[slot]);
            if *weighs_input { None } else { ids[..slot].iter().position(same) }
        };
        for ids in ids.chunks_exact(*top_k) {
            for slot in
                (0..*top_k).filter(|&slot| ids[slot] != Routes::SKIPPED && earlier(ids, slot).is_none())
            {
                offsets[expert(ids[slot]) as usize + 1] += 1;
            }
        }
        for e in 0..self.len() {
            offsets[e + 1] += offsets[e];
        }
        let pairs = offsets[self.len()];
        pair_token.resize(pairs, 0);
        pair_weight.resize(pairs, 0.0);
        pair_scale.resize(if *weighs_input { pairs } else { 0 }, 0.0);
        let tokens = ids
            .chunks_exact(*top_k)
            .zip(weights.chunks_exact(*top_k))
            .zip(slot_pair.chunks_exact_mut(*top_k));
        for (token, ((ids, weights), slot_pair)) in tokens.enumerate() {
            for slot in (0..*top_k).filter(|&slot| ids[slot] != Routes::SKIPPED) {
                if let Some(first) = earlier(ids, slot) {
                    pair_weight[slot_pair[first] as usize] += weights[slot];
                    continue;
                }
                // Offsets serve as cursors here and are shifted back below.
                let cursor = &mut offsets[expert(ids[slot]) as usize];
                slot_pair[slot] = *cursor as u32;
                pair_token[*cursor] = token as u32;
                if *weighs_input {
                    pair_scale[*cursor] = weights[slot];
                    pair_weight[*cursor] = 1.0;
                } else {
                    pair_weight[*cursor] = weights[slot];
                }
                *cursor += 1;
            }
        }
        offsets.rotate_right(1);
        offsets[0] = 0;
    }
}

/// out[t] = Σ over the token's pairs, in slot order, of weight · output.
pub(super) fn combine(routing: &CpuRouting, out: &mut [f32], hidden_size: usize) {
    let work = &routing.work;
    let tokens = out.par_chunks_exact_mut(hidden_size).zip(work.slot_pair.par_chunks_exact(routing.top_k));
    tokens.with_min_len(8).for_each(|(out, pairs)| {
        out.fill(0.0);
        for &pair in pairs.iter().filter(|&&p| p != Workspace::NO_PAIR) {
            let pair = pair as usize;
            let weight = work.pair_weight[pair];
            for (o, y) in out.iter_mut().zip(&work.output[pair * hidden_size..(pair + 1) * hidden_size]) {
                *o += weight * y;
            }
        }
    });
}

/// One expert and its pairs.
struct Job<'a> {
    expert: &'a Prepared,
    base: BaseRows<'a>,
    input: &'a [f32],
    hidden: &'a mut [f32],
    up: &'a mut [f32],
    rank: &'a mut [f32],
    output: &'a mut [f32],
}

impl Job<'_> {
    fn run(self) {
        match self.expert {
            Prepared::Mlp(mlp) => {
                self.base.start(0, &mlp.gate, self.hidden);
                apply(&mlp.gate, self.input, self.rank, self.hidden);
                if let Some(up) = &mlp.up {
                    self.base.start(1, up, self.up);
                    apply(up, self.input, self.rank, self.up);
                }
                activate(self.hidden, self.up, mlp.activation);
                if mlp.down.weight.is_delta() {
                    self.output.fill(0.0);
                }
                apply(&mlp.down, self.hidden, self.rank, self.output);
            }
            Prepared::Constant(vector) => {
                self.output.chunks_exact_mut(vector.len()).for_each(|row| row.copy_from_slice(vector));
            }
            Prepared::Idle => {}
        }
    }
}

/// The base's products with the tokens of an expert's pairs.
#[derive(Clone, Copy)]
struct BaseRows<'a> {
    /// Of gate and up, `[tokens, width]`.
    products: [&'a [f32]; 2],
    tokens: &'a [u32],
    /// Factors of the inputs; empty where there are none.
    scales: &'a [f32],
}

impl BaseRows<'_> {
    /// out\[pair\] = the product of the base of gate (0) or up (1) with the pair's input, where `map` is added to it.
    fn start(&self, projection: usize, map: &CpuLinear, out: &mut [f32]) {
        if !map.weight.is_delta() {
            return;
        }
        let width = out.len() / self.tokens.len();
        for (pair, (row, &token)) in out.chunks_exact_mut(width).zip(self.tokens).enumerate() {
            let start = token as usize * width;
            row.copy_from_slice(&self.products[projection][start..start + width]);
            if let Some(&scale) = self.scales.get(pair) {
                for value in row {
                    *value *= scale;
                }
            }
        }
    }
}

/// out = x Wᵀ, or (x Vᵀ) Uᵀ with the intermediate in `rank`, or that added to `out`, which holds the base's share; plus
/// the bias.
fn apply(map: &CpuLinear, x: &[f32], rank: &mut [f32], out: &mut [f32]) {
    if let Some((u, v)) = map.weight.factors() {
        let n = if v.cols() == 0 { 0 } else { x.len() / v.cols() };
        let intermediate = &mut rank[..n * v.rows()];
        linear(x, v.cols(), v, intermediate);
        if map.weight.is_delta() {
            add_linear(intermediate, u.cols(), u, out);
        } else {
            linear(intermediate, u.cols(), u, out);
        }
    }
    match &map.weight {
        Matrix::Dense(w) => linear(x, w.cols(), w, out),
        Matrix::LowRankRows { u, rows, s, .. } if !rows.is_empty() => {
            let outputs = &mut rank[..x.len() / s.cols() * rows.len()];
            linear(x, s.cols(), s, outputs);
            for (out, outputs) in out.chunks_exact_mut(u.rows()).zip(outputs.chunks_exact(rows.len())) {
                for (&row, y) in rows.iter().zip(outputs) {
                    out[row as usize] += y;
                }
            }
        }
        _ => {}
    }
    if let Some(bias) = &map.bias {
        add_bias(out, bias);
    }
}

fn prepare_map(map: &Linear<Matrix<Weight>, Tensor>) -> Result<CpuLinear> {
    let weight = map.weight.try_map(|w| Result::Ok(CpuWeight::new(w)))?;
    Ok(Linear { weight, bias: map.bias.as_ref().map(Tensor::to_f32).transpose()? })
}
