//! Which instruction set the kernels use.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Task;
use super::{Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};

/// An instruction set of the CPU kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What every processor of the compiled target has.
    Scalar,
    /// 256-bit vectors: AVX2, FMA and F16C.
    Avx2,
    /// 512-bit vectors: AVX-512 F, BW, DQ and VL.
    Avx512,
    /// 128-bit vectors of 64-bit Arm.
    Neon,
}

/// A name that is no instruction set, or one that this processor does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CPU instructions {name}: this processor has {}", Isa::names(Isa::available()))]
pub struct UnknownIsa {
    name: String,
}

/// Choice of [`Isa::select`] plus one; 0 before the first use.
static SELECTED: AtomicU8 = AtomicU8::new(0);

impl Isa {
    const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon];

    /// Name, as [`Isa::from_str`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    fn names(all: impl Iterator<Item = Isa>) -> String {
        all.map(Isa::name).collect::<Vec<_>>().join(", ")
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns, reason = "which sets are left depends on the target")]
            _ => false,
        }
    }

    /// What this processor has, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The one that the kernels of this process use: the fastest, unless another was selected.
    pub fn current() -> Isa {
        match SELECTED.load(Ordering::Relaxed) {
            0 => {
                let best = Isa::available().last().unwrap_or(Isa::Scalar);
                SELECTED.store(best as u8 + 1, Ordering::Relaxed);
                best
            }
            i => Isa::ALL[usize::from(i) - 1],
        }
    }

    /// Makes the kernels of this process use it.
    ///
    /// # Errors
    /// Where the processor does not have it.
    pub fn select(self) -> Result<(), UnknownIsa> {
        if !self.is_available() {
            return Err(UnknownIsa { name: self.name().into() });
        }
        SELECTED.store(self as u8 + 1, Ordering::Relaxed);
        Ok(())
    }

    /// Runs `task` with it; with [`Isa::Scalar`] where the processor does not have it.
    pub(in super::super) fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                if let Some(simd) = Avx512::detect() {
                    return simd.run(task);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                if let Some(simd) = Avx2::detect() {
                    return simd.run(task);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => return super::neon::Neon::new().run(task),
            _ => {}
        }
        Portable.run(task)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        let known = Isa::available().find(|isa| isa.name() == name);
        known.ok_or_else(|| UnknownIsa { name: name.into() })
    }
}
