use std::path::PathBuf;

/// What can go wrong while recovering.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// A file.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The residual stream on disk.
    #[error(transparent)]
    Calibrate(#[from] crate::calibrate::Error),
    /// The output folder.
    #[error(transparent)]
    Compress(#[from] crate::compress::Error),
    /// Two checkpoints of which one was not made from the other.
    #[error("{}: {what}", compressed.display())]
    Pair {
        /// Folder of the compressed checkpoint.
        compressed: PathBuf,
        /// How it differs from the original.
        what: String,
    },
    /// Options or tokens that nothing can be done with.
    #[error("{0}")]
    Request(String),
    /// Equations without a solution.
    #[error("layer {layer}: expert {expert}: {source}")]
    LeastSquares {
        /// The layer.
        layer: usize,
        /// Its expert.
        expert: usize,
        /// What is wrong.
        source: crate::linalg::Error,
    },
    /// Activations that are not finite.
    #[error(
        "layer {layer}: the experts' outputs are not finite; expected weights that stay in the range of f32"
    )]
    NonFinite {
        /// The layer.
        layer: usize,
    },
    /// An adapter that cannot be merged.
    #[error("{}: {what}", path.display())]
    Adapter {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
}

impl From<crate::backend::Error> for Error {
    fn from(error: crate::backend::Error) -> Self {
        Error::Model(error.into())
    }
}
