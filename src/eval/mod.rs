//! How good a model is: perplexity, agreement with the original it was made from, and multiple-choice questions.
//!
//! Everything streams: text passes in waves of whole windows, and a wave advances through the model a layer at a
//! time. Memory grows neither with the amount of text nor with the depth of the model.

mod error;
mod multiple_choice;
mod perplexity;
mod questions;
mod sequences;
mod skipping;
mod softmax;
mod streams;
mod wave;

pub use error::Error;
pub use multiple_choice::{MultipleChoice, Prediction, multiple_choice};
pub use perplexity::{Against, Evaluation, FileScore, Score, against, perplexity};
pub use questions::{Question, Questions};
pub use skipping::{LayerSkipping, Skipping};
pub use streams::{StreamScore, check_windows, score_streams};
pub use wave::TOKENS_PER_WAVE;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
