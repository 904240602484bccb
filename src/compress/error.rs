use std::path::PathBuf;

/// What can go wrong while compressing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// A file.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] crate::plan::Error),
    /// Statistics or a streamed pass.
    #[error(transparent)]
    Calibrate(#[from] crate::calibrate::Error),
    /// A factorisation.
    #[error("layer {layer}: expert {expert}: {matrix}: {source}")]
    Factorise {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// gate, up or down.
        matrix: &'static str,
        /// What is wrong.
        source: crate::linalg::Error,
    },
    /// An action that this version cannot carry out, or not on this expert.
    #[error("layer {layer}: expert {expert}: {what}")]
    Action {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// What is wrong and what would do.
        what: String,
    },
    /// What the plan needs is not given.
    #[error("{0}")]
    Missing(String),
    /// The layout that was asked for cannot hold the result.
    #[error("--layout hf: {0}; use --layout moepress")]
    Layout(String),
    /// The output folder.
    #[error("{}: {what}", path.display())]
    Output {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl From<crate::backend::Error> for Error {
    fn from(error: crate::backend::Error) -> Self {
        Error::Model(error.into())
    }
}
