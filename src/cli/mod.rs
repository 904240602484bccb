//! The command line: parse, call the library, show progress, print. No logic.

mod calibrate;
mod common;
mod compare;
mod compress;
mod eval;
mod failure;
mod generate;
mod inspect;
mod merge;
mod methods;
mod output;
mod plan;
mod progress;
mod recover;
mod run;
mod table;
mod units;
mod upcycle;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use failure::Failure;

/// Makes mixture-of-experts language models smaller, and runs the result.
#[derive(Debug, Parser)]
#[command(name = "moepress", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a checkpoint is: layers, router, experts, parameters, bytes
    Inspect(inspect::Args),
    /// Compute the logits of given token ids
    Run(run::Args),
    /// Measure how a model uses its experts on your text
    Calibrate(calibrate::Args),
    /// Add up statistics of different texts
    Merge(merge::Args),
    /// Decide what becomes of every expert
    Plan(plan::Args),
    /// Write the smaller checkpoint that a plan describes
    Compress(compress::Args),
    /// Train compressed experts towards the original's
    Recover(recover::Args),
    /// Perplexity, and agreement with the original
    Eval(eval::Args),
    /// Try many methods on one model, side by side
    Compare(compare::Args),
    /// Make one MoE checkpoint of dense ones
    Upcycle(upcycle::Args),
    /// Continue a text, token by token
    Generate(generate::Args),
    /// List the compression methods, their options and papers
    Methods(methods::Args),
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    moepress::checkpoint::signals_become_messages();
    let outcome = match Cli::try_parse() {
        Ok(cli) => match cli.command {
            Command::Inspect(args) => args.run(),
            Command::Run(args) => args.run(),
            Command::Calibrate(args) => args.run(),
            Command::Merge(args) => args.run(),
            Command::Plan(args) => args.run(),
            Command::Compress(args) => args.run(),
            Command::Recover(args) => args.run(),
            Command::Eval(args) => args.run(),
            Command::Compare(args) => args.run(),
            Command::Upcycle(args) => args.run(),
            Command::Generate(args) => args.run(),
            Command::Methods(args) => args.run(),
        },
        // Help and version go to standard output, with the terminal's colours.
        Err(e) if matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            e.print().map_err(Failure::output)
        }
        Err(e) => Err(Failure::Usage(in_one_line(&e))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// What clap says in a paragraph, in one line: the error and its tip, and where to read on.
fn in_one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let command = Cli::command();
        let names: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
        return format!("a command is needed: {}; see `moepress --help`", names.join(", "));
    }
    let text = error.to_string();
    let mut message = String::new();
    let mut lists = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if line.is_empty() {
            continue;
        }
        let (line, separator) = match line.strip_prefix("tip: ") {
            Some(tip) => (tip, "; "),
            None if lists => (line, ", "),
            None => (line, " "),
        };
        if !message.is_empty() {
            message.push_str(separator);
        }
        message.push_str(line.strip_prefix("error: ").unwrap_or(line));
        // A line that ends with a colon is followed by one argument per line.
        lists = lists || line.starts_with('-') || line.starts_with('<');
    }
    // The values that would be right are enough of a hint.
    if message.contains("[possible values: ") {
        return message;
    }
    let given: Vec<_> = std::env::args_os().skip(1).collect();
    let named = |command: &&clap::Command| given.iter().any(|a| a == command.get_name());
    let command = Cli::command();
    let command = command.get_subcommands().find(named).map(|c| format!(" {}", c.get_name()));
    format!("{message}; see `moepress{} --help`", command.unwrap_or_default())
}
