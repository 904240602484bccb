//! `moepress compress`: a plan and a checkpoint, into a smaller checkpoint.

use std::path::PathBuf;

use clap::ValueEnum;

use super::common::{DeviceArgs, OutputArgs};
use super::failure::Failure;

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
    /// Token windows, for plans that refit weights on the tokens themselves
    #[arg(long, value_name = "T.safetensors")]
    tokens: Option<PathBuf>,
    /// Statistics, for plans that refit weights
    #[arg(long, value_name = "S.safetensors")]
    stats: Option<PathBuf>,
    /// Layout of the result
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// Multiply low-rank factors back, for tools that know only dense experts
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
    #[expect(clippy::unused_self, reason = "compression is not built yet")]
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Err(Failure::Work("compress: not built yet".into()))
    }
}
