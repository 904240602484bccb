//! 128-bit vectors of 64-bit Arm, where every processor has them.

#[allow(clippy::wildcard_imports, reason = "every name in it says where it comes from")]
use std::arch::aarch64::*;

use half::f16;

use super::{Simd, Task};

/// The instructions are part of the target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Neon(());

impl Neon {
    pub(super) fn new() -> Self {
        Neon(())
    }
}

impl Simd for Neon {
    type F = float32x4_t;
    type Block = [float32x4_t; 4];
    const LANES: usize = 4;
    const PANEL_TOKENS: usize = 12;
    const STREAM_TOKENS: usize = 12;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        task.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32]) -> float32x4_t {
        let from = &from[..4];
        // SAFETY: 4 values are there, and every 64-bit Arm processor has the instructions.
        unsafe { vld1q_f32(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: float32x4_t, to: &mut [f32]) {
        let to = &mut to[..4];
        // SAFETY: 4 values are there, and every 64-bit Arm processor has the instructions.
        unsafe { vst1q_f32(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn pow2(self, n: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe {
            let biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        }
    }

    #[inline(always)]
    fn block(self, mut row: impl FnMut(usize) -> float32x4_t) -> [float32x4_t; 4] {
        [row(0), row(1), row(2), row(3)]
    }

    #[inline(always)]
    fn transpose(self, block: [float32x4_t; 4]) -> [float32x4_t; 4] {
        let [a, b, c, d] = block;
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe {
            let (ab, ab_odd) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
            let (cd, cd_odd) = (vtrn1q_f32(c, d), vtrn2q_f32(c, d));
            let low = |x, y| vcombine_f32(vget_low_f32(x), vget_low_f32(y));
            let high = |x, y| vcombine_f32(vget_high_f32(x), vget_high_f32(y));
            [low(ab, cd), low(ab_odd, cd_odd), high(ab, cd), high(ab_odd, cd_odd)]
        }
    }

    #[inline(always)]
    unsafe fn load_bits(self, from: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for 16 bytes, which have no alignment.
        unsafe { vreinterpretq_f32_u8(vld1q_u8(from)) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for 8 bytes, and bytes have no alignment.
        let bytes = unsafe { from.cast::<[[u8; 2]; 4]>().read() };
        self.load(&bytes.map(|b| f16::from_le_bytes(b).to_f32()))
    }

    #[inline(always)]
    fn bf16_low(self, bits: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_f32(bits))) }
    }

    #[inline(always)]
    fn bf16_high(self, bits: float32x4_t) -> float32x4_t {
        // SAFETY: every 64-bit Arm processor has the instructions.
        unsafe { vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(bits), vdupq_n_u32(0xffff_0000))) }
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}
