//! One factor given the other: after one of them was rounded to its stored type (or changed in any other way), the
//! other can make up for most of the error, by least squares.

use faer::dyn_stack::MemStack;
use faer::linalg::cholesky::llt;
use faer::{Mat, MatRef, Par};

use super::threads::part;
use super::{Error, Matrix, Threads, dense};

/// A direction with less than this share of the largest diagonal entry is left alone: what is known of it is rounding.
const NEGLIGIBLE: f64 = 1e-13;

/// Added to the unit diagonal of the scaled normal equations, so that dependent columns do no harm.
const RIDGE: f64 = 1e-10;

/// Right-hand sides that are solved together.
const COLUMNS: usize = 256;

/// The right factor `[r, in]` that goes best with the left factor `u` (`[out, r]`): argmin over V of `||W - U V||_F`.
///
/// It is `(UᵀU)⁻¹ Uᵀ W` by Cholesky, where columns of `u` that are zero or depend on others are allowed. The same V is
/// best on any inputs too: with any second moment C, V = U⁺ W minimises tr((W - U V) C (W - U V)ᵀ).
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Shape`] if `u` and `w` differ in rows, [`Error::Overflow`].
pub fn refit_right(u: &Matrix, w: &Matrix) -> Result<Matrix, Error> {
    refit_right_on(u, w, Threads::One)
}

/// [`refit_right`] on several threads.
pub(crate) fn refit_right_on(u: &Matrix, w: &Matrix, threads: Threads) -> Result<Matrix, Error> {
    u.expect_shape("the left factor", (w.rows(), u.cols()))?;
    u.expect_finite("the left factor")?;
    w.expect_finite("the weight")?;
    Ok(Matrix::from_view(least_squares(u.view(), w.view(), threads)?.as_ref()))
}

/// The left factor `[out, r]` that goes best with the right factor `v` (`[r, in]`): argmin over U of `||W - U V||_F`, or
/// with `gram` (the second moment C of the inputs, `[in, in]`) of tr((W - U V) C (W - U V)ᵀ).
///
/// With C it is the plain solution U₀ plus the correction (W - U₀ V) C Vᵀ (V C Vᵀ)⁻¹. Where C determines nothing (few
/// or no tokens) the correction is zero and U₀ stays; the data loss is never above that of U₀.
///
/// # Errors
/// [`Error::NonFinite`], [`Error::Shape`] if the shapes do not fit, [`Error::NotSemidefinite`] if `gram` is no second
/// moment, [`Error::Overflow`].
pub fn refit_left(w: &Matrix, v: &Matrix, gram: Option<&Matrix>) -> Result<Matrix, Error> {
    refit_left_on(w, v, gram, Threads::One)
}

/// [`refit_left`] on several threads.
pub(crate) fn refit_left_on(
    w: &Matrix,
    v: &Matrix,
    gram: Option<&Matrix>,
    threads: Threads,
) -> Result<Matrix, Error> {
    v.expect_shape("the right factor", (v.rows(), w.cols()))?;
    v.expect_finite("the right factor")?;
    w.expect_finite("the weight")?;
    let plain = least_squares(v.view().transpose(), w.view().transpose(), threads)?;
    let Some(c) = gram else {
        return Ok(Matrix::from_view(plain.transpose()));
    };
    c.expect_shape("the second moment of the inputs", (w.cols(), w.cols()))?;
    c.expect_finite("the second moment of the inputs")?;
    let vc = dense::product(v.view(), c.view(), threads);
    let normal = dense::symmetric_product(vc.as_ref(), v.view().transpose(), threads);
    let error = w.view() - dense::product(plain.transpose(), v.view(), threads);
    let rhs = dense::product(vc.as_ref(), error.transpose(), threads);
    let correction = solve(normal.as_ref(), rhs.as_ref(), threads)?;
    Ok(Matrix::from_view((plain + correction).transpose()))
}

/// argmin over X of `||b - a x||_F`.
fn least_squares(a: MatRef<'_, f64>, b: MatRef<'_, f64>, threads: Threads) -> Result<Mat<f64>, Error> {
    let normal = dense::symmetric_product(a.transpose(), a, threads);
    let rhs = dense::product(a.transpose(), b, threads);
    solve(normal.as_ref(), rhs.as_ref(), threads)
}

/// `a x = b` for a semidefinite `a`. The equations are scaled to a unit diagonal, because the columns of a factor may
/// be of very different size (singular values) and yet almost orthogonal; then one step of iterative refinement takes
/// out what the ridge put in.
pub(crate) fn solve(a: MatRef<'_, f64>, b: MatRef<'_, f64>, threads: Threads) -> Result<Mat<f64>, Error> {
    let n = a.nrows();
    let what = "the normal equations of a factor";
    dense::expect_no_overflow(a, what)?;
    dense::expect_no_overflow(b, what)?;
    if n == 0 || b.ncols() == 0 {
        return Ok(Mat::zeros(n, b.ncols()));
    }
    let largest = (0..n).map(|i| a[(i, i)]).fold(0.0, f64::max);
    let scale: Vec<f64> = (0..n)
        .map(|i| if a[(i, i)] > NEGLIGIBLE * largest { a[(i, i)].sqrt().recip() } else { 0.0 })
        .collect();
    let scaled = Mat::from_fn(n, n, |i, j| a[(i, j)] * scale[i] * scale[j]);
    let target = Mat::from_fn(n, b.ncols(), |i, j| b[(i, j)] * scale[i]);
    let mut factor = scaled.clone();
    for i in 0..n {
        // A direction that is left alone has an empty row and column; any pivot gives it the solution 0.
        factor[(i, i)] = if scale[i] == 0.0 { 1.0 } else { factor[(i, i)] + RIDGE };
    }
    if !dense::cholesky(factor.as_mut()) {
        return Err(Error::NotSemidefinite { what });
    }
    let solve_into = |rhs: &mut Mat<f64>| {
        let width = part(rhs.ncols(), COLUMNS);
        threads.each(rhs.par_col_chunks_mut(width), |rhs| {
            llt::solve::solve_in_place(factor.as_ref(), rhs, Par::Seq, MemStack::new(&mut []));
        });
    };
    let mut x = target.clone();
    solve_into(&mut x);
    let mut rest = target - dense::product(scaled.as_ref(), x.as_ref(), threads);
    solve_into(&mut rest);
    x += rest;
    for col in x.col_iter_mut() {
        for (x, s) in col.iter_mut().zip(&scale) {
            *x *= s;
        }
    }
    dense::expect_no_overflow(x.as_ref(), what)?;
    Ok(x)
}
