//! `moepress upcycle`: dense checkpoints of one shape, into one MoE checkpoint.

use std::path::PathBuf;

use clap::ValueEnum;
use moepress::upcycle::{Options, Report, RouterStart, upcycle};

use super::common::OutputArgs;
use super::failure::Failure;
use super::output;
use super::units::{bytes, counted, parameters, parse_at_least, parse_seed, seconds};

/// Arguments of `upcycle`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to make
    #[arg(value_enum)]
    target: Target,
    /// Dense checkpoint folders of one shape, one for each expert; tokeniser and the like are those of the first
    #[arg(required = true, num_args = 2.., value_name = "DENSE")]
    dense: Vec<PathBuf>,
    /// Folder of the MoE checkpoint; a run that was stopped goes on from there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Experts per token [default: 2 for mixtral, 1 for bam]
    #[arg(long, value_name = "K", value_parser = parse_at_least::<1>)]
    top_k: Option<usize>,
    /// How routers begin
    #[arg(long, value_enum, default_value_t)]
    router: Router,
    /// Seed of random routers
    #[arg(long, value_name = "N", default_value = "0", value_parser = parse_seed)]
    seed: u64,
    /// bam: one set of keys and values, the mean, for all attentions
    #[arg(long)]
    shared_kv: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What can be made.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Target {
    /// Branch-Attend-Mix: attentions and MLPs become experts; only moepress runs it
    Bam,
    /// A stock Mixtral checkpoint: MLPs become experts, attention is averaged
    Mixtral,
}

/// What `--router` may say.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Router {
    /// Normally distributed weights
    #[default]
    Random,
    /// Zeros
    Zero,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let target = match self.target {
            Target::Bam => moepress::upcycle::Target::Bam,
            Target::Mixtral => moepress::upcycle::Target::Mixtral,
        };
        let usual = Options::new(target);
        let options = Options {
            top_k: self.top_k.unwrap_or(usual.top_k),
            router: match self.router {
                Router::Random => RouterStart::Random,
                Router::Zero => RouterStart::Zero,
            },
            seed: self.seed,
            shared_key_values: self.shared_kv,
            ..usual
        };
        let mut report = self.output.report();
        let done = upcycle(&self.dense, &options, &self.out, &mut report)?;
        drop(report);
        let shown = if self.output.json { output::json(&done) } else { output::text(&self.page(&done)) };
        shown.map_err(|e| e.but_wrote(&self.out))
    }

    fn page(&self, done: &Report) -> String {
        let Report { family, experts, top_k, .. } = *done;
        format!(
            "wrote a {family} checkpoint with {} in every layer, {top_k} per token, to {} in {}\n\
             {} parameters, {} active, {}\n\
             its routers are new: train it before you use it\n",
            counted(experts, "expert"),
            self.out.display(),
            seconds(done.seconds),
            parameters(done.parameters),
            parameters(done.active),
            bytes(done.bytes),
        )
    }
}
