use std::path::PathBuf;

/// What can go wrong while calibrating, or with a statistics file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// A file.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// A statistics file that does not hold what it should.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// Statistics that cannot be added up.
    #[error("the statistics do not add up: {0}")]
    Mismatch(String),
    /// A measured value that is NaN or infinite.
    #[error("layer {layer}: {moment} of expert {expert} is {value}; the activations overflowed")]
    NonFinite {
        /// The layer.
        layer: usize,
        /// Which sum.
        moment: &'static str,
        /// The expert.
        expert: usize,
        /// Its value.
        value: f64,
    },
}

impl From<crate::backend::Error> for Error {
    fn from(error: crate::backend::Error) -> Self {
        Error::Model(error.into())
    }
}
