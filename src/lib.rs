//! moepress makes mixture-of-experts language models smaller and runs the result.
//!
//! ```text
//! checkpoint ──calibrate──▶ statistics ──plan──▶ plan ──compress──▶ checkpoint ──run / eval──▶ logits, perplexity
//!  (mmap)      (tokens)      (a file)    (method,   (JSON)  (streams layer    (stock or
//!                                         budget)            by layer)         moepress layout)
//! ```
//!
//! The modules, from the ground up; each knows those above it in this list only:
//!
//! | module | holds |
//! |---|---|
//! | [`progress`] | how long work reports that it is alive |
//! | [`architecture`] | what a `config.json` says, as data; one small table per family |
//! | [`checkpoint`] | memory-mapped safetensors, sharded or not, and atomic writing |
//! | [`tokens`] | token windows, from token files or from text |
//! | [`linalg`] | truncated and whitened SVD, assignment |
//! | [`backend`] | the operations of the forward pass, the forms of an expert, and the CPU that runs them |
//! | [`model`] | the forward pass, written once for any backend, a layer at a time |
//! | [`calibrate`] | one streamed pass over tokens, and the statistics that it leaves |
//! | [`plan`] | methods: from statistics and a budget to what becomes of every expert |
//! | [`search`] | runs a model for methods that search on tokens: losses of dropping experts |
//! | [`compress`] | carries out a plan; the only place that writes weights |
//! | [`upcycle`] | dense checkpoints of one shape, made the experts of one MoE checkpoint |
//! | [`generate`] | text from a prompt, token by token |
//! | [`eval`] | perplexity, agreement with the original, multiple choice |
//! | [`recover`] | compressed experts trained towards the original's; LoRA adapters merged |
//! | [`compare`] | many methods on one model, side by side, in memory |
//! | `ffi` | the C interface of GPU layers, `include/moepress.h` |
//!
//! The whole chain in a few lines, as `examples/chain.rs` runs it on a model inside the repository:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use moepress::backend::cpu::Cpu;
//! use moepress::calibrate::{Options, calibrate};
//! use moepress::checkpoint::Checkpoint;
//! use moepress::compress::compress;
//! use moepress::model::Model;
//! use moepress::plan::{Budget, Request, method};
//! use moepress::tokens::{Bos, Tokenizer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open("OLMoE-1B-7B-0924")?;
//! let windows = Tokenizer::open(checkpoint.dir(), Bos::Auto)?.windows(&["my.txt".into()], 2048)?;
//! let model = Model::new(&checkpoint, &Cpu, 2048)?;
//! let statistics = calibrate(&model, &windows, &Options::default(), Path::new("olmoe.stats"), &mut ())?;
//! let plan = method("reap")?.plan(&Request {
//!     statistics: Some(&statistics.first_moments()?),
//!     budget: Some(Budget::remove(0.25)?),
//!     options: &Default::default(),
//!     ..Request::new(statistics.profile())
//! })?;
//! compress(&model, &plan, &Default::default(), Path::new("OLMoE-75"), &mut ())?;
//! # Ok(())
//! # }
//! ```

pub mod architecture;
pub mod backend;
pub mod calibrate;
pub mod checkpoint;
pub mod compare;
pub mod compress;
pub mod eval;
#[cfg(feature = "cuda")]
pub mod ffi;
pub mod generate;
pub mod linalg;
pub mod model;
pub mod plan;
pub mod progress;
mod random;
pub mod recover;
pub mod search;
pub mod tokens;
pub mod upcycle;
