//! The kernel for many tokens: a tile of W is widened and transposed once, then multiplied by all tokens.

use super::source::{Element, Group, Source};
use super::stream::add;
use super::{Columns, DEPTH, Scratch, Tile};
use crate::backend::cpu::simd::Simd;

/// Vectors side by side in a panel of W.
const VECTORS: usize = 2;

/// Computes one tile.
#[inline(always)]
pub(super) fn tile<S: Simd, E: Element>(s: S, tile: &Tile<'_>) {
    let Tile { x, w, out, range, accumulate, .. } = tile;
    let width = VECTORS * S::LANES;
    let panels = range.rows.len().div_ceil(width);
    // Room for whole blocks, so that the last one needs no care.
    let panel_size = DEPTH.min(w.cols()).next_multiple_of(Group::step::<S, E>()) * width;
    let mut packed = Scratch::take(panels * panel_size);
    macro_rules! dispatch {
        ($size:expr, $w:expr, $x:expr, $out:expr, $depth:expr, $($tokens:literal)*) => {
            match $size {
                $($tokens if $tokens <= S::PANEL_TOKENS => {
                    kernel::<S, $tokens, VECTORS>(
                        s,
                        $w.chunks_exact(VECTORS * S::LANES),
                        $x,
                        $depth == 0 && !accumulate,
                        $out,
                    )
                })*
                _ => unreachable!("groups are cut to fit"),
            }
        };
    }
    let cols = w.cols();
    let mut depth = 0;
    loop {
        let count = DEPTH.min(cols - depth);
        for (p, panel) in packed.chunks_exact_mut(panel_size).enumerate() {
            pack::<S, E>(s, w, range.rows.start + p * width, depth, count, panel);
        }
        for g in range.groups.clone() {
            let (token, size) = (x.groups.start(g), x.groups.size(g));
            let values = &x.group(g, depth)[..count * size];
            for (p, panel) in packed.chunks_exact(panel_size).enumerate() {
                let row = range.rows.start + p * width;
                let out = out.part(token, size, row, width.min(range.rows.end - row));
                let panel = &panel[..count * width];
                dispatch!(size, panel, values, &out, depth, 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
            }
        }
        depth += count;
        if depth == cols {
            return;
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
    let rows = panel.chunks_exact_mut(VECTORS * S::LANES);
    for (k, row) in rows.take(S::LANES * E::PER_LANE).enumerate() {
        let lanes = block.as_ref()[k / E::PER_LANE];
        s.store(E::part(s, lanes, k % E::PER_LANE), &mut row[v * S::LANES..]);
    }
}

/// `out` = or += Σ of rows of `V` vectors times the values of `T` tokens, `[rows, T]`.
#[inline(always)]
pub(super) fn kernel<'a, S: Simd, const T: usize, const V: usize>(
    s: S,
    rows: impl Iterator<Item = &'a [f32]>,
    x: &[f32],
    replace: bool,
    out: &Columns<'_>,
) {
    let mut sums = [[s.splat(0.0); V]; T];
    for (w, x) in rows.zip(x.chunks_exact(T)) {
        let w: [S::F; V] = std::array::from_fn(|v| s.load(&w[v * S::LANES..]));
        for t in 0..T {
            let x = s.splat(x[t]);
            for v in 0..V {
                sums[t][v] = s.fma(x, w[v], sums[t][v]);
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            let col = v * S::LANES;
            if col < out.cols() {
                // SAFETY: tiles do not overlap, and this is the only view of the tile.
                let out = unsafe { out.row(t, col, S::LANES.min(out.cols() - col)) };
                add(s, sum, replace, out);
            }
        }
    }
}
