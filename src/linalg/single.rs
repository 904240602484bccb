//! The best approximation of low rank in f32, for weights that are conditioned well enough for it.
//!
//! The route is that of [`truncated_svd`](super::truncated_svd), at half of its cost. What it loses above the optimum is
//! of second order in the rounding: an error E of the Gram matrix exchanges the kept eigenvector i for the lost one j by
//! Eᵢⱼ / (λᵢ - λⱼ), which costs Eᵢⱼ² / (λᵢ - λⱼ), in all about ||E||² over the size of the eigenvalues at the cut. With
//! ||E|| at most a few roundings of the norm of the Gram matrix this says beforehand whether f32 will do; where the
//! spectrum falls too steeply (the Gram matrix squares the singular values), it will not, and f64 is used.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use super::threads::part;
use super::{LowRank, Matrix, Threads, dense, eigen};

/// ||E|| relative to the norm of the Gram matrix; measured errors are a half to a tenth of what follows from it.
const ROUNDING: f64 = 4.0 * f32::EPSILON as f64;

/// The expected loss above the optimum that is accepted, relative to the optimum.
const EXCESS: f64 = 1e-7;

/// How far the measured loss may be from the tail of the spectrum, relative to the energy: what is known of the latter in
/// f32, far more than what the subspace may be off.
const TOLERANCE: f64 = 2e-6;

/// The factors of rank `rank`, or `None` if the weight needs more than f32. The orthonormal factor is so up to the
/// rounding of f32.
pub(super) fn low_rank(w: &Matrix, rank: usize, threads: Threads) -> Option<LowRank> {
    let (rows, cols) = w.shape();
    let energy = w.norm_squared();
    // A power of two takes all values to the middle of the range and rounds none that f32 holds.
    let scale = (energy / (rows * cols) as f64).sqrt().log2().round().exp2();
    if !(scale > 0.0 && scale.is_finite()) {
        return None;
    }
    // Column by column as the values lie, so the transpose of the weight.
    let mut lying = Mat::<f32>::zeros(cols, rows);
    threads.each(lying.par_col_iter_mut().zip(w.as_slice().par_chunks(cols)), |(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = (from / scale) as f32);
    });
    let lying = lying.as_ref();
    let short = if rows <= cols { lying.transpose() } else { lying };

    let mut gram = Mat::<f32>::zeros(short.nrows(), short.nrows());
    dense::add_lower_product(gram.as_mut(), short, short.transpose(), 1.0, threads);
    if !gram.diagonal().column_vector().iter().all(|x| x.is_finite()) {
        return None;
    }
    let (values, q) = eigen::leading(gram, &|_| rank, threads).ok()?;
    let tail = values[rank..].iter().sum::<f64>();
    let at_cut = rank.checked_sub(1).map_or(values[0], |last| values[last]);
    let rounding = ROUNDING * ROUNDING * values.iter().map(|x| x * x).sum::<f64>();
    if rounding > EXCESS * tail * at_cut {
        return None;
    }
    let tail = tail * scale * scale;
    let other;
    let (left, right) = if rows <= cols {
        other = dense::product(lying, q.as_ref(), threads);
        (other.as_ref(), q.transpose())
    } else {
        other = dense::product(q.transpose(), lying, threads);
        (q.as_ref(), other.as_ref())
    };
    let loss = residual(lying, left, right, threads) * scale * scale;
    if (loss - tail).abs() > TOLERANCE * energy {
        return None;
    }
    let scales = if rows <= cols { (1.0, scale) } else { (scale, 1.0) };
    // The transpose of the weight is left · right, so U = rightᵀ and V = leftᵀ.
    let (u, v) = (widened(right, scales.0, threads), widened(left, scales.1, threads));
    Some(LowRank { u, v, loss, energy })
}

/// `||x - left right||_F²`, of the difference in f32, summed in f64.
fn residual(x: MatRef<'_, f32>, left: MatRef<'_, f32>, right: MatRef<'_, f32>, threads: Threads) -> f64 {
    let width = part(x.ncols(), 256);
    let parts = threads.map((0..x.ncols().div_ceil(width)).into_par_iter(), |i| {
        let from = i * width;
        let n = width.min(x.ncols() - from);
        let mut diff = x.subcols(from, n).to_owned();
        matmul(&mut diff, Accum::Add, left, right.subcols(from, n), -1.0, Par::Seq);
        diff.col_iter().map(|c| c.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()).sum::<f64>()
    });
    parts.into_iter().sum()
}

/// The matrix whose rows are the columns of `m`, times `scale`.
fn widened(m: MatRef<'_, f32>, scale: f64, threads: Threads) -> Matrix {
    let mut out = Matrix::zeros(m.ncols(), m.nrows());
    if m.nrows() > 0 {
        let rows = out.as_mut_slice().par_chunks_mut(m.nrows());
        threads.each(m.par_col_iter().zip(rows), |(from, to)| {
            to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to = f64::from(*from) * scale);
        });
    }
    out
}
