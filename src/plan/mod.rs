//! Plans: what becomes of every expert of a checkpoint.
//!
//! A [`Method`] turns the sizes of a checkpoint ([`Profile`](crate::architecture::Profile)), the statistics
//! of calibration tokens ([`Moments`](crate::backend::Moments)) and a [`Budget`] into a [`Plan`]: for every
//! expert an [`Action`]. It sees sizes and statistics, never weights, and writes none. Carrying the plan out
//! is another module's work.
//!
//! ```text
//! Profile ─┐
//! Moments ─┼─▶ Method::plan ─▶ Plan ─▶ JSON
//! Budget  ─┘
//! ```
//!
//! Plans are deterministic: ties go to fixed sides, and the only random method has a seed.

mod action;
mod budget;
mod channels;
mod check;
mod costs;
mod coverage;
mod error;
mod file;
mod groups;
mod methods;
mod options;
mod owl;
mod protect;
mod read;
mod score;
mod search;
mod select;
mod size;

#[cfg(test)]
mod tests;

pub use crate::architecture::Projection;
pub use action::{Action, Channels, Ranks};
pub use budget::Budget;
pub use channels::Criterion;
pub(crate) use channels::refit;
pub(crate) use check::NOT_DENSE;
pub use costs::{Expected, FactorDtype};
pub use coverage::coverage;
pub use error::{Error, Place, Result};
pub use file::{ExpertPlan, LayerPlan, MergedRows, ModelRef, Plan, StatisticsRef, VERSION};
pub use methods::{
    Method, Needs, Paper, Request, RouterSource, SpectrumSource, method, methods, regroup_layer,
    rescore_layer,
};
pub use options::{OptionKind, OptionSpec, Options, check_options};
pub use owl::OutlierSource;
pub use score::largest;
pub use search::{
    Found, Genetic, Loss, LossRule, LossSource, Pass, RankRule, Subsets, Tails, greedy_and_swap,
    inverse_importance, ranks_by_importance,
};
pub use size::{format_size, parse_size};
