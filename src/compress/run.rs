//! The streamed pass over the checkpoint.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::apply::{ApplyOptions, apply_layer};
use super::layout::{Layout, LayoutChoice, manifest_entry};
use super::measure::{Follower, Measurement, Wanted};
use super::needs::Need;
use super::output::{Output, other_tensors, outside_layers};
use super::{Alignment, Error, Result};
use crate::architecture::Profile;
use crate::backend::{Backend, Moment, Moments};
use crate::calibrate::{Residual, Statistics};
use crate::checkpoint::{Checkpoint, LayerEntry, Manifest, hex, write_atomic};
use crate::model::{FeedForwardSource, Inspection, LayerSource, Model, MoeSource, inspect, profile};
use crate::plan::{Action, ExpertPlan, LayerPlan, Plan, regroup_layer, rescore_layer};
use crate::progress::Progress;
use crate::tokens::Windows;

/// How to carry out a plan.
#[derive(Debug, Default)]
pub struct Options<'a> {
    /// Layout of the result.
    pub layout: LayoutChoice,
    /// Multiply factors back into full matrices.
    pub densify: bool,
    /// Calibration tokens, for plans that measure while compressing.
    pub tokens: Option<&'a Windows>,
    /// Statistics with second moments, for whitening.
    pub statistics: Option<&'a Statistics>,
}

/// What compressing did. Bytes are those of all tensors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Of the source.
    pub bytes_before: u64,
    /// Of the result.
    pub bytes_after: u64,
    /// Parameters of the source's routed experts.
    pub routed_parameters_before: u64,
    /// Of the result's.
    pub routed_parameters_after: u64,
    /// `hf` or `moepress`.
    pub layout: &'static str,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Applies `plan` to the checkpoint of `model` and writes the result to the new folder `out`. A run that was stopped
/// goes on after the last finished layer and gives the same bytes as one that was not.
///
/// # Errors
/// Names what is wrong with the plan, a layer, the output folder or what the plan needs and was not given; `out` then
/// does not exist.
pub fn compress<B: Backend>(
    model: &Model<'_, B>,
    plan: &Plan,
    options: &Options<'_>,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let start = Instant::now();
    let checkpoint = model.checkpoint();
    let architecture = model.architecture();
    let profile = profile(checkpoint, architecture)?;
    plan.check(&profile)?;
    Output::check_name(out)?;
    let layout = Layout::choose(options.layout, checkpoint, architecture, plan, options.densify)?;
    let job = Job::new(checkpoint, &profile, plan, options)?;
    if job.follow && options.tokens.is_none() {
        return Err(job.missing_tokens());
    }
    let key = job.key(&layout, &model.backend().arithmetic());
    let mark = origin_mark(&key);
    if Output::is_complete(out, &mark, &[checkpoint]) {
        // Done before; a run that was killed at its very end may have left its notes.
        Residual::open(out, &key, &[checkpoint], &mut ())?.remove()?;
        let done = inspect(&Checkpoint::open(out)?)?;
        return Ok(job.report(&layout, done.bytes.total, done.parameters.routed_experts, start));
    }
    let mut work = Residual::open(out, &key, &[checkpoint], progress)?;
    let partial = work.path("result");
    if work.is_finished() {
        if let Some(inspection) = take_up_finished(&partial, out)? {
            work.remove()?;
            let bytes_after = inspection.bytes.total;
            let routed_parameters_after = inspection.parameters.routed_experts;
            return Ok(job.report(&layout, bytes_after, routed_parameters_after, start));
        }
        work.begin()?;
    }
    Output::check(out)?;
    // Copied as they are, but a checkpoint that cannot be run is not worth a smaller one.
    model.embedding()?.release();
    drop(model.head()?);

    let layers = architecture.layers.len();
    let output = Output::create(partial.clone(), layers + 1)?;
    let mut follower = match options.tokens.filter(|_| job.follow) {
        None => None,
        Some(tokens) => Some(Follower::new(model, tokens, job.wanted(), job.propagate)?),
    };
    // Layers that are on disk, and no more of them than the residual stream has passed.
    let finished = |l: usize| output.has_shard(l).then(|| Record::read(&work, l)).flatten();
    let mut records: Vec<Record> = (0..layers).map_while(finished).collect();
    if let Some(follower) = &mut follower {
        if work.layers_done() > records.len() {
            work.forget()?;
        }
        records.truncate(follower.restore(&work)?);
    }

    progress.begin("compress: layer", layers);
    for _ in 0..records.len() {
        progress.step("done before");
    }
    for l in records.len()..layers {
        let mut source = LayerSource::open(checkpoint, architecture, l)?;
        let moments = follower.as_mut().map(|f| f.measure(&source)).transpose()?.flatten();
        let original = source.clone();
        let detail = job.layer(&mut source, moments.as_ref())?;
        if let Some(follower) = &mut follower {
            follower.leave(&source)?;
        }
        let mut tensors = other_tensors(checkpoint, architecture, &original);
        if let Some(moe) = source.moe() {
            tensors.extend(layout.tensors(&architecture.names, l, moe));
        }
        let record = Record::new(&source);
        record.write(&work, l)?;
        records.push(record);
        output.write_shard(l, &tensors)?;
        original.release();
        if let Some(follower) = &follower {
            follower.save(&work, l + 1)?;
        }
        progress.step(&detail);
    }
    output.write_shard(layers, &outside_layers(checkpoint, architecture, &layout))?;
    let routed_parameters_after = records.iter().map(|r| r.routed_parameters).sum();
    let entries = records.into_iter().filter_map(|r| r.entry).collect();
    let manifest = Manifest { moepress: 1, origin: origin(plan), layers: entries };
    let manifest = (layout == Layout::Moepress).then(|| manifest.to_json());
    let config = match &layout {
        Layout::HuggingFace { config, .. } => config.as_str(),
        Layout::Moepress => checkpoint.config(),
    };
    checkpoint.check_unchanged()?;
    let bytes_after = output.finish(checkpoint, config, manifest.as_deref(), Some(&plan.to_json()), &mark)?;
    inspect(&Checkpoint::open(&partial)?)?;
    work.finish()?;
    Output::place(out, &partial)?;
    work.remove()?;
    progress.end();
    Ok(job.report(&layout, bytes_after, routed_parameters_after, start))
}

/// What a run that was killed when all was done has left, put in its place if it is not there yet; `None` where it has
/// gone.
pub(crate) fn take_up_finished(partial: &Path, out: &Path) -> Result<Option<Inspection>> {
    if partial.is_dir() {
        Output::check(out)?;
        Output::place(out, partial)?;
    }
    if !out.is_dir() {
        return Ok(None);
    }
    Ok(Some(inspect(&Checkpoint::open(out)?)?))
}

/// Names the work that a folder is the result of.
pub(crate) fn origin_mark(key: &str) -> String {
    let job = hex(&Sha256::digest(key.as_bytes()));
    json!({ "moepress": env!("CARGO_PKG_VERSION"), "job": job }).to_string() + "\n"
}

/// Where a checkpoint in the moepress layout came from.
fn origin(plan: &Plan) -> Value {
    json!({ "method": plan.method, "options": plan.options, "model": plan.model })
}

/// One compression: what it works on and what it has to measure.
pub(super) struct Job<'a> {
    profile: &'a Profile,
    plan: &'a Plan,
    options: &'a Options<'a>,
    apply: ApplyOptions,
    /// What has to be measured of every layer.
    needs: Vec<Need>,
    /// Layers are measured on the compressed prefix.
    pub(super) propagate: bool,
    /// A residual stream is needed.
    pub(super) follow: bool,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        checkpoint: &Checkpoint,
        profile: &'a Profile,
        plan: &'a Plan,
        options: &'a Options<'a>,
    ) -> Result<Self> {
        let apply = ApplyOptions::of(plan, options.densify)?;
        let propagate = match plan.options.get("propagate") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(propagate)) => *propagate,
            Some(other) => {
                let what = format!("the plan's option propagate is {other}, expected true or false");
                return Err(Error::Missing(what));
            }
        };
        let needs = Need::all(plan, apply);
        if let Some(statistics) = options.statistics
            && statistics.profile().identity != profile.identity
        {
            let path = statistics.path().display();
            return Err(Error::Missing(format!(
                "{path}: measured on another checkpoint than {}",
                checkpoint.dir().display()
            )));
        }
        let measured = |need: &Need| options.statistics.is_some_and(|s| need.is_met_by(s));
        let follow = propagate || !needs.iter().all(measured);
        Ok(Job { profile, plan, options, apply, needs, propagate, follow })
    }

    fn report(&self, layout: &Layout, bytes_after: u64, routed_after: u64, start: Instant) -> Report {
        Report {
            bytes_before: self.profile.bytes,
            bytes_after,
            routed_parameters_before: self.profile.routed_parameters(),
            routed_parameters_after: routed_after,
            layout: layout.name(),
            seconds: start.elapsed().as_secs_f64(),
        }
    }

    pub(super) fn missing_tokens(&self) -> Error {
        if self.propagate {
            let what = "the plan has propagate=true, which measures while compressing: give --tokens";
            return Error::Missing(what.into());
        }
        let met = |need: &&Need| self.options.statistics.is_some_and(|s| need.is_met_by(s));
        let missing = self.needs.iter().find(|need| !met(need));
        Error::Missing(missing.map(Need::missing).unwrap_or_default())
    }

    /// Everything that the plan needs of a layer, in file order.
    fn needed(&self) -> Vec<Moment> {
        let needed = |m: &Moment| self.needs.iter().any(|need| need.moments.contains(m));
        Moment::ALL.into_iter().filter(needed).collect()
    }

    /// What the stream measures beside the ordinary moments.
    pub(super) fn wanted(&self) -> Wanted {
        let mut second = self.needed();
        second.retain(|m| Moment::SECOND.contains(m));
        Wanted { second, inputs: self.needs.iter().any(|need| need.inputs) }
    }

    /// Everything that the output depends on.
    fn key(&self, layout: &Layout, arithmetic: &str) -> String {
        let tokens = self.options.tokens.filter(|_| self.follow);
        let tokens = tokens.map(|w| (w.sha256(), w.length, arithmetic));
        let statistics = self
            .options
            .statistics
            .filter(|_| !self.needs.is_empty())
            .map(|s| (&s.tokens().sha256, &s.tokens().sample, self.needed().iter().all(|m| s.has(*m))));
        let identity = &self.profile.identity;
        let densify = self.apply.factors.densify;
        format!(
            "moepress compress 1\n{identity}\n{tokens:?}\n{statistics:?}\n{layout:?}\n{densify}\n{}",
            self.plan.to_json()
        )
    }

    /// Compresses the experts of one layer in place.
    pub(super) fn layer(&self, source: &mut LayerSource, measured: Option<&Measurement>) -> Result<String> {
        let l = source.layer;
        let FeedForwardSource::Moe(moe) = &mut source.feed_forward else { return Ok("no experts".into()) };
        let Some(index) = self.plan.layers.iter().position(|p| p.layer == l) else {
            return Ok("unchanged".into());
        };
        let mut plan = self.plan.layers[index].clone();
        let stored = match (measured, self.options.statistics) {
            (None, Some(statistics)) if !self.needs.is_empty() => {
                Some(statistics.moments(l, &self.needed())?)
            }
            _ => None,
        };
        let observed = measured.map_or_else(|| stored.as_ref().into(), Measurement::observed);
        if let (true, Some(moments)) = (self.propagate, observed.moments) {
            self.choose_again(&mut plan, index, moments)?;
        }
        let compressed = apply_layer(&plan, moe, observed, self.apply)?;
        *moe = compressed.moe;
        let stored = moe.experts.iter().filter(|e| e.form() != "alias").count();
        let mut detail = format!("{stored} of {} experts", plan.experts.len());
        if !compressed.alignments.is_empty() {
            let sum = |cost: fn(&Alignment) -> f64| compressed.alignments.iter().map(cost).sum::<f64>();
            let nearer = 1.0 - sum(|a| a.cost) / sum(|a| a.unaligned_cost).max(f64::MIN_POSITIVE);
            let merged = compressed.alignments.len();
            detail += &format!(", {merged} merged, {:.1} % nearer by alignment", 100.0 * nearer);
        }
        for (form, words) in [
            ("low_rank", "low rank"),
            ("low_rank_rows", "low rank with rows"),
            ("constant", "constant"),
            ("delta", "delta"),
        ] {
            let count = moe.experts.iter().filter(|e| e.form() == form).count();
            if count > 0 {
                detail += &format!(", {count} {words}");
            }
        }
        Ok(detail)
    }

    /// Drops (or replaces by constants, or merges) as many experts as the plan says, by scores on the compressed prefix.
    fn choose_again(&self, plan: &mut LayerPlan, index: usize, moments: &Moments) -> Result<()> {
        if plan.experts.iter().any(|e| matches!(e.action, Action::Merge { .. })) {
            let layer = &self.profile.moe_layers[index];
            *plan = regroup_layer(&self.plan.method, &self.plan.options, layer, moments, plan)?;
            return Ok(());
        }
        let chosen = |e: &&ExpertPlan| matches!(e.action, Action::Drop | Action::Constant);
        let Some(action) = plan.experts.iter().find(chosen).map(|e| e.action.clone()) else { return Ok(()) };
        let count = plan.experts.iter().filter(chosen).count();
        let layer = &self.profile.moe_layers[index];
        let protected = &plan.protected;
        let chosen = rescore_layer(&self.plan.method, &self.plan.options, layer, moments, count, protected)?;
        for expert in &mut plan.experts {
            expert.action = if chosen.contains(&expert.expert) { action.clone() } else { Action::Keep };
        }
        Ok(())
    }
}

/// What a resumed run has to know about a finished layer.
#[derive(Deserialize, Serialize)]
pub(super) struct Record {
    /// Entry of the layer in `moepress.json`; `None` where it has no router.
    entry: Option<LayerEntry>,
    /// Parameters of its routed experts.
    pub(super) routed_parameters: u64,
}

impl Record {
    pub(super) fn new(source: &LayerSource) -> Self {
        let routed_parameters = source.moe().map_or(0, MoeSource::routed_parameters);
        Record { entry: source.moe().map(|moe| manifest_entry(source.layer, moe)), routed_parameters }
    }

    fn write(&self, work: &Residual, l: usize) -> Result<()> {
        let text = serde_json::to_string(self).unwrap_or_default();
        Ok(write_atomic(&work.path(&record_name(l)), text.as_bytes())?)
    }

    /// The record of layer `l`, if there is a usable one.
    fn read(work: &Residual, l: usize) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(work.path(&record_name(l))).ok()?).ok()
    }
}

fn record_name(l: usize) -> String {
    format!("record-{l:05}.json")
}
