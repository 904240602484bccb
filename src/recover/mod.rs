//! Brings a compressed checkpoint back towards the one it was made from: layer-wise distillation of the experts.
//!
//! In every layer the compressed experts, with the compressed router as it is, are fitted to what the original layer's
//! feed-forward part gives on the same tokens: first the last factors in closed form, then all factors by
//! Adam, with forward and backward products of our own. What is best on held-out tokens is kept, so that no layer gets
//! worse there. Adapters that were trained elsewhere can be merged instead ([`merge_lora`]).

mod adam;
mod adapter;
mod error;
mod expert;
mod layer;
mod least_squares;
mod lora;
mod map;
mod rewrite;
mod run;
mod source;
mod sparse;
#[cfg(test)]
mod tests;
mod train;

pub use error::Error;
pub use lora::{LoraRank, LoraReport, merge_lora};
pub use run::{Input, LayerReport, Options, Report, recover};
pub use sparse::{Decomposition, Schedule};
pub use train::{LayerLoss, Training};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
