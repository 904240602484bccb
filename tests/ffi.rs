//! The C interface, called from C: the header compiles, agrees with the library, and a layer of the emulated GPU gives
//! what the textbook says.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[allow(dead_code, reason = "shared with the tests of the kernels")]
#[path = "emulation/emulator.rs"]
mod emulator;

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::process::Command;

use emulator::{Emulator, Mode};
use libloading::Library;
use moepress::backend::cuda::{Block, Launch, Memory, Result};
use moepress::ffi::{
    Device, ForwardArgs, Gpu, LAYOUT, Layer, LayerSpec, Status, device_handle, moepress_abi_version,
    moepress_device_close, moepress_device_count, moepress_device_open, moepress_last_error,
    moepress_layer_create, moepress_layer_destroy, moepress_layer_forward, moepress_layer_workspace_bytes,
};

/// The functions in the order of `struct api` in check.c.
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
}

static API: Api = Api {
    abi_version: moepress_abi_version,
    last_error: moepress_last_error,
    device_count: moepress_device_count,
    device_open: moepress_device_open,
    device_close: moepress_device_close,
    layer_create: moepress_layer_create,
    layer_destroy: moepress_layer_destroy,
    workspace_bytes: moepress_layer_workspace_bytes,
    forward: moepress_layer_forward,
};

/// The emulated GPU behind a device handle.
struct Emulated(Emulator);

impl Gpu for Emulated {
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
/// standard error, where there is no C compiler.
fn checks() -> Option<Library> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let mut claims = String::from("#include \"moepress.h\"\n");
    for (name, size, fields) in LAYOUT {
        claims += &format!("_Static_assert(sizeof({name}) == {size}, \"{name}\");\n");
        for (field, offset) in *fields {
            claims +=
                &format!("_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");\n");
        }
    }
    let (claims_file, library) = (folder.path().join("claims.c"), folder.path().join("check.so"));
    std::fs::write(&claims_file, claims).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I"]);
    compiler.arg(root.join("include")).arg(root.join("tests/ffi/check.c")).arg(&claims_file);
    let Ok(output) = compiler.arg("-o").arg(&library).arg("-lm").output() else {
        eprintln!("skipped: no C compiler (cc)");
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
    // SAFETY: declared like that in check.c.
    let check = unsafe { library.get::<Check>("check_errors") }.unwrap();
    // SAFETY: as above.
    passes(|message, length| unsafe { check(&raw const API, message, length) });
}

#[test]
fn layers_called_from_c() {
    let Some(library) = checks() else { return };
    let Some(emulator) = Emulator::new(Mode::Late) else { return };
    let device = device_handle(Emulated(emulator));
    for name in ["check_refusals", "check_layer"] {
        // SAFETY: declared like that in check.c.
        let check = unsafe { library.get::<DeviceCheck>(name) }.unwrap();
        // SAFETY: as above.
        passes(|message, length| unsafe { check(&raw const API, device, message, length) });
    }
    // SAFETY: made above, used no more.
    unsafe { moepress_device_close(device) };
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
