//! Files that change while they are read, disks that are full, and checkpoints with very many tensors.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::command::{command, outcome};
use common::{Mutant, generate};
use moepress::architecture::Architecture;
use moepress::checkpoint::{Checkpoint, Entry, Tensor, write_safetensors};
use moepress::model::LayerSource;

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
    let run = |threads: &str| {
        let mut all = Vec::new();
        for arguments in chain {
            let mut command = quietly(dir.path(), arguments);
            command.env("RAYON_NUM_THREADS", threads);
            let stdout = outcome(command).ok();
            let Some((_, out)) = arguments.split_once("--out ") else {
                // Times differ.
                let mut report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
                let fields = report.as_object_mut().unwrap();
                fields.retain(|key, _| !key.contains("second") && !key.contains("speed"));
                all.push((arguments.to_string(), report.to_string().into_bytes()));
                continue;
            };
            let out = dir.path().join(out);
            let files = if out.is_dir() {
                std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().path()).collect()
            } else {
                vec![out.clone()]
            };
            let mut contents: Vec<_> =
                files.into_iter().map(|p| (p.display().to_string(), std::fs::read(p).unwrap())).collect();
            contents.sort();
            all.extend(contents);
        }
        all
    };
    let runs = ["1", "2", "8"].map(|threads| {
        for out in ["stats", "prune", "whitened", "plain", "pruned", "narrow", "thin", "logits"] {
            let path = dir.path().join(out);
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.ok();
        }
        run(threads)
    });
    for other in &runs[1..] {
        for ((name, a), (_, b)) in runs[0].iter().zip(other) {
            assert!(a == b, "{name}");
        }
    }
}
