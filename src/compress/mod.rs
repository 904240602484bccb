//! Carries out a plan: the only place that writes weights. Streams over the checkpoint a layer at a time, leaves every
//! finished layer on disk, and puts the result in place only when it is whole.

mod activations;
mod align;
mod apply;
mod channels;
mod config;
mod delta;
mod error;
mod factorise;
mod fused;
mod layout;
mod lockstep;
mod measure;
mod merge;
mod needs;
mod output;
mod run;
mod spectra;
mod weights;

pub use activations::Inputs;
pub use align::{Alignment, Matching, align};
pub use apply::{ApplyOptions, CompressedLayer, Observed, apply_layer};
pub use channels::ChannelOptions;
pub use delta::{BaseKind, BaseOptions};
pub use error::Error;
pub use factorise::{AlignBy, FactorOptions, Whitening, factorise, factorise_with_rows};
pub(crate) use layout::manifest_entry;
pub use layout::{Layout, LayoutChoice};
pub use lockstep::{Lockstep, PlannedLayer, stored_bytes};
pub(crate) use output::{Output, PLAN_FILE, RECOVERY_FILE, other_tensors, outside_layers};
pub use run::{Options, Report, compress};
pub(crate) use run::{origin_mark, take_up_finished};
pub use spectra::WeightSpectra;
pub use weights::Weights;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
