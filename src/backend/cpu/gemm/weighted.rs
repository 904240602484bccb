//! Sums of rows with weights: what attention does with its values.

use super::panel::kernel;
use super::source::F32;
use super::stream::add;
use super::{Columns, DEPTH, Groups, PackGroup, Scratch};
use crate::backend::cpu::simd::{MAX_LANES, Simd, Task};

/// `out [n, width]` = Σₖ weights[·, k] · rows[k], for weights `[n, count]`.
///
/// Each element is one chain of fused multiply-adds per [`DEPTH`] rows, and weights of 0 change nothing, so the result
/// depends on the rows with other weights alone: not on how many tokens share the call, nor, given `first`, on where
/// the rows begin.
pub(in super::super) struct WeightedRows<'a> {
    pub(in super::super) weights: &'a [f32],
    pub(in super::super) count: usize,
    /// The rows begin here, `stride` apart.
    pub(in super::super) rows: &'a [f32],
    pub(in super::super) stride: usize,
    /// Number of the first row. The chains begin where this is a multiple of [`DEPTH`].
    pub(in super::super) first: usize,
    pub(in super::super) out: Columns<'a>,
}

impl Task for WeightedRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let WeightedRows { weights, count, rows, stride, first, out } = self;
        let (n, width) = (out.rows(), out.cols());
        if n == 1 {
            return chains::<S, 1, 8>(s, weights, first, rows, stride, &out);
        }
        let groups = Groups::new(n, S::PANEL_TOKENS);
        let mut packed = Scratch::take(groups.largest() * count);
        macro_rules! dispatch {
            ($out:expr, $packed:expr, $($tokens:literal)*) => {
                match $out.rows() {
                    $($tokens if $tokens <= S::PANEL_TOKENS => {
                        chains::<S, $tokens, 2>(s, $packed, first, rows, stride, $out)
                    })*
                    _ => unreachable!("groups are cut to fit"),
                }
            };
        }
        for g in 0..groups.count {
            let (start, size) = (groups.start(g), groups.size(g));
            let rows = &weights[start * count..];
            PackGroup { rows, stride: count, tokens: size, to: &mut packed[..size * count] }.run(s);
            let out = out.part(start, size, 0, width);
            dispatch!(&out, &packed[..size * count], 1 2 3 4 5 6 7 8 9 10 11 12 13 14);
        }
    }
}

/// `T` tokens, their weights as `[count, T]`.
#[inline(always)]
fn chains<S: Simd, const T: usize, const V: usize>(
    s: S,
    weights: &[f32],
    first: usize,
    rows: &[f32],
    stride: usize,
    out: &Columns<'_>,
) {
    let count = weights.len() / T;
    let mut start = 0;
    loop {
        let end = count.min(start + DEPTH - (first + start) % DEPTH);
        let weights = &weights[start * T..end * T];
        for col in (0..out.cols()).step_by(V * S::LANES) {
            let width = (V * S::LANES).min(out.cols() - col);
            let out = out.part(0, T, col, width);
            if width == V * S::LANES {
                let rows = rows[start * stride + col..].chunks(stride).map(|row| &row[..V * S::LANES]);
                add_rows(s, kernel::<S, F32, T, V>(s, rows, weights), start == 0, &out);
                continue;
            }
            for lanes in (0..width).step_by(S::LANES) {
                let width = S::LANES.min(width - lanes);
                let (col, out) = (col + lanes, out.part(0, T, lanes, width));
                if width == S::LANES {
                    let rows = rows[start * stride + col..].chunks(stride).map(|row| &row[..S::LANES]);
                    add_rows(s, kernel::<S, F32, T, 1>(s, rows, weights), start == 0, &out);
                } else {
                    narrow::<S, T>(s, &rows[start * stride + col..], stride, weights, start == 0, &out);
                }
            }
        }
        start = end;
        if start >= count {
            return;
        }
    }
}

/// `out` = or += whole vectors of `sums`.
#[inline(always)]
fn add_rows<S: Simd, const T: usize, const V: usize>(
    s: S,
    sums: [[S::F; V]; T],
    replace: bool,
    out: &Columns<'_>,
) {
    for (t, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's part of the result, viewed once.
            add(s, sum, replace, unsafe { out.row(t, v * S::LANES, S::LANES) });
        }
    }
}

/// Fewer columns than a vector has lanes.
#[inline(always)]
fn narrow<S: Simd, const T: usize>(
    s: S,
    rows: &[f32],
    stride: usize,
    weights: &[f32],
    replace: bool,
    out: &Columns<'_>,
) {
    let width = out.cols();
    let mut lanes = [0.0; MAX_LANES];
    let mut sums = [s.splat(0.0); T];
    for (row, weights) in rows.chunks(stride).zip(weights.chunks_exact(T)) {
        lanes[..width].copy_from_slice(&row[..width]);
        let row = s.load(&lanes);
        for t in 0..T {
            sums[t] = s.fma(s.splat(weights[t]), row, sums[t]);
        }
    }
    for (t, sum) in sums.into_iter().enumerate() {
        // SAFETY: the caller's part of the result, viewed once.
        add(s, sum, replace, unsafe { out.row(t, 0, width) });
    }
}
