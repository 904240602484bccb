//! A base that all experts of a layer share, and what each differs by, in low rank.

use super::low_rank::check_dense;
use super::{FACTOR_DTYPE, Method, Needs, PROPAGATE, Paper, Request};
use crate::architecture::{MoeProfile, Profile};
use crate::plan::budget::{self, Budget};
use crate::plan::check;
use crate::plan::costs::Costs;
use crate::plan::file::LayerPlan;
use crate::plan::options::{self, OptionKind};
use crate::plan::owl;
use crate::plan::{Action, Error, OptionSpec, Plan, Result};

/// The method.
pub(super) struct Delta;

const NAME: &str = "d2-moe";

static OPTIONS: [OptionSpec; 8] = [
    OptionSpec {
        name: "base",
        kind: OptionKind::Choice(&["frequency", "mean", "gram"]),
        default: Some("frequency"),
        help: "frequency: the mean of the experts, weighted with their tokens; mean: unweighted; gram: the least error on \
               the inputs of all. The paper weighs every number with its Fisher information, which takes gradients",
    },
    OptionSpec {
        name: "align",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "first bring the hidden neurons of all experts of a layer into the order of its most used one, the nearest \
               by weights. Not in the paper",
    },
    OptionSpec {
        name: "whiten",
        kind: OptionKind::Flag,
        default: Some("true"),
        help: "factorise the differences in the basis of the inputs. Compressing then needs second moments (calibrate \
               --moments input,hidden, or --tokens)",
    },
    FACTOR_DTYPE,
    PROPAGATE,
    owl::OPTIONS[0],
    owl::OPTIONS[1],
    owl::OPTIONS[2],
];

impl Method for Delta {
    fn name(&self) -> &'static str {
        NAME
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper { title: "Delta Decompression for MoE-based LLMs Compression", arxiv: "2502.17298" })
    }

    fn description(&self) -> &'static str {
        "one base for the experts of a layer and a low-rank difference for each: D²-MoE without gradients"
    }

    fn needs(&self) -> Needs {
        Needs { second_moments: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(NAME, &OPTIONS, request.options)?;
        check_dense(NAME, profile)?;
        let costs = Costs::of_options(profile, &options);
        let of_fraction = |fraction, fractions: &[f64]| of_fraction(profile, fraction, fractions);
        let ranks = owl::of_budget(NAME, request, &options, of_fraction, |size| of_size(&costs, size))?;
        let plan = |(layer, rank): (&MoeProfile, usize)| {
            LayerPlan::new(layer.layer, layer.top_k, vec![Action::Delta { rank }; layer.experts])
        };
        let plans = profile.moe_layers.iter().zip(ranks).map(plan).collect();
        Plan::assemble(profile, NAME, options, request.source.cloned(), plans, Vec::new())
    }
}

/// d·p/(d + p), the rank at which two factors take as many values as their matrix.
fn break_even(profile: &Profile, layer: &MoeProfile) -> f64 {
    crate::linalg::break_even_rank(layer.width, profile.expert_io(layer))
}

/// Rank floor(((1 − F)·E − 1)·d·p/(d + p)/E): the base takes the place of one of the E experts.
fn of_fraction(profile: &Profile, fraction: f64, fractions: &[f64]) -> Result<Vec<usize>> {
    let budget = Budget::Remove(fraction);
    let rank = |(layer, f): (&MoeProfile, &f64)| {
        let experts = layer.experts as f64;
        let left = (1.0 - f) * experts - 1.0;
        let most = layer.width.min(profile.expert_io(layer));
        ((left * break_even(profile, layer) / experts + 1e-9).floor().max(0.0) as usize).min(most)
    };
    let layers = || profile.moe_layers.iter().zip(fractions);
    if let Some((layer, _)) = layers().find(|pair| rank(*pair) == 0) {
        let least = (1.0 + layer.experts as f64 / break_even(profile, layer)) / layer.experts as f64;
        let (l, n) = (layer.layer, layer.experts);
        let instead = match budget::round_down(1.0 - least) {
            largest if largest > 0.0 => format!("the largest possible is {largest}"),
            _ => "its experts are too few or too small for it".into(),
        };
        return Err(Error::Budget(format!(
            "{budget}: leaves no rank beside the base of the {n} experts of layer {l}; {instead}"
        )));
    }
    Ok(layers().map(rank).collect())
}

/// The largest ranks, the same share of every layer, at which the checkpoint is not above `size`.
fn of_size(costs: &Costs<'_>, size: u64) -> Result<Vec<usize>> {
    budget::refuse_enough(size, costs)?;
    let (profile, layers) = (costs.profile, &costs.profile.moe_layers);
    let most = |layer: &MoeProfile| layer.width.min(profile.expert_io(layer));
    let largest = layers.iter().map(most).max().unwrap_or(1);
    let ranks =
        |rank: usize| -> Vec<usize> { layers.iter().map(|l| (most(l) * rank / largest).max(1)).collect() };
    let on_disk = |rank: usize| {
        let actions = layers.iter().zip(ranks(rank)).map(|(l, rank)| vec![Action::Delta { rank }; l.experts]);
        costs.with(&actions.collect::<Vec<_>>())
    };
    let all: Vec<usize> = (1..=largest).collect();
    match all.partition_point(|rank| on_disk(*rank) <= size) {
        0 => Err(budget::too_small(size, on_disk(1))),
        n => Ok(ranks(all[n - 1])),
    }
}
