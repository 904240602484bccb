//! The tensors of the MoE checkpoint.

use rand_chacha::rand_core::Rng;
use rayon::prelude::*;

use super::dense::{ATTENTION, Dense, MLP};
use super::{Options, Result, RouterStart, Target};
use crate::checkpoint::{Tensor, decode_f32, encode_f64};
use crate::random::generator;

/// Values that are averaged at a time.
const PIECE: usize = 1 << 16;

/// The tensors outside all layers: means, rounded once.
pub(super) fn outside_layers(dense: &Dense) -> Result<Vec<Tensor>> {
    dense.outside().into_iter().map(|name| mean_of(dense, name.into())).collect()
}

/// The tensors of layer `l`.
pub(super) fn layer(dense: &Dense, l: usize, options: &Options) -> Result<Vec<Tensor>> {
    let name = |parameter: &str| Dense::in_layer(l, parameter);
    let mut tensors = Vec::new();
    for norm in dense.config.family.norms() {
        tensors.push(mean_of(dense, name(norm))?);
    }
    let (moe, projections) = match options.target {
        Target::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        Target::Bam => ("mlp", MLP),
    };
    for (map, projection) in MLP.into_iter().zip(projections) {
        for (e, tensor) in dense.each(&name(&format!("mlp.{map}")))?.into_iter().enumerate() {
            tensors.push(tensor.renamed(name(&format!("{moe}.experts.{e}.{projection}"))));
        }
    }
    tensors.push(router(dense, l, 0, name(&format!("{moe}.gate")), options)?);
    for map in ATTENTION {
        let name = name(&format!("self_attn.{map}"));
        let is_mean = options.target == Target::Mixtral
            || options.shared_key_values && ["k_proj", "v_proj"].contains(&map);
        tensors.push(if is_mean { mean_of(dense, name)? } else { side_by_side(dense, map, name, options)? });
    }
    if options.target == Target::Bam {
        tensors.push(router(dense, l, 1, name("self_attn.router"), options)?);
    }
    Ok(tensors)
}

/// The mean of tensor `name` over all checkpoints, summed in f64 and rounded once.
fn mean_of(dense: &Dense, name: String) -> Result<Tensor> {
    let tensors = dense.each(&name)?;
    let (dtype, shape) = (tensors[0].dtype(), tensors[0].shape().to_vec());
    let size = dtype.bitsize() / 8;
    let mut bytes = vec![0; tensors[0].bytes().len()];
    bytes.par_chunks_mut(PIECE * size).enumerate().for_each(|(i, out)| {
        let count = out.len() / size;
        let (mut values, mut sums) = (vec![0.0; count], vec![0.0; count]);
        for tensor in &tensors {
            decode_f32(dtype, &tensor.bytes()[i * PIECE * size..][..out.len()], &mut values);
            sums.iter_mut().zip(&values).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        for sum in &mut sums {
            *sum /= tensors.len() as f64;
        }
        out.copy_from_slice(&encode_f64(dtype, &sums));
    });
    tensors.iter().for_each(Tensor::release);
    Ok(Tensor::owned(name, dtype, shape, bytes))
}

/// A linear map of all attention experts as that of one attention with the heads of all. Heads that share keys and values
/// follow each other: without `shared_key_values` all of an expert's, else the experts' in turn for each pair of a key and
/// a value head.
fn side_by_side(dense: &Dense, map: &str, name: String, options: &Options) -> Result<Tensor> {
    let tensors = dense.each(&name)?;
    let parts = if options.shared_key_values { dense.config.size("num_key_value_heads") } else { 1 };
    let dtype = tensors[0].dtype();
    let mut shape = tensors[0].shape().to_vec();
    // Heads are rows of q, k and v, and columns of o.
    let (lines, line) = if map == "o_proj" { (shape[0], shape[1]) } else { (1, shape[0] * shape[1]) };
    let each = line / parts * dtype.bitsize() / 8;
    let mut bytes = Vec::with_capacity(tensors.len() * tensors[0].bytes().len());
    for i in 0..lines {
        for part in 0..parts {
            for tensor in &tensors {
                bytes.extend_from_slice(&tensor.bytes()[(i * parts + part) * each..][..each]);
            }
        }
    }
    tensors.iter().for_each(Tensor::release);
    shape[usize::from(map == "o_proj")] *= tensors.len();
    Ok(Tensor::owned(name, dtype, shape, bytes))
}

/// A new router `[experts, hidden]` in the type of the MLPs: zeros, or normally distributed with the standard
/// deviation of the config.
fn router(dense: &Dense, l: usize, which: u64, name: String, options: &Options) -> Result<Tensor> {
    let like = dense.checkpoints[0].tensor(&Dense::in_layer(l, "mlp.gate_proj"))?;
    let shape = vec![dense.checkpoints.len(), dense.config.size("hidden_size")];
    let count = shape.iter().product();
    let values = match options.router {
        RouterStart::Zero => vec![0.0; count],
        RouterStart::Random => {
            let deviation = dense.config.initializer_range();
            let mut values = normal(options.seed, 2 * l as u64 + which, count);
            for value in &mut values {
                *value *= deviation;
            }
            values
        }
    };
    let bytes = encode_f64(like.dtype(), &values);
    Ok(Tensor::owned(name, like.dtype(), shape, bytes))
}

/// Normally distributed numbers by the Box–Muller transform.
fn normal(seed: u64, stream: u64, count: usize) -> Vec<f64> {
    let mut generator = generator(seed, stream);
    // In (0, 1], so that the logarithm is finite.
    let mut unit = || ((generator.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let pairs = std::iter::repeat_with(|| {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
        [radius * angle.cos(), radius * angle.sin()]
    });
    pairs.flatten().take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_mean_0_and_variance_1() {
        let values = normal(7, 3, 100_001);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        assert_eq!(values[..100], normal(7, 3, 100));
        assert_ne!(values[..100], normal(7, 4, 100));
        assert_ne!(values[..100], normal(8, 3, 100));
    }
}
