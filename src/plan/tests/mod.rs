//! Tests of the whole module: against reference outputs, by hand, by property, and of every message.

mod by_hand;
mod low_rank;
mod merge;
mod messages;
mod properties;
mod reference;

use std::collections::BTreeMap;

use super::*;
use crate::architecture::{ExpertSize, MoeProfile, Profile};
use crate::backend::{Moment, MomentDims, Moments};

/// A MoE layer of width 12 with bf16 experts for the hidden size 8.
pub(super) fn layer(layer: usize, experts: usize, top_k: usize) -> MoeProfile {
    MoeProfile {
        layer,
        experts,
        top_k,
        width: 12,
        latent: None,
        ungated: false,
        groups: 1,
        top_groups: 1,
        expert_parameters: 3 * 8 * 12,
        expert_bytes: 2 * 3 * 8 * 12,
        each: Vec::new(),
        dense_widths: Vec::new(),
        base: ExpertSize::default(),
        matrix_bytes: [0; 3],
        factor_bytes: 0,
        router_parameters: 9,
        router_bytes: 2 * 8 + 4,
    }
}

/// A checkpoint of these layers with 1000 parameters, 2000 bytes and 10 tensors besides experts and router
/// rows.
pub(super) fn profile(moe_layers: Vec<MoeProfile>) -> Profile {
    let total =
        |each: fn(&MoeProfile) -> u64| moe_layers.iter().map(|l| l.experts as u64 * each(l)).sum::<u64>();
    let tensors = 10 + total(|_| 3);
    Profile {
        family: "mixtral".into(),
        identity: "1d".into(),
        layers: moe_layers.last().map_or(0, |l| l.layer + 1),
        hidden_size: 8,
        parameters: 1000 + total(|l| l.expert_parameters + l.router_parameters),
        bytes: 2000 + total(|l| l.expert_bytes + l.router_bytes),
        header_bytes: 100 * tensors,
        tensors,
        moe_layers,
    }
}

/// Moments of one layer with the listed arrays; `count` is 1 for every expert where it is not among them.
pub(super) fn moments(experts: usize, arrays: &[(Moment, &[f64])]) -> Moments {
    let dims = MomentDims { experts, hidden_size: 8, width: 12, files: 1 };
    let mut all = BTreeMap::from([(Moment::Count, vec![1.0; experts])]);
    all.extend(arrays.iter().map(|(m, a)| (*m, a.to_vec())));
    Moments::from_arrays(dims, all).unwrap()
}

/// Moments whose count is this.
pub(super) fn counted(count: &[f64]) -> Moments {
    moments(count.len(), &[(Moment::Count, count)])
}

/// The plan of `name`, options as `KEY=VALUE`.
pub(super) fn plan(
    name: &str,
    profile: &Profile,
    statistics: Option<&[Moments]>,
    budget: Option<Budget>,
    options: &[&str],
) -> Result<Plan> {
    plan_with(name, profile, statistics, budget, options, None)
}

/// The plan of `name` with spectra.
pub(super) fn plan_with(
    name: &str,
    profile: &Profile,
    statistics: Option<&[Moments]>,
    budget: Option<Budget>,
    options: &[&str],
    spectra: Option<&dyn SpectrumSource>,
) -> Result<Plan> {
    let pair = |s: &&str| s.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).unwrap();
    let options = options.iter().map(pair).collect();
    method(name)?.plan(&Request { statistics, budget, options: &options, spectra, ..Request::new(profile) })
}

/// The dropped experts of every layer.
pub(super) fn dropped(plan: &Plan) -> Vec<Vec<usize>> {
    plan.layers.iter().map(|l| l.dropped().collect()).collect()
}
