//! Multiple choice: which of several texts does the model find most probable after the context?

use rayon::prelude::*;
use serde::Serialize;

use super::sequences::{self, Sequence};
use super::softmax::Softmax;
use super::wave::{Place, Wave};
use super::{Error, Questions, Result, Skipping};
use crate::backend::Backend;
use crate::generate::start_token;
use crate::model::Model;
use crate::progress::Progress;
use crate::tokens::Tokenizer;

/// Result of multiple-choice questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MultipleChoice {
    /// Number of questions.
    pub questions: usize,
    /// Share of questions whose right choice has the highest log-likelihood (lm-eval's `acc`).
    pub accuracy: f64,
    /// The same with every log-likelihood divided by the length of its choice in characters (lm-eval's `acc_norm`).
    pub accuracy_normalised: f64,
    /// Sequences of context and choice, one per choice, that were longer than the model's positions and lost their
    /// beginning.
    pub truncated: usize,
    /// What the model chose, question by question. Not part of the JSON form.
    #[serde(skip)]
    pub predictions: Vec<Prediction>,
}

/// What the model chose for one question; of equals, the lowest index.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Line of the question in its file, from 1.
    pub line: usize,
    /// Index of the right choice.
    pub answer: usize,
    /// Index of the choice of highest log-likelihood.
    pub chosen: usize,
    /// Index of the choice of highest log-likelihood per character.
    pub chosen_normalised: usize,
    /// Log-likelihood of every choice given the context: Σ ln p over its tokens.
    pub log_likelihoods: Vec<f64>,
}

/// Answers `questions` with `model`, as lm-eval's `multiple_choice` does. A choice is appended to its context as it is,
/// so the space between them belongs to one of the two. The length of a choice is its number of characters (Unicode
/// scalar values, as Python's `len` counts; not bytes), with a space that it begins with: for lm-eval's numbers put
/// the space at the end of the context, where lm-eval has its target delimiter.
///
/// Context and choice are encoded together; the choice's tokens are those beyond as many as the context alone has,
/// where white space at the end of the context counts as the choice's. Of a sequence that is too long the last tokens
/// are kept: as many as the model has positions, and the final one, which is only predicted. The choices of all
/// questions pass the model together, sorted by length; memory does not grow with their number, but for the token ids.
///
/// Behind an encoder, the context is what that reads, with the special tokens that the tokeniser puts around it, and the
/// decoder scores the tokens of the choice alone behind its start token.
///
/// Steps of progress: layers × waves of [`super::TOKENS_PER_WAVE`]. Warns where sequences were cut.
///
/// # Errors
/// Names the file and line of a choice that cannot be scored: one that merges with its context into no token of
/// its own, that follows an empty context where the tokeniser has no BOS, that is longer than the model's positions, or
/// whose logits are not finite.
pub fn multiple_choice<B: Backend>(
    model: &Model<'_, B>,
    tokenizer: &Tokenizer,
    questions: &Questions,
    progress: &mut dyn Progress,
) -> Result<MultipleChoice> {
    let architecture = model.architecture();
    let has_encoder = architecture.encoder_layers > 0;
    let start = has_encoder.then(|| start_token(model.checkpoint().dir())).transpose()?;
    let (vocabulary, max_positions) = (architecture.vocabulary, architecture.max_positions);
    let sequences = sequences::encode(questions, tokenizer, vocabulary, max_positions, start)?;
    let lengths: Vec<usize> = sequences.iter().map(Sequence::length).collect();
    let waves = sequences::group(&lengths, |a, b| model.rotates_alike(a, b));
    progress.begin("evaluate: layer", architecture.layers.len() * waves.len());
    let truncated = sequences.iter().filter(|s| s.truncated).count();
    if truncated > 0 {
        progress.warn(&format!(
            "{truncated} of {} sequences are longer than the model's {} positions; their beginning is cut off",
            sequences.len(),
            architecture.max_positions
        ));
    }
    let log_likelihoods = score(model, questions, &sequences, &waves, progress)?;
    progress.end();
    Ok(report(questions, &log_likelihoods, truncated))
}

/// Log-likelihood of the choice of every sequence.
fn score<B: Backend>(
    model: &Model<'_, B>,
    questions: &Questions,
    sequences: &[Sequence],
    waves: &[Vec<Vec<usize>>],
    progress: &mut dyn Progress,
) -> Result<Vec<f64>> {
    let mut log_likelihoods = vec![0.0; sequences.len()];
    for wave in waves {
        let places = sequences::places(sequences, wave);
        let parts: Vec<_> = wave.iter().map(|part| sequences::windows(sequences, part)).collect();
        let mut wave = Wave::run(model, &parts, &mut Skipping::default(), progress)?;
        for block in places.chunks(wave.block()) {
            let logits = wave.logits(block)?;
            let row = logits.len() / block.len();
            let loss = |(place, logits): (&Place, &[f32])| Some(Softmax::new(logits)?.loss(place.target));
            let losses: Vec<_> = block.par_iter().zip(logits.par_chunks_exact(row)).map(loss).collect();
            for (place, loss) in block.iter().zip(losses) {
                let loss = loss.ok_or_else(|| {
                    let Sequence { line, choice, .. } = &sequences[place.owner];
                    let place = format!("{}, line {line}, choice {choice}", questions.path.display());
                    Error::NonFinite { dir: model.checkpoint().dir().into(), place }
                })?;
                log_likelihoods[place.owner] -= loss;
            }
        }
        wave.end();
    }
    Ok(log_likelihoods)
}

fn report(questions: &Questions, log_likelihoods: &[f64], truncated: usize) -> MultipleChoice {
    let mut rest = log_likelihoods;
    let mut predictions = Vec::with_capacity(questions.questions.len());
    for question in &questions.questions {
        let (own, others) = rest.split_at(question.choices.len());
        rest = others;
        let per_character = own.iter().zip(&question.choices).map(|(l, c)| l / c.chars().count() as f64);
        predictions.push(Prediction {
            line: question.line,
            answer: question.answer,
            chosen: highest(own.iter().copied()),
            chosen_normalised: highest(per_character),
            log_likelihoods: own.to_vec(),
        });
    }
    let share = |chosen: fn(&Prediction) -> usize| {
        let right = predictions.iter().filter(|p| chosen(p) == p.answer).count();
        right as f64 / predictions.len().max(1) as f64
    };
    MultipleChoice {
        questions: predictions.len(),
        accuracy: share(|p| p.chosen),
        accuracy_normalised: share(|p| p.chosen_normalised),
        truncated,
        predictions,
    }
}

/// Index of the highest value; of equals, the lowest index.
fn highest(values: impl Iterator<Item = f64>) -> usize {
    values.enumerate().reduce(|best, v| if v.1 > best.1 { v } else { best }).map_or(0, |(i, _)| i)
}
