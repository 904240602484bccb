//! The methods: from sizes, statistics and a budget to a plan.

mod channels;
mod delta;
mod low_rank;
mod merge;
mod moe_i2;
mod mone;
mod naee;
mod prune;
mod router_norm;
mod selection;
mod skip;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::file::StatisticsRef;
use super::options::OptionKind;
use super::{Budget, Error, FactorDtype, LossSource, OptionSpec, OutlierSource, Plan, Projection, Result};
use crate::architecture::Profile;
use crate::backend::Moments;

pub use merge::regroup_layer;
pub use router_norm::RouterSource;
pub use selection::rescore_layer;

/// The option `factor_dtype`, which [`Costs::of_options`](super::costs::Costs::of_options) reads.
const FACTOR_DTYPE: OptionSpec = OptionSpec {
    name: "factor_dtype",
    kind: OptionKind::Choice(&FactorDtype::NAMES),
    default: Some("auto"),
    help: "number type of the factors; auto: that of the weights",
};

/// The option `propagate` of methods that choose nothing anew on the way.
const PROPAGATE: OptionSpec = OptionSpec {
    name: "propagate",
    kind: OptionKind::Flag,
    default: Some("false"),
    help: "while compressing, measure each layer again behind the compressed ones before it",
};

/// The publication that a method comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// Its title.
    pub title: &'static str,
    /// Its arXiv identifier, such as `2510.13999`.
    pub arxiv: &'static str,
}

/// What a method needs besides the sizes of the checkpoint, with its default options.
#[allow(clippy::struct_excessive_bools, reason = "each is a need of its own")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Statistics of calibration tokens, for the plan.
    pub statistics: bool,
    /// Second moments, when the plan is carried out: in the statistics, or measured from tokens given then.
    pub second_moments: bool,
    /// The tokens themselves, for the plan.
    pub tokens: bool,
    /// Another checkpoint, which an option names.
    pub checkpoint: bool,
}

/// Spectra of expert matrices, from whoever owns the weights.
pub trait SpectrumSource {
    /// Squared singular values (or eigenvalues of the whitened W C Wᵀ) of one matrix, largest first, at most
    /// min(rows, columns) of them. `layer` is the 0-based decoder layer.
    ///
    /// # Errors
    /// A message that says what failed.
    fn spectrum(&self, layer: usize, expert: usize, matrix: Projection) -> Result<Vec<f64>, String>;
}

/// What a plan is asked for.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Sizes of the checkpoint.
    pub profile: &'a Profile,
    /// Moments of every MoE layer, in the order of [`Profile::moe_layers`].
    pub statistics: Option<&'a [Moments]>,
    /// Where the statistics come from, for the plan's record.
    pub source: Option<&'a StatisticsRef>,
    /// How small the checkpoint is to become; `None` where an option says it.
    pub budget: Option<Budget>,
    /// Options as given, `KEY=VALUE`.
    pub options: &'a BTreeMap<String, String>,
    /// Spectra, for options that allocate ranks by them.
    pub spectra: Option<&'a dyn SpectrumSource>,
    /// Losses, for methods that search on the tokens themselves.
    pub losses: Option<&'a dyn LossSource>,
    /// Outliers of the weights, for `layer_ratio=owl`.
    pub outliers: Option<&'a dyn OutlierSource>,
    /// Norms of router rows, for `router-norm`.
    pub routers: Option<&'a dyn RouterSource>,
}

impl<'a> Request<'a> {
    /// A request for the checkpoint of `profile` with nothing else given; the rest goes around it:
    /// `Request { budget, ..Request::new(profile) }`.
    pub fn new(profile: &'a Profile) -> Self {
        static NO_OPTIONS: BTreeMap<String, String> = BTreeMap::new();
        Request {
            profile,
            statistics: None,
            source: None,
            budget: None,
            options: &NO_OPTIONS,
            spectra: None,
            losses: None,
            outliers: None,
            routers: None,
        }
    }
}

/// One way of making a plan.
pub trait Method: Sync {
    /// Its name on the command line and in the plan.
    fn name(&self) -> &'static str;

    /// Where it comes from; `None` for what needs no source.
    fn paper(&self) -> Option<Paper>;

    /// What it does, on one line.
    fn description(&self) -> &'static str;

    /// What it needs.
    fn needs(&self) -> Needs;

    /// The options it takes.
    fn options(&self) -> &'static [OptionSpec];

    /// Makes the plan.
    ///
    /// # Errors
    /// [`Error::UnknownOption`] and [`Error::Option`] for the options, [`Error::Budget`] for a budget that
    /// cannot be met, [`Error::Statistics`] and [`Error::Spectrum`] for what was measured, [`Error::Profile`]
    /// for sizes that contradict each other.
    fn plan(&self, request: &Request<'_>) -> Result<Plan>;
}

static METHODS: LazyLock<Vec<&'static dyn Method>> = LazyLock::new(|| {
    let prune = prune::METHODS.iter().map(|m| m as &dyn Method);
    let merge: [&dyn Method; 4] = [&merge::M_SMOE, &merge::MC_SMOE, &merge::HcSmoe, &merge::Ream];
    let channels = channels::METHODS.iter().map(|m| m as &dyn Method);
    let rest: [&dyn Method; 6] = [
        &router_norm::RouterNorm,
        &mone::Mone,
        &naee::Naee,
        &low_rank::LowRank,
        &delta::Delta,
        &moe_i2::MoeI2,
    ];
    prune.chain(rest).chain(channels).chain(merge).collect()
});

/// Every method.
pub fn methods() -> &'static [&'static dyn Method] {
    &METHODS
}

/// The method of this name.
///
/// # Errors
/// [`Error::Method`], which lists all names.
pub fn method(name: &str) -> Result<&'static dyn Method> {
    let found = METHODS.iter().find(|m| m.name() == name).copied();
    found.ok_or_else(|| {
        let known = METHODS.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ");
        Error::Method { name: name.into(), known }
    })
}
