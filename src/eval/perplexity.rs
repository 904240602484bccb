//! Perplexity of token windows, and how far a model is from the original it was made from.

use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::softmax::Softmax;
use super::wave::{Place, TOKENS_PER_WAVE, Wave};
use super::{Error, MultipleChoice, Result, Skipping};
use crate::backend::Backend;
use crate::model::Model;
use crate::progress::Progress;
use crate::tokens::Windows;

/// The loss over some predicted tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Predicted tokens.
    pub tokens: usize,
    /// Their mean loss −ln p, in nats.
    pub nll: f64,
    /// exp(`nll`); [`f64::MAX`] where that is beyond f64, so that it stays a number in JSON.
    pub perplexity: f64,
}

/// The loss over the windows of one input file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileScore {
    /// File name as given.
    pub file: String,
    /// Its score.
    #[serde(flatten)]
    pub score: Score,
}

/// How far a model is from the original it was made from, over all predicted tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Against {
    /// Mean KL(original ‖ model), in nats per token; 0 for equal models.
    pub kl: f64,
    /// Share of positions at which both find the same token most probable (of equals, the lowest id).
    pub top1_agreement: f64,
    /// Score of the original on the same tokens.
    pub original: Score,
}

/// Result of an evaluation; its JSON form is that of `moepress eval`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// One score per input file, in order.
    pub files: Vec<FileScore>,
    /// Score over all windows; every predicted token counts the same.
    pub overall: Score,
    /// Score of every window, in order; `None` where its padding leaves nothing to predict. Not part of the JSON form.
    #[serde(skip)]
    pub windows: Vec<Option<Score>>,
    /// Comparison with the original, where there was one.
    pub against: Option<Against>,
    /// How many experts ran, where layers skip some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipping: Option<Skipping>,
    /// Multiple-choice questions, where there were any. [`perplexity`] and [`against`] leave it `None`; the caller puts
    /// the result of [`multiple_choice`](super::multiple_choice()) here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multiple_choice: Option<MultipleChoice>,
    /// Time that the windows took, reading the weights included.
    pub seconds: f64,
    /// Tokens that are not padding, over `seconds`.
    pub tokens_per_second: f64,
    /// The device in words.
    pub device: String,
}

/// Perplexity of `model` on `windows`. Every window is a sequence of its own: position p predicts token p + 1, so that
/// a window of length L predicts L − 1 tokens; where source or target is padding, nothing is predicted. Windows
/// longer than `model` was made for are fine as long as its positions cover them.
///
/// Steps of progress: layers × waves of [`TOKENS_PER_WAVE`].
///
/// # Errors
/// Names the tensor that cannot be used, the token outside the vocabulary, the file that predicts nothing, or the
/// window whose logits are not finite.
pub fn perplexity<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    progress: &mut dyn Progress,
) -> Result<Evaluation> {
    evaluate(model, None, windows, progress)
}

/// [`perplexity`] of `model`, and how far it is from `original` at every predicted position. Both models' residual
/// streams of one wave are in memory at a time, and one layer of one of them.
///
/// Steps of progress: layers of both models × waves.
///
/// # Errors
/// Those of [`perplexity`], for either model; [`Error::Vocabulary`] where the models' vocabularies differ.
pub fn against<B: Backend>(
    model: &Model<'_, B>,
    original: &Model<'_, B>,
    windows: &Windows,
    progress: &mut dyn Progress,
) -> Result<Evaluation> {
    let vocabularies = [model, original].map(|m| m.architecture().vocabulary);
    if vocabularies[0] != vocabularies[1] {
        return Err(Error::Vocabulary {
            dir: model.checkpoint().dir().into(),
            model: vocabularies[0],
            original_dir: original.checkpoint().dir().into(),
            original: vocabularies[1],
        });
    }
    evaluate(model, Some(original), windows, progress)
}

/// Running sums over predicted positions.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    tokens: usize,
    loss: f64,
    compared: usize,
    original_loss: f64,
    kl: f64,
    agreeing: usize,
}

impl Sums {
    pub(super) fn add(&mut self, other: &Sums) {
        self.tokens += other.tokens;
        self.loss += other.loss;
        self.compared += other.compared;
        self.original_loss += other.original_loss;
        self.kl += other.kl;
        self.agreeing += other.agreeing;
    }

    /// `None` where nothing was predicted.
    fn score(&self) -> Option<Score> {
        Score::new(self.tokens, self.loss)
    }

    /// `None` where nothing was compared.
    pub(super) fn against(&self) -> Option<Against> {
        let original = Score::new(self.compared, self.original_loss)?;
        let tokens = self.compared as f64;
        Some(Against { kl: self.kl / tokens, top1_agreement: self.agreeing as f64 / tokens, original })
    }
}

impl Score {
    fn new(tokens: usize, loss: f64) -> Option<Self> {
        let nll = loss / tokens as f64;
        (tokens > 0).then(|| Score { tokens, nll, perplexity: nll.exp().min(f64::MAX) })
    }
}

/// Whose logits are not finite.
#[derive(Clone, Copy)]
pub(super) enum Culprit {
    Model,
    Original,
}

/// What one position shows.
fn position(logits: &[f32], original: Option<&[f32]>, target: u32) -> std::result::Result<Sums, Culprit> {
    let model = Softmax::new(logits).ok_or(Culprit::Model)?;
    let alone = Sums { tokens: 1, loss: model.loss(target), ..Sums::default() };
    let Some(logits) = original else { return Ok(alone) };
    let original = Softmax::new(logits).ok_or(Culprit::Original)?;
    Ok(Sums {
        compared: 1,
        original_loss: original.loss(target),
        kl: original.divergence(&model),
        agreeing: usize::from(original.top() == model.top()),
        ..alone
    })
}

/// [`position`] for the places of a block, in parallel; results in their order. Logits are `[places, vocabulary]`.
pub(super) fn positions(
    places: &[Place],
    logits: &[f32],
    original: Option<&[f32]>,
) -> Vec<std::result::Result<Sums, Culprit>> {
    let vocabulary = logits.len() / places.len();
    let sums = |(i, place): (usize, &Place)| {
        let row = i * vocabulary..(i + 1) * vocabulary;
        position(&logits[row.clone()], original.map(|o| &o[row]), place.target)
    };
    places.par_iter().enumerate().map(sums).collect()
}

fn evaluate<B: Backend>(
    model: &Model<'_, B>,
    original: Option<&Model<'_, B>>,
    windows: &Windows,
    progress: &mut dyn Progress,
) -> Result<Evaluation> {
    let started = Instant::now();
    let models = || std::iter::once(model).chain(original);
    for model in models() {
        let architecture = model.architecture();
        windows.check(architecture.vocabulary, architecture.max_positions)?;
    }
    check_predictions(windows.predicted())?;
    let per_wave = (TOKENS_PER_WAVE / windows.longest()).max(1);
    let layers: usize = models().map(|m| m.architecture().layers.len()).sum();
    progress.begin("evaluate: layer", layers * windows.count.div_ceil(per_wave));

    let mut sums = vec![Sums::default(); windows.count];
    let mut skipping = Skipping::default();
    for first in (0..windows.count).step_by(per_wave) {
        let part = [windows.slice(first, per_wave.min(windows.count - first))];
        let places = places(part[0].predicted(), first);
        let mut wave = Wave::run(model, &part, &mut skipping, progress)?;
        let mut original_wave =
            original.map(|o| Wave::run(o, &part, &mut Skipping::default(), progress)).transpose()?;
        for block in places.chunks(wave.block()) {
            let logits = wave.logits(block)?;
            let original_logits = original_wave.as_mut().map(|w| w.logits(block)).transpose()?;
            for (place, shown) in block.iter().zip(positions(block, &logits, original_logits.as_deref())) {
                let shown = shown.map_err(|culprit| {
                    let at_fault = match culprit {
                        Culprit::Model => model,
                        Culprit::Original => original.unwrap_or(model),
                    };
                    let (window, position) = (place.owner, place.row % windows.predicted().length);
                    Error::NonFinite {
                        dir: at_fault.checkpoint().dir().into(),
                        place: format!("window {window}, position {position}"),
                    }
                })?;
                sums[place.owner].add(&shown);
            }
        }
        wave.end();
        original_wave.into_iter().for_each(Wave::end);
    }
    progress.end();

    let (files, overall) = scores(windows, &sums)?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Evaluation {
        files,
        overall,
        windows: sums.iter().map(Sums::score).collect(),
        against: total(&sums).against(),
        skipping: skipping.finish(),
        multiple_choice: None,
        seconds,
        tokens_per_second: windows.predicted().real_tokens() as f64 / seconds.max(f64::MIN_POSITIVE),
        device: model.backend().device(),
    })
}

/// Scores of every file and of everything.
///
/// # Errors
/// Names the file that predicts nothing.
pub(super) fn scores(windows: &Windows, sums: &[Sums]) -> Result<(Vec<FileScore>, Score)> {
    let score = |sums: &[Sums], name: &str| {
        total(sums).score().ok_or_else(|| Error::NothingPredicted { file: name.into() })
    };
    let mut rest = sums;
    let mut files = Vec::with_capacity(windows.files.len());
    for file in &windows.files {
        let (own, others) = rest.split_at(file.windows);
        rest = others;
        files.push(FileScore { file: file.name.clone(), score: score(own, &file.name)? });
    }
    Ok((files, score(sums, "the token windows")?))
}

pub(super) fn total(sums: &[Sums]) -> Sums {
    let mut total = Sums::default();
    for sums in sums {
        total.add(sums);
    }
    total
}

/// Errors where a file predicts nothing, before any work.
pub(super) fn check_predictions(windows: &Windows) -> Result<()> {
    let count = |window: usize| Sums { tokens: predicting(windows, window).count(), ..Sums::default() };
    let counts: Vec<Sums> = (0..windows.count).map(count).collect();
    scores(windows, &counts).map(|_| ())
}

/// Positions of a window that predict the next one: neither is padding.
fn predicting(windows: &Windows, window: usize) -> impl Iterator<Item = usize> {
    let mask = windows.mask.as_deref();
    let start = window * windows.length;
    (0..windows.length.saturating_sub(1))
        .filter(move |p| mask.is_none_or(|real| real[start + p] && real[start + p + 1]))
}

/// Every position of a wave that predicts; `first` is the number of its first window.
pub(super) fn places(windows: &Windows, first: usize) -> Vec<Place> {
    let of_window = |w: usize| {
        predicting(windows, w).map(move |position| {
            let row = w * windows.length + position;
            Place { row, target: windows.ids[row + 1], owner: first + w }
        })
    };
    (0..windows.count).flat_map(of_window).collect()
}
