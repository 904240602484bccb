//! The kernel for few tokens: W is read once, transposed and widened in registers.

use super::source::{Element, Group, Source};
use super::{Columns, DEPTH, Packed, Range};
use crate::backend::cpu::simd::{MAX_LANES, Simd};

/// Blocks of [`DEPTH`] columns that are computed side by side, so that their chains of additions overlap. Needed for at
/// most [`FEW`] tokens, and where a block makes a long chain.
const CHAINS: usize = 2;
const FEW: usize = 2;

/// Runs `$body` for every vector `$j` of a block, unrolled: the blocks must stay in registers.
macro_rules! for_each_vector {
    ($lanes:expr, $j:ident, $body:expr) => {
        for_each_vector!(@ $lanes, $j, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $lanes:expr, $j:ident, $body:expr, $($i:literal)*) => {
        $(if $i < $lanes {
            let $j: usize = $i;
            $body
        })*
    };
}

/// Computes one tile.
#[inline(always)]
pub(super) fn tile<S: Simd, E: Element>(
    s: S,
    x: &Packed<'_>,
    w: &Source<'_>,
    out: &Columns<'_>,
    range: &Range,
) {
    macro_rules! dispatch {
        ($size:expr, $first:expr, $g:expr, $($tokens:literal)*) => {
            match $size {
                $($tokens if $tokens <= S::STREAM_TOKENS => {
                    rows::<S, E, $tokens>(s, x.group($g, 0), $first, w, out, x.groups.start($g), range.rows.end)
                })*
                _ => unreachable!("groups are cut to fit"),
            }
        };
    }
    for g in range.groups.clone() {
        for first in range.rows.clone().step_by(S::LANES) {
            dispatch!(x.groups.size(g), first, g, 1 2 3 4 5 6 7 8 9 10 11 12);
        }
    }
}

/// Up to `LANES` rows of W from `first` on, before `end_row`, times `T` tokens.
#[inline(always)]
fn rows<S: Simd, E: Element, const T: usize>(
    s: S,
    x: &[f32],
    first: usize,
    w: &Source<'_>,
    out: &Columns<'_>,
    token: usize,
    end_row: usize,
) {
    let cols = w.cols();
    let step = Group::step::<S, E>();
    let group = w.group::<S, E>(first);
    let chains = if T <= FEW && E::PER_LANE > 1 { CHAINS } else { 1 };
    let whole = cols - cols % step;
    let mut depth = 0;
    while depth < cols {
        let mut sums = [[s.splat(0.0); T]; CHAINS];
        for offset in (0..DEPTH.min(whole - depth)).step_by(step) {
            for (c, sums) in sums.iter_mut().enumerate().take(chains) {
                let col = depth + c * DEPTH + offset;
                if col < whole {
                    let block = group.block::<S, E>(s, col);
                    let x = &x[col * T..(col + step) * T];
                    let mut sum = *sums;
                    for_each_vector!(S::LANES, j, {
                        for i in 0..E::PER_LANE {
                            let w = E::part(s, block.as_ref()[j], i);
                            let x = &x[(j * E::PER_LANE + i) * T..][..T];
                            for t in 0..T {
                                sum[t] = s.fma(s.splat(x[t]), w, sum[t]);
                            }
                        }
                    });
                    *sums = sum;
                }
            }
        }
        let end = (depth + chains * DEPTH).min(cols);
        if end > whole {
            let block = group.partial_block::<S, E>(s, whole, cols - whole);
            let sum = &mut sums[(whole - depth) / DEPTH];
            for (k, x) in x[whole * T..cols * T].chunks_exact(T).enumerate() {
                let w = E::part(s, block.as_ref()[k / E::PER_LANE], k % E::PER_LANE);
                for t in 0..T {
                    sum[t] = s.fma(s.splat(x[t]), w, sum[t]);
                }
            }
        }
        for sums in sums.iter().take((end - depth).div_ceil(DEPTH)) {
            for (t, &sum) in sums.iter().enumerate() {
                // SAFETY: tiles do not overlap, and this is the only view of the tile.
                let out = unsafe { out.row(token + t, first, S::LANES.min(end_row - first)) };
                add(s, sum, depth == 0, out);
            }
            depth += DEPTH;
        }
    }
}

/// `out` = or += the first lanes of `sum`.
#[inline(always)]
pub(super) fn add<S: Simd>(s: S, sum: S::F, replace: bool, out: &mut [f32]) {
    if out.len() >= S::LANES {
        let sum = if replace { sum } else { s.add(s.load(out), sum) };
        s.store(sum, out);
        return;
    }
    let mut lanes = [0.0; MAX_LANES];
    s.store(sum, &mut lanes);
    for (o, sum) in out.iter_mut().zip(lanes) {
        *o = if replace { sum } else { *o + sum };
    }
}
