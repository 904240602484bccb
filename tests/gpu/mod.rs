//! The GPUs that a test runs on: the emulated one, and a real one where there is one.

#![allow(dead_code, unreachable_pub, reason = "every test file uses another part of this")]

#[path = "../emulation/emulator.rs"]
pub mod emulator;

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use emulator::{Buffer, Emulator};
use moepress::backend::cuda::{
    Block, Device, DeviceBlock, Launch, Memory, Result, Unavailable, availability,
};

/// What the tests of layers need of a GPU.
pub trait Gpu: Memory {
    /// Memory with this content, for kernels to read.
    fn upload(&self, bytes: &[u8]) -> Self::Block;

    /// Memory for kernels to write, full of NaN; with `MOEPRESS_UNWRITTEN=1` on a real GPU as it was, so that compute-sanitizer
    /// (initcheck) can tell what was never written.
    fn room(&self, bytes: usize) -> Self::Block;

    /// The content, after all that was enqueued.
    fn read(&self, block: &Self::Block) -> Vec<u8>;

    /// Calls `enqueue` with a stream.
    fn enqueue(&self, enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>) -> Result<()>;

    /// Whether a CPU runs its kernels: slow, so that tests ask less of it.
    fn is_emulated(&self) -> bool;
}

impl Gpu for Emulator {
    fn upload(&self, bytes: &[u8]) -> Buffer {
        Emulator::upload(self, bytes)
    }

    fn room(&self, bytes: usize) -> Buffer {
        Emulator::room(self, bytes)
    }

    fn read(&self, block: &Buffer) -> Vec<u8> {
        block.contents().to_vec()
    }

    fn enqueue(&self, enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>) -> Result<()> {
        enqueue(self)
    }

    fn is_emulated(&self) -> bool {
        true
    }
}

impl Gpu for Arc<Device> {
    fn upload(&self, bytes: &[u8]) -> DeviceBlock {
        let block = self.allocate(bytes.len()).unwrap();
        block.write(0, bytes).unwrap();
        block
    }

    fn room(&self, bytes: usize) -> DeviceBlock {
        if std::env::var("MOEPRESS_UNWRITTEN").is_ok_and(|v| v == "1") {
            return self.allocate(bytes).unwrap();
        }
        Gpu::upload(self, &vec![0xff; bytes])
    }

    fn read(&self, block: &DeviceBlock) -> Vec<u8> {
        let mut bytes = vec![0; block.bytes()];
        block.read(0, &mut bytes).unwrap();
        bytes
    }

    fn enqueue(&self, enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>) -> Result<()> {
        // SAFETY: the default stream, for which copies wait.
        enqueue(&unsafe { self.stream(std::ptr::null_mut()) })
    }

    fn is_emulated(&self) -> bool {
        is_stand_in()
    }
}

/// Says that a test of a real GPU cannot run. `MOEPRESS_REQUIRE_GPU=1` makes that a failure.
#[track_caller]
pub fn skipped(why: &str) {
    let required = std::env::var("MOEPRESS_REQUIRE_GPU").is_ok_and(|v| v == "1");
    assert!(!required, "MOEPRESS_REQUIRE_GPU=1: {why}");
    eprintln!("skipped: {why}");
}

/// GPU 0, opened once for all tests that run at the same time; `None`, with a line on standard error, where there is none.
/// `MOEPRESS_REQUIRE_GPU=1` makes that a failure.
pub fn device() -> Option<Arc<Device>> {
    static DEVICE: Mutex<Weak<Device>> = Mutex::new(Weak::new());
    if let Err(why) = availability() {
        skipped(&why.to_string());
        return None;
    }
    let mut known = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = known.upgrade().unwrap_or_else(|| Device::new(0).unwrap());
    *known = Arc::downgrade(&device);
    Some(device)
}

/// The variable that names the library of kernels to the stand-in for the driver.
const EMULATOR: &str = "MOEPRESS_EMULATOR";

/// Whether [`device`] is the stand-in's.
pub fn is_stand_in() -> bool {
    std::env::var_os(EMULATOR).is_some()
}

/// A folder with the stand-in for the driver (driver.cpp), and the variables with which a program finds it there; `None`,
/// with a line on standard error, where it cannot be, which `MOEPRESS_REQUIRE_CUDA=1` makes a failure where nvcc is missing.
pub fn stand_in() -> Option<(tempfile::TempDir, [(&'static str, std::path::PathBuf); 2])> {
    if !cfg!(target_os = "linux") || availability() == Err(Unavailable::NoKernels) {
        let required = std::env::var("MOEPRESS_REQUIRE_CUDA").is_ok_and(|v| v == "1");
        assert!(!required, "MOEPRESS_REQUIRE_CUDA=1: built without nvcc");
        eprintln!("skipped: built without nvcc");
        return None;
    }
    let kernels = emulator::kernels()?;
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulation/driver.cpp");
    let mut compiler = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()));
    compiler.args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]).arg(source);
    let output = compiler.arg("-o").arg(folder.path().join("libcuda.so.1")).arg("-ldl").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let variables = [("LD_LIBRARY_PATH", folder.path().to_owned()), (EMULATOR, kernels.path.clone())];
    Some((folder, variables))
}

/// Runs the tests of this program whose names contain `name` with the stand-in for the driver: the real code for drivers,
/// on emulated kernels.
#[track_caller]
pub fn through_a_driver(name: &str) {
    through_a_driver_with(name, &[]);
}

/// The same, with further variables.
#[track_caller]
pub fn through_a_driver_with(name: &str, more: &[(&str, &str)]) {
    if is_stand_in() {
        return;
    }
    let Some((_folder, variables)) = stand_in() else { return };
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.arg(name).envs(variables).envs(more.iter().copied()).env("MOEPRESS_REQUIRE_GPU", "1");
    let output = tests.output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success() && !out.contains(" 0 passed"), "{out}\n{err}");
}

/// Tests, functions of a [`Gpu`], that run on the emulated GPU and on a real one.
#[macro_export]
macro_rules! on_every_gpu {
    ($($test:ident)*) => {
        mod emulated {
            use super::gpu::emulator::{Emulator, Mode};
            $(
                #[test]
                fn $test() {
                    if let Some(gpu) = Emulator::new(Mode::Random(3)) {
                        super::$test(&gpu);
                    }
                }
            )*
        }
        mod device {
            $(
                #[test]
                fn $test() {
                    if let Some(gpu) = super::gpu::device() {
                        super::$test(&gpu);
                    }
                }
            )*
        }
    };
}
