//! A GPU through its driver: probing, loading the kernels once, launching them on the caller's stream.
//!
//! Within a forward pass a kernel may start while the one before it still ends, on GPUs that can (compute capability 9.0 and
//! later); `MOEPRESS_CUDA_SERIAL=1`, read when a device is opened, makes each wait for the one before it altogether.
//!
//! All functions are those of drivers since CUDA 11.8, called through `cudarc`, which loads the driver at run time and panics
//! where it, or one function, is missing. So [`availability`] looks for them first.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as DeviceAttribute, CUfunction_attribute as Attribute};
use cudarc::driver::{DriverError, result};
use libloading::Library;

use super::images::{ARCHITECTURES, IMAGES};
use super::kernels;
use super::{Block, Error, Launch, Memory, Result, Unavailable};

const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// Every function of the driver that this module calls.
const SYMBOLS: [&str; 22] = [
    "cuCtxGetCurrent",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamSynchronize",
];

/// Number of GPUs that can be used. Never panics, whatever is installed.
///
/// # Errors
/// Says what is missing.
pub fn availability() -> std::result::Result<usize, Unavailable> {
    if IMAGES.is_empty() {
        return Err(Unavailable::NoKernels);
    }
    // SAFETY: loading the driver runs its initialisers, which have no requirements.
    let library = unsafe { Library::new(LIBRARY) }.map_err(|_| Unavailable::NoDriver { library: LIBRARY })?;
    for symbol in SYMBOLS {
        // SAFETY: the symbol is only looked for, never used.
        if unsafe { library.get::<*const c_void>(symbol) }.is_err() {
            return Err(Unavailable::OldDriver { symbol });
        }
    }
    let count = result::init().and_then(|()| result::device::get_count());
    match count {
        Ok(0) => Err(Unavailable::NoDevice { reason: "none is visible".into() }),
        Ok(count) => Ok(count as usize),
        Err(error) => Err(Unavailable::NoDevice { reason: code(error) }),
    }
}

/// The driver's name of an error.
fn code(error: DriverError) -> String {
    error.error_name().map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned())
}

fn failed(what: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    let what = what.into();
    |error| Error::Driver { what, code: code(error) }
}

/// An opened GPU with all kernels loaded. Works in the device's primary context, which PyTorch, candle and all that use
/// the CUDA runtime share. Must outlive what was enqueued on it.
#[derive(Debug)]
pub struct Device {
    name: String,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    /// In the order of [`IMAGES`].
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    multiprocessors: u32,
    shared_per_multiprocessor: u32,
    /// Whether kernels may start while those before them end.
    overlaps: bool,
}

#[derive(Clone, Copy, Debug)]
struct Function {
    handle: sys::CUfunction,
    /// Most threads in a block, by its registers.
    threads: u32,
    /// Most dynamic shared memory in bytes.
    shared: u32,
    /// Whether it waits itself for the kernel before it: compiled for compute capability 9.0 or later.
    waits: bool,
}

// SAFETY: the handles belong to the context, not to a thread; the driver's functions on them are thread safe, and
// nothing here is changed after `new`.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU number `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// Where no GPU is usable, or not this one.
    pub fn new(ordinal: usize) -> Result<Arc<Self>> {
        let count = availability()?;
        if ordinal >= count {
            return Err(Error::Ordinal { ordinal, count });
        }
        let opening = |what: &str| failed(format!("GPU {ordinal}: {what}"));
        let handle = result::device::get(ordinal as i32).map_err(opening("opening it"))?;
        let name = result::device::get_name(handle).map_err(opening("its name"))?;
        // SAFETY: `handle` comes from the driver; the context is released in `drop`.
        let context = unsafe { result::primary_ctx::retain(handle) }.map_err(opening("its context"))?;
        // From here on `drop` cleans up.
        let mut this = Device {
            name,
            handle,
            context,
            modules: Vec::new(),
            functions: HashMap::new(),
            multiprocessors: 0,
            shared_per_multiprocessor: 0,
            overlaps: std::env::var_os("MOEPRESS_CUDA_SERIAL").is_none_or(|value| value != "1"),
        };
        this.multiprocessors = this.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        this.shared_per_multiprocessor =
            this.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let _current = this.enter()?;
        this.load()?;
        Ok(Arc::new(this))
    }

    /// Its name, as the driver says it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a kernel of a pass may start while the one before it ends: kernels compiled for compute capability 9.0 or later,
    /// without `MOEPRESS_CUDA_SERIAL=1`.
    pub fn overlaps(&self) -> bool {
        self.overlaps && self.functions.values().all(|function| function.waits)
    }

    /// The stream `raw`, a `CUstream` or `cudaStream_t`; null is the default stream.
    ///
    /// # Safety
    /// `raw` must be a stream of this device's primary context and live as long as the result.
    pub unsafe fn stream(self: &Arc<Self>, raw: *mut c_void) -> Stream {
        Stream { device: Arc::clone(self), raw: raw.cast() }
    }

    fn attribute(&self, attribute: DeviceAttribute) -> Result<u32> {
        // SAFETY: the device comes from the driver.
        let value = unsafe { result::device::get_attribute(self.handle, attribute) };
        value.map(|v| v as u32).map_err(failed(format!("{}: {attribute:?}", self.name)))
    }

    fn load(&mut self) -> Result<()> {
        let most = self.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        for image in IMAGES {
            // SAFETY: a whole fat binary, made by nvcc.
            let module = unsafe { result::module::load_data(image.bytes.as_ptr().cast()) };
            let module = module.map_err(|error| self.not_loaded(image.source, error))?;
            self.modules.push(module);
        }
        for (source, kernel) in kernels::by_source() {
            let function = self.find(source, kernel)?;
            self.functions.insert(kernel, prepare(kernel, function, most)?);
        }
        Ok(())
    }

    fn find(&self, source: &str, kernel: &'static str) -> Result<sys::CUfunction> {
        let name =
            CString::new(kernel).map_err(|_| Error::argument("kernel", kernel, "a name without NUL"))?;
        let mut modules = IMAGES.iter().zip(&self.modules);
        let (_, &module) = modules
            .find(|(image, _)| image.source == source)
            .ok_or_else(|| Error::argument("kernel", kernel, format!("one of an embedded {source}")))?;
        // SAFETY: a module that was loaded above.
        let function = unsafe { result::module::get_function(module, name) };
        function.map_err(failed(format!("kernel {kernel} of {source}")))
    }

    fn not_loaded(&self, source: &str, error: DriverError) -> Error {
        let capability = || -> Result<String> {
            let major = self.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            let minor = self.attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            Ok(format!("{major}.{minor}"))
        };
        match (error.0, capability()) {
            (sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, Ok(capability)) => {
                Error::Capability { device: self.name.clone(), capability, architectures: ARCHITECTURES }
            }
            _ => failed(format!("{}: loading the kernels of {source}", self.name))(error),
        }
    }

    /// Makes the device's context the thread's current one until the guard is dropped.
    fn enter(&self) -> Result<Current> {
        if let Ok(Some(current)) = result::ctx::get_current()
            && current == self.context
        {
            return Ok(Current { pushed: false });
        }
        // SAFETY: the context is retained as long as `self` lives.
        let pushed = unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result();
        pushed.map_err(failed(format!("{}: entering its context", self.name)))?;
        Ok(Current { pushed: true })
    }
}

/// Raises the limit of dynamic shared memory as far as the device goes. All kernels ask for the same division of a
/// multiprocessor's memory, the one with most shared memory: else it would be divided anew, which takes a multiprocessor
/// without blocks. Asking for attributes also makes a driver that loads kernels at their first launch load this one now,
/// which a stream capture needs.
fn prepare(kernel: &'static str, handle: sys::CUfunction, most: u32) -> Result<Function> {
    // SAFETY: a function of a loaded module.
    let get = |attribute| unsafe { result::function::get_function_attribute(handle, attribute) };
    let attributes = || -> std::result::Result<Function, DriverError> {
        let used = get(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)? as u32;
        let threads = get(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)? as u32;
        let shared = most.saturating_sub(used);
        let waits = get(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= 90;
        let set = |attribute, value| {
            // SAFETY: as above.
            unsafe { result::function::set_function_attribute(handle, attribute, value) }
        };
        set(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32)?;
        set(Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
        Ok(Function { handle, threads, shared, waits })
    };
    attributes().map_err(failed(format!("kernel {kernel}: its attributes")))
}

impl Drop for Device {
    fn drop(&mut self) {
        let current = self.enter();
        for module in self.modules.drain(..) {
            // SAFETY: loaded by us, unloaded once. What goes wrong while leaving concerns nobody.
            let _ = unsafe { result::module::unload(module) };
        }
        drop(current);
        // SAFETY: retained in `new`.
        let _ = unsafe { result::primary_ctx::release(self.handle) };
    }
}

/// Leaves a context when dropped.
struct Current {
    pushed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this thread.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut context) };
        }
    }
}

/// A stream of the caller. No events, no waiting, no allocation: a launch is one call of the driver.
#[derive(Clone, Debug)]
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
}

// SAFETY: a stream may be used from any thread; whether it lives is the promise of `Device::stream`.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Launch for Stream {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[u8],
        follows: bool,
    ) -> Result<()> {
        let function = self.device.functions.get(kernel);
        let function =
            function.ok_or_else(|| Error::argument("kernel", kernel, "one of the embedded kernels"))?;
        check_shape(kernel, grid, block, shared, function)?;
        let _current = self.device.enter()?;
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shared,
            hStream: self.raw,
            attrs: &raw mut overlap,
            numAttrs: u32::from(follows && function.waits && self.device.overlaps),
        };
        // SAFETY: the function belongs to a module that lives as long as the device; the rest is the caller's promise.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.handle, arguments.as_mut_ptr(), ptr::null_mut())
        };
        launched.result().map_err(|error| {
            failed(format!("kernel {kernel}, grid {grid:?}, block {block:?}, {shared} B shared"))(error)
        })
    }

    fn multiprocessors(&self) -> u32 {
        self.device.multiprocessors
    }

    fn shared_per_multiprocessor(&self) -> u32 {
        self.device.shared_per_multiprocessor
    }
}

fn check_shape(
    kernel: &'static str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    function: &Function,
) -> Result<()> {
    const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65535, 65535];
    let refuse = |argument, found: String, expected| Err(Error::Launch { kernel, argument, found, expected });
    if grid.iter().zip(MOST_BLOCKS).any(|(&n, most)| n == 0 || n > most) {
        return refuse("grid", format!("{grid:?}"), format!("1 to {MOST_BLOCKS:?}"));
    }
    let threads = block.iter().try_fold(1u32, |product, &n| product.checked_mul(n)).unwrap_or(u32::MAX);
    if threads == 0 || threads > function.threads {
        return refuse("block", format!("{block:?}"), format!("1 to {} threads", function.threads));
    }
    if shared > function.shared {
        return refuse(
            "shared memory",
            format!("{shared} bytes"),
            format!("at most {} on this GPU", function.shared),
        );
    }
    Ok(())
}

/// Device memory, freed when dropped.
#[derive(Debug)]
pub struct DeviceBlock {
    device: Arc<Device>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl Block for DeviceBlock {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        check_range(self, start, bytes.len())?;
        let _current = self.device.enter()?;
        // The copy alone may return before the last bytes have arrived.
        // SAFETY: the range lies within the block.
        let copied = unsafe { result::memcpy_htod_sync(self.address + start as u64, bytes) }
            // SAFETY: the default stream, on which the copy ran.
            .and_then(|()| unsafe { result::stream::synchronize(result::stream::null()) });
        copied.map_err(failed(format!("{}: copying {} bytes to it", self.device.name, bytes.len())))
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: allocated by us, freed once; the driver waits for what uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl Memory for Arc<Device> {
    type Block = DeviceBlock;

    fn allocate(&self, bytes: usize) -> Result<DeviceBlock> {
        let _current = self.enter()?;
        // SAFETY: uninitialised memory, which nobody reads before it is written. The driver refuses a length of 0.
        let address = unsafe { result::malloc_sync(bytes.max(1)) };
        let address = address.map_err(failed(format!("{}: allocating {bytes} bytes", self.name)))?;
        Ok(DeviceBlock { device: Arc::clone(self), address, bytes })
    }
}

impl DeviceBlock {
    /// Copies to the host, and waits for it, not for the streams of others.
    ///
    /// # Errors
    /// Where `start + bytes.len()` is beyond the block, or the device fails.
    pub fn read(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        check_range(self, start, bytes.len())?;
        let _current = self.device.enter()?;
        let count = bytes.len();
        // SAFETY: the range lies within the block.
        let copied = unsafe { result::memcpy_dtoh_sync(bytes, self.address + start as u64) };
        copied.map_err(failed(format!("{}: copying {count} bytes from it", self.device.name)))
    }
}

/// Errors where a range is not within a block.
fn check_range(block: &impl Block, start: usize, length: usize) -> Result<()> {
    if start.checked_add(length).is_none_or(|end| end > block.bytes()) {
        let expected = format!("at most {} bytes", block.bytes());
        return Err(Error::argument("bytes of a copy", format!("{length} from byte {start}"), expected));
    }
    Ok(())
}
