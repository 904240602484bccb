//! Files that change while they are read, disks that are full, and checkpoints with very many or oddly named tensors.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::command::{command, outcome};
use common::{Mutant, generate};
use moepress::architecture::Architecture;
use moepress::checkpoint::{Checkpoint, Entry, Tensor, write_safetensors};
use moepress::model::LayerSource;
use serde_json::Value;

/// Arguments of `moepress` in one line, run quietly in `dir`.
fn quietly(dir: &Path, arguments: &str) -> std::process::Command {
    let mut command = command(arguments.split(' '));
    command.arg("--quiet").current_dir(dir);
    command
}

#[test]
fn a_file_that_changes_while_it_is_read_is_noticed() {
    let model = Mutant::of("mixtral");
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    let architecture = Architecture::from_config(checkpoint.config()).unwrap();
    LayerSource::open(&checkpoint, &architecture, 0).unwrap();
    let weights = model.file("model.safetensors");
    let file = std::fs::File::options().append(true).open(&weights).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    file.set_modified(before + std::time::Duration::from_secs(1)).unwrap();
    let message = LayerSource::open(&checkpoint, &architecture, 1).unwrap_err().to_string();
    let expected = format!(
        "{}: changed while it was being read; start again when nothing writes to it",
        weights.display()
    );
    assert_eq!(message, expected);
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_is_cut_off_while_it_is_read_ends_the_command_with_a_message() {
    use std::io::{BufRead, BufReader, Read};
    use std::process::Stdio;

    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    generate::mixtral(&model, &generate::Sizes { layers: 12, ..generate::Sizes::default() });
    generate::tokens(&dir.path().join("tokens"), 16, 128, 512);
    let mut calibrate =
        command(["calibrate", "model", "--tokens", "tokens", "--device", "cpu", "--out", "stats"]);
    let mut child = calibrate.current_dir(dir.path()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("layer") {
        assert!(stderr.read_line(&mut text).unwrap() > 0, "no layer was ever done: {text}");
    }
    let weights = std::fs::File::options().write(true).open(model.join("model.safetensors")).unwrap();
    weights.set_len(4096).unwrap();
    text.clear();
    stderr.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{text}");
    let message = text.lines().last().unwrap_or_default();
    // Noticed between two layers, or by a read of what is no longer there.
    let known = ["changed while it was being read", "was cut off while it was being read"];
    assert!(message.starts_with("error: ") && message.contains("model.safetensors: "), "{text}");
    assert!(known.iter().any(|k| message.contains(k)), "{text}");
    assert!(!dir.path().join("stats").exists());
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_one_line_and_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    generate::mixtral(
        &dir.path().join("model"),
        &generate::Sizes { layers: 2, ..generate::Sizes::default() },
    );
    generate::tokens(&dir.path().join("tokens"), 2, 32, 512);
    let commands = [
        ("stats", "calibrate model --tokens tokens --device cpu --out stats"),
        ("plan", "plan --method low-rank --remove 0.4 --set whiten=false --model model --out plan"),
        ("small", "compress model --plan plan --device cpu --out small"),
        ("logits", "run model --tokens tokens --device cpu --out logits"),
    ];
    for (out, arguments) in commands {
        // No file may grow beyond one block of the shell: as on a disk that is full.
        let mut limited = std::process::Command::new("sh");
        limited.args(["-c", "ulimit -f 1; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_moepress")]);
        limited.args(arguments.split(' ')).arg("--quiet").current_dir(dir.path());
        let message = outcome(limited).error(1);
        assert!(message.contains(out) && message.contains("File too large"), "{arguments}: {message}");
        assert!(!dir.path().join(out).exists(), "{arguments}");
        let stray: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!stray.iter().any(|name| name.to_string_lossy().ends_with(".incomplete")), "{stray:?}");
        outcome(quietly(dir.path(), arguments)).ok();
        assert!(dir.path().join(out).exists(), "{arguments}");
    }
}

#[test]
fn a_checkpoint_of_a_hundred_thousand_tensors_is_inspected_and_compressed() {
    const MORE: usize = 100_000;
    let model = Mutant::of("mixtral");
    let checkpoint = Checkpoint::open(model.path()).unwrap();
    let own: Vec<Tensor> = checkpoint.tensors().cloned().collect();
    let names: Vec<String> = (0..MORE).map(|i| format!("model.extra.{i}")).collect();
    let extra = names.iter().map(|name| Entry::u8(name.clone(), vec![1], &[7]));
    let entries = own.iter().map(Entry::tensor).chain(extra).collect();
    let dir = tempfile::tempdir().unwrap();
    let many = dir.path().join("many");
    std::fs::create_dir(&many).unwrap();
    std::fs::copy(model.file("config.json"), many.join("config.json")).unwrap();
    write_safetensors(&many.join("model.safetensors"), &BTreeMap::new(), entries).unwrap();
    let seen = outcome(quietly(dir.path(), "inspect many --json")).json();
    assert_eq!(seen["bytes"]["total"], checkpoint.bytes() + MORE as u64);
    outcome(quietly(dir.path(), "plan --method random --remove 0.25 --model many --out plan")).ok();
    outcome(quietly(dir.path(), "compress many --plan plan --device cpu --out small")).ok();
    let copied = Checkpoint::open(dir.path().join("small")).unwrap();
    assert_eq!(copied.tensor("model.extra.99999").unwrap().bytes(), [7]);
}

/// What a name or a file name may hold: quotes, line ends, terminal escapes, other scripts, paths.
const ODD: [&str; 7] = [
    "with \"quotes\" and spaces",
    "two\nlines",
    "\u{1b}[31mred",
    "專家.重み",
    "\u{202e}backwards",
    "../../../outside",
    "model.layers.99999999999999999999.mlp",
];

#[test]
fn odd_names_of_tensors_and_files_are_kept_and_shown_in_one_line() {
    let model = Mutant::of("mixtral");
    let dir = tempfile::tempdir().unwrap();
    let (folder, shard) = (dir.path().join("odd"), "部分 \"1\".safetensors");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(model.file("config.json"), folder.join("config.json")).unwrap();
    let own: Vec<Tensor> = Checkpoint::open(model.path()).unwrap().tensors().cloned().collect();
    let long = "x".repeat(5000);
    let names = || ODD.into_iter().chain([long.as_str()]);
    let extra = names().map(|name| Entry::u8(name, vec![1], &[7]));
    let entries = own.iter().map(Entry::tensor).chain(extra).collect();
    write_safetensors(&folder.join(shard), &BTreeMap::new(), entries).unwrap();
    let map: BTreeMap<&str, &str> = own.iter().map(Tensor::name).chain(names()).map(|n| (n, shard)).collect();
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();

    outcome(quietly(dir.path(), "inspect odd --json")).json();
    outcome(quietly(dir.path(), "plan --method random --remove 0.25 --model odd --out plan")).ok();
    outcome(quietly(dir.path(), "compress odd --plan plan --device cpu --out small")).ok();
    let copied = Checkpoint::open(dir.path().join("small")).unwrap();
    for name in names() {
        assert_eq!(copied.tensor(name).unwrap().bytes(), [7], "{name:?}");
    }

    // A tensor that the file does not have.
    for name in names() {
        let mut map = map.clone();
        let missing = format!("{name}, missing");
        map.insert(&missing, shard);
        let index = serde_json::json!({ "weight_map": map });
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        let message = outcome(quietly(dir.path(), "inspect odd")).error(1);
        assert!(!message.contains('\u{1b}'), "{message:?}");
    }
}

/// JSON without what was measured with a clock.
fn without_times(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|key, _| !key.contains("second") && !key.contains("speed"));
            fields.values_mut().for_each(without_times);
        }
        Value::Array(values) => values.iter_mut().for_each(without_times),
        _ => {}
    }
}

/// Everything that the commands give with so many threads: the files behind `--out`, or standard output where there are
/// none. The files are removed again.
fn results(dir: &Path, chain: &[String], threads: &str) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let out = |arguments: &str| Some(dir.join(arguments.split_once("--out ")?.1));
    for arguments in chain {
        let mut command = quietly(dir, arguments);
        command.env("RAYON_NUM_THREADS", threads);
        let stdout = outcome(command).ok();
        if let Some(out) = out(arguments) {
            let named = |(name, bytes)| (format!("{arguments}: {name}"), bytes);
            all.extend(files(&out).into_iter().map(named));
            continue;
        }
        let mut report = serde_json::from_str(&stdout).unwrap();
        without_times(&mut report);
        all.push((arguments.clone(), report.to_string().into_bytes()));
    }
    for out in chain.iter().filter_map(|arguments| out(arguments)) {
        if out.is_dir() { std::fs::remove_dir_all(out) } else { std::fs::remove_file(out) }.unwrap();
    }
    all
}

/// The files of a folder, or the one file.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_dir() {
        common::compress::files(path)
    } else {
        [(String::new(), std::fs::read(path).unwrap())].into()
    }
}

fn assert_same_bytes(dir: &Path, chain: &[String], threads: &[&str]) {
    let first = results(dir, chain, threads[0]);
    for more in &threads[1..] {
        let other = results(dir, chain, more);
        assert_eq!(first.len(), other.len());
        for ((name, a), (_, b)) in first.iter().zip(&other) {
            assert!(a == b, "{name} with {} and with {more} threads", threads[0]);
        }
    }
}

#[test]
fn every_command_gives_the_same_bytes_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    // Large enough for factorisations in f32 and for products that are cut into parts.
    let sizes = generate::Sizes { layers: 2, hidden: 384, width: 512, experts: 3 };
    generate::mixtral(&dir.path().join("model"), &sizes);
    generate::tokens(&dir.path().join("tokens"), 8, 64, 512);
    let chain = [
        "calibrate model --tokens tokens --moments input,hidden --device cpu --out stats",
        "plan --method reap --remove 0.3 --stats stats --out prune",
        "plan --method low-rank --remove 0.5 --stats stats --model model --set allocate=spectrum --out whitened",
        "plan --method low-rank --remove 0.5 --model model --set whiten=false --out plain",
        "compress model --plan prune --device cpu --out pruned",
        "compress model --plan whitened --stats stats --device cpu --out narrow",
        "compress model --plan plain --device cpu --out thin",
        "run narrow --tokens tokens --device cpu --out logits",
        "eval thin --tokens tokens --against model --device cpu --json",
    ];
    assert_same_bytes(dir.path(), &chain.map(String::from), &["1", "2", "8"]);
}

/// Every kind of method on a small trained model, what searches and trains among them; also twice with the same number of
/// threads.
#[test]
fn every_method_gives_the_same_bytes_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/model");
    std::fs::create_dir(dir.path().join("model")).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let file = entry.unwrap();
        std::fs::copy(file.path(), dir.path().join("model").join(file.file_name())).unwrap();
    }
    generate::tokens(&dir.path().join("tokens"), 6, 32, 2048);
    generate::tokens(&dir.path().join("fewer"), 3, 32, 2048);
    let mut chain = vec![
        "calibrate model --tokens tokens --moments input,hidden,gate-hidden --device cpu --out stats"
            .to_string(),
        "calibrate model --tokens tokens --device cpu --out many".into(),
        "calibrate model --tokens fewer --device cpu --out few".into(),
        "merge many few --out sum".into(),
    ];
    for (out, plan) in [
        ("m-smoe", "m-smoe --remove 0.4"),
        ("mc-smoe", "mc-smoe --remove 0.4 --set rank=8"),
        ("hc-smoe", "hc-smoe --remove 0.4 --set align=true"),
        ("ream", "ream --remove 0.4 --set propagate=true"),
        ("mone", "mone --remove 0.3"),
        ("camera", "camera --remove 0.3 --set refit=anchored"),
        ("modegpt", "modegpt --remove 0.3"),
        ("d2-moe", "d2-moe --remove 0.5 --set base=gram"),
    ] {
        chain.push(format!("plan --stats stats --method {plan} --out {out}.json"));
        chain.push(format!(
            "compress model --plan {out}.json --stats stats --tokens tokens --device cpu --out {out}"
        ));
    }
    for (out, plan) in [
        ("naee", "naee --remove 0.25 --set progressive=true enumerate=1 swaps=3"),
        ("moe-i2", "moe-i2 --remove 0.4 --set enumerate=1 population=6 generations=3"),
    ] {
        chain.push(format!(
            "plan --method {plan} --model model --tokens tokens --device cpu --out {out}.json"
        ));
        chain.push(format!("compress model --plan {out}.json --device cpu --out {out}"));
    }
    for (out, recover) in [
        ("least-squares", "d2-moe --steps 0"),
        ("adam", "moe-i2 --steps 4 --batch 64"),
        ("losparse", "m-smoe --steps 4 --batch 64 --losparse 8:0.2"),
    ] {
        chain.push(format!("recover model {recover} --tokens tokens --device cpu --out {out}"));
    }
    for arguments in [
        "compare model --tokens tokens --eval-tokens fewer --methods reap,m-smoe,low-rank,camera,d2-moe --json",
        "generate losparse --prompt light --max-tokens 12 --temperature 0.9 --top-p 0.9 --seed 5 --json",
        "eval camera --tokens tokens --against model --json",
    ] {
        chain.push(format!("{arguments} --device cpu"));
    }
    chain.push("run ream --tokens tokens --trace --device cpu --out logits".into());
    assert_same_bytes(dir.path(), &chain, &["1", "2", "8", "2"]);
}
