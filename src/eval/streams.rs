//! Scores of residual streams that somebody else took through the layers: many variants of one model side by side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::perplexity::{Sums, check_predictions, places, positions, scores, total};
use super::wave::{Place, Wave};
use super::{Against, Error, FileScore, Result, Score};
use crate::backend::Backend;
use crate::model::{Model, Stream};
use crate::tokens::Windows;

/// Scores of one stream.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamScore {
    /// One score per input file, in order.
    pub files: Vec<FileScore>,
    /// Score over all windows.
    pub overall: Score,
    /// Comparison with the original; `None` for the original itself.
    pub against: Option<Against>,
    /// What the stream's logits and scores took.
    pub elapsed: Duration,
}

/// Errors unless `model` can be scored on `windows`: ids in the vocabulary, windows within its positions, and something
/// to predict in every file.
///
/// # Errors
/// Says which window or file is at fault.
pub fn check_windows<B: Backend>(model: &Model<'_, B>, windows: &Windows) -> Result<()> {
    let architecture = model.architecture();
    windows.check(architecture.vocabulary, architecture.max_positions)?;
    check_predictions(windows.predicted())
}

/// Scores `original` and `others`, all streams of `windows` behind the last layer of `model` or of a variant that shares
/// its head. Blocks of logits of two streams are in memory at a time, so that the original's are computed once.
///
/// # Errors
/// What is wrong with the windows or the original; what is wrong with a variant is its own result.
pub fn score_streams<'m, B: Backend>(
    model: &'m Model<'m, B>,
    windows: &Windows,
    original: Stream<'m, B>,
    others: Vec<Stream<'m, B>>,
) -> Result<(StreamScore, Vec<Result<StreamScore>>)> {
    check_windows(model, windows)?;
    let places = places(windows.predicted(), 0);
    let head = Arc::new(model.head()?);
    let scored =
        |stream: Stream<'m, B>| Scored::new(Wave::behind(model, stream.chunks, head.clone()), windows);
    let mut original = scored(original);
    let mut others: Vec<Scored<'_, B>> = others.into_iter().map(scored).collect();
    for block in places.chunks(original.wave.block()) {
        let reference = original.add(block, None);
        let reference = reference.map_err(|e| e.named(model, windows))?;
        for other in others.iter_mut().filter(|o| o.failed.is_none()) {
            other.failed = other.add(block, Some(&reference)).err();
        }
    }
    let others = others.into_iter().map(|mut other| match other.failed.take() {
        Some(failure) => Err(failure.named(model, windows)),
        None => other.scores(windows),
    });
    let others = others.collect();
    let original_score = original.scores(windows)?;
    original.wave.end();
    Ok((original_score, others))
}

/// A stream and its sums so far.
struct Scored<'m, B: Backend> {
    wave: Wave<'m, B>,
    sums: Vec<Sums>,
    elapsed: Duration,
    failed: Option<Failed>,
}

/// Why a stream cannot be scored.
enum Failed {
    Error(Error),
    /// Logits that are not finite, there.
    NonFinite(Place),
}

impl Failed {
    fn named<B: Backend>(self, model: &Model<'_, B>, windows: &Windows) -> Error {
        match self {
            Failed::Error(e) => e,
            Failed::NonFinite(place) => Error::NonFinite {
                dir: model.checkpoint().dir().into(),
                place: format!("window {}, position {}", place.owner, place.row % windows.predicted().length),
            },
        }
    }
}

impl<'m, B: Backend> Scored<'m, B> {
    fn new(wave: Wave<'m, B>, windows: &Windows) -> Self {
        let sums = vec![Sums::default(); windows.count];
        Scored { wave, sums, elapsed: Duration::ZERO, failed: None }
    }

    /// Adds the places of a block; returns their logits.
    fn add(&mut self, block: &[Place], original: Option<&[f32]>) -> std::result::Result<Vec<f32>, Failed> {
        let start = Instant::now();
        let logits = self.wave.logits(block).map_err(Failed::Error)?;
        for (place, shown) in block.iter().zip(positions(block, &logits, original)) {
            self.sums[place.owner].add(&shown.map_err(|_| Failed::NonFinite(*place))?);
        }
        self.elapsed += start.elapsed();
        Ok(logits)
    }

    fn scores(&self, windows: &Windows) -> Result<StreamScore> {
        let (files, overall) = scores(windows, &self.sums)?;
        Ok(StreamScore { files, overall, against: total(&self.sums).against(), elapsed: self.elapsed })
    }
}
