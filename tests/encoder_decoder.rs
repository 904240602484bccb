//! Models with an encoder: what ids mean, and that statistics, plans and compressed checkpoints treat the layers of
//! encoder and decoder alike.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::command::moepress;
use common::compress::{apply, bits, masked, plan_on};
use common::{data, encoder_windows, max_difference, read, run, shape};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as CalibrateOptions, calibrate, measure};
use moepress::checkpoint::Checkpoint;
use moepress::compress::Options;
use moepress::eval;
use moepress::model::Model;
use moepress::plan::Budget;
use moepress::tokens::{Windows, write_token_file};
use serde_json::{Value, json};

const MODELS: [&str; 2] = ["switch_transformers", "switch_transformers_untied"];

fn inputs(model: &str) -> Windows {
    encoder_windows(&data(model).join("golden.safetensors"))
}

/// Σ of a per-expert vector of every MoE layer.
fn totals(statistics: &moepress::calibrate::Statistics) -> Vec<(usize, f64)> {
    let layers = statistics.profile().moe_layers.iter();
    layers
        .map(|l| {
            let moments = statistics.moments(l.layer, &[Moment::Count]).unwrap();
            (l.layer, moments.per_expert(Moment::Count).iter().sum())
        })
        .collect()
}

#[test]
fn ids_feed_the_encoder_and_decoder_ids_the_decoder() {
    for model in MODELS {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        write_token_file(Path::new(&path("tokens")), &inputs(model)).unwrap();
        let dir = data(model).to_string_lossy().into_owned();
        moepress(["run", &dir, "--tokens", &path("tokens"), "--out", &path("out"), "--trace", "--quiet"])
            .ok();
        let (out, golden) = (folder.path().join("out"), data(model).join("golden.safetensors"));
        let logits: Vec<f32> = read(&out, "logits").into_iter().map(|v| v as f32).collect();
        assert_eq!(shape(&out, "logits").unwrap(), [2, 17, 64]);
        assert!(max_difference(&logits, &read(&golden, "logits")) < 1e-4, "{model}");
        // One numbering for the layers of both.
        assert_eq!(shape(&out, "layers.1.hidden").unwrap(), [2, 24, 32]);
        assert_eq!(shape(&out, "layers.1.router_logits").unwrap(), [48, 5]);
        assert_eq!(shape(&out, "layers.5.hidden").unwrap(), [2, 17, 32]);
        assert_eq!(shape(&out, "layers.5.top_k_weights").unwrap(), [34, 1]);
    }
}

#[test]
fn inspect_knows_both_stacks() {
    let dir = data("switch_transformers").to_string_lossy().into_owned();
    let found: Value = moepress(["inspect", &dir, "--json"]).json();
    assert_eq!((&found["layers"], &found["encoder_layers"]), (&json!(6), &json!(4)));
    let layers: Vec<_> = found["moe_layers"].as_array().unwrap().iter().map(|l| l["layer"].clone()).collect();
    assert_eq!(layers, [1, 3, 5]);
    assert_eq!(found["moe_layers"][0]["forms"], json!({"dense": 5}));
    // Two matrices of 32 × 24 each.
    assert_eq!(found["parameters"]["routed_experts"], 3 * 5 * 2 * 32 * 24);
}

/// Every real token is counted once per layer; a stopped pass goes on from either side of the border.
#[test]
fn statistics_count_the_tokens_of_each_stack() {
    let windows = inputs("switch_transformers");
    let checkpoint = Checkpoint::open(data("switch_transformers")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = CalibrateOptions { second: vec![Moment::HiddenGram], ..CalibrateOptions::default() };
    let statistics = calibrate(&model, &windows, &options, &folder.path().join("out"), &mut ()).unwrap();
    let (encoder, decoder) = (windows.real_tokens() as f64, windows.predicted().real_tokens() as f64);
    assert_eq!((encoder, decoder), (43.0, 34.0));
    assert_eq!(totals(&statistics), [(1, encoder), (3, encoder), (5, decoder)]);
    assert_eq!(totals(&measure(&model, &windows, &options, &mut ()).unwrap()), totals(&statistics));
}

/// Stops a pass behind every layer in turn and lets it finish.
#[test]
fn a_stopped_pass_goes_on() {
    struct Stop(usize);
    impl moepress::progress::Progress for Stop {
        fn begin(&mut self, _: &str, _: usize) {}
        fn step(&mut self, detail: &str) {
            if detail != "done before" {
                assert_ne!(self.0, 0, "stopped here");
                self.0 -= 1;
            }
        }
        fn warn(&mut self, _: &str) {}
        fn end(&mut self) {}
    }
    let windows = inputs("switch_transformers");
    let checkpoint = Checkpoint::open(data("switch_transformers")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let options = CalibrateOptions::default();
    calibrate(&model, &windows, &options, &path("whole"), &mut ()).unwrap();
    for layers in 0..6 {
        let out = path("stopped");
        let stopped = std::panic::catch_unwind(|| {
            let mut stop = Stop(layers);
            calibrate(&model, &windows, &options, &out, &mut stop).map(drop)
        });
        assert!(stopped.is_err());
        calibrate(&model, &windows, &options, &out, &mut ()).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(path("whole")).unwrap(), "after {layers}");
        std::fs::remove_file(&out).unwrap();
    }
}

/// The loss of the decoder's tokens, each predicted from those before it.
#[test]
fn perplexity_is_that_of_the_decoder() {
    for name in MODELS {
        let windows = inputs(name);
        let checkpoint = Checkpoint::open(data(name)).unwrap();
        let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
        let found = eval::perplexity(&model, &windows, &mut ()).unwrap().overall;
        let golden = read(&data(name).join("golden.safetensors"), "logits");
        let ids = &windows.predicted().ids;
        let mut loss = 0.0;
        for (row, logits) in golden.chunks_exact(64).enumerate().filter(|(row, _)| row % 17 != 16) {
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            loss += sum.ln() - logits[ids[row + 1] as usize];
        }
        assert_eq!(found.tokens, 32);
        assert!((found.nll - loss / 32.0).abs() < 1e-5, "{name}: {} {}", found.nll, loss / 32.0);
    }
}

/// Fewer experts in encoder and decoder: a stock checkpoint with the logits of the original whose experts are masked.
#[test]
fn dropped_experts_are_masked_ones() {
    for name in MODELS {
        let (dir, windows) = (data(name), inputs(name));
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let plan = plan_on(&dir, &windows, "reap", Some(Budget::Experts(3)), &[]);
        apply(&dir, &plan, &Options::default(), &out).unwrap();
        assert!(!out.join("moepress.json").exists());
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["num_experts"], 3);
        assert_eq!(bits(&run(&out, &windows).logits), bits(&masked(&dir, &plan, &windows)), "{name}");
    }
}

/// Experts of two matrices are aligned and averaged like others.
#[test]
fn experts_are_merged() {
    let (dir, windows) = (data("switch_transformers"), inputs("switch_transformers"));
    let folder = tempfile::tempdir().unwrap();
    for (method, set) in [("m-smoe", &[][..]), ("mc-smoe", &[("rank", "2")])] {
        let out = folder.path().join(method);
        let plan = plan_on(&dir, &windows, method, Some(Budget::Experts(3)), set);
        let report = apply(&dir, &plan, &Options::default(), &out).unwrap();
        assert_eq!(report.bytes_after, plan.expected.bytes, "{method}");
        let found = moepress(["inspect", &out.to_string_lossy(), "--json"]).json();
        assert_eq!(found["moe_layers"][2]["layer"], 5);
        assert_eq!(found["parameters"]["routed_experts"], plan.expected.routed_parameters);
        assert!(run(&out, &windows).logits.iter().all(|v| v.is_finite()));
    }
}

/// Low rank at nearly full rank is nearly the original; sizes are as planned.
#[test]
fn low_rank_has_two_matrices() {
    for (name, set) in MODELS.into_iter().zip([&[("whiten", "false")][..], &[]]) {
        let (dir, windows) = (data(name), inputs(name));
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let set = [set, &[("rank", "13"), ("factor_dtype", "f32")]].concat();
        let plan = plan_on(&dir, &windows, "low-rank", None, &set);
        let options = Options { tokens: Some(&windows), ..Options::default() };
        let report = apply(&dir, &plan, &options, &out).unwrap();
        assert_eq!(report.routed_parameters_after, plan.expected.routed_parameters);
        let found = moepress(["inspect", &out.to_string_lossy(), "--json"]).json();
        assert_eq!(found["moe_layers"][0]["forms"], json!({"low_rank": 5}));
        assert_eq!(found["parameters"]["routed_experts"], plan.expected.routed_parameters);
        let original = run(&dir, &windows).logits;
        let logits = run(&out, &windows).logits;
        let scale = original.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let error = original.iter().zip(&logits).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        assert!(error < 0.2 * scale && error > 0.0, "{name}: {}", error / scale);
    }
}

#[test]
fn what_does_not_fit_is_said_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let switch = data("switch_transformers").to_string_lossy().into_owned();
    let mixtral = data("mixtral").to_string_lossy().into_owned();
    let both = inputs("switch_transformers");
    write_token_file(Path::new(&path("both")), &both).unwrap();
    write_token_file(Path::new(&path("alone")), &Windows { decoder: None, ..both.clone() }).unwrap();
    let mut few = both.clone();
    few.decoder = Some(Box::new(both.predicted().slice(0, 1)));
    write_token_file(Path::new(&path("few")), &few).unwrap();
    let mut far = both.clone();
    far.decoder.as_mut().unwrap().ids[3] = 64;
    write_token_file(Path::new(&path("far")), &far).unwrap();
    let needs = "switch_transformers has an encoder and a decoder: its windows need decoder_ids beside ids";
    for (model, tokens, expected) in [
        (&switch, "alone", needs),
        (&switch, "few", "decoder_ids has 1 windows, expected 2 as ids"),
        (&switch, "far", "token id 64 in window 0 at position 3 is outside the vocabulary of 64"),
        (&mixtral, "both", "mixtral has no encoder, but the token file has decoder_ids"),
    ] {
        let out = path("out");
        let tokens = path(tokens);
        for command in [vec!["run"], vec!["calibrate"], vec!["eval"]] {
            let mut arguments = [&command[..], &[model.as_str(), "--tokens", &tokens, "--quiet"]].concat();
            if command[0] != "eval" {
                arguments.extend(["--out", &out]);
            }
            let message = moepress(arguments).error(1);
            assert!(message.contains(expected), "{command:?}: {message}");
            assert!(!Path::new(&out).exists());
        }
    }
    let tokenizer = json!({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "a"}});
    let model = common::Mutant::of("switch_transformers");
    std::fs::write(model.file("tokenizer.json"), tokenizer.to_string()).unwrap();
    let dir = model.path().to_string_lossy().into_owned();
    let message = moepress(["generate", &dir, "--prompt", "a", "--quiet"]).error(1);
    assert!(message.contains("has an encoder: it does not continue texts"), "{message}");
    std::fs::write(path("text"), "a a a a a a").unwrap();
    let message =
        moepress(["eval", &dir, "--text", &path("text"), "--window-length", "4", "--quiet"]).error(1);
    assert!(message.contains(needs), "{message}");
}
