//! MoE layers on NVIDIA GPUs.
//!
//! [`availability`] says whether there is a usable GPU and never panics for lack of one; [`Device::new`] opens it and
//! loads the kernels; [`Device::stream`] wraps a stream of the caller, on which everything is enqueued. The same program
//! runs with and without a GPU, a driver, or nvcc at build time.
//!
//! A [`MoeLayer`] is prepared once, from weights on the host or on the device, and then run any number of times:
//!
//! ```no_run
//! use moepress::architecture::WeightTarget;
//! use moepress::backend::Expert;
//! use moepress::backend::cuda::{Device, Element, Forward, LayerSpec, MoeLayer, Routing, Rows};
//! use moepress::checkpoint::{Tensor, Weight};
//!
//! # fn main() -> moepress::backend::cuda::Result<()> {
//! # let experts: Vec<Expert<Weight, Tensor>> = Vec::new();
//! # let (stream, x, out, ids, weights, workspace, workspace_bytes) = (std::ptr::null_mut(), 0, 0, 0, 0, 0, 0);
//! let device = Device::new(0)?;
//! let layer = MoeLayer::new(&device, &LayerSpec {
//!     hidden: 2048,
//!     element: Element::Bf16,
//!     top_k: 4,
//!     experts: &experts,
//!     base: &[None, None, None],
//!     expert_map: None,
//!     shared: None,
//!     router: None,
//!     target: WeightTarget::Output,
//! })?;
//! // The caller's stream, and memory of layer.workspace_bytes(512)? bytes.
//! let stream = unsafe { device.stream(stream) };
//! let args = Forward {
//!     tokens: 512,
//!     x: Rows { address: x, stride: 2048 },
//!     out: Rows { address: out, stride: 2048 },
//!     routing: Routing::Given { ids, weights },
//!     residual: None,
//!     workspace,
//!     workspace_bytes,
//! };
//! unsafe { layer.forward(&stream, &args) }?;
//! # Ok(())
//! # }
//! ```
//!
//! What is launched is written once, over the trait [`Launch`], so that the tests run the whole layer on the CPU, on an
//! emulation of the kernels.

mod arena;
mod driver;
mod element;
mod error;
mod experts;
mod forward;
mod images;
mod kernels;
mod launch;
mod layer;
mod params;
mod router;
#[cfg(test)]
mod tests;
mod weights;
mod workspace;

pub use driver::{Device, DeviceBlock, Stream, availability};
pub use element::Element;
pub use error::{Error, Result, Unavailable};
pub use forward::{Forward, Routing, Rows};
pub use kernels::kernel_names;
pub use launch::{Block, Launch, Memory};
pub use layer::{LayerSpec, MoeLayer, SharedExpert};
pub use router::LayerRouter;
pub use weights::{DeviceMatrix, DeviceVector, LayerMatrix, LayerVector};
