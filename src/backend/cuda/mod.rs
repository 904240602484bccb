//! MoE layers on NVIDIA GPUs.
//!
//! [`availability`] says whether there is a usable GPU and never panics for lack of one; [`Device::new`] opens it and
//! loads the kernels; [`Device::stream`] wraps a stream of the caller, on which everything is enqueued. The same program
//! runs with and without a GPU, a driver, or nvcc at build time.

mod driver;
mod error;
mod images;
mod kernels;
mod launch;

pub use driver::{Device, DeviceBlock, Stream, availability};
pub use error::{Error, Result, Unavailable};
pub use launch::{Block, Launch, Memory};
