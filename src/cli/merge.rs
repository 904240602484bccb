//! `moepress merge`: adds up statistics of disjoint texts.

use std::path::PathBuf;

use moepress::calibrate::Statistics;
use serde_json::json;

use super::common::{OutputArgs, check_output_file};
use super::failure::Failure;
use super::output;
use super::units::counted;

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Statistics files of one model, measured on different tokens
    #[arg(required = true, num_args = 2.., value_name = "S.safetensors")]
    statistics: Vec<PathBuf>,
    /// Where the sum goes
    #[arg(long, value_name = "S.safetensors")]
    out: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        check_output_file("--out", &self.out, &self.statistics)?;
        let parts =
            self.statistics.iter().map(|path| Statistics::open(path)).collect::<Result<Vec<_>, _>>()?;
        Statistics::merge(&parts, &self.out)?;
        let tokens = Statistics::open(&self.out)?.tokens().tokens;
        let out = self.out.display().to_string();
        if self.output.json {
            return output::json(&json!({ "out": out, "parts": parts.len(), "tokens": tokens }))
                .map_err(|e| e.but_wrote(&self.out));
        }
        let (parts, tokens) = (counted(parts.len(), "statistics file"), counted(tokens as usize, "token"));
        output::text(&format!("added up {parts}, {tokens} in all; wrote {out}\n"))
            .map_err(|e| e.but_wrote(&self.out))
    }
}
