//! `moepress recover`: a compressed checkpoint, back towards the original by training here or elsewhere.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, ValueEnum};
use moepress::backend::Backend;
use moepress::checkpoint::Checkpoint;
use moepress::model::{Model, open_architecture};
use moepress::recover::{
    Decomposition, Input, LoraRank, LoraReport, Options, Report, Training, merge_lora, recover,
};

use super::common::{Device, DeviceArgs, OutputArgs, TextInput};
use super::failure::Failure;
use super::output;
use super::plan::parse_fraction;
use super::table::{Align, Table};
use super::units::{bytes, parse_at_least, parse_seed, seconds};

/// Arguments of `recover`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("source").required(true).args(["tokens", "text", "lora"])))]
pub(crate) struct Args {
    /// Folder of the original checkpoint, and folder of the one that was made from it; with --lora the latter alone
    #[arg(value_names = ["ORIGINAL", "COMPRESSED"], num_args = 1..=2, required = true)]
    models: Vec<PathBuf>,
    #[command(flatten)]
    text: TextInput,
    /// Folder of the result; a run that was stopped goes on from there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the experts of a layer see while they are trained
    #[arg(long, value_enum, default_value_t)]
    input: InputArg,
    /// Share of the windows that only judge: what is best on them is kept
    #[arg(long, value_name = "F", default_value = "0.1", value_parser = parse_fraction, allow_negative_numbers = true)]
    held_out: f64,
    /// Sweeps of closed-form least squares over the last factor of every expert
    #[arg(long, value_name = "N", default_value_t = Training::default().sweeps, value_parser = parse_at_least::<0>, allow_negative_numbers = true)]
    sweeps: usize,
    /// Ridge of the least squares, as a share of the mean diagonal entry
    #[arg(long, value_name = "X", default_value_t = Training::default().ridge, value_parser = parse_positive, allow_negative_numbers = true)]
    ridge: f64,
    /// Steps of Adam on all factors
    #[arg(long, value_name = "N", default_value_t = Training::default().steps, value_parser = parse_at_least::<0>, allow_negative_numbers = true)]
    steps: usize,
    /// Largest step of a value, as a share of the root mean square of its matrix
    #[arg(long, value_name = "X", default_value_t = Training::default().rate, value_parser = parse_positive, allow_negative_numbers = true)]
    lr: f64,
    /// Tokens of a step
    #[arg(long, value_name = "N", default_value_t = Training::default().batch, value_parser = parse_at_least::<1>, allow_negative_numbers = true)]
    batch: usize,
    /// Make full matrices low rank, with this share of their rows kept beside the factors, while they are trained: MC-SMoE's
    /// second stage, after merging
    #[arg(long, value_name = "RANK:SHARE", value_parser = parse_losparse, conflicts_with = "lora")]
    losparse: Option<Decomposition>,
    /// Seed of the order of the tokens
    #[arg(long, value_name = "N", default_value_t = Training::default().seed, value_parser = parse_seed, allow_negative_numbers = true)]
    seed: u64,
    /// Merge this LoRA adapter (a folder as PEFT saves it) in place of training
    #[arg(long, value_name = "ADAPTER")]
    lora: Option<PathBuf>,
    /// Truncate the factors that the adapter updates to the rank that they had, instead of enlarging them
    #[arg(long, requires = "lora")]
    keep_rank: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `--input` may say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum InputArg {
    /// The original model's activations: layers do not depend on each other
    Original,
    /// Those behind the layers recovered before, as the result will have them
    #[default]
    Recovered,
}

fn parse_positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("expected a number above 0".into()),
    }
}

fn parse_losparse(text: &str) -> Result<Decomposition, String> {
    let parsed = text
        .split_once(':')
        .and_then(|(rank, rows)| Some(Decomposition { rank: rank.parse().ok()?, rows: rows.parse().ok()? }));
    let fits = |d: &Decomposition| d.rank > 0 && d.rows > 0.0 && d.rows < 1.0;
    parsed.filter(fits).ok_or_else(|| "expected a rank and a share of rows below 1, such as 32:0.1".into())
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let (original, compressed) = match (&self.models[..], &self.lora) {
            ([compressed], Some(adapter)) => return self.merge(compressed, adapter),
            ([original, compressed], None) => (original, compressed),
            (_, Some(_)) => {
                let what = "--lora: expected one checkpoint, the one that the adapter was trained on";
                return Err(Failure::Usage(what.into()));
            }
            (_, None) => {
                let what = "expected two checkpoints, the original and the one that was made from it";
                return Err(Failure::Usage(format!("{what}; see `moepress recover --help`")));
            }
        };
        let dir = original;
        let original = Checkpoint::open(original)?;
        let compressed = Checkpoint::open(compressed)?;
        let windows = self.text.load(dir, &open_architecture(&original)?)?;
        let original = Model::new(&original, backend, windows.longest())?;
        let compressed = Model::new(&compressed, backend, windows.longest())?;
        let options = Options {
            training: Training {
                sweeps: self.sweeps,
                ridge: self.ridge,
                steps: self.steps,
                rate: self.lr,
                batch: self.batch,
                seed: self.seed,
            },
            input: match self.input {
                InputArg::Original => Input::Original,
                InputArg::Recovered => Input::Recovered,
            },
            held_out: self.held_out,
            decompose: self.losparse,
        };
        let mut progress = self.output.report();
        let done = recover(&original, &compressed, &windows, &options, &self.out, &mut progress)?;
        drop(progress);
        let shown = if self.output.json { output::json(&done) } else { output::text(&self.page(&done)) };
        shown.map_err(|e| e.but_wrote(&self.out))
    }

    fn merge(&self, model: &Path, adapter: &Path) -> Result<(), Failure> {
        let rank = if self.keep_rank { LoraRank::Keep } else { LoraRank::Enlarge };
        let checkpoint = Checkpoint::open(model)?;
        let mut progress = self.output.report();
        let done = merge_lora(&checkpoint, adapter, rank, &self.out, &mut progress)?;
        drop(progress);
        if self.output.json {
            return output::json(&done).map_err(|e| e.but_wrote(&self.out));
        }
        let LoraReport { matrices, skipped, .. } = done;
        let skipped = match skipped {
            0 => String::new(),
            n => format!(", left out {n} of experts that were dropped"),
        };
        let (size, out) = (bytes(done.bytes), self.out.display());
        let matrices = if matrices == 1 { "1 matrix".into() } else { format!("{matrices} matrices") };
        output::text(&format!(
            "updated {matrices}{skipped}; wrote {size} to {out} in {}\n",
            seconds(done.seconds)
        ))
        .map_err(|e| e.but_wrote(&self.out))
    }

    fn page(&self, done: &Report) -> String {
        let mut table = Table::new([
            ("layer", Align::Right),
            ("loss before", Align::Right),
            ("least squares", Align::Right),
            ("after", Align::Right),
        ]);
        for layer in &done.layers {
            let loss = layer.loss;
            let losses = [loss.before, loss.least_squares, loss.after].map(|l| format!("{l:.4}"));
            table.row([layer.layer.to_string()].into_iter().chain(losses));
        }
        format!(
            "{table}\nloss: squared difference from the original layer's output, as a share of it, on tokens held out\n\
             wrote {} to {} in {}\n",
            bytes(done.bytes),
            self.out.display(),
            seconds(done.seconds)
        )
    }
}
