//! The seam between what is launched and who runs it.

use super::Result;

/// A stream that runs kernels in order: of a GPU, or the emulation of one in the tests. What a layer launches is written
/// once, over this trait.
pub trait Launch {
    /// Enqueues one kernel with `grid` blocks of `block` threads and `shared` bytes of dynamic shared memory. `params`
    /// are the bytes of the kernel's one parameter, a structure of `cuda/params.cuh`. `follows` says that what was enqueued
    /// before is another of these kernels: it may start while that one ends, for which it waits itself.
    ///
    /// # Errors
    /// Names the kernel and its shape where the device cannot run it.
    ///
    /// # Safety
    /// `params` must be what the kernel takes, its pointers must be valid for what the kernel reads and writes until the
    /// stream has passed it.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[u8],
        follows: bool,
    ) -> Result<()>;

    /// Number of multiprocessors, from which grids are made.
    fn multiprocessors(&self) -> u32;

    /// Bytes of shared memory in a multiprocessor, which decide how many blocks share one.
    fn shared_per_multiprocessor(&self) -> u32;
}

/// Memory of the device that a [`Launch`] runs on. Used for preparing only, never on the way of a token.
pub trait Memory {
    /// A block of memory, freed when dropped.
    type Block: Block;

    /// Uninitialised memory, aligned to 256 bytes at least.
    ///
    /// # Errors
    /// Where there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Self::Block>;
}

/// A block of device memory.
pub trait Block: Send + Sync {
    /// Its address on the device.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn bytes(&self) -> usize;

    /// Copies to it from the host, and waits.
    ///
    /// # Errors
    /// Where `start + bytes.len()` is beyond the block, or the device fails.
    fn write(&self, start: usize, bytes: &[u8]) -> Result<()>;
}

impl<B: Block + ?Sized> Block for Box<B> {
    fn address(&self) -> u64 {
        (**self).address()
    }

    fn bytes(&self) -> usize {
        (**self).bytes()
    }

    fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        (**self).write(start, bytes)
    }
}
