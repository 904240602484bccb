//! Which instruction set the kernels use.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Task;
use super::{Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::{amx::Amx, avx2::Avx2, avx512::Avx512};

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
    /// AVX-512 with its products of bf16. Multiplying by a bf16 matrix (of an even number of columns) rounds the other
    /// side to bf16 and is twice as fast; sums stay f32. So results differ from those of the others, which agree among
    /// each other: it has to be selected. Routers are computed as with [`Isa::Avx512`].
    Avx512Bf16,
    /// AVX-512 with tiles of bf16 (AMX). Products with bf16 matrices, and with FP8 codes, whose scales multiply the sums of
    /// a block, take both sides as they are, but in another order than the others, so that the last bits of their sums
    /// differ.
    Amx,
    /// The same, with the other side of these products rounded to bf16. It has to be selected. Routers are computed as with
    /// [`Isa::Amx`].
    AmxBf16,
}

/// A name that is no instruction set, or one that this processor does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CPU instructions {name}: this processor has {}", Isa::names(Isa::selectable()))]
pub struct UnknownIsa {
    name: String,
}

/// Choice of [`Isa::select`] plus one; 0 before the first use.
static SELECTED: AtomicU8 = AtomicU8::new(0);

impl Isa {
    const ALL: [Isa; 7] =
        [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Neon, Isa::Avx512Bf16, Isa::Amx, Isa::AmxBf16];

    /// Name, as [`Isa::from_str`] takes it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
            Isa::AmxBf16 => "amxbf16",
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
            Isa::Avx512 => <Avx512>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::<true>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::AmxBf16 => Amx::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns, reason = "which sets are left depends on the target")]
            _ => false,
        }
    }

    /// What this processor has of those that keep both sides of a product as they are, slowest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::selectable().filter(|isa| !isa.rounds())
    }

    fn selectable() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether products with bf16 matrices round the other side to bf16.
    pub fn rounds(self) -> bool {
        matches!(self, Isa::Avx512Bf16 | Isa::AmxBf16)
    }

    /// The same without that rounding.
    #[must_use]
    pub fn exact(self) -> Isa {
        match self {
            Isa::Avx512Bf16 => Isa::Avx512,
            Isa::AmxBf16 => Isa::Amx,
            _ => self,
        }
    }

    /// Whether all products are those of [`Isa::Avx2`], [`Isa::Avx512`] and [`Isa::Neon`] to the last bit; of
    /// [`Isa::Scalar`] too, where the program is compiled for fused multiply-add.
    pub fn agrees(self) -> bool {
        match self {
            Isa::Scalar => cfg!(any(target_feature = "fma", target_arch = "aarch64")),
            Isa::Avx2 | Isa::Avx512 | Isa::Neon => true,
            Isa::Avx512Bf16 | Isa::Amx | Isa::AmxBf16 => false,
        }
    }

    /// The tiles that multiply bf16 matrices, where it has them.
    #[cfg(target_arch = "x86_64")]
    pub(in super::super) fn amx(self) -> Option<Amx> {
        if matches!(self, Isa::Amx | Isa::AmxBf16) { Amx::detect() } else { None }
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
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx | Isa::AmxBf16 => {
                if let Some(simd) = <Avx512>::detect() {
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

    /// Runs `task` with instructions for products of bf16 where it has them, else like [`Isa::run`].
    pub(in super::super) fn run_bf16<T: Task>(self, task: T) -> T::Output {
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(simd)) = (self.rounds(), Avx512::<true>::detect()) {
            return simd.run(task);
        }
        self.run(task)
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
        let known = Isa::selectable().find(|isa| isa.name() == name);
        known.ok_or_else(|| UnknownIsa { name: name.into() })
    }
}
