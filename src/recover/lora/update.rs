//! Matrices and factors with the updates of an adapter added.

use std::collections::BTreeMap;

use super::LoraRank;
use super::resolve::{Part, Updates};
use crate::checkpoint::{Checkpoint, Tensor};
use crate::linalg::{Matrix, truncated_svd};
use crate::recover::adapter::Delta;
use crate::recover::{Error, Result};

/// The tensor with what belongs to it added. The ranks of factors that changed go into `ranks`, by stem.
pub(super) fn updated(
    tensor: &Tensor,
    checkpoint: &Checkpoint,
    updates: &Updates,
    rank: LoraRank,
    ranks: &mut BTreeMap<String, usize>,
) -> Result<Tensor> {
    let name = tensor.name();
    if let Some(parts) = updates.get(name) {
        return of_all_experts(tensor, parts);
    }
    let Some((stem, suffix)) = name.rsplit_once('.') else { return Ok(tensor.clone()) };
    let Some(parts) = updates.get(stem) else { return Ok(tensor.clone()) };
    match suffix {
        "weight" => {
            let mut sum = matrix(tensor)?;
            for part in parts {
                add(&mut sum, &part.delta)?;
            }
            Ok(like(tensor, sum.rows(), sum.cols(), &sum.to_f32()))
        }
        "u" | "v" => {
            let [u, v] = ["u", "v"].map(|s| checkpoint.tensor(&format!("{stem}.{s}")));
            let (u, v) = factors(&u?, &v?, parts, rank)?;
            ranks.insert(stem.into(), v.rows());
            let m = if suffix == "u" { u } else { v };
            Ok(like(tensor, m.rows(), m.cols(), &m.to_f32()))
        }
        _ => Ok(tensor.clone()),
    }
}

fn of_all_experts(tensor: &Tensor, parts: &[Part]) -> Result<Tensor> {
    check_plain(tensor)?;
    let mut values = tensor.to_f32()?;
    let [_, rows, cols] = *tensor.shape() else { return Ok(tensor.clone()) };
    for Part { delta, entry, transposed } in parts {
        let delta = if *transposed { delta.clone().transposed() } else { delta.clone() };
        if (delta.outputs, delta.inputs) != (rows, cols) {
            let what = format!(
                "holds matrices [{rows}, {cols}], the adapter updates [{}, {}]",
                delta.outputs, delta.inputs
            );
            return Err(Error::Adapter { path: tensor.name().into(), what });
        }
        let start = entry.unwrap_or(0) * rows * cols;
        let entry = &mut values[start..start + rows * cols];
        let mut sum = to_matrix(rows, cols, entry)?;
        add(&mut sum, &delta)?;
        entry.copy_from_slice(&sum.to_f32());
    }
    Ok(Tensor::from_f32(tensor.name(), tensor.dtype(), tensor.shape().to_vec(), &values))
}

/// U and V with the updates.
fn factors(u: &Tensor, v: &Tensor, parts: &[Part], rank: LoraRank) -> Result<(Matrix, Matrix)> {
    let (mut u, mut v) = (matrix(u)?, matrix(v)?);
    let before = v.rows();
    for Part { delta, .. } in parts {
        let columns =
            |r: usize| u.row(r).iter().copied().chain(wide(&delta.b[r * delta.rank..(r + 1) * delta.rank]));
        let wider = (0..u.rows()).flat_map(columns).collect();
        let longer = v.as_slice().iter().copied().chain(wide(&delta.a)).collect();
        u = new_matrix(u.rows(), u.cols() + delta.rank, wider)?;
        v = new_matrix(v.rows() + delta.rank, v.cols(), longer)?;
    }
    if rank == LoraRank::Enlarge {
        return Ok((u, v));
    }
    let product = u.matmul(&v).map_err(numbers)?;
    let truncated = truncated_svd(&product, before).map_err(numbers)?;
    Ok((truncated.u, truncated.v))
}

fn wide(values: &[f32]) -> impl Iterator<Item = f64> {
    values.iter().map(|v| f64::from(*v))
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn numbers(error: crate::linalg::Error) -> Error {
    Error::Request(error.to_string())
}

fn new_matrix(rows: usize, cols: usize, values: Vec<f64>) -> Result<Matrix> {
    Matrix::new(rows, cols, values).map_err(numbers)
}

fn to_matrix(rows: usize, cols: usize, values: &[f32]) -> Result<Matrix> {
    Matrix::from_f32(rows, cols, values).map_err(numbers)
}

fn matrix(tensor: &Tensor) -> Result<Matrix> {
    check_plain(tensor)?;
    to_matrix(tensor.shape()[0], tensor.shape()[1], &tensor.to_f32()?)
}

fn check_plain(tensor: &Tensor) -> Result<()> {
    tensor.check_float().map_err(|_| {
        let what = "is packed; an adapter can be merged into f32, f16 or bf16 numbers only".into();
        Error::Adapter { path: tensor.name().into(), what }
    })
}

/// sum += B A.
fn add(sum: &mut Matrix, delta: &Delta) -> Result<()> {
    let (b, a) =
        (to_matrix(delta.outputs, delta.rank, &delta.b)?, to_matrix(delta.rank, delta.inputs, &delta.a)?);
    let product = b.matmul(&a).map_err(numbers)?;
    sum.as_mut_slice().iter_mut().zip(product.as_slice()).for_each(|(s, p)| *s += p);
    Ok(())
}

fn like(tensor: &Tensor, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    Tensor::from_f32(tensor.name(), tensor.dtype(), vec![rows, cols], values)
}
