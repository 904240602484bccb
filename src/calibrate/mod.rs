//! One streamed pass over token windows, and what it measures: the sums of [`Moment`] for every MoE layer, in a file
//! from which every method plans.

mod error;
mod pass;
mod resume;
mod sample;
mod statistics;

pub use error::Error;
pub(crate) use pass::check_finite;
pub use pass::{Options, calibrate, measure, second_moment_bytes};
pub use resume::Residual;
pub use sample::Sample;
pub use statistics::{LayerUsage, Statistics, TokenInfo};

use crate::backend::Moment;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Name of a second moment on the command line: `input`, `gate-input`, `hidden` or `gate-hidden`.
pub fn second_moment(name: &str) -> Option<Moment> {
    match name {
        "input" => Some(Moment::InputGram),
        "gate-input" => Some(Moment::GateInputGram),
        "hidden" => Some(Moment::HiddenGram),
        "gate-hidden" => Some(Moment::GateHiddenGram),
        _ => None,
    }
}
