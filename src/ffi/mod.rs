//! The C interface of GPU layers: `include/moepress.h`, which documents it.
//!
//! The functions are exported from a `cdylib` or `staticlib` of this crate
//! (`cargo rustc --release --lib --crate-type cdylib`).

mod convert;
mod handles;
mod router;
mod types;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use handles::{Device, Gpu, Layer, device_handle};
pub use types::{Expert, ForwardArgs, LAYOUT, LayerSpec, Matrix, Router, Status};

use crate::backend::cuda::{self, Error, Result};
use convert::{count, sized, wrong};

/// `MOEPRESS_ABI_VERSION`.
const ABI_VERSION: u32 = 1;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn remember(message: &str) {
    let text: String = message.chars().filter(|&c| c != '\0').collect();
    LAST_ERROR.with(|last| *last.borrow_mut() = CString::new(text).unwrap_or_default());
}

/// Runs a function of the interface: no panic leaves it, errors become a status and a message.
fn guarded(run: impl FnOnce() -> Result<()>) -> Status {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(error)) => {
            remember(&error.to_string());
            match error {
                Error::Unavailable(_) | Error::Ordinal { .. } | Error::Capability { .. } => {
                    Status::Unavailable
                }
                Error::Driver { .. } => Status::DeviceError,
                _ => Status::InvalidArgument,
            }
        }
        Err(_) => {
            remember("a mistake inside moepress: a panic was caught");
            Status::InternalError
        }
    }
}

/// A reference from a pointer.
///
/// # Safety
/// `pointer` is null or valid.
unsafe fn reference<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| wrong(what, "null", "a pointer"))
}

/// Writes a result.
///
/// # Safety
/// `target` is null or writable.
unsafe fn put<T>(target: *mut T, value: T, what: &str) -> Result<()> {
    if target.is_null() {
        return Err(wrong(what, "null", "a pointer"));
    }
    // SAFETY: the caller's promise.
    unsafe { target.write(value) };
    Ok(())
}

/// Takes a handle back.
///
/// # Safety
/// `handle` is null or was made by `Box::into_raw`, and is not used again.
unsafe fn destroy<T>(handle: *mut T) {
    guarded(|| {
        if !handle.is_null() {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(handle) });
        }
        Ok(())
    });
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn moepress_abi_version() -> u32 {
    ABI_VERSION
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn moepress_last_error() -> *const c_char {
    LAST_ERROR.with(|last| last.try_borrow().map_or(CStr::as_ptr(c""), |text| text.as_ptr()))
}

/// See the header.
///
/// # Safety
/// `out` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_device_count(out: *mut i32) -> Status {
    guarded(|| {
        let found = cuda::availability().map_err(Error::from)?;
        // SAFETY: the caller's promise.
        unsafe { put(out, found as i32, "count") }
    })
}

/// See the header.
///
/// # Safety
/// `device` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_device_open(ordinal: i32, device: *mut *mut Device) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise.
        unsafe { put(device, std::ptr::null_mut(), "device") }?;
        let opened = cuda::Device::new(count(ordinal, "ordinal")?)?;
        // SAFETY: as above.
        unsafe { put(device, device_handle(opened), "device") }
    })
}

/// See the header.
///
/// # Safety
/// `device` is null or comes from [`moepress_device_open`], and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_device_close(device: *mut Device) {
    // SAFETY: the caller's promise.
    unsafe { destroy(device) }
}

/// See the header.
///
/// # Safety
/// All pointers are null or what the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_layer_create(
    device: *const Device,
    spec: *const LayerSpec,
    layer: *mut *mut Layer,
) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise, for all of these.
        unsafe {
            put(layer, std::ptr::null_mut(), "layer")?;
            let created = Layer::new(reference(device, "device")?, &sized(spec, "spec")?)?;
            put(layer, Box::into_raw(Box::new(created)), "layer")
        }
    })
}

/// See the header.
///
/// # Safety
/// `layer` is null or comes from [`moepress_layer_create`], and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_layer_destroy(layer: *mut Layer) {
    // SAFETY: the caller's promise.
    unsafe { destroy(layer) }
}

/// See the header.
///
/// # Safety
/// `layer` is null or a layer, `bytes` null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_layer_workspace_bytes(
    layer: *const Layer,
    max_tokens: i64,
    bytes: *mut usize,
) -> Status {
    guarded(|| {
        // SAFETY: the caller's promise, for both.
        unsafe {
            let layer = reference(layer, "layer")?;
            put(bytes, layer.layer.workspace_bytes(count(max_tokens, "max_tokens")?)?, "bytes")
        }
    })
}

/// See the header.
///
/// # Safety
/// All pointers are null or what the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moepress_layer_forward(
    layer: *const Layer,
    args: *const ForwardArgs,
    stream: *mut c_void,
) -> Status {
    // SAFETY: the caller's promise, for all of these.
    guarded(|| unsafe { reference(layer, "layer")?.forward(&sized(args, "args")?, stream) })
}
