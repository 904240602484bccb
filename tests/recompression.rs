//! Checkpoints that were compressed before, whose experts differ in size, are compressed again: plans say what comes out,
//! and budgets hold.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::command::{Outcome, command, outcome};
use common::compress::{bits, masked, tokens};
use common::{data, generate, run};
use moepress::plan::Plan;
use serde_json::Value;

/// A folder with tokens of a vocabulary of 64.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Folder(tempfile::tempdir().unwrap());
        generate::tokens(&folder.0.path().join("tokens"), 12, 24, 64);
        folder
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// A command, its arguments in one line.
    fn run(&self, arguments: &str) -> Outcome {
        let mut command = command(arguments.split(' '));
        command.arg("--quiet").current_dir(self.path());
        outcome(command)
    }

    fn calibrate(&self, model: &str, stats: &str) {
        self.run(&format!("calibrate {model} --tokens tokens --moments all --out {stats}")).ok();
    }

    /// Plans `model` with `arguments` and carries the plan out in the folder `out`: what was expected, and what came.
    fn compress(&self, model: &str, arguments: &str, out: &str) -> (Value, Value) {
        let plan = self.run(&format!("plan {arguments} --out {out}.json --json")).json();
        let done = self
            .run(&format!("compress {model} --plan {out}.json --tokens tokens --out {out} --json"))
            .json();
        (plan["expected"].clone(), done)
    }

    /// Bytes of a checkpoint's weights on disk, headers included.
    fn bytes(&self, model: &str) -> u64 {
        let files = std::fs::read_dir(self.path().join(model)).unwrap().map(|f| f.unwrap());
        let weights = files.filter(|f| f.path().extension().is_some_and(|e| e == "safetensors"));
        weights.map(|f| f.metadata().unwrap().len()).sum()
    }
}

#[test]
fn plans_for_compressed_checkpoints_say_what_comes_out() {
    let folder = Folder::new();
    let model = data("qwen2_moe").to_string_lossy().into_owned();
    folder.calibrate(&model, "stats");
    let first = [
        ("mone", "--remove 0.25"),
        ("camera", "--remove 0.3"),
        ("hc-smoe", "--remove 0.25"),
        ("d2-moe", "--remove 0.3"),
        ("low-rank", "--remove 0.4 --set allocate=spectrum"),
        ("reap", "--remove 0.25 --set scope=global"),
    ];
    for (method, arguments) in first {
        folder.compress(
            &model,
            &format!("--method {method} {arguments} --stats stats --model {model}"),
            method,
        );
        let again = format!("{method}.stats");
        folder.calibrate(method, &again);
        let size = folder.bytes(method);
        let budgets = ["--remove 0.25".into(), format!("--bytes {}", size * 24 / 25)];
        for (i, (second, budget)) in
            ["reap", "frequency", "mone"].iter().flat_map(|m| budgets.iter().map(move |b| (m, b))).enumerate()
        {
            let name = format!("{method}-{i}");
            let asked = format!("--method {second} {budget} --stats {again}");
            let (expected, done) = folder.compress(method, &asked, &name);
            assert_eq!(expected["bytes"], done["bytes_after"], "{method}, then {asked}");
            let routed = &done["routed_parameters_after"];
            assert_eq!(&expected["routed_parameters"], routed, "{method}, then {asked}");
            if (*second, i) == ("reap", 0) {
                // Also where an expert goes whose weights others use.
                let plan = Plan::read(folder.path().join(format!("{name}.json"))).unwrap();
                let masked = masked(&folder.path().join(method), &plan, &tokens());
                let found = run(&folder.path().join(&name), &tokens()).logits;
                assert!(bits(&found) == bits(&masked), "{method}, then {asked}");
            }
            if budget.starts_with("--bytes") {
                assert!(folder.bytes(&name) <= size * 24 / 25, "{method}, then {asked}");
            }
        }
    }
}

/// Methods that average weights are refused where the statistics say that there are none to average, whatever the budget.
#[test]
fn only_dense_experts_are_planned_to_be_merged() {
    let folder = Folder::new();
    let model = data("qwen2_moe").to_string_lossy().into_owned();
    folder.calibrate(&model, "stats");
    folder.compress(&model, "--method low-rank --set rank=1 --stats stats", "factors");
    folder.compress(&model, "--method hc-smoe --remove 0.25 --stats stats", "merged");
    folder.run("plan --method camera --remove 0.25 --set allocate=uniform --stats stats --out p").ok();
    folder.run(&format!("compress {model} --plan p --layout moepress --out narrow")).ok();
    for first in ["factors", "merged", "narrow"] {
        folder.calibrate(first, &format!("{first}.stats"));
    }
    for method in ["m-smoe", "hc-smoe", "ream"] {
        for first in ["factors", "merged"] {
            let asked = format!("--method {method} --experts 1 --set router=redirect --stats {first}.stats");
            let line = folder.run(&format!("plan {asked} --out p")).error(1);
            let why = ": has no dense matrices of its own to average; start from the original checkpoint";
            assert!(line.starts_with("layer ") && line.ends_with(why), "{method}, {first}: {line}");
        }
        // Experts that are narrower all alike are as good as others.
        let again = format!("--method {method} --remove 0.25 --stats narrow.stats");
        let (expected, done) = folder.compress("narrow", &again, &format!("narrow-{method}"));
        assert_eq!(expected["bytes"], done["bytes_after"], "{method}");
    }
    folder.run("plan --method mc-smoe --experts 1 --stats factors.stats --out p").error(1);
}

#[test]
fn inspect_knows_widths_and_what_an_alias_costs() {
    let folder = Folder::new();
    let model = data("qwen2_moe").to_string_lossy().into_owned();
    folder.calibrate(&model, "stats");
    let asked = |method: &str| format!("--method {method} --remove 0.3 --stats stats");
    folder.compress(&model, &asked("camera"), "narrow");
    let found = folder.run("inspect narrow --json").json();
    let [least, most] = [0, 1].map(|i| found["moe_layers"][0]["widths"][i].as_u64().unwrap());
    assert!(least < most);
    let page = folder.run("inspect narrow").ok();
    assert!(page.contains(&format!("{least}–{most}")), "{page}");
    // Experts that stand for others run as those do: a token touches as much as before.
    folder.compress(&model, &asked("m-smoe"), "merged");
    let active =
        |model: &str| folder.run(&format!("inspect {model} --json")).json()["parameters"]["active"].clone();
    assert_eq!(active("merged"), active(&model));
}

#[test]
fn a_plan_finds_its_own_statistics() {
    let folder = Folder::new();
    let model = data("qwen2_moe").to_string_lossy().into_owned();
    folder.run(&format!("calibrate {model} --tokens tokens --out stats")).ok();
    folder.run("plan --method mone --remove 0.25 --stats stats --out plan").ok();
    folder.run(&format!("compress {model} --plan plan --out out")).ok();
    // Statistics that the plan does not need do not matter to a run that is started again.
    folder.run("plan --method reap --remove 0.25 --stats stats --out reap").ok();
    folder.run(&format!("compress {model} --plan reap --out pruned")).ok();
    std::fs::rename(folder.path().join("stats"), folder.path().join("elsewhere")).unwrap();
    folder.run(&format!("compress {model} --plan reap --out pruned")).ok();
}
