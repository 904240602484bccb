//! Many methods on one model, side by side: calibrated once, compressed in memory, evaluated on the same tokens.
//!
//! Every variant advances through the model together with the original, a layer at a time. A variant's experts exist
//! while its layer is being run; what stays is its residual stream of the evaluation tokens. Nothing is written.

mod error;
mod plot;
mod run;

pub use error::Error;
pub use plot::plot;
pub use run::{Baseline, Candidate, Comparison, Measured, Request, Row, Seconds, compare};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
