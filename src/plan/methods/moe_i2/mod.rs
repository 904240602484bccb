//! MoE-I²: prunes experts where layers matter least, then factorises what stays by how much each expert matters.

mod job;
mod prune;
mod ranks;

use job::Job;

use super::naee::{LOSS, source};
use super::{FACTOR_DTYPE, Method, Needs, Paper, Request};
use crate::plan::check;
use crate::plan::options::{self, OptionKind};
use crate::plan::{Error, OptionSpec, Plan, Result};

/// The method.
pub(super) struct MoeI2;

static OPTIONS: [OptionSpec; 17] = [
    OptionSpec {
        name: "stage",
        kind: OptionKind::Choice(&["both", "prune", "low_rank"]),
        default: Some("both"),
        help: "prune: stage 1 alone, inter-expert pruning; low_rank: stage 2 alone, intra-expert decomposition",
    },
    OptionSpec {
        name: "ratio",
        kind: OptionKind::Fraction,
        default: None,
        help: "share of all experts that stage 1 removes; where not given 0.25, or less where that meets the budget. The \
               ranks of stage 2 come from what then remains of the budget",
    },
    OptionSpec {
        name: "rank",
        kind: OptionKind::Integer(1),
        default: None,
        help: "average rank R_a of stage 2, in place of a budget",
    },
    OptionSpec {
        name: "alpha",
        kind: OptionKind::Share,
        default: Some("0.15"),
        help: "ranks are proportional to this power of the importance of the expert; 0: all have the same",
    },
    OptionSpec {
        name: "epsilon",
        kind: OptionKind::Fraction,
        default: Some("0.00000001"),
        help: "added to the importance",
    },
    OptionSpec {
        name: "allocate",
        kind: OptionKind::Choice(&["importance", "uniform"]),
        default: Some("importance"),
        help: "importance: layers lose experts in proportion to their inverse importance; uniform: all the same share",
    },
    LOSS[0],
    LOSS[1],
    OptionSpec {
        name: "population",
        kind: OptionKind::Integer(2),
        default: Some("100"),
        help: "individuals of the genetic search",
    },
    OptionSpec {
        name: "generations",
        kind: OptionKind::Integer(0),
        default: Some("50"),
        help: "generations of the genetic search",
    },
    OptionSpec {
        name: "mutation",
        kind: OptionKind::Fraction,
        default: Some("0.3"),
        help: "probability that a child is mutated; children that were tried before always are",
    },
    OptionSpec {
        name: "seed",
        kind: OptionKind::Integer(0),
        default: Some("42"),
        help: "seed of the genetic search",
    },
    OptionSpec {
        name: "enumerate",
        kind: OptionKind::Integer(0),
        default: Some("5000"),
        help: "try all subsets of a layer that has at most so many, in place of the genetic search",
    },
    OptionSpec {
        name: "candidates",
        kind: OptionKind::Integer(1),
        default: Some("3"),
        help: "K: best subsets of each layer that are compared in its block; 1 leaves blocks out",
    },
    OptionSpec {
        name: "block",
        kind: OptionKind::Integer(1),
        default: Some("3"),
        help: "T: consecutive MoE layers of a block, whose weights are in memory together; 1 leaves blocks out",
    },
    OptionSpec {
        name: "whiten",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "factorise in the basis of the inputs, as low-rank does, in place of the plain truncated SVD",
    },
    FACTOR_DTYPE,
];

impl Method for MoeI2 {
    fn name(&self) -> &'static str {
        "moe-i2"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "MoE-I²: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert Low-Rank \
                    Decomposition",
            arxiv: "2411.01016",
        })
    }

    fn description(&self) -> &'static str {
        "prunes each layer by its importance (genetic search, compared in blocks of layers), then factorises the experts \
         that stay, with ranks by their importance"
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
        let job = Job::new(profile, options, request.budget)?;
        let source = source(self.name(), request)?;
        let importance = job.importance(source).map_err(Error::Search)?;
        let counts = job.counts(&importance)?;
        let found = job.prune(&counts, source).map_err(Error::Search)?;
        let mut layers = job.layers(&found);
        job.factorise(&mut layers, &importance)?;
        Plan::assemble(profile, self.name(), job.options, request.source.cloned(), layers, Vec::new())
    }
}
