//! Writing the MoE checkpoint, a layer at a time.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use super::dense::Dense;
use super::{Error, Result, tensors};
use crate::calibrate::Residual;
use crate::checkpoint::Checkpoint;
use crate::compress::{Output, origin_mark, take_up_finished};
use crate::model::{Inspection, inspect};
use crate::progress::Progress;

/// What is made of dense checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// A stock Mixtral checkpoint of Llama or Mistral models: attention is averaged, the weights of the chosen MLPs add
    /// up to 1.
    Mixtral,
    /// Branch-Attend-Mix: attention is mixed of that of all models. Of Cohere models, whose attention and MLP stand side
    /// by side as in the paper, or of Llama or Mistral models.
    Bam,
}

impl Target {
    /// As `model_type` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Target::Mixtral => "mixtral",
            Target::Bam => "bam",
        }
    }
}

/// How new routers begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RouterStart {
    /// Normally distributed weights with the standard deviation `initializer_range`, or 0.02 (both papers).
    #[default]
    Random,
    /// Zeros: attention is the plain mean, and every token takes the first experts.
    Zero,
}

/// How to make a MoE checkpoint.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Options {
    /// Its kind.
    pub target: Target,
    /// Experts per token.
    pub top_k: usize,
    /// How routers begin.
    pub router: RouterStart,
    /// Seed of random routers.
    pub seed: u64,
    /// BAM with one set of keys and values, the mean, for all attention experts: §3.2 of the paper, KV-sharing.
    pub shared_key_values: bool,
}

impl Options {
    /// What the papers use: two experts per token for Mixtral, one for BAM; random routers; keys and values of its own for
    /// every attention.
    pub fn new(target: Target) -> Self {
        let top_k = if target == Target::Bam { 1 } else { 2 };
        Options { target, top_k, router: RouterStart::default(), seed: 0, shared_key_values: false }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// `mixtral` or `bam`.
    pub family: &'static str,
    /// Experts of a layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Parameters of the result.
    pub parameters: u64,
    /// Of these, those that a token uses.
    pub active: u64,
    /// Bytes of all its tensors.
    pub bytes: u64,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Makes one MoE checkpoint, the new folder `out`, of the dense checkpoints in `folders`: one expert each, in this order;
/// tokeniser and the like are those of the first. A run that was stopped goes on after the last finished layer and gives
/// the same bytes as one that was not.
///
/// # Errors
/// Names the folder, config key or tensor that does not go with the others, or what is wrong with `out`, which then does not
/// exist.
pub fn upcycle(
    folders: &[PathBuf],
    options: &Options,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let start = Instant::now();
    Output::check_name(out)?;
    let experts = folders.len();
    if options.top_k == 0 || options.top_k > experts {
        let what =
            format!("{} experts per token, expected 1 to {experts}, one for each model", options.top_k);
        return Err(Error::Choice(what));
    }
    if options.shared_key_values && options.target != Target::Bam {
        return Err(Error::Choice("only bam can share keys and values of several attentions".into()));
    }
    let dense = Dense::open(folders, options.target)?;
    let config = dense.config.of_experts(experts, options);
    let sources: Vec<&Checkpoint> = dense.checkpoints.iter().collect();
    let identities: Vec<String> = sources.iter().map(|source| source.identity()).collect();
    let key = format!("moepress upcycle 1\n{identities:?}\n{options:?}\n{config}");
    let report = |inspection: Inspection| Report {
        family: options.target.name(),
        experts,
        top_k: options.top_k,
        parameters: inspection.parameters.total,
        active: inspection.parameters.active,
        bytes: inspection.bytes.total,
        seconds: start.elapsed().as_secs_f64(),
    };
    let mark = origin_mark(&key);
    if Output::is_complete(out, &mark, &sources) {
        Residual::open(out, &key, &sources, &mut ())?.remove()?;
        return Ok(report(inspect(&Checkpoint::open(out)?)?));
    }
    let mut work = Residual::open(out, &key, &sources, progress)?;
    let partial = work.path("result");
    if work.is_finished() {
        if let Some(inspection) = take_up_finished(&partial, out)? {
            work.remove()?;
            return Ok(report(inspection));
        }
        work.begin()?;
    }
    Output::check(out)?;
    let layers = dense.layers();
    let output = Output::create(partial.clone(), layers + 1)?;
    progress.begin("upcycle: layer", layers);
    for l in 0..layers {
        if output.has_shard(l) {
            progress.step("done before");
            continue;
        }
        output.write_shard(l, &tensors::layer(&dense, l, options)?)?;
        progress.step("");
    }
    output.write_shard(layers, &tensors::outside_layers(&dense)?)?;
    sources.iter().try_for_each(|source| source.check_unchanged())?;
    output.finish(sources[0], &config, None, None, &mark)?;
    let inspection = inspect(&Checkpoint::open(&partial)?)?;
    work.finish()?;
    Output::place(out, &partial)?;
    work.remove()?;
    progress.end();
    Ok(report(inspection))
}
