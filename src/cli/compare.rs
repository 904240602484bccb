//! `moepress compare`: many methods on one model, side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ArgGroup;
use moepress::backend::Backend;
use moepress::calibrate::Statistics;
use moepress::checkpoint::{Checkpoint, write_atomic};
use moepress::compare::{Candidate, Comparison, Request, compare, plot};
use moepress::model::{Model, open_architecture};
use moepress::plan::{check_options, method, methods};
use moepress::tokens::Windows;

use super::common::{Device, DeviceArgs, OutputArgs, TextInput, check_output_file};
use super::failure::Failure;
use super::output;
use super::plan::parse_fraction;
use super::table::{Align, Table};
use super::units::{bytes, parse_at_least, seconds};

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("calibration").required(true).multiple(true).args(["tokens", "text", "stats"])))]
#[command(group(ArgGroup::new("evaluation").required(true).args(["eval_tokens", "eval_text"])))]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    #[command(flatten)]
    text: TextInput,
    /// Statistics that `moepress calibrate` wrote, in place of a calibration pass; methods that measure while
    /// compressing need --tokens or --text all the same, or second moments in here
    #[arg(long, value_name = "S.safetensors")]
    stats: Option<PathBuf>,
    /// Token windows to score every variant on; repeatable
    #[arg(long, value_name = "T.safetensors")]
    eval_tokens: Vec<PathBuf>,
    /// Text to score every variant on, tokenised like --text
    #[arg(long, value_name = "FILE", num_args = 1..)]
    eval_text: Vec<PathBuf>,
    /// Use the first N windows of every evaluation file [default: all]
    #[arg(long, value_name = "N", value_parser = parse_at_least::<1>, allow_negative_numbers = true)]
    eval_windows: Option<usize>,
    /// Fractions of the routed-expert parameters to remove, between 0 and 1
    #[arg(
        long, value_name = "F,…", value_delimiter = ',', default_value = "0.25,0.5", value_parser = parse_fraction,
        allow_negative_numbers = true
    )]
    remove: Vec<f64>,
    /// Methods, each with options behind colons: reap,low-rank:whiten=false [default: all but those that search on
    /// tokens or need another checkpoint]
    #[arg(long, value_name = "M,…", value_delimiter = ',')]
    methods: Vec<String>,
    /// Draw perplexity against bytes
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let candidates = self.candidates()?;
        let checkpoint = Checkpoint::open(&self.model)?;
        if let Some(path) = &self.plot {
            let given = [&self.text.tokens, &self.text.text, &self.eval_tokens, &self.eval_text];
            let read = given.into_iter().flatten().chain(&self.stats).cloned();
            check_output_file("--plot", path, read.chain(checkpoint.files()))?;
        }
        let architecture = open_architecture(&checkpoint)?;
        let statistics = self.stats.as_deref().map(Statistics::open).transpose()?;
        let load = |input: &TextInput| input.load(&self.model, &architecture);
        let calibration = self.text.is_given().then(|| load(&self.text)).transpose()?;
        let evaluation = self.text.with_files(&self.eval_tokens, &self.eval_text, self.eval_windows);
        let evaluation = load(&evaluation)?;
        let length = calibration.as_ref().map_or(0, Windows::longest).max(evaluation.longest());
        let model = Model::new(&checkpoint, backend, length)?;
        let mut report = self.output.report();
        let request = Request {
            candidates: &candidates,
            remove: &self.remove,
            calibration: calibration.as_ref(),
            statistics: statistics.as_ref(),
            evaluation: &evaluation,
            work: &std::env::temp_dir().join(format!("moepress-compare-{}", std::process::id())),
        };
        let comparison = compare(&model, &request, &mut report)?;
        drop(report);
        if let Some(path) = &self.plot {
            write_atomic(path, plot(&comparison, &self.title()).as_bytes())?;
        }
        let shown =
            if self.output.json { output::json(&comparison) } else { output::text(&page(&comparison)) };
        shown.and_then(|()| any_row(&comparison))
    }

    fn candidates(&self) -> Result<Vec<Candidate>, Failure> {
        if self.methods.is_empty() {
            // Those that search on tokens plan for minutes where the others take seconds; those that compare with another
            // checkpoint have to be told which.
            let planned = methods().iter().filter(|m| !m.needs().tokens && !m.needs().checkpoint);
            return Ok(planned.map(|&method| Candidate { method, options: [].into() }).collect());
        }
        self.methods.iter().map(|text| candidate(text)).collect()
    }

    fn title(&self) -> String {
        let path = self.model.canonicalize().unwrap_or_else(|_| self.model.clone());
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        format!("{name}: perplexity against size")
    }
}

/// Reads `NAME:KEY=VALUE:…`.
fn candidate(text: &str) -> Result<Candidate, Failure> {
    let mut parts = text.split(':');
    let method = method(parts.next().unwrap_or_default().trim())?;
    let option = |part: &str| match part.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_string(), value.to_string())),
        _ => Err(Failure::Usage(format!("--methods {text}: `{part}` is no option, expected KEY=VALUE"))),
    };
    let options: BTreeMap<String, String> = parts.map(option).collect::<Result<_, _>>()?;
    check_options(method, &options)?;
    Ok(Candidate { method, options })
}

/// Errors where no row has a result.
fn any_row(comparison: &Comparison) -> Result<(), Failure> {
    let rows = &comparison.rows;
    match rows.first().and_then(|row| row.error.as_deref()) {
        Some(why) if rows.iter().all(|row| row.measured.is_none()) => {
            Err(Failure::Work(format!("no method has a result; {}: {why}", rows[0].method)))
        }
        _ => Ok(()),
    }
}

fn page(comparison: &Comparison) -> String {
    let Comparison { original, rows, .. } = comparison;
    let mut table = Table::new([
        ("method", Align::Left),
        ("removed", Align::Right),
        ("bytes", Align::Right),
        ("routed kept", Align::Right),
        ("perplexity", Align::Right),
        ("KL", Align::Right),
        ("top-1 same", Align::Right),
        ("time", Align::Right),
        ("", Align::Left),
    ]);
    let perplexity = |value: f64| if value < 1e6 { format!("{value:.3}") } else { format!("{value:.2e}") };
    let share = |share: f64| format!("{:.1} %", 100.0 * share);
    let first = ["original".into(), String::new(), bytes(original.bytes), share(1.0)];
    table.row(first.into_iter().chain([perplexity(original.score.perplexity)]));
    for row in rows {
        let head = [row.method.clone(), format!("{} %", (1e6 * row.remove).round() / 1e4)];
        let rest = match &row.measured {
            None => {
                let why = output::line(row.error.as_deref().unwrap_or("no result"));
                ["–"; 6].map(String::from).into_iter().chain([why]).collect::<Vec<_>>()
            }
            Some(measured) => {
                let time = measured.seconds;
                vec![
                    bytes(measured.bytes),
                    share(measured.routed_parameters_kept),
                    perplexity(measured.score.perplexity),
                    format!("{:.4}", measured.kl),
                    share(measured.top1_agreement),
                    seconds(time.plan + time.compress + time.evaluate),
                ]
            }
        };
        table.row(head.into_iter().chain(rest));
    }
    let Comparison { calibration_tokens, seconds: elapsed, device, .. } = comparison;
    let tokens = original.score.tokens;
    format!(
        "{table}\ncalibrated on {calibration_tokens} tokens, scored on {tokens} predictions, {} on {device}\n",
        seconds(*elapsed)
    )
}
