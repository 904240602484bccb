//! The kernel for many tokens: a tile of W is widened and transposed once, then multiplied by all tokens.

use super::source::{Element, Group, Source};
use super::stream::{load_part, store_part};
use super::{Columns, DEPTH, Scratch, Tile};
use crate::backend::cpu::simd::Simd;

/// Vectors side by side in a panel of W.
const VECTORS: usize = 2;

/// Columns of W that are packed at a time: a multiple of [`DEPTH`] for which a panel stays in the second-level cache.
const SPAN: usize = 16 * DEPTH;

/// Computes one tile.
#[inline(always)]
pub(super) fn tile<S: Simd, E: Element>(s: S, tile: &Tile<'_>) {
    let Tile { x, w, out, range, accumulate, .. } = tile;
    let (width, cols) = (VECTORS * S::LANES, w.cols());
    // Room for whole blocks, so that the last one needs no care.
    let mut packed = Scratch::take(SPAN.min(cols).next_multiple_of(Group::step::<S, E>()) * width);
    let first_token = x.groups.start(range.groups.start);
    let tokens = x.groups.start(range.groups.end) - first_token;
    // Sums of the blocks so far, in the order in which they are used.
    let mut totals = Scratch::take(tokens * width);
    macro_rules! dispatch {
        ($size:expr, $w:expr, $x:expr, $stage:expr, $totals:expr, $out:expr, $($tokens:literal)*) => {
            match $size {
                $($tokens if $tokens <= S::PANEL_TOKENS => {
                    span::<S, E, $tokens>(s, $w, $x, $stage, $totals, $out);
                })*
                _ => unreachable!("groups are cut to fit"),
            }
        };
    }
    for row in range.rows.clone().step_by(width) {
        let rows = width.min(range.rows.end - row);
        for col in (0..cols).step_by(SPAN) {
            let count = SPAN.min(cols - col);
            pack::<S, E>(s, w, row, col, count, &mut packed);
            let stage = Stage { first: col == 0, last: col + count == cols, accumulate: *accumulate };
            for g in range.groups.clone() {
                let (token, size) = (x.groups.start(g), x.groups.size(g));
                let values = &x.group(g, col)[..count * size];
                let totals = &mut totals[(token - first_token) * width..][..size * width];
                let out = out.part(token, size, row, rows);
                let panel = &packed[..count * width];
                dispatch!(size, panel, values, stage, totals, &out, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
        }
    }
}

/// A packed panel of W times `T` tokens, `[columns, T]`.
#[inline(always)]
fn span<S: Simd, E: Element, const T: usize>(
    s: S,
    panel: &[f32],
    x: &[f32],
    stage: Stage,
    totals: &mut [f32],
    out: &Columns<'_>,
) {
    let width = VECTORS * S::LANES;
    let blocks = panel.chunks(DEPTH * width).zip(x.chunks(DEPTH * T));
    let count = blocks.len();
    for (b, (w, x)) in blocks.enumerate() {
        let sums = kernel::<S, E, T, VECTORS>(s, w.chunks_exact(width), x);
        let stage = Stage { first: stage.first && b == 0, last: stage.last && b + 1 == count, ..stage };
        settle(s, sums, stage, totals, out);
    }
}

/// Where the sums of a block go.
#[derive(Clone, Copy)]
struct Stage {
    first: bool,
    last: bool,
    /// Whether the first block is added to what the result holds.
    accumulate: bool,
}

/// Adds the sums of a block to those of the blocks before, in `totals` or, behind the last one, in `out`.
#[inline(always)]
fn settle<S: Simd, const T: usize, const V: usize>(
    s: S,
    sums: [[S::F; V]; T],
    stage: Stage,
    totals: &mut [f32],
    out: &Columns<'_>,
) {
    let whole = out.cols() == V * S::LANES;
    let onto_result = stage.first && stage.accumulate;
    for (t, (sums, totals)) in sums.iter().zip(totals.chunks_exact_mut(V * S::LANES)).enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            let col = v * S::LANES;
            let total = &mut totals[col..col + S::LANES];
            let mut sum = sum;
            if !stage.first {
                sum = s.add(s.load(total), sum);
            }
            if !(stage.last || onto_result) {
                s.store(sum, total);
                continue;
            }
            if !whole && col >= out.cols() {
                continue;
            }
            let lanes = if whole { S::LANES } else { S::LANES.min(out.cols() - col) };
            // SAFETY: tiles do not overlap, and this is the only view of the tile.
            let out = unsafe { out.row(t, col, lanes) };
            if onto_result {
                sum = s.add(load_part(s, out), sum);
            }
            if stage.last {
                store_part(s, sum, out);
            } else {
                s.store(sum, total);
            }
        }
    }
}

/// Columns `col .. col + count` of the rows from `first` on into `panel`, `[count, width]`.
#[inline(always)]
fn pack<S: Simd, E: Element>(
    s: S,
    w: &Source<'_>,
    first: usize,
    col: usize,
    count: usize,
    panel: &mut [f32],
) {
    let width = VECTORS * S::LANES;
    let step = Group::step::<S, E>();
    for v in 0..VECTORS {
        let group = w.group::<S, E>((first + v * S::LANES).min(w.rows() - 1), col..col + count);
        let whole = count / step;
        for (b, panel) in panel.chunks_exact_mut(step * width).enumerate().take(whole) {
            let block = group.block::<S, E>(s, col + b * step);
            store::<S, E>(s, &block, v, panel);
        }
        if whole * step < count {
            let block = group.partial_block::<S, E>(s, col + whole * step, count - whole * step);
            store::<S, E>(s, &block, v, &mut panel[whole * step * width..]);
        }
    }
}

/// Writes a block to the `v`-th vectors of the first rows of `panel`.
#[inline(always)]
fn store<S: Simd, E: Element>(s: S, block: &S::Block, v: usize, panel: &mut [f32]) {
    let panel = &mut panel[..S::LANES * E::PER_LANE * VECTORS * S::LANES];
    for_each_vector!(S::LANES, j, {
        for i in 0..E::PER_LANE {
            let to = &mut panel[((j * E::PER_LANE + i) * VECTORS + v) * S::LANES..];
            s.store(E::part(s, block.as_ref()[j], i), to);
        }
    });
}

/// Σ of rows of `V` vectors times the values of `T` tokens, `[rows, T]`.
#[inline(always)]
pub(super) fn kernel<'a, S: Simd, E: Element, const T: usize, const V: usize>(
    s: S,
    rows: impl Iterator<Item = &'a [f32]>,
    x: &[f32],
) -> [[S::F; V]; T] {
    let mut sums = [[s.splat(0.0); V]; T];
    for (w, x) in rows.zip(x.chunks_exact(T)) {
        let w: [S::F; V] = std::array::from_fn(|v| s.load(&w[v * S::LANES..]));
        for t in 0..T {
            let x = s.splat(x[t]);
            for v in 0..V {
                sums[t][v] = E::multiply(s, x, w[v], sums[t][v]);
            }
        }
    }
    sums
}
