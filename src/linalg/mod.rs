//! Factorisations of expert weights: two thin matrices in place of one, chosen so that as little as possible is lost,
//! in the weight itself ([`truncated_svd`]) or on the data that the expert sees ([`whitened_svd`]). And which neuron of
//! one expert corresponds to which of another ([`assignment`]).
//!
//! A weight W is `[out, in]`, row by row, as a checkpoint stores it, and an output is W x. Everything is computed in
//! f64, except where [`low_rank`] finds that f32 is enough. Every function gives the same bytes on any number of threads
//! ([`Threads`]); [`low_rank`] says how many it may use, the decompositions with a spectrum use all, and the others one.
#![forbid(unsafe_code)]

mod assignment;
mod channels;
mod dense;
mod divide;
mod eigen;
mod error;
mod matrix;
mod merge;
mod rank;
mod refit;
mod secular;
mod single;
mod svd;
#[cfg(test)]
mod tests;
mod threads;
mod tridiagonal;
mod whitened;

pub use assignment::assignment;
pub use channels::{Refit, refit_columns, regression_base, ridge_leverage};
pub use eigen::{Eigen, symmetric_eigen};
pub use error::Error;
pub use matrix::Matrix;
pub use rank::{break_even_rank, is_worthwhile, rank_for_energy, rank_for_keep};
pub(crate) use refit::solve as solve_semidefinite;
pub use refit::{refit_left, refit_right};
pub(crate) use refit::{refit_left_on, refit_right_on};
pub use svd::{Factors, LowRank, low_rank, spectrum, truncated_svd};
pub use threads::Threads;
pub use whitened::{data_loss, whitened_svd};
