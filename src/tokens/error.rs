use std::path::PathBuf;

/// What can be wrong with token windows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read as safetensors.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The token file holds something else.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A token that the model does not know.
    #[error(
        "token id {id} in window {window} at position {position} is outside the vocabulary of {vocabulary}"
    )]
    IdOutOfRange {
        /// The id.
        id: i64,
        /// Its window.
        window: usize,
        /// Its place in the window.
        position: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Windows for the encoder alone.
    #[error(
        "{family} has an encoder and a decoder: its windows need decoder_ids beside ids, int32 [windows, decoder length], \
         in a token file"
    )]
    NoDecoderIds {
        /// Family of the model.
        family: &'static str,
    },
    /// Windows for a decoder behind an encoder.
    #[error("{family} has no encoder, but the token file has decoder_ids; leave them out")]
    NoEncoder {
        /// Family of the model.
        family: &'static str,
    },
    /// Fields of windows that contradict each other.
    #[error("ids, mask, decoder and files do not all belong to {count} windows of {length} tokens")]
    Inconsistent {
        /// Windows.
        count: usize,
        /// Tokens per window.
        length: usize,
    },
    /// A text without tokens.
    #[error("there are no tokens to begin with")]
    NoTokens,
    /// A text longer than the model was prepared for.
    #[error("a text of {length} tokens is longer than the {most} that the model was prepared for")]
    TextTooLong {
        /// Its tokens.
        length: usize,
        /// What fits.
        most: usize,
    },
    /// A text file without a whole window.
    #[error("{}: gives {tokens} tokens, too few for one window of {length}", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its tokens.
        tokens: usize,
        /// Tokens per window.
        length: usize,
    },
    /// Windows longer than the model's positions.
    #[error(
        "windows of {length} tokens are longer than the model's {max_positions} positions; choose --window-length \
         {max_positions} or less"
    )]
    TooLong {
        /// Tokens per window.
        length: usize,
        /// What the model covers.
        max_positions: usize,
    },
}
