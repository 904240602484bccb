//! One weight matrix into two thin ones.

use crate::backend::Matrix as Form;
use crate::checkpoint::{Dtype, Tensor, Weight};
use crate::linalg::{self, Matrix, Threads, low_rank, refit_left_on, refit_right_on};

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
    /// Type of the matrices of merged experts; `None` for that of their targets, or bf16 where those are packed.
    pub merge_dtype: Option<Dtype>,
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
    let (rows, cols) = (weight.rows(), weight.cols());
    let w = Matrix::from_f32(rows, cols, &weight.to_f32())?;
    let gram = match whitening {
        Whitening::None => None,
        Whitening::Gram(values) => Some(Matrix::new(cols, cols, values.to_vec())?),
    };
    let mut factors = low_rank(&w, gram.as_ref(), rank, threads)?;
    let stem = weight.name().strip_suffix(".weight").unwrap_or(weight.name());
    if options.densify {
        let product = factors.u.matmul(&factors.v)?;
        return Ok(Form::Dense(stored(weight.name(), weight.replacement_dtype(), &product)));
    }
    let dtype = options.dtype.unwrap_or(weight.replacement_dtype());
    let store = |suffix: &str, m: &Matrix| stored(&format!("{stem}.{suffix}"), dtype, m);
    // Without a Gram matrix the orthonormal factor is on the short side; with one it is always U.
    let orthonormal_left = gram.is_some() || rows <= cols;
    if orthonormal_left {
        let u = store("u", &factors.u);
        if dtype != Dtype::F32 {
            factors.v = refit_right_on(&Matrix::from_f32(rows, rank, &u.to_f32())?, &w, threads)?;
        }
        Ok(Form::LowRank { u, v: store("v", &factors.v) })
    } else {
        let v = store("v", &factors.v);
        if dtype != Dtype::F32 {
            factors.u = refit_left_on(&w, &Matrix::from_f32(rank, cols, &v.to_f32())?, None, threads)?;
        }
        Ok(Form::LowRank { u: store("u", &factors.u), v })
    }
}

fn stored(name: &str, dtype: Dtype, m: &Matrix) -> Weight {
    let tensor = Tensor::from_f32(name, dtype, vec![m.rows(), m.cols()], &m.to_f32());
    Weight::plain(tensor).unwrap_or_else(|_| unreachable!("a matrix of plain numbers"))
}
