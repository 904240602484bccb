//! The gated delta rule (Yang et al., arXiv 2412.06464), token by token.
//!
//! The columns of a head's state S `[key_dim, value_dim]` do not see each other, so a piece of work is some columns of one
//! head of one window: they stay in the first-level cache for the whole window, and nothing is summed across pieces. Per
//! token a piece goes over its columns once. With S the state after the token before but one, k', δ' and α' of the token
//! before, and k, q, v, α, β of the token at hand:
//!
//! S ← α' S + k' ⊗ δ'   (what the token before has left), u = kᵀS, r = qᵀS,
//! δ = β (v − α u),   o = α r + (q·k) δ,
//!
//! where the last line is qᵀ of the new state; with an α per row, α' scales rows of S, and u = (α ∘ k)ᵀS, r = (α ∘ q)ᵀS
//! need no further α. That is four multiply-adds per element of the state, one load and one store. The chunked form of the
//! paper has more arithmetic for the head sizes of published models, and results would depend on where a text is cut.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Scratch};
use super::math::{sigmoid, softplus};
use super::simd::{Isa, MAX_LANES, Simd, Task};
use crate::architecture::GatedDelta;
use crate::backend::{Batch, DeltaGates};

/// Columns of a state per piece of work: at 128 rows 16 KiB, half of the smallest first-level cache.
const COLUMNS: usize = 32;
/// Rows per parallel piece of what is done before.
const ROWS: usize = 16;
/// ε of the lengths of q and k, as in the library that these models were trained with.
const EPS: f32 = 1e-6;

/// See [`Backend::gated_delta_rule`](crate::backend::Backend::gated_delta_rule); `out` has its shape.
pub(super) fn gated_delta_rule(
    qkv: &mut CpuBuffer,
    gates: DeltaGates<'_, CpuBuffer, Vec<f32>>,
    shape: GatedDelta,
    state: Option<&mut CpuBuffer>,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let GatedDelta { key_heads, value_heads, key_dim, value_dim, .. } = shape;
    let mut products = Scratch::take(qkv.rows * key_heads);
    normalise(qkv, shape, &mut products);
    let DeltaGates { b, a, log_rates, dt_bias } = gates;
    open_gates(b, a, log_rates, dt_bias);
    let state = state.map(|state| state.carried(batch, value_heads * key_dim, value_dim));
    let (rows, cols) = (out.rows, out.cols);
    let out = Columns::new(&mut out.data, rows, cols, cols);
    let blocks = value_dim.div_ceil(COLUMNS);
    (0..batch.windows * value_heads * blocks).into_par_iter().for_each(|i| {
        let (block, i) = (i % blocks, i / blocks);
        let (head, window) = (i % value_heads, i / value_heads);
        let col = block * COLUMNS;
        let width = COLUMNS.min(value_dim - col);
        let first_row = window * batch.length;
        Isa::current().run(Piece {
            qkv,
            products: &products,
            alpha: a,
            beta: b,
            shape,
            first_row,
            head,
            col,
            state: state.map(|state| state.part(head * key_dim, key_dim, col, width)),
            out: out.part(first_row, batch.length, head * value_dim + col, width),
        });
    });
}

/// Divides q and k by their length and q by √key_dim, and gives the product q · k of each, `[tokens, key_heads]`.
fn normalise(qkv: &mut CpuBuffer, shape: GatedDelta, products: &mut [f32]) {
    let GatedDelta { key_heads, key_dim, .. } = shape;
    let scale = (key_dim as f64).powf(-0.5) as f32;
    let rows = qkv.data.par_chunks_exact_mut(qkv.cols).zip(products.par_chunks_exact_mut(key_heads));
    rows.with_min_len(ROWS).for_each(|(row, products)| {
        let (q, rest) = row.split_at_mut(key_heads * key_dim);
        let k = &mut rest[..key_heads * key_dim];
        let heads = q.chunks_exact_mut(key_dim).zip(k.chunks_exact_mut(key_dim));
        for ((q, k), product) in heads.zip(products) {
            let shorten = |x: &mut [f32], scale: f32| {
                let factor = scale / (dot(x, x) + EPS).sqrt();
                for v in x {
                    *v *= factor;
                }
            };
            shorten(q, scale);
            shorten(k, 1.0);
            *product = dot(q, k);
        }
    });
}

/// Σ a b, in an order that depends on the length alone.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; MAX_LANES];
    for (a, b) in a.chunks(MAX_LANES).zip(b.chunks(MAX_LANES)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.into_iter().sum()
}

/// b becomes β = σ(b), a becomes α = exp(−exp(A_log) · softplus(a + dt_bias)).
fn open_gates(b: &mut CpuBuffer, a: &mut CpuBuffer, log_rates: &[f32], dt_bias: &[f32]) {
    let (heads, decays) = (log_rates.len(), dt_bias.len());
    let rows = b.data.par_chunks_exact_mut(heads).zip(a.data.par_chunks_exact_mut(decays));
    rows.with_min_len(ROWS).for_each(|(b, a)| {
        for b in b {
            *b = sigmoid(*b);
        }
        let of_heads = a.chunks_exact_mut(decays / heads).zip(dt_bias.chunks_exact(decays / heads));
        for ((a, bias), log_rate) in of_heads.zip(log_rates) {
            let rate = log_rate.exp();
            for (a, bias) in a.iter_mut().zip(bias) {
                *a = (-rate * softplus(*a + bias)).exp();
            }
        }
    });
}

/// Some columns of one head over one window.
struct Piece<'a> {
    qkv: &'a CpuBuffer,
    /// q · k, `[tokens, key_heads]`.
    products: &'a [f32],
    /// `[tokens, decays]`.
    alpha: &'a CpuBuffer,
    /// `[tokens, value_heads]`.
    beta: &'a CpuBuffer,
    shape: GatedDelta,
    first_row: usize,
    /// Value head.
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
        let mut block = Scratch::take(self.shape.key_dim * pair);
        for col in (0..self.out.cols()).step_by(pair) {
            let width = pair.min(self.out.cols() - col);
            if self.shape.kimi {
                self.pass::<S, true>(s, &mut block, col, width);
            } else {
                self.pass::<S, false>(s, &mut block, col, width);
            }
        }
    }
}

impl Piece<'_> {
    /// `width` columns from column `col` of the piece on, at most two vectors. `BY_ROW` says whether every row has its
    /// own α.
    #[inline(always)]
    fn pass<S: Simd, const BY_ROW: bool>(&self, s: S, block: &mut [f32], col: usize, width: usize) {
        let GatedDelta { key_heads, value_heads, key_dim, value_dim, .. } = self.shape;
        let decays = self.shape.decays() / value_heads;
        let pair = 2 * S::LANES;
        block.fill(0.0);
        if let Some(state) = &self.state {
            for (i, row) in block.chunks_exact_mut(pair).enumerate() {
                // SAFETY: no other piece has these columns of the head.
                row[..width].copy_from_slice(unsafe { state.row(i, col, width) });
            }
        }
        let key_head = self.head / (value_heads / key_heads);
        let q_start = key_head * key_dim;
        let k_start = (key_heads + key_head) * key_dim;
        let v_start = 2 * key_heads * key_dim + self.head * value_dim + self.col + col;
        // Of the token before: nothing.
        let first = &self.qkv.row(self.first_row)[k_start..][..key_dim];
        let mut old = Token { key: first, alpha: &[], decay: 1.0, delta: [s.splat(0.0); 2] };
        for t in 0..self.out.rows() {
            let row = self.first_row + t;
            let qkv = self.qkv.row(row);
            let (q, k) = (&qkv[q_start..][..key_dim], &qkv[k_start..][..key_dim]);
            let alpha = &self.alpha.row(row)[self.head * decays..][..decays];
            let (mut at_key, mut at_query) = ([s.splat(0.0); 2], [s.splat(0.0); 2]);
            for (i, state) in block.chunks_exact_mut(pair).enumerate() {
                let (k, q) = if BY_ROW { (k[i] * alpha[i], q[i] * alpha[i]) } else { (k[i], q[i]) };
                let (k, q) = (s.splat(k), s.splat(q));
                old.leave::<BY_ROW>(s, i, state, |lane, value| {
                    at_key[lane] = s.fma(k, value, at_key[lane]);
                    at_query[lane] = s.fma(q, value, at_query[lane]);
                });
            }
            let mut v = [0.0; 2 * MAX_LANES];
            v[..width].copy_from_slice(&qkv[v_start..][..width]);
            let decay = if BY_ROW { 1.0 } else { alpha[0] };
            let factor = s.splat(decay);
            let beta = s.splat(self.beta.row(row)[self.head]);
            let product = s.splat(self.products[row * key_heads + key_head]);
            let mut delta = [s.splat(0.0); 2];
            let mut o = [0.0; 2 * MAX_LANES];
            for lane in 0..2 {
                let v = s.load(&v[lane * S::LANES..]);
                delta[lane] = s.mul(beta, s.sub(v, s.mul(factor, at_key[lane])));
                let read = s.fma(product, delta[lane], s.mul(factor, at_query[lane]));
                s.store(read, &mut o[lane * S::LANES..]);
            }
            // SAFETY: no other piece has these columns of the window's rows.
            unsafe { self.out.row(t, col, width) }.copy_from_slice(&o[..width]);
            old = Token { key: k, alpha, decay, delta };
        }
        let Some(state) = &self.state else { return };
        for (i, row) in block.chunks_exact_mut(pair).enumerate() {
            old.leave::<BY_ROW>(s, i, row, |_, _| {});
            // SAFETY: no other piece has these columns of the head.
            unsafe { state.row(i, col, width) }.copy_from_slice(&row[..width]);
        }
    }
}

/// What a token leaves behind in two vectors of columns of a state.
struct Token<'a, S: Simd> {
    key: &'a [f32],
    /// α of every row, where they differ; empty before the first token.
    alpha: &'a [f32],
    /// α of all rows, where they do not.
    decay: f32,
    delta: [S::F; 2],
}

impl<S: Simd> Token<'_, S> {
    /// Row `i` of the state after the token; `then` sees its vectors.
    #[inline(always)]
    fn leave<const BY_ROW: bool>(&self, s: S, i: usize, row: &mut [f32], mut then: impl FnMut(usize, S::F)) {
        let decay = if BY_ROW { self.alpha.get(i).copied().unwrap_or(1.0) } else { self.decay };
        let (key, decay) = (s.splat(self.key[i]), s.splat(decay));
        for lane in 0..2 {
            let part = &mut row[lane * S::LANES..][..S::LANES];
            let value = s.fma(key, self.delta[lane], s.mul(s.load(part), decay));
            s.store(value, part);
            then(lane, value);
        }
    }
}

#[cfg(test)]
mod tests;
