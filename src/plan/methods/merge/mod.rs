//! Merging: the experts of a layer are put into groups, and each group becomes one expert.

mod hc_smoe;
mod linkage;
mod m_smoe;
mod ream;

use std::collections::BTreeSet;

pub(super) use hc_smoe::HcSmoe;
pub(super) use m_smoe::{M_SMOE, MC_SMOE};
pub(super) use ream::Ream;
pub use ream::regroup_layer;

use super::Request;
use crate::architecture::{MoeProfile, Profile};
use crate::backend::{Moment, Moments};
use crate::plan::budget::{self, Room};
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::error::Place;
use crate::plan::file::{LayerPlan, MergedRows};
use crate::plan::groups::GroupState;
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::score;
use crate::plan::{Action, Budget, Error, OptionSpec, Result};

const ALIGN_HELP: &str = "bring the hidden neurons of merged experts into the order of the one they go into, the nearest \
                          to its own, before averaging";

/// The option `align` with this default.
const fn align_option(default: &'static str) -> OptionSpec {
    OptionSpec { name: "align", kind: OptionKind::Flag, default: Some(default), help: ALIGN_HELP }
}

/// The option `align_by` with this default.
const fn align_by_option(default: &'static str) -> OptionSpec {
    OptionSpec {
        name: "align_by",
        kind: OptionKind::Choice(&["weights", "activations", "both"]),
        default: Some(default),
        help: "what makes hidden neurons near: weights; activations, the correlation of their values on calibration tokens, \
               every expert on every token; both, the distance of weights plus that of activations, each divided by its \
               norm. The last two need --tokens while compressing",
    }
}

/// The option `router` with this default.
const fn router_option(default: &'static str) -> OptionSpec {
    OptionSpec {
        name: "router",
        kind: OptionKind::Choice(&["redirect", "fuse"]),
        default: Some(default),
        help: "redirect: the router keeps its rows, and merged experts share their weights; fuse: the rows of merged \
               experts go, which changes what tokens choose, but gives a stock checkpoint where groups are equally many",
    }
}

const MERGE_DTYPE: OptionSpec = OptionSpec {
    name: "merge_dtype",
    kind: OptionKind::Choice(&FactorDtype::NAMES),
    default: Some("auto"),
    help: "number type of merged experts; auto: that of the weights, bf16 where they are packed",
};

const EXCLUDE: OptionSpec = OptionSpec {
    name: "exclude",
    kind: OptionKind::Layers,
    default: None,
    help: "layers that stay as they are, such as 0,3-5; the budget holds for each of the others",
};

/// What every merging method is asked for, resolved.
struct Job<'a> {
    profile: &'a Profile,
    options: Options,
    moments: &'a [Moments],
    rows: MergedRows,
    excluded: BTreeSet<usize>,
    budget: Budget,
}

/// The experts of one layer by group; the first of each is the one that takes in the others.
type Groups = Vec<Vec<usize>>;

impl<'a> Job<'a> {
    fn new(method: &str, specs: &[OptionSpec], request: &Request<'a>) -> Result<Self> {
        let options = options::resolve(method, specs, request.options)?;
        let moments = super::selection::moments(request)?;
        let Some(budget) = request.budget else {
            return Err(Error::Missing(format!("{method}: no budget; give --remove, --experts or --bytes")));
        };
        let rows =
            if options::is(&options, "router", "fuse") { MergedRows::Fuse } else { MergedRows::Redirect };
        let profile = request.profile;
        let excluded = options::layers(&options, "exclude");
        let known: BTreeSet<usize> = profile.moe_layers.iter().map(|l| l.layer).collect();
        let wrong = |expected: String| {
            let value = options.get("exclude").and_then(|v| v.as_str()).unwrap_or_default();
            Err(Error::Option { option: "exclude".into(), value: value.into(), expected })
        };
        if let Some(stray) = excluded.difference(&known).next() {
            return wrong(format!("layer {stray} is not a MoE layer of this checkpoint"));
        }
        if excluded == known {
            return wrong("no layer is left to merge".into());
        }
        Ok(Job { profile, options, moments, rows, excluded, budget })
    }

    /// The layers that take part: position and profile.
    fn layers(&self) -> impl Iterator<Item = (usize, &'a MoeProfile)> {
        let profile = self.profile;
        profile.moe_layers.iter().enumerate().filter(|(_, l)| !self.excluded.contains(&l.layer))
    }

    /// The fewest groups of a layer: where rows go, as many as a token must find; where a size is to be met, as many as can
    /// hold the experts (other budgets say how many groups there are, and an error says that these cannot).
    fn floor(&self, layer: &MoeProfile) -> usize {
        let held = if matches!(self.budget, Budget::Bytes(_)) { self.fewest_that_hold(layer) } else { 1 };
        if self.rows == MergedRows::Fuse {
            held.max(layer.experts - GroupState::new(layer, layer.top_k).removable())
        } else {
            held
        }
    }

    /// The fewest groups that can hold the experts of a layer, where groups have a largest size.
    fn fewest_that_hold(&self, layer: &MoeProfile) -> usize {
        let largest = |name| options::integer(&self.options, name).and_then(|n| usize::try_from(n).ok());
        let largest = largest("capacity").or_else(|| largest("group_size")).unwrap_or(layer.experts);
        layer.experts.div_ceil(largest.max(1))
    }

    /// Errors where the rows that go leave a group-limited router too few in some choice of its groups.
    fn check_rows(&self, plans: Vec<LayerPlan>) -> Result<Vec<LayerPlan>> {
        for (plan, layer) in plans.iter().zip(&self.profile.moe_layers) {
            let mut state = GroupState::new(layer, layer.top_k);
            plan.without_row().for_each(|e| state.remove(state.of(e)));
            if !state.is_enough() {
                let (sizes, MoeProfile { layer, top_k, top_groups, .. }) = (state.sizes(), layer);
                let expected = format!(
                    "layer {layer} would keep {sizes:?} rows in the groups of its router, of which any {top_groups} must \
                     hold the {top_k} that a token chooses; use redirect, which keeps all rows, or remove less"
                );
                return Err(Error::Option { option: "router".into(), value: "fuse".into(), expected });
            }
        }
        Ok(plans)
    }

    /// Plans whose groups are chosen by `groups`, for a number per layer that meets the budget and is at least
    /// [`Job::floor`]; `mass` is what each expert weighs in its group's mean, and `finish` has the last word.
    fn meet(
        &self,
        groups: impl Fn(&[usize]) -> Result<Vec<Groups>>,
        mass: &[Vec<f64>],
        finish: impl Fn(&mut [LayerPlan]),
    ) -> Result<Vec<LayerPlan>> {
        let rooms: Vec<Room<'a>> =
            self.layers().map(|(_, layer)| Room { layer, most: layer.experts - self.floor(layer) }).collect();
        let costs = Costs::of_options(self.profile, &self.options);
        let plans = |merged: &[usize]| {
            let counts: Vec<usize> =
                rooms.iter().zip(merged).map(|(room, n)| room.layer.experts - n).collect();
            let mut plans = self.plans(&groups(&counts)?, mass);
            finish(&mut plans);
            Ok(plans)
        };
        let Budget::Bytes(size) = self.budget else {
            let merged = budget::drops_per_layer(self.budget, &costs, &rooms).map_err(|e| {
                let open = |room: &Room<'a>| Room { layer: room.layer, most: room.layer.experts - 1 };
                let open: Vec<Room<'_>> = rooms.iter().map(open).collect();
                match e {
                    Error::Budget(problem) if budget::drops_per_layer(self.budget, &costs, &open).is_ok() => {
                        Error::Budget(format!(
                            "{problem}; --set router=redirect keeps all rows and can merge more"
                        ))
                    }
                    other => other,
                }
            })?;
            return self.check_rows(plans(&merged)?);
        };
        budget::refuse_enough(size, &costs)?;
        // The same share of every layer, by steps of one expert of the largest.
        let largest = rooms.iter().map(|room| room.layer.experts).max().unwrap_or(0);
        let most = rooms.iter().map(|room| room.most * largest / room.layer.experts).max().unwrap_or(0);
        let merged = |step: usize| -> Vec<usize> {
            let share = |room: &Room<'_>| (step * room.layer.experts + largest / 2) / largest;
            rooms.iter().map(|room| share(room).min(room.most)).collect()
        };
        let step = budget::fewest_steps(size, most, |step| Ok(costs.on_disk_after(&plans(&merged(step))?)))?;
        self.check_rows(plans(&merged(step))?)
    }

    /// The plans of all layers: `groups` and `mass`, what each expert weighs in its group's mean, are of those that take
    /// part.
    fn plans(&self, groups: &[Groups], mass: &[Vec<f64>]) -> Vec<LayerPlan> {
        let keep =
            |layer: &MoeProfile| LayerPlan::new(layer.layer, layer.top_k, vec![Action::Keep; layer.experts]);
        let mut plans: Vec<LayerPlan> = self.profile.moe_layers.iter().map(keep).collect();
        for (((position, _), groups), mass) in self.layers().zip(groups).zip(mass) {
            merge_groups(&mut plans[position], groups, mass);
            plans[position].router = self.rows;
        }
        plans
    }

    /// What the person who asked should know: experts without tokens, and packed weights that merging unpacks.
    fn warnings(&self) -> Result<Vec<String>> {
        let mut warnings = super::selection::unrouted(self.profile, self.moments)?;
        let packed = |l: &&MoeProfile| l.expert_bytes < l.expert_parameters * l.factor_bytes;
        if let Some(layer) = self.profile.moe_layers.iter().find(packed) {
            let bytes = layer.factor_bytes;
            warnings.push(format!(
                "the weights are packed; merged experts are not, they take {bytes} bytes per number"
            ));
        }
        Ok(warnings)
    }
}

/// Merges every group of a layer into its first expert. Each member's share is its part of the group's `mass`; all are the
/// same where that is 0.
fn merge_groups(plan: &mut LayerPlan, groups: &[Vec<usize>], mass: &[f64]) {
    for group in groups {
        let total: f64 = group.iter().map(|&e| mass[e]).sum();
        let share = |e: usize| if total > 0.0 { mass[e] / total } else { 1.0 / group.len() as f64 };
        for &expert in &group[1..] {
            plan.experts[expert].action = Action::Merge { into: group[0], weight: share(expert) };
        }
    }
}

/// N of every expert, per layer that takes part.
fn counts(job: &Job<'_>) -> Result<Vec<Vec<f64>>> {
    job.layers().map(|(i, layer)| Ok(score::counts(layer, &job.moments[i])?.to_vec())).collect()
}

/// A moment with `width` finite numbers per expert; `how` says how to have it measured.
fn rows<'m>(
    layer: &MoeProfile,
    moments: &'m Moments,
    moment: Moment,
    width: usize,
    how: &str,
) -> Result<&'m [f64]> {
    let place = || Place::layer(layer.layer).field(moment.name());
    let Some(values) = moments.get(moment) else {
        return Err(place().statistics(format!("not measured; {how}")));
    };
    if values.len() != layer.experts * width {
        let (found, expected) = (values.len(), layer.experts * width);
        return Err(place().statistics(format!("{found} values, expected {expected}")));
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => {
            let place = Place::layer(layer.layer).expert(i / width).field(moment.name());
            Err(place.statistics(format!("found {}, expected a finite number; calibrate again", values[i])))
        }
        None => Ok(values),
    }
}

/// Cosines of the router logits of all pairs of experts over all tokens, `[experts, experts]`; 0 where one has only
/// zeros.
fn logit_cosines(layer: &MoeProfile, moments: &Moments) -> Result<Vec<f64>> {
    let n = layer.experts;
    let gram = rows(layer, moments, Moment::RouterGram, n, "calibrate again with this version")?;
    let cosine = |i: usize| {
        let (a, b) = (i / n, i % n);
        let norm = (gram[a * n + a] * gram[b * n + b]).sqrt();
        if norm > 0.0 { gram[i] / norm } else { 0.0 }
    };
    Ok((0..n * n).map(cosine).collect())
}
