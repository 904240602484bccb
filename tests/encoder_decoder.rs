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
use moepress::generate::start_token;
use moepress::model::{Decoder, Model};
use moepress::plan::{Budget, LossSource, Pass};
use moepress::search::Search;
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

/// Blocks of layers end where the encoder does: a block that loses nothing changes nothing, one that does changes something.
#[test]
fn blocks_of_layers_stay_within_a_stack() {
    for name in MODELS {
        let (dir, windows) = (data(name), inputs(name));
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
        let profile = moepress::model::profile(&checkpoint, model.architecture()).unwrap();
        let layers: Vec<usize> = profile.moe_layers.iter().map(|l| l.layer).collect();
        let mut silent = ();
        let search = Search::new(&model, &windows, &folder.path().join("out"), "", &mut silent).unwrap();
        search.begin(&Pass { task: "", batch: 8, progressive: false, exact: false }).unwrap();
        let stacks: Vec<&[usize]> = layers.chunk_by(|_, l| !search.begins_stack(*l)).collect();
        assert_eq!(stacks.len(), 2, "{layers:?}");
        assert!(stacks[0].iter().all(|l| *l < model.architecture().encoder_layers));
        for block in stacks {
            search.mark().unwrap();
            for &l in block {
                search.enter(l).unwrap();
                search.leave(&[], "").unwrap();
            }
            let candidates = vec![vec![vec![], vec![0]]; block.len()];
            let losses = search.block_losses(&candidates).unwrap();
            assert_eq!(losses.len(), 1 << block.len());
            assert_eq!(losses[0].single, 0.0, "{name} {block:?}");
            assert!(losses[1..].iter().any(|l| l.single > 0.0), "{name} {block:?}");
        }
    }
}

/// Every form in one table, as planning, compressing and evaluating by way of files give it, and trained afterwards.
#[test]
fn all_forms_are_compared_and_recovered() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    write_token_file(Path::new(&path("tokens")), &inputs("switch_transformers")).unwrap();
    let (model, tokens) = (data("switch_transformers").to_string_lossy().into_owned(), path("tokens"));
    let run = |arguments: &[&str]| moepress(arguments.iter().chain(&["--quiet", "--json"])).json();
    let methods = "mone,naee,moe-i2:block=2,low-rank,d2-moe,camera,modegpt,m-smoe,mc-smoe:rank=2,hc-smoe";
    let table = ["compare", &model, "--tokens", &tokens, "--eval-tokens", &tokens, "--remove", "0.4"];
    let table = run(&[&table[..], &["--methods", methods]].concat());
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 10);
    for row in rows {
        assert_eq!(row["error"], Value::Null, "{row}");
    }
    run(&["calibrate", &model, "--tokens", &tokens, "--out", &path("stats")]);
    for (method, position) in [("mone", 0), ("d2-moe", 4), ("camera", 5)] {
        let (plan, out, trained) = (path("plan"), path(method), path(&format!("{method} trained")));
        let asked =
            ["plan", "--method", method, "--remove", "0.4", "--stats", &path("stats"), "--out", &plan];
        run(&asked);
        run(&["compress", &model, "--plan", &plan, "--tokens", &tokens, "--out", &out]);
        let evaluate = |dir: &str| run(&["eval", dir, "--tokens", &tokens, "--against", &model]);
        let found = evaluate(&out);
        let (nll, row) = (found["overall"]["nll"].as_f64().unwrap(), &rows[position]);
        assert!((nll - row["nll"].as_f64().unwrap()).abs() < 1e-9, "{method}: {found} {row}");
        run(&[
            "recover",
            &model,
            &out,
            "--tokens",
            &tokens,
            "--out",
            &trained,
            "--steps",
            "2",
            "--held-out",
            "0.5",
        ]);
        assert!(evaluate(&trained)["against"]["kl"].as_f64().unwrap().is_finite());
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
    let model = with_tokenizer("switch_transformers");
    std::fs::write(model.file("text"), "w3 w4 w5").unwrap();
    let dir = model.path().to_string_lossy().into_owned();
    let text = model.file("text").to_string_lossy().into_owned();
    let message = moepress(["generate", &dir, "--prompt", "", "--quiet"]).error(1);
    assert!(message.contains("gives no tokens"), "{message}");
    model.set_config("decoder_start_token_id", json!([0]));
    assert_eq!(start_token(model.path()).unwrap(), 0);
    model.set_config("decoder_start_token_id", json!("0"));
    assert!(start_token(model.path()).unwrap_err().to_string().contains("expected a token id"));
    model.set_config("decoder_start_token_id", Value::Null);
    for arguments in [
        vec!["generate", &dir, "--prompt", "w3"],
        vec!["eval", &dir, "--text", &text, "--window-length", "2"],
    ] {
        let message = moepress([&arguments[..], &["--quiet"]].concat()).error(1);
        assert!(message.contains("config.json: decoder_start_token_id is missing"), "{message}");
    }
    let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 8).unwrap();
    let message = Decoder::new(&model, &mut ()).unwrap().sequence_behind(&[3]).err().unwrap().to_string();
    assert_eq!(message, "mixtral has no encoder: its texts begin without one to read");
    let checkpoint = Checkpoint::open(data("switch_transformers")).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 8).unwrap();
    let decoder = Decoder::new(&model, &mut ()).unwrap();
    assert!(decoder.sequence().err().unwrap().to_string().contains("has an encoder"));
    assert!(decoder.sequence_behind(&[]).is_err());
    assert!(decoder.sequence_behind(&[3, 64]).err().unwrap().to_string().contains("token id 64"));
}

/// A copy of a model whose 64 tokens are the words w0 to w63.
fn with_tokenizer(name: &str) -> common::Mutant {
    let words: serde_json::Map<String, Value> = (0..64).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w2"}});
    let model = common::Mutant::of(name);
    std::fs::write(model.file("tokenizer.json"), tokenizer.to_string()).unwrap();
    model
}

fn words(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" ")
}

#[test]
fn token_by_token_is_the_whole_pass() {
    for name in MODELS {
        let golden = data(name).join("golden.safetensors");
        let windows = inputs(name);
        // The first window has no padding.
        let source = &windows.ids[..windows.length];
        let decoder_ids = &windows.predicted().ids[..windows.predicted().length];
        let expected = read(&golden, "logits");
        let expected = &expected[..expected.len() / windows.count];
        let checkpoint = Checkpoint::open(data(name)).unwrap();
        let model = Model::new(&checkpoint, &Cpu, decoder_ids.len()).unwrap();
        let decoder = Decoder::new(&model, &mut ()).unwrap();
        for piece in [1, 5, decoder_ids.len()] {
            let mut sequence = decoder.sequence_behind(source).unwrap();
            let mut logits = Vec::new();
            for ids in decoder_ids.chunks(piece) {
                logits.extend_from_slice(sequence.extend_all(ids).unwrap());
            }
            let difference = max_difference(&logits, expected);
            assert!(difference < 1e-4, "{name} in pieces of {piece}: off by {difference:.1e}");
        }
    }
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    for name in MODELS {
        let golden = data(name).join("golden.safetensors");
        let expected: Vec<u32> = read(&golden, "generated").into_iter().map(|id| id as u32).collect();
        let windows = inputs(name);
        let model = with_tokenizer(name);
        let dir = model.path().to_string_lossy().into_owned();
        let prompt = words(&windows.ids[..windows.length]);
        let arguments = ["generate", &dir, "--prompt", &prompt, "--max-tokens", "12", "--json", "--quiet"];
        let found = moepress(arguments).json();
        assert_eq!(found["ids"], json!(expected[1..]), "{name}");
        assert_eq!(found["text"].as_str().unwrap().trim(), words(&expected[1..]));
        assert_eq!((&found["prompt_tokens"], &found["stop"]), (&json!(windows.length), &json!("max_tokens")));
        // Where the answer's second token ends texts, the first is all.
        model.set_config("eos_token_id", json!(expected[2]));
        let found = moepress(arguments).json();
        assert_eq!((&found["ids"], &found["stop"]), (&json!(expected[1..2]), &json!("end_token")));
    }
}

#[test]
fn half_of_a_text_is_read_and_half_predicted() {
    let model = with_tokenizer("switch_transformers");
    let ids: Vec<u32> = (0..21).map(|i| 3 + (i * 7) % 50).collect();
    std::fs::write(model.file("text"), words(&ids)).unwrap();
    let windows = |ids: Vec<u32>, length: usize| {
        let files = vec![moepress::tokens::SourceFile { name: "text".into(), windows: 3 }];
        Windows { ids, mask: None, count: 3, length, files, decoder: None }
    };
    let (mut read_by_encoder, mut behind_start) = (Vec::new(), Vec::new());
    for window in ids.chunks(7) {
        read_by_encoder.extend_from_slice(&window[..4]);
        behind_start.push(0);
        behind_start.extend_from_slice(&window[4..]);
    }
    let decoder = Some(Box::new(windows(behind_start, 4)));
    let halves = Windows { decoder, ..windows(read_by_encoder, 4) };
    assert_eq!(windows(ids, 7).split(0), halves);
    write_token_file(&model.file("tokens"), &halves).unwrap();
    let dir = model.path().to_string_lossy().into_owned();
    let [text, tokens] = ["text", "tokens"].map(|name| model.file(name).to_string_lossy().into_owned());
    let by_text = moepress(["eval", &dir, "--text", &text, "--window-length", "7", "--json"]).json();
    let by_tokens = moepress(["eval", &dir, "--tokens", &tokens, "--json"]).json();
    assert_eq!(by_text["overall"], by_tokens["overall"]);
    assert_eq!(by_text["overall"]["tokens"], json!(9));
}

#[test]
fn choices_are_answers_to_what_the_encoder_reads() {
    let model = with_tokenizer("switch_transformers_untied");
    let context = [5, 9, 33, 12, 8];
    let choices: [&[u32]; 3] = [&[40, 3], &[7], &[9, 9, 21, 50]];
    let lines = [&context[..], &context[..3]].map(|context| {
        json!({"context": words(context), "choices": choices.map(words), "answer": 1}).to_string()
    });
    std::fs::write(model.file("questions"), lines.join("\n")).unwrap();
    let questions = eval::Questions::read(&model.file("questions")).unwrap();
    let tokenizer = moepress::tokens::Tokenizer::open(model.path(), moepress::tokens::Bos::Auto).unwrap();
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    let network = Model::new(&checkpoint, &Cpu, 1).unwrap();
    let found = eval::multiple_choice(&network, &tokenizer, &questions, &mut ()).unwrap();
    for (prediction, context) in found.predictions.iter().zip([&context[..], &context[..3]]) {
        for (choice, log_likelihood) in choices.iter().zip(&prediction.log_likelihoods) {
            // Each on its own, without padding.
            let mut alone = common::windows(&context.iter().map(|&id| f64::from(id)).collect::<Vec<_>>(), 1);
            let behind: Vec<f64> = std::iter::once(0).chain(choice.iter().copied()).map(f64::from).collect();
            alone.decoder = Some(Box::new(common::windows(&behind, 1)));
            let logits = run(model.path(), &alone).logits;
            let expected: f64 = choice
                .iter()
                .zip(logits.chunks_exact(64))
                .map(|(&id, row)| {
                    let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
                    f64::from(row[id as usize]) - sum.ln()
                })
                .sum();
            assert!((log_likelihood - expected).abs() < 1e-4, "{log_likelihood} and {expected}");
        }
    }
}

/// The goldens count as transformers 4 does; a `null` is its successor, which has no limit.
#[test]
fn experts_take_as_many_tokens_of_a_window_as_they_have_room_for() {
    for model in MODELS {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        write_token_file(Path::new(&path("tokens")), &inputs(model)).unwrap();
        let dir = data(model);
        std::fs::copy(dir.join("model.safetensors"), path("model.safetensors")).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let logits = |capacity: Value| {
            let mut config = config.clone();
            config["expert_capacity"] = capacity;
            std::fs::write(path("config.json"), config.to_string()).unwrap();
            let folder = folder.path().to_string_lossy();
            moepress(["run", &folder, "--tokens", &path("tokens"), "--out", &path("out"), "--quiet"]).ok();
            read(Path::new(&path("out")), "logits").into_iter().map(|v| v as f32).collect::<Vec<_>>()
        };
        let golden = |name: &str| read(&dir.join("golden.safetensors"), name);
        assert!(max_difference(&logits(json!(4)), &golden("limited_logits")) < 1e-4, "{model}");
        assert!(max_difference(&logits(Value::Null), &golden("logits")) < 1e-4, "{model}");
        let inspected: Value = moepress(["inspect", &folder.path().to_string_lossy(), "--json"]).json();
        assert_eq!(inspected["moe_layers"][0].get("capacity"), None);
    }
    let found: Value = moepress(["inspect", &data("switch_transformers").to_string_lossy(), "--json"]).json();
    assert_eq!(found["moe_layers"][0]["capacity"], 64);
}
