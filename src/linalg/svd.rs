//! The best approximation of a matrix by one of low rank (Eckart and Young 1936).

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatRef, Par, Spec};

use super::{Error, Matrix, dense, eigen, whitened};

/// A factorisation `W ≈ U V` of a weight `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// The left factor, `[out, r]`.
    pub u: Matrix,
    /// The right factor, `[r, in]`.
    pub v: Matrix,
    /// What every rank would have lost: `curve[r] = Σ spectrum[r..]` is the smallest possible loss of rank r. The
    /// min(out, in) squared singular values of W (data-aware: the largest eigenvalues of W C Wᵀ), descending,
    /// never negative; accurate to about the machine epsilon times the first.
    pub spectrum: Vec<f64>,
    /// What this factorisation loses: `||W - U V||_F²` (data-aware: `tr((W - U V) C (W - U V)ᵀ)`).
    pub loss: f64,
}

impl Factors {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.u.cols()
    }

    /// What would be lost without any factor, `Σ spectrum`: `||W||_F²`, or `tr(W C Wᵀ)`.
    pub fn energy(&self) -> f64 {
        self.spectrum.iter().sum()
    }
}

/// How far the measured loss may be from the tail of the spectrum, relative to the tail, before the Gram matrix
/// is distrusted.
const TOLERANCE: f64 = 1e-6;

/// The same relative to the whole energy: below it both numbers are rounding.
const NOISE: f64 = 1e-12;

/// The matrix of rank `rank` closest to `w` (`[out, in]`) in the Frobenius norm, as two factors.
///
/// The route is the Gram matrix of the shorter side in f64, its eigenvectors Q, and a projection: W ≈ Q (QᵀW) for
/// out ≤ in and W ≈ (W Q) Qᵀ otherwise. The factor on the short side is therefore orthonormal (`u` if out ≤ in, else
/// `v`), the other one carries the singular values; nothing is divided by a singular value. The loss is measured on the
/// difference itself, and if it is not the tail of the spectrum, the matrix is decomposed again without the Gram.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Rank`] if `rank > min(out, in)`, [`Error::Overflow`], [`Error::NoConvergence`].
pub fn truncated_svd(w: &Matrix, rank: usize) -> Result<Factors, Error> {
    check(w, rank)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(empty(w));
    }
    let gram = short_gram(w.view())?;
    let (mut spectrum, q) = eigen::decompose(gram.as_ref())?;
    clamp(&mut spectrum);
    let factors = project(w.view(), q.as_ref().subcols(0, rank), spectrum);
    if is_optimal(&factors) {
        return Ok(factors);
    }
    let factors = truncated_svd_direct(w, rank)?;
    if is_optimal(&factors) { Ok(factors) } else { Err(Error::NoConvergence { what: SVD }) }
}

/// All squared singular values of `w`, descending, or with `gram` (the second moment C of the inputs, `[in, in]`)
/// the min(out, in) largest eigenvalues of W C Wᵀ: the `spectrum` of [`Factors`] without its factors, at about
/// half of the cost.
///
/// # Errors
/// As [`truncated_svd`] and [`whitened_svd`](super::whitened_svd).
pub fn spectrum(w: &Matrix, gram: Option<&Matrix>) -> Result<Vec<f64>, Error> {
    check(w, 0)?;
    if let Some(c) = gram {
        return whitened::spectrum(w, c);
    }
    let mut values = eigen::values(short_gram(w.view())?.as_ref())?;
    clamp(&mut values);
    Ok(values)
}

const SVD: &str = "the singular value decomposition";

/// [`truncated_svd`] by a thin SVD in place of the Gram matrix: two to three times the work, and
/// accurate to the machine epsilon times the largest singular value, not the largest square.
pub(super) fn truncated_svd_direct(w: &Matrix, rank: usize) -> Result<Factors, Error> {
    let (m, n) = w.shape();
    let short = m.min(n);
    let (mut left, mut right) = (Mat::zeros(m, short), Mat::zeros(n, short));
    let mut values = Diag::zeros(short);
    let thin = ComputeSvdVectors::Thin;
    let scratch = svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Spec::default());
    svd(
        w.view(),
        values.as_mut(),
        Some(left.as_mut()),
        Some(right.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .map_err(|_| Error::NoConvergence { what: SVD })?;
    let spectrum: Vec<f64> = values.column_vector().iter().map(|s| s * s).collect();
    let mut q = if m <= n { left } else { right };
    dense::fix_signs(&mut q);
    Ok(project(w.view(), q.as_ref().subcols(0, rank), spectrum))
}

/// The factors of the projection on the orthonormal columns of `q`, which live on the short side, and their
/// measured loss.
fn project(w: MatRef<'_, f64>, q: MatRef<'_, f64>, spectrum: Vec<f64>) -> Factors {
    let other;
    let (u, v) = if w.nrows() <= w.ncols() {
        other = dense::product(q.transpose(), w);
        (q, other.as_ref())
    } else {
        other = dense::product(w, q);
        (other.as_ref(), q.transpose())
    };
    let loss = dense::residual(w, u, v);
    Factors { u: Matrix::from_view(u), v: Matrix::from_view(v), spectrum, loss }
}

fn is_optimal(f: &Factors) -> bool {
    let tail: f64 = f.spectrum[f.rank()..].iter().sum();
    (f.loss - tail).abs() <= TOLERANCE * tail + NOISE * f.energy()
}

/// `w wᵀ` or `wᵀ w`, whichever is smaller.
fn short_gram(w: MatRef<'_, f64>) -> Result<Mat<f64>, Error> {
    let w = if w.nrows() <= w.ncols() { w } else { w.transpose() };
    let gram = dense::symmetric_product(w, w.transpose());
    dense::expect_no_overflow(gram.as_ref(), "the Gram matrix of the weight")?;
    Ok(gram)
}

/// The factors of a weight without entries.
pub(super) fn empty(w: &Matrix) -> Factors {
    Factors { u: Matrix::zeros(w.rows(), 0), v: Matrix::zeros(0, w.cols()), spectrum: Vec::new(), loss: 0.0 }
}

/// The conditions on a weight that all routes share.
pub(super) fn check(w: &Matrix, rank: usize) -> Result<(), Error> {
    w.expect_finite("the weight")?;
    let max = w.rows().min(w.cols());
    if rank > max { Err(Error::Rank { rank, max }) } else { Ok(()) }
}

/// Eigenvalues of a semidefinite matrix are not negative; computed ones may be, by rounding.
pub(super) fn clamp(values: &mut [f64]) {
    for x in values {
        *x = x.max(0.0);
    }
}
