//! Thin wrappers of the dense kernels. Large products are cut into fixed parts ([`Threads`]), each computed on one
//! thread, so a result never depends on how many threads there are.

use std::ops::{Add, AddAssign, Mul, Neg, Sub};

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor as llt;
use faer::linalg::householder;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::traits::RealField;
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par, Spec};
use pulp::Simd;
use rayon::prelude::*;

use super::threads::part;
use super::tridiagonal::GROUP;
use super::{Error, Matrix, Threads};

/// `f32` or `f64`.
pub(super) trait Real:
    RealField
    + Copy
    + PartialOrd
    + Neg<Output = Self>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + AddAssign
{
    /// The closest number.
    fn rounded(x: f64) -> Self;

    /// The same number.
    fn exact(self) -> f64;

    /// Adds the columns times their factors to `sum`, and returns the products of the columns with `v`. All slices are
    /// of one length.
    fn add_group<S: Simd>(
        simd: S,
        columns: [&[Self]; GROUP],
        factors: [Self; GROUP],
        v: &[Self],
        sum: &mut [Self],
    ) -> [Self; GROUP];
}

macro_rules! real {
    ($real:ty, $vectors:ident, $vectors_mut:ident, $splat:ident, $mul_add:ident, $sum:ident) => {
        impl Real for $real {
            fn rounded(x: f64) -> Self {
                x as Self
            }

            fn exact(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn add_group<S: Simd>(
                simd: S,
                columns: [&[Self]; GROUP],
                factors: [Self; GROUP],
                v: &[Self],
                sum: &mut [Self],
            ) -> [Self; GROUP] {
                let [(c0, r0), (c1, r1), (c2, r2), (c3, r3)] = columns.map(|column| S::$vectors(column));
                let [f0, f1, f2, f3] = factors.map(|factor| simd.$splat(factor));
                let [mut s0, mut s1, mut s2, mut s3] = [simd.$splat(0.0); GROUP];
                let (vs, v) = S::$vectors(v);
                let (sums, sum) = S::$vectors_mut(sum);
                let all = sums.iter_mut().zip(vs).zip(c0.iter().zip(c1)).zip(c2.iter().zip(c3));
                for (((sum, &v), (&c0, &c1)), (&c2, &c3)) in all {
                    let low = simd.$mul_add(c1, f1, simd.$mul_add(c0, f0, *sum));
                    *sum = simd.$mul_add(c3, f3, simd.$mul_add(c2, f2, low));
                    s0 = simd.$mul_add(c0, v, s0);
                    s1 = simd.$mul_add(c1, v, s1);
                    s2 = simd.$mul_add(c2, v, s2);
                    s3 = simd.$mul_add(c3, v, s3);
                }
                let mut products = [s0, s1, s2, s3].map(|s| simd.$sum(s));
                for (i, (sum, v)) in sum.iter_mut().zip(v).enumerate() {
                    for (c, rest) in [r0, r1, r2, r3].into_iter().enumerate() {
                        *sum += rest[i] * factors[c];
                        products[c] += rest[i] * v;
                    }
                }
                products
            }
        }
    };
}

real!(f32, as_simd_f32s, as_mut_simd_f32s, splat_f32s, mul_add_f32s, reduce_sum_f32s);
real!(f64, as_simd_f64s, as_mut_simd_f64s, splat_f64s, mul_add_f64s, reduce_sum_f64s);

/// Rows or columns of a product that are computed together: enough for the packing of the other factor to pay.
const PART: usize = 256;

/// `a * b`.
pub(super) fn product<T: Real>(a: MatRef<'_, T>, b: MatRef<'_, T>, threads: Threads) -> Mat<T> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    product_into(out.as_mut(), a, b, threads);
    out
}

/// `a * b`, row by row.
pub(super) fn product_by_rows(a: MatRef<'_, f64>, b: MatRef<'_, f64>, threads: Threads) -> Matrix {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    product_into(out.view_mut(), a, b, threads);
    out
}

/// Cut along the longer side of the product.
fn product_into<T: Real>(out: MatMut<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>, threads: Threads) {
    let (m, n) = out.shape();
    if m == 0 || n == 0 {
        return;
    }
    if n >= m {
        let width = part(n, PART);
        threads.each(out.par_col_chunks_mut(width).enumerate(), |(i, out)| {
            let b = b.subcols(i * width, out.ncols());
            matmul(out, Accum::Replace, a, b, T::rounded(1.0), Par::Seq);
        });
    } else {
        let height = part(m, PART);
        threads.each(out.par_row_chunks_mut(height).enumerate(), |(i, out)| {
            let a = a.subrows(i * height, out.nrows());
            matmul(out, Accum::Replace, a, b, T::rounded(1.0), Par::Seq);
        });
    }
}

/// `a * b` of which it is known that it is symmetric: only one half is computed, the other is its mirror image.
pub(super) fn symmetric_product(a: MatRef<'_, f64>, b: MatRef<'_, f64>, threads: Threads) -> Mat<f64> {
    let n = a.nrows();
    let mut out = Mat::zeros(n, n);
    add_lower_product(out.as_mut(), a, b, 1.0, threads);
    mirror(out.as_mut());
    out
}

/// Adds the lower triangle of `factor * a * b` to that of `out`.
pub(super) fn add_lower_product<T: Real>(
    out: MatMut<'_, T>,
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    factor: T,
    threads: Threads,
) {
    let n = out.nrows();
    // Half of the usual width, as the parts are of unequal height.
    let width = part(n, PART / 2);
    threads.each(out.par_col_chunks_mut(width).enumerate(), |(i, out)| {
        let (from, cols) = (i * width, out.ncols());
        let b = b.subcols(from, cols);
        let (diagonal, below) = out.subrows_mut(from, n - from).split_at_row_mut(cols);
        let full = BlockStructure::Rectangular;
        let lower = BlockStructure::TriangularLower;
        triangular::matmul(
            diagonal,
            lower,
            Accum::Add,
            a.subrows(from, cols),
            full,
            b,
            full,
            factor,
            Par::Seq,
        );
        matmul(below, Accum::Add, a.subrows(from + cols, n - from - cols), b, factor, Par::Seq);
    });
}

/// Copies the lower triangle into the upper one, in square tiles that a cache holds.
fn mirror(mut m: MatMut<'_, f64>) {
    const TILE: usize = 64;
    let n = m.nrows();
    for from in (0..n).step_by(TILE) {
        let width = TILE.min(n - from);
        for j in from..from + width {
            for i in from..j {
                m[(i, j)] = m[(j, i)];
            }
        }
        let rest = n - from - width;
        let (left, right) = m.as_mut().split_at_col_mut(from + width);
        let below = left.as_ref().submatrix(from + width, from, rest, width);
        let mut above = right.subrows_mut(from, width);
        for at in (0..rest).step_by(TILE) {
            let height = TILE.min(rest - at);
            above.as_mut().subcols_mut(at, height).copy_from(below.subrows(at, height).transpose());
        }
    }
}

/// Σ of the squares, summed column by column (row by row if the values lie so), which bounds the rounding error.
pub(super) fn norm_squared(m: MatRef<'_, f64>) -> f64 {
    let m = if m.col_stride() == 1 { m.transpose() } else { m };
    m.col_iter().map(|c| c.iter().map(|x| x * x).sum::<f64>()).sum()
}

/// `||w - u v||_F²`, computed from the difference itself in blocks of rows, so that it is accurate however small.
pub(super) fn residual(w: MatRef<'_, f64>, u: MatRef<'_, f64>, v: MatRef<'_, f64>, threads: Threads) -> f64 {
    let parts = threads.map((0..w.nrows().div_ceil(PART)).into_par_iter(), |i| {
        let from = i * PART;
        let n = PART.min(w.nrows() - from);
        let mut diff = w.subrows(from, n).to_owned();
        matmul(&mut diff, Accum::Add, u.subrows(from, n), v, -1.0, Par::Seq);
        norm_squared(diff.as_ref())
    });
    parts.into_iter().sum()
}

/// The trace of a square matrix.
pub(super) fn trace(m: MatRef<'_, f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum()
}

/// Replaces the lower triangle of `m` by that of its Cholesky factor; fails if `m` is not positive definite.
pub(super) fn cholesky(m: MatMut<'_, f64>) -> bool {
    let scratch = llt::cholesky_in_place_scratch::<f64>(m.nrows(), Par::Seq, Spec::default());
    let stack = &mut MemBuffer::new(scratch);
    llt::cholesky_in_place(
        m,
        llt::LltRegularization::default(),
        Par::Seq,
        MemStack::new(stack),
        Spec::default(),
    )
    .is_ok()
}

/// Fails if a computed matrix is not finite, which for finite factors means overflow.
pub(super) fn expect_no_overflow(m: MatRef<'_, f64>, what: &'static str) -> Result<(), Error> {
    if m.col_iter().all(|c| c.iter().all(|x| x.is_finite())) { Ok(()) } else { Err(Error::Overflow { what }) }
}

/// Makes the entry of largest magnitude of every column positive (the first of them on ties): the freedom of sign
/// of an eigenvector, taken away, so that the same input always gives the same bytes. Returns which columns
/// were turned.
pub(super) fn fix_signs<T: Real>(m: &mut Mat<T>) -> Vec<bool> {
    (0..m.ncols())
        .map(|j| {
            let largest =
                m.col(j).iter().fold(0.0_f64, |a, x| if x.exact().abs() > a.abs() { x.exact() } else { a });
            if largest < 0.0 {
                m.col_mut(j).iter_mut().for_each(|x| *x = -*x);
            }
            largest < 0.0
        })
        .collect()
}

/// A tall matrix `a = H [R; 0]` with H orthogonal, held as Householder reflectors.
pub(super) struct Qr {
    packed: Mat<f64>,
    coefficients: Mat<f64>,
}

impl Qr {
    /// Factors `a`, which has at least as many rows as columns and is not empty.
    pub(super) fn new(a: MatRef<'_, f64>) -> Self {
        let (m, n) = a.shape();
        let block = qr::recommended_block_size::<f64>(m, n);
        let mut packed = a.to_owned();
        let mut coefficients = Mat::zeros(block, n);
        let scratch = qr::qr_in_place_scratch::<f64>(m, n, block, Par::Seq, Spec::default());
        qr::qr_in_place(
            packed.as_mut(),
            coefficients.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Spec::default(),
        );
        Self { packed, coefficients }
    }

    /// R, upper triangular, n x n.
    pub(super) fn r(&self) -> Mat<f64> {
        let n = self.packed.ncols();
        Mat::from_fn(n, n, |i, j| if i <= j { self.packed[(i, j)] } else { 0.0 })
    }

    /// `H [b; 0]` for `b` with n rows: takes coordinates in the basis of the columns of H back to the rows of a.
    pub(super) fn apply(&self, b: MatRef<'_, f64>) -> Mat<f64> {
        let (m, n) = self.packed.shape();
        let mut out = Mat::zeros(m, b.ncols());
        out.as_mut().subrows_mut(0, n).copy_from(b);
        let scratch = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
            m,
            self.coefficients.nrows(),
            b.ncols(),
        );
        householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
            self.packed.as_ref(),
            self.coefficients.as_ref(),
            Conj::No,
            out.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
        );
        out
    }
}
