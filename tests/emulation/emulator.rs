//! A GPU made of `tests/emulation/*.{h,cpp}`: the sources of `cuda/`, compiled by the C++ compiler, fibres for threads.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use half::{bf16, f16};
use libloading::Library;
use moepress::backend::cuda::{Block, Error, Launch, Memory};
use rayon::prelude::*;

/// How asynchronous copies land and threads take turns, see `Mode` in runtime.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Copies land when they are waited for; threads run in order.
    Late,
    /// Copies land at once; threads and blocks run in reverse.
    Early,
    /// Both at random, from this seed.
    Random(u64),
}

/// Beside a mode: what other launches may have written is out of reach until a kernel has waited for them.
const GUARDS: c_int = 4;

/// The modes that every kernel is tested in.
pub(crate) const MODES: [Mode; 4] = [Mode::Late, Mode::Early, Mode::Random(1), Mode::Random(2)];

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    u32,
    *const c_void,
    usize,
    c_int,
    u64,
) -> *const c_char;

/// Kernels in a loaded library.
pub(crate) struct Kernels {
    /// The library's file.
    pub(crate) path: PathBuf,
    launch: LaunchFn,
    alloc: unsafe extern "C" fn(usize, c_int) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
    protect: unsafe extern "C" fn(*mut c_void),
    take_conflicts: unsafe extern "C" fn() -> u64,
}

/// A stream of the emulated GPU: launches run at once.
#[derive(Clone, Copy)]
pub(crate) struct Emulator {
    pub(crate) kernels: &'static Kernels,
    /// Kernels that take the place of those of the same name.
    pub(crate) replaced: Option<&'static Kernels>,
    pub(crate) mode: Mode,
    /// Blocks of persistent kernels; results may not depend on it.
    pub(crate) multiprocessors: u32,
}

/// The kernels as they are, compiled once per test run and kept while the sources stay the same. `None`, with a line
/// that says so, where there is no C++ compiler.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    KERNELS.get_or_init(|| build(&root().join("cuda"), None, kept())).as_ref()
}

/// Compiles the `.cu` files of a folder (or the one named) into a library in another, and loads it for good.
pub(crate) fn build(sources: &Path, only: Option<&str>, into: &Path) -> Option<Kernels> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let Ok(version) = Command::new(&compiler).arg("--version").output() else {
        eprintln!("skipped: no C++ compiler ({compiler}) to run the kernels on the CPU");
        return None;
    };
    let emulation = root().join("tests/emulation");
    // Set by sanitize.sh.
    let [extra, extra_runtime] = ["MOEPRESS_EMULATION_FLAGS", "MOEPRESS_EMULATION_RUNTIME_FLAGS"]
        .map(|name| std::env::var(name).unwrap_or_default());
    let flags = "-std=c++17 -O2 -g1 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered";

    let listed = |folder: &Path, extensions: &[&str]| -> Vec<PathBuf> {
        let is_one = |path: &PathBuf| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).filter(is_one).collect();
        files.sort();
        files
    };
    let digest = |files: &[PathBuf]| {
        let mut hash = DefaultHasher::new();
        (&version.stdout, flags, &extra, &extra_runtime).hash(&mut hash);
        for file in files {
            std::fs::read(file).unwrap().hash(&mut hash);
        }
        hash.finish()
    };
    let runtime = listed(&emulation, &["h", "cpp"]);
    let all = [listed(sources, &["cu", "cuh"]), runtime.clone()].concat();
    let library = into.join(format!("emulation-{:016x}.so", digest(&all)));
    if !library.exists() {
        let compiler = Compiler { program: compiler, flags: format!("{flags} {extra}") };
        let object = kept().join(format!("runtime-{:016x}.o", digest(&runtime)));
        if !object.exists() {
            let compiler = Compiler { flags: format!("{flags} {extra_runtime}"), ..compiler.clone() };
            compiler.compile(&emulation.join("runtime.cpp"), &emulation, &object);
        }
        let chosen = |path: &PathBuf| only.is_none_or(|name| path.file_name().unwrap() == name);
        let kernels: Vec<_> = listed(sources, &["cu"]).into_iter().filter(chosen).collect();
        compiler.library(&kernels, sources, &object, &library);
    }
    // SAFETY: the library is ours; loading it registers its kernels and does nothing else.
    let (path, library) = (library.clone(), Box::leak(Box::new(unsafe { Library::new(&library) }.unwrap())));
    macro_rules! symbol {
        ($name:literal) => {
            // SAFETY: declared with this type in runtime.cpp; the library is never unloaded.
            *unsafe { library.get($name) }.unwrap()
        };
    }
    Some(Kernels {
        path,
        launch: symbol!("emu_launch"),
        alloc: symbol!("emu_alloc"),
        free: symbol!("emu_free"),
        protect: symbol!("emu_protect"),
        take_conflicts: symbol!("emu_take_conflicts"),
    })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where libraries stay between test runs.
fn kept() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

#[derive(Clone)]
struct Compiler {
    program: String,
    flags: String,
}

impl Compiler {
    fn run(&self, arguments: impl FnOnce(&mut Command)) {
        let mut command = Command::new(&self.program);
        // A sanitizer is preloaded for the tests, not for the compiler.
        command.env_remove("LD_PRELOAD").args(self.flags.split_whitespace());
        arguments(&mut command);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Under another name first, since other processes may want the same.
    fn compile(&self, source: &Path, include: &Path, object: &Path) {
        let scratch = tempfile::NamedTempFile::new_in(object.parent().unwrap()).unwrap();
        self.run(|command| {
            command.arg("-I").arg(root().join("tests/emulation")).arg("-I").arg(include);
            if source.extension().is_some_and(|e| e == "cu") {
                command.args(["-include", "cuda_emulation.h"]);
            }
            command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(scratch.path());
        });
        scratch.persist(object).unwrap();
    }

    fn library(&self, kernels: &[PathBuf], include: &Path, runtime: &Path, library: &Path) {
        let scratch = tempfile::tempdir_in(library.parent().unwrap()).unwrap();
        let object = |source: &PathBuf| scratch.path().join(source.file_name().unwrap()).with_extension("o");
        kernels.par_iter().for_each(|source| self.compile(source, include, &object(source)));
        let linked = scratch.path().join("kernels.so");
        self.run(|command| {
            command.arg("-shared").args(kernels.iter().map(object)).arg(runtime).arg("-o").arg(&linked);
        });
        std::fs::rename(linked, library).unwrap();
    }
}

impl Emulator {
    /// A GPU with the kernels as they are.
    pub(crate) fn new(mode: Mode) -> Option<Self> {
        Some(Emulator { kernels: kernels()?, replaced: None, mode, multiprocessors: 3 })
    }

    /// Runs one kernel; says what it did wrong.
    pub(crate) fn run(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[u8],
    ) -> Result<(), String> {
        let name = CString::new(name).unwrap();
        let (mode, seed) = match self.mode {
            Mode::Late => (0, 0),
            Mode::Early => (1, 0),
            Mode::Random(seed) => (2, seed),
        };
        let mode = mode | GUARDS;
        // Parameters lie at an address as aligned as on the device.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        let launch = |kernels: &Kernels| {
            let (grid, block, params_pointer) = (grid.as_ptr(), block.as_ptr(), aligned.as_ptr().cast());
            // SAFETY: arrays of 3, and parameters of the length given; the emulator checks the rest.
            let error = unsafe {
                (kernels.launch)(name.as_ptr(), grid, block, shared, params_pointer, params.len(), mode, seed)
            };
            if error.is_null() {
                return Ok(());
            }
            // SAFETY: a string that lives until this thread's next launch.
            Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
        };
        match self.replaced.map(launch) {
            Some(Err(error)) if error.ends_with(": no such kernel") => launch(self.kernels),
            Some(result) => result,
            None => launch(self.kernels),
        }
    }

    /// ldmatrix phases with bank conflicts in this thread's launches since the last call.
    pub(crate) fn take_conflicts(&self) -> u64 {
        // SAFETY: takes and returns a counter of this thread.
        let take = |kernels: &Kernels| unsafe { (kernels.take_conflicts)() };
        take(self.kernels) + self.replaced.map_or(0, take)
    }

    /// Memory that kernels may read only.
    pub(crate) fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Buffer {
        let buffer = self.room(size_of_val(values));
        // SAFETY: the buffer has as many bytes, and nobody else has it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(
                values.as_ptr().cast(),
                buffer.data as *mut u8,
                size_of_val(values),
            );
            (buffer.kernels.protect)(buffer.data as *mut c_void);
        }
        buffer
    }

    /// Memory to write, full of NaN. It ends at a page that must not be touched, or begins at one.
    pub(crate) fn room(&self, bytes: usize) -> Buffer {
        let flush_left = self.mode == Mode::Early;
        // The kernels that are probed know which memory is whose.
        let kernels = self.replaced.unwrap_or(self.kernels);
        // SAFETY: returns memory or aborts.
        let data = unsafe { (kernels.alloc)(bytes, c_int::from(flush_left)) };
        Buffer { kernels, data: data as u64, bytes }
    }
}

/// Memory of the emulated GPU between two guard pages.
pub(crate) struct Buffer {
    kernels: &'static Kernels,
    data: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn address(&self) -> u64 {
        self.data
    }

    pub(crate) fn contents(&self) -> &[u8] {
        // SAFETY: this many bytes, which live as long as the buffer; kernels run while nobody looks.
        unsafe { std::slice::from_raw_parts(self.data as *const u8, self.bytes) }
    }

    pub(crate) fn read<T: bytemuck::Pod>(&self) -> Vec<T> {
        self.contents().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: from `alloc`, freed once.
        unsafe { (self.kernels.free)(self.data as *mut c_void) };
    }
}

/// Element type of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    Bf16,
    F16,
    F32,
}

impl Dtype {
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        }
    }

    pub(crate) fn bytes(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }

    /// Relative error of rounding to nearest.
    pub(crate) fn unit(self) -> f64 {
        match self {
            Dtype::Bf16 => 2f64.powi(-8),
            Dtype::F16 => 2f64.powi(-11),
            Dtype::F32 => 2f64.powi(-24),
        }
    }

    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Dtype::Bf16 => bf16::from_f32(x).to_f32(),
            Dtype::F16 => f16::from_f32(x).to_f32(),
            Dtype::F32 => x,
        }
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Dtype::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    pub(crate) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self {
            Dtype::Bf16 => halves().map(|b| bf16::from_bits(b).to_f32()).collect(),
            Dtype::F16 => halves().map(|b| f16::from_bits(b).to_f32()).collect(),
            Dtype::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
        }
    }
}

impl Launch for Emulator {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[u8],
        _follows: bool,
    ) -> Result<(), Error> {
        let failed = |code| Error::Driver { what: format!("launching {kernel}"), code };
        self.run(kernel, grid, block, shared, params).map_err(failed)
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn shared_per_multiprocessor(&self) -> u32 {
        100 * 1024
    }
}

impl Memory for Emulator {
    type Block = Buffer;

    fn allocate(&self, bytes: usize) -> Result<Buffer, Error> {
        // Whole pages begin where a device's memory would, aligned to 256 bytes at least.
        Ok(self.room(bytes.next_multiple_of(256)))
    }
}

impl Block for Buffer {
    fn address(&self) -> u64 {
        self.data
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(&self, start: usize, bytes: &[u8]) -> Result<(), Error> {
        let end = start + bytes.len();
        assert!(end <= self.bytes, "bytes {start} to {end} of a block of {}", self.bytes);
        // SAFETY: within the block, which no kernel uses while this runs.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.data as *mut u8).add(start), bytes.len());
        };
        Ok(())
    }
}
