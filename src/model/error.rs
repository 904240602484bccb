use std::path::PathBuf;

use crate::checkpoint::Checkpoint;

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
    /// One of the others, which does not say of itself what checkpoint it is about.
    #[error("{}: {problem}", dir.display())]
    In {
        /// The checkpoint folder.
        dir: PathBuf,
        /// What is wrong.
        problem: Box<Error>,
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

impl Error {
    /// The same with the folder of `checkpoint`, unless it names a path already.
    pub(crate) fn of(self, checkpoint: &Checkpoint) -> Self {
        let names_path = match &self {
            Error::Checkpoint(source) | Error::Layer { source, .. } => source.names_path(),
            Error::Inconsistent { .. } => false,
            _ => true,
        };
        if names_path { self } else { Error::In { dir: checkpoint.dir().into(), problem: Box::new(self) } }
    }
}

fn a(has: bool) -> &'static str {
    if has { "an" } else { "no" }
}
