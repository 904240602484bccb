//! `moepress methods`: every method, what it needs, its options and its paper.

use super::common::OutputArgs;
use super::failure::Failure;

/// Arguments of `methods`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    #[expect(clippy::unused_self, reason = "there are no methods yet")]
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Err(Failure::Work("methods: not built yet".into()))
    }
}
