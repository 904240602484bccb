//! Calibrating and compressing, killed at random moments and started again: the same bytes as a run left alone.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::generate;

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
    // Fractions of a whole run that repeat for no multiple, so that every part of it is hit.
    for attempt in 0..200u32 {
        let mut child = moepress(arguments, dir).spawn().unwrap();
        let share = 0.05 + f64::from(attempt.wrapping_mul(2_654_435_761) >> 16) / f64::from(u16::MAX) * 0.9;
        let deadline = Instant::now() + whole.mul_f64(share * 0.6);
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

#[test]
fn killed_runs_end_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    generate::mixtral(&at("model"), &generate::Sizes { layers: 12, ..generate::Sizes::default() });
    generate::tokens(&at("tokens"), 16, 128, 512);
    let calibrate = |out: &'static str| {
        [
            "calibrate",
            "model",
            "--tokens",
            "tokens",
            "--moments",
            "input,hidden",
            "--device",
            "cpu",
            "--out",
            out,
        ]
    };
    let whole = succeed(&calibrate("once"), dir.path());
    let mut kills = kill_until_done(&calibrate("again"), dir.path(), whole);
    assert!(files(&at("once")) == files(&at("again")));

    let plan = ["plan", "--method", "low-rank", "--remove", "0.4", "--stats", "once", "--out", "plan.json"];
    succeed(&[&plan[..], &["--set", "propagate=true"]].concat(), dir.path());
    let compress = |out: &'static str| {
        ["compress", "model", "--plan", "plan.json", "--tokens", "tokens", "--device", "cpu", "--out", out]
    };
    let whole = succeed(&compress("small"), dir.path());
    kills += kill_until_done(&compress("small again"), dir.path(), whole);
    assert!(files(&at("small")) == files(&at("small again")));
    assert!(kills > 0, "nothing was ever killed");
    // Nothing is left behind.
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 7, "{left:?}");
}
