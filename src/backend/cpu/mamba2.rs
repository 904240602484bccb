//! The state space model of Mamba-2 (Dao and Gu, arXiv 2405.21060), token by token.
//!
//! The columns of a head's state S `[state_dim, head_dim]` do not see each other, so a piece of work is some columns of one
//! head of one window: they stay in the first-level cache for the whole window, and nothing is summed across pieces. A
//! piece goes over its columns once for several tokens: a vector of S is loaded, takes up and is read by one token after the
//! other, and is stored. That is three vector instructions per vector and token, of which the chunked form of the paper
//! would save one and spend some on what the tokens of a chunk have of each other; and results do not depend on where a text
//! is cut.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Scratch};
use super::math::softplus;
use super::simd::{Isa, MAX_LANES, Simd, Task};
use crate::architecture::Mamba2;
use crate::backend::{Batch, ScanTerms};

/// Columns of a state per piece of work: at 128 rows 16 KiB, half of the smallest first-level cache.
const COLUMNS: usize = 32;
/// Tokens for which a piece goes over its columns once: what they need stays in registers.
const TOKENS: usize = 4;
/// Rows per parallel piece of what is done before.
const ROWS: usize = 16;

/// See [`Backend::mamba2_scan`](crate::backend::Backend::mamba2_scan); `out` has its shape.
pub(super) fn scan(
    x: &CpuBuffer,
    terms: ScanTerms<'_, CpuBuffer, Vec<f32>>,
    shape: Mamba2,
    state: Option<&mut CpuBuffer>,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let Mamba2 { heads, head_dim, state_dim, .. } = shape;
    let ScanTerms { steps, dt_bias, rates, skip } = terms;
    let mut decays = Scratch::take(x.rows * heads);
    discretise(steps, dt_bias, rates, shape.step_limits, &mut decays);
    let state = state.map(|state| state.carried(batch, heads * state_dim, head_dim));
    let (rows, cols) = (out.rows, out.cols);
    let out = Columns::new(&mut out.data, rows, cols, cols);
    let blocks = head_dim.div_ceil(COLUMNS);
    (0..batch.windows * heads * blocks).into_par_iter().for_each(|i| {
        let (block, i) = (i % blocks, i / blocks);
        let (head, window) = (i % heads, i / heads);
        let col = block * COLUMNS;
        let width = COLUMNS.min(head_dim - col);
        let first_row = window * batch.length;
        Isa::current().run(Piece {
            x,
            steps,
            decays: &decays,
            skip: skip[head],
            shape,
            first_row,
            head,
            col,
            state: state.map(|state| state.part(head * state_dim, state_dim, col, width)),
            out: out.part(first_row, batch.length, head * head_dim + col, width),
        });
    });
}

/// Steps become Δ = softplus(a + dt_bias) within limits, and decays exp(−rate Δ), `[tokens, heads]` both.
fn discretise(
    steps: &mut CpuBuffer,
    dt_bias: &[f32],
    rates: &[f32],
    [least, most]: [f32; 2],
    decays: &mut [f32],
) {
    let heads = rates.len();
    let rows = steps.data.par_chunks_exact_mut(heads).zip(decays.par_chunks_exact_mut(heads));
    rows.with_min_len(ROWS).for_each(|(steps, decays)| {
        for (((step, decay), bias), rate) in steps.iter_mut().zip(decays).zip(dt_bias).zip(rates) {
            *step = softplus(*step + bias).clamp(least, most);
            *decay = (-rate * *step).exp();
        }
    });
}

/// Some columns of one head over one window.
struct Piece<'a> {
    x: &'a CpuBuffer,
    /// Δ, `[tokens, heads]`.
    steps: &'a CpuBuffer,
    /// `[tokens, heads]`.
    decays: &'a [f32],
    /// D of the head.
    skip: f32,
    shape: Mamba2,
    first_row: usize,
    head: usize,
    /// First column within the head.
    col: usize,
    /// Rows of the head, columns of the piece.
    state: Option<Columns<'a>>,
    /// Rows of the window, columns of the piece.
    out: Columns<'a>,
}

impl Task for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let pair = 2 * S::LANES;
        let mut block = Scratch::take(self.shape.state_dim * pair);
        for col in (0..self.out.cols()).step_by(pair) {
            self.pass(s, &mut block, col, pair.min(self.out.cols() - col));
        }
    }
}

impl Piece<'_> {
    /// `width` columns from column `col` of the piece on, at most two vectors.
    #[inline(always)]
    fn pass<S: Simd>(&self, s: S, block: &mut [f32], col: usize, width: usize) {
        let pair = 2 * S::LANES;
        block.fill(0.0);
        if let Some(state) = &self.state {
            for (n, row) in block.chunks_exact_mut(pair).enumerate() {
                // SAFETY: no other piece has these columns of the head.
                row[..width].copy_from_slice(unsafe { state.row(n, col, width) });
            }
        }
        let length = self.out.rows();
        let whole = length - length % TOKENS;
        for t in (0..whole).step_by(TOKENS) {
            self.advance::<S, TOKENS>(s, block, t, col, width);
        }
        for t in whole..length {
            self.advance::<S, 1>(s, block, t, col, width);
        }
        let Some(state) = &self.state else { return };
        for (n, row) in block.chunks_exact(pair).enumerate() {
            // SAFETY: no other piece has these columns of the head.
            unsafe { state.row(n, col, width) }.copy_from_slice(&row[..width]);
        }
    }

    /// `T` tokens from token `first` of the window on. Every element sees the same operations whatever `T` is.
    #[inline(always)]
    fn advance<S: Simd, const T: usize>(
        &self,
        s: S,
        block: &mut [f32],
        first: usize,
        col: usize,
        width: usize,
    ) {
        let Mamba2 { heads, head_dim, state_dim, groups, .. } = self.shape;
        let row = self.first_row + first;
        let b_start = self.shape.width() + self.head / (heads / groups) * state_dim;
        let c_start = b_start + groups * state_dim;
        let x_start = self.head * head_dim + self.col + col;
        let (mut b, mut c) = ([&[][..]; T], [&[][..]; T]);
        let (mut x, mut taken, mut y) =
            ([[s.splat(0.0); 2]; T], [[s.splat(0.0); 2]; T], [[s.splat(0.0); 2]; T]);
        let mut decay = [s.splat(0.0); T];
        for t in 0..T {
            let values = self.x.row(row + t);
            (b[t], c[t]) = (&values[b_start..][..state_dim], &values[c_start..][..state_dim]);
            let mut lanes = [0.0; 2 * MAX_LANES];
            lanes[..width].copy_from_slice(&values[x_start..][..width]);
            let step = s.splat(self.steps.row(row + t)[self.head]);
            for lane in 0..2 {
                x[t][lane] = s.load(&lanes[lane * S::LANES..]);
                taken[t][lane] = s.mul(step, x[t][lane]);
            }
            decay[t] = s.splat(self.decays[(row + t) * heads + self.head]);
        }
        for n in 0..state_dim {
            for lane in 0..2 {
                let part = &mut block[(2 * n + lane) * S::LANES..][..S::LANES];
                let mut value = s.load(part);
                for t in 0..T {
                    value = s.fma(s.splat(b[t][n]), taken[t][lane], s.mul(value, decay[t]));
                    y[t][lane] = s.fma(s.splat(c[t][n]), value, y[t][lane]);
                }
                s.store(value, part);
            }
        }
        let skip = s.splat(self.skip);
        for t in 0..T {
            let mut lanes = [0.0; 2 * MAX_LANES];
            for lane in 0..2 {
                s.store(s.fma(skip, x[t][lane], y[t][lane]), &mut lanes[lane * S::LANES..]);
            }
            // SAFETY: no other piece has these columns of the window's rows.
            unsafe { self.out.row(first + t, col, width) }.copy_from_slice(&lanes[..width]);
        }
    }
}

#[cfg(test)]
mod tests;
