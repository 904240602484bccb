//! What can go wrong on the way to a GPU.

/// Why no GPU can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The crate was built without nvcc.
    #[error(
        "this build has no CUDA kernels: install nvcc (pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*', or set \
         NVCC) and build again"
    )]
    NoKernels,
    /// No driver library.
    #[error("there is no NVIDIA driver: its library {library} cannot be loaded")]
    NoDriver {
        /// The library that was looked for.
        library: &'static str,
    },
    /// A driver that lacks a function that is needed.
    #[error("the NVIDIA driver is too old, it has no {symbol}: install release 580 or later")]
    OldDriver {
        /// The function.
        symbol: &'static str,
    },
    /// A driver that finds no GPU.
    #[error("the NVIDIA driver finds no GPU ({reason})")]
    NoDevice {
        /// What the driver says.
        reason: String,
    },
}

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No GPU can be used.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A weight that cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// A GPU that is not there.
    #[error("there is no GPU {ordinal}, expected a number below {count}")]
    Ordinal {
        /// The number asked for.
        ordinal: usize,
        /// Number of GPUs.
        count: usize,
    },
    /// A GPU that the kernels were not compiled for.
    #[error(
        "{device} has compute capability {capability}, the kernels are compiled for {architectures} (set by \
         MOEPRESS_CUDA_ARCHES when building)"
    )]
    Capability {
        /// Name of the GPU.
        device: String,
        /// Its compute capability.
        capability: String,
        /// What the kernels are compiled for.
        architectures: &'static str,
    },
    /// A call of the driver failed.
    #[error("{what}: {code}")]
    Driver {
        /// What was to be done.
        what: String,
        /// The driver's name of the error.
        code: String,
    },
    /// A launch that the device could not run.
    #[error("kernel {kernel}, {argument}: {found}, expected {expected}")]
    Launch {
        /// The kernel.
        kernel: &'static str,
        /// Which of the launch's arguments.
        argument: &'static str,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// An argument of a call that cannot be.
    #[error("{argument}: {found}, expected {expected}")]
    Argument {
        /// Which one.
        argument: String,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
}

impl Error {
    pub(super) fn argument(
        argument: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Error::Argument { argument: argument.into(), found: found.into(), expected: expected.into() }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
