//! One MoE checkpoint from several dense ones of one shape, usually a model and copies of it that were trained further on a
//! domain each. Their MLPs become the experts; everything else becomes its mean. Routers are new, so the result is there
//! to be trained.
//!
//! * [`Target::Mixtral`]: Branch-Train-Mix (BTX, arXiv 2403.07816, §3.2), as a stock Mixtral checkpoint.
//! * [`Target::Bam`]: Branch-Attend-Mix (BAM, arXiv 2408.08274, §3): attentions become experts as well, which all run and
//!   are mixed by a softmax; one MLP runs per token, its weight as the router says.

mod config;
mod dense;
mod error;
mod run;
mod tensors;

pub use error::Error;
pub use run::{Options, Report, RouterStart, Target, upcycle};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
