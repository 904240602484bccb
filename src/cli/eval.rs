//! `moepress eval`: perplexity, agreement with the original, multiple choice.

use std::path::PathBuf;

use clap::ArgGroup;
use moepress::checkpoint::Checkpoint;
use moepress::model::open_architecture;

use super::common::{DeviceArgs, OutputArgs, TextInput};
use super::failure::Failure;

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(group(
    ArgGroup::new("input").required(true).multiple(true).args(["tokens", "text", "multiple_choice"])
))]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    #[command(flatten)]
    text: TextInput,
    /// Checkpoint to compare with: adds KL divergence and top-1 agreement
    #[arg(long, value_name = "ORIGINAL")]
    against: Option<PathBuf>,
    /// Questions with choices, one JSON object per line
    #[arg(long, value_name = "FILE.jsonl")]
    multiple_choice: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let _ = self.device.open()?;
        let checkpoint = Checkpoint::open(&self.model)?;
        if self.multiple_choice.is_none() {
            let _windows = self.text.load(&self.model, &open_architecture(&checkpoint)?)?;
        }
        Err(Failure::Work("eval: not built yet".into()))
    }
}
