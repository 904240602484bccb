//! The experts of a layer: tokens sorted by expert, one GEMM per matrix and expert, combined in slot order.

use rayon::prelude::*;

use super::gemm::Scratch;
use super::linear::{CpuWeight, Input, add_linear, linear};
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
    /// Hidden vectors, expert after expert, `[pairs of the expert, its width]`.
    pub(super) hidden: Vec<f32>,
    /// First value of each expert in `hidden`.
    pub(super) hidden_starts: Vec<usize>,
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
        work.output.resize(work.pair_token.len() * d, 0.0);
        let rows = Input::new(&x.data, d);
        for (base, out) in self.base.iter().zip(&mut work.base_in) {
            if let Some(base) = base {
                out.resize(x.rows * base.rows(), 0.0);
                linear(&rows, base, out);
            }
        }

        let count = |e: usize| work.offsets[e + 1] - work.offsets[e];
        work.hidden_starts.clear();
        let mut values = 0;
        work.hidden_starts.extend((0..self.len()).map(|e| {
            let start = values;
            values += count(e) * self.width(e);
            start
        }));
        work.hidden.resize(values, 0.0);
        let (mut hidden, mut output) = (&mut work.hidden[..], &mut work.output[..]);
        let mut jobs = Vec::with_capacity(self.len());
        for (e, expert) in self.experts.iter().enumerate().filter(|(e, _)| count(*e) > 0) {
            let pairs = work.offsets[e]..work.offsets[e + 1];
            jobs.push(Job {
                expert,
                pairs: Pairs {
                    x,
                    tokens: &work.pair_token[pairs.clone()],
                    scales: work.pair_scale.get(pairs).unwrap_or(&[]),
                    bases: work.base_in.each_ref().map(Vec::as_slice),
                },
                hidden: hidden.split_off_mut(..count(e) * self.width(e)).unwrap_or_default(),
                output: output.split_off_mut(..count(e) * d).unwrap_or_default(),
            });
        }
        jobs.into_par_iter().for_each(Job::run);
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
        add_linear(&Input::new(base_hidden, width), base, out);
    }

    /// Adds the base's share to the outputs of single pairs, which running and combining them does without.
    pub(super) fn complete(&self, routing: &mut CpuRouting, hidden_size: usize) {
        let Some(base) = &self.base[2] else { return };
        let Workspace { offsets, hidden, hidden_starts, output, .. } = &mut routing.work;
        for e in (0..self.len()).filter(|&e| self.shares_down(e)) {
            let n = offsets[e + 1] - offsets[e];
            let hidden = &hidden[hidden_starts[e]..hidden_starts[e] + n * base.cols()];
            let output = &mut output[offsets[e] * hidden_size..offsets[e + 1] * hidden_size];
            add_linear(&Input::new(hidden, base.cols()), base, output);
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
    pairs: Pairs<'a>,
    hidden: &'a mut [f32],
    output: &'a mut [f32],
}

impl Job<'_> {
    fn run(self) {
        let Job { expert, pairs, hidden, output } = self;
        match expert {
            Prepared::Mlp(mlp) => pairs.run(mlp, hidden, output),
            Prepared::Constant(vector) => {
                output.chunks_exact_mut(vector.len()).for_each(|row| row.copy_from_slice(vector));
            }
            Prepared::Idle => {}
        }
    }
}

/// The pairs of an expert.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    x: &'a CpuBuffer,
    /// Rows of x.
    tokens: &'a [u32],
    /// Factors of the inputs; empty where there are none.
    scales: &'a [f32],
    /// Products of all tokens with the bases of gate and up, `[tokens, width]`.
    bases: [&'a [f32]; 2],
}

impl Pairs<'_> {
    fn run(self, mlp: &Mlp<CpuLinear>, hidden: &mut [f32], output: &mut [f32]) {
        let n = self.tokens.len();
        let input = self.input();
        let input = Input::new(&input, self.x.cols);
        self.start(0, &mlp.gate, hidden);
        apply(&mlp.gate, &input, n, hidden);
        let mut up = Scratch::take(if mlp.up.is_some() { hidden.len() } else { 0 });
        if let Some(map) = &mlp.up {
            self.start(1, map, &mut up);
            apply(map, &input, n, &mut up);
        }
        activate(hidden, &up, mlp.activation);
        if mlp.down.weight.is_delta() {
            output.fill(0.0);
        }
        apply(&mlp.down, &Input::new(hidden, hidden.len() / n), n, output);
    }

    /// The inputs of the pairs, `[pairs, hidden]`.
    fn input(&self) -> Scratch {
        let d = self.x.cols;
        let mut input = Scratch::take(self.tokens.len() * d);
        let rows = input.par_chunks_exact_mut(d).zip(self.tokens).with_min_len(64);
        rows.for_each(|(row, &token)| row.copy_from_slice(self.x.row(token as usize)));
        let scaled = input.par_chunks_exact_mut(d).zip(self.scales).with_min_len(64);
        scaled.for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
        input
    }

    /// out\[pair\] = the product of the base of gate (0) or up (1) with the pair's input, where `map` is added to it.
    fn start(&self, projection: usize, map: &CpuLinear, out: &mut [f32]) {
        if !map.weight.is_delta() {
            return;
        }
        let width = out.len() / self.tokens.len();
        for (pair, (row, &token)) in out.chunks_exact_mut(width).zip(self.tokens).enumerate() {
            let start = token as usize * width;
            row.copy_from_slice(&self.bases[projection][start..start + width]);
            if let Some(&scale) = self.scales.get(pair) {
                for value in row {
                    *value *= scale;
                }
            }
        }
    }
}

/// out = x Wᵀ for `n` rows x, or (x Vᵀ) Uᵀ, or that added to `out`, which holds the base's share; plus the bias.
fn apply(map: &CpuLinear, x: &Input<'_>, n: usize, out: &mut [f32]) {
    if let Some((u, v)) = map.weight.factors() {
        let mut intermediate = Scratch::take(n * v.rows());
        linear(x, v, &mut intermediate);
        let intermediate = Input::new(&intermediate, v.rows());
        if map.weight.is_delta() {
            add_linear(&intermediate, u, out);
        } else {
            linear(&intermediate, u, out);
        }
    }
    match &map.weight {
        Matrix::Dense(w) => linear(x, w, out),
        Matrix::LowRankRows { u, rows, s, .. } if !rows.is_empty() => {
            let mut outputs = Scratch::take(n * rows.len());
            linear(x, s, &mut outputs);
            for (out, outputs) in out.chunks_exact_mut(u.rows()).zip(outputs.chunks_exact(rows.len())) {
                for (&row, y) in rows.iter().zip(outputs.iter()) {
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
