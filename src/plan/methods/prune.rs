//! Expert pruning: every expert gets a score, those with the lowest are dropped.

use super::selection::Selection;
use super::{Method, Needs, Paper, Request};
use crate::backend::Moment;
use crate::plan::check;
use crate::plan::options::{self, OptionKind};
use crate::plan::owl;
use crate::plan::score::Rule;
use crate::plan::{Action, OptionSpec, Plan, Result};

/// A method that scores experts.
pub(super) struct Prune {
    name: &'static str,
    rule: Rule,
    paper: Option<Paper>,
    description: &'static str,
}

const UNIFIED: Paper = Paper {
    title: "How to Score Experts for One-Shot MoE Expert Pruning: A Unified Formulation and Selection Principle",
    arxiv: "2606.15716",
};
const SEER: Paper = Paper {
    title: "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
    arxiv: "2404.05089",
};
const FANTASTIC: Paper = Paper {
    title: "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies and Observations",
    arxiv: "2504.05586",
};
const REAP: Paper = Paper {
    title: "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    arxiv: "2510.13999",
};

/// The rule of the score called `name`.
pub(super) fn rule(name: &str) -> Option<Rule> {
    METHODS.iter().find(|m| m.name == name).map(|m| m.rule)
}

/// The scores. `N` tokens are routed to the expert, `g` is its combine weight and `f` its output for one of
/// them.
pub(super) static METHODS: [Prune; 11] = [
    Prune {
        name: "random",
        rule: Rule::Random,
        paper: None,
        description: "drops experts at random (ChaCha8): the baseline that every score should beat",
    },
    Prune {
        name: "frequency",
        rule: Rule::Sum(Moment::Count),
        paper: Some(UNIFIED),
        description: "drops the experts with the fewest routed tokens: N",
    },
    Prune {
        name: "seer-hard",
        rule: Rule::Sum(Moment::Count),
        paper: Some(SEER),
        description: "SEER-MoE's actual counts: the same score as frequency, N",
    },
    Prune {
        name: "seer-soft",
        rule: Rule::Sum(Moment::SoftCount),
        paper: Some(SEER),
        description: "SEER-MoE's soft counts: the sum of the router's scores over all tokens, routed here or not",
    },
    Prune {
        name: "soft",
        rule: Rule::Sum(Moment::GateSum),
        paper: Some(UNIFIED),
        description: "drops the experts with the least combine weight: Σ g",
    },
    Prune {
        name: "ean",
        rule: Rule::Sum(Moment::NormSum),
        paper: Some(FANTASTIC),
        description: "expert activation norm: Σ ‖f‖",
    },
    Prune {
        name: "man",
        rule: Rule::Mean(Moment::NormSum),
        paper: Some(UNIFIED),
        description: "mean activation norm: Σ ‖f‖ / N",
    },
    Prune {
        name: "msan",
        rule: Rule::Mean(Moment::NormSqSum),
        paper: Some(UNIFIED),
        description: "mean squared activation norm: Σ ‖f‖² / N",
    },
    Prune {
        name: "reap",
        rule: Rule::Mean(Moment::GateNormSum),
        paper: Some(REAP),
        description: "router-weighted activation: Σ g‖f‖ / N",
    },
    Prune {
        name: "wean",
        rule: Rule::Sum(Moment::GateNormSum),
        paper: Some(UNIFIED),
        description: "weighted activation norm: Σ g‖f‖",
    },
    Prune {
        name: "wean2",
        rule: Rule::Sum(Moment::GateNormSqSum),
        paper: Some(UNIFIED),
        description: "weighted squared activation norm: Σ g²‖f‖²",
    },
];

/// The options of every score; the last one is for `random` alone.
pub(super) const OPTIONS_OF_SCORES: [OptionSpec; 9] = [
    OptionSpec {
        name: "scope",
        kind: OptionKind::Choice(&["layer", "global"]),
        default: Some("layer"),
        help: "layer: every layer loses the same share; global: the lowest scores of the whole model go",
    },
    OptionSpec {
        name: "floor",
        kind: OptionKind::Integer(1),
        default: None,
        help: "fewest experts left in a layer; where not given, as many as are chosen per token",
    },
    OptionSpec {
        name: "protect",
        kind: OptionKind::Choice(&["none", "super"]),
        default: Some("none"),
        help: "super: never drop experts whose outputs reach extreme values (arXiv 2507.23279)",
    },
    OptionSpec {
        name: "protect_all_layers",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "protect=super in all layers, not only in the first three quarters",
    },
    OptionSpec {
        name: "propagate",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "while compressing, measure each layer again behind the compressed ones before it, and choose anew",
    },
    owl::OPTIONS[0],
    owl::OPTIONS[1],
    owl::OPTIONS[2],
    OptionSpec {
        name: "seed",
        kind: OptionKind::Integer(0),
        default: Some("0"),
        help: "seed of the generator",
    },
];

static OPTIONS: [OptionSpec; 9] = OPTIONS_OF_SCORES;

impl Method for Prune {
    fn name(&self) -> &'static str {
        self.name
    }

    fn paper(&self) -> Option<Paper> {
        self.paper
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn needs(&self) -> Needs {
        Needs { statistics: self.rule != Rule::Random, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        match self.rule {
            Rule::Random => &OPTIONS,
            _ => &OPTIONS[..8],
        }
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        check::profile(request.profile)?;
        let options = options::resolve(self.name, self.options(), request.options)?;
        self.selection().plan(request, &options)
    }
}

impl Prune {
    /// What it drops.
    pub(super) fn selection(&self) -> Selection {
        Selection { method: self.name, rule: self.rule, action: Action::Drop }
    }
}
