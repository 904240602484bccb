//! Calibrating needs memory for the residual stream and one layer, however many layers there are; running a model none for
//! its results.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::generate;

/// Largest resident set of `command`, on `model` and `tokens`, in KiB, as the kernel counts it. The result goes to `out`.
fn peak(dir: &Path, command: &str, model: &str, out: &str) -> u64 {
    let mut child = Command::new(env!("CARGO_BIN_EXE_moepress"))
        .args([command, model, "--tokens", "tokens", "--device", "cpu", "--out", out])
        .current_dir(dir)
        .env("RAYON_NUM_THREADS", "2")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        // The high-water mark only grows, so the last reading before the end is the peak.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        peak = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(peak).max(peak);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    peak
}

#[test]
fn peak_memory_does_not_grow_with_the_layers() {
    let dir = tempfile::tempdir().unwrap();
    generate::tokens(&dir.path().join("tokens"), 8, 128, 512);
    let measure = |layers: usize| {
        let name = format!("{layers} layers");
        let sizes = generate::Sizes { layers, hidden: 256, width: 512, experts: 8 };
        generate::mixtral(&dir.path().join(&name), &sizes);
        peak(dir.path(), "calibrate", &name, &format!("{name} statistics"))
    };
    let (few, many) = (measure(6), measure(48));
    assert!(few > 0 && many as f64 <= 1.15 * few as f64, "6 layers need {few} KiB, 48 layers {many} KiB");
}

#[test]
fn logits_are_not_kept_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    generate::tokens(&dir.path().join("tokens"), 512, 256, 512);
    let sizes = generate::Sizes { layers: 1, hidden: 32, width: 32, experts: 4 };
    generate::mixtral(&dir.path().join("model"), &sizes);
    let peak = peak(dir.path(), "run", "model", "logits");
    let bytes = std::fs::metadata(dir.path().join("logits")).unwrap().len();
    assert!(peak > 0 && 3 * peak * 1024 < bytes, "{bytes} bytes of logits need {peak} KiB");
}
