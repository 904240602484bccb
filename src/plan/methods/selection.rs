//! The experts with the lowest scores, by whatever rule, within a budget.

use super::{Method, Request, mone, prune};
use crate::architecture::{MoeProfile, Profile};
use crate::backend::{Moment, Moments};
use crate::plan::budget::{self, Budget};
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::error::Place;
use crate::plan::file::LayerPlan;
use crate::plan::options::{self, Options};
use crate::plan::owl;
use crate::plan::protect::super_experts;
use crate::plan::score::{self, Rule};
use crate::plan::select::{self, Layer};
use crate::plan::{Action, Error, Plan, Result};

/// The experts with the lowest scores, and what becomes of them.
pub(super) struct Selection {
    /// Name of the method, for the plan and for messages.
    pub(super) method: &'static str,
    pub(super) rule: Rule,
    /// [`Action::Drop`] or [`Action::Constant`].
    pub(super) action: Action,
}

impl Selection {
    /// The plan for a checked profile and resolved options.
    pub(super) fn plan(&self, request: &Request<'_>, options: &Options) -> Result<Plan> {
        let profile = request.profile;
        let guard = options::is(options, "protect", "super");
        let statistics = if guard || self.rule != Rule::Random { Some(moments(request)?) } else { None };
        let Some(budget) = request.budget else {
            let message = format!("{}: no budget; give --remove, --experts or --bytes", self.method);
            return Err(Error::Missing(message));
        };

        let seed = seed(options);
        let mut scores = Vec::with_capacity(profile.moe_layers.len());
        for (i, layer) in profile.moe_layers.iter().enumerate() {
            scores.push(score::scores(self.rule, layer, statistics.map(|s| &s[i]), seed)?);
        }
        self.plan_scored(request, budget, options, statistics, &scores)
    }

    /// The plan for these scores, one list per layer.
    pub(super) fn plan_scored(
        &self,
        request: &Request<'_>,
        budget: Budget,
        options: &Options,
        statistics: Option<&[Moments]>,
        scores: &[Vec<f64>],
    ) -> Result<Plan> {
        let mut aim = budget;
        loop {
            let plan = self.plan_for(request, aim, options, statistics, scores)?;
            let (Budget::Bytes(most), Budget::Bytes(size)) = (budget, aim) else { return Ok(plan) };
            // Which of unequal experts go is known only now.
            match plan.bytes_on_disk(request.profile)?.saturating_sub(most) {
                0 => return Ok(plan),
                excess => aim = Budget::Bytes(size.saturating_sub(excess)),
            }
        }
    }

    fn plan_for(
        &self,
        request: &Request<'_>,
        budget: Budget,
        options: &Options,
        statistics: Option<&[Moments]>,
        scores: &[Vec<f64>],
    ) -> Result<Plan> {
        let profile = request.profile;
        let guard = options::is(options, "protect", "super");
        let protected = match statistics {
            Some(statistics) if guard => protected(profile, statistics, options)?,
            _ => profile.moe_layers.iter().map(|l| vec![false; l.experts]).collect(),
        };
        let open: Vec<MoeProfile> = profile.moe_layers.iter().map(|l| self.choices(l)).collect();
        let layers = open
            .iter()
            .zip(&protected)
            .map(|(layer, protected)| Ok(Layer::new(layer, floor(options, layer)?, protected.clone())))
            .collect::<Result<Vec<_>>>()?;

        if owl::is_owl(options) && !matches!(budget, Budget::Remove(_)) {
            return Err(owl::needs_fraction(budget));
        }
        if owl::is_owl(options) && options::is(options, "scope", "global") {
            let expected = "cannot be combined with scope=global, which divides the budget itself".into();
            return Err(Error::Option { option: "layer_ratio".into(), value: "owl".into(), expected });
        }
        let costs = Costs::new(profile, FactorDtype::Auto).replacing(&self.action);
        let dropped = if options::is(options, "scope", "global") {
            let sequence = select::sequence(&layers, scores);
            let owners = sequence.iter().map(|(i, e)| (&profile.moe_layers[*i], *e)).collect::<Vec<_>>();
            let n = budget::drops_of_sequence(budget, &costs, &owners)?;
            let mut dropped = vec![Vec::new(); layers.len()];
            sequence[..n].iter().for_each(|(i, expert)| dropped[*i].push(*expert));
            dropped
        } else {
            let orders = scores.iter().map(|scores| score::worst_first(scores)).collect::<Vec<_>>();
            let rooms = layers.iter().map(Layer::room).collect::<Vec<_>>();
            let unequal = profile.moe_layers.iter().any(|layer| !layer.each.is_empty());
            budget.check()?;
            let fractions = match budget {
                Budget::Remove(fraction) if owl::is_owl(options) => {
                    Some(owl::fractions(request, options, fraction)?)
                }
                Budget::Remove(fraction) if unequal => Some(vec![fraction; layers.len()]),
                _ => None,
            };
            match fractions {
                Some(fractions) if unequal => self.shares(budget, &costs, &layers, &orders, &fractions)?,
                fractions => {
                    let drops = match fractions {
                        Some(fractions) => budget::drops_of_fractions(budget, &rooms, &fractions)?,
                        None => budget::drops_per_layer(budget, &costs, &rooms)?,
                    };
                    let choices = layers.iter().zip(&orders).zip(drops);
                    choices.map(|((layer, order), n)| layer.choose(order, n)).collect::<Result<_>>()?
                }
            }
        };

        let mut plans = Vec::with_capacity(layers.len());
        for ((layer, dropped), protected) in profile.moe_layers.iter().zip(&dropped).zip(&protected) {
            plans.push(layer_plan(layer, dropped, protected, &self.action));
        }
        let warnings = match statistics {
            Some(statistics) => unrouted(profile, statistics)?,
            None => Vec::new(),
        };
        let source = statistics.and(request.source).cloned();
        Plan::assemble(profile, self.method, options.clone(), source, plans, warnings)
    }

    /// The experts of every layer that get the action: those first in its order, until their parameters come nearest to its
    /// fraction.
    fn shares(
        &self,
        budget: Budget,
        costs: &Costs<'_>,
        layers: &[Layer<'_>],
        orders: &[Vec<usize>],
        fractions: &[f64],
    ) -> Result<Vec<Vec<usize>>> {
        let mut chosen = Vec::with_capacity(layers.len());
        for (((layer, profile), order), fraction) in
            layers.iter().zip(&costs.profile.moe_layers).zip(orders).zip(fractions)
        {
            let removed = |n: usize| {
                let plan = layer_plan(profile, &layer.choose(order, n)?, &[], &self.action);
                let left = costs.layer(profile, plan.experts.iter().map(|e| &e.action));
                Ok(profile.routed().parameters.saturating_sub(left.parameters))
            };
            let n = budget::drops_of_unequal(budget, *fraction, &layer.room(), removed)?;
            chosen.push(layer.choose(order, n)?);
        }
        if chosen.iter().all(Vec::is_empty) {
            let most = layers.iter().map(|layer| layer.room().layer.experts).max().unwrap_or(0);
            return Err(Error::Budget(budget::nothing_removed(budget, most)));
        }
        Ok(chosen)
    }

    /// The layer as far as choosing goes: experts that keep their router row keep every group of the router usable.
    fn choices(&self, layer: &MoeProfile) -> MoeProfile {
        if self.action == Action::Drop {
            layer.clone()
        } else {
            MoeProfile { groups: 1, top_groups: 1, ..layer.clone() }
        }
    }

    /// The experts of one layer that get the action, ascending: `n` of them, none of `protected`.
    fn choose(
        &self,
        options: &Options,
        layer: &MoeProfile,
        moments: &Moments,
        n: usize,
        protected: &[usize],
    ) -> Result<Vec<usize>> {
        let scores = score::scores(self.rule, layer, Some(moments), seed(options))?;
        let mut keep = vec![false; layer.experts];
        for &expert in protected {
            let Some(slot) = keep.get_mut(expert) else {
                let problem = format!("protected, but the layer has {} experts", layer.experts);
                return Err(Place::layer(layer.layer).expert(expert).plan(problem));
            };
            *slot = true;
        }
        let open = self.choices(layer);
        Layer::new(&open, floor(options, layer)?, keep).choose(&score::worst_first(&scores), n)
    }
}

/// Chooses the experts of one layer again, from moments measured again, with the method and the options of a
/// plan. Returns the `n` experts to drop (or, with `mone`, to replace), ascending; none of `protected` (see
/// [`LayerPlan::protected`]) is among them.
///
/// # Errors
/// [`Error::Method`] for a method that does not choose experts by score, [`Error::UnknownOption`] and
/// [`Error::Option`] for options the method does not take, [`Error::Statistics`] for moments that are missing
/// or damaged, [`Error::Budget`] where the layer cannot lose so many.
pub fn rescore_layer(
    method: &str,
    options: &Options,
    layer: &MoeProfile,
    moments: &Moments,
    n: usize,
    protected: &[usize],
) -> Result<Vec<usize>> {
    let given = options::given(options);
    let (selection, options) = if let Some(prune) = prune::METHODS.iter().find(|m| m.name() == method) {
        (prune.selection(), options::resolve(method, prune.options(), &given)?)
    } else if method == mone::NAME {
        let options = options::resolve(method, &mone::OPTIONS, &given)?;
        (mone::selection(&options), options)
    } else {
        let known =
            prune::METHODS.iter().map(Method::name).chain([mone::NAME]).collect::<Vec<_>>().join(", ");
        return Err(Error::Method { name: method.into(), known });
    };
    selection.choose(&options, layer, moments, n, protected)
}

/// The moments of every MoE layer.
pub(super) fn moments<'a>(request: &Request<'a>) -> Result<&'a [Moments]> {
    let Some(statistics) = request.statistics else {
        return Err(Place::top().statistics("this method needs them; give those that calibrate wrote"));
    };
    let (found, expected) = (statistics.len(), request.profile.moe_layers.len());
    if found != expected {
        let problem =
            format!("of {found} MoE layers, the checkpoint has {expected}; calibrate this checkpoint");
        return Err(Place::top().statistics(problem));
    }
    Ok(statistics)
}

/// The experts that the super-expert guard protects.
fn protected(profile: &Profile, statistics: &[Moments], options: &Options) -> Result<Vec<Vec<bool>>> {
    let pairs = profile.moe_layers.iter().zip(statistics);
    let largest =
        pairs.map(|(layer, m)| score::finite(layer, m, Moment::MaxAbs)).collect::<Result<Vec<_>>>()?;
    Ok(super_experts(&largest, options::flag(options, "protect_all_layers")))
}

/// The fewest experts left in `layer`.
fn floor(options: &Options, layer: &MoeProfile) -> Result<usize> {
    let Some(floor) = options::integer(options, "floor") else { return Ok(layer.top_k) };
    let (least, most) = (layer.top_k, layer.experts);
    match usize::try_from(floor) {
        Ok(floor) if (least..=most).contains(&floor) => Ok(floor),
        _ => Err(Error::Option {
            option: "floor".into(),
            value: floor.to_string(),
            expected: format!("expected {least} to {most} for layer {}", layer.layer),
        }),
    }
}

fn seed(options: &Options) -> u64 {
    options::integer(options, "seed").unwrap_or(0)
}

fn layer_plan(layer: &MoeProfile, chosen: &[usize], protected: &[bool], action: &Action) -> LayerPlan {
    let mut plan = LayerPlan::new(layer.layer, layer.top_k, vec![Action::Keep; layer.experts]);
    for expert in chosen {
        plan.experts[*expert].action = action.clone();
    }
    plan.protected = protected.iter().enumerate().filter(|(_, p)| **p).map(|(e, _)| e).collect();
    plan
}

/// One warning for each layer with experts that saw no token.
pub(super) fn unrouted(profile: &Profile, statistics: &[Moments]) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for (layer, moments) in profile.moe_layers.iter().zip(statistics) {
        let count = score::counts(layer, moments)?;
        let unseen =
            (0..layer.experts).filter(|e| count[*e] <= 0.0).map(|e| e.to_string()).collect::<Vec<_>>();
        if !unseen.is_empty() {
            let (layer, experts, n) = (layer.layer, layer.experts, unseen.len());
            let list = unseen.join(", ");
            warnings.push(format!("layer {layer}: {n} of {experts} experts saw no token: {list}"));
        }
    }
    Ok(warnings)
}
