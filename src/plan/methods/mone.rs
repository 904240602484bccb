//! MoNE: the experts that matter least become constants, "novices".
//!
//! "`MoNE`: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of `MoE`" (arXiv 2507.00390). The
//! router keeps all rows and its weights stay as they are, so that a novice answers with its weight times its constant.

use super::prune;
use super::selection::Selection;
use super::{Method, Needs, Paper, Request};
use crate::backend::Moment;
use crate::plan::check;
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::score::Rule;
use crate::plan::{Action, OptionSpec, Plan, Result};

pub(super) const NAME: &str = "mone";

/// The scores of the paper first.
const SCORES: [&str; 13] = [
    "mone-frequency",
    "mone-soft",
    "random",
    "frequency",
    "seer-hard",
    "seer-soft",
    "soft",
    "ean",
    "man",
    "msan",
    "reap",
    "wean",
    "wean2",
];

const SCORE: OptionSpec = OptionSpec {
    name: "score",
    kind: OptionKind::Choice(&SCORES),
    default: Some("mone-frequency"),
    help: "the lowest become constants. mone-frequency: spread of the outputs (the root of the sum of their \
           variances) times N; mone-soft: spread times Σ g; the others are the scores of the methods of that name",
};

pub(super) static OPTIONS: [OptionSpec; 10] = {
    let [scope, floor, protect, protect_all_layers, propagate, ratio, lambda, m, seed] =
        prune::OPTIONS_OF_SCORES;
    [SCORE, scope, floor, protect, protect_all_layers, propagate, ratio, lambda, m, seed]
};

/// The method.
pub(super) struct Mone;

impl Method for Mone {
    fn name(&self) -> &'static str {
        NAME
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "MoNE: Replacing Redundant Experts with Lightweight Novices for Structured Pruning of MoE",
            arxiv: "2507.00390",
        })
    }

    fn description(&self) -> &'static str {
        "replaces the experts of the lowest score by their mean output; the router stays as it is"
    }

    fn needs(&self) -> Needs {
        Needs { statistics: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        check::profile(request.profile)?;
        let options = options::resolve(NAME, &OPTIONS, request.options)?;
        selection(&options).plan(request, &options)
    }
}

/// What the options choose. The factor 1/T of the paper's scores is the same for all experts and left out.
pub(super) fn selection(options: &Options) -> Selection {
    let named = SCORES.into_iter().find(|name| options::is(options, "score", name));
    let rule = match named {
        Some("mone-soft") => Rule::Spread(Moment::GateSum),
        Some(name) => prune::rule(name).unwrap_or(Rule::Spread(Moment::Count)),
        None => Rule::Spread(Moment::Count),
    };
    Selection { method: NAME, rule, action: Action::Constant }
}
