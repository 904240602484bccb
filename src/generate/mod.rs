//! Text from a prompt, token by token: choosing tokens, knowing when to stop, and turning them into text as they come.

mod detokenise;
mod error;
mod sample;
mod stop;

pub use detokenise::Detokeniser;
pub use error::Error;
pub use sample::{Sampler, Sampling};
pub use stop::{end_tokens, start_token};

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::model::Decoder;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the text: see [`end_tokens`].
    pub end_tokens: Vec<u32>,
    /// Where an encoder reads the prompt: the token that the decoder begins with, see [`start_token`]. `None` in a
    /// decoder-only model, which continues the prompt.
    pub start_token: Option<u32>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A token that ends the text was chosen.
    EndToken,
    /// As many tokens as were asked for.
    MaxTokens,
    /// Whoever received the tokens had enough.
    Receiver,
}

/// What was generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The new tokens, without the one that ended the text.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
    /// Time from the prompt to the logits behind it.
    pub prefill: Duration,
    /// Passes over one token that followed.
    pub decoded: usize,
    /// Time that they took, the choices included.
    pub decode: Duration,
}

/// Positions that a prompt of `prompt` tokens and `max_tokens` new ones take: the last new token needs none.
///
/// # Errors
/// There are only `most`.
pub fn positions(prompt: usize, max_tokens: usize, most: usize) -> Result<usize> {
    match prompt.checked_add(max_tokens.saturating_sub(1)) {
        Some(length) if length <= most => Ok(length),
        _ => Err(Error::TooLong { prompt, max_tokens, most }),
    }
}

/// Continues `prompt`, or has an encoder read it and the decoder answer: the prompt as one batch, then token by token.
/// `receive` gets each new token as it is chosen.
///
/// # Errors
/// A prompt without tokens or with ids outside the vocabulary; more tokens than the model was made for; logits that are
/// not finite, and then the tensor that is not, if one is.
pub fn generate<B: Backend>(
    decoder: &Decoder<'_, B>,
    prompt: &[u32],
    options: &Options,
    mut receive: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut sampler = Sampler::new(options.sampling)?;
    let start = Instant::now();
    let (mut sequence, first) = match options.start_token {
        None => (decoder.sequence()?, prompt),
        Some(ref token) => (decoder.sequence_behind(prompt)?, std::slice::from_ref(token)),
    };
    positions(first.len(), options.max_tokens, decoder.model().length())?;
    let mut logits = sequence.extend(first)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    let mut generation =
        Generation { ids: Vec::new(), stop: Stop::MaxTokens, prefill, decoded: 0, decode: Duration::ZERO };
    while generation.ids.len() < options.max_tokens {
        let Some(id) = sampler.choose(logits) else {
            decoder.check_finite()?;
            return Err(Error::NotFinite { position: first.len() + generation.ids.len() });
        };
        if options.end_tokens.contains(&id) {
            generation.stop = Stop::EndToken;
            break;
        }
        generation.ids.push(id);
        if receive(id).is_break() {
            generation.stop = Stop::Receiver;
            break;
        }
        if generation.ids.len() < options.max_tokens {
            logits = sequence.extend(&[id])?;
            generation.decoded += 1;
        }
    }
    generation.decode = start.elapsed();
    Ok(generation)
}
