//! Comparing in memory gives what planning, compressing and evaluating one after the other give.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};

use common::command::{Outcome, command, moepress, outcome};
use common::compress::tokens;
use common::data;
use moepress::tokens::{SourceFile, Windows, write_token_file};
use serde_json::Value;

/// A folder with calibration and evaluation tokens for models of 64 tokens.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Desk(tempfile::tempdir().unwrap());
        write_token_file(&desk.path("calibration"), &tokens()).unwrap();
        let ids = (0..120u32).map(|i| (i * 29 + i * i * 3 + 7) % 64).collect();
        let files = vec![SourceFile { name: "evaluation".into(), windows: 5 }];
        let windows = Windows { ids, mask: None, count: 5, length: 24, files, decoder: None };
        write_token_file(&desk.path("evaluation"), &windows).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn compare(&self, model: &Path, more: &[&str]) -> Outcome {
        let mut command = command(["compare", "--quiet", "--device", "cpu"]);
        command.arg(model).arg("--tokens").arg(self.path("calibration"));
        command.arg("--eval-tokens").arg(self.path("evaluation")).args(more);
        outcome(command)
    }

    /// The same by way of files: statistics, plan, checkpoint, evaluation.
    fn by_files(&self, model: &Path, method: &str, remove: &str, set: &[&str]) -> (Value, Value) {
        let model = model.to_str().unwrap();
        let name = |file: &str| self.path(file).to_str().unwrap().to_string();
        let (stats, plan, out) = (name("stats"), name("plan"), name("out"));
        let (calibration, evaluation) = (name("calibration"), name("evaluation"));
        let run = |arguments: &[&str]| moepress(arguments.iter().chain(&["--quiet"]));
        run(&["calibrate", model, "--tokens", &calibration, "--out", &stats]).ok();
        let mut planning = vec!["plan", "--method", method, "--remove", remove, "--stats", &stats];
        planning.extend(["--model", model, "--out", &plan]);
        if !set.is_empty() {
            planning.push("--set");
            planning.extend(set);
        }
        run(&planning).ok();
        let compress =
            ["compress", model, "--plan", &plan, "--tokens", &calibration, "--out", &out, "--json"];
        let report = run(&compress).json();
        let score = run(&["eval", &out, "--tokens", &evaluation, "--against", model, "--json"]).json();
        std::fs::remove_dir_all(&out).unwrap();
        (report, score)
    }
}

fn row<'a>(comparison: &'a Value, method: &str, remove: f64) -> &'a Value {
    let rows = comparison["rows"].as_array().unwrap();
    rows.iter().find(|r| r["method"] == method && r["remove"] == remove).unwrap()
}

#[test]
fn rows_are_what_compress_and_eval_give() {
    let desk = Desk::new();
    let cases: [(&str, &str, &[&str]); 4] = [
        ("mixtral", "reap", &[]),
        ("qwen2_moe", "wean", &["propagate=true"]),
        ("gpt_oss", "frequency", &[]),
        ("qwen3_moe_fused", "low-rank", &["propagate=true", "allocate=spectrum"]),
    ];
    for (model, method, set) in cases {
        let model = data(model);
        let spec = [&[method], set].concat().join(":");
        let comparison = desk.compare(&model, &["--remove", "0.25", "--methods", &spec, "--json"]).json();
        // Options are listed by name.
        let mut sorted = set.to_vec();
        sorted.sort_unstable();
        let row = row(&comparison, &[&[method], &sorted[..]].concat().join(":"), 0.25);
        let (report, score) = desk.by_files(&model, method, "0.25", set);
        assert_eq!(row["error"], Value::Null);
        assert_eq!(row["bytes"], report["bytes_after"], "{model:?}");
        assert_eq!(row["routed_parameters"], report["routed_parameters_after"], "{model:?}");
        for key in ["tokens", "nll", "perplexity"] {
            assert_eq!(row[key], score["overall"][key], "{model:?} {key}");
            assert_eq!(comparison["original"][key], score["against"]["original"][key], "{model:?} {key}");
        }
        assert_eq!(row["kl"], score["against"]["kl"]);
        assert_eq!(row["top1_agreement"], score["against"]["top1_agreement"]);
        assert_eq!(row["files"][0]["nll"], score["files"][0]["nll"]);
    }
}

#[test]
fn statistics_in_place_of_a_pass_give_the_same_rows() {
    let desk = Desk::new();
    let model = data("mixtral");
    let stats = desk.path("stats");
    let mut calibrate = command(["calibrate", "--quiet", "--moments", "input,hidden"]);
    calibrate.arg(&model).arg("--tokens").arg(desk.path("calibration")).arg("--out").arg(&stats);
    outcome(calibrate).ok();
    let mut from_stats = command(["compare", "--quiet", "--json", "--methods", "reap,low-rank"]);
    from_stats.arg(&model).arg("--stats").arg(&stats).arg("--eval-tokens").arg(desk.path("evaluation"));
    let from_stats = outcome(from_stats).json();
    let measured = desk.compare(&model, &["--methods", "reap,low-rank", "--json"]).json();
    for (a, b) in from_stats["rows"].as_array().unwrap().iter().zip(measured["rows"].as_array().unwrap()) {
        assert_eq!(a["nll"], b["nll"]);
        assert!(a["nll"].is_f64());
    }
}

#[test]
fn every_method_has_its_rows_and_threads_change_nothing() {
    let desk = Desk::new();
    let plot = desk.path("plot.svg");
    let run = |threads: &str| {
        let mut command = command(["compare", "--quiet", "--json", "--remove", "0.25,0.5"]);
        command.arg(data("qwen2_moe")).arg("--tokens").arg(desk.path("calibration"));
        command.arg("--eval-tokens").arg(desk.path("evaluation")).arg("--plot").arg(&plot);
        let mut comparison = outcome({
            command.env("RAYON_NUM_THREADS", threads);
            command
        })
        .json();
        comparison["seconds"] = Value::Null;
        for row in comparison["rows"].as_array_mut().unwrap() {
            row["seconds"] = Value::Null;
        }
        (comparison, std::fs::read_to_string(&plot).unwrap())
    };
    let (comparison, svg) = run("1");
    assert_eq!(run("2"), (comparison.clone(), svg.clone()));
    let planned = moepress::plan::methods().iter().filter(|m| !m.needs().tokens && !m.needs().checkpoint);
    let methods: Vec<&str> = planned.map(|m| m.name()).collect();
    assert_eq!(comparison["rows"].as_array().unwrap().len(), 2 * methods.len());
    assert!(!methods.contains(&"router-norm") && methods.contains(&"mc-smoe"));
    for method in methods {
        for remove in [0.25, 0.5] {
            let row = row(&comparison, method, remove);
            assert!(row["perplexity"].is_f64() || row["error"].is_string(), "{row}");
        }
        let drawn = row(&comparison, method, 0.25)["perplexity"].is_f64();
        assert_eq!(svg.contains(&format!(">{method}</text>")), drawn, "{method}");
    }
    for text in ["qwen2_moe: perplexity against size", "size of all tensors", "original"] {
        assert!(svg.contains(text), "{text}");
    }
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
}

#[test]
fn what_a_method_cannot_do_is_a_row_that_says_why() {
    let desk = Desk::new();
    // Three of four experts cannot be dropped where every token needs two.
    let arguments = ["--methods", "reap,low-rank:rank=1", "--remove", "0.5,0.99"];
    let comparison = desk.compare(&data("mixtral"), &[&arguments[..], &["--json"]].concat()).json();
    assert!(row(&comparison, "reap", 0.5)["error"].is_null());
    let problem = row(&comparison, "reap", 0.99)["error"].as_str().unwrap();
    assert!(problem.contains("0.99"), "{problem}");
    let problem = row(&comparison, "low-rank:rank=1", 0.5)["error"].as_str().unwrap();
    assert!(problem.contains("rank"), "{problem}");
    assert!(row(&comparison, "reap", 0.99).get("perplexity").is_none());
    let table = desk.compare(&data("mixtral"), &arguments).ok();
    assert!(
        table.lines().any(|l| l.starts_with("reap") && l.contains("99 %") && l.contains("0.99:")),
        "{table}"
    );
}

#[test]
fn no_result_at_all_is_a_failure() {
    let desk = Desk::new();
    let failed = desk.compare(&data("mixtral"), &["--methods", "low-rank:rank=1", "--json"]);
    assert_eq!(failed.status, 1);
    let rows = &serde_json::from_str::<Value>(&failed.stdout).unwrap()["rows"];
    assert!(rows.as_array().unwrap().iter().all(|row| row["error"].is_string()), "{rows}");
    let expected = "error: no method has a result; low-rank:rank=1: option rank=1: cannot be combined with";
    assert!(failed.stderr.starts_with(expected) && failed.stderr.lines().count() == 1, "{}", failed.stderr);
}

#[test]
fn bad_input_is_refused_in_one_line_before_any_work() {
    let desk = Desk::new();
    let model = data("mixtral");
    let error = |more: &[&str], status| desk.compare(&model, more).error(status);
    let message = error(&["--methods", "reap,best"], 2);
    assert!(message.contains("unknown method `best`") && message.contains("low-rank"), "{message}");
    let message = error(&["--methods", "reap:scope"], 2);
    assert!(message.contains("`scope` is no option, expected KEY=VALUE"), "{message}");
    let message = error(&["--methods", "low-rank,reap:scope=foo"], 2);
    assert!(message.starts_with("option scope=foo: expected one of layer, global"), "{message}");
    for remove in ["0", "1", "1.5", "-0.5", "0.25,x", "nan"] {
        let message = error(&["--remove", remove], 2);
        assert!(message.contains("expected a number between 0 and 1"), "{message}");
    }
    let folder = desk.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let message = error(&["--plot", folder.to_str().unwrap()], 1);
    assert!(message.starts_with("--plot ") && message.contains("is a folder"), "{message}");
    let message = error(&["--plot", desk.path("missing/plot.svg").to_str().unwrap()], 1);
    assert!(message.contains("does not exist"), "{message}");
    let message = error(&["--plot", desk.path("evaluation").to_str().unwrap()], 1);
    assert!(message.contains("which is read"), "{message}");

    let ids = vec![1, 2, 3, 999];
    let files = vec![SourceFile { name: "other".into(), windows: 1 }];
    let other = Windows { ids, mask: None, count: 1, length: 4, files, decoder: None };
    write_token_file(&desk.path("other"), &other).unwrap();
    let mut foreign = command(["compare", "--quiet"]);
    foreign.arg(&model).arg("--tokens").arg(desk.path("calibration"));
    foreign.arg("--eval-tokens").arg(desk.path("other"));
    let message = outcome(foreign).error(1);
    assert!(message.contains("other") && message.contains("999"), "{message}");

    let mut nothing = command(["compare", "--quiet"]);
    nothing.arg(&model).arg("--eval-tokens").arg(desk.path("evaluation"));
    let message = outcome(nothing).error(2);
    assert!(message.contains("--tokens") && message.contains("--stats"), "{message}");
}
