//! The approximation of low rank that loses least *on the data* (SVD-LLM, Wang et al. 2024, arXiv 2403.07378).
//!
//! With the second moment C = Σ x xᵀ of the inputs, an approximation A of W changes the outputs by
//! Σ ||(W - A) x||² = tr((W - A) C (W - A)ᵀ). SVD-LLM takes the Cholesky factor S of C, truncates W S and multiplies
//! S⁻¹ back. Any T with T Tᵀ = C gives the same optimum (the whitening theorem), so T need not exist as numbers at all:
//! with the leading eigenvectors Q of M = W C Wᵀ the optimum is A = Q Qᵀ W, and it loses exactly the other
//! eigenvalues of M. Nothing is inverted, and a singular C is harmless.

use faer::{Mat, MatRef};

use super::dense::{self, Qr};
use super::{Error, Factors, LowRank, Matrix, Threads, eigen, svd};

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
    Problem::new(w, gram, Threads::All)?.factorise(rank)
}

/// [`low_rank`](super::low_rank) with a second moment.
pub(super) fn low_rank(w: &Matrix, gram: &Matrix, rank: usize, threads: Threads) -> Result<LowRank, Error> {
    check(w, gram, rank)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(svd::empty(w).into());
    }
    Ok(Problem::new(w, gram, threads)?.factorise(rank)?.into())
}

/// A weight, or the triangular factor of a tall one, and its second moment on the data.
struct Problem<'a> {
    w: &'a Matrix,
    gram: &'a Matrix,
    tall: Option<(Qr, Mat<f64>)>,
    m: Mat<f64>,
    noise: f64,
    threads: Threads,
}

impl<'a> Problem<'a> {
    fn new(w: &'a Matrix, gram: &'a Matrix, threads: Threads) -> Result<Self, Error> {
        let tall = tall_qr(w);
        let mut problem = Self { w, gram, tall, m: Mat::new(), noise: 0.0, threads };
        problem.m = moment(problem.x(), gram.view(), threads)?;
        problem.noise = noise(problem.x(), gram.view());
        Ok(problem)
    }

    fn x(&self) -> MatRef<'_, f64> {
        self.tall.as_ref().map_or_else(|| self.w.view(), |(_, r)| r.as_ref())
    }

    fn factorise(&self, rank: usize) -> Result<Factors, Error> {
        let (x, m, threads) = (self.x(), self.m.as_ref(), self.threads);
        let undetermined = |spectrum: &[f64]| UNDETERMINED * spectrum.iter().sum::<f64>() + self.noise;
        let wanted = |values: &[f64]| {
            let spectrum: Vec<f64> = values.iter().map(|x| x.max(0.0)).collect();
            if rank <= determined(&spectrum, undetermined(&spectrum)) { rank } else { values.len() }
        };
        let (values, q) = eigen::leading(m.to_owned(), &wanted, threads)?;
        let (spectrum, negative) = semidefinite(values, self.noise)?;
        let energy: f64 = spectrum.iter().sum();
        let determined = determined(&spectrum, undetermined(&spectrum));
        let (u, loss) = if rank <= determined {
            (q, spectrum[rank..].iter().sum())
        } else {
            complete(x, self.gram.view(), &spectrum, q.as_ref(), determined, rank, threads)?
        };
        // What was found, against M itself: catches an eigensolver that failed without saying so.
        let kept = self.kept(u.as_ref());
        if (dense::trace(m) - kept - loss).abs() > TOLERANCE * energy + negative + self.noise {
            return Err(Error::NoConvergence { what: "the whitened decomposition" });
        }
        let (u, v) = self.factors(u);
        Ok(Factors { u, v, spectrum, loss })
    }

    /// tr(Uᵀ M U).
    fn kept(&self, u: MatRef<'_, f64>) -> f64 {
        let kept = dense::product(self.m.as_ref(), u, self.threads);
        kept.col_iter().zip(u.col_iter()).map(|(a, b)| a.transpose() * b).sum()
    }

    /// The factors `[out, r]` and `[r, in]` that belong to orthonormal vectors on the shorter side.
    fn factors(&self, mut u: Mat<f64>) -> (Matrix, Matrix) {
        let mut v = dense::product_by_rows(u.transpose(), self.x(), self.threads);
        if let Some((qr, _)) = &self.tall {
            u = qr.apply(u.as_ref());
        }
        let cols = v.cols();
        for (row, turn) in dense::fix_signs(&mut u).into_iter().enumerate() {
            if turn {
                v.as_mut_slice()[row * cols..][..cols].iter_mut().for_each(|x| *x = -*x);
            }
        }
        (Matrix::from_view(u.as_ref()), v)
    }
}

/// The spectrum of [`whitened_svd`] alone.
pub(super) fn spectrum(w: &Matrix, gram: &Matrix, threads: Threads) -> Result<Vec<f64>, Error> {
    check(w, gram, 0)?;
    if w.rows().min(w.cols()) == 0 {
        return Ok(Vec::new());
    }
    let problem = Problem::new(w, gram, threads)?;
    let values = eigen::values(problem.m, threads)?;
    Ok(semidefinite(values, problem.noise)?.0)
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
    let out = dense::product(diff.as_ref(), gram.view(), Threads::All);
    Ok(out.row_iter().zip(diff.row_iter()).map(|(a, b)| a * b.transpose()).sum())
}

fn check(w: &Matrix, gram: &Matrix, rank: usize) -> Result<(), Error> {
    svd::check(w, rank)?;
    gram.expect_shape(GRAM, (w.cols(), w.cols()))?;
    gram.expect_finite(GRAM)
}

const GRAM: &str = "the second moment of the inputs";

/// The QR decomposition of a weight with more rows than columns, and its R.
fn tall_qr(w: &Matrix) -> Option<(Qr, Mat<f64>)> {
    (w.rows() > w.cols()).then(|| {
        let qr = Qr::new(w.view());
        let r = qr.r();
        (qr, r)
    })
}

/// M = X C Xᵀ.
fn moment(x: MatRef<'_, f64>, gram: MatRef<'_, f64>, threads: Threads) -> Result<Mat<f64>, Error> {
    let xc = dense::product(x, gram, threads);
    let m = dense::symmetric_product(xc.as_ref(), x.transpose(), threads);
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
    threads: Threads,
) -> Result<(Mat<f64>, f64), Error> {
    let rest = q.subcols(determined, q.ncols() - determined);
    let values = &spectrum[determined..];
    let damping = DAMPING * dense::trace(gram) / gram.nrows() as f64;
    let damping = if damping > 0.0 { damping } else { 1.0 };

    let y = dense::product(rest.transpose(), x, threads);
    let mut damped = dense::symmetric_product(y.as_ref(), y.transpose(), threads) * faer::Scale(damping);
    for (i, value) in values.iter().enumerate() {
        damped[(i, i)] += value;
    }
    dense::expect_no_overflow(damped.as_ref(), "the damped moment of the outputs")?;
    let (_, z) = eigen::leading(damped, &|values| values.len(), threads)?;

    let extra = rank - determined;
    let mut u = Mat::zeros(q.nrows(), rank);
    u.as_mut().subcols_mut(0, determined).copy_from(q.subcols(0, determined));
    u.as_mut().subcols_mut(determined, extra).copy_from(dense::product(
        rest,
        z.as_ref().subcols(0, extra),
        threads,
    ));
    let lost = z.as_ref().subcols(extra, z.ncols() - extra);
    let loss = lost.col_iter().map(|z| z.iter().zip(values).map(|(z, x)| z * z * x).sum::<f64>()).sum();
    Ok((u, loss))
}
