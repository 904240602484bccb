//! The whole chain on a small trained model inside the repository: calibrate once, plan and compress in several ways,
//! evaluate each result, and print what it cost and what it saved.
//!
//! ```text
//! cargo run --release --example chain
//! ```

#![allow(clippy::print_stdout, reason = "the table is what the example is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as Calibration, Statistics, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Options as Compression, compress};
use moepress::eval::{against, perplexity};
use moepress::model::Model;
use moepress::plan::{Budget, Request, method};
use moepress::tokens::{Bos, Tokenizer, Windows};

/// Options of a method, as `--set KEY=VALUE` gives them.
type Set = &'static [(&'static str, &'static str)];

/// Method, fraction of the routed-expert parameters to remove, options.
const RUNS: [(&str, f64, Set); 6] = [
    ("random", 0.25, &[]),
    ("frequency", 0.25, &[]),
    ("reap", 0.25, &[]),
    ("reap", 0.50, &[]),
    ("low-rank", 0.25, &[("whiten", "false")]),
    ("low-rank", 0.25, &[]),
];

const WINDOW_LENGTH: usize = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
    let work = std::env::temp_dir().join(format!("moepress-chain-{}", std::process::id()));
    std::fs::create_dir(&work)?;
    let outcome = chain(&data, &work);
    std::fs::remove_dir_all(&work)?;
    outcome
}

fn chain(data: &Path, work: &Path) -> Result<(), Box<dyn Error>> {
    let checkpoint = Checkpoint::open(data.join("model"))?;
    let tokenizer = Tokenizer::open(checkpoint.dir(), Bos::Auto)?;
    let calibration = windows(&tokenizer, data, "calibration", 32)?;
    let evaluation = windows(&tokenizer, data, "evaluation", 16)?;
    let original = Model::new(&checkpoint, &Cpu, WINDOW_LENGTH)?;

    // One pass measures everything that any of the methods below needs.
    let options =
        Calibration { second: vec![Moment::InputGram, Moment::HiddenGram], ..Calibration::default() };
    let statistics = calibrate(&original, &calibration, &options, &work.join("statistics"), &mut ())?;
    println!(
        "calibrated on {} tokens of {} kinds of text\n",
        statistics.tokens().tokens,
        statistics.tokens().files.len()
    );
    println!("method            removed        bytes  perplexity  KL to original  top-1 same  tokens/s");

    row("original", 0.0, checkpoint.bytes(), &original, &original, &evaluation)?;
    for (i, (name, remove, set)) in RUNS.into_iter().enumerate() {
        let out = work.join(i.to_string());
        let bytes = press(&original, &statistics, name, remove, set, &out)?;
        let compressed = Checkpoint::open(&out)?;
        let model = Model::new(&compressed, &Cpu, WINDOW_LENGTH)?;
        let label = match set {
            [("whiten", "false")] => format!("{name}, plain"),
            _ => name.to_string(),
        };
        row(&label, remove, bytes, &model, &original, &evaluation)?;
    }
    Ok(())
}

/// The first windows of every text of one kind.
fn windows(tokenizer: &Tokenizer, data: &Path, kind: &str, count: usize) -> Result<Windows, Box<dyn Error>> {
    let names = ["scripture", "manual", "code", "arithmetic"];
    let files: Vec<PathBuf> =
        names.iter().map(|n| data.join("text").join(format!("{n}.{kind}.txt"))).collect();
    let mut windows = tokenizer.windows(&files, WINDOW_LENGTH)?;
    windows.truncate_files(count);
    Ok(windows)
}

/// Plans and compresses; returns the bytes of the result.
fn press(
    model: &Model<'_, Cpu>,
    statistics: &Statistics,
    name: &str,
    remove: f64,
    set: Set,
    out: &Path,
) -> Result<u64, Box<dyn Error>> {
    let options: BTreeMap<String, String> = set.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    let plan = method(name)?.plan(&Request {
        statistics: Some(&statistics.first_moments()?),
        budget: Some(Budget::remove(remove)?),
        options: &options,
        ..Request::new(statistics.profile())
    })?;
    let options = Compression { statistics: Some(statistics), ..Compression::default() };
    Ok(compress(model, &plan, &options, out, &mut ())?.bytes_after)
}

/// Evaluates a model and prints its line of the table.
fn row(
    name: &str,
    removed: f64,
    bytes: u64,
    model: &Model<'_, Cpu>,
    original: &Model<'_, Cpu>,
    evaluation: &Windows,
) -> Result<(), Box<dyn Error>> {
    let alone = perplexity(model, evaluation, &mut ())?;
    let compared = against(model, original, evaluation, &mut ())?.against.ok_or("nothing was compared")?;
    println!(
        "{name:<16} {:>6.0} % {:>8.2} MiB {:>11.2} {:>15.3} {:>9.1} % {:>9.0}",
        100.0 * removed,
        bytes as f64 / f64::from(1 << 20),
        alone.overall.perplexity,
        compared.kl,
        100.0 * compared.top1_agreement,
        alone.tokens_per_second
    );
    Ok(())
}
