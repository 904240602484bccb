//! The sizes of a checkpoint.

use super::Result;
use super::find::Finder;
use super::source::MoeSource;
use crate::architecture::{Architecture, ExpertSize, MoeProfile, MoeSpec, Profile, Projection};
use crate::backend::{Expert, Matrix, StoredExpert};
use crate::checkpoint::{Checkpoint, Tensor, Weight};

/// Sizes of a checkpoint, for planning.
///
/// # Errors
/// What is wrong with the first layer that does not fit its config.
pub fn profile(checkpoint: &Checkpoint, architecture: &Architecture) -> Result<Profile> {
    let layer = |(l, moe): (usize, &MoeSpec)| {
        let source = Finder { checkpoint, architecture, l }.moe(moe).map_err(|e| e.of(checkpoint))?;
        Ok(moe_profile(l, moe, &source))
    };
    Ok(Profile {
        family: architecture.family.into(),
        identity: checkpoint.identity(),
        layers: architecture.layers.len(),
        hidden_size: architecture.hidden_size,
        parameters: checkpoint.tensors().map(Tensor::parameters).sum(),
        bytes: checkpoint.bytes(),
        header_bytes: checkpoint.header_bytes(),
        tensors: checkpoint.tensor_count() as u64,
        moe_layers: architecture.moe_layers().map(layer).collect::<Result<_>>()?,
    })
}

fn moe_profile(layer: usize, spec: &MoeSpec, source: &MoeSource) -> MoeProfile {
    let n = source.experts.len() as u64;
    let size = |expert: &StoredExpert| ExpertSize {
        parameters: expert.parameters(),
        bytes: expert.bytes(),
        alias_of: if let Expert::Alias(of) = expert { Some(*of) } else { None },
    };
    let sizes: Vec<ExpertSize> = source.experts.iter().map(size).collect();
    let parameters = sizes.iter().map(|s| s.parameters).sum::<u64>();
    let bytes = sizes.iter().map(|s| s.bytes).sum::<u64>();
    let dense_widths: Vec<Option<usize>> = source.experts.iter().map(dense_width).collect();
    let all_dense = dense_widths.iter().all(|width| *width == Some(spec.width));
    let alike = sizes.windows(2).all(|pair| pair[0] == pair[1]);
    let router = || source.router.tensors();
    let matrices = Projection::ALL.map(|p| dense_matrices(&source.experts, p));
    let number_bytes = |w: &&Weight| w.replacement_dtype().bitsize() as u64 / 8;
    MoeProfile {
        layer,
        experts: source.experts.len(),
        top_k: source.spec.top_k,
        width: spec.width,
        latent: spec.latent,
        ungated: !spec.activation.is_gated(),
        groups: source.spec.groups.map_or(1, |g| g.count),
        top_groups: source.spec.groups.map_or(1, |g| g.kept),
        expert_parameters: parameters / n,
        expert_bytes: bytes / n,
        each: if alike { Vec::new() } else { sizes },
        dense_widths: if all_dense { Vec::new() } else { dense_widths },
        base: ExpertSize {
            parameters: source.routed_parameters() - parameters,
            bytes: source.routed_bytes() - bytes,
            alias_of: None,
        },
        matrix_bytes: matrices.each_ref().map(|all| common(all.iter().map(|w| w.bytes()))),
        factor_bytes: common(matrices.iter().flatten().map(number_bytes)),
        router_parameters: router().map(|t| t.len() as u64).sum::<u64>() / n,
        router_bytes: router().map(|t| t.bytes().len() as u64).sum::<u64>() / n,
    }
}

/// Channels of an expert whose matrices are all dense.
fn dense_width(expert: &StoredExpert) -> Option<usize> {
    let Expert::Mlp(mlp) = expert else { return None };
    mlp.maps().all(|map| matches!(map.weight, Matrix::Dense(_))).then(|| mlp.gate.weight.left().rows())
}

/// The dense ones among the experts' matrices of one kind.
fn dense_matrices<'e>(experts: &'e [StoredExpert], projection: Projection) -> Vec<&'e Weight> {
    let matrix = |expert: &'e StoredExpert| match expert {
        Expert::Mlp(mlp) => match &mlp.map(projection)?.weight {
            Matrix::Dense(weight) => Some(weight),
            _ => None,
        },
        _ => None,
    };
    experts.iter().filter_map(matrix).collect()
}

/// The value that all have, or 0.
fn common(mut values: impl Iterator<Item = u64>) -> u64 {
    let first = values.next().unwrap_or(0);
    if values.all(|v| v == first) { first } else { 0 }
}
