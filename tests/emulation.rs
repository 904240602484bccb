//! The CUDA kernels, run on the CPU: the sources of `cuda/` as they are, compiled for an emulation of what they use of a
//! GPU (tests/emulation/), against f64 oracles with component-wise bounds. Skipped where there is no C++ compiler.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "emulation/definition.rs"]
mod definition;
#[path = "emulation/device.rs"]
mod device;
#[allow(dead_code, reason = "shared with the tests of the layer")]
#[path = "emulation/emulator.rs"]
mod emulator;
#[path = "emulation/failure_tests.rs"]
mod failure_tests;
#[path = "emulation/fault_tests.rs"]
mod fault_tests;
#[path = "emulation/gemm_tests.rs"]
mod gemm_tests;
#[path = "emulation/mistake_tests.rs"]
mod mistake_tests;
#[path = "emulation/oracle.rs"]
mod oracle;
#[allow(dead_code, reason = "mirrors the whole header")]
#[path = "../src/backend/cuda/params.rs"]
mod params;
#[path = "emulation/routing_tests.rs"]
mod routing_tests;
