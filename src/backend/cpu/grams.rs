//! Inner products of the outputs of a token's experts.

use rayon::prelude::*;

use super::CpuRouting;
use super::experts::CpuExperts;

/// Per token the packed lower triangle of the inner products of all experts' outputs, and of one vector of `extra`
/// behind them where there is one. `routing` has just run every expert on `tokens` tokens; `outputs` holds, for each of
/// its pairs, a row of `d` values.
pub(super) fn of_outputs(
    routing: &CpuRouting,
    experts: &CpuExperts,
    (outputs, d): (&[f32], usize),
    tokens: usize,
    extra: Option<&[f32]>,
) -> Vec<f32> {
    let e = experts.len();
    let n = e + usize::from(extra.is_some());
    let size = n * (n + 1) / 2;
    let work = &routing.work;
    let row = |token: usize, expert: usize| {
        // Aliases share the pairs of their target, unless inputs differ by the combine weight.
        let pair = if work.pair_scale.is_empty() {
            work.offsets[experts.canonical(expert)] + token
        } else {
            work.slot_pair[token * e + expert] as usize
        };
        &outputs[pair * d..(pair + 1) * d]
    };
    let mut grams = vec![0.0; tokens * size];
    grams.par_chunks_exact_mut(size).enumerate().with_min_len(8).for_each(|(token, gram)| {
        let vector = |i: usize| match extra {
            Some(extra) if i == e => &extra[token * d..(token + 1) * d],
            _ => row(token, i),
        };
        let mut entries = gram.iter_mut();
        for a in 0..n {
            let left = vector(a);
            for (b, entry) in (0..=a).zip(&mut entries) {
                *entry = dot(left, vector(b));
            }
        }
    });
    grams
}

/// Partial sums of a dot product.
const LANES: usize = 16;

/// Partial sums in f32 over at most this many values, added up in f64.
const RUN: usize = 1024;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut total = 0.0f64;
    for (a, b) in a.chunks(RUN).zip(b.chunks(RUN)) {
        let mut sums = [0.0f32; LANES];
        let (heads, tail) = a.as_chunks::<LANES>();
        let (others, other_tail) = b.as_chunks::<LANES>();
        for (x, y) in heads.iter().zip(others) {
            for lane in 0..LANES {
                sums[lane] += x[lane] * y[lane];
            }
        }
        total += sums.iter().map(|s| f64::from(*s)).sum::<f64>();
        total += tail.iter().zip(other_tail).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    }
    total as f32
}
