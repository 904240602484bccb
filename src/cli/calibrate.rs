//! `moepress calibrate`: one streamed pass over text, into a statistics file.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, ValueEnum};
use moepress::backend::Moment;
use moepress::checkpoint::Checkpoint;
use moepress::model::open_architecture;

use super::common::{DeviceArgs, OutputArgs, TextInput, check_output_file};
use super::failure::Failure;

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
    /// Tokens on which every expert is run, chosen or not; N or all
    #[arg(long, value_name = "N|all")]
    sample: Option<Sample>,
    /// Second moments to measure (large)
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    moments: Vec<MomentArg>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What `--sample` may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sample {
    /// Every token.
    All,
    /// So many tokens.
    Tokens(usize),
}

impl FromStr for Sample {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(tokens) => Ok(Sample::Tokens(tokens)),
            Err(_) if text == "all" => Ok(Sample::All),
            Err(_) => Err("expected a number of tokens or `all`".into()),
        }
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
        let _ = self.device.open()?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let _windows = self.text.load(&self.model, &open_architecture(&checkpoint)?)?;
        check_output_file(&self.out)?;
        let _second = self.second();
        Err(Failure::Work("calibrate: not built yet".into()))
    }
}
