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
    /// A model with an encoder that has nothing to read, or one without an encoder that has.
    #[error("{family} has {} encoder: its texts begin {} one to read", a(*.has), if *.has { "behind" } else { "without" })]
    Encoder {
        /// Its family.
        family: &'static str,
        /// Whether it has an encoder.
        has: bool,
    },
    /// The token windows.
    #[error(transparent)]
    Tokens(#[from] crate::tokens::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
}

fn a(has: bool) -> &'static str {
    if has { "an" } else { "no" }
}
