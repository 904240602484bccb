use std::path::PathBuf;

/// What can be wrong with a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint's files or tensors.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The config.
    #[error("{}: {source}", dir.display())]
    Architecture {
        /// The checkpoint folder.
        dir: PathBuf,
        /// What is wrong.
        source: crate::architecture::Error,
    },
    /// A `moepress.json` that contradicts the config.
    #[error("{}: moepress.json: {what}", dir.display())]
    Layout {
        /// The checkpoint folder.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A layer's tensors.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The layer.
        layer: usize,
        /// What is wrong.
        source: crate::checkpoint::Error,
    },
    /// A layer whose parts contradict each other.
    #[error("layer {layer}: {what}")]
    Inconsistent {
        /// The layer.
        layer: usize,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A model with an encoder, where only a decoder can be used.
    #[error("{family} has an encoder: it does not continue texts; `run` and `eval` take ids and decoder_ids")]
    HasEncoder {
        /// Its family.
        family: &'static str,
    },
    /// The token windows.
    #[error(transparent)]
    Tokens(#[from] crate::tokens::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
}
