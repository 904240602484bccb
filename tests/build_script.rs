//! build.rs with and without nvcc, which a shell script stands in for.

#![cfg(all(feature = "cuda", unix))]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A crate of two kernels, and the build script as a program.
struct Crate {
    folder: tempfile::TempDir,
}

impl Crate {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let this = Crate { folder };
        for name in ["cuda", "out", "bin"] {
            fs::create_dir(this.path(name)).unwrap();
        }
        for (name, text) in [("a.cu", "a"), ("b.cu", "bb"), ("c.cuh", "c")] {
            fs::write(this.path("cuda").join(name), text).unwrap();
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs");
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
        let mut compiler = Command::new(rustc);
        compiler.args(["--edition", "2024", "-o"]).arg(this.path("build")).arg(source);
        assert!(compiler.status().unwrap().success());
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A program that answers as nvcc of this release does, and appends what it compiles to the file `compiled`.
    fn install(&self, release: &str) {
        let compiled = self.path("compiled");
        let script = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = --version ]; then echo 'Cuda compilation tools, release {release}, V'; exit; fi\n\
             while [ $# -gt 2 ]; do shift; done\n\
             if grep -q broken \"$2\"; then echo 'x.cu(1): error: this is broken' >&2; exit 1; fi\n\
             echo \"$2\" >> {}\n\
             echo image > \"$1\"\n",
            compiled.display()
        );
        let program = self.path("bin").join("nvcc");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn build(&self, variables: &[(&str, &str)]) -> Output {
        let mut build = Command::new(self.path("build"));
        build.current_dir(self.folder.path()).env_clear().env("CARGO_FEATURE_CUDA", "1");
        build.env("OUT_DIR", self.path("out")).env("NUM_JOBS", "2");
        let path = format!("{}:/usr/bin:/bin", self.path("bin").display());
        build.env("PATH", path).envs(variables.iter().copied()).output().unwrap()
    }

    /// What cargo would show; `error` if the build fails, `warning` else.
    #[track_caller]
    fn says(&self, kind: &str, variables: &[(&str, &str)]) -> String {
        let output = self.build(variables);
        assert_eq!(output.status.success(), kind == "warning", "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let shown = text.lines().filter_map(|line| line.strip_prefix(&format!("cargo::{kind}=")[..]));
        shown.collect::<Vec<_>>().join("\n")
    }

    /// Sources compiled since the last call.
    fn compiled(&self) -> Vec<String> {
        let file = self.path("compiled");
        let text = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(&file);
        let mut names: Vec<_> = text.lines().map(str::to_owned).collect();
        names.sort();
        names
    }
}

#[test]
fn without_nvcc() {
    let here = Crate::new();
    if Command::new("/usr/bin/nvcc").arg("--version").output().is_ok()
        || Path::new("/usr/local/cuda/bin/nvcc").exists()
    {
        eprintln!("skipped: this machine has an nvcc that cannot be hidden");
        return;
    }
    let warning = here.says("warning", &[]);
    assert!(
        warning.starts_with("no nvcc: built without CUDA kernels") && !warning.contains('\n'),
        "{warning}"
    );
    let images = fs::read_to_string(here.path("out").join("images.rs")).unwrap();
    assert!(images.contains("IMAGES: &[Image] = &[\n];"), "{images}");
    let error = here.says("error", &[("MOEPRESS_REQUIRE_CUDA", "1")]);
    assert!(error.starts_with("MOEPRESS_REQUIRE_CUDA=1 and no nvcc: pip install"), "{error}");
}

#[test]
fn with_nvcc() {
    let here = Crate::new();
    here.install("13.0");
    assert_eq!(here.says("warning", &[]), "");
    assert_eq!(here.compiled(), ["cuda/a.cu", "cuda/b.cu"]);
    let images = fs::read_to_string(here.path("out").join("images.rs")).unwrap();
    assert!(
        images.contains("a.fatbin") && images.contains("ARCHITECTURES: &str = \"80,86,89,90a,100,120,+80\"")
    );
    here.says("warning", &[]);
    assert_eq!(here.compiled(), [""; 0]);
    fs::write(here.path("cuda/a.cu"), "other").unwrap();
    here.says("warning", &[]);
    assert_eq!(here.compiled(), ["cuda/a.cu"]);
    fs::write(here.path("cuda/c.cuh"), "other").unwrap();
    here.says("warning", &[]);
    assert_eq!(here.compiled(), ["cuda/a.cu", "cuda/b.cu"]);
    here.says("warning", &[("MOEPRESS_CUDA_ARCHES", "80, +90a")]);
    assert_eq!(here.compiled(), ["cuda/a.cu", "cuda/b.cu"]);
}

#[test]
fn what_cannot_be_built() {
    let here = Crate::new();
    here.install("13.0");
    for wrong in ["", "80,", "sm_80", "90aa", "+"] {
        let error = here.says("error", &[("MOEPRESS_CUDA_ARCHES", wrong)]);
        assert!(
            error.starts_with("MOEPRESS_CUDA_ARCHES: ") && error.contains("is no architecture"),
            "{error}"
        );
    }
    fs::write(here.path("cuda/a.cu"), "broken").unwrap();
    let error = here.says("error", &[]);
    assert_eq!(error, "nvcc could not compile cuda/a.cu: x.cu(1): error: this is broken");
    here.install("11.8");
    let error = here.says("error", &[]);
    assert!(error.contains("is CUDA 11.8, older than 12.8: pip install"), "{error}");
}
