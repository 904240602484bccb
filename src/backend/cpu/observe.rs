//! Sums over the pairs of one batch, in f64 and in token order, added to the running moments.

use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::experts::CpuExperts;
use super::{CpuBuffer, CpuRouting};
use crate::backend::{Batch, Moment, Moments, Routes};

/// Adds what the routed tokens of `batch` show. `out` is the combined output. Padding is left out.
pub(super) fn routed(
    moments: &mut Moments,
    x: &CpuBuffer,
    experts: &CpuExperts,
    routing: &CpuRouting,
    out: &CpuBuffer,
    batch: &Batch,
) {
    per_token(moments, routing, out, batch);
    per_expert(moments, x.cols, experts, routing, batch);
    let work = &routing.work;
    let pairs = |e: usize| work.offsets[e]..work.offsets[e + 1];
    let width = moments.dims().width;
    let input_row = |pair: usize| x.row(work.pair_token[pair] as usize);
    let input_factor = |pair: usize| work.pair_scale.get(pair).map_or(1.0, |&scale| f64::from(scale));
    let hidden_row = |e: usize, pair: usize| {
        let w = experts.width(e);
        let start = work.hidden_starts[e] + (pair - work.offsets[e]) * w;
        &work.hidden[start..start + w]
    };
    let real = |pair: &usize| batch.is_real(work.pair_token[*pair] as usize);
    add_channels(moments, width, |e| {
        let real = move |pair: &usize| batch.is_real(work.pair_token[*pair] as usize);
        pairs(e).filter(real).map(move |p| (hidden_row(e, p), work.pair_weight[p]))
    });
    add_squares(moments, x.cols, |e| pairs(e).filter(real).map(move |p| (input_row(p), input_factor(p))));
    for (moment, gated) in [(Moment::InputGram, false), (Moment::GateInputGram, true)] {
        let factor = |p: usize| input_factor(p) * if gated { f64::from(work.pair_weight[p]) } else { 1.0 };
        let rows = |e: usize| pairs(e).filter(real).map(move |p| (input_row(p), factor(p)));
        add_grams(moments, moment, x.cols, rows);
    }
    for (moment, gated) in [(Moment::HiddenGram, false), (Moment::GateHiddenGram, true)] {
        let factor = |p: usize| if gated { f64::from(work.pair_weight[p]) } else { 1.0 };
        let rows = |e: usize| pairs(e).filter(real).map(move |p| (hidden_row(e, p), factor(p)));
        add_grams(moments, moment, width, rows);
    }
}

/// Adds the outputs of `tokens` tokens that passed every expert.
pub(super) fn sampled(
    moments: &mut Moments,
    routing: &CpuRouting,
    experts: &CpuExperts,
    d: usize,
    tokens: usize,
) {
    let work = &routing.work;
    if let Some(sums) = moments.get_mut(Moment::SampleOutputSum) {
        sums.par_chunks_exact_mut(d).enumerate().for_each(|(e, sums)| {
            let e = experts.canonical(e);
            let outputs = &work.output[work.offsets[e] * d..work.offsets[e + 1] * d];
            for row in outputs.chunks_exact(d) {
                for (s, y) in sums.iter_mut().zip(row) {
                    *s += f64::from(*y);
                }
            }
        });
    }
    if let Some(count) = moments.get_mut(Moment::SampleCount) {
        count[0] += tokens as f64;
    }
}

/// Sums that run over tokens: scores, logits, co-activation, coverage, the routed output.
fn per_token(moments: &mut Moments, routing: &CpuRouting, out: &CpuBuffer, batch: &Batch) {
    let (e, k) = (routing.experts, routing.top_k);
    let real: Vec<usize> = (0..batch.tokens()).filter(|&t| batch.is_real(t)).collect();
    if let Some(soft) = moments.get_mut(Moment::SoftCount) {
        for &t in &real {
            for (s, p) in soft.iter_mut().zip(&routing.scores[t * e..(t + 1) * e]) {
                *s += f64::from(*p);
            }
        }
    }
    if let Some(gram) = moments.get_mut(Moment::RouterGram) {
        gram.par_chunks_exact_mut(e).enumerate().for_each(|(i, row)| {
            for &t in &real {
                let logits = &routing.logits[t * e..(t + 1) * e];
                let factor = f64::from(logits[i]);
                for (g, l) in row.iter_mut().zip(logits) {
                    *g += factor * f64::from(*l);
                }
            }
        });
    }
    if let Some(co) = moments.get_mut(Moment::CoActivation) {
        for &t in &real {
            let chosen = || chosen(&routing.ids[t * k..(t + 1) * k]);
            for a in chosen() {
                for b in chosen() {
                    co[a * e + b] += 1.0;
                }
            }
        }
    }
    if let Some(coverage) = moments.get_mut(Moment::Coverage) {
        for &t in &real {
            let file = batch.files[t / batch.length] as usize;
            for id in chosen(&routing.ids[t * k..(t + 1) * k]) {
                coverage[file * e + id] += 1.0;
            }
        }
    }
    if let Some(sum) = moments.get_mut(Moment::RoutedSqSum) {
        sum[0] += real.iter().map(|&t| square_norm(out.row(t))).sum::<f64>();
    }
}

/// The experts of a token that run.
fn chosen(ids: &[u32]) -> impl Iterator<Item = usize> {
    ids.iter().filter(|id| **id != Routes::SKIPPED).map(|id| *id as usize)
}

fn square_norm(row: &[f32]) -> f64 {
    row.iter().map(|&v| f64::from(v) * f64::from(v)).sum()
}

/// The scalar and vector sums of one expert, gathered before they are added.
struct Sums {
    scalars: Vec<(Moment, f64)>,
    vectors: [(Moment, Vec<f64>); 3],
}

fn per_expert(moments: &mut Moments, d: usize, experts: &CpuExperts, routing: &CpuRouting, batch: &Batch) {
    let sums: Vec<Sums> =
        (0..experts.len()).into_par_iter().map(|e| expert_sums(e, d, experts, routing, batch)).collect();
    for (e, Sums { scalars, vectors }) in sums.into_iter().enumerate() {
        for (moment, value) in scalars {
            if let Some(array) = moments.get_mut(moment) {
                array[e] = if moment.is_maximum() { array[e].max(value) } else { array[e] + value };
            }
        }
        for (moment, values) in vectors {
            if let Some(array) = moments.get_mut(moment) {
                for (a, v) in array[e * d..(e + 1) * d].iter_mut().zip(values) {
                    *a += v;
                }
            }
        }
    }
}

/// Sums over the real tokens of slot `e`. An alias shares pairs with its target, so its tokens are found by slot.
fn expert_sums(e: usize, d: usize, experts: &CpuExperts, routing: &CpuRouting, batch: &Batch) -> Sums {
    let work = &routing.work;
    let mut s = [0.0f64; 7];
    let (mut max_abs, mut max_norm) = (0.0f64, 0.0f64);
    let mut output = vec![0.0; d];
    let mut output_sq = vec![0.0; d];
    let mut gate_output = vec![0.0; d];
    let c = experts.canonical(e);
    for pair in work.offsets[c]..work.offsets[c + 1] {
        let token = work.pair_token[pair] as usize;
        let Some(gate) = batch.is_real(token).then(|| routing.slot_weight(token, e)).flatten() else {
            continue;
        };
        let g = f64::from(gate);
        let row = &work.output[pair * d..(pair + 1) * d];
        let square = square_norm(row);
        let norm = square.sqrt();
        for (i, &value) in row.iter().enumerate() {
            let v = f64::from(value);
            output[i] += v;
            output_sq[i] += v * v;
            gate_output[i] += g * v;
            max_abs = max_abs.max(v.abs());
        }
        for (sum, term) in s.iter_mut().zip([1.0, g, g * g, norm, square, g * norm, g * g * square]) {
            *sum += term;
        }
        max_norm = max_norm.max(norm);
    }
    let [count, gate, gate_sq, norm, norm_sq, gate_norm, gate_norm_sq] = s;
    Sums {
        scalars: vec![
            (Moment::Count, count),
            (Moment::GateSum, gate),
            (Moment::GateSqSum, gate_sq),
            (Moment::NormSum, norm),
            (Moment::NormSqSum, norm_sq),
            (Moment::GateNormSum, gate_norm),
            (Moment::GateNormSqSum, gate_norm_sq),
            (Moment::MaxAbs, max_abs),
            (Moment::MaxNorm, max_norm),
        ],
        vectors: [
            (Moment::OutputSum, output),
            (Moment::OutputSqSum, output_sq),
            (Moment::GateOutputSum, gate_output),
        ],
    }
}

/// Sums and maxima of the hidden channels; `rows` are hidden vectors of an expert with their combine weights.
fn add_channels<'a, I>(moments: &mut Moments, width: usize, rows: impl Fn(usize) -> I + Sync)
where
    I: Iterator<Item = (&'a [f32], f32)>,
{
    let wanted = [Moment::HiddenSqSum, Moment::GateHiddenSqSum, Moment::GateHiddenMax];
    let [Some(mut plain), Some(mut gated), Some(mut largest)] = wanted.map(|m| moments.take(m)) else {
        return;
    };
    let experts = plain
        .par_chunks_exact_mut(width)
        .zip(gated.par_chunks_exact_mut(width))
        .zip(largest.par_chunks_exact_mut(width));
    experts.enumerate().for_each(|(e, ((plain, gated), largest))| {
        for (row, gate) in rows(e) {
            let gate = f64::from(gate);
            for (c, &z) in row.iter().enumerate() {
                let (z, gz) = (f64::from(z), gate * f64::from(z));
                plain[c] += z * z;
                gated[c] += gz * gz;
                largest[c] = largest[c].max(gz.abs());
            }
        }
    });
    for (moment, array) in wanted.into_iter().zip([plain, gated, largest]) {
        moments.put(moment, array);
    }
}

/// Σ x∘x; `rows` are inputs of an expert with their factors.
fn add_squares<'a, I>(moments: &mut Moments, d: usize, rows: impl Fn(usize) -> I + Sync)
where
    I: Iterator<Item = (&'a [f32], f64)>,
{
    let Some(sums) = moments.get_mut(Moment::InputSqSum) else { return };
    sums.par_chunks_exact_mut(d).enumerate().for_each(|(e, sums)| {
        for (row, factor) in rows(e) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += (factor * f64::from(x)).powi(2);
            }
        }
    });
}

/// Rows that are widened to f64 and multiplied at a time.
const GRAM_ROWS: usize = 256;

/// gram[e] += Σ rᵀr over the rows of expert e, each multiplied by its factor. Rows may be narrower than `width`: an
/// expert's own width.
fn add_grams<'a, I>(moments: &mut Moments, moment: Moment, width: usize, rows: impl Fn(usize) -> I + Sync)
where
    I: Iterator<Item = (&'a [f32], f64)>,
{
    let Some(grams) = moments.get_mut(moment) else { return };
    grams.par_chunks_exact_mut(width * width).enumerate().for_each(|(e, gram)| {
        let mut block = Vec::with_capacity(GRAM_ROWS * width);
        for (row, factor) in rows(e) {
            block.extend(row.iter().map(|&v| factor * f64::from(v)));
            block.resize(block.len().next_multiple_of(width), 0.0);
            if block.len() == GRAM_ROWS * width {
                add_gram(gram, &mut block, width);
            }
        }
        add_gram(gram, &mut block, width);
    });
}

fn add_gram(gram: &mut [f64], block: &mut Vec<f64>, width: usize) {
    if block.is_empty() {
        return;
    }
    let rows = MatRef::from_row_major_slice(block, block.len() / width, width);
    let mut gram = MatMut::from_row_major_slice_mut(gram, width, width);
    let (lower, full) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    matmul(gram.as_mut(), lower, Accum::Add, rows.transpose(), full, rows, full, 1.0, Par::Seq);
    for i in 0..width {
        for j in 0..i {
            gram[(j, i)] = gram[(i, j)];
        }
    }
    block.clear();
}
