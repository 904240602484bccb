//! `moepress compress`: a plan and a checkpoint, into a smaller checkpoint.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use moepress::backend::Backend;
use moepress::calibrate::Statistics;
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Error, LayoutChoice, Options, Report, compress};
use moepress::model::{Model, open_architecture};
use moepress::plan::{self, Plan};
use moepress::tokens::Windows;

use super::common::{Device, DeviceArgs, OutputArgs, TextInput};
use super::failure::Failure;
use super::output;
use super::table::{Align, Table};
use super::units::{bytes, parameters, percent, seconds};

/// Arguments of `compress`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    /// The plan
    #[arg(long, value_name = "P.json")]
    plan: PathBuf,
    /// Folder of the smaller checkpoint; a run that was stopped goes on from there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    text: TextInput,
    /// Statistics with second moments, for plans that whiten [default: those that the plan was made from]
    #[arg(long, value_name = "S.safetensors")]
    stats: Option<PathBuf>,
    /// Layout of the result
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// Multiply low-rank factors back, for tools that know only dense experts: as large as the original
    #[arg(long)]
    densify: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `--layout` may say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Hugging Face where the family can express the plan, else moepress
    #[default]
    Auto,
    /// A stock Hugging Face checkpoint
    Hf,
    /// The original folder's files and moepress.json
    Moepress,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let plan = Plan::read(&self.plan)?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let architecture = open_architecture(&checkpoint)?;
        let windows = self.text.is_given().then(|| self.text.load(&self.model, &architecture)).transpose()?;
        // What is asked for by name comes before what the plan remembers.
        let (statistics, unusable) = match (&self.stats, &windows) {
            (Some(path), _) => (Some(Statistics::open(path)?), None),
            (None, Some(_)) => (None, None),
            (None, None) => statistics_of(&plan),
        };
        let length = windows.as_ref().map_or(1, Windows::longest);
        let model = Model::new(&checkpoint, backend, length)?;
        let layout = match self.layout {
            Layout::Auto => LayoutChoice::Auto,
            Layout::Hf => LayoutChoice::HuggingFace,
            Layout::Moepress => LayoutChoice::Moepress,
        };
        let options = Options {
            layout,
            densify: self.densify,
            tokens: windows.as_ref(),
            statistics: statistics.as_ref(),
        };
        let mut report = self.output.report();
        let done = compress(&model, &plan, &options, &self.out, &mut report);
        let done = done.map_err(|e| self.named(e, unusable))?;
        drop(report);
        let shown = if self.output.json { output::json(&done) } else { output::text(&self.page(&done)) };
        shown.map_err(|e| e.but_wrote(&self.out))
    }

    /// Says which file is meant, where it is the plan that does not fit or its statistics that are `unusable`.
    fn named(&self, error: Error, unusable: Option<String>) -> Failure {
        match error {
            Error::Missing(what) => {
                let why = unusable.map_or(String::new(), |why| format!(" (its own statistics, {why})"));
                Failure::Work(format!("{what}{why}"))
            }
            Error::Plan(problem) => {
                plan::Error::File { path: self.plan.clone(), problem: Box::new(problem) }.into()
            }
            other => other.into(),
        }
    }

    fn page(&self, done: &Report) -> String {
        let mut table = Table::new([
            ("", Align::Left),
            ("before", Align::Right),
            ("after", Align::Right),
            ("", Align::Right),
        ]);
        let Report { bytes_before, bytes_after, routed_parameters_before, routed_parameters_after, .. } =
            *done;
        table.row([
            "bytes".into(),
            bytes(bytes_before),
            bytes(bytes_after),
            percent(bytes_after, bytes_before),
        ]);
        table.row([
            "routed parameters".into(),
            parameters(routed_parameters_before),
            parameters(routed_parameters_after),
            percent(routed_parameters_after, routed_parameters_before),
        ]);
        let layout = match done.layout {
            "hf" => "a stock Hugging Face checkpoint",
            _ => "a checkpoint in the moepress layout",
        };
        format!("{table}\nwrote {layout} to {} in {}\n", self.out.display(), seconds(done.seconds))
    }
}

/// The statistics that the plan was made from, where they are still in place; else why they cannot be used.
fn statistics_of(plan: &Plan) -> (Option<Statistics>, Option<String>) {
    let Some(source) = &plan.statistics else { return (None, None) };
    match Statistics::open(Path::new(&source.file)) {
        Err(error) => (None, Some(error.to_string())),
        Ok(statistics)
            if statistics.tokens().sha256 == source.sha256
                && statistics.profile().identity == plan.model.identity =>
        {
            (Some(statistics), None)
        }
        Ok(_) => (None, Some(format!("{}: measured on other tokens or another model by now", source.file))),
    }
}
