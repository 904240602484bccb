//! The chain through the command line: every step's JSON has the fields that scripts rely on, and the numbers fit each
//! other.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{read, shared};
use moepress::tokens::{Bos, Tokenizer};
use serde_json::Value;

/// Runs a command with `--json` and returns what it prints.
fn moepress(arguments: &[&str], dir: &Path) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moepress"));
    let output = command.args(arguments).args(["--json", "--quiet"]).current_dir(dir).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {message}");
    assert!(message.is_empty(), "{arguments:?}: {message}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(name).display().to_string()
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in {value}"))
}

#[test]
fn every_step_prints_what_the_next_one_needs() {
    let dir = tempfile::tempdir().unwrap();
    let (model, code, manual) =
        (example("model"), example("text/code.calibration.txt"), example("text/manual.calibration.txt"));
    let held_out = example("text/code.evaluation.txt");
    let run = |arguments: &[&str]| moepress(arguments, dir.path());

    let before = run(&["inspect", &model]);
    assert_eq!(before["family"], "qwen2_moe");
    let routed = number(&before, "/parameters/routed_experts");
    assert_eq!(routed, (4 * 16 * 3 * 128 * 96) as f64);

    // Two passes over two texts add up to one over both.
    let limits = ["--window-length", "128", "--windows", "12"];
    let calibrated =
        run(&[&["calibrate", &model, "--text", &code, "--out", "code.stats"], &limits[..]].concat());
    assert_eq!(number(&calibrated, "/tokens"), 12.0 * 128.0);
    run(&[&["calibrate", &model, "--text", &manual, "--out", "manual.stats"], &limits[..]].concat());
    let merged = run(&["merge", "code.stats", "manual.stats", "--out", "both.stats"]);
    assert_eq!(number(&merged, "/tokens"), 24.0 * 128.0);

    let plan =
        run(&["plan", "--method", "reap", "--remove", "0.25", "--stats", "both.stats", "--out", "plan.json"]);
    assert_eq!(plan["method"], "reap");
    assert_eq!(plan["experts_kept"], serde_json::json!([12, 12, 12, 12]));
    assert_eq!(number(&plan, "/expected/routed_parameters"), routed * 0.75);
    assert!(number(&plan, "/seconds") >= 0.0);
    assert_eq!(plan.pointer("/coverage/0/file").unwrap(), "code.calibration.txt");
    assert!((0.5..1.0).contains(&number(&plan, "/coverage/0/kept")));
    assert!((0.5..1.0).contains(&number(&plan, "/coverage/1/kept")));

    let compressed = run(&["compress", &model, "--plan", "plan.json", "--out", "small"]);
    assert_eq!(compressed["layout"], "hf");
    assert_eq!(number(&compressed, "/bytes_before"), number(&before, "/bytes/total"));
    assert_eq!(number(&compressed, "/bytes_after"), number(&plan, "/expected/bytes"));
    assert_eq!(number(&compressed, "/routed_parameters_before"), routed);
    assert_eq!(number(&compressed, "/routed_parameters_after"), routed * 0.75);
    let after = run(&["inspect", "small"]);
    assert_eq!(number(&after, "/bytes/total"), number(&compressed, "/bytes_after"));
    assert_eq!(after.pointer("/moe_layers/0/experts").unwrap(), 12);
    assert_eq!(after.pointer("/moe_layers/0/forms/dense").unwrap(), 12);

    let evaluate = ["eval", "small", "--text", &held_out, "--window-length", "128", "--windows", "8"];
    let alone = run(&evaluate);
    assert!(alone["against"].is_null());
    assert_eq!(alone.pointer("/files/0/file").unwrap(), "code.evaluation.txt");
    assert_eq!(number(&alone, "/files/0/tokens"), 8.0 * 127.0);
    assert_eq!(number(&alone, "/overall/nll").exp(), number(&alone, "/overall/perplexity"));
    assert_eq!(alone["device"], "cpu");
    let compared = run(&[&evaluate[..], &["--against", &model]].concat());
    assert_eq!(compared["overall"], alone["overall"]);
    assert!(number(&compared, "/against/kl") > 0.0);
    assert!((0.0..=1.0).contains(&number(&compared, "/against/top1_agreement")));
}

/// A plan by bytes is the largest that fits, measured on the files themselves.
#[test]
fn a_budget_in_bytes_holds_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let model = example("model");
    let run = |arguments: &[&str]| moepress(arguments, dir.path());
    let weights =
        |out: &str| std::fs::metadata(dir.path().join(out).join("model.safetensors")).unwrap().len();
    let compress = |budget: [&str; 2], out: &str| {
        let file = format!("{out}.json");
        let plan = ["plan", "--method", "random", budget[0], budget[1], "--model", &model, "--out", &file];
        let plan = run(&plan);
        run(&["compress", &model, "--plan", &file, "--out", out]);
        plan["experts_kept"][0].as_u64().unwrap()
    };
    for (size, out) in [("6MB", "six"), ("4.5MiB", "four and a half"), ("5555555", "plain")] {
        let limit = moepress::plan::parse_size(size).unwrap();
        let kept = compress(["--bytes", size], out);
        assert!(weights(out) <= limit, "{size}: {} bytes on disk", weights(out));
        let more = format!("{out} and more");
        compress(["--experts", &(kept + 1).to_string()], &more);
        assert!(weights(&more) > limit, "{size}: one more expert would fit");
    }
}

/// The reference tokenised the texts with the tokenizers library of Python.
#[test]
fn texts_become_the_reference_tokens() {
    let Some(shared) = shared("reference") else { return };
    let expected = read(&shared.join("qwen2_moe/tokens.safetensors"), "calib");
    let tokenizer = Tokenizer::open(Path::new(&example("model")), Bos::Auto).unwrap();
    let names = ["scripture", "manual", "code", "dictionary", "arithmetic"];
    let files: Vec<PathBuf> =
        names.iter().map(|n| shared.join("../text").join(format!("{n}.calibration.txt"))).collect();
    let mut windows = tokenizer.windows(&files, 256).unwrap();
    windows.truncate_files(16);
    assert_eq!(windows.ids.iter().map(|&id| f64::from(id)).collect::<Vec<_>>(), expected);
}
