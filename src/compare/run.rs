//! The comparison.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::{Error, Result};
use crate::architecture::Profile;
use crate::backend::Backend;
use crate::calibrate::{Options as CalibrateOptions, Statistics, measure};
use crate::compress::{Lockstep, Options as CompressOptions, WeightSpectra, Weights, stored_bytes};
use crate::eval::{Against, FileScore, Score, StreamScore, check_windows, score_streams};
use crate::model::{LayerSource, Model, Stream, profile};
use crate::plan::{
    Budget, Method, OutlierSource, Plan, Request as PlanRequest, RouterSource, SpectrumSource, StatisticsRef,
};
use crate::progress::Progress;
use crate::search::Search;
use crate::tokens::Windows;

/// A method with options that differ from its defaults.
#[derive(Clone)]
pub struct Candidate {
    /// The method.
    pub method: &'static dyn Method,
    /// Options, `KEY=VALUE`.
    pub options: BTreeMap<String, String>,
}

impl Candidate {
    /// The method's name, and its options behind colons: `low-rank:whiten=false`.
    pub fn name(&self) -> String {
        let options = self.options.iter().map(|(k, v)| format!(":{k}={v}"));
        options.fold(self.method.name().into(), |name, option| name + &option)
    }
}

/// What is compared.
pub struct Request<'a> {
    /// Methods with their options.
    pub candidates: &'a [Candidate],
    /// Fractions of the routed-expert parameters to remove, each between 0 and 1.
    pub remove: &'a [f64],
    /// Calibration tokens.
    pub calibration: Option<&'a Windows>,
    /// Statistics; measured from `calibration` where there are none.
    pub statistics: Option<&'a Statistics>,
    /// Tokens that every variant is scored on.
    pub evaluation: &'a Windows,
    /// Where methods that search on the calibration tokens keep what they find; gone when they are done.
    pub work: &'a Path,
}

/// Result of [`compare`]; its JSON form is that of `moepress compare`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Family of the model.
    pub family: String,
    /// Calibration tokens, padding left out.
    pub calibration_tokens: u64,
    /// The model as it is.
    pub original: Baseline,
    /// One row per candidate and fraction, candidates first.
    pub rows: Vec<Row>,
    /// Wall-clock time of everything.
    pub seconds: f64,
    /// The device in words.
    pub device: String,
}

/// The uncompressed model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Baseline {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters of the routed experts.
    pub routed_parameters: u64,
    /// Scores by file of the evaluation tokens.
    pub files: Vec<FileScore>,
    /// Score over all of them.
    #[serde(flatten)]
    pub score: Score,
}

/// One method at one fraction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// [`Candidate::name`].
    pub method: String,
    /// Fraction that was to be removed.
    pub remove: f64,
    /// What came out.
    #[serde(flatten)]
    pub measured: Option<Measured>,
    /// Why nothing did.
    pub error: Option<String>,
}

/// What a compressed model is and how good.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Parameters of the routed experts.
    pub routed_parameters: u64,
    /// The same as a share of the original's.
    pub routed_parameters_kept: f64,
    /// Scores by file of the evaluation tokens.
    pub files: Vec<FileScore>,
    /// Score over all of them.
    #[serde(flatten)]
    pub score: Score,
    /// Mean KL(original ‖ compressed), in nats per token.
    pub kl: f64,
    /// Share of positions with the same most probable token.
    pub top1_agreement: f64,
    /// What it took.
    pub seconds: Seconds,
}

/// Wall-clock time of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Planning.
    pub plan: f64,
    /// Compressing, without measurements that methods share.
    pub compress: f64,
    /// Running the evaluation tokens.
    pub evaluate: f64,
}

/// A variant on its way: which row it will be, and what is known so far.
struct Variant<'m, B: Backend> {
    row: usize,
    stream: Stream<'m, B>,
    bytes: u64,
    routed_parameters: u64,
    seconds: Seconds,
    error: Option<String>,
}

/// Plans every candidate at every fraction, carries the plans out in memory, and scores each result.
///
/// Steps of progress: one per layer of the calibration pass, those of every plan, one per layer.
///
/// # Errors
/// What is wrong with the model, the tokens or the statistics. A method that cannot do what is asked is a row that says
/// why.
pub fn compare<B: Backend>(
    model: &Model<'_, B>,
    request: &Request<'_>,
    progress: &mut dyn Progress,
) -> Result<Comparison> {
    let start = Instant::now();
    let profile = profile(model.checkpoint(), model.architecture())?;
    check_windows(model, request.evaluation)?;
    let measured;
    let statistics = match (request.statistics, request.calibration) {
        (Some(statistics), _) if statistics.profile().identity != profile.identity => {
            let (path, dir) = (statistics.path().display(), model.checkpoint().dir().display());
            return Err(Error::Request(format!("{path}: measured on another checkpoint than {dir}")));
        }
        (Some(statistics), _) => statistics,
        (None, Some(windows)) => {
            measured = measure(model, windows, &CalibrateOptions::default(), progress)?;
            &measured
        }
        (None, None) => return Err(Error::Request("neither calibration tokens nor statistics".into())),
    };

    let (mut rows, plans) = plan_all(model, request, &profile, statistics, progress)?;
    let options = CompressOptions {
        tokens: request.calibration,
        statistics: Some(statistics),
        ..CompressOptions::default()
    };
    let asked: Vec<&Plan> = plans.iter().map(|(_, plan, _)| plan).collect();
    let (mut lockstep, accepted) = Lockstep::new(model, &profile, &asked, &options)?;
    let mut original = Stream::new(model, request.evaluation)?;
    let mut variants = Vec::new();
    for ((row, _, plan_seconds), accepted) in plans.iter().zip(accepted) {
        match accepted {
            Err(e) => rows[*row].error = Some(e.to_string()),
            Ok(()) => variants.push(Variant {
                row: *row,
                stream: Stream::new(model, request.evaluation)?,
                bytes: profile.bytes,
                routed_parameters: 0,
                seconds: Seconds { plan: *plan_seconds, ..Seconds::default() },
                error: None,
            }),
        }
    }

    let layers = model.architecture().layers.len();
    progress.begin("compare: layer", layers);
    for l in 0..layers {
        let source = LayerSource::open(model.checkpoint(), model.architecture(), l)?;
        original.advance(&model.prepare(&source)?, |_, _| Ok(()))?;
        let before = stored_bytes(model, &source);
        lockstep.layer(&source, |i, planned| {
            let variant = &mut variants[i];
            if variant.error.is_none() {
                let outcome = planned.map_err(|e| e.to_string()).and_then(|planned| {
                    variant.bytes = variant.bytes - before + planned.bytes;
                    variant.routed_parameters += planned.routed_parameters;
                    variant.seconds.compress += planned.elapsed.as_secs_f64();
                    let start = Instant::now();
                    let layer = model.prepare(&planned.source).map_err(|e| e.to_string())?;
                    variant.stream.advance(&layer, |_, _| Ok(())).map_err(|e| e.to_string())?;
                    variant.seconds.evaluate += start.elapsed().as_secs_f64();
                    Ok(())
                });
                if let Err(problem) = outcome {
                    variant.error = Some(problem);
                    variant.stream.chunks = Vec::new();
                }
            }
            Ok::<_, Error>(())
        })?;
        source.release();
        progress.step("");
    }
    progress.end();
    drop(lockstep);

    let mut alive = Vec::new();
    let mut streams = Vec::new();
    for variant in variants {
        if let Some(error) = variant.error {
            rows[variant.row].error = Some(error);
            continue;
        }
        streams.push(variant.stream);
        alive.push((variant.row, variant.bytes, variant.routed_parameters, variant.seconds));
    }
    let routed = profile.routed_parameters();
    let (baseline, scores) = score_streams(model, request.evaluation, original, streams)?;
    for ((row, bytes, routed_parameters, mut seconds), score) in alive.into_iter().zip(scores) {
        match score {
            Err(e) => rows[row].error = Some(e.to_string()),
            Ok(StreamScore { files, overall, against, elapsed }) => {
                seconds.evaluate += elapsed.as_secs_f64();
                let Against { kl, top1_agreement, .. } =
                    against.unwrap_or_else(|| unreachable!("every variant is compared with the original"));
                rows[row].measured = Some(Measured {
                    bytes,
                    routed_parameters,
                    routed_parameters_kept: routed_parameters as f64 / routed.max(1) as f64,
                    files,
                    score: overall,
                    kl,
                    top1_agreement,
                    seconds,
                });
            }
        }
    }
    Ok(Comparison {
        family: profile.family.clone(),
        calibration_tokens: statistics.tokens().tokens,
        original: Baseline {
            bytes: profile.bytes,
            routed_parameters: routed,
            files: baseline.files,
            score: baseline.overall,
        },
        rows,
        seconds: start.elapsed().as_secs_f64(),
        device: model.backend().device(),
    })
}

/// One row per candidate and fraction, and for those that can be planned the row's index, the plan and its time.
type Plans = (Vec<Row>, Vec<(usize, Plan, f64)>);

fn plan_all<B: Backend>(
    model: &Model<'_, B>,
    request: &Request<'_>,
    profile: &Profile,
    statistics: &Statistics,
    progress: &mut dyn Progress,
) -> Result<Plans> {
    let moments = statistics.first_moments()?;
    let source = StatisticsRef {
        file: statistics.path().display().to_string(),
        sha256: statistics.tokens().sha256.clone(),
        tokens: statistics.tokens().tokens,
    };
    let weights = Weights::new(model.checkpoint(), model.architecture());
    let (mut rows, mut plans) = (Vec::new(), Vec::new());
    for candidate in request.candidates {
        let searches = candidate.method.needs().tokens;
        if !searches {
            progress.begin(&format!("compare: plan {}", candidate.name()), request.remove.len());
        }
        let whiten = candidate.options.get("whiten").is_none_or(|v| v != "false");
        let spectra =
            WeightSpectra::new(model.checkpoint(), model.architecture(), Some(statistics).filter(|_| whiten));
        for &remove in request.remove {
            let start = Instant::now();
            let asked = PlanRequest {
                statistics: Some(&moments),
                source: Some(&source),
                budget: Some(Budget::Remove(remove)),
                options: &candidate.options,
                spectra: Some(&spectra as &dyn SpectrumSource),
                outliers: Some(&weights as &dyn OutlierSource),
                routers: Some(&weights as &dyn RouterSource),
                ..PlanRequest::new(profile)
            };
            let plan = match request.calibration {
                Some(windows) if searches => search(model, windows, request.work, candidate, asked, progress),
                None if searches => Err("searches on the tokens themselves: give calibration tokens".into()),
                _ => candidate.method.plan(&asked).map_err(|e| e.to_string()),
            };
            let mut row = Row { method: candidate.name(), remove, measured: None, error: None };
            match plan {
                Ok(plan) => plans.push((rows.len(), plan, start.elapsed().as_secs_f64())),
                Err(problem) => row.error = Some(problem),
            }
            if !searches {
                progress.step("");
            }
            rows.push(row);
        }
        progress.end();
    }
    Ok((rows, plans))
}

/// The plan of a method that searches on tokens.
fn search<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    work: &Path,
    candidate: &Candidate,
    asked: PlanRequest<'_>,
    progress: &mut dyn Progress,
) -> std::result::Result<Plan, String> {
    let what = format!("{} {:?}", candidate.name(), asked.budget);
    let search = Search::new(model, windows, work, &what, progress).map_err(|e| e.to_string())?;
    let plan = candidate.method.plan(&PlanRequest { losses: Some(&search), ..asked });
    search.finish().map_err(|e| e.to_string())?;
    plan.map_err(|e| e.to_string())
}
