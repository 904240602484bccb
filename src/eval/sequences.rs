//! Questions as token sequences, and sequences as padded windows.

use super::wave::{Place, TOKENS_PER_WAVE};
use super::{Error, Question, Questions, Result};
use crate::model::TOKENS_PER_CHUNK;
use crate::tokens::{SourceFile, Tokenizer, Windows};

/// The context of a question and one of its choices, as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    /// Line of the question in its file.
    pub(super) line: usize,
    /// Index of the choice.
    pub(super) choice: usize,
    /// What an encoder reads; empty in a decoder-only model.
    pub(super) source: Vec<u32>,
    /// Context and choice, cut from the left where they are too long; behind an encoder, the decoder's start token and the
    /// choice.
    pub(super) ids: Vec<u32>,
    /// Tokens of the choice, at the end of `ids`; at least one, and at least one token is before them.
    pub(super) choice_tokens: usize,
    /// Whether the beginning was cut off.
    pub(super) truncated: bool,
}

impl Sequence {
    /// Tokens that pass the model: all but the last, which is only predicted.
    pub(super) fn input(&self) -> &[u32] {
        &self.ids[..self.ids.len() - 1]
    }

    /// Tokens that a window has to hold.
    pub(super) fn length(&self) -> usize {
        self.source.len().max(self.input().len())
    }
}

/// Sequences of every choice of every question, in order.
///
/// Tokens are found as lm-eval finds them (`_encode_pair`): white space at the end of the context moves to the choice;
/// both are encoded together and the context alone; the tokens of the choice are those of both beyond as many as the
/// context has. Documents begin with BOS where the tokeniser has one; an empty context is BOS alone. At most
/// `max_positions` tokens pass the model, the last ones. With a `start` token the context is the encoder's, with the special
/// tokens that the tokeniser puts around it, and the choice alone follows the start token.
///
/// # Errors
/// Names the question and the choice that cannot be scored.
pub(super) fn encode(
    questions: &Questions,
    tokenizer: &Tokenizer,
    vocabulary: usize,
    max_positions: usize,
    start: Option<u32>,
) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    for question in &questions.questions {
        for (i, choice) in question.choices.iter().enumerate() {
            let invalid = |what: String| Error::Question {
                path: questions.path.clone(),
                line: question.line,
                what: format!("choice {i} {what}"),
            };
            let (source, mut ids, choice_tokens) = match start {
                None => {
                    let (ids, choice_tokens) = pair(question, choice, tokenizer)?;
                    (Vec::new(), ids, choice_tokens)
                }
                Some(start) => {
                    let own = tokenizer.encode(choice)?;
                    let source = tokenizer.encode_source(&question.context)?;
                    if source.is_empty() {
                        return Err(invalid("follows an empty context; expected one for the encoder".into()));
                    }
                    (source, [&[start], &own[..]].concat(), own.len())
                }
            };
            if choice_tokens == 0 {
                let what = match start {
                    None => {
                        "merges with the context and has no token of its own; a choice should begin with a space"
                    }
                    Some(_) => "gives no token",
                };
                return Err(invalid(what.into()));
            }
            if choice_tokens == ids.len() {
                return Err(invalid(
                    "follows an empty context, and the tokenizer has no beginning-of-sequence token to predict it \
                     from; expected a context"
                        .into(),
                ));
            }
            if choice_tokens > max_positions {
                return Err(invalid(format!(
                    "has {choice_tokens} tokens, more than the model's {max_positions} positions"
                )));
            }
            if let Some(id) = ids.iter().chain(&source).find(|id| **id as usize >= vocabulary) {
                return Err(invalid(format!("gives token id {id}, outside the vocabulary of {vocabulary}")));
            }
            let cut = ids.len().saturating_sub(max_positions.saturating_add(1));
            ids.drain(..cut);
            sequences.push(Sequence {
                line: question.line,
                choice: i,
                source,
                ids,
                choice_tokens,
                truncated: cut > 0,
            });
        }
    }
    Ok(sequences)
}

/// Tokens of context and choice, and how many of them are the choice's.
fn pair(question: &Question, choice: &str, tokenizer: &Tokenizer) -> Result<(Vec<u32>, usize)> {
    let context = question.context.trim_end();
    let space = &question.context[context.len()..];
    let ids = tokenizer.encode_document(&format!("{context}{space}{choice}"))?;
    let context_tokens = tokenizer.encode_document(context)?.len();
    let choice_tokens = ids.len().saturating_sub(context_tokens);
    Ok((ids, choice_tokens))
}

/// Sequences of about one length, by number.
type Part = Vec<usize>;

/// Groups sequences, given the lengths of their inputs, into waves of at most [`TOKENS_PER_WAVE`] tokens (but at least
/// one sequence), and each wave into parts of about one length: from the longest sequence to the shortest, a new part
/// begins where the last one fills a chunk and more than an eighth of the sequence's window would be padding, and where the
/// sequence is not `alike` the longest of the part: a window counts as as long as it is padded.
pub(super) fn group(lengths: &[usize], alike: impl Fn(usize, usize) -> bool) -> Vec<Vec<Part>> {
    let mut order: Part = (0..lengths.len()).collect();
    order.sort_by_key(|&s| (std::cmp::Reverse(lengths[s]), s));
    let mut waves: Vec<Vec<Part>> = Vec::new();
    let (mut tokens, mut longest) = (0, 0);
    for s in order {
        let length = lengths[s];
        let part = waves.last().and_then(|wave| wave.last());
        let fits = |p: &Part| p.len() * longest < TOKENS_PER_CHUNK || length * 8 >= longest * 7;
        let joins = part.is_some_and(|p| fits(p) && alike(length, longest));
        let width = if joins { longest } else { length };
        match waves.last_mut().filter(|_| tokens + width <= TOKENS_PER_WAVE) {
            None => {
                waves.push(vec![vec![s]]);
                (tokens, longest) = (length, length);
            }
            Some(wave) => {
                (tokens, longest) = (tokens + width, width);
                match wave.last_mut().filter(|_| joins) {
                    Some(part) => part.push(s),
                    None => wave.push(vec![s]),
                }
            }
        }
    }
    waves
}

/// The sequences of a part as windows padded on the right, which attention, being causal, never sees; in an encoder the
/// mask hides it.
pub(super) fn windows(sequences: &[Sequence], part: &[usize]) -> Windows {
    let own = padded(part, |s| sequences[s].input());
    let source = padded(part, |s| &sequences[s].source);
    if source.length == 0 { own } else { Windows { decoder: Some(Box::new(own)), ..source } }
}

fn padded<'s>(part: &[usize], tokens: impl Fn(usize) -> &'s [u32]) -> Windows {
    let length = part.iter().map(|&s| tokens(s).len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(part.len() * length);
    let mut mask = Vec::with_capacity(part.len() * length);
    for &s in part {
        let input = tokens(s);
        let padding = length - input.len();
        ids.extend_from_slice(input);
        ids.extend(std::iter::repeat_n(0, padding));
        mask.extend(std::iter::repeat_n(true, input.len()));
        mask.extend(std::iter::repeat_n(false, padding));
    }
    Windows {
        ids,
        mask: mask.contains(&false).then_some(mask),
        count: part.len(),
        length,
        files: vec![SourceFile { name: "questions".into(), windows: part.len() }],
        decoder: None,
    }
}

/// The positions of a wave that predict the tokens of choices.
pub(super) fn places(sequences: &[Sequence], wave: &[Part]) -> Vec<Place> {
    let mut places = Vec::new();
    let mut first_row = 0;
    for part in wave {
        let length = part.iter().map(|&s| sequences[s].input().len()).max().unwrap_or(0);
        for &s in part {
            let Sequence { ids, choice_tokens, .. } = &sequences[s];
            let context_tokens = ids.len() - choice_tokens;
            places.extend((context_tokens..ids.len()).map(|position| Place {
                row: first_row + position - 1,
                target: ids[position],
                owner: s,
            }));
            first_row += length;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_every_sequence_once_within_bounds() {
        let lengths: Vec<usize> = (0..5000).map(|i| 1 + (i * 7919) % 300).collect();
        let waves = group(&lengths, |_, _| true);
        let mut seen: Vec<usize> = waves.iter().flatten().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
        let padded = |part: &Part| part.len() * part.iter().map(|&s| lengths[s]).max().unwrap();
        for wave in &waves {
            assert!(wave.iter().map(padded).sum::<usize>() <= TOKENS_PER_WAVE);
        }
        let total: usize = waves.iter().flatten().map(padded).sum();
        assert!(total * 7 <= lengths.iter().sum::<usize>() * 8, "more than an eighth is padding");
        assert!(waves.len() <= total / TOKENS_PER_WAVE + 2);
    }

    #[test]
    fn a_sequence_longer_than_a_wave_stands_alone() {
        let waves = group(&[3, TOKENS_PER_WAVE + 1, 2], |_, _| true);
        assert_eq!(waves, [vec![vec![1]], vec![vec![0, 2]]]);
        assert!(group(&[], |_, _| true).is_empty());
    }

    /// A rotation that changes beyond 10 tokens, and one that follows the length from there on.
    #[test]
    fn sequences_that_are_rotated_differently_are_kept_apart() {
        let lengths = [9, 11, 12, 12, 10];
        let waves = group(&lengths, |a, b| (a > 10) == (b > 10));
        assert_eq!(waves, [vec![vec![2, 3, 1], vec![4, 0]]]);
        let waves = group(&lengths, |a, b| a == b || a.max(b) <= 10);
        assert_eq!(waves, [vec![vec![2, 3], vec![1], vec![4, 0]]]);
    }

    #[test]
    fn places_precede_the_tokens_of_the_choice() {
        let sequence = |ids: &[u32], choice_tokens| Sequence {
            line: 1,
            choice: 0,
            source: Vec::new(),
            ids: ids.into(),
            choice_tokens,
            truncated: false,
        };
        let sequences = [sequence(&[1, 2, 3], 1), sequence(&[4, 5, 6, 7], 2)];
        let wave = [vec![1, 0]];
        let windows = windows(&sequences, &wave[0]);
        assert_eq!((windows.length, &windows.ids[..]), (3, &[4, 5, 6, 1, 2, 0][..]));
        assert_eq!(windows.mask.unwrap(), [true, true, true, true, true, false]);
        let place = |row, target, owner| Place { row, target, owner };
        assert_eq!(places(&sequences, &wave), [place(1, 6, 1), place(2, 7, 1), place(4, 3, 0)]);
    }
}
