//! 256-bit vectors.

#[allow(clippy::wildcard_imports, reason = "every name in it says where it comes from")]
use std::arch::x86_64::*;

use super::{NORMAL, Simd, Task, fp8_by_arithmetic, mxfp4_by_arithmetic};
use crate::checkpoint::E2M1_BF16;

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<T: Task>(simd: Avx2, task: T) -> T::Output {
    task.run(simd)
}

/// Rows 0 to 3: vector c of the result holds columns c and c + 4 of the four rows. A macro, because a closure would be
/// compiled without the instructions.
macro_rules! four {
    ($a:expr, $b:expr, $c:expr, $d:expr) => {{
        let (ab, cd) = (_mm256_unpacklo_ps($a, $b), _mm256_unpacklo_ps($c, $d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps($a, $b), _mm256_unpackhi_ps($c, $d));
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let (ab_high, cd_high) = (_mm256_castps_pd(ab_high), _mm256_castps_pd(cd_high));
        [
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
            _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)),
            _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)),
        ]
    }};
}

impl Simd for Avx2 {
    type F = __m256;
    type Block = [__m256; 8];
    const LANES: usize = 8;
    const PANEL_TOKENS: usize = 6;
    const STREAM_TOKENS: usize = 6;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { enter(self, task) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32]) -> __m256 {
        let from = &from[..8];
        // SAFETY: 8 values are there, and `self` proves that the processor has the instructions.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m256, to: &mut [f32]) {
        let to = &mut to[..8];
        // SAFETY: 8 values are there, and `self` proves that the processor has the instructions.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn pow2(self, n: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn block(self, mut row: impl FnMut(usize) -> __m256) -> [__m256; 8] {
        [row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)]
    }

    #[inline(always)]
    fn transpose(self, block: [__m256; 8]) -> [__m256; 8] {
        let r = block;
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let (p, q) = (four!(r[0], r[1], r[2], r[3]), four!(r[4], r[5], r[6], r[7]));
            [
                _mm256_permute2f128_ps::<0x20>(p[0], q[0]),
                _mm256_permute2f128_ps::<0x20>(p[1], q[1]),
                _mm256_permute2f128_ps::<0x20>(p[2], q[2]),
                _mm256_permute2f128_ps::<0x20>(p[3], q[3]),
                _mm256_permute2f128_ps::<0x31>(p[0], q[0]),
                _mm256_permute2f128_ps::<0x31>(p[1], q[1]),
                _mm256_permute2f128_ps::<0x31>(p[2], q[2]),
                _mm256_permute2f128_ps::<0x31>(p[3], q[3]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bits(self, from: *const u8) -> __m256 {
        // SAFETY: the caller vouches for 32 bytes, and `self` for the instructions.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m256 {
        // SAFETY: the caller vouches for 16 bytes, and `self` for the instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    fn bf16_low(self, bits: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(bits))) }
    }

    #[inline(always)]
    fn bf16_high(self, bits: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(bits), mask))
        }
    }

    #[inline(always)]
    fn mxfp4(self, codes: &[u8; 16], scale: u8, to: &mut [u16; 32]) {
        const HIGH: [u8; 16] = half_of_each(1);
        const LOW: [u8; 16] = half_of_each(0);
        if !NORMAL.contains(&scale) {
            return mxfp4_by_arithmetic(codes, scale, to);
        }
        // SAFETY: reads and writes the whole arrays, and `self` proves that the processor has the instructions.
        unsafe {
            let (bytes, mask) = (_mm_loadu_si128(codes.as_ptr().cast()), _mm_set1_epi8(15));
            let even = _mm_and_si128(bytes, mask);
            let odd = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
            let (high, low) = (_mm_loadu_si128(HIGH.as_ptr().cast()), _mm_loadu_si128(LOW.as_ptr().cast()));
            let exponent = _mm_set1_epi16((i16::from(scale) - 127) << 7);
            for (i, index) in
                [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)].into_iter().enumerate()
            {
                let (high, low) = (_mm_shuffle_epi8(high, index), _mm_shuffle_epi8(low, index));
                for (j, words) in
                    [_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)].into_iter().enumerate()
                {
                    let magnitude = _mm_slli_epi16::<1>(words);
                    let is_zero = _mm_cmpeq_epi16(magnitude, _mm_setzero_si128());
                    let words = _mm_add_epi16(words, _mm_andnot_si128(is_zero, exponent));
                    _mm_storeu_si128(to.as_mut_ptr().add(16 * i + 8 * j).cast(), words);
                }
            }
        }
    }

    #[inline(always)]
    fn fp8(self, codes: &[u8; 32], factor: f32, to: &mut [f32; 32]) {
        // The exponent of f16 counts from 15, that of e4m3 from 7.
        let factor_of_f16 = factor * 256.0;
        if !factor_of_f16.is_finite() {
            return fp8_by_arithmetic(codes, factor, to);
        }
        for (codes, to) in codes.as_chunks::<16>().0.iter().zip(to.as_chunks_mut::<16>().0) {
            // SAFETY: reads and writes the whole arrays, and `self` proves that the processor has the instructions.
            unsafe {
                let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(codes.as_ptr().cast()));
                let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(words), _mm256_set1_epi16(i16::MIN));
                let magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
                let is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
                let halves = _mm256_or_si256(_mm256_slli_epi16::<7>(magnitude), sign);
                let halves = _mm256_blendv_epi8(halves, _mm256_set1_epi16(0x7e00), is_nan);
                let factor = _mm256_set1_ps(factor_of_f16);
                let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
                let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
                _mm256_storeu_ps(to.as_mut_ptr(), _mm256_mul_ps(low, factor));
                _mm256_storeu_ps(to.as_mut_ptr().add(8), _mm256_mul_ps(high, factor));
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch reads nothing that the program can see and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// The lower or the upper byte of every FP4 value in bf16.
const fn half_of_each(byte: usize) -> [u8; 16] {
    let mut halves = [0; 16];
    let mut i = 0;
    while i < 16 {
        halves[i] = E2M1_BF16[i].to_le_bytes()[byte];
        i += 1;
    }
    halves
}
