//! Commands that are killed at random moments and started again: the same bytes as a run left alone, and nothing of
//! another model.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::command::{command, outcome};
use common::compress::{plan, tokens};
use common::{data, generate};
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as CalibrateOptions, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{Options, compress};
use moepress::model::Model;
use moepress::plan::Budget;
use moepress::progress::Progress;

fn moepress(arguments: &[&str], dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moepress"));
    command.args(arguments).arg("--quiet").current_dir(dir).stdout(Stdio::null());
    command
}

fn succeed(arguments: &[&str], dir: &Path) -> Duration {
    let start = Instant::now();
    assert!(moepress(arguments, dir).status().unwrap().success(), "{arguments:?}");
    start.elapsed()
}

/// Starts the command again and again, killing it after a while that grows, until it succeeds. Returns the kills.
fn kill_until_done(arguments: &[&str], dir: &Path, whole: Duration) -> usize {
    // Fractions of a whole run that repeat for no multiple, so that every part of it is hit. They grow, for a short run
    // may spend most of its time before the first layer.
    for attempt in 0..200u32 {
        let mut child = moepress(arguments, dir).spawn().unwrap();
        let share = 0.05 + f64::from(attempt.wrapping_mul(2_654_435_761) >> 16) / f64::from(u16::MAX) * 0.9;
        let deadline = Instant::now() + whole.mul_f64(share * (0.6 + f64::from(attempt) / 40.0));
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{arguments:?} failed after {attempt} kills");
                return attempt as usize;
            }
            if Instant::now() >= deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    panic!("{arguments:?} made no progress");
}

fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_file() {
        return BTreeMap::from([(String::new(), std::fs::read(path).unwrap())]);
    }
    let entries = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(p).unwrap()))
        .collect()
}

/// A model of six layers with tokens, statistics and the small checkpoint `pruned`, all made by commands that succeed.
fn desk(experts: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let sizes = generate::Sizes { layers: 6, hidden: 64, width: 64, experts };
    generate::mixtral(&dir.path().join("model"), &sizes);
    generate::tokens(&dir.path().join("tokens"), 16, 64, 512);
    for arguments in [
        "calibrate model --tokens tokens --out stats",
        "plan --method reap --remove 0.3 --stats stats --out reap",
        "compress model --plan reap --out pruned",
    ] {
        succeed(&words(arguments), dir.path());
    }
    dir
}

fn words(arguments: &str) -> Vec<&str> {
    arguments.split(' ').collect()
}

/// Nothing but files that were asked for.
fn assert_tidy(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.ends_with(".partial") && !name.ends_with(".incomplete"), "{name} was left");
    }
}

#[test]
fn killed_runs_end_with_the_same_bytes() {
    let dir = desk(6);
    let plans = [
        "low-rank --remove 0.4 --set propagate=true",
        "low-rank --remove 0.3 --set allocate=spectrum --model model",
        "ream --remove 0.4 --set propagate=true",
        "m-smoe --remove 0.4",
        "modegpt --remove 0.3",
        "d2-moe --remove 0.4",
        "mone --remove 0.3 --set propagate=true",
    ];
    let mut commands = vec![
        "calibrate model --tokens tokens --moments input,hidden".to_string(),
        "plan --method naee --model model --tokens tokens --remove 0.3".into(),
        "plan --method naee --model model --tokens tokens --remove 0.3 --set progressive=true enumerate=1".into(),
        "plan --method moe-i2 --model model --tokens tokens --remove 0.4 --set enumerate=1 population=8 generations=5".into(),
        "recover model pruned --tokens tokens --steps 5".into(),
    ];
    for (i, plan) in plans.iter().enumerate() {
        succeed(&words(&format!("plan --stats stats --method {plan} --out plan{i}")), dir.path());
        commands.push(format!("compress model --plan plan{i} --tokens tokens --stats stats"));
    }
    let mut kills = 0;
    for command in &commands {
        let to = |out: &str| format!("{command} --device cpu --out {out}");
        let whole = succeed(&words(&to("once")), dir.path());
        kills += kill_until_done(&words(&to("again")), dir.path(), whole);
        let (once, again) = (dir.path().join("once"), dir.path().join("again"));
        assert!(files(&once) == files(&again), "{command}");
        assert_tidy(dir.path());
        for out in [once, again] {
            if out.is_dir() { std::fs::remove_dir_all(out) } else { std::fs::remove_file(out) }.unwrap();
        }
    }
    assert!(kills >= commands.len(), "only {kills} kills");
}

#[test]
fn killed_upcycling_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dense = [0, 1, 2].map(|e| data(&format!("dense/llama_{e}")).display().to_string());
    let to = |out: &'static str| {
        ["upcycle", "bam"].into_iter().chain(dense.iter().map(|d| &**d)).chain(["--out", out])
    };
    let whole = succeed(&to("once").collect::<Vec<_>>(), dir.path());
    kill_until_done(&to("again").collect::<Vec<_>>(), dir.path(), whole);
    assert!(files(&dir.path().join("once")) == files(&dir.path().join("again")));
    assert_tidy(dir.path());
}

/// Commands that begin anew leave no half of a result when they are killed, and what they do leave is in nobody's way.
#[test]
fn killed_commands_leave_no_half_of_a_file() {
    let dir = desk(4);
    generate::tokens(&dir.path().join("few"), 8, 64, 512);
    succeed(&words("calibrate model --tokens few --out fewer"), dir.path());
    for (out, arguments) in [
        ("logits", "run model --tokens tokens --trace --device cpu --out logits"),
        ("sum", "merge stats fewer --out sum"),
        (
            "plan",
            "plan --method low-rank --remove 0.4 --set allocate=spectrum --stats stats --model model --out plan",
        ),
        (
            "plot",
            "compare model --tokens tokens --eval-tokens tokens --methods reap,m-smoe --device cpu --plot plot",
        ),
    ] {
        let path = dir.path().join(out);
        let whole = succeed(&words(arguments), dir.path());
        // Bytes of a plot contain no times, but nothing else of it is promised.
        let expected = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for share in [0.2, 0.4, 0.6, 0.8, 0.9] {
            let mut child = moepress(&words(arguments), dir.path()).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(share));
            child.kill().unwrap();
            child.wait().unwrap();
            if path.exists() {
                assert!(std::fs::read(&path).unwrap() == expected, "{arguments}");
                std::fs::remove_file(&path).unwrap();
            }
        }
        succeed(&words(arguments), dir.path());
        assert!(std::fs::read(&path).unwrap() == expected, "{arguments}");
        assert_tidy(dir.path());
    }
}

/// Stops after some layers by panicking, as close to a kill as one process gets, and hears warnings.
#[derive(Default)]
struct Stop {
    after: usize,
    warnings: Vec<String>,
}

impl Progress for Stop {
    fn step(&mut self, _: &str) {
        assert!(self.after > 0, "stopped");
        self.after -= 1;
    }

    fn warn(&mut self, message: &str) {
        self.warnings.push(message.into());
    }
}

/// Finished layers of a model that has been changed since are not used: neither where the file's time says so, nor where
/// it was set back.
#[test]
fn layers_of_a_changed_model_are_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let windows = tokens();
    let model = at("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(data("mixtral").join(file), model.join(file)).unwrap();
    }
    let weights = model.join("model.safetensors");
    let original = std::fs::read(&weights).unwrap();
    let mut changed = original.clone();
    // The sign of a weight in the middle.
    let middle = original.len() / 8 * 4 + 3;
    changed[middle] ^= 0x80;
    let plan = plan(&model, "low-rank", Some(Budget::Remove(0.4)), &[("propagate", "true")]);
    let work = |kind: &str, out: &Path, progress: &mut Stop| -> Result<(), String> {
        let checkpoint = Checkpoint::open(&model).unwrap();
        let model = Model::new(&checkpoint, &Cpu, 24).unwrap();
        if kind == "calibrate" {
            let done = calibrate(&model, &windows, &CalibrateOptions::default(), out, progress);
            return done.map(|_| ()).map_err(|e| e.to_string());
        }
        // Of the changed checkpoint, which is another model to a plan.
        let mut plan = plan.clone();
        plan.model.identity = checkpoint.identity();
        let options = Options { tokens: Some(&windows), ..Options::default() };
        compress(&model, &plan, &options, out, progress).map(|_| ()).map_err(|e| e.to_string())
    };
    let begin = |kind: &str, out: &Path| {
        let run = || work(kind, out, &mut Stop { after: 1, ..Stop::default() });
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert!(!out.exists());
    };
    let plenty = || Stop { after: 1000, ..Stop::default() };
    for kind in ["calibrate", "compress"] {
        std::fs::write(&weights, &changed).unwrap();
        let expected = at(&format!("{kind} at once"));
        work(kind, &expected, &mut plenty()).unwrap();
        for (case, set_back) in [("newer", false), ("set back", true)] {
            let out = at(&format!("{kind} {case}"));
            std::fs::write(&weights, &original).unwrap();
            let time = std::fs::metadata(&weights).unwrap().modified().unwrap();
            begin(kind, &out);
            std::fs::write(&weights, &changed).unwrap();
            let file = std::fs::File::options().append(true).open(&weights).unwrap();
            file.set_modified(if set_back { time } else { time + Duration::from_secs(1) }).unwrap();
            let mut heard = plenty();
            work(kind, &out, &mut heard).unwrap();
            assert!(files(&out) == files(&expected), "{kind}, {case}");
            let [warning] = heard.warnings.try_into().unwrap();
            assert!(warning.contains(".partial: ") && warning.ends_with("; starting afresh"), "{warning}");
        }
        // The same bytes at another time might be others where nobody looked.
        let out = at(&format!("{kind} touched"));
        begin(kind, &out);
        let file = std::fs::File::options().append(true).open(&weights).unwrap();
        file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
        let mut heard = plenty();
        work(kind, &out, &mut heard).unwrap();
        assert!(files(&out) == files(&expected), "{kind}, touched");
        let [warning] = heard.warnings.try_into().unwrap();
        let said = "model.safetensors is not as it was when this was begun; starting afresh";
        assert!(warning.ends_with(said), "{warning}");
    }
    assert_tidy(dir.path());
}

/// What was made of a file that has been changed since is not "done".
#[test]
fn a_result_older_than_its_model_is_not_taken_for_done() {
    let dir = desk(4);
    let again = ["compress", "model", "--plan", "reap", "--out", "pruned"];
    succeed(&again, dir.path());
    let weights = dir.path().join("model/model.safetensors");
    let file = std::fs::File::options().append(true).open(weights).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
    let mut command = command(again);
    command.arg("--quiet").current_dir(dir.path());
    let message = outcome(command).error(1);
    assert_eq!(message, "pruned: exists already; remove it or choose another --out");
}
