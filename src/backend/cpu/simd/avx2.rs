//! 256-bit vectors.

#[allow(clippy::wildcard_imports, reason = "every name in it says where it comes from")]
use std::arch::x86_64::*;

use super::{Simd, Task};

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
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch reads nothing that the program can see and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
