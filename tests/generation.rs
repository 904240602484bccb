//! `moepress generate`, and what it is made of: text as it comes, where it ends, and what is refused.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::command::{command, moepress, outcome};
use common::{Mutant, shared};
use moepress::checkpoint::Checkpoint;
use moepress::generate::{Detokeniser, end_tokens};
use moepress::tokens::{Bos, Tokenizer};
use serde_json::{Value, json};

/// The trained model inside the repository.
fn trained() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/model")
}

/// `generate` with further arguments, as JSON.
fn generate(model: &Path, arguments: &[&str]) -> Value {
    let mut command = command(["generate", "--json", "--quiet"]);
    command.arg(model).args(arguments);
    outcome(command).json()
}

/// The error of `generate`.
#[track_caller]
fn refused(model: &Path, arguments: &[&str], status: i32) -> String {
    let mut command = command(["generate", "--quiet"]);
    command.arg(model).args(arguments);
    outcome(command).error(status)
}

/// Ids that greedy decoding gives, from whole passes over ever longer texts.
fn greedy(model: &Path, prompt: &str, count: usize) -> (Vec<u32>, Vec<u32>) {
    let tokenizer = Tokenizer::open(model, Bos::Auto).unwrap();
    let mut ids = tokenizer.encode_document(prompt).unwrap();
    let prompt = ids.clone();
    let vocabulary =
        moepress::model::open_architecture(&Checkpoint::open(model).unwrap()).unwrap().vocabulary;
    for _ in 0..count {
        let as_floats: Vec<f64> = ids.iter().map(|&id| f64::from(id)).collect();
        let logits = common::run(model, &common::windows(&as_floats, 1)).logits;
        let last = &logits[logits.len() - vocabulary..];
        let largest = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        ids.push(last.iter().position(|&l| l == largest).unwrap() as u32);
    }
    (prompt.clone(), ids[prompt.len()..].to_vec())
}

fn check_greedy(model: &Path) {
    let prompt = "And God said, ";
    let (prompt_ids, expected) = greedy(model, prompt, 12);
    let result = generate(model, &["--prompt", prompt, "--max-tokens", "12"]);
    let ids: Vec<u32> =
        result["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
    assert_eq!(ids, expected);
    assert_eq!(result["prompt_tokens"], prompt_ids.len());
    assert_eq!(result["stop"], "max_tokens");
    let tokenizer = Tokenizer::open(model, Bos::Auto).unwrap();
    let (before, all) = (prompt_ids.clone(), [prompt_ids, expected].concat());
    let text = result["text"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&before).unwrap() + text, tokenizer.decode(&all).unwrap());
}

#[test]
fn greedy_text_is_that_of_whole_passes() {
    check_greedy(&trained());
}

/// Other kinds of attention, where the trained models are.
#[test]
fn shared_models() {
    let Some(models) = shared("models") else { return };
    for name in ["deepseek_v2", "mixtral"] {
        check_greedy(&models.join(name));
    }
}

/// Standard output is the text alone, the same as in JSON; speeds are on standard error.
#[test]
fn text_is_printed_as_it_is() {
    let arguments =
        ["--prompt", "fn main() {\n", "--max-tokens", "30", "--temperature", "0.9", "--seed", "5"];
    let expected = generate(&trained(), &arguments)["text"].as_str().unwrap().to_string() + "\n";
    let mut command = command(["generate"]);
    command.arg(trained()).args(arguments);
    let found = outcome(command);
    assert!(found.stderr.contains("prefill: ") && found.stderr.contains(" decode: "), "{}", found.stderr);
    assert_eq!(found.ok(), expected);
}

#[test]
fn a_prompt_may_come_from_a_file_or_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt");
    std::fs::write(&file, "In the beginning").unwrap();
    let expected = generate(&trained(), &["--prompt", "In the beginning", "--max-tokens", "5"]);
    let from_file = generate(&trained(), &["--prompt-file", file.to_str().unwrap(), "--max-tokens", "5"]);
    assert_eq!(from_file["ids"], expected["ids"]);
    let mut command = command(["generate", "--json", "--quiet", "--prompt-file", "-", "--max-tokens", "5"]);
    command.arg(trained()).stdin(Stdio::from(std::fs::File::open(&file).unwrap()));
    assert_eq!(outcome(command).json()["ids"], expected["ids"]);
}

#[test]
fn seeds_repeat_and_differ() {
    let draw = |seed: &str, threads: &str| {
        let mut command =
            command(["generate", "--json", "--quiet", "--prompt", "1 + 2 =", "--max-tokens", "20"]);
        command.args(["--temperature", "1.5", "--top-p", "0.95", "--seed", seed]).arg(trained());
        command.env("RAYON_NUM_THREADS", threads);
        outcome(command).json()["ids"].clone()
    };
    assert_eq!(draw("1", "1"), draw("1", "3"));
    assert_ne!(draw("1", "1"), draw("2", "1"));
    // The tiniest nucleus is the most probable token.
    let nearly = ["--prompt", "1 + 2 =", "--max-tokens", "9", "--temperature", "1", "--top-p", "1e-9"];
    assert_eq!(generate(&trained(), &nearly)["ids"], generate(&trained(), &nearly[..4])["ids"]);
}

/// A copy of the trained model.
fn copy() -> Mutant {
    Mutant::copy(&trained())
}

#[test]
fn text_ends_at_an_end_token() {
    let arguments = ["--prompt", "And God said, ", "--max-tokens", "8"];
    let ids = generate(&trained(), &arguments)["ids"].clone();
    let third = &ids[2];
    let first = ids.as_array().unwrap().iter().position(|id| id == third).unwrap();
    let model = copy();
    for eos in [third.clone(), json!([2047, third])] {
        model.set_config("eos_token_id", eos.clone());
        let ended = generate(model.path(), &arguments);
        assert_eq!(ended["stop"], "end_token");
        assert_eq!(ended["tokens"], first, "the end token is left out");
        // What generation_config.json says counts more.
        std::fs::write(model.file("generation_config.json"), r#"{"eos_token_id": []}"#).unwrap();
        assert_eq!(generate(model.path(), &arguments)["ids"], ids);
        std::fs::write(model.file("generation_config.json"), json!({"eos_token_id": eos}).to_string())
            .unwrap();
        assert_eq!(end_tokens(model.path()).unwrap().len(), eos.as_array().map_or(1, Vec::len));
        std::fs::remove_file(model.file("generation_config.json")).unwrap();
    }
    model.set_config("eos_token_id", json!("</s>"));
    let message = refused(model.path(), &arguments, 1);
    assert!(message.contains("config.json: eos_token_id: expected a token id or a list"), "{message}");
}

#[test]
fn a_compressed_checkpoint_generates() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let model = trained().to_string_lossy().into_owned();
    let plan =
        ["plan", "--method", "low-rank", "--remove", "0.4", "--set", "whiten=false", "--quiet", "--model"];
    moepress(plan.into_iter().chain([model.as_str(), "--out", &path("plan")])).ok();
    moepress(["compress", &model, "--plan", &path("plan"), "--out", &path("small"), "--quiet"]).ok();
    assert!(folder.path().join("small/moepress.json").exists());
    check_greedy(&folder.path().join("small"));
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let model = trained();
    let prompt = ["--prompt", "a"];
    let with = |more: &[&'static str]| [&prompt[..], more].concat();
    let cases: [(Vec<&str>, i32, &str); 12] = [
        (vec![], 2, "--prompt <TEXT>|--prompt-file <FILE>"),
        (with(&["--prompt-file", "-"]), 2, "cannot be used with"),
        (with(&["--max-tokens", "0"]), 2, "--max-tokens <N>': expected a whole number, 1 or more"),
        (with(&["--max-tokens", "-3"]), 2, "--max-tokens <N>': expected a whole number, 1 or more"),
        (with(&["--temperature", "-1"]), 2, "--temperature is -1, expected 0"),
        (with(&["--temperature", "nan"]), 2, "--temperature is NaN, expected 0"),
        (with(&["--temperature", "inf"]), 2, "--temperature is inf, expected 0"),
        (with(&["--top-p", "0"]), 2, "--top-p is 0, expected more than 0 and at most 1"),
        (with(&["--top-p", "1.01"]), 2, "--top-p is 1.01, expected more than 0 and at most 1"),
        (with(&["--top-p", "nan"]), 2, "--top-p is NaN"),
        (with(&["--max-tokens", "600"]), 1, "512 positions; choose --max-tokens 511 or less"),
        (vec!["--prompt-file", "no such file"], 1, "no such file: "),
    ];
    for (arguments, status, expected) in cases {
        let message = refused(&model, &arguments, status);
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
    let long = "a b ".repeat(600);
    let message = refused(&model, &["--prompt", &long], 1);
    assert!(message.contains("512 positions; shorten the prompt"), "{message}");

    let message = refused(&model, &["--prompt", "", "--bos", "never"], 1);
    assert!(message.contains("--prompt: gives no tokens"), "{message}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("latin1");
    std::fs::write(&file, b"caf\xe9").unwrap();
    let message = refused(&model, &["--prompt-file", file.to_str().unwrap()], 1);
    assert!(message.contains("latin1: not UTF-8 text (byte 3)"), "{message}");

    let copied = copy();
    std::fs::remove_file(copied.file("tokenizer.json")).unwrap();
    let message = refused(copied.path(), &prompt, 1);
    assert!(message.contains("tokenizer.json: missing"), "{message}");
}

/// A tokenizer of another model, and weights that are not numbers.
#[test]
fn damaged_checkpoints_are_refused() {
    let tokenizer = |id: u32| {
        json!({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": id, "?": 0}, "unk_token": "?"}})
            .to_string()
    };
    let model = Mutant::of("mixtral");
    std::fs::write(model.file("tokenizer.json"), tokenizer(64)).unwrap();
    let message = refused(model.path(), &["--prompt", "a"], 1);
    assert!(message.contains("token id 64") && message.contains("vocabulary of 64"), "{message}");

    std::fs::write(model.file("tokenizer.json"), tokenizer(5)).unwrap();
    let name = "model.layers.1.self_attn.o_proj.weight";
    model.edit_values(name, |values| values[7] = f32::NAN);
    let message = refused(model.path(), &["--prompt", "a"], 1);
    assert!(message.contains("layer 1") && message.contains(name), "{message}");
}

/// The pieces of a text that is given token by token, without its first `skip` tokens.
fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip: usize) -> Vec<String> {
    let mut detokeniser = Detokeniser::new(tokenizer, &ids[..skip]).unwrap();
    let mut pieces: Vec<_> = ids[skip..].iter().map(|&id| detokeniser.push(id).unwrap()).collect();
    pieces.push(detokeniser.finish().unwrap());
    pieces
}

#[test]
fn characters_of_several_tokens_come_whole() {
    let tokenizer = Tokenizer::open(&trained(), Bos::Never).unwrap();
    let text = "naïve café – 漢字 and 🦀🦀 \u{1f469}\u{200d}\u{1f4bb}. الحمد";
    let ids = tokenizer.encode(text).unwrap();
    for skip in 0..ids.len() {
        let found = pieces(&tokenizer, &ids, skip);
        let (before, joined) = (tokenizer.decode(&ids[..skip]).unwrap(), found.concat());
        assert!(!joined.contains('\u{fffd}'), "{found:?}");
        assert_eq!(before.trim_end_matches('\u{fffd}').to_string() + &joined, text);
    }
    // A text that ends within a character says so.
    let crab = tokenizer.encode("🦀").unwrap();
    assert!(crab.len() > 1);
    assert!(pieces(&tokenizer, &crab[..crab.len() - 1], 0).concat().ends_with('\u{fffd}'));
}

/// Spaces belong to words, and bytes are tokens, as in SentencePiece models.
#[test]
fn spaces_and_bytes_of_sentencepiece() {
    let folder = tempfile::tempdir().unwrap();
    let vocabulary = json!({"?": 0, "▁a": 1, "▁b": 2, "c": 3, "<0xC3>": 4, "<0xA9>": 5, "<0x0A>": 6});
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let tokenizer = json!({"version": "1.0", "decoder": decoder,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}});
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::open(folder.path(), Bos::Never).unwrap();
    let ids = [1, 2, 4, 5, 4, 5, 3, 6, 1, 6, 6, 4, 5];
    // Prompts are whole characters.
    for skip in (0..=ids.len()).filter(|skip| !matches!(skip, 3 | 5 | 12)) {
        let found = tokenizer.decode(&ids[..skip]).unwrap() + &pieces(&tokenizer, &ids, skip).concat();
        assert_eq!(found, "a bééc\n a\n\né", "after {skip}");
    }
}
