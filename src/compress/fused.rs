//! The routed experts of a layer in the stock layout of families that publish them together.

use crate::architecture::{ExpertStorage, Names, Projection};
use crate::backend::{Expert, Matrix, StoredExpert};
use crate::checkpoint::{Tensor, Weight, encode_f32};
use crate::model::MoeSource;

/// The tensors of `moe`, whose experts are all dense and came from [`MoeSource::fused`]: rows of those tensors as they
/// are, or where a matrix was replaced, put together anew.
pub(super) fn tensors(names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
    let rows = |stored: &Tensor| {
        let all = stored.shape()[0] == moe.numbers.len();
        if all { stored.clone() } else { stored.select_rows(&moe.numbers) }
    };
    let [gate_up, down] = [false, true].map(|down| names.fused(l, down)[0].clone());
    let replaced = |name: &str| match name {
        _ if name == gate_up => assemble(names, moe, &[Projection::Gate, Projection::Up], name),
        _ if name == down => assemble(names, moe, &[Projection::Down], name),
        _ => None,
    };
    moe.fused.iter().map(|stored| replaced(stored.name()).unwrap_or_else(|| rows(stored))).collect()
}

/// All experts' matrices of the listed projections, `[experts, in, out of all]`; `None` where all are as they were
/// stored.
fn assemble(names: &Names, moe: &MoeSource, projections: &[Projection], name: &str) -> Option<Tensor> {
    let matrices = |expert: &StoredExpert| -> Vec<Weight> {
        let Expert::Mlp(mlp) = expert else { return Vec::new() };
        let maps = projections.iter().map(|p| mlp.maps()[*p as usize]);
        maps.filter_map(|m| if let Matrix::Dense(w) = &m.weight { Some(w.clone()) } else { None }).collect()
    };
    let experts: Vec<Vec<Weight>> = moe.experts.iter().map(matrices).collect();
    if experts.iter().flatten().all(Weight::is_view) {
        return None;
    }
    let interleaved = names.storage == ExpertStorage::Fused { interleaved: true };
    let first = experts.first()?.first()?;
    let (out, input, dtype) = (first.rows(), first.cols(), first.replacement_dtype());
    let parts = projections.len();
    let width = out * parts;
    let mut bytes = Vec::new();
    let mut values = vec![0.0; width * input];
    for weights in &experts {
        for (part, weight) in weights.iter().enumerate() {
            for (r, row) in weight.to_f32().chunks_exact(input).enumerate() {
                let column = if interleaved { r * parts + part } else { part * out + r };
                row.iter().enumerate().for_each(|(c, value)| values[c * width + column] = *value);
            }
        }
        bytes.extend(encode_f32(dtype, &values));
    }
    Some(Tensor::owned(name, dtype, vec![experts.len(), input, width], bytes))
}
