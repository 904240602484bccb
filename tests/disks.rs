//! Disks that are full or may only be read, and files that are none: one line that names the file, and nothing half
//! written.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::command::{Outcome, command, outcome};
use common::generate;

/// A file system in memory of its own, gone with the value.
struct Disk(PathBuf);

impl Disk {
    /// `None`, with a line on standard error, where this process may not mount one.
    fn mount(at: &Path, kib: usize) -> Option<Disk> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={kib}k");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at);
        if mount.output().is_ok_and(|o| o.status.success()) {
            return Some(Disk(at.into()));
        }
        eprintln!("skipped: this process may not mount file systems");
        None
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A folder with a model, tokens, statistics, plans and a compressed model.
fn desk() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let sizes = generate::Sizes { layers: 3, hidden: 64, width: 64, experts: 4 };
    generate::mixtral(&dir.path().join("model"), &sizes);
    generate::tokens(&dir.path().join("tokens"), 4, 32, 512);
    generate::tokens(&dir.path().join("few"), 2, 32, 512);
    for arguments in [
        "calibrate model --tokens tokens --out stats",
        "calibrate model --tokens few --out fewer",
        "plan --method low-rank --remove 0.4 --stats stats --out low_rank",
        "plan --method reap --remove 0.4 --stats stats --out reap",
        "compress model --plan reap --out pruned",
    ] {
        run(dir.path(), arguments).ok();
    }
    // Copied with every compression.
    std::fs::write(dir.path().join("model/LICENSE"), "x".repeat(10_000)).unwrap();
    dir
}

/// `arguments`, separated by spaces, run quietly in `dir`.
fn run(dir: &Path, arguments: &str) -> Outcome {
    let mut command = command(arguments.split(' '));
    command.arg("--quiet").current_dir(dir);
    outcome(command)
}

/// Every command that writes, without its `--out`.
const WRITERS: [&str; 7] = [
    "calibrate model --tokens tokens --moments input,hidden",
    "run model --tokens tokens --trace",
    "merge stats fewer",
    "plan --method reap --remove 0.4 --stats stats",
    "plan --method naee --remove 0.3 --model model --tokens tokens",
    "compress model --plan low_rank --tokens tokens",
    "recover model pruned --tokens tokens --steps 1",
];

fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_dir() {
        return common::compress::files(path);
    }
    [(String::new(), std::fs::read(path).unwrap())].into()
}

#[test]
fn a_disk_that_is_full_at_any_point() {
    let dir = desk();
    let at = dir.path().join("disk");
    for arguments in WRITERS {
        run(dir.path(), &format!("{arguments} --out whole")).ok();
        let whole = dir.path().join("whole");
        let expected = files(&whole);
        if whole.is_dir() { std::fs::remove_dir_all(whole) } else { std::fs::remove_file(whole) }.unwrap();
        let (mut kib, mut failures) = (4, 0);
        loop {
            let Some(disk) = Disk::mount(&at, kib) else { return };
            let to_disk = || run(dir.path(), &format!("{arguments} --out disk/out"));
            let first = to_disk();
            if first.status == 0 {
                break;
            }
            let message = first.error(1);
            assert!(
                message.contains("disk/out") && message.contains("No space left"),
                "{arguments}: {message}"
            );
            assert!(!at.join("out").exists(), "{arguments} with {kib} KiB");
            let left: Vec<_> = std::fs::read_dir(&at).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(left.iter().all(|name| name == "out.partial"), "{arguments} with {kib} KiB: {left:?}");
            disk.remount("size=64m");
            to_disk().ok();
            assert!(files(&at.join("out")) == expected, "{arguments} after {kib} KiB");
            assert_eq!(std::fs::read_dir(&at).unwrap().count(), 1, "{arguments} after {kib} KiB");
            failures += 1;
            kib += kib / 2;
        }
        assert!(failures > 0 || arguments.starts_with("plan"), "{arguments}: the disk was never full");
    }
}

#[test]
fn folders_that_may_only_be_read() {
    let dir = desk();
    let at = dir.path().join("disk");
    let Some(disk) = Disk::mount(&at, 65536) else { return };
    for name in ["model", "pruned", "tokens", "few", "stats", "fewer", "low_rank", "reap"] {
        let copied = Command::new("cp").arg("-r").arg(dir.path().join(name)).arg(&at).status().unwrap();
        assert!(copied.success());
    }
    disk.remount("ro");
    for arguments in WRITERS {
        let message = run(&at, &format!("{arguments} --out out")).error(1);
        assert!(
            message.contains("out") && message.contains("Read-only file system"),
            "{arguments}: {message}"
        );
        // What is read need not be writable.
        run(&at, &format!("{arguments} --out ../out")).ok();
        let out = dir.path().join("out");
        if out.is_dir() { std::fs::remove_dir_all(out) } else { std::fs::remove_file(out) }.unwrap();
    }
}

#[test]
fn output_that_cannot_be_printed() {
    let dir = desk();
    for arguments in ["inspect model", "eval model --tokens tokens --json", "methods", "--help"] {
        let mut command = command(arguments.split(' '));
        command
            .current_dir(dir.path())
            .stdout(std::fs::File::options().write(true).open("/dev/full").unwrap());
        let printed = command.output().unwrap();
        let message = String::from_utf8(printed.stderr).unwrap();
        assert_eq!(printed.status.code(), Some(1), "{arguments}");
        let last = message.lines().last().unwrap();
        assert!(last.starts_with("error: standard output: No space left"), "{arguments}: {message}");
    }
}

/// Reading a pipe or a device may never end, and could fill the memory.
#[test]
fn pipes_and_devices_are_not_read() {
    let dir = desk();
    let trained = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/model");
    std::os::unix::fs::symlink(trained, dir.path().join("trained")).unwrap();
    let pipe = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    };
    pipe("pipe");
    pipe("adapter/adapter_config.json");
    for (arguments, named) in [
        ("calibrate trained --text pipe --out out", "pipe"),
        ("calibrate trained --text /dev/zero --out out", "/dev/zero"),
        ("eval trained --tokens pipe", "pipe"),
        ("eval trained --multiple-choice /dev/zero", "/dev/zero"),
        ("generate trained --prompt-file pipe", "pipe"),
        ("generate trained --prompt-file /dev/zero", "/dev/zero"),
        ("plan --method reap --remove 0.4 --stats pipe --out out", "pipe"),
        ("compress model --plan pipe --out out", "pipe"),
        ("compress model --plan /dev/zero --out out", "/dev/zero"),
        ("recover model --lora adapter --out out", "adapter/adapter_config.json"),
        ("merge pipe stats --out out", "pipe"),
    ] {
        let mut limited = Command::new("timeout");
        limited.args([
            "20",
            "sh",
            "-c",
            "ulimit -v 4000000; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_moepress"),
        ]);
        limited.args(arguments.split(' ')).arg("--quiet").current_dir(dir.path());
        let message = outcome(limited).error(1);
        let expected = format!("{named}: is a pipe or a device, expected a file");
        assert!(message.starts_with(&expected), "{arguments}: {message}");
    }
    let mut endless = command(["generate", "trained", "--quiet", "--prompt-file", "-"]);
    endless.current_dir(dir.path()).stdin(std::fs::File::open("/dev/zero").unwrap());
    let message = outcome(endless).error(1);
    assert_eq!(message, "standard input: more than 67108864 bytes are no prompt");
}

/// Ctrl-C and the like end a command at once, and what it had half written is gone.
#[test]
fn interrupted_commands_leave_no_half_of_a_file() {
    use std::os::unix::process::ExitStatusExt;

    let dir = desk();
    generate::tokens(&dir.path().join("many"), 512, 256, 512);
    for (signal, number) in [("INT", 2), ("TERM", 15)] {
        // What a shell starts in the background ignores SIGINT, and so would the command.
        let mut run = Command::new("env");
        run.arg(format!("--default-signal={signal}")).arg(env!("CARGO_BIN_EXE_moepress"));
        run.args(["run", "model", "--tokens", "many", "--device", "cpu", "--out", "logits", "--quiet"]);
        let mut child = run.current_dir(dir.path()).spawn().unwrap();
        while !dir.path().join("logits.incomplete").exists() {
            assert!(child.try_wait().unwrap().is_none(), "ended before it was interrupted");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        let kill = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        assert_eq!(child.wait().unwrap().signal(), Some(number));
        let left = |name: &str| dir.path().join(name).exists();
        assert!(!left("logits") && !left("logits.incomplete"), "{signal}");
    }
}
