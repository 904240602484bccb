//! Bad input to every command but `inspect` and `run` (see cli.rs): one line that says what is wrong, the right exit
//! status, and not a file more, less or other than before.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::command::{Outcome, command, outcome};
use common::{Mutant, generate};
use moepress::checkpoint::{Entry, Shard, Tensor, write_safetensors};
use moepress::tokens::{SourceFile, Windows, write_token_file};
use serde_json::{Value, json};

/// Words of three tokens of the mixtral fixture, which has 64.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
    "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"a": 3, "b": 4, "?": 5}, "unk_token": "?"}}"#;

/// Everything under a folder: contents of files, `None` for folders and what is neither.
type Snapshot = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// A folder in which commands are run, with all that they read.
struct Desk {
    model: Mutant,
}

impl Desk {
    /// `config.json`, `model.safetensors` and `tokenizer.json` of a small mixtral model, `tokens`, `text`, `stats` of
    /// them with second moments, and the plans `plan` and `low_rank`.
    fn new() -> Self {
        let desk = Desk { model: Mutant::of("mixtral") };
        std::fs::write(desk.path("tokenizer.json"), TOKENIZER).unwrap();
        std::fs::write(desk.path("text"), "a b ".repeat(40)).unwrap();
        generate::tokens(&desk.path("tokens"), 4, 16, 64);
        desk.run("calibrate . --tokens tokens --moments input,hidden --out stats").ok();
        desk.run("plan --method reap --remove 0.4 --stats stats --out plan").ok();
        desk.run("plan --method low-rank --remove 0.4 --model . --out low_rank").ok();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.model.file(name)
    }

    /// `arguments`, separated by spaces, run quietly in the folder.
    fn command(&self, arguments: &str) -> Command {
        let mut command = command(arguments.split(' '));
        command.arg("--quiet").current_dir(self.model.path());
        command
    }

    fn run(&self, arguments: &str) -> Outcome {
        outcome(self.command(arguments))
    }

    fn snapshot(&self) -> Snapshot {
        fn visit(folder: &Path, all: &mut Snapshot) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    visit(&path, all);
                }
                all.insert(path.clone(), path.is_file().then(|| std::fs::read(&path).unwrap()));
            }
        }
        let mut all = Snapshot::new();
        visit(self.model.path(), &mut all);
        all
    }

    /// Runs what must fail with `status` and a message that contains `expected`, and changes nothing.
    #[track_caller]
    fn refuses(&self, status: i32, arguments: &str, expected: &str) {
        self.refuses_command(status, self.command(arguments), expected);
    }

    #[track_caller]
    fn refuses_command(&self, status: i32, command: Command, expected: &str) {
        let before = self.snapshot();
        let message = outcome(command).error(status);
        assert!(message.contains(expected), "{message}\nexpected {expected}");
        let names = |files: &Snapshot| files.keys().cloned().collect::<Vec<_>>();
        let after = self.snapshot();
        assert_eq!(names(&before), names(&after), "{message}");
        assert!(before == after, "a file has changed: {message}");
    }

    /// [`Desk::refuses`] with status 1 for every argument and message of a table.
    #[track_caller]
    fn refuses_all(&self, cases: &[(&str, &str)]) {
        for (arguments, expected) in cases {
            self.refuses(1, arguments, expected);
        }
    }

    /// Writes a JSON file that differs from another one in one place.
    fn edited(&self, from: &str, to: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&std::fs::read(self.path(from)).unwrap()).unwrap();
        edit(&mut value);
        std::fs::write(self.path(to), value.to_string()).unwrap();
    }
}

/// Token windows, `mask` being 0 for padding.
fn masked(path: &Path, ids: Vec<u32>, mask: Vec<bool>, length: usize) {
    let count = ids.len() / length;
    let files = vec![SourceFile { name: "masked".into(), windows: count }];
    write_token_file(path, &Windows { ids, mask: Some(mask), count, length, files, decoder: None }).unwrap();
}

#[test]
fn text_that_cannot_be_used() {
    let desk = Desk::new();
    std::fs::write(desk.path("empty"), "").unwrap();
    std::fs::write(desk.path("nul"), [0; 1000]).unwrap();
    std::fs::write(desk.path("latin"), b"caf\xe9 a b").unwrap();
    masked(&desk.path("padded"), (0..8).collect(), [[false; 4], [true; 4]].concat(), 4);
    generate::tokens(&desk.path("single"), 3, 1, 64);
    desk.refuses_all(&[
        ("calibrate . --text empty --out s", "empty: gives 0 tokens, too few for one window of 512"),
        ("calibrate . --text nul --out s", "nul: gives 0 tokens, too few for one window of 512"),
        ("calibrate . --text latin --out s", "latin: not UTF-8 text (byte 3)"),
        ("calibrate . --text . --out s", ".: is a folder, expected a file"),
        ("calibrate . --text gone --out s", "gone: No such file"),
        ("calibrate . --text text --window-length 600 --out s", "longer than the model's 512 positions"),
        ("calibrate . --tokens . --out s", ".: is a folder, expected a file"),
        ("calibrate . --tokens config.json --out s", "config.json: not a valid safetensors file"),
        ("calibrate . --tokens padded --windows 1 --out s", "all tokens of these windows are padding"),
        ("eval . --tokens padded --windows 1", "all tokens of these windows are padding"),
        ("eval . --tokens single", "single: no token is predicted"),
        ("eval . --text empty", "empty: gives 0 tokens"),
        (
            "eval . --text text",
            "text: gives 80 tokens, too few for one window of 512; choose --window-length 80 or less",
        ),
        (
            "generate . --prompt= --bos never",
            "--prompt: gives no tokens, and --bos never leaves out the beginning-",
        ),
        ("generate . --prompt=", "--prompt: gives no tokens, and the tokenizer adds none of its own; write"),
    ]);
    std::fs::remove_file(desk.path("tokenizer.json")).unwrap();
    desk.refuses(1, "eval . --text text", "tokenizer.json: missing; text needs the checkpoint's tokenizer");
    std::fs::write(desk.path("tokenizer.json"), &TOKENIZER[..100]).unwrap();
    desk.refuses(1, "eval . --text text", "tokenizer.json: cannot be read: EOF");
}

/// The tokenizers library panics at some files that are valid JSON.
#[test]
fn tokenizers_that_make_no_sense() {
    let desk = Desk::new();
    std::fs::write(desk.path("questions"), r#"{"context": "a", "choices": [" a", " b"], "answer": 0}"#)
        .unwrap();
    let template = |first: &str| {
        let template = r#""post_processor": {"type": "TemplateProcessing", "single": [FIRST], "special_tokens": {},
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}"#;
        ("\"post_processor\": null", template.replace("FIRST", first))
    };
    let decoder = r#""decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "\ud800"}"#;
    let prefixed = r#""type": "BPE", "vocab": {"a": 3, "b": 4, "ab": 5}, "merges": [["a", "b"]],
        "continuing_subword_prefix": "longer than any token", "unk_token": null"#;
    let words = r#""type": "WordLevel", "vocab": {"a": 3, "b": 4, "?": 5}, "unk_token": "?""#;
    for (from, to) in [
        template(r#"{"Sequence": {"id": "B", "type_id": 0}}"#),
        template(r#"{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}"#),
        ("\"decoder\": null", decoder.into()),
        (words, prefixed.into()),
    ] {
        assert!(TOKENIZER.contains(from), "{from}");
        std::fs::write(desk.path("tokenizer.json"), TOKENIZER.replace(from, &to)).unwrap();
        for command in [
            "eval . --text text --window-length 16",
            "eval . --multiple-choice questions",
            "generate . --prompt a --max-tokens 2",
        ] {
            let message = desk.run(command).error(1);
            assert!(message.starts_with("./tokenizer.json: cannot "), "{message}");
            assert!(
                message.contains("something in it makes no sense to the tokenizers library ("),
                "{message}"
            );
        }
    }
}

#[test]
fn numbers_that_make_no_sense() {
    let desk = Desk::new();
    for (arguments, expected) in [
        ("calibrate . --text text --out s --windows 0", "expected a whole number, 1 or more"),
        (
            "generate . --prompt a --seed -1",
            "'--seed <S>': expected a whole number from 0 to 18446744073709551615",
        ),
        (
            "recover . low --tokens tokens --out r --steps -1",
            "'--steps <N>': expected a whole number, 0 or more",
        ),
        ("compare . --tokens tokens --eval-tokens tokens --methods reap:rank=1", "reap has no option `rank`"),
        (
            "compare . --tokens tokens --eval-tokens tokens --methods reap:scope=foo",
            "option scope=foo: expected one of",
        ),
        ("eval . --multiple-choice questions --against .", "--against needs --text or --tokens"),
        ("calibrate . --text text --out s --windows -1", "expected a whole number, 1 or more"),
        ("calibrate . --text text --out s --window-length 1", "expected a whole number, 2 or more"),
        ("calibrate . --text text --out s --window-length 99999999999999999999", "expected a whole number"),
        ("plan --method reap --stats stats --out p --remove nan", "expected a number between 0 and 1"),
        ("plan --method reap --stats stats --out p --remove inf", "expected a number between 0 and 1"),
        ("plan --method reap --stats stats --out p --remove -0.5", "expected a number between 0 and 1"),
        ("plan --method reap --stats stats --out p --experts 0", "expected a whole number, 1 or more"),
        ("plan --method reap --stats stats --out p --bytes -5", "expected between 1 byte and 8 EiB"),
        ("plan --method reap --stats stats --out p --bytes 9e99", "expected between 1 byte and 8 EiB"),
        ("plan --method reap --stats stats --out p --remove 0.4 --set floor=-1", "expected a whole number"),
        ("plan --method reap --stats stats --out p --remove 0.4 --set floor=9", "expected 2 to 5"),
        ("plan --method reap --stats stats --out p --remove 0.4 --set scope=all", "one of layer, global"),
        ("plan --method reap --stats stats --out p --remove 0.4 --set depth=3", "reap has no option `depth`"),
        ("plan --method best --stats stats --out p --remove 0.4", "unknown method `best`; known methods: "),
        (
            "plan --method reap --stats stats --out p --bytes 5.5",
            "size `5.5`: there are no fractions of a byte",
        ),
        ("plan --method reap --model . --out p --remove 0.4", "--stats is needed"),
        (
            "plan --method reap --out p --remove 0.4",
            "--stats is needed: reap plans from what moepress calibrate",
        ),
        ("plan --method random --out p --remove 0.4", "one of --stats and --model is needed"),
        ("plan --method low-rank --stats stats --out p", "low-rank: no budget; give --remove, --bytes, or"),
        (
            "plan --method naee --model . --tokens tokens --out p",
            "naee: no budget; give --remove, --experts or",
        ),
        (
            "plan --method low-rank --stats stats --out p --set energy=0.9",
            "energy needs the spectra of the weights",
        ),
        (
            "plan --method reap --stats stats --out p --remove 0.4 --set layer_ratio=owl",
            "layer_ratio=owl looks at the weights; give the checkpoint with --model",
        ),
        ("methods best", "unknown method `best`; known methods: "),
    ] {
        desk.refuses(2, arguments, expected);
    }
    desk.refuses_all(&[
        ("plan --method reap --stats stats --out p --remove 0.999", "the largest possible is 0.6"),
        ("plan --method reap --stats stats --out p --remove 1e-9", "would drop no expert"),
        ("plan --method reap --stats stats --out p --experts 1", "the smallest possible is 2"),
        ("plan --method reap --stats stats --out p --experts 5", "nothing would be removed"),
        ("plan --method reap --stats stats --out p --experts 6", "layer 0 has 5 experts; use fewer"),
        ("plan --method reap --stats stats --out p --bytes 1", "the smallest size this method can reach is"),
        ("plan --method reap --stats stats --out p --bytes 1TB", "so nothing needs removing"),
    ]);
}

#[test]
fn arguments_that_are_no_text() {
    #[cfg(unix)]
    {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let desk = Desk::new();
        let mut command = desk.command("inspect .");
        command.arg(OsStr::from_bytes(b"--\xff"));
        desk.refuses_command(2, command, "unexpected argument");
        let mut command = desk.command("inspect");
        command.arg(OsStr::from_bytes(b"\xff\x1b[31m\n"));
        desk.refuses_command(1, command, "\u{fffd}\u{fffd}[31m : does not exist");
    }
}

#[test]
fn more_threads_than_there_can_be() {
    let desk = Desk::new();
    let mut many = desk.command("eval . --tokens tokens");
    many.env("RAYON_NUM_THREADS", "100000");
    desk.refuses_command(2, many, "RAYON_NUM_THREADS is 100000, expected at most 4096");
    let mut words = desk.command("eval . --tokens tokens");
    words.env("RAYON_NUM_THREADS", "two");
    desk.refuses_command(2, words, "RAYON_NUM_THREADS is two, expected a number of threads");
    for threads in ["", "0", "1", "64"] {
        let mut command = desk.command("eval . --tokens tokens");
        command.env("RAYON_NUM_THREADS", threads);
        outcome(command).ok();
    }
}

#[test]
fn outputs_that_would_destroy_something() {
    let desk = Desk::new();
    std::fs::create_dir(desk.path("folder")).unwrap();
    desk.refuses_all(&[
        ("run . --tokens tokens --out tokens", "--out tokens: would overwrite tokens, which is read"),
        ("calibrate . --tokens tokens --out tokens", "would overwrite tokens, which is read"),
        ("calibrate . --tokens tokens --out ./model.safetensors", "would overwrite ./model.safetensors"),
        ("calibrate . --tokens tokens --out folder/../config.json", "would overwrite ./config.json"),
        ("plan --method reap --remove 0.4 --stats stats --out stats", "would overwrite stats, which is read"),
        ("plan --method random --remove 0.4 --model . --out config.json", "would overwrite ./config.json"),
        ("merge stats stats --out stats", "would overwrite stats, which is read"),
        (
            "calibrate . --tokens tokens --out folder",
            "--out folder: is a folder; expected the name of a file",
        ),
        ("calibrate . --tokens tokens --out new/", "--out new/: ends like a folder"),
        ("calibrate . --tokens tokens --out no/such/s", "the folder no/such does not exist; create it first"),
        ("calibrate . --tokens tokens --out plan/s", "the folder plan does not exist"),
        ("compress . --plan plan --out .", ".: not the name of a folder"),
        ("compress . --plan plan --out ..", "..: not the name of a folder"),
        ("compress . --plan plan --out folder/.", "folder/.: not the name of a folder"),
        ("inspect nowhere", "nowhere: does not exist; expected a checkpoint folder"),
        ("inspect plan", "plan: not a folder; expected a checkpoint folder"),
        ("compress . --plan plan --out plan", "plan: exists already; remove it or choose another --out"),
        ("compress . --plan plan --out no/such", "no/such: the folder that should hold it does not exist"),
        ("compress . --plan plan --out plan/x", "plan/x: the folder that should hold it does not exist"),
    ]);
    std::fs::write(desk.path("folder/mine"), "mine").unwrap();
    desk.refuses(1, "compress . --plan plan --out folder", "folder: exists already");
}

/// What stands where work in progress would go is not removed unless moepress put it there.
#[test]
fn folders_of_other_people_stay() {
    let desk = Desk::new();
    std::fs::create_dir(desk.path("s.partial")).unwrap();
    std::fs::write(desk.path("s.partial/thesis"), "years of work").unwrap();
    desk.refuses(1, "calibrate . --tokens tokens --out s", "s.partial: is in the way");
    desk.refuses(1, "compress . --plan plan --out s", "but moepress did not make it; move it");
    std::fs::write(desk.path("t.partial"), "years of work").unwrap();
    desk.refuses(1, "calibrate . --tokens tokens --out t", "t.partial: is in the way");
    // Nor where the key of something else happens to lie there.
    std::fs::write(desk.path("s.partial/key"), "of the house").unwrap();
    desk.refuses(1, "calibrate . --tokens tokens --out s", "s.partial: is in the way");
}

#[cfg(unix)]
#[test]
fn links_and_devices_are_not_replaced() {
    use std::os::unix::fs::symlink;
    let desk = Desk::new();
    symlink("nowhere", desk.path("dangling")).unwrap();
    symlink("loop", desk.path("loop")).unwrap();
    std::fs::create_dir(desk.path("empty")).unwrap();
    symlink("empty", desk.path("link")).unwrap();
    assert!(Command::new("mkfifo").arg(desk.path("pipe")).status().unwrap().success());
    desk.refuses_all(&[
        ("run . --tokens tokens --out /dev/null", "/dev/null: is not a regular file"),
        ("plan --method random --remove 0.4 --model . --out pipe", "pipe: is not a regular file"),
        ("compress . --plan plan --out dangling", "dangling: is a symbolic link"),
        ("compress . --plan plan --out link", "link: is a symbolic link"),
        ("eval . --tokens loop", "loop: Too many levels of symbolic links"),
        ("eval loop --tokens tokens", "loop: not a folder"),
        ("eval . --tokens pipe", "pipe: is a pipe or a device, expected a file"),
    ]);
    // A part of the checkpoint that is a link to nothing is missing, not absent.
    for name in ["moepress.json", "model.safetensors.index.json"] {
        symlink("nowhere", desk.path(name)).unwrap();
        desk.refuses(1, "eval . --tokens tokens", &format!("{name}: No such file"));
        std::fs::remove_file(desk.path(name)).unwrap();
    }
    std::fs::remove_file(desk.path("config.json")).unwrap();
    assert!(Command::new("mkfifo").arg(desk.path("config.json")).status().unwrap().success());
    desk.refuses(1, "eval . --tokens tokens", "config.json: is a pipe or a device");
}

/// Two runs that write to one place would mix their results.
#[test]
fn one_run_at_a_time() {
    let desk = Desk::new();
    std::fs::create_dir(desk.path("s.partial")).unwrap();
    let locks = ["s.partial/lock", "p.incomplete"].map(|name| {
        let file = std::fs::File::create(desk.path(name)).unwrap();
        file.lock().unwrap();
        file
    });
    let expected = "another process is writing it; wait for that one or choose another --out";
    desk.refuses_all(&[
        ("calibrate . --tokens tokens --out s", expected),
        ("compress . --plan plan --out s", expected),
        ("plan --method random --remove 0.4 --model . --out p", expected),
    ]);
    // What a killed process leaves is not locked.
    drop(locks);
    desk.run("calibrate . --tokens tokens --out s").ok();
    desk.run("plan --method random --remove 0.4 --model . --out p").ok();
    assert!(!desk.path("s.partial").exists() && !desk.path("p.incomplete").exists());
}

#[test]
fn failed_work_leaves_nothing_or_what_it_can_go_on_from() {
    let desk = Desk::new();
    let before = std::fs::read(desk.path("model.safetensors")).unwrap();
    let bad = |layer: usize| format!("model.layers.{layer}.input_layernorm.weight");
    let spoil = |name: &str| desk.model.edit_values(name, |values| values[0] = f32::NAN);
    let commands =
        ["calibrate . --tokens tokens --out s", "compress . --plan fresh --out c", "eval . --tokens tokens"];
    // In the first layer, or before it.
    for name in [&bad(0), "model.embed_tokens.weight"] {
        spoil(name);
        desk.run("plan --method random --remove 0.4 --model . --out fresh").ok();
        for command in &commands {
            desk.refuses(1, command, &format!("{name} holds NaN"));
        }
        std::fs::write(desk.path("model.safetensors"), &before).unwrap();
    }
    // The head and its norm, which compressing only copies.
    for name in ["lm_head.weight", "model.norm.weight"] {
        spoil(name);
        desk.run("plan --method random --remove 0.4 --model . --out fresh").ok();
        commands[1..].iter().for_each(|c| desk.refuses(1, c, &format!("{name} holds NaN")));
        std::fs::write(desk.path("model.safetensors"), &before).unwrap();
    }
    // In the second layer: the first is kept, but not used once the weights are others.
    spoil(&bad(1));
    let message = desk.run(commands[0]).error(1);
    assert!(message.starts_with(&format!(".: layer 1: {} holds NaN", bad(1))), "{message}");
    assert!(desk.path("s.partial/layer-00000.safetensors").exists() && !desk.path("s").exists());
    std::fs::write(desk.path("model.safetensors"), &before).unwrap();
    let report = command(commands[0].split(' ')).current_dir(desk.model.path()).output().unwrap();
    let report = String::from_utf8(report.stderr).unwrap();
    assert!(report.starts_with("warning: s.partial: ") && report.contains("; starting afresh\n"), "{report}");
    assert!(report.contains("calibrate: layer 1/2: busiest expert"), "{report}");
    assert!(!desk.path("s.partial").exists());
}

#[test]
fn statistics_that_cannot_be_used() {
    let desk = Desk::new();
    let original = std::fs::read(desk.path("stats")).unwrap();
    let plan = "plan --method reap --remove 0.4 --stats bad --out p";
    for length in [0, 7, 8, 100, original.len() - 8] {
        std::fs::write(desk.path("bad"), &original[..length]).unwrap();
        desk.refuses(1, plan, "bad: ");
    }
    desk.refuses_all(&[
        ("plan --method reap --remove 0.4 --stats gone --out p", "gone: No such file"),
        ("plan --method reap --remove 0.4 --stats . --out p", ".: is a folder, expected a file"),
        ("plan --method reap --remove 0.4 --stats plan --out p", "plan: not a valid safetensors file"),
        ("plan --method reap --remove 0.4 --stats model.safetensors --out p", "it is no statistics file"),
        ("merge stats stats --out s", "were measured on the same tokens"),
    ]);
    desk.run("calibrate . --text text --window-length 8 --moments input,hidden --out short").ok();
    desk.refuses(1, "merge stats short --out s", "have windows of different length, 16 and 8 tokens");
    // Values: the first of a tensor.
    let with_value = |name: &str, value: f64| {
        let shard = std::sync::Arc::new(Shard::open(&desk.path("stats")).unwrap());
        let start = shard.tensor(name).unwrap().bytes().as_ptr() as usize - shard.data().as_ptr() as usize;
        let mut bytes = original.clone();
        let start = shard.header_bytes() + start;
        bytes[start..start + 8].copy_from_slice(&value.to_le_bytes());
        std::fs::write(desk.path("bad"), bytes).unwrap();
    };
    with_value("layers.0.gate_norm_sum", f64::NAN);
    desk.refuses(1, plan, "bad: layers.0.gate_norm_sum holds NaN at flat index 0; statistics must be finite");
    with_value("layers.1.input_gram", f64::INFINITY);
    let compress = "compress . --plan low_rank --stats bad --out c";
    let message = desk.run(compress).error(1);
    assert!(message.contains("bad: layers.1.input_gram holds inf"), "{message}");
    std::fs::remove_dir_all(desk.path("c.partial")).unwrap();
    with_value("layers.0.input_gram", -1e9);
    desk.refuses(1, compress, "layer 0: expert 0: gate: the second moment of the inputs is not positive");
    // Metadata.
    let with_metadata = |from: &str, to: &str| {
        let header = String::from_utf8_lossy(&original);
        assert!(header.contains(from), "{from}");
        let at = original.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = original.clone();
        bytes.splice(at..at + from.len(), to.bytes());
        let length = u64::from_le_bytes(original[..8].try_into().unwrap()) + to.len() as u64;
        bytes[..8].copy_from_slice(&(length - from.len() as u64).to_le_bytes());
        std::fs::write(desk.path("bad"), bytes).unwrap();
    };
    for (from, to, expected) in [
        (r#""format_version":"1""#, r#""format_version":"2""#, "bad: has format version 2, this moepress"),
        (r#""tokens":"64""#, r#""tokens":"-1""#, "bad: metadata `tokens` is `-1`, expected a number"),
        (r#"\"experts\":5"#, r#"\"experts\":4611686018427387904"#, "bad: layers.0.count has shape [5]"),
        (r#"\"experts\":5"#, r#"\"experts\":0"#, "bad: layers.0.count has shape [5], expected [0]"),
        (
            r#"\"width\":16"#,
            r#"\"width\":0"#,
            "bad: layers.0.hidden_sq_sum has shape [5, 16], expected [5, 0]",
        ),
        (r#"\"groups\":1"#, r#"\"groups\":3"#, "bad: profile: layer 0: groups: 1 of 3 groups"),
        (r#"\"top_k\":2"#, r#"\"top_k\":6"#, "bad: profile: layer 0: top_k: found 6, expected at most 5"),
        (r#"\"moe_layers\":["#, r#"\"moe_layers\":[7,"#, "bad: metadata `model`: invalid type: integer `7`"),
    ] {
        with_metadata(from, to);
        desk.refuses(1, plan, expected);
    }
    // Two that lie in the same way are not added up by what they say.
    with_metadata(r#"\"experts\":5"#, r#"\"experts\":4611686018427387904"#);
    let lies = std::fs::read(desk.path("bad")).unwrap();
    let key = br#""tokens_sha256":""#;
    let digit = lies.windows(key.len()).position(|w| w == key).unwrap() + key.len();
    let mut others = lies.clone();
    others[digit] = if lies[digit] == b'0' { b'1' } else { b'0' };
    std::fs::write(desk.path("worse"), others).unwrap();
    desk.refuses(1, "merge bad worse --out s", "bad: layers.0.count has shape [5]");
}

#[test]
fn things_of_another_model() {
    let desk = Desk::new();
    let other = Mutant::of("deepseek_v2");
    let other = other.path().display();
    desk.refuses_all(&[
        (
            &format!("plan --method reap --remove 0.4 --stats stats --model {other} --out p"),
            "stats: measured on another checkpoint than ",
        ),
        (
            &format!("compress {other} --plan plan --out c"),
            "plan: model.family: the plan is for mixtral, the checkpoint is deepseek_v2",
        ),
    ]);
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/model");
    let against = format!("eval . --tokens tokens --against {}", example.display());
    desk.refuses(1, &against, "a vocabulary of 2048 cannot be compared with .");
    desk.model.edit_values("model.norm.weight", |values| values[0] += 1.0);
    desk.model.edit_values("lm_head.weight", |values| values[0] += 1.0);
    desk.refuses(
        1,
        "compress . --plan plan --out c",
        "plan: model.identity: the plan is for the checkpoint ",
    );
}

/// Where there are two checkpoints, it is said which is meant.
#[test]
fn the_worse_of_two_checkpoints_is_named() {
    let desk = Desk::new();
    let other = Mutant::of("mixtral");
    let dir = other.path().display();
    let original = std::fs::read(other.file("model.safetensors")).unwrap();
    let commands = [
        format!("eval . --tokens tokens --against {dir}"),
        format!("eval {dir} --tokens tokens --against ."),
        format!("recover {dir} . --tokens tokens --out r"),
    ];
    for (name, place) in [("model.layers.0.input_layernorm.weight", "layer 0: "), ("lm_head.weight", "")] {
        other.edit_values(name, |values| values[0] = f32::NAN);
        for command in &commands {
            if place.is_empty() && command.starts_with("recover") {
                continue;
            }
            let message = desk.run(command).error(1);
            assert!(message.starts_with(&format!("{dir}: {place}{name} holds NaN")), "{message}");
        }
        std::fs::write(other.file("model.safetensors"), &original).unwrap();
    }
    other.edit_tensors(|tensors| {
        let name = "model.layers.0.self_attn.q_proj.weight";
        let half = tensors[name].rows(0, 16);
        tensors.insert(name.into(), half);
    });
    let message = desk.run(&commands[0]).error(1);
    assert!(message.starts_with(&format!("{dir}: layer 0: model.layers.0.self_attn.q_proj")), "{message}");
    // A path is said once.
    other.edit_tensors(|tensors| drop(tensors.remove("model.layers.0.self_attn.q_proj.weight")));
    let message = desk.run(&commands[0]).error(1);
    let path = dir.to_string();
    assert!(message.contains(" is missing") && message.matches(&path).count() == 1, "{message}");
}

/// What was asked for is done, though nobody could be told.
#[cfg(target_os = "linux")]
#[test]
fn results_that_cannot_be_shown_are_there() {
    let desk = Desk::new();
    for (arguments, out) in [
        ("calibrate . --tokens tokens --out c/s", "c/s"),
        ("plan --method reap --remove 0.4 --stats stats --out c/p --json", "c/p"),
        ("compress . --plan plan --out c/small", "c/small"),
        ("recover . c/small --tokens tokens --steps 0 --out c/r", "c/r"),
    ] {
        let _ = std::fs::create_dir(desk.path("c"));
        let mut command = desk.command(arguments);
        command.stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
        let message = outcome(command).error(1);
        assert!(message.starts_with("standard output: No space left"), "{message}");
        assert!(message.ends_with(&format!("; the result is complete, in {out}")), "{message}");
        assert!(desk.path(out).exists(), "{arguments}");
    }
}

/// What `git clone` leaves where Git LFS is not installed.
#[test]
fn a_pointer_in_place_of_the_weights() {
    let desk = Desk::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4241003\n";
    std::fs::write(desk.path("model.safetensors"), pointer).unwrap();
    let expected =
        "./model.safetensors: is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`";
    desk.refuses(1, "eval . --tokens tokens", expected);
}

#[cfg(unix)]
#[test]
fn a_folder_that_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt;
    let desk = Desk::new();
    let model = Mutant::of("mixtral");
    let allow = |mode| std::fs::set_permissions(model.path(), PermissionsExt::from_mode(mode)).unwrap();
    allow(0);
    if std::fs::read_dir(model.path()).is_ok() {
        eprintln!("skipped: this user may read everything");
    } else {
        let command = format!("eval {} --tokens tokens", model.path().display());
        desk.refuses(1, &command, "config.json: Permission denied");
    }
    allow(0o700);
    // Another reason than that it is not there.
    desk.refuses(1, &format!("inspect {}", "long".repeat(100)), ": File name too long");
}

#[test]
fn plans_edited_into_nonsense() {
    let desk = Desk::new();
    let text = std::fs::read_to_string(desk.path("plan")).unwrap();
    let compress = "compress . --plan bad --out c";
    for length in [0, 1, text.len() / 2, text.len() - 3] {
        std::fs::write(desk.path("bad"), &text[..length]).unwrap();
        desk.refuses(1, compress, "bad: a plan is JSON: EOF while parsing");
    }
    std::fs::write(desk.path("bad"), "[".repeat(100_000)).unwrap();
    desk.refuses(1, compress, "bad: a plan is JSON: recursion limit exceeded");
    desk.refuses(1, "compress . --plan stats --out c", "stats: ");
    desk.refuses(1, "compress . --plan . --out c", ".: is a folder, expected a file");

    let set = |place: &'static str, value: Value| {
        move |plan: &mut Value| *plan.pointer_mut(place).unwrap_or_else(|| panic!("{place}")) = value
    };
    let action = |value: Value| set("/layers/1/experts/0", value);
    let edits = [
        (set("/layers", json!([])), "bad: layer 0: missing; a plan lists every MoE layer"),
        (set("/layers", json!(null)), "bad: layers: found null, expected an array"),
        (set("/layers/1/layer", json!(0)), "bad: layer 0: listed twice"),
        (set("/layers/1/layer", json!(99)), "bad: layer 99: not a MoE layer; the MoE layers are 0 to 1"),
        (set("/layers/0/top_k", json!(0)), "bad: layer 0: top_k: 0 with 3 experts left"),
        (set("/layers/0/top_k", json!(1_u64 << 63)), "experts left to choose from; use 1 to 3"),
        (set("/layers/0/top_k", json!(-1)), "bad: layer 0: top_k: found -1, expected a whole number"),
        (set("/layers/0/experts/0/expert", json!(1_u64 << 63)), "the layer has 5 experts, 0 to 4"),
        (set("/layers/0/experts", json!([])), "bad: layer 0: top_k: no expert is left to choose from"),
        (set("/moepress", json!(2)), "bad: moepress: version 2; this program reads version 1"),
        (set("/expected/bytes", json!(-1)), "bad: expected.bytes: found -1"),
        (set("/options", json!({ "propagate": "true" })), "option propagate is \"true\", expected true or"),
        (set("/options", json!({ "propagate": true })), "propagate=true, which measures while compressing"),
        (set("/options", json!({ "factor_dtype": "int4" })), "factor_dtype is \"int4\", expected auto, f32"),
        (
            action(json!({ "expert": 0, "action": "explode" })),
            "unknown action `explode`; known actions: keep",
        ),
        (action(json!({ "expert": 0, "action": "keep", "rank": 3 })), "expert 0: rank: unknown field"),
        (action(json!({ "expert": 0 })), "layer 1: expert 0: action: this field is missing"),
        (
            action(json!({ "expert": 0, "action": "low_rank", "rank": { "gate": 99 } })),
            "bad: layer 1: expert 0: rank.gate: found 99, expected 1 to 16",
        ),
        (
            action(json!({ "expert": 0, "action": "channels", "keep": 17 })),
            "bad: layer 1: expert 0: keep: found 17, expected 1 to 16 channels",
        ),
        (
            action(json!({ "expert": 0, "action": "channels", "keep": [3, 3] })),
            "expert 0: keep: channels must be in ascending order, each once",
        ),
        (
            action(json!({ "expert": 0, "action": "delta", "rank": 0 })),
            "bad: layer 1: expert 0: rank: found 0, expected at least 1",
        ),
        (
            action(json!({ "expert": 0, "action": "merge", "into": 0, "weight": 0.5 })),
            "into: 0 is the expert itself",
        ),
    ];
    for (edit, expected) in edits {
        desk.edited("plan", "bad", edit);
        desk.refuses(1, compress, expected);
    }
}

#[test]
fn compressing_without_what_it_needs() {
    let desk = Desk::new();
    desk.run("calibrate . --tokens tokens --out first_moments").ok();
    desk.refuses_all(&[
        ("compress . --plan low_rank --out c", "give --tokens, or --stats from calibrate --moments"),
        ("compress . --plan low_rank --stats first_moments --out c", "give --tokens, or --stats"),
        ("compress . --plan low_rank --stats stats --layout hf --out c", "use --layout moepress"),
    ]);
    // Statistics that the plan names but that are not what they were, and text that is given by name.
    desk.run("plan --method low-rank --remove 0.4 --stats stats --model . --out own").ok();
    desk.run("compress . --plan own --out from_stats").ok();
    generate::tokens(&desk.path("more"), 6, 16, 64);
    desk.run("compress . --plan own --tokens more --out from_tokens").ok();
    let weights = |folder: &str| std::fs::read(desk.path(folder).join("model.safetensors")).unwrap();
    assert!(weights("from_stats") != weights("from_tokens"));
    desk.run("calibrate . --tokens more --moments input,hidden --out stats2").ok();
    std::fs::rename(desk.path("stats"), desk.path("kept")).unwrap();
    let absent = "(its own statistics, stats: No such file";
    desk.refuses(1, "compress . --plan own --out c", absent);
    std::fs::rename(desk.path("stats2"), desk.path("stats")).unwrap();
    let others = "(its own statistics, stats: measured on other tokens or another model by now)";
    desk.refuses(1, "compress . --plan own --out c", others);
    std::fs::rename(desk.path("kept"), desk.path("stats")).unwrap();
    // Another plan to the same place begins anew.
    desk.edited("low_rank", "other", |plan| plan["layers"][0]["experts"][0]["rank"]["gate"] = json!(3));
    let before = std::fs::read(desk.path("model.safetensors")).unwrap();
    desk.model.edit_values("model.layers.1.input_layernorm.weight", |values| values[0] = f32::NAN);
    desk.run("plan --method low-rank --remove 0.4 --set whiten=false --model . --out spoilt").ok();
    desk.run("compress . --plan spoilt --out c").error(1);
    assert!(desk.path("c.partial").exists());
    std::fs::write(desk.path("model.safetensors"), before).unwrap();
    desk.run("compress . --plan other --stats stats --out c").ok();
    assert!(!desk.path("c.partial").exists());
    let u = std::sync::Arc::new(Shard::open(&desk.path("c/model.safetensors")).unwrap());
    let u = u.tensor("model.layers.0.block_sparse_moe.experts.0.w1.u").unwrap();
    assert_eq!(u.shape(), [16, 3]);
}

#[test]
fn layout_files_that_contradict_the_checkpoint() {
    let desk = Desk::new();
    let dense = |e: u64| json!({ "expert": e, "form": "dense" });
    let all = || (0..5).map(dense).collect::<Vec<_>>();
    let layer = |layer: u64, top_k: u64, experts: Vec<Value>| json!({ "moepress": 1, "layers": [{ "layer": layer, "top_k": top_k, "experts": experts }] });
    let first = |value: Value| [vec![value], all()[1..].to_vec()].concat();
    let low_rank = |rank: Value| layer(0, 2, first(json!({ "expert": 0, "form": "low_rank", "rank": rank })));
    let cases = [
        (json!({ "moepress": 2, "layers": [] }), "moepress.json: has version 2, this moepress reads"),
        (layer(9, 2, all()), "layer 9 is listed, but config.json gives it no experts"),
        (layer(0, 6, all()), "layer 0: top_k is 6, expected 1 to 5"),
        (layer(0, 0, all()), "layer 0: top_k is 0, expected 1 to 5"),
        (layer(0, 2, vec![dense(0), dense(0)]), "layer 0: expert 0 is listed twice"),
        (layer(0, 2, vec![dense(0), dense(1 << 63)]), "is listed, but config.json has experts 0 to 4"),
        (layer(0, 2, all()[..3].to_vec()), "gate.weight has shape [5, 32], expected [3, 32]"),
        (layer(0, 2, first(json!({ "expert": 0, "form": "alias", "of": 0 }))), "is an alias of 0, which is"),
        (layer(0, 2, first(json!({ "expert": 0, "form": "constant" }))), "experts.0.constant is missing"),
        (layer(0, 2, first(json!({ "expert": 0, "form": "sphere" }))), "unknown variant `sphere`, expected"),
        (low_rank(json!({ "gate": 0 })), "experts.0.w1.u is missing"),
        (low_rank(json!({ "gate": 1_u64 << 62 })), "experts.0.w1.u is missing"),
        (low_rank(json!({ "gate": -1 })), "moepress.json: invalid value: integer `-1`"),
    ];
    for (manifest, expected) in cases {
        std::fs::write(desk.path("moepress.json"), manifest.to_string()).unwrap();
        desk.refuses(1, "eval . --tokens tokens", expected);
    }
    for text in ["", "{", "[]", "null", "{\"moepress\": 1, \"lay"] {
        std::fs::write(desk.path("moepress.json"), text).unwrap();
        desk.refuses(1, "eval . --tokens tokens", "moepress.json: ");
    }
}

#[test]
fn numbers_in_a_config_that_no_model_has() {
    let desk = Desk::new();
    let original = std::fs::read(desk.path("config.json")).unwrap();
    let huge = 1_u64 << 40;
    for (key, value, expected) in [
        ("num_hidden_layers", json!(1 << 24), "is 16777216, expected a whole number from 0 to 4096"),
        ("num_hidden_layers", json!(3), "tensor model.layers.2."),
        ("hidden_size", json!(huge), "is 1099511627776, expected a whole number from 0 to 16777216"),
        ("hidden_size", json!("32"), "is \"32\", expected a whole number"),
        ("hidden_size", json!(null), "config.json: hidden_size is missing"),
        ("hidden_size", json!(33), "expected a divisor of hidden_size"),
        ("num_attention_heads", json!(3), "is 3, expected a divisor of hidden_size = 32"),
        ("num_attention_heads", json!(0), "num_attention_heads is 0, expected at least 1"),
        ("num_key_value_heads", json!(3), "is 3, expected a divisor of num_attention_heads = 4"),
        ("head_dim", json!(7), "gives 7 rotated elements, expected an even number"),
        ("head_dim", json!(1 << 20), "gives 1048576 rotated elements, expected at most 8192"),
        ("intermediate_size", json!(17), "has shape [16, 32], expected [17, 32]"),
        ("num_local_experts", json!(4), "gate.weight has shape [5, 32], expected [4, 32]"),
        ("num_local_experts", json!(huge), "expected a whole number from 0 to 16777216"),
        ("num_experts_per_tok", json!(6), "num_experts_per_tok is 6, expected 1 to 5"),
        ("max_position_embeddings", json!(0), "max_position_embeddings is 0, expected at least 1"),
        ("rms_norm_eps", json!(-1), "rms_norm_eps is -1, expected 0 or a little more"),
        ("rms_norm_eps", json!(1e300), "rms_norm_eps is inf, expected 0 or a little more"),
        ("rope_theta", json!(0), "rope_theta is 0, expected more than 1"),
        (
            "rope_scaling",
            json!({ "rope_type": "linear", "factor": 1e-300 }),
            "gives frequencies or an attention scale that are not finite",
        ),
    ] {
        desk.model.set_config(key, value);
        desk.refuses(1, "eval . --tokens tokens", expected);
        desk.refuses(1, "calibrate . --tokens tokens --out s", expected);
        std::fs::write(desk.path("config.json"), &original).unwrap();
    }
    let olmoe = Mutant::of("olmoe_clip");
    olmoe.set_config("clip_qkv", json!(-1));
    let eval = format!("eval {} --tokens tokens", olmoe.path().display());
    desk.refuses(1, &eval, "config.json: clip_qkv is -1, expected more than 0");
}

#[test]
fn questions_that_cannot_be_asked() {
    let desk = Desk::new();
    let eval = "eval . --multiple-choice questions";
    for (line, expected) in [
        ("", "questions: holds no questions; expected lines of"),
        ("{", "questions: line 1: is not JSON"),
        ("[]", "questions: line 1: is not a JSON object"),
        (r#"{"choices": ["a", "b"], "answer": 0}"#, "line 1: has no key `context`"),
        (
            r#"{"context": "a", "choices": ["a"], "answer": 0}"#,
            "`choices` has 1 of them, expected at least 2",
        ),
        (r#"{"context": "a", "choices": ["a", ""], "answer": 0}"#, "line 1: choice 1 is empty"),
        (r#"{"context": "a", "choices": ["a", "b"], "answer": 2}"#, "is 2, expected an index from 0 to 1"),
        (r#"{"context": "a", "choices": ["a", "b"], "answer": -1}"#, "is -1, expected an index from 0 to 1"),
        (r#"{"context": "a", "choices": ["a", "b"], "answer": "c"}"#, "which is none of the choices"),
        (r#"{"context": "", "choices": ["a", "b"], "answer": 0}"#, "follows an empty context"),
        (r#"{"context": "a", "choices": ["a", "b"], "answer": 0}"#, "a choice should begin with a space"),
    ] {
        std::fs::write(desk.path("questions"), line).unwrap();
        desk.refuses(1, eval, expected);
    }
    std::fs::write(desk.path("questions"), b"{\"context\": \"\xff\"}").unwrap();
    desk.refuses(1, eval, "questions: line 1: is not JSON");
    desk.refuses(1, "eval . --multiple-choice .", ".: is a folder, expected a file");
}

/// A change to the tensors of two experts.
type Edit = fn(&mut BTreeMap<String, Tensor>, [String; 2]);

/// Experts that are split, doubled or of another kind than the rest.
#[test]
fn experts_that_do_not_fit() {
    let desk = Desk::new();
    let original = std::fs::read(desk.path("model.safetensors")).unwrap();
    let name = |e: usize| format!("model.layers.0.block_sparse_moe.experts.{e}.w2.weight");
    let cases: [(Edit, &str); 4] = [
        (|tensors, [a, _]| drop(tensors.remove(&a)), "experts.1.w2.weight is missing"),
        (
            |tensors, [a, b]| {
                let half = tensors[&a].rows(0, 16);
                tensors.insert(b, half);
            },
            "experts.4.w2.weight has shape [16, 16], expected [32, 16]",
        ),
        (
            |tensors, [a, _]| {
                let half = tensors[&a].rows(0, 16);
                tensors.insert(a.clone(), half);
            },
            "experts.1.w2.weight has shape [16, 16], expected [32, 16]",
        ),
        (
            |tensors, _| {
                let router = "model.layers.0.block_sparse_moe.gate.weight";
                let short = tensors[router].rows(0, 4);
                tensors.insert(router.into(), short);
            },
            "gate.weight has shape [4, 32], expected [5, 32]",
        ),
    ];
    for (edit, expected) in cases {
        desk.model.edit_tensors(|tensors| edit(tensors, [name(1), name(4)]));
        desk.refuses_all(&[
            ("calibrate . --tokens tokens --out s", expected),
            ("plan --method random --remove 0.4 --model . --out p", expected),
            ("compress . --plan plan --out c", expected),
            ("eval . --tokens tokens", expected),
        ]);
        std::fs::write(desk.path("model.safetensors"), &original).unwrap();
    }
}

/// Some tokenizers come with the truncation and padding of their training, which is not for the text measured here.
#[test]
fn a_tokenizer_does_not_cut_documents_off() {
    let desk = Desk::new();
    let tokens =
        |desk: &Desk| desk.run("eval . --text text --window-length 16 --json").json()["overall"].clone();
    let expected = tokens(&desk);
    assert_eq!(expected["tokens"], 75);
    desk.edited("tokenizer.json", "tokenizer.json", |tokenizer| {
        tokenizer["truncation"] =
            json!({ "max_length": 20, "strategy": "LongestFirst", "stride": 0, "direction": "Right" });
        tokenizer["padding"] = json!({ "strategy": { "Fixed": 4096 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "?" });
    });
    assert_eq!(tokens(&desk), expected);
}

/// Names that scripts trip over.
#[test]
fn odd_names_are_names() {
    let desk = Desk::new();
    for name in ["with space", "line\nbreak", "ünï", " ", "-dash", "s.partial", "p.incomplete"] {
        let run = |head: &[&str], flag: &str, out: &str| {
            let mut command = command(head);
            command.args(["--quiet", "--json"]).arg(format!("{flag}={out}")).current_dir(desk.model.path());
            outcome(command).json()
        };
        let stats = format!("{name}s");
        let calibrated = run(&["calibrate", ".", "--tokens", "tokens"], "--out", &stats);
        assert_eq!(calibrated["out"], stats);
        let plan = format!("{name}p");
        run(&["plan", "--method", "reap", "--remove", "0.4", "--stats", "stats"], "--out", &plan);
        let folder = format!("{name}c");
        let plan = format!("--plan={plan}");
        assert_eq!(run(&["compress", ".", &plan], "--out", &folder)["layout"], "hf");
        assert_eq!(std::fs::read(desk.path(&stats)).unwrap(), {
            desk.run("calibrate . --tokens tokens --out again").ok();
            std::fs::read(desk.path("again")).unwrap()
        });
    }
    let partial = |name: &PathBuf| name.extension().is_some_and(|e| e == "partial" || e == "incomplete");
    assert!(!desk.snapshot().keys().any(partial));
}

/// A header may say anything.
#[test]
fn headers_that_lie() {
    let desk = Desk::new();
    let original = std::fs::read(desk.path("tokens")).unwrap();
    let eval = "eval . --tokens bad";
    for length in [0, 1, 1 << 31, 99_999_999, 1 << 63, u64::MAX] {
        let mut bytes = original.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(desk.path("bad"), bytes).unwrap();
        desk.refuses(1, eval, "bad: ");
    }
    for (header, expected) in [
        (r#"{"ids":{"dtype":"I32","shape":[1,4],"data_offsets":[0,8]}}"#, "bad: not a valid safetensors"),
        (r#"{"ids":{"dtype":"I32","shape":[1,4],"data_offsets":[16,0]}}"#, "bad: not a valid safetensors"),
        (
            r#"{"ids":{"dtype":"I32","shape":[1,4],"data_offsets":[0,16]},"mask":{"dtype":"I32","shape":[1,4],"data_offsets":[8,24]}}"#,
            "bad: not a valid safetensors",
        ),
        (
            r#"{"ids":{"dtype":"I32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#,
            "bad: not a valid safetensors",
        ),
        (r#"{"ids":{"dtype":"I99","shape":[1,4],"data_offsets":[0,16]}}"#, "bad: not a valid safetensors"),
        (r#"{"ids":{"dtype":"I32","shape":[1,6],"data_offsets":[0,24]}}"#, "the header describes 91 bytes"),
        ("[]", "bad: not a valid safetensors"),
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend([0; 16]);
        std::fs::write(desk.path("bad"), bytes).unwrap();
        desk.refuses(1, eval, expected);
    }
}

/// The same for the index of a sharded checkpoint.
#[test]
fn indexes_that_lie() {
    let desk = Desk::new();
    let model = Mutant::of("deepseek_v2_lite_sharded_bf16");
    let index = "model.safetensors.index.json";
    let original = std::fs::read_to_string(model.file(index)).unwrap();
    let eval = format!("eval {} --tokens tokens", model.path().display());
    for (file, expected) in [
        (json!("../outside"), "maps `lm_head.weight` to `../outside`, which lies outside the folder"),
        (json!("/etc/passwd"), "maps `lm_head.weight` to `/etc/passwd`, which lies outside the folder"),
        (json!(""), "maps `lm_head.weight` to \"\", which is not the name of a file"),
        (json!("a\0b"), "maps `lm_head.weight` to \"a\\0b\", which is not the name of a file"),
        (json!("gone.safetensors"), "gone.safetensors: No such file"),
        (json!("config.json"), "config.json: not a valid safetensors file"),
        (json!("model-00006-of-000006.safetensors"), "places `lm_head.weight` in model-00006-of-000006.safe"),
        (json!(5), "maps `lm_head.weight` to something not a string"),
    ] {
        model.edit_text(index, |text| {
            let mut index: Value = serde_json::from_str(&text).unwrap();
            index["weight_map"]["lm_head.weight"] = file;
            index.to_string()
        });
        desk.refuses(1, &eval, expected);
    }
    for (text, expected) in [
        ("", "is not JSON"),
        ("[]", "has no object `weight_map`"),
        (r#"{"weight_map": []}"#, "has no object `weight_map`"),
        (r#"{"weight_map": {}}"#, "lists no tensors"),
    ] {
        std::fs::write(model.file(index), text).unwrap();
        desk.refuses(1, &eval, expected);
    }
    assert!(original.contains("lm_head.weight"));
}

/// A file of tensors that nothing asks for is nothing.
#[test]
fn checkpoints_without_tensors() {
    let desk = Desk::new();
    write_safetensors(&desk.path("model.safetensors"), &BTreeMap::new(), Vec::<Entry<'_>>::new()).unwrap();
    for command in
        ["calibrate . --tokens tokens --out s", "compress . --plan plan --out c", "eval . --tokens tokens"]
    {
        desk.refuses(1, command, " is missing");
    }
}
