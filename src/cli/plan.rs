//! `moepress plan`: a method and a budget, into a plan.

use std::path::PathBuf;

use clap::ArgGroup;

use super::common::{DeviceArgs, OutputArgs};
use super::failure::Failure;
use super::units::{parse_at_least, parse_bytes};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("budget").required(true).args(["remove", "experts", "bytes"])))]
pub(crate) struct Args {
    /// Method; `moepress methods` lists them
    #[arg(long, value_name = "M")]
    method: String,
    /// Fraction of the routed-expert parameters to remove, between 0 and 1
    #[arg(long, value_name = "F", value_parser = parse_fraction)]
    remove: Option<f64>,
    /// Experts to keep in every layer
    #[arg(long, value_name = "N", value_parser = parse_at_least::<1>)]
    experts: Option<usize>,
    /// Size of the whole checkpoint, such as 24GiB or 13GB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    bytes: Option<u64>,
    /// Statistics that `moepress calibrate` wrote
    #[arg(long, value_name = "S.safetensors")]
    stats: Option<PathBuf>,
    /// Checkpoint folder, for methods that search on the tokens themselves
    #[arg(long, value_name = "MODEL", requires = "tokens")]
    model: Option<PathBuf>,
    /// Token windows for those methods
    #[arg(long, value_name = "T.safetensors", requires = "model")]
    tokens: Option<PathBuf>,
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

fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(fraction) if fraction > 0.0 && fraction < 1.0 => Ok(fraction),
        _ => Err("expected a number between 0 and 1".into()),
    }
}

fn parse_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("expected KEY=VALUE".into()),
    }
}

impl Args {
    #[expect(clippy::unused_self, reason = "planning is not built yet")]
    pub(crate) fn run(&self) -> Result<(), Failure> {
        Err(Failure::Work("plan: not built yet".into()))
    }
}
