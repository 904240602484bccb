//! `moepress plan`: a method and a budget, into a plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ArgGroup;
use moepress::architecture::{Profile, Projection};
use moepress::backend::{Backend, Moments};
use moepress::calibrate::Statistics;
use moepress::checkpoint::Checkpoint;
use moepress::compress::{WeightSpectra, Weights};
use moepress::model::{Model, open_architecture, profile};
use moepress::plan::{
    Action, Budget, Error, Expected, Method, OptionSpec, OutlierSource, Plan, Request, RouterSource,
    SpectrumSource, StatisticsRef, coverage, method, parse_size,
};
use moepress::progress::Progress as _;
use moepress::search::Search;
use serde::Serialize;

use super::common::{Device, DeviceArgs, OutputArgs, TextInput, check_output_file};
use super::failure::Failure;
use super::output;
use super::progress::Report;
use super::table::{Align, Table};
use super::units::{bytes, counted, parameters, parse_at_least, percent, seconds};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("budget").args(["remove", "experts", "bytes"])))]
pub(crate) struct Args {
    /// Method; `moepress methods` lists them
    #[arg(long, value_name = "M")]
    method: String,
    /// Fraction of the routed-expert parameters to remove, between 0 and 1
    #[arg(long, value_name = "F", value_parser = parse_fraction, allow_negative_numbers = true)]
    remove: Option<f64>,
    /// Experts to keep in every layer
    #[arg(long, value_name = "N", value_parser = parse_at_least::<1>, allow_negative_numbers = true)]
    experts: Option<usize>,
    /// Size of the whole checkpoint, such as 24GiB or 13GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size_argument, allow_negative_numbers = true)]
    bytes: Option<u64>,
    /// Statistics that `moepress calibrate` wrote
    #[arg(long, value_name = "S.safetensors")]
    stats: Option<PathBuf>,
    /// Checkpoint folder, for methods that look at weights or search on tokens
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    text: TextInput,
    /// Options of the method
    #[arg(long, value_name = "KEY=VALUE", num_args = 1.., value_parser = parse_option)]
    set: Vec<(String, String)>,
    /// Where the plan goes
    #[arg(long, value_name = "P.json")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(super) fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(fraction) if fraction > 0.0 && fraction < 1.0 => Ok(fraction),
        _ => Err("expected a number between 0 and 1".into()),
    }
}

fn parse_size_argument(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
}

fn parse_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let method = method(&self.method)?;
        // A method that can be given a rank instead of a budget, or that skips experts, says itself what it lacks.
        let optional = |o: &OptionSpec| (o.name == "rank" && o.default.is_none()) || o.name == "skip";
        if self.budget().is_none() && !method.options().iter().any(optional) {
            return Err(Failure::Usage(
                "one of --remove, --experts and --bytes is needed; see `moepress plan --help`".into(),
            ));
        }
        if method.needs().tokens && (self.model.is_none() || !self.text.is_given()) {
            let name = method.name();
            return Err(Failure::Usage(format!(
                "--model and --tokens (or --text) are needed: {name} searches on the tokens themselves"
            )));
        }
        if self.text.is_given() && self.model.is_none() {
            return Err(Failure::Usage("--text and --tokens need --model <MODEL>, which reads them".into()));
        }
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(method, &cpu))
    }

    fn compute<B: Backend>(&self, method: &dyn Method, backend: &B) -> Result<(), Failure> {
        let start = Instant::now();
        let statistics = self.stats.as_deref().map(Statistics::open).transpose()?;
        let checkpoint = self.model.as_deref().map(Checkpoint::open).transpose()?;
        let weights = match &checkpoint {
            None => None,
            Some(checkpoint) => Some((checkpoint, open_architecture(checkpoint)?)),
        };
        let profile = match (&weights, &statistics) {
            (Some((checkpoint, architecture)), _) => profile(checkpoint, architecture)?,
            (None, Some(statistics)) => statistics.profile().clone(),
            (None, None) if method.needs().statistics => return Err(self.needs_statistics()),
            (None, None) => return Err(Failure::Usage("one of --stats and --model is needed".into())),
        };
        let read = checkpoint
            .iter()
            .flat_map(Checkpoint::files)
            .chain(self.stats.clone())
            .chain(self.text.files().map(Path::to_path_buf));
        check_output_file("--out", &self.out, read)?;
        let moments = statistics.as_ref().map(|s| self.moments(s, &profile.identity)).transpose()?;
        let source = statistics.as_ref().map(|s| StatisticsRef {
            file: s.path().display().to_string(),
            sha256: s.tokens().sha256.clone(),
            tokens: s.tokens().tokens,
        });
        let whiten = !self.set.iter().any(|(key, value)| key == "whiten" && value == "false");
        let spectra = weights.as_ref().map(|(checkpoint, architecture)| {
            WeightSpectra::new(checkpoint, architecture, statistics.as_ref().filter(|_| whiten))
        });
        let owned = weights.as_ref().map(|(checkpoint, architecture)| Weights::new(checkpoint, architecture));
        let request = Request {
            statistics: moments.as_deref(),
            source: source.as_ref(),
            budget: self.budget(),
            options: &self.set.iter().cloned().collect(),
            spectra: spectra.as_ref().map(|s| s as &dyn SpectrumSource),
            outliers: owned.as_ref().map(|w| w as &dyn OutlierSource),
            routers: owned.as_ref().map(|w| w as &dyn RouterSource),
            ..Request::new(&profile)
        };
        let plan = match &checkpoint {
            Some(checkpoint) if method.needs().tokens => self.search(method, request, checkpoint, backend)?,
            _ => {
                let plan = method.plan(&request).map_err(|e| self.named(e))?;
                self.write(&plan, &mut self.output.report())?;
                plan
            }
        };
        let coverage = match (&statistics, &moments) {
            (Some(statistics), Some(moments)) => {
                let files = statistics.tokens().files.iter().cloned();
                files.zip(coverage(&plan, moments)).map(|(file, kept)| Coverage { file, kept }).collect()
            }
            _ => Vec::new(),
        };
        self.show(&plan, &profile, &coverage, start.elapsed().as_secs_f64())
    }

    /// Plans with a method that searches on tokens.
    fn search<B: Backend>(
        &self,
        method: &dyn Method,
        request: Request<'_>,
        checkpoint: &Checkpoint,
        backend: &B,
    ) -> Result<Plan, Failure> {
        let windows = self.text.load(checkpoint.dir(), &open_architecture(checkpoint)?)?;
        let model = Model::new(checkpoint, backend, windows.longest())?;
        let source = StatisticsRef {
            file: self.text.files().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "),
            sha256: windows.sha256(),
            tokens: windows.real_tokens() as u64,
        };
        let what = format!("{} {:?} {:?}", method.name(), self.budget(), request.options);
        let mut report = self.output.report();
        let search = Search::new(&model, &windows, &self.out, &what, &mut report)?;
        let request = Request { source: Some(&source), losses: Some(&search), ..request };
        let plan = method.plan(&request).map_err(|e| self.named(e))?;
        self.write(&plan, &mut self.output.report())?;
        search.finish()?;
        Ok(plan)
    }

    /// Writes the plan, and says what the person who asked for it should know.
    fn write(&self, plan: &Plan, report: &mut Report) -> Result<(), Failure> {
        plan.warnings.iter().for_each(|warning| report.warn(warning));
        Ok(plan.write(&self.out)?)
    }

    /// Says which file the planner complains about, where it is the statistics.
    fn named(&self, error: Error) -> Failure {
        match (&self.stats, error) {
            (None, Error::Statistics { .. }) => self.needs_statistics(),
            (Some(path), problem @ (Error::Statistics { .. } | Error::Profile { .. })) => {
                Error::File { path: path.clone(), problem: Box::new(problem) }.into()
            }
            (_, error) => error.into(),
        }
    }

    fn needs_statistics(&self) -> Failure {
        let method = &self.method;
        Failure::Usage(format!("--stats is needed: {method} plans from what moepress calibrate wrote"))
    }

    fn budget(&self) -> Option<Budget> {
        let remove = self.remove.map(Budget::Remove);
        remove.or(self.experts.map(Budget::Experts)).or(self.bytes.map(Budget::Bytes))
    }

    /// The statistics' moments, if they were measured on the model that the plan is for.
    fn moments(&self, statistics: &Statistics, identity: &str) -> Result<Vec<Moments>, Failure> {
        if statistics.profile().identity != identity {
            let model = self.model.as_deref().unwrap_or(Path::new("")).display();
            let what =
                format!("{}: measured on another checkpoint than {model}", statistics.path().display());
            return Err(Failure::Work(what));
        }
        Ok(statistics.first_moments()?)
    }

    fn show(
        &self,
        plan: &Plan,
        profile: &Profile,
        coverage: &[Coverage],
        elapsed: f64,
    ) -> Result<(), Failure> {
        if self.output.json {
            let summary = Summary {
                method: &plan.method,
                experts_kept: plan.experts_kept(),
                expected: &plan.expected,
                coverage,
                seconds: elapsed,
            };
            return output::json(&summary).map_err(|e| e.but_wrote(&self.out));
        }
        let expected = &plan.expected;
        let mut table = Table::new([
            ("", Align::Left),
            ("now", Align::Right),
            ("planned", Align::Right),
            ("", Align::Right),
        ]);
        let share = |after: u64, before: u64| percent(after, before);
        let (routed, now) = (profile.routed_parameters(), profile.routed_bytes());
        let experts: usize = profile.moe_layers.iter().map(|l| l.experts).sum();
        for (name, before, after, written) in [
            ("experts", experts as u64, expected.experts, None),
            ("routed parameters", routed, expected.routed_parameters, Some(parameters as fn(u64) -> String)),
            ("routed bytes", now, expected.routed_bytes, Some(bytes)),
            ("all parameters", profile.parameters, expected.parameters, Some(parameters)),
            ("all bytes", profile.bytes, expected.bytes, Some(bytes)),
        ] {
            let write = |n: u64| written.map_or_else(|| n.to_string(), |w| w(n));
            table.row([name.to_string(), write(before), write(after), share(after, before)]);
        }
        let mut text = format!("{}: {}\n\n{table}\n", plan.method, kept(plan));
        if coverage.iter().any(|c| c.kept < 1.0) {
            let columns = [("expert choices that stay, by text", Align::Left), ("", Align::Right)];
            let mut table = Table::new(columns);
            for Coverage { file, kept } in coverage {
                table.row([file.clone(), format!("{:.1} %", 100.0 * kept)]);
            }
            text += &format!("{table}\n");
        }
        output::text(&format!("{text}wrote {} in {}\n", self.out.display(), seconds(elapsed)))
            .map_err(|e| e.but_wrote(&self.out))
    }
}

/// What the plan takes from one kind of text.
#[derive(Debug, Serialize)]
struct Coverage {
    file: String,
    /// Share of the file's expert choices that fell on experts which stay.
    kept: f64,
}

/// How many experts the layers keep and what becomes of them, in words.
fn kept(plan: &Plan) -> String {
    let kept = plan.experts_kept();
    let (least, most) = (kept.iter().min().unwrap_or(&0), kept.iter().max().unwrap_or(&0));
    let layers = counted(kept.len(), "layer");
    let kept = if least == most {
        format!("{} in each of {layers}", counted(*most, "expert"))
    } else {
        format!("{least} to {most} experts in {layers}")
    };
    [vec![kept], changes(plan)].concat().join("; ")
}

/// What becomes of experts that are not kept as they are: how many, and the range of their ranks or widths.
fn changes(plan: &Plan) -> Vec<String> {
    let mut found: BTreeMap<&str, (usize, Vec<usize>)> = BTreeMap::new();
    for action in plan.layers.iter().flat_map(|l| &l.experts).map(|e| &e.action) {
        let (name, sizes) = match action {
            Action::Keep | Action::Drop => continue,
            Action::Merge { .. } => ("merged into others", Vec::new()),
            Action::Constant => ("constant", Vec::new()),
            Action::LowRank { rank, .. } => {
                ("low rank", Projection::ALL.into_iter().filter_map(|p| rank.get(p)).collect())
            }
            Action::Channels { keep } => ("narrower", vec![keep.count()]),
            Action::Delta { rank } => ("a base and a difference", vec![*rank]),
        };
        let (count, all) = found.entry(name).or_default();
        *count += 1;
        all.extend(sizes);
    }
    let words = |(name, (count, sizes)): (&str, (usize, Vec<usize>))| {
        let what = if name == "narrower" { "width" } else { "rank" };
        match (sizes.iter().min(), sizes.iter().max()) {
            (Some(least), Some(most)) if least < most => {
                format!("{count} {name}, {what}s {least} to {most}")
            }
            (Some(all), _) => format!("{count} {name}, {what} {all}"),
            _ => format!("{count} {name}"),
        }
    };
    let skips = plan.layers.iter().filter(|l| l.skip.is_some()).count();
    let skips = (skips > 0).then(|| format!("{} with experts skipped per token", counted(skips, "layer")));
    found.into_iter().map(words).chain(skips).collect()
}

/// What was planned.
#[derive(Debug, Serialize)]
struct Summary<'a> {
    method: &'a str,
    experts_kept: Vec<usize>,
    expected: &'a Expected,
    coverage: &'a [Coverage],
    seconds: f64,
}
