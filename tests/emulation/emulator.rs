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
    pub(crate) mode: Mode,
    /// Blocks of persistent kernels; results may not depend on it.
    pub(crate) multiprocessors: u32,
}

/// The kernels as they are, compiled once per test run and kept while the sources stay the same. `None`, with a line
/// that says so, where there is no C++ compiler.
pub(crate) fn kernels() -> Option<&'static Kernels> {
    static KERNELS: OnceLock<Option<Kernels>> = OnceLock::new();
    KERNELS.get_or_init(|| build(&root().join("cuda"), None)).as_ref()
}

/// Compiles the `.cu` files of a folder (or the one named) and loads them for good.
pub(crate) fn build(sources: &Path, only: Option<&str>) -> Option<Kernels> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let Ok(version) = Command::new(&compiler).arg("--version").output() else {
        eprintln!("skipped: no C++ compiler ({compiler}) to run the kernels on the CPU");
        return None;
    };
    let emulation = root().join("tests/emulation");
    let extra = std::env::var("MOEPRESS_EMULATION_FLAGS").unwrap_or_default();
    let flags = "-std=c++17 -O2 -g1 -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered";

    let listed = |folder: &Path, extensions: &[&str]| -> Vec<PathBuf> {
        let is_one = |path: &PathBuf| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).filter(is_one).collect();
        files.sort();
        files
    };
    let mut hash = DefaultHasher::new();
    (&version.stdout, flags, &extra, only).hash(&mut hash);
    for file in listed(sources, &["cu", "cuh"]).iter().chain(&listed(&emulation, &["h", "cpp"])) {
        std::fs::read(file).unwrap().hash(&mut hash);
    }
    let name = format!("emulation-{:016x}.so", hash.finish());
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if !library.exists() {
        compile(&compiler, &[flags, &extra].join(" "), sources, only, &listed(sources, &["cu"]), &library);
    }
    // SAFETY: the library is ours; loading it registers its kernels and does nothing else.
    let library = Box::leak(Box::new(unsafe { Library::new(&library) }.unwrap()));
    macro_rules! symbol {
        ($name:literal) => {
            // SAFETY: declared with this type in runtime.cpp; the library is never unloaded.
            *unsafe { library.get($name) }.unwrap()
        };
    }
    Some(Kernels {
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

fn compile(
    compiler: &str,
    flags: &str,
    folder: &Path,
    only: Option<&str>,
    sources: &[PathBuf],
    library: &Path,
) {
    let emulation = root().join("tests/emulation");
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let chosen = |path: &&PathBuf| only.is_none_or(|name| path.file_name().unwrap() == name);
    let mut jobs: Vec<_> = sources.iter().filter(chosen).collect();
    let runtime = emulation.join("runtime.cpp");
    jobs.push(&runtime);
    let object = |source: &Path| scratch.path().join(source.file_name().unwrap()).with_extension("o");
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    };
    jobs.par_iter().for_each(|source| {
        let mut command = Command::new(compiler);
        command.args(flags.split_whitespace()).arg("-I").arg(&emulation).arg("-I").arg(folder);
        if source.extension().is_some_and(|e| e == "cu") {
            command.args(["-include", "cuda_emulation.h"]);
        }
        run(command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object(source)));
    });
    let linked = scratch.path().join("kernels.so");
    let objects = jobs.iter().map(|source| object(source));
    run(Command::new(compiler)
        .args(flags.split_whitespace())
        .arg("-shared")
        .args(objects)
        .arg("-o")
        .arg(&linked));
    std::fs::rename(linked, library).unwrap();
}

impl Emulator {
    /// A GPU with the kernels as they are.
    pub(crate) fn new(mode: Mode) -> Option<Self> {
        Some(Emulator { kernels: kernels()?, mode, multiprocessors: 3 })
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
        // Parameters lie at an address as aligned as on the device.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: arrays of 3, and parameters of the length given; the emulator checks the rest.
        let error = unsafe {
            let params_pointer = aligned.as_ptr().cast();
            let launch = self.kernels.launch;
            launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                params_pointer,
                params.len(),
                mode,
                seed,
            )
        };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a string that lives until this thread's next launch.
        Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
    }

    /// ldmatrix phases with bank conflicts in this thread's launches since the last call.
    pub(crate) fn take_conflicts(&self) -> u64 {
        // SAFETY: takes and returns a counter of this thread.
        unsafe { (self.kernels.take_conflicts)() }
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
            (self.kernels.protect)(buffer.data as *mut c_void);
        }
        buffer
    }

    /// Memory to write, full of NaN. It ends at a page that must not be touched, or begins at one.
    pub(crate) fn room(&self, bytes: usize) -> Buffer {
        let flush_left = self.mode == Mode::Early;
        // SAFETY: returns memory or aborts.
        let data = unsafe { (self.kernels.alloc)(bytes, c_int::from(flush_left)) };
        Buffer { kernels: self.kernels, data: data as u64, bytes }
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
