//! NAEE: the experts without which a layer's output moves least, found by trying.

use super::{Method, Needs, Paper, Request, skip};
use crate::architecture::{MoeProfile, Profile, Skip};
use crate::plan::budget;
use crate::plan::check;
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::file::LayerPlan;
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::select::Layer;
use crate::plan::{
    Action, Error, Found, LossRule, LossSource, OptionSpec, Pass, Plan, Result, Subsets, greedy_and_swap,
};

/// The method.
pub(super) struct Naee;

/// The options that say what a loss is; for every method that searches.
pub(super) const LOSS: [OptionSpec; 2] = [
    OptionSpec {
        name: "loss",
        kind: OptionKind::Choice(&["batch_sum", "single"]),
        default: Some("batch_sum"),
        help: "how far outputs move. batch_sum: the sum of the Frobenius norms of all batches, as in the published \
               code; single: one Frobenius norm over all tokens, as in the paper",
    },
    OptionSpec {
        name: "batch",
        kind: OptionKind::Integer(1),
        default: Some("8"),
        help: "windows of a batch of loss=batch_sum",
    },
];

static OPTIONS: [OptionSpec; 9] = [
    LOSS[0],
    LOSS[1],
    OptionSpec {
        name: "progressive",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "the inputs of a layer come from the model whose earlier layers are pruned already",
    },
    OptionSpec {
        name: "enumerate",
        kind: OptionKind::Integer(1),
        default: Some("50000"),
        help: "try all subsets of a layer that has at most so many; otherwise drop one expert after the other, then swap",
    },
    OptionSpec {
        name: "swaps",
        kind: OptionKind::Integer(0),
        default: Some("100"),
        help: "most swaps where subsets are too many to try",
    },
    OptionSpec {
        name: "exact",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "run the layer for every subset, in place of inner products of all experts' outputs: slow, for comparison",
    },
    skip::OPTIONS[0],
    skip::OPTIONS[1],
    skip::OPTIONS[2],
];

impl Method for Naee {
    fn name(&self) -> &'static str {
        "naee"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language \
                    Models",
            arxiv: "2402.14800",
        })
    }

    fn description(&self) -> &'static str {
        "drops, layer by layer, the subset of experts without which the layer's output moves least; skips experts at run \
         time"
    }

    fn needs(&self) -> Needs {
        Needs { tokens: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(self.name(), &OPTIONS, request.options)?;
        skip::check(profile, &options)?;
        let drops = match request.budget {
            Some(budget) => {
                let rooms = rooms(profile);
                let rooms = rooms.iter().map(Layer::room).collect::<Vec<_>>();
                budget::drops_per_layer(budget, &Costs::new(profile, FactorDtype::Auto), &rooms)?
            }
            None if options::flag(&options, "skip") => vec![0; profile.moe_layers.len()],
            None => {
                let message =
                    "naee: no budget; give --remove, --experts or --bytes, or --set skip=true alone";
                return Err(Error::Missing(message.into()));
            }
        };
        let source = source(self.name(), request)?;
        let mut found: Vec<Option<Found>> = vec![None; drops.len()];
        if drops.iter().any(|n| *n > 0) {
            source.begin(&pass(&options)).map_err(Error::Search)?;
            for ((layer, count), found) in profile.moe_layers.iter().zip(&drops).zip(&mut found) {
                *found = search(layer, *count, &options, source).map_err(Error::Search)?;
            }
        }
        let dropped = |found: &Option<Found>| found.as_ref().map_or_else(Vec::new, |f| f.dropped.clone());
        let dropped: Vec<Vec<usize>> = found.iter().map(dropped).collect();
        let skips = skip::rules(profile, &options, source, &dropped)?;
        let rule = loss_rule(&options);
        let layers = profile.moe_layers.iter().zip(&dropped).zip(&found).zip(skips);
        let plans = layers.map(|(((layer, dropped), found), skip)| {
            let loss = found.as_ref().map(|f| f.loss.get(rule));
            layer_plan(layer, dropped, loss, skip)
        });
        let plans = plans.collect();
        Plan::assemble(profile, self.name(), options, request.source.cloned(), plans, Vec::new())
    }
}

/// Every layer with the experts that it can lose.
pub(super) fn rooms(profile: &Profile) -> Vec<Layer<'_>> {
    profile.moe_layers.iter().map(|l| Layer::new(l, l.top_k, vec![false; l.experts])).collect()
}

/// Who answers, without whom `method` cannot work.
pub(super) fn source<'a>(method: &str, request: &Request<'a>) -> Result<&'a dyn LossSource> {
    let message = || {
        format!("{method} searches on the tokens themselves; give the checkpoint with --model and --tokens")
    };
    request.losses.ok_or_else(|| Error::Search(message()))
}

pub(super) fn loss_rule(options: &Options) -> LossRule {
    if options::is(options, "loss", "single") { LossRule::Single } else { LossRule::BatchSum }
}

/// The whole number of an option that has a default.
pub(super) fn number(options: &Options, name: &str) -> usize {
    options::integer(options, name).map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

fn pass(options: &Options) -> Pass<'static> {
    Pass {
        task: "plan: naee",
        batch: number(options, "batch"),
        progressive: options::flag(options, "progressive"),
        exact: options::flag(options, "exact"),
    }
}

/// The best `count` experts of a layer to drop.
fn search(
    layer: &MoeProfile,
    count: usize,
    options: &Options,
    source: &dyn LossSource,
) -> Result<Option<Found>, String> {
    source.enter(layer.layer)?;
    if count == 0 {
        source.leave(&[], "nothing to drop")?;
        source.commit()?;
        return Ok(None);
    }
    let subsets = Subsets::new(layer, count);
    let rule = loss_rule(options);
    let found = if subsets.number() <= number(options, "enumerate") as u64 {
        subsets.enumerate(source, rule, 1)?.pop()
    } else {
        Some(greedy_and_swap(&subsets, source, rule, number(options, "swaps"))?)
    };
    let Some(found) = found else {
        return Err(format!("layer {}: no {count} experts can go", layer.layer));
    };
    let kept = layer.experts - count;
    source.leave(
        &found.dropped,
        &format!("{kept} of {} experts, loss {:.4}", layer.experts, found.loss.get(rule)),
    )?;
    source.commit()?;
    Ok(Some(found))
}

/// A layer without the experts `dropped`.
pub(super) fn layer_plan(
    layer: &MoeProfile,
    dropped: &[usize],
    loss: Option<f64>,
    skip: Option<Skip>,
) -> LayerPlan {
    let action = |expert| if dropped.contains(&expert) { Action::Drop } else { Action::Keep };
    LayerPlan { skip, loss, ..LayerPlan::new(layer.layer, layer.top_k, (0..layer.experts).map(action)) }
}
