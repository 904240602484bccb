//! What the compiler made of the kernels, without a GPU: every architecture has every kernel, none spills registers, and
//! kernels use the instructions that they were written for. Skipped, saying so, in builds without nvcc;
//! `MOEPRESS_REQUIRE_CUDA=1` makes that a failure.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use moepress::backend::cuda::kernel_names;

/// What the build script left: fat binaries and the messages of ptxas.
const OUT_DIR: &str = env!("OUT_DIR");

/// nvcc, if the crate was built with it.
fn nvcc() -> Option<PathBuf> {
    let path = std::fs::read_to_string(Path::new(OUT_DIR).join("nvcc")).unwrap();
    if path.is_empty() {
        skipped("built without nvcc");
    }
    (!path.is_empty()).then(|| path.into())
}

fn skipped(why: &str) {
    assert!(
        !std::env::var("MOEPRESS_REQUIRE_CUDA").is_ok_and(|v| v == "1"),
        "MOEPRESS_REQUIRE_CUDA=1: {why}"
    );
    eprintln!("skipped: {why}");
}

/// The files of one kind that belong to a source that still exists.
fn built(extension: &str) -> Vec<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let files = std::fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    let stem = |path: PathBuf| path.file_stem().unwrap().to_owned();
    sources.map(|path| Path::new(OUT_DIR).join(stem(path)).with_extension(extension)).collect()
}

/// What ptxas said about one kernel on one architecture.
#[derive(Debug, Default)]
struct Usage {
    registers: u32,
    /// Stack frame, spill stores, spill loads, in bytes.
    spilled: Vec<u32>,
}

/// By architecture and kernel.
fn usage(log: &str) -> BTreeMap<(String, String), Usage> {
    let mut found: BTreeMap<_, Usage> = BTreeMap::new();
    let mut current = None;
    let numbers = |line: &str| -> Vec<u32> {
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
    };
    for line in log.lines() {
        let mut quoted = line.split('\'').skip(1).step_by(2);
        if line.contains("Compiling entry function") {
            let (kernel, architecture) = (quoted.next().unwrap(), quoted.next().unwrap());
            current = Some((architecture.to_owned(), kernel.to_owned()));
        } else if let Some(key) = &current {
            let usage = found.entry(key.clone()).or_default();
            if line.contains("spill stores") {
                usage.spilled = numbers(line);
            } else if line.contains("registers") {
                usage.registers = numbers(line)[0];
            }
        }
    }
    found
}

/// The architectures that machine code was asked for, `sm_80` and so on; no fewer than six but in development.
fn architectures() -> BTreeSet<String> {
    let asked = std::fs::read_to_string(Path::new(OUT_DIR).join("architectures")).unwrap();
    let found = asked.split(',').filter(|a| !a.starts_with('+')).map(|a| format!("sm_{a}")).collect();
    if option_env!("MOEPRESS_CUDA_ARCHES").is_none() {
        let all = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"].map(str::to_owned);
        assert_eq!(found, BTreeSet::from(all));
    }
    found
}

#[test]
fn nothing_spills() {
    if nvcc().is_none() {
        return;
    }
    let mut kernels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in built("ptxas") {
        let log = std::fs::read_to_string(&file).unwrap();
        assert!(!log.contains("warning"), "{log}");
        for ((architecture, kernel), usage) in usage(&log) {
            assert_eq!(
                usage.spilled,
                [0, 0, 0],
                "{kernel} on {architecture}: stack, spill stores, spill loads"
            );
            assert!(usage.registers > 0, "{kernel} on {architecture}: {usage:?}");
            // So that the grids of the layer are resident at once: two blocks of 256 threads, or of 128.
            if kernel.contains("_t") && !kernel.starts_with("moe_hidden_t128") {
                let most = if kernel.contains("_t128") { 255 } else { 128 };
                assert!(usage.registers <= most, "{kernel} on {architecture}: {usage:?}");
            }
            kernels.entry(architecture).or_default().insert(kernel);
        }
    }
    for architecture in architectures() {
        let found = kernels.remove(&architecture).unwrap_or_default();
        let missing: Vec<_> = kernel_names().filter(|name| !found.contains(*name)).collect();
        assert!(missing.is_empty(), "{architecture} lacks {missing:?}");
    }
}

/// In the GEMMs, tensor cores fed by matrix loads from shared memory, and asynchronous copies into it; in all kernels, from
/// compute capability 9.0 on, one wait for the kernel before and one leave for the next.
#[test]
fn kernels_use_their_instructions() {
    let Some(nvcc) = nvcc() else { return };
    let beside = nvcc.with_file_name("cuobjdump");
    let cuobjdump = if beside.exists() { beside } else { "cuobjdump".into() };
    let mut checked: BTreeMap<String, u32> = BTreeMap::new();
    for file in built("fatbin") {
        let Ok(output) = Command::new(&cuobjdump).arg("-sass").arg(&file).output() else {
            return skipped("no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)");
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (mut architecture, mut kernel) = (String::new(), String::new());
        let mut counts: BTreeMap<(String, String), [u32; 6]> = BTreeMap::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some(name) = line.strip_prefix("arch = ") {
                name.clone_into(&mut architecture);
            } else if let Some((_, name)) = line.split_once("Function : ") {
                name.clone_into(&mut kernel);
            } else if let Some(i) = ["HMMA.", "LDSM.", "LDGSTS.", "FFMA", "ACQBULK", "PREEXIT"]
                .iter()
                .position(|i| line.contains(i))
            {
                counts.entry((architecture.clone(), kernel.clone())).or_default()[i] += 1;
            }
        }
        for ((architecture, kernel), [tensor, matrix_loads, copies, fused, waits, leaves]) in counts {
            let expected = if architecture.starts_with("sm_8") { [0, 0] } else { [1, 1] };
            assert_eq!([waits, leaves], expected, "{kernel} on {architecture}");
            *checked.entry(architecture.clone()).or_default() += u32::from(kernel.contains("_t"));
            if !kernel.contains("_t") && !kernel.contains("_many_") {
                continue;
            }
            let uses = if kernel.ends_with("_f32") {
                fused > 0
            } else {
                tensor > 0 && matrix_loads > 0 && copies > 0
            };
            let counts = format!("{tensor} HMMA, {matrix_loads} LDSM, {copies} LDGSTS, {fused} FFMA");
            assert!(uses, "{kernel} on {architecture}: {counts}");
        }
    }
    let gemms = kernel_names().filter(|name| name.contains("_t")).count() as u32;
    assert_eq!(checked, architectures().into_iter().map(|a| (a, gemms)).collect());
}
