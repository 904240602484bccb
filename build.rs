//! Compiles the CUDA kernels: every `cuda/*.cu` becomes one fat binary that the library embeds.
//!
//! nvcc is looked for in `NVCC` (the program itself), `CUDA_HOME/bin`, `CUDA_PATH/bin`, every folder of `PATH`, the
//! PyPI packages of an active `VIRTUAL_ENV` or `CONDA_PREFIX`, `/usr/local/cuda/bin`, `/opt/cuda/bin`. The first that
//! runs is taken. Without one the crate builds all the same and has no kernels; `MOEPRESS_REQUIRE_CUDA=1` makes that an
//! error. `MOEPRESS_CUDA_ARCHES` lists what to compile for, `80,90a,+80`: machine code for sm_80 and sm_90a, and PTX
//! (`+`) that the driver of a later GPU translates.
//!
//! `OUT_DIR` holds for each source the fat binary, what ptxas said (`.ptxas`, read by the tests) and a key of all that
//! went into it (`.key`), so that only what changed is compiled again; and for the tests nvcc's path and the list.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

/// Machine code for the generations that the kernels are tuned for, and PTX of the oldest for all others.
const DEFAULT_ARCHITECTURES: &str = "80,86,89,90a,100,120,+80";

/// The first nvcc that knows all of them.
const OLDEST_NVCC: (u32, u32) = (12, 8);

const INSTALL: &str =
    "pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*' in an active virtual environment, or set NVCC";

/// What decides about nvcc. `PATH` too: else a build made without nvcc would stay without kernels after it was
/// installed.
const VARIABLES: [&str; 9] = [
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "NVCC_CCBIN",
    "MOEPRESS_CUDA_ARCHES",
    "MOEPRESS_REQUIRE_CUDA",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=cuda");
    for name in VARIABLES {
        println!("cargo::rerun-if-env-changed={name}");
    }
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let Some(nvcc) = Nvcc::find() else {
        if env::var("MOEPRESS_REQUIRE_CUDA").is_ok_and(|v| v == "1") {
            return Err(format!("MOEPRESS_REQUIRE_CUDA=1 and no nvcc: {INSTALL}"));
        }
        println!("cargo::warning=no nvcc: built without CUDA kernels, GPUs will not be used ({INSTALL})");
        write(&out.join("nvcc"), b"")?;
        return write(&out.join("images.rs"), table(&[], "").as_bytes());
    };
    if nvcc.version < OLDEST_NVCC {
        let ((major, minor), (least, than)) = (nvcc.version, OLDEST_NVCC);
        return Err(format!(
            "{} is CUDA {major}.{minor}, older than {least}.{than}: {INSTALL}",
            nvcc.program.display()
        ));
    }
    let architectures = env::var("MOEPRESS_CUDA_ARCHES").unwrap_or_else(|_| DEFAULT_ARCHITECTURES.into());
    let generated = code_generation(&architectures)?;
    let mut sources = files("cuda", "cu")?;
    // The longest first, so that none of them is left for the end.
    sources.sort_by_key(|source| std::cmp::Reverse(fs::metadata(source).map_or(0, |m| m.len())));
    let mut shared = DefaultHasher::new();
    (&nvcc.banner, &generated).hash(&mut shared);
    for header in files("cuda", "cuh")? {
        (&header, read(&header)?).hash(&mut shared);
    }
    compile_all(&nvcc, &generated, &sources, &shared, &out)?;
    // For the tests that look into the machine code with the tools beside nvcc.
    write(&out.join("nvcc"), nvcc.program.to_string_lossy().as_bytes())?;
    write(&out.join("architectures"), architectures.as_bytes())?;
    write(&out.join("images.rs"), table(&sources, &architectures).as_bytes())
}

/// The CUDA compiler.
struct Nvcc {
    program: PathBuf,
    version: (u32, u32),
    /// What `--version` prints.
    banner: String,
}

impl Nvcc {
    fn find() -> Option<Self> {
        let folder = |name: &str| env::var_os(name).map(PathBuf::from);
        let mut candidates: Vec<PathBuf> = folder("NVCC").into_iter().collect();
        let homes = [folder("CUDA_HOME"), folder("CUDA_PATH")].into_iter().flatten();
        candidates.extend(homes.map(|home| home.join("bin/nvcc")));
        let path = env::var_os("PATH").unwrap_or_default();
        candidates.extend(env::split_paths(&path).map(|folder| folder.join("nvcc")));
        for prefix in [folder("VIRTUAL_ENV"), folder("CONDA_PREFIX")].into_iter().flatten() {
            candidates.push(prefix.join("bin/nvcc"));
            candidates.extend(packaged(&prefix));
        }
        candidates.extend(["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"].map(PathBuf::from));
        candidates.into_iter().find_map(Self::try_program)
    }

    fn try_program(program: PathBuf) -> Option<Self> {
        let output = Command::new(&program).arg("--version").output().ok().filter(|o| o.status.success())?;
        let banner = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = banner.split("release ").nth(1)?.split(',').next()?;
        let (major, minor) = release.split_once('.')?;
        let version = (major.parse().ok()?, minor.parse().ok()?);
        Some(Nvcc { program, version, banner })
    }
}

/// `nvcc` of the PyPI packages in the environment `prefix`, newest first.
fn packaged(prefix: &Path) -> Vec<PathBuf> {
    let folders = |parent: PathBuf, start: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path());
        let named = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start));
        let mut found: Vec<_> = entries.filter(named).collect();
        found.sort();
        found.reverse();
        found
    };
    let pythons = folders(prefix.join("lib"), "python3");
    let toolkits = pythons.into_iter().flat_map(|p| folders(p.join("site-packages/nvidia"), "cu"));
    toolkits.map(|toolkit| toolkit.join("bin/nvcc")).collect()
}

/// nvcc's arguments for a list such as `80,90a,+80`.
fn code_generation(architectures: &str) -> Result<Vec<String>, String> {
    let one = |item: &str| {
        let item = item.trim();
        let number = item.strip_prefix('+').unwrap_or(item);
        let digits = number.trim_end_matches(['a', 'f']);
        if digits.is_empty() || digits.len() + 1 < number.len() || !digits.bytes().all(|b| b.is_ascii_digit())
        {
            return Err(format!(
                "MOEPRESS_CUDA_ARCHES: {item:?} is no architecture; expected something like {DEFAULT_ARCHITECTURES}"
            ));
        }
        let code = if item.starts_with('+') { "compute" } else { "sm" };
        Ok(format!("-gencode=arch=compute_{number},code={code}_{number}"))
    };
    architectures.split(',').map(one).collect()
}

/// Compiles what changed, up to `NUM_JOBS` files at a time.
fn compile_all(
    nvcc: &Nvcc,
    generated: &[String],
    sources: &[PathBuf],
    shared: &DefaultHasher,
    out: &Path,
) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    // With more jobs than files, nvcc compiles for several architectures at a time.
    let threads = (jobs / sources.len().max(1)).max(1);
    let queue = Mutex::new(sources.iter());
    let worker = || loop {
        let Some(source) = queue.lock().ok().and_then(|mut rest| rest.next()) else { return Ok(()) };
        let mut key = shared.clone();
        read(source)?.hash(&mut key);
        let key = format!("{:016x}", key.finish());
        let [image, log, stamp] =
            ["fatbin", "ptxas", "key"].map(|e| out.join(stem(source)).with_extension(e));
        if fs::read_to_string(&stamp).is_ok_and(|old| old == key) && image.exists() {
            continue;
        }
        compile(nvcc, generated, source, threads, &image, &log)?;
        write(&stamp, key.as_bytes())?;
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.clamp(1, sources.len().max(1))).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or_else(|_| Err("a compile job panicked".into())))
    })
}

fn compile(
    nvcc: &Nvcc,
    generated: &[String],
    source: &Path,
    threads: usize,
    image: &Path,
    log: &Path,
) -> Result<(), String> {
    let mut command = Command::new(&nvcc.program);
    command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-Icuda", "--compress-mode=size"]);
    command.args(["-Xptxas", "-v"]).args(["--threads", &threads.to_string()]);
    command.args(generated).arg("-o").args([image, source]);
    let said = command.output().map_err(|e| format!("{}: {e}", nvcc.program.display()))?;
    if !said.status.success() {
        eprint!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        let first = String::from_utf8_lossy(&said.stderr);
        let first =
            first.lines().find(|l| l.contains("error") || l.contains("fatal")).unwrap_or("no message");
        return Err(format!("nvcc could not compile {}: {first}", source.display()));
    }
    write(log, &said.stderr)
}

/// The Rust source of the table of fat binaries.
fn table(sources: &[PathBuf], architectures: &str) -> String {
    let entry = |source: &PathBuf| {
        let stem = stem(source);
        format!(
            "    Image {{ source: \"{stem}.cu\", bytes: &Aligned(*include_bytes!(\"{stem}.fatbin\")).0 }},\n"
        )
    };
    let entries: String = sources.iter().map(entry).collect();
    format!(
        "pub(super) static IMAGES: &[Image] = &[\n{entries}];\n\
         pub(super) static ARCHITECTURES: &str = \"{architectures}\";\n"
    )
}

fn stem(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files of a folder with this extension, sorted.
fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{folder}: {e}"))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes a file unless it holds just that already.
fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()))
}
