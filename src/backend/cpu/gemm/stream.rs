//! The kernel for few tokens: W is read once, transposed and widened in registers.

use super::source::{Element, Group, Source};
use super::{Columns, DEPTH, Tile};
use crate::backend::cpu::simd::{MAX_LANES, Simd};

/// Computes one tile.
#[inline(always)]
pub(super) fn tile<S: Simd, E: Element>(s: S, tile: &Tile<'_>) {
    let Tile { x, w, out, range, accumulate, .. } = tile;
    macro_rules! dispatch {
        ($size:expr, $first:expr, $g:expr, $($tokens:literal)*) => {
            match $size {
                $($tokens if $tokens <= S::STREAM_TOKENS => {
                    let rows = $first..range.rows.end.min($first + S::LANES);
                    let out = out.part(x.groups.start($g), $tokens, rows.start, rows.len());
                    lanes::<S, E, $tokens>(s, x.group($g, 0), w, rows.start, &out, *accumulate);
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

/// As many rows of W as `out` has columns, at most `LANES`, from `first` on, times `T` tokens.
#[inline(always)]
fn lanes<S: Simd, E: Element, const T: usize>(
    s: S,
    x: &[f32],
    w: &Source<'_>,
    first: usize,
    out: &Columns<'_>,
    accumulate: bool,
) {
    let cols = w.cols();
    let step = Group::step::<S, E>();
    let group = w.group::<S, E>(first, 0..cols);
    let whole = cols - cols % step;
    let mut depth = 0;
    while depth < cols {
        let end = cols.min(depth + DEPTH);
        let mut sums = [s.splat(0.0); T];
        for col in (depth..end.min(whole)).step_by(step) {
            let block = group.block::<S, E>(s, col);
            let x = &x[col * T..(col + step) * T];
            // A copy, so that the compiler keeps the sums of a block in registers.
            let mut block_sums = sums;
            for_each_vector!(S::LANES, j, {
                for i in 0..E::PER_LANE {
                    let w = E::part(s, block.as_ref()[j], i);
                    let x = &x[(j * E::PER_LANE + i) * T..][..T];
                    for t in 0..T {
                        block_sums[t] = E::multiply(s, s.splat(x[t]), w, block_sums[t]);
                    }
                }
            });
            sums = block_sums;
        }
        if end > whole {
            let block = group.partial_block::<S, E>(s, whole, cols - whole);
            for (k, x) in x[whole * T..cols * T].chunks_exact(T).enumerate() {
                let w = E::part(s, block.as_ref()[k / E::PER_LANE], k % E::PER_LANE);
                for t in 0..T {
                    sums[t] = E::multiply(s, s.splat(x[t]), w, sums[t]);
                }
            }
        }
        for (t, &sum) in sums.iter().enumerate() {
            // SAFETY: tiles do not overlap, and this is the only view of the tile.
            let out = unsafe { out.row(t, 0, out.cols()) };
            add(s, sum, depth == 0 && !accumulate, out);
        }
        depth = end;
    }
}

/// `out` = or += the first lanes of `sum`.
#[inline(always)]
pub(super) fn add<S: Simd>(s: S, sum: S::F, replace: bool, out: &mut [f32]) {
    let sum = if replace { sum } else { s.add(load_part(s, out), sum) };
    store_part(s, sum, out);
}

/// As many lanes as `from` has, the others 0.
#[inline(always)]
pub(super) fn load_part<S: Simd>(s: S, from: &[f32]) -> S::F {
    if from.len() >= S::LANES {
        return s.load(from);
    }
    let mut lanes = [0.0; MAX_LANES];
    lanes[..from.len()].copy_from_slice(from);
    s.load(&lanes)
}

/// Writes as many lanes as `to` has.
#[inline(always)]
pub(super) fn store_part<S: Simd>(s: S, value: S::F, to: &mut [f32]) {
    if to.len() >= S::LANES {
        return s.store(value, to);
    }
    let mut lanes = [0.0; MAX_LANES];
    s.store(value, &mut lanes);
    to.copy_from_slice(&lanes[..to.len()]);
}
