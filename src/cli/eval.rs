//! `moepress eval`: perplexity, agreement with the original, multiple choice.

use std::path::PathBuf;

use clap::ArgGroup;
use moepress::backend::Backend;
use moepress::checkpoint::Checkpoint;
use moepress::eval::{
    Against, Evaluation, MultipleChoice, Questions, Score, Skipping, against, multiple_choice, perplexity,
};
use moepress::model::{Model, open_architecture};
use serde_json::json;

use super::common::{Device, DeviceArgs, OutputArgs, TextInput};
use super::failure::Failure;
use super::output;
use super::table::{Align, Table};
use super::units::{counted, rate, seconds};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("windows_input").args(["tokens", "text"])))]
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
        if self.against.is_some() && !self.text.is_given() {
            let what = "--against needs --text or --tokens: questions are not compared with the original's";
            return Err(Failure::Usage(what.into()));
        }
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let architecture = open_architecture(&checkpoint)?;
        let mut report = self.output.report();
        let questions = match &self.multiple_choice {
            None => None,
            Some(path) => Some((Questions::read(path)?, self.text.tokenizer(&self.model)?)),
        };
        let evaluation = if self.text.is_given() {
            let windows = self.text.load(&self.model, &architecture)?;
            let model = Model::new(&checkpoint, backend, windows.longest())?;
            Some(match &self.against {
                None => perplexity(&model, &windows, &mut report)?,
                Some(original) => {
                    let original = Checkpoint::open(original)?;
                    let original = Model::new(&original, backend, windows.longest())?;
                    against(&model, &original, &windows, &mut report)?
                }
            })
        } else {
            None
        };
        let choices = match questions {
            None => None,
            Some((questions, tokenizer)) => {
                let model = Model::new(&checkpoint, backend, 1)?;
                Some(multiple_choice(&model, &tokenizer, &questions, &mut report)?)
            }
        };
        drop(report);
        match evaluation {
            Some(mut evaluation) => {
                evaluation.multiple_choice = choices;
                if self.output.json { output::json(&evaluation) } else { output::text(&page(&evaluation)) }
            }
            None if self.output.json => {
                output::json(&json!({ "multiple_choice": choices, "device": backend.device() }))
            }
            None => output::text(&choices.iter().map(choice_line).collect::<String>()),
        }
    }
}

fn page(evaluation: &Evaluation) -> String {
    let mut table = Table::new([
        ("file", Align::Left),
        ("tokens", Align::Right),
        ("nll", Align::Right),
        ("perplexity", Align::Right),
    ]);
    let mut row = |name: &str, score: &Score| {
        let perplexity = format!("{:.3}", score.perplexity);
        table.row([name.to_string(), score.tokens.to_string(), format!("{:.4}", score.nll), perplexity]);
    };
    for file in &evaluation.files {
        row(&file.file, &file.score);
    }
    row("overall", &evaluation.overall);
    if let Some(against) = &evaluation.against {
        row("overall, original", &against.original);
    }
    let mut text = format!("{table}\n");
    if let Some(Against { kl, top1_agreement, .. }) = evaluation.against {
        let agreement = 100.0 * top1_agreement;
        text += &format!(
            "KL divergence from the original {kl:.4} nats per token, top-1 agreement {agreement:.1} %\n"
        );
    }
    text += &evaluation.skipping.iter().map(skipping_line).collect::<String>();
    text += &evaluation.multiple_choice.iter().map(choice_line).collect::<String>();
    let Evaluation { seconds: elapsed, tokens_per_second, device, .. } = evaluation;
    text + &format!("{} on {device} ({})\n", seconds(*elapsed), rate(*tokens_per_second))
}

/// How many of the chosen experts ran.
fn skipping_line(skipping: &Skipping) -> String {
    let means = || skipping.layers.iter().map(|l| l.mean_active);
    let (least, most) = (means().fold(f64::INFINITY, f64::min), means().fold(0.0, f64::max));
    let top_k = skipping.layers.iter().map(|l| l.top_k).max().unwrap_or(0);
    let layers = counted(skipping.layers.len(), "layer");
    format!(
        "{:.1} % of the chosen experts skipped: {least:.2} to {most:.2} of {top_k} run per token, in {layers}\n",
        100.0 * skipping.skipped
    )
}

fn choice_line(choices: &MultipleChoice) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let MultipleChoice { questions, accuracy, accuracy_normalised, .. } = choices;
    format!(
        "{}: accuracy {}, length-normalised {}\n",
        counted(*questions, "question"),
        percent(*accuracy),
        percent(*accuracy_normalised)
    )
}
