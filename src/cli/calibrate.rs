//! `moepress calibrate`: one streamed pass over text, into a statistics file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{ArgGroup, ValueEnum};
use moepress::backend::{Backend, Moment};
use moepress::calibrate::{LayerUsage, Options, Sample, calibrate, second_moment_bytes};
use moepress::checkpoint::Checkpoint;
use moepress::model::{Model, open_architecture, profile};
use serde::Serialize;

use super::common::{Device, DeviceArgs, OutputArgs, TextInput, check_output_file};
use super::failure::Failure;
use super::output;
use super::table::{Align, Table};
use super::units::{bytes, counted, rate, seconds};

/// Arguments of `calibrate`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("input").required(true).args(["tokens", "text"])))]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    #[command(flatten)]
    text: TextInput,
    /// Where the statistics go; a pass that was stopped goes on from there
    #[arg(long, value_name = "S.safetensors")]
    out: PathBuf,
    /// Tokens per window on which every expert is run, chosen or not; N or all [default: 32]
    #[arg(long, value_name = "N|all", value_parser = parse_sample)]
    sample: Option<Sample>,
    /// Second moments to measure (large)
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    moments: Vec<MomentArg>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Reads `--sample`.
fn parse_sample(text: &str) -> Result<Sample, String> {
    match text.parse() {
        Ok(tokens) => Ok(Sample::PerWindow(tokens)),
        Err(_) if text == "all" => Ok(Sample::All),
        Err(_) => Err("expected a number of tokens per window or `all`".into()),
    }
}

/// What `--moments` may list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MomentArg {
    /// Σ x xᵀ of the layer input
    Input,
    /// The same, weighted with the squared combine weight
    GateInput,
    /// Σ z zᵀ of the expert's hidden vector
    Hidden,
    /// The same, weighted with the squared combine weight
    GateHidden,
    /// All of these
    All,
}

impl Args {
    /// The second moments asked for, in file order.
    fn second(&self) -> Vec<Moment> {
        let asked = |moment: &Moment| {
            let name = match moment {
                Moment::InputGram => MomentArg::Input,
                Moment::GateInputGram => MomentArg::GateInput,
                Moment::HiddenGram => MomentArg::Hidden,
                Moment::GateHiddenGram => MomentArg::GateHidden,
                _ => return false,
            };
            self.moments.contains(&name) || self.moments.contains(&MomentArg::All)
        };
        Moment::SECOND.into_iter().filter(asked).collect()
    }

    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let windows = self.text.load(&self.model, &open_architecture(&checkpoint)?)?;
        let texts = self.text.files().map(Path::to_path_buf);
        check_output_file("--out", &self.out, checkpoint.files().chain(texts))?;
        let model = Model::new(&checkpoint, backend, windows.longest())?;
        let options = Options { second: self.second(), ..Options::default() };
        let options = Options { sample: self.sample.unwrap_or(options.sample), ..options };
        let mut report = self.output.report();
        if !options.second.is_empty() {
            let size = second_moment_bytes(&profile(&checkpoint, model.architecture())?, &options.second);
            report.note(&format!("calibrate: the second moments will take {}", bytes(size)));
        }
        let start = Instant::now();
        let statistics = calibrate(&model, &windows, &options, &self.out, &mut report)?;
        let elapsed = start.elapsed().as_secs_f64();
        drop(report);
        let usage = statistics.usage()?;
        let summary = Summary {
            out: self.out.display().to_string(),
            bytes: std::fs::metadata(&self.out)?.len(),
            windows: windows.count,
            tokens: windows.real_tokens(),
            layers: usage,
            seconds: elapsed,
            tokens_per_second: windows.real_tokens() as f64 / elapsed,
            device: backend.device(),
        };
        let shown = if self.output.json { output::json(&summary) } else { output::text(&summary.page()) };
        shown.map_err(|e| e.but_wrote(&self.out))
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Summary {
    out: String,
    bytes: u64,
    windows: usize,
    tokens: usize,
    layers: Vec<LayerUsage>,
    seconds: f64,
    tokens_per_second: f64,
    device: String,
}

impl Summary {
    fn page(&self) -> String {
        let mut table = Table::new([
            ("layer", Align::Right),
            ("experts", Align::Right),
            ("busiest", Align::Right),
            ("least", Align::Right),
            ("never chosen", Align::Right),
        ]);
        for LayerUsage { layer, experts, busiest, least, never_chosen } in &self.layers {
            let share = |s: &f64| format!("{:.1} %", 100.0 * s);
            let cells = [
                layer.to_string(),
                experts.to_string(),
                share(busiest),
                share(least),
                never_chosen.to_string(),
            ];
            table.row(cells);
        }
        format!(
            "{table}\n{}, {} in {} on {} ({}); wrote {} to {}\n",
            counted(self.windows, "window"),
            counted(self.tokens, "token"),
            seconds(self.seconds),
            self.device,
            rate(self.tokens_per_second),
            bytes(self.bytes),
            self.out
        )
    }
}
