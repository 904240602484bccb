//! Factorisations of expert weights: two thin matrices in place of one, chosen so that as little as possible is lost,
//! in the weight itself ([`truncated_svd`]) or on the data that the expert sees ([`whitened_svd`]). And which neuron of
//! one expert corresponds to which of another ([`assignment`]).
//!
//! A weight W is `[out, in]`, row by row, as a checkpoint stores it, and an output is W x. Everything is computed in
//! f64. Every function uses one thread and gives the same bytes wherever it is called from; to use more, decompose
//! several matrices at once.
#![forbid(unsafe_code)]

mod assignment;
mod dense;
mod eigen;
mod error;
mod matrix;
mod rank;
mod refit;
mod svd;
#[cfg(test)]
mod tests;
mod whitened;

pub use assignment::assignment;
pub use eigen::{Eigen, symmetric_eigen};
pub use error::Error;
pub use matrix::Matrix;
pub use rank::{break_even_rank, is_worthwhile, rank_for_energy, rank_for_keep};
pub use refit::{refit_left, refit_right};
pub use svd::{Factors, spectrum, truncated_svd};
pub use whitened::{data_loss, whitened_svd};
