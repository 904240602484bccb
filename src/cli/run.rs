//! `moepress run`: logits of given token ids.

use std::path::PathBuf;
use std::time::Instant;

use moepress::backend::Backend;
use moepress::checkpoint::Checkpoint;
use moepress::model::{Model, RunSize, open_architecture, run};
use serde::Serialize;

use super::common::{Device, DeviceArgs, OutputArgs, check_output_file, load_token_file};
use super::failure::Failure;
use super::output;
use super::units::{bytes, counted, rate, seconds};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    /// Token windows: safetensors with ids, int32 [windows, length], and optionally mask
    #[arg(long, value_name = "T.safetensors")]
    tokens: PathBuf,
    /// Where the logits go: safetensors, f32 [windows, length, vocabulary]
    #[arg(long, value_name = "O.safetensors")]
    out: PathBuf,
    /// Also write the residual stream after every layer and every router's decisions
    #[arg(long)]
    trace: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What was done.
#[derive(Debug, Serialize)]
struct Summary {
    out: String,
    windows: usize,
    length: usize,
    tokens: usize,
    bytes: u64,
    seconds: f64,
    tokens_per_second: f64,
    device: String,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let windows = load_token_file(&self.tokens, &open_architecture(&checkpoint)?)?;
        check_output_file("--out", &self.out, checkpoint.files().chain([self.tokens.clone()]))?;
        let model = Model::new(&checkpoint, backend, windows.longest())?;
        let tokens = windows.real_tokens();
        let mut report = self.output.report();
        let size = RunSize::of(&model, &windows);
        let expected = size.logits + if self.trace { size.trace } else { 0 };
        report.note(&format!(
            "run: {} of {} tokens; {} will take about {}",
            counted(windows.count, "window"),
            windows.length,
            self.out.display(),
            bytes(expected)
        ));
        let start = Instant::now();
        run(&model, &windows, self.trace, &self.out, &mut report)?;
        let elapsed = start.elapsed().as_secs_f64();
        let summary = Summary {
            out: self.out.display().to_string(),
            windows: windows.count,
            length: windows.length,
            tokens,
            bytes: std::fs::metadata(&self.out)?.len(),
            seconds: elapsed,
            tokens_per_second: tokens as f64 / elapsed,
            device: backend.device(),
        };
        drop(report);
        let shown = if self.output.json { output::json(&summary) } else { output::text(&summary.sentence()) };
        shown.map_err(|e| e.but_wrote(&self.out))
    }
}

impl Summary {
    fn sentence(&self) -> String {
        format!(
            "{}, {} in {} on {} ({}); wrote {} to {}\n",
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
