//! `moepress upcycle`: dense checkpoints, into one with experts.

use std::path::PathBuf;

use clap::ValueEnum;

use super::common::OutputArgs;
use super::failure::Failure;

/// Arguments of `upcycle`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is made of the dense models
    #[arg(value_enum)]
    kind: Kind,
    /// Folders of dense checkpoints of one shape
    #[arg(required = true, value_name = "DENSE")]
    dense: Vec<PathBuf>,
    /// Folder of the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// What can be made of dense models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Attention and MLPs both become experts (BAM, arXiv 2408.08274)
    Bam,
    /// MLPs become the experts of a Mixtral model
    Mixtral,
}

impl Args {
    #[expect(clippy::unused_self, reason = "upcycling is not built yet")]
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Err(Failure::Work("upcycle: not built yet".into()))
    }
}
