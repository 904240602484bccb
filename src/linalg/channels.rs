//! Hidden channels of an expert: how much each one matters, and what down matrix goes best with those that are kept.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::{Mat, MatRef, Par, Spec};

use super::{Error, Matrix, Threads, dense};

/// How the down matrix is put together again after channels went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refit {
    /// Not at all: its kept columns as they are.
    #[default]
    Plain,
    /// The least-squares optimum W H\[:,S\] (H\[S,S\] + δ I)⁻¹, δ = 1e-6 of the mean of the diagonal: the Nyström
    /// approximation (MoDeGPT, arXiv 2408.09632).
    LeastSquares,
    /// The kept columns plus what the others leave to them, W\[:,P\] H\[P,S\] (H\[S,S\] + δ I)⁻¹ with δ = 1e-2 of the mean
    /// of the diagonal: damped towards [`Refit::Plain`] instead of towards 0.
    Anchored,
}

/// Ridge leverage scores of the channels: the diagonal of (C + λ I)⁻¹ C for the second moment C `[p, p]` of the hidden
/// vectors. All 0 where λ and C are.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`], [`Error::NotSemidefinite`].
pub fn ridge_leverage(c: &Matrix, lambda: f64) -> Result<Vec<f64>, Error> {
    c.expect_shape(GRAM, (c.rows(), c.rows()))?;
    c.expect_finite(GRAM)?;
    let n = c.rows();
    if dense::trace(c.view()) <= 0.0 {
        return Ok(vec![0.0; n]);
    }
    let mut solution = c.view().to_owned();
    solve_damped(c.view().to_owned(), lambda, &mut solution)?;
    Ok((0..n).map(|i| solution[(i, i)]).collect())
}

/// The down matrix `[out, kept]` for the channels `keep` (ascending) of `w` `[out, p]`. `gram` is the second moment H
/// `[p, p]` of the hidden vectors, weighted with g² so that the error of the layer's output is what counts. Where H is 0
/// on the kept channels, the kept columns stay as they are.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`], [`Error::NotSemidefinite`], [`Error::Overflow`].
pub fn refit_columns(
    w: &Matrix,
    gram: Option<&Matrix>,
    keep: &[usize],
    refit: Refit,
) -> Result<Matrix, Error> {
    let plain = Mat::from_fn(w.rows(), keep.len(), |i, j| w.view()[(i, keep[j])]);
    let (Some(h), Refit::LeastSquares | Refit::Anchored) = (gram, refit) else {
        return Ok(Matrix::from_view(plain.as_ref()));
    };
    h.expect_shape(GRAM, (w.cols(), w.cols()))?;
    h.expect_finite(GRAM)?;
    w.expect_finite("the weight")?;
    let h = h.view();
    let kept = Mat::from_fn(keep.len(), keep.len(), |i, j| h[(keep[i], keep[j])]);
    let mean = dense::trace(kept.as_ref()) / keep.len().max(1) as f64;
    if mean <= 0.0 {
        return Ok(Matrix::from_view(plain.as_ref()));
    }
    let (from, damping): (Vec<usize>, f64) = match refit {
        Refit::Anchored => ((0..w.cols()).filter(|c| keep.binary_search(c).is_err()).collect(), 1e-2),
        _ => ((0..w.cols()).collect(), 1e-6),
    };
    let columns = Mat::from_fn(w.rows(), from.len(), |i, j| w.view()[(i, from[j])]);
    let across = Mat::from_fn(from.len(), keep.len(), |i, j| h[(from[i], keep[j])]);
    let mut solution = dense::product(columns.as_ref(), across.as_ref(), Threads::One).transpose().to_owned();
    solve_damped(kept, damping * mean, &mut solution)?;
    let mut fitted = solution.transpose().to_owned();
    if refit == Refit::Anchored {
        fitted += plain;
    }
    dense::expect_no_overflow(fitted.as_ref(), "the refitted down matrix")?;
    Ok(Matrix::from_view(fitted.as_ref()))
}

/// The matrix B with the least Σ_e tr((W_e − B) C_e (W_e − B)ᵀ): (Σ W_e C_e) (Σ C_e + δ I)⁻¹ with δ = 1e-6 of the mean of the
/// diagonal, from the two sums. `None` where Σ C_e is 0.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`], [`Error::NotSemidefinite`], [`Error::Overflow`].
pub fn regression_base(products: &Matrix, grams: &Matrix) -> Result<Option<Matrix>, Error> {
    grams.expect_shape(GRAM, (products.cols(), products.cols()))?;
    grams.expect_finite(GRAM)?;
    let mean = dense::trace(grams.view()) / grams.rows().max(1) as f64;
    if mean <= 0.0 {
        return Ok(None);
    }
    let mut solution = products.view().transpose().to_owned();
    solve_damped(grams.view().to_owned(), 1e-6 * mean, &mut solution)?;
    let base = solution.transpose().to_owned();
    dense::expect_no_overflow(base.as_ref(), "the base of a layer")?;
    Ok(Some(Matrix::from_view(base.as_ref())))
}

const GRAM: &str = "the second moment of the hidden vectors";

/// `x` = (a + damping I)⁻¹ `x` by Cholesky.
fn solve_damped(mut a: Mat<f64>, damping: f64, x: &mut Mat<f64>) -> Result<(), Error> {
    let n = a.nrows();
    for i in 0..n {
        a[(i, i)] += damping;
    }
    let scratch = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Spec::default());
    llt::factor::cholesky_in_place(
        a.as_mut(),
        llt::factor::LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .map_err(|_| Error::NotSemidefinite { what: GRAM })?;
    let factor: MatRef<'_, f64> = a.as_ref();
    llt::solve::solve_in_place(factor, x.as_mut(), Par::Seq, MemStack::new(&mut []));
    Ok(())
}
