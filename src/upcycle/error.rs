use std::path::PathBuf;

use crate::{calibrate, checkpoint, compress, model};

/// What can go wrong while making a MoE checkpoint of dense ones.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dense checkpoint that cannot be used, or not beside the others.
    #[error("{}: {what}", path.display())]
    Dense {
        /// The folder, or the file in it.
        path: PathBuf,
        /// What is wrong and what would do.
        what: String,
    },
    /// What was asked for does not go together.
    #[error("{0}")]
    Choice(String),
    /// A file, or the new folder.
    #[error(transparent)]
    Output(#[from] compress::Error),
}

impl From<checkpoint::Error> for Error {
    fn from(error: checkpoint::Error) -> Self {
        compress::Error::from(error).into()
    }
}

impl From<calibrate::Error> for Error {
    fn from(error: calibrate::Error) -> Self {
        compress::Error::from(error).into()
    }
}

impl From<model::Error> for Error {
    fn from(error: model::Error) -> Self {
        compress::Error::from(error).into()
    }
}
