//! Recovering: compressed experts get closer to the original's, nothing gets worse, and runs can be stopped.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::command::{Outcome, command, outcome};
use common::compress::{files, tokens};
use common::{Mutant, data, generate};
use moepress::tokens::{SourceFile, Windows, write_token_file};
use serde_json::Value;

/// A folder with tokens for models of 64 tokens, and compressed checkpoints.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Desk(tempfile::tempdir().unwrap());
        let ids = (0..40 * 24u32).map(|i| (i * 37 + i / 24 * 11 + i * i * 5) % 64).collect();
        let files = vec![SourceFile { name: "tokens".into(), windows: 40 }];
        write_token_file(
            &desk.path("tokens"),
            &Windows { ids, mask: None, count: 40, length: 24, files, decoder: None },
        )
        .unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let mut command = command(arguments.iter().chain(&["--quiet"]));
        command.current_dir(self.0.path());
        outcome(command)
    }

    /// Compresses `model` to the folder `out`.
    fn compress(&self, model: &Path, method: &str, remove: &str, out: &str) {
        let model = model.to_str().unwrap();
        self.run(&["calibrate", model, "--tokens", "tokens", "--out", "stats"]).ok();
        self.run(&["plan", "--method", method, "--remove", remove, "--stats", "stats", "--out", "plan"]).ok();
        self.run(&["compress", model, "--plan", "plan", "--tokens", "tokens", "--out", out]).ok();
    }

    fn recover(&self, original: &Path, compressed: &str, out: &str, more: &[&str]) -> Command {
        let mut command = command(["recover", "--quiet", "--device", "cpu", "--json"]);
        command.current_dir(self.0.path()).arg(original).arg(compressed);
        command.args(["--tokens", "tokens", "--out", out]).args(more);
        command
    }

    fn kl(&self, model: &str, original: &Path) -> f64 {
        let against = original.to_str().unwrap();
        let score = self.run(&["eval", model, "--tokens", "tokens", "--against", against, "--json"]).json();
        score["against"]["kl"].as_f64().unwrap()
    }
}

const SHORT: [&str; 4] = ["--steps", "60", "--batch", "256"];

#[test]
fn experts_get_closer_in_every_form_and_layout() {
    let desk = Desk::new();
    // Pruned and stock; low rank in the moepress layout; fused tensors; a shared expert; inputs that are weighted.
    let cases = [
        ("mixtral", "reap", "0.25", "recovered", "hf"),
        ("qwen2_moe", "low-rank", "0.4", "original", "moepress"),
        ("qwen3_moe_fused", "frequency", "0.25", "recovered", "hf"),
        ("gpt_oss", "low-rank", "0.5", "recovered", "moepress"),
        ("llama4_text", "low-rank", "0.5", "original", "moepress"),
        // What the experts give enters the residual stream by a factor, and through a norm.
        ("granitemoe", "reap", "0.3", "recovered", "hf"),
        ("flex_olmo", "low-rank", "0.5", "recovered", "moepress"),
        // Experts that work on a latent, with maps into and out of it that have biases.
        ("nemotron_h_latent", "reap", "0.3", "recovered", "hf"),
        ("nemotron_h_latent", "low-rank", "0.4", "original", "moepress"),
    ];
    for (i, (model, method, remove, input, layout)) in cases.into_iter().enumerate() {
        let model = data(model);
        let (small, out) = (format!("small {i}"), format!("out {i}"));
        desk.compress(&model, method, remove, &small);
        let before = files(&desk.path(&small));
        let more = [&SHORT[..], &["--input", input]].concat();
        let report = outcome(desk.recover(&model, &small, &out, &more)).json();
        assert_eq!(report["layout"], layout, "{model:?}");
        let layers = report["layers"].as_array().unwrap();
        assert!(!layers.is_empty());
        for layer in layers {
            let loss = |key: &str| layer[key].as_f64().unwrap();
            assert!(
                loss("after") <= loss("least_squares") && loss("least_squares") <= loss("before"),
                "{layer}"
            );
        }
        assert!(layers.iter().any(|l| l["after"].as_f64() < l["before"].as_f64()), "{model:?}");
        assert!(desk.kl(&out, &model) < desk.kl(&small, &model), "{model:?} {method}");
        // Only experts changed: routers, config and layout file are as they were.
        let after = files(&desk.path(&out));
        for name in ["config.json", "moepress.json", "moepress-plan.json"] {
            assert_eq!(before.get(name), after.get(name), "{name}");
        }
        let inspect = |dir: &str| desk.run(&["inspect", dir, "--json"]).json();
        assert_eq!(inspect(&small)["moe_layers"], inspect(&out)["moe_layers"]);
        assert_eq!(inspect(&small)["bytes"], inspect(&out)["bytes"]);
    }
}

#[test]
fn a_checkpoint_that_lacks_nothing_stays_as_it_is() {
    let desk = Desk::new();
    let model = data("mixtral");
    let report = outcome(desk.recover(&model, model.to_str().unwrap(), "out", &SHORT)).json();
    for layer in report["layers"].as_array().unwrap() {
        assert!(
            layer["before"].as_f64().unwrap() < 1e-10 && layer["after"].as_f64() <= layer["before"].as_f64()
        );
    }
    assert!(desk.kl("out", &model) < 1e-6);
}

/// What recovering did the first time is not told of the second, nor kept when the checkpoint is made smaller still.
#[test]
fn recovering_what_was_recovered() {
    let desk = Desk::new();
    let model = data("mixtral");
    desk.compress(&model, "reap", "0.25", "small");
    let first = outcome(desk.recover(&model, "small", "once", &SHORT)).json();
    let second = outcome(desk.recover(&model, "once", "twice", &SHORT)).json();
    let losses = |report: &Value, key: &str| -> Vec<f64> {
        report["layers"].as_array().unwrap().iter().map(|l| l[key].as_f64().unwrap()).collect()
    };
    assert_ne!(losses(&first, "before"), losses(&second, "before"));
    let said = std::fs::read_to_string(desk.path("twice/moepress-recover.json")).unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    let told = said["layers"].as_array().unwrap().iter().filter_map(|l| l["loss"]["before"].as_f64());
    assert_eq!(told.collect::<Vec<_>>(), losses(&second, "before"));
    desk.compress(&desk.path("once"), "reap", "0.3", "smaller");
    assert!(!desk.path("smaller").join("moepress-recover.json").exists());
}

#[test]
fn threads_and_kills_change_nothing() {
    let desk = Desk::new();
    generate::mixtral(&desk.path("model"), &generate::Sizes { layers: 6, ..generate::Sizes::default() });
    generate::tokens(&desk.path("tokens"), 8, 64, 512);
    let model = desk.path("model");
    desk.compress(&model, "low-rank", "0.5", "small");
    for input in ["recovered", "original"] {
        let more = ["--steps", "4", "--batch", "128", "--input", input];
        let run = |out: &str, threads: &str| {
            let mut command = desk.recover(&model, "small", out, &more);
            command.env("RAYON_NUM_THREADS", threads);
            command
        };
        let once = format!("{input} once");
        let first = outcome(run(&once, "1")).json();
        let again = format!("{input} again");
        let work = desk.path(&format!("{again}.partial"));
        let mut child = run(&again, "2").spawn().unwrap();
        // Killed as soon as two layers are on disk.
        while !work.join("record-00001.json").exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let second = outcome(run(&again, "2")).json();
        assert_eq!(first["layers"], second["layers"]);
        assert!(files(&desk.path(&once)) == files(&desk.path(&again)), "{input}");
        // Done already: the same command says the same at once.
        assert_eq!(outcome(run(&again, "2")).json()["layers"], first["layers"]);
        assert!(!work.exists());
    }
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let desk = Desk::new();
    let model = data("mixtral");
    desk.compress(&model, "reap", "0.25", "small");
    let error = |original: &Path, compressed: &str, more: &[&str], status: i32| {
        let message = outcome(desk.recover(original, compressed, "out", more)).error(status);
        assert!(!desk.path("out").exists() && !desk.path("out.partial").exists());
        message
    };
    let message = error(&data("qwen2_moe"), "small", &[], 1);
    assert!(
        message.contains("small") && message.contains("expected a checkpoint that was made from"),
        "{message}"
    );
    let small = desk.path("small");
    let message = error(&small, model.to_str().unwrap(), &[], 1);
    assert!(message.contains("the original comes first"), "{message}");
    let message = error(&model, "missing", &[], 1);
    assert!(message.contains("missing: does not exist"), "{message}");
    for (flag, value) in
        [("--lr", "0"), ("--ridge", "-1"), ("--held-out", "1"), ("--batch", "0"), ("--steps", "x")]
    {
        let message = error(&model, "small", &[flag, value], 2);
        assert!(message.contains(flag), "{message}");
    }
    let one = Windows { count: 1, ids: tokens().ids[..24].to_vec(), ..tokens() };
    let files = vec![SourceFile { name: "one".into(), windows: 1 }];
    write_token_file(&desk.path("tokens"), &Windows { files, ..one }).unwrap();
    let message = error(&model, "small", &[], 1);
    assert!(message.contains("expected at least 2"), "{message}");

    // Outputs beyond f32.
    let broken = Mutant::of("mixtral");
    broken.edit_tensors(|tensors| {
        let names: Vec<String> = tensors.keys().filter(|n| n.contains(".experts.")).cloned().collect();
        for name in names {
            let tensor = &tensors[&name];
            let huge = vec![1e30; tensor.len()];
            let huge = moepress::checkpoint::Tensor::from_f32(
                name.as_str(),
                moepress::checkpoint::Dtype::F32,
                tensor.shape().to_vec(),
                &huge,
            );
            tensors.insert(name, huge);
        }
    });
    write_token_file(&desk.path("tokens"), &tokens()).unwrap();
    let message = error(broken.path(), "small", &[], 1);
    assert!(message.contains("layer 0") && message.contains("finite"), "{message}");
}

#[test]
fn merged_experts_become_low_rank_with_sparse_rows() {
    let desk = Desk::new();
    let model = data("qwen2_moe");
    desk.compress(&model, "m-smoe", "0.25", "merged");
    let more = [&SHORT[..], &["--losparse", "4:0.25"]].concat();
    let report = outcome(desk.recover(&model, "merged", "out", &more)).json();
    assert_eq!(report["layout"], "moepress");
    let bytes = |dir: &str| desk.run(&["inspect", dir, "--json"]).json()["bytes"]["total"].as_u64().unwrap();
    assert!(bytes("out") < bytes("merged"));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(desk.path("out/moepress.json")).unwrap()).unwrap();
    let experts = manifest["layers"][0]["experts"].as_array().unwrap();
    let low_rank: Vec<&Value> = experts.iter().filter(|e| e["form"] == "low_rank").collect();
    assert!(!low_rank.is_empty() && low_rank.iter().all(|e| e["rank"]["gate"] == 4), "{manifest}");
    assert!(low_rank.iter().any(|e| e["rows"]["up"].as_u64() > Some(0)), "{manifest}");
    assert!(desk.kl("out", &model).is_finite());
    for (value, flag) in [("4", "--losparse"), ("0:0.1", "--losparse"), ("4:1", "--losparse")] {
        let message = outcome(desk.recover(&model, "merged", "other", &["--losparse", value])).error(2);
        assert!(message.contains(flag) && message.contains("32:0.1"), "{message}");
    }
    let message = outcome(desk.recover(&model, "merged", "other", &["--losparse", "1000:0.1"])).error(1);
    assert!(message.contains("layer 1: rank 1000 with a share of 0.1 of the rows"), "{message}");
    assert!(message.contains("the largest rank that saves something is "), "{message}");
    assert!(!desk.path("other.partial").exists());
    let message =
        outcome(desk.recover(&model, "merged", "other", &["--losparse", "4:0.1", "--steps", "0"])).error(1);
    assert!(message.contains("expected at least 1 step"), "{message}");
}

#[test]
fn one_table_for_people() {
    let desk = Desk::new();
    let model = data("mixtral");
    desk.compress(&model, "reap", "0.25", "small");
    let arguments = ["recover", model.to_str().unwrap(), "small", "--tokens", "tokens", "--out", "out"];
    let page = desk.run(&[&arguments[..], &["--steps", "0"]].concat()).ok();
    assert!(page.starts_with("layer  loss before  least squares"), "{page}");
    assert!(page.contains("wrote") && page.contains("out"), "{page}");
    let _: Value =
        serde_json::from_slice(&std::fs::read(desk.path("out/moepress-recover.json")).unwrap()).unwrap();
}
