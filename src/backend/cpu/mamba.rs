//! The selective state space model of Mamba (Gu and Dao, arXiv 2312.00752), token by token.
//!
//! Channels do not see each other, so a piece of work is some channels of one window: their states, `[state_dim, channels]`,
//! stay in the first-level cache for the whole window, and nothing is summed across pieces. Every element of a state has a
//! decay of its own, an exponential for every token, which is where the time goes; nothing would be saved by taking tokens
//! together.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Scratch};
use super::math::softplus;
use super::simd::exp::exp;
use super::simd::{Isa, MAX_LANES, Simd, Task};
use crate::backend::{Batch, ChannelTerms};

/// Channels per piece of work.
const COLUMNS: usize = 64;
/// Values per parallel piece of what is done before.
const PIECE: usize = 1 << 12;

/// See [`Backend::mamba_scan`](crate::backend::Backend::mamba_scan); `out` has its shape.
pub(super) fn scan(
    x: &CpuBuffer,
    terms: ChannelTerms<'_, CpuBuffer, Vec<f32>>,
    state: Option<&mut CpuBuffer>,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let ChannelTerms { steps, b, c, rates, skip } = terms;
    let (channels, state_dim) = (x.cols, b.cols);
    steps.data.par_chunks_mut(PIECE).for_each(|piece| piece.iter_mut().for_each(|v| *v = softplus(*v)));
    let state = state.map(|state| state.carried(batch, state_dim, channels));
    let rows = out.rows;
    let out = Columns::new(&mut out.data, rows, channels, channels);
    let blocks = channels.div_ceil(COLUMNS);
    (0..batch.windows * blocks).into_par_iter().for_each(|i| {
        let (block, window) = (i % blocks, i / blocks);
        let col = block * COLUMNS;
        let width = COLUMNS.min(channels - col);
        let first_row = window * batch.length;
        Isa::current().run(Piece {
            x,
            steps,
            b,
            c,
            rates,
            skip,
            first_row,
            first_col: col,
            state: state.map(|state| state.part(0, state_dim, col, width)),
            out: out.part(first_row, batch.length, col, width),
        });
    });
}

/// Some channels over one window.
struct Piece<'a> {
    x: &'a CpuBuffer,
    /// Δ, `[tokens, channels]`.
    steps: &'a CpuBuffer,
    /// `[tokens, state_dim]`.
    b: &'a CpuBuffer,
    /// `[tokens, state_dim]`.
    c: &'a CpuBuffer,
    /// `[state_dim, channels]`.
    rates: &'a [f32],
    skip: &'a [f32],
    first_row: usize,
    first_col: usize,
    /// All rows, columns of the piece.
    state: Option<Columns<'a>>,
    /// Rows of the window, columns of the piece.
    out: Columns<'a>,
}

impl Task for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let pair = 2 * S::LANES;
        let mut block = Scratch::take(self.b.cols * pair);
        let mut rates = Scratch::take(self.b.cols * pair);
        for col in (0..self.out.cols()).step_by(pair) {
            self.pass(s, &mut block, &mut rates, col, pair.min(self.out.cols() - col));
        }
    }
}

impl Piece<'_> {
    /// `width` channels from channel `col` of the piece on, at most two vectors; `block` and `rates` have room for a row of
    /// two vectors for each element of a state.
    #[inline(always)]
    fn pass<S: Simd>(&self, s: S, block: &mut [f32], rates: &mut [f32], col: usize, width: usize) {
        let (pair, state_dim, channels) = (2 * S::LANES, self.b.cols, self.x.cols);
        let first = self.first_col + col;
        let padded = |values: &[f32]| {
            let mut lanes = [0.0; 2 * MAX_LANES];
            lanes[..width].copy_from_slice(&values[first..first + width]);
            lanes
        };
        block.fill(0.0);
        let rows = block.chunks_exact_mut(pair).zip(rates.chunks_exact_mut(pair));
        for (n, (block, rates)) in rows.enumerate() {
            rates.copy_from_slice(&padded(&self.rates[n * channels..])[..pair]);
            if let Some(state) = &self.state {
                // SAFETY: no other piece has these columns.
                block[..width].copy_from_slice(unsafe { state.row(n, col, width) });
            }
        }
        let skip = padded(self.skip);
        for t in 0..self.out.rows() {
            let row = self.first_row + t;
            let (b, c) = (&self.b.row(row)[..state_dim], &self.c.row(row)[..state_dim]);
            let (x, steps) = (padded(self.x.row(row)), padded(self.steps.row(row)));
            let mut y = [0.0; 2 * MAX_LANES];
            for lane in 0..2 {
                let at = lane * S::LANES;
                let (x, step) = (s.load(&x[at..]), s.load(&steps[at..]));
                let (taken, backwards) = (s.mul(step, x), s.sub(s.splat(0.0), step));
                let mut sum = s.splat(0.0);
                for n in 0..state_dim {
                    let decay = exp(s, s.mul(s.load(&rates[n * pair + at..]), backwards));
                    let part = &mut block[n * pair + at..][..S::LANES];
                    let value = s.fma(s.splat(b[n]), taken, s.mul(s.load(part), decay));
                    s.store(value, part);
                    sum = s.fma(s.splat(c[n]), value, sum);
                }
                s.store(s.fma(s.load(&skip[at..]), x, sum), &mut y[at..]);
            }
            // SAFETY: no other piece has these columns of the window's rows.
            unsafe { self.out.row(t, col, width) }.copy_from_slice(&y[..width]);
        }
        let Some(state) = &self.state else { return };
        for (n, row) in block.chunks_exact(pair).enumerate() {
            // SAFETY: no other piece has these columns.
            unsafe { state.row(n, col, width) }.copy_from_slice(&row[..width]);
        }
    }
}

#[cfg(test)]
mod tests;
