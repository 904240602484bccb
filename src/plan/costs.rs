//! Parameters, bytes and tensors of a checkpoint after a plan.

use std::collections::BTreeSet;
use std::ops::{Add, AddAssign, Mul};

use super::file::LayerPlan;
use super::options::{self, Options};
use super::{Action, Projection};
use crate::architecture::{ExpertSize, MoeProfile, Profile};

/// What a compressed checkpoint will be.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Expected {
    /// Parameters of the whole checkpoint.
    pub parameters: u64,
    /// Parameters of its routed experts: those stored, so a merged expert counts nothing and a shared base
    /// once.
    pub routed_parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes of the routed experts.
    pub routed_bytes: u64,
    /// Fraction of the routed-expert parameters that is gone.
    pub removed_fraction: f64,
    /// Routed experts that remain in all layers together, neither dropped nor merged.
    pub experts: u64,
}

impl Expected {
    /// The sizes after `layers`, which must have been checked against the profile of `costs`.
    pub(super) fn of(costs: &Costs<'_>, layers: &[LayerPlan]) -> Expected {
        let profile = costs.profile;
        let mut routed = Sizes::default();
        let (mut router_parameters, mut router_bytes, mut experts) = (0, 0, 0);
        for (plan, layer) in layers.iter().zip(&profile.moe_layers) {
            routed += costs.layer(layer, plan.experts.iter().map(|e| &e.action));
            let gone = plan.without_row().count() as u64;
            router_parameters += gone * layer.router_parameters;
            router_bytes += gone * layer.router_bytes;
            experts += plan.experts.iter().filter(|e| e.action.is_stored()).count() as u64;
        }
        let (parameters, bytes) = (profile.routed_parameters(), profile.routed_bytes());
        Expected {
            parameters: profile.parameters - parameters - router_parameters + routed.parameters,
            routed_parameters: routed.parameters,
            bytes: profile.bytes - bytes - router_bytes + routed.bytes,
            routed_bytes: routed.bytes,
            removed_fraction: 1.0 - routed.parameters as f64 / parameters as f64,
            experts,
        }
    }
}

/// Number type of low-rank factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FactorDtype {
    /// As many bytes per value as the matrix has, or 2 where it is packed.
    #[default]
    Auto,
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 2 bytes.
    F16,
}

impl FactorDtype {
    /// Names of all, in the order of the variants.
    pub const NAMES: [&str; 4] = ["auto", "f32", "bf16", "f16"];

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [FactorDtype::Auto, FactorDtype::F32, FactorDtype::Bf16, FactorDtype::F16];
        Self::NAMES.iter().position(|n| *n == name).map(|i| all[i])
    }
}

/// Parameters, bytes and tensors of some part of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) parameters: u64,
    pub(super) bytes: u64,
    pub(super) tensors: u64,
}

impl Add for Sizes {
    type Output = Sizes;

    fn add(self, other: Sizes) -> Sizes {
        Sizes {
            parameters: self.parameters + other.parameters,
            bytes: self.bytes + other.bytes,
            tensors: self.tensors + other.tensors,
        }
    }
}

impl AddAssign for Sizes {
    fn add_assign(&mut self, other: Sizes) {
        *self = *self + other;
    }
}

impl Mul<u64> for Sizes {
    type Output = Sizes;

    fn mul(self, n: u64) -> Sizes {
        Sizes { parameters: self.parameters * n, bytes: self.bytes * n, tensors: self.tensors * n }
    }
}

/// What each form of an expert costs in one checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs<'a> {
    pub(super) profile: &'a Profile,
    dtype: FactorDtype,
    merged: FactorDtype,
    /// Whether every expert has tensors of its own, one per matrix; else all experts of a layer share fused ones.
    separate: bool,
    /// Experts that are dropped leave a constant and their router row behind.
    novices: bool,
}

impl<'a> Costs<'a> {
    pub(super) fn new(profile: &'a Profile, dtype: FactorDtype) -> Self {
        let matrices = profile.moe_layers.iter().map(|l| l.matrices() * l.experts as u64).sum::<u64>();
        let separate = profile.tensors >= matrices;
        Costs { profile, dtype, merged: FactorDtype::Auto, separate, novices: false }
    }

    /// Those of a plan with these resolved options: `factor_dtype` of factors, `merge_dtype` of merged experts; auto where
    /// there is none.
    pub(super) fn of_options(profile: &'a Profile, options: &Options) -> Self {
        let dtype = |name| options::text(options, name).and_then(FactorDtype::from_name).unwrap_or_default();
        Costs { merged: dtype("merge_dtype"), ..Costs::new(profile, dtype("factor_dtype")) }
    }

    /// The same where [`Costs::dropped`] is about experts that get `action`.
    pub(super) fn replacing(self, action: &Action) -> Self {
        Costs { novices: *action == Action::Constant, ..self }
    }

    /// Tensors of one dense expert.
    fn expert_tensors(&self, layer: &MoeProfile) -> u64 {
        if self.separate { layer.matrices() } else { 0 }
    }

    /// Cost of one expert, without what the layer shares.
    pub(super) fn expert(&self, layer: &MoeProfile, action: &Action) -> Sizes {
        let dense = Sizes {
            parameters: layer.expert_parameters,
            bytes: layer.expert_bytes,
            tensors: self.expert_tensors(layer),
        };
        let (d, p) = (self.profile.expert_io(layer) as u64, layer.width as u64);
        match action {
            Action::Keep => dense,
            Action::Drop | Action::Merge { .. } => Sizes::default(),
            // Always f32: it is small, and no kernel reads it as a matrix.
            Action::Constant => Sizes { parameters: d, bytes: 4 * d, tensors: 1 },
            Action::LowRank { rank, rows } => {
                let mut sizes = dense;
                for &projection in layer.projections() {
                    let Some(r) = rank.get(projection) else { continue };
                    let rows = rows.get(projection).unwrap_or(0) as u64;
                    let input = if projection == Projection::Down { p } else { d };
                    let values = r as u64 * (d + p) + rows * input;
                    sizes.parameters = sizes.parameters.saturating_sub(d * p) + values;
                    sizes.bytes = sizes.bytes.saturating_sub(matrix(layer, projection, d * p))
                        + self.factors(layer, values)
                        + 4 * rows;
                    let tensors = if rows > 0 { 4 } else { 2 };
                    sizes.tensors = sizes.tensors.saturating_sub(u64::from(self.separate)) + tensors;
                }
                sizes
            }
            Action::Channels { keep } => self.narrow(layer, (keep.count() as u64).min(p)),
            Action::Delta { rank } => {
                let values = layer.matrices() * *rank as u64 * (d + p);
                let biases = self.biases(layer);
                Sizes {
                    parameters: values + biases.parameters,
                    bytes: self.factors(layer, values) + biases.bytes,
                    tensors: 2 * layer.matrices() + biases.tensors,
                }
            }
        }
    }

    /// Cost of a layer's experts, in order; the base of its deltas counts as one dense expert.
    pub(super) fn layer<'b>(&self, layer: &MoeProfile, actions: impl Iterator<Item = &'b Action>) -> Sizes {
        let mut sizes = Sizes::default();
        let mut base = false;
        let mut targets = BTreeSet::new();
        let actions = actions.collect::<Vec<_>>();
        for (e, action) in actions.iter().enumerate() {
            sizes += match action {
                Action::Keep => self.kept(layer, e),
                _ => self.expert(layer, action),
            };
            base |= matches!(action, Action::Delta { .. });
            if let Action::Merge { into, .. } = action {
                targets.insert(*into);
            }
        }
        for e in targets {
            let [before, after] = self.replaced(layer, e, actions[e]);
            sizes.bytes = sizes.bytes.saturating_sub(before) + after;
        }
        // Weights outlive their expert where an alias of it stays.
        let stays = |(e, action): (usize, &&Action)| {
            layer.expert(e).alias_of.filter(|of| {
                **action == Action::Keep
                    && actions.get(*of).is_some_and(|a| matches!(a, Action::Drop | Action::Constant))
            })
        };
        let inherited: BTreeSet<usize> = actions.iter().enumerate().filter_map(stays).collect();
        for of in inherited {
            sizes += self.kept(layer, of);
        }
        sizes += Sizes { parameters: layer.base.parameters, bytes: layer.base.bytes, tensors: 0 };
        if base { sizes + self.matrices(layer, layer.width as u64) } else { sizes }
    }

    /// Expert `e` as it is.
    fn kept(&self, layer: &MoeProfile, e: usize) -> Sizes {
        let ExpertSize { parameters, bytes, .. } = layer.expert(e);
        Sizes { parameters, bytes, tensors: self.expert_tensors(layer) }
    }

    /// A layer's experts as they are.
    fn before(&self, layer: &MoeProfile) -> Sizes {
        let ExpertSize { parameters, bytes, .. } = layer.routed();
        Sizes { parameters, bytes, tensors: self.expert_tensors(layer) * layer.experts as u64 }
    }

    /// The matrices of an expert of this width, as they are stored where they replace others.
    fn matrices(&self, layer: &MoeProfile, width: u64) -> Sizes {
        let parameters = layer.matrices() * width * self.profile.expert_io(layer) as u64;
        let bytes = match layer.factor_bytes {
            0 => stored(layer, parameters),
            each => each * parameters,
        };
        Sizes { parameters, bytes, tensors: layer.matrices() }
    }

    /// What a dense expert has besides its matrices.
    fn biases(&self, layer: &MoeProfile) -> Sizes {
        let values = layer.matrices() * self.profile.expert_io(layer) as u64 * layer.width as u64;
        let parameters = layer.expert_parameters.saturating_sub(values);
        let matrices: u64 = layer.matrix_bytes.iter().sum();
        let bytes = match matrices {
            0 => stored(layer, parameters),
            matrices => layer.expert_bytes.saturating_sub(matrices),
        };
        if parameters == 0 {
            Sizes::default()
        } else {
            Sizes { parameters, bytes, tensors: layer.matrices() }
        }
    }

    /// An expert with `width` channels left; with all of them it stays as it is.
    fn narrow(&self, layer: &MoeProfile, width: u64) -> Sizes {
        let (d, p) = (self.profile.expert_io(layer) as u64, layer.width as u64);
        if width == p {
            return self.expert(layer, &Action::Keep);
        }
        let biases = self.biases(layer);
        // Those of gate and up have a number per channel, that of down has not.
        let inner = layer.matrices() - 1;
        let left = |all: u64| all * (inner * width + d) / (inner * p + d);
        let biases = Sizes { parameters: left(biases.parameters), bytes: left(biases.bytes), ..biases };
        self.matrices(layer, width) + biases
    }

    /// Size of the checkpoint whose experts get these actions, a list per layer; routers stay.
    pub(super) fn with(&self, actions: &[Vec<Action>]) -> u64 {
        let (mut before, mut after) = (Sizes::default(), Sizes::default());
        for (layer, actions) in self.profile.moe_layers.iter().zip(actions) {
            before += self.before(layer);
            after += self.layer(layer, actions.iter());
        }
        let bytes = self.profile.bytes - before.bytes + after.bytes;
        self.on_disk(bytes, self.profile.tensors - before.tensors + after.tensors)
    }

    /// Size on disk of the checkpoint after `layers`, which must fit the profile.
    pub(super) fn size_of(&self, layers: &[LayerPlan]) -> u64 {
        let (mut before, mut after) = (Sizes::default(), Sizes::default());
        for (plan, layer) in layers.iter().zip(&self.profile.moe_layers) {
            let experts = layer.experts as u64;
            let router = Sizes { parameters: 0, bytes: layer.router_bytes, tensors: 0 };
            before += self.before(layer) + router * experts;
            after +=
                self.layer(layer, plan.experts.iter().map(|e| &e.action)) + router * plan.routed() as u64;
        }
        self.on_disk(
            self.profile.bytes - before.bytes + after.bytes,
            self.profile.tensors - before.tensors + after.tensors,
        )
    }

    /// What goes with one dropped expert: its weights and its router row, or where a constant takes its place, what is
    /// more than that.
    pub(super) fn dropped(&self, layer: &MoeProfile) -> Sizes {
        if self.novices {
            let constant = self.expert(layer, &Action::Constant);
            return Sizes {
                parameters: layer.expert_parameters.saturating_sub(constant.parameters),
                bytes: layer.expert_bytes.saturating_sub(constant.bytes),
                tensors: self.expert_tensors(layer).saturating_sub(constant.tensors),
            };
        }
        Sizes {
            parameters: layer.expert_parameters + layer.router_parameters,
            bytes: layer.expert_bytes + layer.router_bytes,
            tensors: self.expert_tensors(layer),
        }
    }

    /// Bytes of the dense matrices of expert `e`, which takes in others, as they are and merged: packed ones become plain
    /// numbers.
    fn replaced(&self, layer: &MoeProfile, e: usize, action: &Action) -> [u64; 2] {
        let io = self.profile.expert_io(layer);
        let values = io as u64 * layer.dense_width(e, io).unwrap_or(layer.width) as u64;
        let stays = |p: &Projection| match action {
            Action::Keep => true,
            Action::LowRank { rank, .. } => rank.get(*p).is_none(),
            _ => false,
        };
        let mut bytes = [0; 2];
        for p in layer.projections().iter().copied().filter(stays) {
            let before = matrix(layer, p, values);
            let after = match (self.merged, layer.factor_bytes) {
                (FactorDtype::Auto, 0) => before,
                (FactorDtype::Auto, each) => each * values,
                (FactorDtype::F32, _) => 4 * values,
                (FactorDtype::Bf16 | FactorDtype::F16, _) => 2 * values,
            };
            bytes[0] += before;
            bytes[1] += after;
        }
        bytes
    }

    /// Bytes of `values` numbers of low-rank factors.
    fn factors(&self, layer: &MoeProfile, values: u64) -> u64 {
        match self.dtype {
            FactorDtype::Auto if layer.factor_bytes > 0 => layer.factor_bytes * values,
            FactorDtype::Auto => stored(layer, values),
            FactorDtype::F32 => 4 * values,
            FactorDtype::Bf16 | FactorDtype::F16 => 2 * values,
        }
    }

    /// Bytes of a checkpoint with tensors of `bytes` bytes: those, and its share of the safetensors headers,
    /// which grow with the number of tensors.
    pub(super) fn on_disk(&self, bytes: u64, tensors: u64) -> u64 {
        let header = match self.profile.tensors {
            0 => 0,
            all => (u128::from(self.profile.header_bytes) * u128::from(tensors)).div_ceil(u128::from(all)),
        };
        bytes.saturating_add(u64::try_from(header).unwrap_or(u64::MAX))
    }

    /// Bytes of the checkpoint after `layers`, which must have been checked against its profile.
    pub(super) fn on_disk_after(&self, layers: &[LayerPlan]) -> u64 {
        let mut tensors = self.profile.tensors;
        for (plan, layer) in layers.iter().zip(&self.profile.moe_layers) {
            tensors -= self.expert_tensors(layer) * layer.experts as u64;
            tensors += self.layer(layer, plan.experts.iter().map(|e| &e.action)).tensors;
        }
        self.on_disk(Expected::of(self, layers).bytes, tensors)
    }

    /// Bytes of the checkpoint as it is.
    pub(super) fn now(&self) -> u64 {
        self.on_disk(self.profile.bytes, self.profile.tensors)
    }
}

/// Bytes of one matrix of `values` numbers.
fn matrix(layer: &MoeProfile, projection: Projection, values: u64) -> u64 {
    match layer.matrix_bytes[projection as usize] {
        0 => stored(layer, values),
        bytes => bytes,
    }
}

/// Bytes of `values` numbers at the expert's average bytes per parameter.
fn stored(layer: &MoeProfile, values: u64) -> u64 {
    let (bytes, parameters) = (u128::from(layer.expert_bytes), u128::from(layer.expert_parameters));
    ((u128::from(values) * bytes + parameters / 2) / parameters.max(1)) as u64
}
