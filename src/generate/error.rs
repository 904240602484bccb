use std::path::PathBuf;

/// What can be wrong with a request to generate text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// The tokeniser.
    #[error(transparent)]
    Tokens(#[from] crate::tokens::Error),
    /// A way of choosing that makes no sense.
    #[error("{what} is {value}, expected {expected}")]
    Sampling {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// More positions than the model was trained for.
    #[error(
        "a prompt of {} and {max_tokens} new tokens do not fit the model's {most} positions{}",
        counted(*.prompt), advice(*.prompt, *.most)
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// What fits.
        most: usize,
    },
    /// Logits that are NaN or infinite though no weight is.
    #[error("the logits of position {position} are not finite")]
    NotFinite {
        /// Position of the token to be chosen.
        position: usize,
    },
    /// A configuration file that names the end tokens wrongly.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
}

fn counted(tokens: usize) -> String {
    if tokens == 1 { "1 token".into() } else { format!("{tokens} tokens") }
}

fn advice(prompt: usize, most: usize) -> String {
    match (most + 1).checked_sub(prompt) {
        Some(left) if left > 0 => format!("; choose --max-tokens {left} or less"),
        _ => "; shorten the prompt".into(),
    }
}
