use std::path::PathBuf;

/// What can go wrong in an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The token that a decoder begins with.
    #[error(transparent)]
    Start(#[from] crate::generate::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// The device.
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
    /// The token windows or the tokeniser.
    #[error(transparent)]
    Tokens(#[from] crate::tokens::Error),
    /// Windows that predict nothing.
    #[error(
        "{file}: no token is predicted; expected windows with at least two neighbouring tokens that count"
    )]
    NothingPredicted {
        /// The input file.
        file: String,
    },
    /// Two models that cannot be compared.
    #[error(
        "{}: a vocabulary of {original} cannot be compared with {}, whose vocabulary has {model}; expected the model \
         that the other was made from", original_dir.display(), dir.display()
    )]
    Vocabulary {
        /// Folder of the model.
        dir: PathBuf,
        /// Its vocabulary.
        model: usize,
        /// Folder of the original.
        original_dir: PathBuf,
        /// Its vocabulary.
        original: usize,
    },
    /// A model whose forward pass leaves the range of f32.
    #[error("{}: {place}: the logits are not finite; expected weights that stay in the range of f32", dir.display())]
    NonFinite {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The window and position, or the question and choice.
        place: String,
    },
    /// A file of questions that cannot be read.
    #[error("{}: {what}", path.display())]
    Questions {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A question that cannot be asked.
    #[error("{}: line {line}: {what}", path.display())]
    Question {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong and what would be right.
        what: String,
    },
}
