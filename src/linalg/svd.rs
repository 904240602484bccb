//! The best approximation of a matrix by one of low rank (Eckart and Young 1936).

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatRef, Par, Spec};

use super::{Error, Matrix, Threads, dense, eigen, single, whitened};

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

/// A factorisation `W ≈ U V` of a weight `[out, in]`, without what other ranks would have lost.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// The left factor, `[out, r]`.
    pub u: Matrix,
    /// The right factor, `[r, in]`.
    pub v: Matrix,
    /// What this factorisation loses, as in [`Factors`].
    pub loss: f64,
    /// What would be lost without any factor: `||W||_F²`, or `tr(W C Wᵀ)`.
    pub energy: f64,
}

/// How far the measured loss may be from the tail of the spectrum, relative to the tail, before the Gram matrix
/// is distrusted.
const TOLERANCE: f64 = 1e-6;

/// The same relative to the whole energy: below it both numbers are rounding.
const NOISE: f64 = 1e-12;

/// Below this size of the shorter side nothing is gained by f32.
const SMALLEST_SINGLE: usize = 256;

/// A loss that is a smaller share of the energy than this is measured on the difference itself; a larger one is known
/// to ten digits as the energy that the factors do not hold.
const SMALL: f64 = 1e-4;

/// The matrix of rank `rank` closest to `w` (`[out, in]`) in the Frobenius norm, as two factors.
///
/// The route is the Gram matrix of the shorter side in f64, its eigenvectors Q, and a projection: W ≈ Q (QᵀW) for
/// out ≤ in and W ≈ (W Q) Qᵀ otherwise. The factor on the short side is therefore orthonormal (`u` if out ≤ in, else
/// `v`), the other one carries the singular values; nothing is divided by a singular value. The loss is measured, on the
/// difference itself if it is small, and if it is not the tail of the spectrum, the matrix is decomposed again without the
/// Gram. All threads are used, see [`Threads`]; [`low_rank`] is faster where the spectrum is not needed.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Rank`] if `rank > min(out, in)`, [`Error::Overflow`], [`Error::NoConvergence`].
pub fn truncated_svd(w: &Matrix, rank: usize) -> Result<Factors, Error> {
    check(w, rank)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(empty(w));
    }
    eigenvectors(w, rank, Threads::All)
}

/// The best factors of rank `rank` alone, without the spectrum: [`truncated_svd`], or with `gram` (the second moment C of
/// the inputs, `[in, in]`) [`whitened_svd`](super::whitened_svd), by the fastest route.
///
/// Without `gram` that is f32 for a weight whose spectrum allows it, and f64 for any other: the factors lose at most
/// 1 + 1e-6 times the smallest possible loss, up to 1e-12 of the energy (the rounding of the Gram matrix). Which route is
/// taken depends on the weight alone, so the bytes are the same on any number of threads. Only the eigenvectors that
/// are kept are computed.
///
/// # Errors
/// As [`truncated_svd`] and [`whitened_svd`](super::whitened_svd).
pub fn low_rank(w: &Matrix, gram: Option<&Matrix>, rank: usize, threads: Threads) -> Result<LowRank, Error> {
    if let Some(c) = gram {
        return whitened::low_rank(w, c, rank, threads);
    }
    check(w, rank)?;
    let short = w.rows().min(w.cols());
    if short == 0 {
        return Ok(empty(w).into());
    }
    if short >= SMALLEST_SINGLE
        && let Some(found) = single::low_rank(w, rank, threads)
    {
        return Ok(found);
    }
    Ok(eigenvectors(w, rank, threads)?.into())
}

impl From<Factors> for LowRank {
    fn from(f: Factors) -> Self {
        let energy = f.energy();
        Self { u: f.u, v: f.v, loss: f.loss, energy }
    }
}

/// [`truncated_svd`] by the Gram matrix of the shorter side, or without it if that is not enough.
fn eigenvectors(w: &Matrix, rank: usize, threads: Threads) -> Result<Factors, Error> {
    let (mut spectrum, q) = eigen::leading(short_gram(w.view(), threads)?, &|_| rank, threads)?;
    clamp(&mut spectrum);
    let factors = with_spectrum(w, q.as_ref(), spectrum, threads);
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
        return whitened::spectrum(w, c, Threads::All);
    }
    let mut values = eigen::values(short_gram(w.view(), Threads::All)?, Threads::All)?;
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
    Ok(with_spectrum(w, q.as_ref().subcols(0, rank), spectrum, Threads::One))
}

fn with_spectrum(w: &Matrix, q: MatRef<'_, f64>, spectrum: Vec<f64>, threads: Threads) -> Factors {
    let (u, v, loss) = project(w.view(), q, spectrum.iter().sum(), threads);
    Factors { u, v, spectrum, loss }
}

/// The factors of the projection on the orthonormal columns of `q`, which live on the short side, and their loss.
fn project(w: MatRef<'_, f64>, q: MatRef<'_, f64>, energy: f64, threads: Threads) -> (Matrix, Matrix, f64) {
    let (u, v, kept) = if w.nrows() <= w.ncols() {
        let v = dense::product_by_rows(q.transpose(), w, threads);
        let kept = v.norm_squared();
        (Matrix::from_view(q), v, kept)
    } else {
        let u = dense::product_by_rows(w, q, threads);
        let kept = u.norm_squared();
        (u, Matrix::from_view(q.transpose()), kept)
    };
    let mut loss = energy - kept;
    if loss <= SMALL * energy {
        loss = dense::residual(w, u.view(), v.view(), threads);
    }
    (u, v, loss)
}

fn is_optimal(f: &Factors) -> bool {
    let tail: f64 = f.spectrum[f.rank()..].iter().sum();
    (f.loss - tail).abs() <= TOLERANCE * tail + NOISE * f.energy()
}

/// `w wᵀ` or `wᵀ w`, whichever is smaller.
fn short_gram(w: MatRef<'_, f64>, threads: Threads) -> Result<Mat<f64>, Error> {
    let w = if w.nrows() <= w.ncols() { w } else { w.transpose() };
    let gram = dense::symmetric_product(w, w.transpose(), threads);
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
