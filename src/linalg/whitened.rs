//! The approximation of low rank that loses least *on the data* (SVD-LLM, Wang et al. 2024, arXiv 2403.07378).
//!
//! With the second moment C = Σ x xᵀ of the inputs, an approximation A of W changes the outputs by
//! Σ ||(W - A) x||² = tr((W - A) C (W - A)ᵀ). SVD-LLM takes the Cholesky factor S of C, truncates W S and multiplies
//! S⁻¹ back. Any T with T Tᵀ = C gives the same optimum (the whitening theorem), so T need not exist as numbers at all:
//! with the leading eigenvectors Q of M = W C Wᵀ the optimum is A = Q Qᵀ W, and it loses exactly the other
//! eigenvalues of M. Nothing is inverted, and a singular C is harmless.

use faer::{Mat, MatRef};

use super::dense::{self, Qr};
use super::{Error, Factors, Matrix, eigen, svd};

/// Directions that together hold at most this share of the energy are chosen with damping.
const UNDETERMINED: f64 = 1e-7;

/// The damping: this share of the mean eigenvalue of C is added to all of them.
const DAMPING: f64 = 1e-6;

/// How far the measured loss may be from the predicted one, relative to the whole energy.
const TOLERANCE: f64 = 1e-9;

/// How negative the eigenvalues of M may be together, relative to the whole energy, before C is refused: moments
/// that were summed in f32 are semidefinite only up to their rounding.
const INDEFINITE: f64 = 1e-4;

/// The matrix of rank `rank` closest to `w` (`[out, in]`) on inputs with second moment `gram` (C = Σ x xᵀ, `[in, in]`,
/// symmetric, any scale): minimises tr((W - U V) C (W - U V)ᵀ). `u` is orthonormal and `v = uᵀ w`.
///
/// The reported spectrum and loss are those of C itself, and the loss is the tail of the spectrum up to 1e-7 of the
/// energy. Which directions to take is decided by the eigenvectors of M = W C Wᵀ, as far as the data decide it:
/// the last directions, which together hold at most 1e-7 of the energy (all of them for an expert that saw no token),
/// are ordered anew by C + 1e-6 tr(C)/in I (the identity if C = 0), so that they keep as much of the weight as
/// possible instead of following rounding errors. Damping every direction, as is usual, would cost up to about 1e-6
/// ||W||² tr(C)/in, which is not small where the weight is small in the directions that the data use.
///
/// For out > in, M has rank in at most. With the QR decomposition W = H R the problem is that of R (`[in, in]`), and
/// H takes its left factor back: one eigenproblem of the shorter side again, and no square root or inverse of C.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Shape`] if `gram` is not `[in, in]`, [`Error::Rank`] if `rank > min(out, in)`,
/// [`Error::NotSemidefinite`], [`Error::Overflow`], [`Error::NoConvergence`].
pub fn whitened_svd(w: &Matrix, gram: &Matrix, rank: usize) -> Result<Factors, Error> {
    check(w, gram, rank)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(svd::empty(w));
    }
    let tall = tall_qr(w);
    let r = tall.as_ref().map(Qr::r);
    let x = r.as_ref().map_or_else(|| w.view(), Mat::as_ref);
    let m = moment(x, gram.view())?;
    let noise = noise(x, gram.view());
    let (values, q) = eigen::decompose(m.as_ref())?;
    let (spectrum, negative) = semidefinite(values, noise)?;

    let energy: f64 = spectrum.iter().sum();
    let determined = determined(&spectrum, UNDETERMINED * energy + noise);
    let (mut u, loss) = if rank <= determined {
        (q.as_ref().subcols(0, rank).to_owned(), spectrum[rank..].iter().sum())
    } else {
        complete(x, gram.view(), &spectrum, q.as_ref(), determined, rank)?
    };
    // What was found, against M itself: catches an eigensolver that failed without saying so.
    let kept = dense::product(m.as_ref(), u.as_ref());
    let kept: f64 = kept.col_iter().zip(u.as_ref().col_iter()).map(|(a, b)| a.transpose() * b).sum();
    if (dense::trace(m.as_ref()) - kept - loss).abs() > TOLERANCE * energy + negative + noise {
        return Err(Error::NoConvergence { what: "the whitened decomposition" });
    }

    let mut v = dense::product(u.transpose(), x);
    if let Some(qr) = &tall {
        u = qr.apply(u.as_ref());
    }
    for (row, turn) in dense::fix_signs(&mut u).into_iter().enumerate() {
        if turn {
            v.row_mut(row).iter_mut().for_each(|x| *x = -*x);
        }
    }
    Ok(Factors { u: Matrix::from_view(u.as_ref()), v: Matrix::from_view(v.as_ref()), spectrum, loss })
}

/// The spectrum of [`whitened_svd`] alone.
pub(super) fn spectrum(w: &Matrix, gram: &Matrix) -> Result<Vec<f64>, Error> {
    check(w, gram, 0)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(Vec::new());
    }
    let r = tall_qr(w).as_ref().map(Qr::r);
    let x = r.as_ref().map_or_else(|| w.view(), Mat::as_ref);
    let values = eigen::values(moment(x, gram.view())?.as_ref())?;
    Ok(semidefinite(values, noise(x, gram.view()))?.0)
}

/// tr((W - A) C (W - A)ᵀ): what the approximation `a` of `w` (both `[out, in]`) loses on inputs with second moment
/// `gram` (`[in, in]`), measured on the difference itself.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Shape`] if the three do not fit.
pub fn data_loss(w: &Matrix, a: &Matrix, gram: &Matrix) -> Result<f64, Error> {
    check(w, gram, 0)?;
    a.expect_shape("the approximation", w.shape())?;
    a.expect_finite("the approximation")?;
    let diff = w.view() - a.view();
    let out = dense::product(diff.as_ref(), gram.view());
    Ok(out.row_iter().zip(diff.row_iter()).map(|(a, b)| a * b.transpose()).sum())
}

fn check(w: &Matrix, gram: &Matrix, rank: usize) -> Result<(), Error> {
    svd::check(w, rank)?;
    gram.expect_shape(GRAM, (w.cols(), w.cols()))?;
    gram.expect_finite(GRAM)
}

const GRAM: &str = "the second moment of the inputs";

/// The QR decomposition of a weight with more rows than columns.
fn tall_qr(w: &Matrix) -> Option<Qr> {
    (w.rows() > w.cols()).then(|| Qr::new(w.view()))
}

/// M = X C Xᵀ.
fn moment(x: MatRef<'_, f64>, gram: MatRef<'_, f64>) -> Result<Mat<f64>, Error> {
    let xc = dense::product(x, gram);
    let m = dense::symmetric_product(xc.as_ref(), x.transpose());
    dense::expect_no_overflow(m.as_ref(), "the second moment of the outputs")?;
    Ok(m)
}

/// How large all eigenvalues of M may be together by rounding alone, where the data do not meet the weight.
fn noise(x: MatRef<'_, f64>, gram: MatRef<'_, f64>) -> f64 {
    64.0 * f64::EPSILON * dense::norm_squared(x) * dense::trace(gram).max(0.0)
}

/// Clamps eigenvalues at 0 and returns how much was cut off in all; refuses what rounding cannot explain.
fn semidefinite(mut values: Vec<f64>, noise: f64) -> Result<(Vec<f64>, f64), Error> {
    let negative: f64 = values.iter().map(|x| (-x).max(0.0)).sum();
    svd::clamp(&mut values);
    if negative > INDEFINITE * values.iter().sum::<f64>() + noise {
        return Err(Error::NotSemidefinite { what: GRAM });
    }
    Ok((values, negative))
}

/// The smallest number of leading eigenvalues that leaves at most `budget` to the others.
fn determined(spectrum: &[f64], budget: f64) -> usize {
    let mut tail = 0.0;
    for (i, x) in spectrum.iter().enumerate().rev() {
        tail += x;
        if tail > budget {
            return i + 1;
        }
    }
    0
}

/// The first `determined` columns of `q` and, to make up `rank`, the best directions among the span of the others for
/// the damped moment; and the data loss of all of them. In the coordinates of the other columns N of `q` the damped
/// moment is Nᵀ X (C + δ I) Xᵀ N = diag(spectrum) + δ (Nᵀ X) (Nᵀ X)ᵀ.
fn complete(
    x: MatRef<'_, f64>,
    gram: MatRef<'_, f64>,
    spectrum: &[f64],
    q: MatRef<'_, f64>,
    determined: usize,
    rank: usize,
) -> Result<(Mat<f64>, f64), Error> {
    let rest = q.subcols(determined, q.ncols() - determined);
    let values = &spectrum[determined..];
    let damping = DAMPING * dense::trace(gram) / gram.nrows() as f64;
    let damping = if damping > 0.0 { damping } else { 1.0 };

    let y = dense::product(rest.transpose(), x);
    let mut damped = dense::symmetric_product(y.as_ref(), y.transpose()) * faer::Scale(damping);
    for (i, value) in values.iter().enumerate() {
        damped[(i, i)] += value;
    }
    dense::expect_no_overflow(damped.as_ref(), "the damped moment of the outputs")?;
    let (_, z) = eigen::decompose(damped.as_ref())?;

    let extra = rank - determined;
    let mut u = Mat::zeros(q.nrows(), rank);
    u.as_mut().subcols_mut(0, determined).copy_from(q.subcols(0, determined));
    u.as_mut().subcols_mut(determined, extra).copy_from(dense::product(rest, z.as_ref().subcols(0, extra)));
    let lost = z.as_ref().subcols(extra, z.ncols() - extra);
    let loss = lost.col_iter().map(|z| z.iter().zip(values).map(|(z, x)| z * z * x).sum::<f64>()).sum();
    Ok((u, loss))
}
