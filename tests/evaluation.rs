//! Evaluation: perplexity against reference numbers, padding, agreement of two models, multiple choice.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{data, max_difference, read, run, shape, shared, windows};
use moepress::backend::Backend;
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::{Checkpoint, Entry, write_safetensors};
use moepress::eval::{self, Evaluation, MultipleChoice, Questions, TOKENS_PER_WAVE};
use moepress::model::{Model, Stream};
use moepress::progress::Progress;
use moepress::tokens::{Bos, SourceFile, Tokenizer, Windows, read_token_file};
use serde_json::{Value, json};

const MODELS: [&str; 3] = ["mixtral", "qwen2_moe", "deepseek_v2"];
const DOMAINS: [&str; 5] = ["scripture", "manual", "code", "dictionary", "arithmetic"];

/// Steps announced and steps taken.
#[derive(Default)]
struct Steps {
    announced: usize,
    taken: usize,
    warnings: Vec<String>,
}

impl Progress for Steps {
    fn begin(&mut self, task: &str, steps: usize) {
        assert_eq!(task, "evaluate: layer");
        self.announced += steps;
    }

    fn step(&mut self, _: &str) {
        self.taken += 1;
    }

    fn warn(&mut self, message: &str) {
        self.warnings.push(message.into());
    }
}

fn perplexity(dir: &Path, windows: &Windows) -> eval::Result<Evaluation> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    eval::perplexity(&Model::new(&checkpoint, &Cpu, windows.longest()).unwrap(), windows, &mut ())
}

fn against(dir: &Path, original: &Path, windows: &Windows) -> eval::Result<Evaluation> {
    let (checkpoint, original) = (Checkpoint::open(dir).unwrap(), Checkpoint::open(original).unwrap());
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    eval::against(&model, &Model::new(&original, &Cpu, windows.longest()).unwrap(), windows, &mut ())
}

/// Pseudo-random ids below 64, and no padding.
fn some_windows(count: usize, length: usize) -> Windows {
    let ids: Vec<f64> = (0..count * length).map(|i| ((i * i * 31 + i * 17 + 5) % 61) as f64).collect();
    windows(&ids, count)
}

/// Loss of every window of the small mixtral checkpoint.
fn losses(windows: &Windows) -> Vec<f64> {
    let evaluation = perplexity(&data("mixtral"), windows).unwrap();
    evaluation.windows.iter().map(|w| w.unwrap().nll).collect()
}

#[track_caller]
fn assert_close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance, "{i}: {x} and {y}");
    }
}

// Reference numbers.

#[test]
fn reference_perplexities() {
    for name in MODELS {
        let Some(reference) = shared(&format!("reference/{name}")) else { return };
        let model = shared(&format!("models/{name}")).unwrap();
        let tokens = reference.join("tokens.safetensors");
        let mut windows = windows(&read(&tokens, "eval"), shape(&tokens, "eval").unwrap()[0]);
        windows.files = DOMAINS.map(|name| SourceFile { name: name.into(), windows: 24 }).into();
        let expected: Value =
            serde_json::from_slice(&std::fs::read(reference.join("perplexity.json")).unwrap()).unwrap();

        let result = perplexity(&model, &windows).unwrap();
        let losses: Vec<f64> = result.windows.iter().map(|w| w.unwrap().nll).collect();
        for precision in ["float32", "float64"] {
            let of_windows = expected[format!("window_nll_{precision}")].as_array().unwrap();
            let of_windows: Vec<f64> = of_windows.iter().map(|v| v.as_f64().unwrap()).collect();
            assert_close(&losses, &of_windows, 2e-5);
            let overall = &expected[precision];
            assert_close(&[result.overall.nll], &[overall["nll_overall"].as_f64().unwrap()], 5e-6);
            assert_close(&[result.overall.perplexity], &[overall["ppl_overall"].as_f64().unwrap()], 2e-4);
            for file in &result.files {
                let nll = overall["nll"][&file.file].as_f64().unwrap();
                assert_close(&[file.score.nll], &[nll], 1e-5);
                assert_eq!(file.score.tokens, 24 * 255);
            }
        }
        assert_eq!((result.files.len(), result.overall.tokens), (5, 120 * 255));
    }
}

#[test]
fn reference_layers() {
    for name in MODELS {
        let Some(reference) = shared(&format!("reference/{name}")) else { return };
        let model = shared(&format!("models/{name}")).unwrap();
        let golden = reference.join("logits.safetensors");
        let tokens = reference.join("tokens.safetensors");
        let windows = windows(&read(&tokens, "eval")[..512], 2);
        let trace = run(&model, &windows);
        assert!(max_difference(&trace.logits, &read(&golden, "logits")) < 1e-4, "{name}: logits");
        for (l, hidden) in trace.hidden.iter().skip(1).enumerate() {
            let difference = max_difference(hidden, &read(&golden, &format!("hidden.{l}")));
            assert!(difference < 5e-5, "{name}: hidden state after layer {l} is off by {difference:.1e}");
        }
        routes(&model, &golden, &windows);
    }
}

/// Compares the routing of every MoE layer with `golden`.
fn routes(dir: &Path, golden: &Path, windows: &Windows) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let mut stream = Stream::new(&model, windows).unwrap();
    for l in 0..model.architecture().layers.len() {
        let layer = model.layer(l).unwrap();
        let mut routes = Vec::new();
        stream
            .advance(&layer, |_, scratch| {
                routes.push(Cpu.routes(&scratch.routing)?);
                Ok(())
            })
            .unwrap();
        if !layer.is_moe() {
            continue;
        }
        assert_eq!(routes.len(), 1, "512 tokens are one chunk");
        let logits = read(golden, &format!("router_logits.{l}"));
        assert!(max_difference(&routes[0].logits, &logits) < 5e-5, "{}: layer {l}", dir.display());
        let ids = read(golden, &format!("topk_ids.{l}"));
        let weights = read(golden, &format!("topk_weights.{l}"));
        let k = routes[0].top_k;
        let sorted = |pairs: &mut Vec<(u32, f64)>| pairs.sort_by_key(|(id, _)| *id);
        for token in 0..windows.ids.len() {
            let at = token * k..(token + 1) * k;
            let chosen = routes[0].ids[at.clone()].iter().copied();
            let mut found: Vec<_> =
                chosen.zip(routes[0].weights[at.clone()].iter().map(|w| f64::from(*w))).collect();
            let mut expected: Vec<_> =
                ids[at.clone()].iter().map(|id| *id as u32).zip(weights[at].iter().copied()).collect();
            sorted(&mut found);
            sorted(&mut expected);
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.0, expected.0, "{}: layer {l}, token {token}", dir.display());
                assert!((found.1 - expected.1).abs() < 1e-5, "{}: layer {l}, token {token}", dir.display());
            }
        }
    }
}

// Windows, files and padding.

#[test]
fn losses_are_those_of_the_logits() {
    let windows = some_windows(3, 40);
    let logits = run(&data("mixtral"), &windows).logits;
    let expected: Vec<f64> = (0..3)
        .map(|w| (0..39).map(|p| -log_probability(&logits, w * 40 + p, windows.ids[w * 40 + p + 1])).sum())
        .map(|sum: f64| sum / 39.0)
        .collect();
    assert_close(&losses(&windows), &expected, 1e-6);
}

/// ln softmax(row of 64 logits)[token], in f64.
fn log_probability(logits: &[f32], row: usize, token: u32) -> f64 {
    let row: Vec<f64> = logits[row * 64..(row + 1) * 64].iter().map(|v| f64::from(*v)).collect();
    row[token as usize] - row.iter().map(|v| v.exp()).sum::<f64>().ln()
}

#[test]
fn every_predicted_token_counts_the_same() {
    let mut windows = some_windows(4, 20);
    windows.files =
        [("a", 1), ("b", 3)].map(|(name, windows)| SourceFile { name: name.into(), windows }).into();
    let mut mask = vec![true; 80];
    mask[5..20].fill(false);
    windows.mask = Some(mask);
    let result = perplexity(&data("mixtral"), &windows).unwrap();
    let [a, b] = &result.files[..] else { panic!("two files") };
    assert_eq!((a.score.tokens, b.score.tokens, result.overall.tokens), (4, 57, 61));
    let expected = (4.0 * a.score.nll + 57.0 * b.score.nll) / 61.0;
    assert_close(&[result.overall.nll], &[expected], 1e-12);
    assert_close(&[result.overall.perplexity], &[expected.exp()], 1e-9);
    assert!(result.seconds > 0.0);
    assert_close(&[result.tokens_per_second * result.seconds], &[65.0], 1e-9);
}

#[test]
fn padding_on_the_right_changes_nothing() {
    let short = some_windows(5, 23);
    let mut long = Windows { ids: Vec::new(), mask: Some(Vec::new()), length: 37, ..short.clone() };
    for ids in short.ids.chunks(23) {
        long.ids.extend(ids.iter().copied().chain([7; 14]));
        long.mask.as_mut().unwrap().extend((0..37).map(|p| p < 23));
    }
    assert_close(&losses(&short), &losses(&long), 1e-6);
    assert_eq!(perplexity(&data("mixtral"), &long).unwrap().overall.tokens, 5 * 22);
}

#[test]
fn padding_on_the_left_is_neither_seen_nor_counted() {
    let short = some_windows(5, 23);
    let padded = |padding: u32| {
        let mut long = Windows { ids: Vec::new(), mask: Some(Vec::new()), length: 30, ..short.clone() };
        for ids in short.ids.chunks(23) {
            long.ids.extend([padding; 7].into_iter().chain(ids.iter().copied()));
            long.mask.as_mut().unwrap().extend((0..30).map(|p| p >= 7));
        }
        long
    };
    assert_eq!(losses(&padded(0)), losses(&padded(63)));
    // The rotary embedding is relative: a shift of all positions changes no more than rounding.
    assert_close(&losses(&padded(0)), &losses(&short), 1e-5);
    assert_eq!(perplexity(&data("mixtral"), &padded(0)).unwrap().overall.tokens, 5 * 22);
}

#[test]
fn waves_change_nothing() {
    let few = some_windows(8, 32);
    let repeats = 2 * TOKENS_PER_WAVE / (8 * 32) + 3;
    let many = Windows {
        ids: few.ids.repeat(repeats),
        count: 8 * repeats,
        files: vec![SourceFile { name: "many".into(), windows: 8 * repeats }],
        ..few.clone()
    };
    let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
    // Made for shorter windows than it sees.
    let model = Model::new(&checkpoint, &Cpu, 4).unwrap();
    let mut steps = Steps::default();
    let result = eval::perplexity(&model, &many, &mut steps).unwrap();
    assert_eq!((steps.announced, steps.taken), (2 * 3, 2 * 3));
    let expected = losses(&few);
    for block in result.windows.chunks(8) {
        assert_close(&block.iter().map(|w| w.unwrap().nll).collect::<Vec<_>>(), &expected, 1e-6);
    }
}

#[test]
fn threads_change_nothing() {
    let windows = some_windows(40, 64);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let result = pool.install(|| against(&data("olmoe_clip"), &data("mixtral"), &windows)).unwrap();
        (result.overall, result.windows, result.against)
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn windows_that_cannot_be_scored_are_refused() {
    let message = |windows: &Windows| perplexity(&data("mixtral"), windows).unwrap_err().to_string();
    let mut lonely = some_windows(2, 6);
    lonely.files = ["a", "b"].map(|name| SourceFile { name: name.into(), windows: 1 }).into();
    lonely.mask = Some([[true; 6], [true, false, true, false, true, false]].concat());
    assert!(message(&lonely).starts_with("b: no token is predicted"), "{}", message(&lonely));
    assert!(message(&some_windows(2, 1)).contains("no token is predicted"));
    let mut unknown = some_windows(TOKENS_PER_WAVE / 16 + 1, 16);
    *unknown.ids.last_mut().unwrap() = 64;
    assert!(message(&unknown).contains("token id 64 in window 4096 at position 15"), "{}", message(&unknown));
}

/// A window of padding alone among others.
#[test]
fn an_empty_window_scores_nothing() {
    let mut windows = some_windows(2, 6);
    windows.mask = Some([[false; 6], [true; 6]].concat());
    let result = perplexity(&data("mixtral"), &windows).unwrap();
    assert!(result.windows[0].is_none());
    assert_eq!(result.overall, result.windows[1].unwrap());
}

/// The small mixtral checkpoint with its output head multiplied by `factor`.
fn scaled_head(factor: f32) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
    std::fs::write(dir.path().join("config.json"), checkpoint.config()).unwrap();
    let head = checkpoint.tensor("lm_head.weight").unwrap();
    let values: Vec<f32> = head.to_f32().unwrap().iter().map(|v| v * factor).collect();
    let entries = checkpoint.tensors().map(|tensor| match tensor.name() {
        name if name == head.name() => Entry::f32(name, head.shape().to_vec(), &values),
        _ => Entry::tensor(tensor),
    });
    write_safetensors(&dir.path().join("model.safetensors"), &BTreeMap::new(), entries.collect()).unwrap();
    dir
}

#[test]
fn logits_beyond_f32_are_an_error() {
    let windows = some_windows(3, 8);
    let (dir, sound) = (scaled_head(1e38), data("mixtral"));
    let message = perplexity(dir.path(), &windows).unwrap_err().to_string();
    assert!(message.contains("window 0, position ") && message.contains("not finite"), "{message}");
    for (model, original) in [(dir.path(), sound.as_path()), (&sound, dir.path())] {
        let message = against(model, original, &windows).unwrap_err().to_string();
        assert!(message.starts_with(&dir.path().display().to_string()), "{message}");
    }
}

#[test]
fn a_perplexity_beyond_f64_stays_a_number() {
    let result = perplexity(scaled_head(1e6).path(), &some_windows(3, 8)).unwrap();
    assert!(result.overall.nll > 1000.0);
    let json = serde_json::to_value(&result).unwrap();
    assert_eq!(json["overall"]["perplexity"].as_f64(), Some(f64::MAX));
}

// Two models.

#[test]
fn a_model_agrees_with_itself() {
    let windows = some_windows(6, 50);
    let dir = data("mixtral");
    let result = against(&dir, &dir, &windows).unwrap();
    let compared = result.against.unwrap();
    assert!(compared.kl.abs() < 1e-9, "{}", compared.kl);
    assert_close(&[compared.top1_agreement], &[1.0], 0.0);
    assert_eq!(compared.original, result.overall);
    let alone = perplexity(&dir, &windows).unwrap();
    assert_eq!((alone.overall, alone.files, alone.windows), (result.overall, result.files, result.windows));
}

#[test]
fn divergence_from_the_original() {
    let mut windows = some_windows(6, 50);
    windows.mask = Some((0..300).map(|i| i % 50 < 45).collect());
    let (dir, original) = (data("olmoe_clip"), data("mixtral"));
    let result = against(&dir, &original, &windows).unwrap();
    let compared = result.against.unwrap();
    let (p, q) = (run(&original, &windows).logits, run(&dir, &windows).logits);
    let (mut kl, mut agreeing) = (0.0, 0);
    for row in (0..300).filter(|row| row % 50 < 44) {
        let all = |logits: &[f32]| (0..64).map(|t| log_probability(logits, row, t)).collect::<Vec<_>>();
        let (p, q) = (all(&p), all(&q));
        kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let top = |x: &[f64]| (0..64).max_by(|a, b| x[*a].total_cmp(&x[*b])).unwrap();
        agreeing += usize::from(top(&p) == top(&q));
    }
    assert!(compared.kl > 0.01, "two unrelated models");
    assert_close(&[compared.kl, compared.top1_agreement], &[kl / 264.0, agreeing as f64 / 264.0], 1e-6);
    assert_eq!(compared.original.tokens, 264);
    assert_close(
        &[result.overall.nll, compared.original.nll],
        &[&dir, &original].map(|dir| perplexity(dir, &windows).unwrap().overall.nll),
        1e-12,
    );
}

#[test]
fn different_vocabularies_cannot_be_compared() {
    let (small, dir) = (data("mixtral"), tempfile::tempdir().unwrap());
    let config = std::fs::read_to_string(small.join("config.json")).unwrap();
    let config = config.replace("\"vocab_size\": 64", "\"vocab_size\": 48");
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::copy(small.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let message = against(&small, dir.path(), &some_windows(1, 8)).unwrap_err().to_string();
    assert!(message.starts_with(&dir.path().display().to_string()), "{message}");
    assert!(message.contains("vocabulary of 48") && message.contains("vocabulary has 64"), "{message}");
}

// JSON.

#[test]
fn json_form() {
    let windows = some_windows(2, 8);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let mut result = perplexity(&data("mixtral"), &windows).unwrap();
    let json = serde_json::to_value(&result).unwrap();
    assert_eq!(keys(&json), ["files", "overall", "against", "seconds", "tokens_per_second", "device"]);
    assert_eq!(keys(&json["files"][0]), ["file", "tokens", "nll", "perplexity"]);
    assert_eq!(keys(&json["overall"]), ["tokens", "nll", "perplexity"]);
    assert_eq!((&json["against"], &json["device"]), (&Value::Null, &json!("cpu")));

    result.multiple_choice = Some(MultipleChoice {
        questions: 2,
        accuracy: 0.5,
        accuracy_normalised: 1.0,
        truncated: 0,
        predictions: Vec::new(),
    });
    let json = serde_json::to_value(&result).unwrap();
    let expected = json!({"questions": 2, "accuracy": 0.5, "accuracy_normalised": 1.0, "truncated": 0});
    assert_eq!(json["multiple_choice"], expected);

    let compared =
        serde_json::to_value(against(&data("mixtral"), &data("mixtral"), &windows).unwrap()).unwrap();
    assert_eq!(keys(&compared["against"]), ["kl", "top1_agreement", "original"]);
}

#[test]
fn token_files_are_evaluated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    let windows = some_windows(3, 16);
    moepress::tokens::write_token_file(&path, &windows).unwrap();
    let result = perplexity(&data("mixtral"), &read_token_file(&path).unwrap()).unwrap();
    assert_eq!(result.files[0].file, "tokens.safetensors");
    assert_eq!(result.files[0].score, perplexity(&data("mixtral"), &windows).unwrap().overall);
}

// Multiple choice.

/// The small mixtral checkpoint with `positions` positions and a tokeniser of letters, a space and a few merges, one of
/// them across a space; with BOS or without.
fn with_tokenizer(positions: usize, bos: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = data("mixtral");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = positions.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let merges = [["t", "h"], ["th", "e"], ["a", "n"], ["an", "d"], [" ", "s"], ["é", "é"]];
    let mut pieces = vec!["<s>".to_string(), " ".into(), ".".into(), "é".into()];
    pieces.extend(('a'..='z').map(String::from));
    pieces.extend(merges.iter().map(|[a, b]| format!("{a}{b}")));
    let vocabulary: BTreeMap<&str, usize> = pieces.iter().enumerate().map(|(i, p)| (&p[..], i)).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": bos});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn write_questions(dir: &Path, lines: &[Value]) -> PathBuf {
    let path = dir.join("questions.jsonl");
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn ask(dir: &Path, questions: &Path, progress: &mut dyn Progress) -> eval::Result<MultipleChoice> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let tokenizer = Tokenizer::open(dir, Bos::Auto).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 1).unwrap();
    eval::multiple_choice(&model, &tokenizer, &Questions::read(questions)?, progress)
}

/// Questions of many lengths: words of a fixed pseudo-random text.
fn some_questions(count: usize) -> Vec<Value> {
    let words = ["the", "sand", "and", "stone", "é", "thermal", "x", "an", "sane", "éé.", "quiz"];
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    (0..count)
        .map(|_| {
            let context: Vec<&str> = (0..next(40)).map(|_| words[next(words.len())]).collect();
            let choices: Vec<String> = (0..2 + next(3))
                .map(|_| (0..=next(4)).map(|_| words[next(words.len())]).collect::<Vec<_>>().join(" "))
                .collect();
            let end = ["", " ", "  "][next(3)];
            let answer = next(choices.len());
            let answer = if next(2) == 0 { json!(answer) } else { json!(choices[answer]) };
            json!({"context": context.join(" ") + end, "choices": choices, "answer": answer})
        })
        .collect()
}

/// One sequence at a time, without padding: the tokens of context and choice, and the log-likelihood.
fn directly(dir: &Path, positions: usize, context: &str, choice: &str) -> f64 {
    let tokenizer = Tokenizer::open(dir, Bos::Auto).unwrap();
    let mut ids = tokenizer.encode_document(&format!("{context}{choice}")).unwrap();
    let first = tokenizer.encode_document(context.trim_end()).unwrap().len();
    let choice_tokens = ids.len() - first;
    let cut = ids.len().saturating_sub(positions + 1);
    ids.drain(..cut);
    let input: Vec<f64> = ids[..ids.len() - 1].iter().map(|id| f64::from(*id)).collect();
    let logits = run(dir, &windows(&input, 1)).logits;
    (ids.len() - choice_tokens..ids.len()).map(|p| log_probability(&logits, p - 1, ids[p])).sum()
}

fn check_directly(positions: usize, count: usize) -> (MultipleChoice, Steps) {
    let dir = with_tokenizer(positions, true);
    let questions = some_questions(count);
    let mut steps = Steps::default();
    let result = ask(dir.path(), &write_questions(dir.path(), &questions), &mut steps).unwrap();
    assert_eq!((steps.announced, result.questions), (steps.taken, count));
    let (mut right, mut right_normalised) = (0, 0);
    for (question, prediction) in questions.iter().zip(&result.predictions) {
        let choices: Vec<&str> =
            question["choices"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
        let context = question["context"].as_str().unwrap();
        let expected: Vec<f64> =
            choices.iter().map(|choice| directly(dir.path(), positions, context, choice)).collect();
        assert_close(&prediction.log_likelihoods, &expected, 1e-4);
        let best = |values: &[f64]| {
            (0..values.len()).rev().max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap()
        };
        let lengths = choices.iter().map(|c| c.chars().count() as f64);
        let normalised: Vec<f64> = expected.iter().zip(lengths).map(|(l, n)| l / n).collect();
        let answer = match &question["answer"] {
            Value::String(text) => choices.iter().position(|c| c == text).unwrap(),
            index => index.as_u64().unwrap() as usize,
        };
        assert_eq!(prediction.answer, answer);
        right += usize::from(best(&expected) == answer);
        right_normalised += usize::from(best(&normalised) == answer);
    }
    assert_close(&[result.accuracy], &[right as f64 / count as f64], 1e-12);
    assert_close(&[result.accuracy_normalised], &[right_normalised as f64 / count as f64], 1e-12);
    (result, steps)
}

#[test]
fn choices_are_scored_as_one_by_one() {
    let (result, steps) = check_directly(512, 60);
    assert_eq!((result.truncated, steps.warnings.len()), (0, 0));
    assert!(result.accuracy > 0.0 && result.accuracy < 1.0);
    assert!(result.predictions.iter().any(|p| p.chosen != p.chosen_normalised));
}

#[test]
fn long_sequences_lose_their_beginning() {
    let (result, steps) = check_directly(40, 30);
    assert!(result.truncated > 0 && result.truncated < 120);
    assert!(steps.warnings[0].starts_with(&format!("{} of ", result.truncated)), "{}", steps.warnings[0]);
}

/// A space at the end of the context is scored with the choice, as if the choice began with it.
#[test]
fn trailing_space_moves_to_the_choice() {
    let dir = with_tokenizer(512, true);
    let question = |context, choices: [&str; 2]| json!({"context": context, "choices": choices, "answer": 0});
    let lines = [question("the ", ["sand", "stone"]), question("the", [" sand", " stone"])];
    let result = ask(dir.path(), &write_questions(dir.path(), &lines), &mut ()).unwrap();
    let [a, b] = &result.predictions[..] else { panic!("two questions") };
    assert_close(&a.log_likelihoods, &b.log_likelihoods, 1e-6);
}

#[test]
fn an_empty_context_is_the_beginning_of_sequence() {
    let lines = [json!({"context": "", "choices": ["and", "the"], "answer": "the"})];
    let dir = with_tokenizer(512, true);
    let path = write_questions(dir.path(), &lines);
    let result = ask(dir.path(), &path, &mut ()).unwrap();
    let logits = run(dir.path(), &windows(&[0.0], 1)).logits;
    let tokenizer = Tokenizer::open(dir.path(), Bos::Auto).unwrap();
    let expected = ["and", "the"].map(|word| {
        let [id] = tokenizer.encode(word).unwrap()[..] else { panic!("one token") };
        log_probability(&logits, 0, id)
    });
    assert_close(&result.predictions[0].log_likelihoods, &expected, 1e-6);

    let without = with_tokenizer(512, false);
    let message = ask(without.path(), &path, &mut ()).unwrap_err().to_string();
    assert!(message.contains("line 1: choice 0 follows an empty context"), "{message}");
}

#[test]
fn choices_that_cannot_be_scored_are_refused() {
    let dir = with_tokenizer(8, true);
    let message = |context: &str, choice: &str| {
        let lines = [json!({"context": context, "choices": ["the", choice], "answer": 0})];
        ask(dir.path(), &write_questions(dir.path(), &lines), &mut ()).unwrap_err().to_string()
    };
    let merged = message("x a", "n");
    assert!(merged.contains("line 1: choice 1 merges with the context"), "{merged}");
    let long = message("x ", "quizquizq");
    assert!(long.contains("choice 1 has 10 tokens, more than the model's 8 positions"), "{long}");
}

#[test]
fn bad_questions_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.jsonl");
    let message = |text: &[u8]| {
        std::fs::write(&path, text).unwrap();
        Questions::read(&path).unwrap_err().to_string()
    };
    let good = r#"{"context": "a", "choices": ["b", "c"], "answer": 1, "id": 7}"#;
    for (line, expected) in [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        (r#"{"choices": ["b", "c"], "answer": 1}"#, "has no key `context`"),
        (r#"{"context": "a", "answer": 1}"#, "has no key `choices`"),
        (r#"{"context": "a", "choices": ["b", "c"]}"#, "has no key `answer`"),
        (r#"{"context": 1, "choices": ["b", "c"], "answer": 1}"#, "`context` is not a string"),
        (r#"{"context": "a", "choices": "bc", "answer": 1}"#, "`choices` is not a list"),
        (r#"{"context": "a", "choices": ["b"], "answer": 0}"#, "expected at least 2"),
        (r#"{"context": "a", "choices": ["b", 3], "answer": 0}"#, "choice 1 is not a string"),
        (r#"{"context": "a", "choices": ["", "c"], "answer": 1}"#, "choice 0 is empty"),
        (
            r#"{"context": "a", "choices": ["b", "c"], "answer": 2}"#,
            "`answer` is 2, expected an index from 0 to 1",
        ),
        (r#"{"context": "a", "choices": ["b", "c"], "answer": -1}"#, "`answer` is -1"),
        (r#"{"context": "a", "choices": ["b", "c"], "answer": 0.5}"#, "`answer` is 0.5"),
        (r#"{"context": "a", "choices": ["b", "c"], "answer": "d"}"#, "which is none of the choices"),
        (r#"{"context": "a", "choices": ["b", "c"], "answer": null}"#, "`answer` is null"),
    ] {
        let message = message(format!("{good}\n\n{line}\n{good}\n").as_bytes());
        assert!(message.starts_with(&format!("{}: line 3: ", path.display())), "{message}");
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    }
    let invalid = message(b"{\"context\": \"\xff\", \"choices\": [\"b\", \"c\"], \"answer\": 1}");
    assert!(invalid.contains("line 1: is not JSON"), "{invalid}");
    assert!(message(b"\n  \n").contains("holds no questions"));
    assert!(Questions::read(&dir.path().join("none.jsonl")).unwrap_err().to_string().contains("none.jsonl"));

    std::fs::write(&path, format!("{good}\r\n\r\n{good}")).unwrap();
    let questions = Questions::read(&path).unwrap().questions;
    assert_eq!(questions.iter().map(|q| q.line).collect::<Vec<_>>(), [1, 3]);
    assert_eq!((&questions[0].choices[1][..], questions[0].answer), ("c", 1));
}

/// A trained model finds the true continuation of its own kind of text.
#[test]
fn a_trained_model_answers() {
    let Some(dir) = shared("models/mixtral") else { return };
    let temporary = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(shared("text/scripture.evaluation.txt").unwrap()).unwrap();
    let words: Vec<&str> = text.split_whitespace().take(2200).collect();
    let lines: Vec<Value> = words
        .chunks_exact(55)
        .enumerate()
        .map(|(i, passage)| {
            let mut reversed = passage[45..].to_vec();
            reversed.reverse();
            let mut choices = [passage[45..].join(" "), reversed.join(" ")];
            choices.rotate_left(i % 2);
            json!({"context": passage[..45].join(" ") + " ", "choices": choices, "answer": i % 2})
        })
        .collect();
    let result = ask(&dir, &write_questions(temporary.path(), &lines), &mut ()).unwrap();
    assert_eq!(result.questions, 40);
    assert!(result.accuracy > 0.9, "{}", result.accuracy);
}
