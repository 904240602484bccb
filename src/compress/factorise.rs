//! One weight matrix into two thin ones.

use crate::backend::Matrix as Form;
use crate::checkpoint::{Dtype, Tensor, Weight};
use crate::linalg::{self, LowRank, Matrix, Threads, low_rank, refit_left_on, refit_right_on};
use crate::plan::largest;

/// How experts are merged, and how factors are stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct FactorOptions {
    /// Type of U and V; `None` for that of the matrix, or bf16 where it is packed.
    pub dtype: Option<Dtype>,
    /// Whether to multiply the factors back into a matrix of the original shape.
    pub densify: bool,
    /// Whether experts are factorised in the basis of their inputs.
    pub whiten: bool,
    /// Whether the hidden neurons of experts are aligned before they are merged.
    pub align: bool,
    /// By what.
    pub align_by: AlignBy,
    /// Type of the matrices of merged experts; `None` for that of their targets, or bf16 where those are packed.
    pub merge_dtype: Option<Dtype>,
}

/// By what the hidden neurons of experts are aligned before they are merged, see [`Matching`](super::Matching).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AlignBy {
    /// Their weights.
    #[default]
    Weights,
    /// Their activations on the layer's inputs.
    Activations,
    /// The two together.
    Both,
}

/// The data that a factorisation has to be good on.
#[derive(Clone, Copy, Debug)]
pub enum Whitening<'a> {
    /// None: minimise ‖W − UV‖_F (Eckart and Young, 1936).
    None,
    /// Minimise Σ ‖(W − UV) x‖² over inputs with this Gram matrix Σ x xᵀ, `[in, in]` row-major (SVD-LLM, arXiv
    /// 2403.07378).
    Gram(&'a [f64]),
}

/// The rank-`rank` factors of `weight` `[out, in]`. Factors that are stored in fewer bits are refitted: once the
/// orthonormal one is rounded, the other is the least-squares optimum for the rounded one.
///
/// # Errors
/// What the decomposition says.
pub fn factorise(
    weight: &Weight,
    rank: usize,
    whitening: Whitening<'_>,
    options: FactorOptions,
) -> Result<Form<Weight>, linalg::Error> {
    factorise_on(weight, rank, whitening, options, Threads::All)
}

/// [`factorise`] on as many threads as there are or on one; the result is the same.
pub(super) fn factorise_on(
    weight: &Weight,
    rank: usize,
    whitening: Whitening<'_>,
    options: FactorOptions,
    threads: Threads,
) -> Result<Form<Weight>, linalg::Error> {
    let (w, gram) = problem(weight, whitening)?;
    let stem = stem(weight);
    if options.densify {
        let factors = low_rank(&w, gram.as_ref(), rank, threads)?;
        let product = factors.u.matmul(&factors.v)?;
        return Ok(Form::Dense(stored(weight.name(), weight.replacement_dtype(), &product)));
    }
    let dtype = options.dtype.unwrap_or(weight.replacement_dtype());
    let (u, v) = factors(&w, gram.as_ref(), rank, dtype, threads)?;
    let store = |suffix: &str, m: &Matrix| stored(&format!("{stem}.{suffix}"), dtype, m);
    Ok(Form::LowRank { u: store("u", &u), v: store("v", &v) })
}

/// [`factorise`] with `count` rows of `weight` kept as they are: those that the factors lose most at, on the data where
/// there is any. The factors are then those of the other rows (in place of the training that splits W in LoSparse,
/// arXiv 2306.11222). The result is the same on any `threads`.
///
/// # Errors
/// What the decomposition says.
pub fn factorise_with_rows(
    weight: &Weight,
    rank: usize,
    count: usize,
    whitening: Whitening<'_>,
    options: FactorOptions,
    threads: Threads,
) -> Result<Form<Weight>, linalg::Error> {
    let (w, gram) = problem(weight, whitening)?;
    let (out, input) = w.shape();
    let first = low_rank(&w, gram.as_ref(), rank, threads)?;
    let worst = worst_rows(&w, &first, gram.as_ref(), count)?;
    let others: Vec<usize> = (0..out).filter(|row| worst.binary_search(row).is_err()).collect();
    let rest = select_rows(&w, &others);
    // Fewer rows may not have the rank; what is missing is filled up with zeros.
    let rest_rank = rank.min(others.len());
    let dtype = options.dtype.unwrap_or(weight.replacement_dtype());
    let (u, v) = if options.densify {
        let LowRank { u, v, .. } = low_rank(&rest, gram.as_ref(), rest_rank, threads)?;
        (u, v)
    } else {
        factors(&rest, gram.as_ref(), rest_rank, dtype, threads)?
    };
    if options.densify {
        let product = u.matmul(&v)?;
        let mut whole = w;
        for (i, row) in others.iter().enumerate() {
            whole.as_mut_slice()[row * input..(row + 1) * input].copy_from_slice(product.row(i));
        }
        return Ok(Form::Dense(stored(weight.name(), weight.replacement_dtype(), &whole)));
    }
    let (mut full_u, mut full_v) = (Matrix::zeros(out, rank), Matrix::zeros(rank, input));
    for (i, row) in others.iter().enumerate() {
        full_u.as_mut_slice()[row * rank..row * rank + rest_rank].copy_from_slice(u.row(i));
    }
    full_v.as_mut_slice()[..rest_rank * input].copy_from_slice(v.as_slice());
    let stem = stem(weight);
    let store = |suffix: &str, m: &Matrix| stored(&format!("{stem}.{suffix}"), dtype, m);
    Ok(Form::LowRankRows {
        u: store("u", &full_u),
        v: store("v", &full_v),
        rows: worst.iter().map(|row| *row as u32).collect(),
        s: store("s", &select_rows(&w, &worst)),
    })
}

/// The `count` rows of W − U V that are largest (on the data), ascending; ties to the lower row.
fn worst_rows(
    w: &Matrix,
    factors: &LowRank,
    gram: Option<&Matrix>,
    count: usize,
) -> Result<Vec<usize>, linalg::Error> {
    let mut rest = w.clone();
    let product = factors.u.matmul(&factors.v)?;
    rest.as_mut_slice().iter_mut().zip(product.as_slice()).for_each(|(r, p)| *r -= p);
    let losses = |weighted: &Matrix| -> Vec<f64> {
        (0..w.rows()).map(|i| rest.row(i).iter().zip(weighted.row(i)).map(|(a, b)| a * b).sum()).collect()
    };
    let mut loss = losses(&rest);
    if let Some(gram) = gram {
        let on_data = losses(&rest.matmul(gram)?);
        // An expert that saw no token leaves the rows to their own size.
        if on_data.iter().any(|l| *l > 0.0) {
            loss = on_data;
        }
    }
    Ok(largest(&loss, count))
}

fn select_rows(m: &Matrix, rows: &[usize]) -> Matrix {
    let values = rows.iter().flat_map(|row| m.row(*row)).copied().collect();
    Matrix::new(rows.len(), m.cols(), values).unwrap_or_else(|_| unreachable!("whole rows"))
}

/// The matrix, and the second moment of its inputs where there is one.
fn problem(weight: &Weight, whitening: Whitening<'_>) -> Result<(Matrix, Option<Matrix>), linalg::Error> {
    let cols = weight.cols();
    let gram = match whitening {
        Whitening::None => None,
        Whitening::Gram(values) => Some(Matrix::new(cols, cols, values.to_vec())?),
    };
    Ok((Matrix::from_f32(weight.rows(), cols, &weight.to_f32())?, gram))
}

/// The factors to be stored as `dtype`: the orthonormal one is rounded to it, and the other fits that.
pub(super) fn factors(
    w: &Matrix,
    gram: Option<&Matrix>,
    rank: usize,
    dtype: Dtype,
    threads: Threads,
) -> Result<(Matrix, Matrix), linalg::Error> {
    let LowRank { mut u, mut v, .. } = low_rank(w, gram, rank, threads)?;
    if dtype == Dtype::F32 {
        return Ok((u, v));
    }
    // Without a Gram matrix the orthonormal factor is on the short side; with one it is always U.
    if gram.is_some() || w.rows() <= w.cols() {
        u = rounded(&u, dtype)?;
        v = refit_right_on(&u, w, threads)?;
    } else {
        v = rounded(&v, dtype)?;
        u = refit_left_on(w, &v, None, threads)?;
    }
    Ok((u, v))
}

fn rounded(m: &Matrix, dtype: Dtype) -> Result<Matrix, linalg::Error> {
    Matrix::from_f32(m.rows(), m.cols(), &stored("", dtype, m).to_f32())
}

/// The name of a weight without `.weight`.
pub(super) fn stem(weight: &Weight) -> &str {
    weight.name().strip_suffix(".weight").unwrap_or(weight.name())
}

/// A matrix of plain numbers as stored.
pub(super) fn stored(name: &str, dtype: Dtype, m: &Matrix) -> Weight {
    let tensor = Tensor::from_f32(name, dtype, vec![m.rows(), m.cols()], &m.to_f32());
    Weight::plain(tensor).unwrap_or_else(|_| unreachable!("a matrix of plain numbers"))
}
