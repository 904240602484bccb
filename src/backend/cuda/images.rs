//! The compiled kernels, embedded.

/// One source file of `cuda/`, compiled.
#[derive(Debug)]
pub(super) struct Image {
    /// The file's name.
    pub(super) source: &'static str,
    /// A fat binary: machine code for some architectures, PTX for others.
    pub(super) bytes: &'static [u8],
}

/// The driver reads fat binaries in words.
#[allow(dead_code, reason = "without nvcc there are none")]
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

include!(concat!(env!("OUT_DIR"), "/images.rs"));
