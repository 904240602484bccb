//! The symmetric eigenproblem.

use faer::Mat;

use super::dense::Real;
use super::tridiagonal::Tridiagonal;
use super::{Error, Matrix, Threads, dense, divide};

/// Eigenvalues and eigenvectors of a symmetric matrix: `a = vectors * diag(values) * vectorsᵀ`.
#[derive(Clone, Debug, PartialEq)]
pub struct Eigen {
    /// The n eigenvalues, descending.
    pub values: Vec<f64>,
    /// The n orthonormal eigenvectors, `[n, n]`, column i for `values[i]`. The entry of largest magnitude of every
    /// column is positive (the first of them on ties).
    pub vectors: Matrix,
}

/// All eigenvalues and eigenvectors of the symmetric matrix `a` (`[n, n]`; only its lower triangle is read).
///
/// Errors of the values are of the order of the machine epsilon times the largest of them, whatever their own size.
///
/// # Errors
/// [`Error::Shape`] if `a` is not square, [`Error::NonFinite`], [`Error::NoConvergence`].
pub fn symmetric_eigen(a: &Matrix) -> Result<Eigen, Error> {
    a.expect_shape("the symmetric matrix", (a.rows(), a.rows()))?;
    a.expect_finite("the symmetric matrix")?;
    let (values, vectors) = leading(a.view().to_owned(), &|values| values.len(), Threads::All)?;
    Ok(Eigen { values, vectors: Matrix::from_view(vectors.as_ref()) })
}

const WHAT: &str = "the symmetric eigendecomposition";

/// All eigenvalues, descending, and the eigenvectors of the first of them, as many as `wanted` says when it is given all
/// values: orthonormal, with fixed signs. `a` is finite and square, and only its lower triangle is read.
pub(super) fn leading<T: Real>(
    a: Mat<T>,
    wanted: &(dyn Fn(&[f64]) -> usize + Sync),
    threads: Threads,
) -> Result<(Vec<f64>, Mat<T>), Error> {
    let n = a.nrows();
    let reduced = Tridiagonal::reduce(a, threads);
    let mut vectors = Mat::zeros(n, n);
    let values = solve(&reduced, Some(&mut vectors), wanted, threads)?;
    let count = wanted(&values);
    let vectors = vectors.as_ref().reverse_cols().subcols(0, count).to_owned();
    let mut vectors = reduced.take_back(vectors, threads);
    dense::fix_signs(&mut vectors);
    Ok((values, vectors))
}

/// The eigenvalues alone, descending; `a` is as in [`leading`].
pub(super) fn values(a: Mat<f64>, threads: Threads) -> Result<Vec<f64>, Error> {
    solve(&Tridiagonal::reduce(a, threads), None, &|_| 0, threads)
}

fn solve<T: Real>(
    reduced: &Tridiagonal<T>,
    vectors: Option<&mut Mat<T>>,
    wanted: &(dyn Fn(&[f64]) -> usize + Sync),
    threads: Threads,
) -> Result<Vec<f64>, Error> {
    let failed = Error::NoConvergence { what: WHAT };
    let vectors = vectors.map(Mat::as_mut);
    let reversed = |values: &[f64]| values.iter().rev().copied().collect::<Vec<_>>();
    let wanted = |values: &[f64]| wanted(&reversed(values));
    let solved = divide::solve(&reduced.diagonal, &reduced.below, vectors, &wanted, threads);
    let values = reversed(&solved.ok_or(failed.clone())?);
    if values.iter().all(|x| x.is_finite()) { Ok(values) } else { Err(failed) }
}
