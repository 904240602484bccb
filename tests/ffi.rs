//! The C interface, called from C: the header compiles, agrees with the library, and layers give what the textbook says, on
//! the emulated GPU, on a real one where there is one, and through the stand-in for the driver.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod gpu;

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::process::Command;

use cudarc::driver::CudaContext;
use gpu::Gpu;
use gpu::emulator::{Emulator, Mode};
use libloading::Library;
use moepress::backend::cuda::{Block, Launch, Memory, Result};
use moepress::ffi::{
    Device, ForwardArgs, LAYOUT, Layer, LayerSpec, Status, device_handle, moepress_abi_version,
    moepress_device_close, moepress_device_count, moepress_device_open, moepress_last_error,
    moepress_layer_create, moepress_layer_destroy, moepress_layer_forward, moepress_layer_workspace_bytes,
};

/// What the C code is given, in the order of `struct api` in check.c.
#[repr(C)]
struct Api {
    abi_version: extern "C" fn() -> u32,
    last_error: extern "C" fn() -> *const c_char,
    device_count: unsafe extern "C" fn(*mut i32) -> Status,
    device_open: unsafe extern "C" fn(i32, *mut *mut Device) -> Status,
    device_close: unsafe extern "C" fn(*mut Device),
    layer_create: unsafe extern "C" fn(*const Device, *const LayerSpec, *mut *mut Layer) -> Status,
    layer_destroy: unsafe extern "C" fn(*mut Layer),
    workspace_bytes: unsafe extern "C" fn(*const Layer, i64, *mut usize) -> Status,
    forward: unsafe extern "C" fn(*const Layer, *const ForwardArgs, *mut c_void) -> Status,
    allocate: extern "C" fn(usize) -> *mut c_void,
    upload: unsafe extern "C" fn(*mut c_void, *const u8, usize),
    download: unsafe extern "C" fn(*mut u8, *const c_void, usize),
    stream: *mut c_void,
}

fn api(stream: *mut c_void) -> Api {
    Api {
        abi_version: moepress_abi_version,
        last_error: moepress_last_error,
        device_count: moepress_device_count,
        device_open: moepress_device_open,
        device_close: moepress_device_close,
        layer_create: moepress_layer_create,
        layer_destroy: moepress_layer_destroy,
        workspace_bytes: moepress_layer_workspace_bytes,
        forward: moepress_layer_forward,
        allocate,
        upload,
        download,
        stream,
    }
}

/// The device memory that this thread's C code has.
trait Heap {
    fn allocate(&mut self, bytes: usize) -> u64;
    fn upload(&mut self, to: u64, bytes: &[u8]);
    fn download(&mut self, bytes: &mut [u8], from: u64);
}

struct GpuHeap<G: Gpu> {
    gpu: G,
    wait: Box<dyn Fn()>,
    blocks: Vec<G::Block>,
}

impl<G: Gpu> GpuHeap<G> {
    fn at(&self, address: u64) -> &G::Block {
        self.blocks.iter().find(|block| block.address() == address).unwrap()
    }
}

impl<G: Gpu> Heap for GpuHeap<G> {
    fn allocate(&mut self, bytes: usize) -> u64 {
        let block = self.gpu.room(bytes.next_multiple_of(256));
        let address = block.address();
        self.blocks.push(block);
        address
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) {
        self.at(to).write(0, bytes).unwrap();
    }

    fn download(&mut self, bytes: &mut [u8], from: u64) {
        (self.wait)();
        bytes.copy_from_slice(&self.gpu.read(self.at(from))[..bytes.len()]);
    }
}

thread_local! {
    static HEAP: RefCell<Option<Box<dyn Heap>>> = const { RefCell::new(None) };
}

fn heap<T>(run: impl FnOnce(&mut dyn Heap) -> T) -> T {
    HEAP.with_borrow_mut(|heap| run(&mut **heap.as_mut().unwrap()))
}

extern "C" fn allocate(bytes: usize) -> *mut c_void {
    heap(|heap| heap.allocate(bytes)) as *mut c_void
}

unsafe extern "C" fn upload(to: *mut c_void, from: *const u8, bytes: usize) {
    // SAFETY: the C code's promise.
    heap(|heap| heap.upload(to as u64, unsafe { std::slice::from_raw_parts(from, bytes) }));
}

unsafe extern "C" fn download(to: *mut u8, from: *const c_void, bytes: usize) {
    // SAFETY: the C code's promise.
    heap(|heap| heap.download(unsafe { std::slice::from_raw_parts_mut(to, bytes) }, from as u64));
}

/// The emulated GPU behind a device handle.
struct Emulated(Emulator);

impl moepress::ffi::Gpu for Emulated {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn Block>> {
        Ok(Box::new(self.0.allocate(bytes)?))
    }

    unsafe fn on_stream(
        &self,
        _: *mut c_void,
        enqueue: &mut dyn FnMut(&dyn Launch) -> Result<()>,
    ) -> Result<()> {
        enqueue(&self.0)
    }
}

/// Compiles and loads check.c, together with what the library says about the header's structures; `None`, with a line on
/// standard error, where there is no C compiler, which `MOEPRESS_REQUIRE_GPU=1` makes a failure.
fn checks() -> Option<Library> {
    // In the program, so that it runs without the sources.
    const HEADER: &str = include_str!("../include/moepress.h");
    const CHECK: &str = include_str!("ffi/check.c");
    let folder = tempfile::tempdir().unwrap();
    let mut claims = String::from("#include \"moepress.h\"\n");
    for (name, size, fields) in LAYOUT {
        claims += &format!("_Static_assert(sizeof({name}) == {size}, \"{name}\");\n");
        for (field, offset) in *fields {
            claims +=
                &format!("_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");\n");
        }
    }
    let library = folder.path().join("check.so");
    for (name, text) in [("moepress.h", HEADER), ("check.c", CHECK), ("claims.c", &claims)] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
    compiler.args(["check.c", "claims.c"].map(|name| folder.path().join(name)));
    let Ok(output) = compiler.arg("-o").arg(&library).arg("-lm").output() else {
        gpu::skipped("no C compiler (cc)");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: our own library, without initialisers. It stays mapped after its file is gone.
    Some(unsafe { Library::new(&library) }.unwrap())
}

#[track_caller]
fn passes(check: impl FnOnce(*mut c_char, usize) -> i32) {
    let mut message: [c_char; 1024] = [0; 1024];
    let failed = check(message.as_mut_ptr(), message.len());
    // SAFETY: written by snprintf, or all zero.
    assert_eq!(failed, 0, "{}", unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy());
}

type Check = unsafe extern "C" fn(*const Api, *mut c_char, usize) -> i32;
type DeviceCheck = unsafe extern "C" fn(*const Api, *const Device, *mut c_char, usize) -> i32;

#[test]
fn errors_of_a_caller() {
    let Some(library) = checks() else { return };
    let api = api(std::ptr::null_mut());
    // SAFETY: declared like that in check.c.
    let check = unsafe { library.get::<Check>("check_errors") }.unwrap();
    // SAFETY: as above.
    passes(|message, length| unsafe { check(&raw const api, message, length) });
}

/// Layers of this device, used on this stream.
fn layers(device: *mut Device, stream: *mut c_void) {
    let Some(library) = checks() else { return };
    let api = api(stream);
    for name in ["check_refusals", "check_layer"] {
        // SAFETY: declared like that in check.c.
        let check = unsafe { library.get::<DeviceCheck>(name) }.unwrap();
        // SAFETY: as above.
        passes(|message, length| unsafe { check(&raw const api, device, message, length) });
    }
    // SAFETY: the caller's, used no more.
    unsafe { moepress_device_close(device) };
    HEAP.take();
}

#[test]
fn layers_of_an_emulated_gpu() {
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    HEAP.set(Some(Box::new(GpuHeap { gpu, wait: Box::new(|| ()), blocks: Vec::new() })));
    layers(device_handle(Emulated(gpu)), std::ptr::null_mut());
}

/// On a stream of its own.
#[test]
fn layers_of_a_device() {
    let Some(gpu) = gpu::device() else { return };
    let mut device = std::ptr::null_mut();
    // SAFETY: a place for the handle.
    assert_eq!(unsafe { moepress_device_open(0, &raw mut device) }, Status::Ok);
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let raw = stream.cu_stream().cast();
    let wait = Box::new(move || stream.synchronize().unwrap());
    HEAP.set(Some(Box::new(GpuHeap { gpu, wait, blocks: Vec::new() })));
    layers(device, raw);
}

#[test]
fn through_a_driver() {
    gpu::through_a_driver("layers_of_a_device");
}

/// The Python example declares the header's structures.
#[test]
fn the_python_example_agrees_with_the_header() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pytorch/moepress_torch.py");
    let Ok(output) = Command::new("python3").arg(script).arg("--structures").output() else {
        eprintln!("skipped: no python3");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The Python example runs, on the stand-in for the driver. Needs what a test cannot make: the library
/// (`cargo rustc --release --lib --crate-type cdylib`) in `MOEPRESS_LIBRARY`, and in `PYTHON` a Python with PyTorch.
#[test]
fn the_python_example_through_a_driver() {
    let [Some(library), Some(python)] = ["MOEPRESS_LIBRARY", "PYTHON"].map(std::env::var_os) else {
        eprintln!("skipped: MOEPRESS_LIBRARY or PYTHON is not set");
        return;
    };
    let Some((_folder, variables)) = gpu::stand_in() else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ffi/torch_stand_in.py");
    let output = Command::new(python).arg(script).arg(library).envs(variables).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let replays = out.matches("replay ").count();
    assert!(output.status.success() && replays == 3, "{out}{}", String::from_utf8_lossy(&output.stderr));
}
