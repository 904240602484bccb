//! Vectors of f32 of the instruction sets that the kernels are written for, chosen once at run time.
//!
//! Kernels are generic over [`Simd`] and safe: a value of a `Simd` type exists only where the processor has the
//! instructions. Every operation is exact or correctly rounded per lane, so a kernel that adds up in a fixed order
//! gives the same bits on every instruction set with fused multiply-add; [`Isa::Scalar`] has none on x86-64 and differs
//! in the last bits there.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(super) mod exp;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub use isa::{Isa, UnknownIsa};

use crate::checkpoint::{decode_mxfp4, e4m3};

/// Most lanes of any vector type.
pub(super) const MAX_LANES: usize = 16;

/// Code to run with the instructions of one [`Simd`] type. Implementations are `#[inline(always)]`, so that they are
/// compiled into the function that enables the instructions.
pub(super) trait Task {
    /// What it returns.
    type Output;
    /// Runs it.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set. A value is the proof that the processor has it.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type F: Copy;
    /// As many vectors as a vector has lanes.
    type Block: Copy + AsRef<[Self::F]> + AsMut<[Self::F]>;
    /// Lanes of a vector.
    const LANES: usize;
    /// Tokens that the packed kernel keeps in registers, at two vectors each.
    const PANEL_TOKENS: usize;
    /// Tokens that the streaming kernel keeps in registers beside a block.
    const STREAM_TOKENS: usize;

    /// Runs `task` with the instructions enabled.
    fn run<T: Task>(self, task: T) -> T::Output;
    /// `value` in all lanes.
    fn splat(self, value: f32) -> Self::F;
    /// The first [`Simd::LANES`] values.
    fn load(self, from: &[f32]) -> Self::F;
    /// Writes the first [`Simd::LANES`] values.
    fn store(self, value: Self::F, to: &mut [f32]);
    /// a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a − b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the processor can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where one is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// 2ⁿ of integers from −126 to 127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// A block whose vectors are `rows`.
    fn block(self, row: impl FnMut(usize) -> Self::F) -> Self::Block;
    /// Vector i of the result holds lane i of every vector.
    fn transpose(self, block: Self::Block) -> Self::Block;
    /// The bits at `from`, unaligned, little-endian.
    ///
    /// # Safety
    /// `4 · LANES` bytes must be readable.
    unsafe fn load_bits(self, from: *const u8) -> Self::F;
    /// f16 values at `from`, unaligned, widened.
    ///
    /// # Safety
    /// `2 · LANES` bytes must be readable.
    unsafe fn load_f16(self, from: *const u8) -> Self::F;
    /// The bf16 values in the low halves of the lanes, widened.
    fn bf16_low(self, bits: Self::F) -> Self::F;
    /// The bf16 values in the high halves of the lanes, widened.
    fn bf16_high(self, bits: Self::F) -> Self::F;
    /// c + a · b of the bf16 values in the high, then in the low halves of the lanes.
    #[inline(always)]
    fn dot_bf16(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        dot_bf16_by_fma(self, a, b, c)
    }
    /// Asks for the cache line at `at`, which need not be readable.
    fn prefetch(self, at: *const u8);
    /// The 32 values of a block of MXFP4, all of which are bf16 values: two codes a byte, the lower half first, times
    /// 2^(scale − 127).
    #[inline(always)]
    fn mxfp4(self, codes: &[u8; 16], scale: u8, to: &mut [u16; 32]) {
        mxfp4_by_arithmetic(codes, scale, to);
    }
    /// The values of FP8 e4m3 codes, all of which are bf16 values.
    #[inline(always)]
    fn fp8_bf16(self, codes: &[u8; 32], to: &mut [u16; 32]) {
        for (to, &code) in to.iter_mut().zip(codes) {
            *to = (e4m3(code).to_bits() >> 16) as u16;
        }
    }
    /// The values of FP8 e4m3 codes, times `factor`.
    #[inline(always)]
    fn fp8(self, codes: &[u8; 32], factor: f32, to: &mut [f32; 32]) {
        fp8_by_arithmetic(codes, factor, to);
    }
}

/// Scales of MXFP4 with which all values are normal numbers or 0, so that a scale is added to exponents.
const NORMAL: std::ops::RangeInclusive<u8> = 2..=252;

#[inline(always)]
fn mxfp4_by_arithmetic(codes: &[u8; 16], scale: u8, to: &mut [u16; 32]) {
    let mut values = [0.0; 32];
    decode_mxfp4(codes, scale, &mut values);
    for (to, value) in to.iter_mut().zip(values) {
        *to = (value.to_bits() >> 16) as u16;
    }
}

#[inline(always)]
fn fp8_by_arithmetic(codes: &[u8], factor: f32, to: &mut [f32]) {
    for (to, &code) in to.iter_mut().zip(codes) {
        *to = e4m3(code) * factor;
    }
}

/// [`Simd::dot_bf16`] of instructions that have no such product.
#[inline(always)]
fn dot_bf16_by_fma<S: Simd>(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
    let high = s.fma(s.bf16_high(a), s.bf16_high(b), c);
    s.fma(s.bf16_low(a), s.bf16_low(b), high)
}

#[cfg(test)]
mod tests;
