//! Thin wrappers of the dense kernels, all on one thread: the caller spreads work over matrices, and a result
//! never depends on how many threads there are.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::{Accum, Conj, Mat, MatRef, Par, Spec};

use super::Error;

/// `a * b`.
pub(super) fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut out, Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// `a * b` of which it is known that it is symmetric: only one half is computed, the other is its mirror image.
pub(super) fn symmetric_product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let n = a.nrows();
    let mut out = Mat::zeros(n, n);
    triangular::matmul(
        &mut out,
        BlockStructure::TriangularLower,
        Accum::Replace,
        a,
        BlockStructure::Rectangular,
        b,
        BlockStructure::Rectangular,
        1.0,
        Par::Seq,
    );
    for j in 0..n {
        for i in 0..j {
            out[(i, j)] = out[(j, i)];
        }
    }
    out
}

/// Σ of the squares, summed column by column (row by row if the values lie so), which bounds the rounding error.
pub(super) fn norm_squared(m: MatRef<'_, f64>) -> f64 {
    let m = if m.col_stride() == 1 { m.transpose() } else { m };
    m.col_iter().map(|c| c.iter().map(|x| x * x).sum::<f64>()).sum()
}

/// `||w - u v||_F²`, computed from the difference itself in blocks of rows, so that it is accurate however small.
pub(super) fn residual(w: MatRef<'_, f64>, u: MatRef<'_, f64>, v: MatRef<'_, f64>) -> f64 {
    const BLOCK: usize = 256;
    let mut total = 0.0;
    let mut from = 0;
    while from < w.nrows() {
        let n = BLOCK.min(w.nrows() - from);
        let mut diff = w.subrows(from, n).to_owned();
        matmul(&mut diff, Accum::Add, u.subrows(from, n), v, -1.0, Par::Seq);
        total += norm_squared(diff.as_ref());
        from += n;
    }
    total
}

/// The trace of a square matrix.
pub(super) fn trace(m: MatRef<'_, f64>) -> f64 {
    (0..m.nrows()).map(|i| m[(i, i)]).sum()
}

/// Fails if a computed matrix is not finite, which for finite factors means overflow.
pub(super) fn expect_no_overflow(m: MatRef<'_, f64>, what: &'static str) -> Result<(), Error> {
    if m.col_iter().all(|c| c.iter().all(|x| x.is_finite())) { Ok(()) } else { Err(Error::Overflow { what }) }
}

/// Makes the entry of largest magnitude of every column positive (the first of them on ties): the freedom of sign
/// of an eigenvector, taken away, so that the same input always gives the same bytes. Returns which columns
/// were turned.
pub(super) fn fix_signs(m: &mut Mat<f64>) -> Vec<bool> {
    (0..m.ncols())
        .map(|j| {
            let largest = m.col(j).iter().fold(0.0_f64, |a, &x| if x.abs() > a.abs() { x } else { a });
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
