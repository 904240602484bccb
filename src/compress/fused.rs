//! The routed experts of a layer in the stock layout of families that publish them together.

use crate::architecture::{ExpertStorage, Names, Projection};
use crate::backend::{Expert, Matrix, StoredExpert};
use crate::checkpoint::{Dtype, Tensor, Weight, encode_f32};
use crate::model::MoeSource;

/// The tensors of `moe`, whose experts are all dense and came from [`MoeSource::fused`]: rows of those tensors as they
/// are, or where a matrix was replaced, put together anew.
pub(super) fn tensors(names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
    let rows = |stored: &Tensor| {
        let all = stored.shape()[0] == moe.numbers.len();
        if all { stored.clone() } else { stored.select_rows(&moe.numbers) }
    };
    let both = &[Projection::Gate, Projection::Up][..];
    let all: &'static [Projection] = &Projection::ALL;
    let stacked = names.storage == ExpertStorage::Stacked;
    let one = |stem: &str| all.chunks_exact(1).find(|p| names.stacked(l, p[0]) == stem);
    let projections = |stem: &str| match [false, true].map(|down| names.fused(l, down)) {
        [gate_up, _] if gate_up.iter().any(|name| name == stem) => Some(both),
        [_, down] if down.iter().any(|name| name == stem) => Some(&[Projection::Down][..]),
        _ => None,
    };
    let projections = |stem: &str| if stacked { one(stem) } else { projections(stem) };
    let replaced = |name: &str| match name.strip_suffix("_bias") {
        Some(stem) => assemble_biases(names, moe, projections(stem)?, name),
        None => assemble(names, moe, projections(name)?, name),
    };
    let tensors = moe.fused.iter().map(|stored| replaced(stored.name()).unwrap_or_else(|| rows(stored)));
    tensors.map(|tensor| if stacked { tensor.joined_rows() } else { tensor }).collect()
}

/// All experts' matrices of the listed projections, `[experts, in, out of all]` or the other way round, as they were
/// stored; `None` where all are what was stored.
fn assemble(names: &Names, moe: &MoeSource, projections: &[Projection], name: &str) -> Option<Tensor> {
    let matrices = |expert: &StoredExpert| -> Vec<Weight> {
        let Expert::Mlp(mlp) = expert else { return Vec::new() };
        let maps = projections.iter().filter_map(|p| mlp.map(*p));
        maps.filter_map(|m| if let Matrix::Dense(w) = &m.weight { Some(w.clone()) } else { None }).collect()
    };
    let experts: Vec<Vec<Weight>> = moe.experts.iter().map(matrices).collect();
    if experts.iter().flatten().all(|weight| is_stored(moe, weight)) {
        return None;
    }
    let first = experts.first()?.first()?;
    let (out, input) = (first.rows(), first.cols());
    // Merged experts may be stored in a wider type than the others: the tensor takes the widest.
    let types = experts.iter().flatten().map(Weight::replacement_dtype);
    let dtype = types.max_by_key(Dtype::bitsize).unwrap_or(first.replacement_dtype());
    let parts = projections.len();
    let width = out * parts;
    let output_major = moe.fused_output_major
        || names.storage == ExpertStorage::Stacked && !projections.contains(&Projection::Down);
    let (mut bytes, mut values) = (Vec::new(), vec![0.0; width * input]);
    for weights in &experts {
        for (part, weight) in weights.iter().enumerate() {
            for (r, row) in weight.to_f32().chunks_exact(input).enumerate() {
                let column = column(names, parts, out, part, r);
                if output_major {
                    values[column * input..][..input].copy_from_slice(row);
                } else {
                    row.iter().enumerate().for_each(|(c, value)| values[c * width + column] = *value);
                }
            }
        }
        bytes.extend(encode_f32(dtype, &values));
    }
    let [rows, cols] = if output_major { [width, input] } else { [input, width] };
    Some(Tensor::owned(name, dtype, vec![experts.len(), rows, cols], bytes))
}

/// All experts' biases of the listed projections, `[experts, out of all]`; `None` where all are as they were stored,
/// which they are where the matrices are.
fn assemble_biases(names: &Names, moe: &MoeSource, projections: &[Projection], name: &str) -> Option<Tensor> {
    if moe.experts.iter().flat_map(StoredExpert::weights).all(|weight| is_stored(moe, weight)) {
        return None;
    }
    let parts = projections.len();
    let (mut bytes, mut dtype, mut width) = (Vec::new(), None, 0);
    for expert in &moe.experts {
        let Expert::Mlp(mlp) = expert else { return None };
        let biases = projections.iter().map(|p| mlp.map(*p)?.bias.as_ref());
        let biases = biases.collect::<Option<Vec<_>>>()?;
        let out = biases[0].len();
        width = out * parts;
        let mut values = vec![0.0; width];
        for (part, bias) in biases.iter().enumerate() {
            for (r, value) in bias.to_f32().ok()?.into_iter().enumerate() {
                values[column(names, parts, out, part, r)] = value;
            }
        }
        let dtype = *dtype.get_or_insert(biases[0].dtype());
        bytes.extend(encode_f32(dtype, &values));
    }
    Some(Tensor::owned(name, dtype?, vec![moe.experts.len(), width], bytes))
}

/// Whether a matrix is part of the tensors that `moe` was stored in.
fn is_stored(moe: &MoeSource, weight: &Weight) -> bool {
    moe.fused.iter().any(|stored| weight.is_part_of(stored))
}

/// Where output `r` of projection number `part`, one of `parts` with `out` outputs each, stands among all of them.
fn column(names: &Names, parts: usize, out: usize, part: usize, r: usize) -> usize {
    let interleaved = names.storage == ExpertStorage::Fused { interleaved: true };
    if interleaved { r * parts + part } else { part * out + r }
}
