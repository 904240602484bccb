//! The symmetric eigenproblem.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par, Spec};

use super::{Error, Matrix, dense};

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
    let (values, vectors) = decompose(a.view())?;
    Ok(Eigen { values, vectors: Matrix::from_view(vectors.as_ref()) })
}

const WHAT: &str = "the symmetric eigendecomposition";

/// [`symmetric_eigen`] on views; `a` is finite and square.
pub(super) fn decompose(a: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>), Error> {
    let n = a.nrows();
    let mut vectors = Mat::zeros(n, n);
    let mut values = solve(a, Some(&mut vectors))?;
    // The solver sorts ascending.
    values.reverse();
    let mut vectors = vectors.as_ref().reverse_cols().to_owned();
    dense::fix_signs(&mut vectors);
    Ok((values, vectors))
}

/// The eigenvalues alone, descending, at about half the cost; `a` is finite and square.
pub(super) fn values(a: MatRef<'_, f64>) -> Result<Vec<f64>, Error> {
    let mut values = solve(a, None)?;
    values.reverse();
    Ok(values)
}

fn solve(a: MatRef<'_, f64>, vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>, Error> {
    let n = a.nrows();
    // The solver's workspace arithmetic does not foresee an empty matrix.
    if n <= 1 {
        if let Some(v) = vectors {
            v.fill(1.0);
        }
        return Ok((0..n).map(|i| a[(i, i)]).collect());
    }
    let wanted = if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
    let scratch = self_adjoint_evd_scratch::<f64>(n, wanted, Par::Seq, Spec::default());
    let mut values = Diag::zeros(n);
    self_adjoint_evd(
        a,
        values.as_mut(),
        vectors.map(Mat::as_mut),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .map_err(|_| Error::NoConvergence { what: WHAT })?;
    let values: Vec<f64> = values.column_vector().iter().copied().collect();
    if values.iter().all(|x| x.is_finite()) { Ok(values) } else { Err(Error::NoConvergence { what: WHAT }) }
}
