//! 512-bit vectors.

#[allow(clippy::wildcard_imports, reason = "every name in it says where it comes from")]
use std::arch::x86_64::*;

use super::{NORMAL, Simd, Task, dot_bf16_by_fma, fp8_by_arithmetic, mxfp4_by_arithmetic};
use crate::checkpoint::{E2M1_BF16, E4M3};

/// Proof that the processor has AVX-512 F, BW, DQ and VL, and with `BF16` that extension.
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx512<const BF16: bool = false>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(super) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"));
        found.then_some(Avx512(()))
    }
}

/// 32 FP8 codes taken apart.
struct Fp8Parts {
    /// The first bit of each, in the first of 16.
    sign: __m512i,
    /// The other seven, in the last.
    magnitude: __m512i,
    is_nan: __mmask32,
}

impl Fp8Parts {
    #[inline(always)]
    fn new<const BF16: bool>(_: Avx512<BF16>, codes: &[u8; 32]) -> Self {
        // SAFETY: reads the whole array, and the first argument proves that the processor has the instructions.
        unsafe {
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().cast()));
            let magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
            Fp8Parts {
                sign: _mm512_and_si512(_mm512_slli_epi16::<8>(words), _mm512_set1_epi16(i16::MIN)),
                magnitude,
                is_nan: _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn enter<T: Task>(simd: Avx512, task: T) -> T::Output {
    task.run(simd)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn enter_bf16<T: Task>(simd: Avx512<true>, task: T) -> T::Output {
    task.run(simd)
}

/// Rows 0 to 3: vector c of the result holds columns c, c + 4, c + 8 and c + 12 of the four rows. A macro, because a
/// closure would be compiled without the instructions.
macro_rules! four {
    ($a:expr, $b:expr, $c:expr, $d:expr) => {{
        let (ab, cd) = (_mm512_unpacklo_ps($a, $b), _mm512_unpacklo_ps($c, $d));
        let (ab_high, cd_high) = (_mm512_unpackhi_ps($a, $b), _mm512_unpackhi_ps($c, $d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let (ab_high, cd_high) = (_mm512_castps_pd(ab_high), _mm512_castps_pd(cd_high));
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)),
        ]
    }};
}

/// The 4 × 4 transpose of the 128-bit quarters of four vectors.
macro_rules! quarters {
    ($a:expr, $b:expr, $c:expr, $d:expr) => {{
        let ab_even = _mm512_shuffle_f32x4::<0b10_00_10_00>($a, $b);
        let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>($a, $b);
        let cd_even = _mm512_shuffle_f32x4::<0b10_00_10_00>($c, $d);
        let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>($c, $d);
        [
            _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_even, cd_even),
            _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_even, cd_even),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd),
        ]
    }};
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type Block = [__m512; 16];
    const LANES: usize = 16;
    const PANEL_TOKENS: usize = 14;
    const STREAM_TOKENS: usize = 12;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { if BF16 { enter_bf16(Avx512(()), task) } else { enter(Avx512(()), task) } }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, from: &[f32]) -> __m512 {
        let from = &from[..16];
        // SAFETY: 16 values are there, and `self` proves that the processor has the instructions.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32]) {
        let to = &mut to[..16];
        // SAFETY: 16 values are there, and `self` proves that the processor has the instructions.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn block(self, mut row: impl FnMut(usize) -> __m512) -> [__m512; 16] {
        [
            row(0),
            row(1),
            row(2),
            row(3),
            row(4),
            row(5),
            row(6),
            row(7),
            row(8),
            row(9),
            row(10),
            row(11),
            row(12),
            row(13),
            row(14),
            row(15),
        ]
    }

    #[inline(always)]
    fn transpose(self, block: [__m512; 16]) -> [__m512; 16] {
        let r = block;
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let q0 = four!(r[0], r[1], r[2], r[3]);
            let q1 = four!(r[4], r[5], r[6], r[7]);
            let q2 = four!(r[8], r[9], r[10], r[11]);
            let q3 = four!(r[12], r[13], r[14], r[15]);
            let c0 = quarters!(q0[0], q1[0], q2[0], q3[0]);
            let c1 = quarters!(q0[1], q1[1], q2[1], q3[1]);
            let c2 = quarters!(q0[2], q1[2], q2[2], q3[2]);
            let c3 = quarters!(q0[3], q1[3], q2[3], q3[3]);
            [
                c0[0], c1[0], c2[0], c3[0], c0[1], c1[1], c2[1], c3[1], c0[2], c1[2], c2[2], c3[2], c0[3],
                c1[3], c2[3], c3[3],
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bits(self, from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for 64 bytes, and `self` for the instructions.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for 32 bytes, and `self` for the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    fn bf16_low(self, bits: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(bits))) }
    }

    #[inline(always)]
    fn bf16_high(self, bits: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let mask = _mm512_set1_epi32(0xffff_0000u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(bits), mask))
        }
    }

    #[inline(always)]
    fn dot_bf16(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        if !BF16 {
            return dot_bf16_by_fma(self, a, b, c);
        }
        // SAFETY: vectors of as many bits, and `self` proves that the processor has the instruction.
        unsafe {
            use std::mem::transmute;
            _mm512_dpbf16_ps(c, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b))
        }
    }

    #[inline(always)]
    fn mxfp4(self, codes: &[u8; 16], scale: u8, to: &mut [u16; 32]) {
        if !NORMAL.contains(&scale) {
            return mxfp4_by_arithmetic(codes, scale, to);
        }
        // SAFETY: reads and writes the whole arrays, and `self` proves that the processor has the instructions.
        unsafe {
            // A byte a lane, its halves in the two words: the lower one of (a | a << 12) & mask is code 2i.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let (shifted, mask) = (_mm512_slli_epi32::<12>(bytes), _mm512_set1_epi32(0x000f_000f));
            let index = _mm512_ternarylogic_epi32::<0b1010_1000>(bytes, shifted, mask);
            // Codes 0 and 8 are the zeros.
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(E2M1_BF16.as_ptr().cast()));
            let exponent = _mm512_set1_epi16((i16::from(scale) - 127) << 7);
            let table = _mm512_mask_add_epi16(table, 0xfefe_fefe, table, exponent);
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_permutexvar_epi16(index, table));
        }
    }

    #[inline(always)]
    fn fp8_bf16(self, codes: &[u8; 32], to: &mut [u16; 32]) {
        // Multiples of 1/512 have no leading one.
        const SMALL: [u16; 8] = {
            let mut small = [0; 8];
            let mut i = 0;
            while i < 8 {
                small[i] = (E4M3[i].to_bits() >> 16) as u16;
                i += 1;
            }
            small
        };
        // SAFETY: reads and writes the whole arrays, and `self` proves that the processor has the instructions.
        unsafe {
            let Fp8Parts { sign, magnitude, is_nan } = Fp8Parts::new(self, codes);
            let is_small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
            // The exponent of bf16 counts from 127, that of e4m3 from 7.
            let values = _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16(120 << 7));
            let small = _mm512_broadcast_i32x4(_mm_loadu_si128(SMALL.as_ptr().cast()));
            let values = _mm512_mask_permutexvar_epi16(values, is_small, magnitude, small);
            let values = _mm512_mask_blend_epi16(is_nan, values, _mm512_set1_epi16(0x7fc0));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_or_si512(values, sign));
        }
    }

    #[inline(always)]
    fn fp8(self, codes: &[u8; 32], factor: f32, to: &mut [f32; 32]) {
        // The exponent of f16 counts from 15, that of e4m3 from 7.
        let factor_of_f16 = factor * 256.0;
        if !factor_of_f16.is_finite() {
            return fp8_by_arithmetic(codes, factor, to);
        }
        // SAFETY: reads and writes the whole arrays, and `self` proves that the processor has the instructions.
        unsafe {
            let Fp8Parts { sign, magnitude, is_nan } = Fp8Parts::new(self, codes);
            let halves = _mm512_or_si512(_mm512_slli_epi16::<7>(magnitude), sign);
            let halves = _mm512_mask_blend_epi16(is_nan, halves, _mm512_set1_epi16(0x7e00));
            let factor = _mm512_set1_ps(factor_of_f16);
            let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves));
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(low, factor));
            _mm512_storeu_ps(to.as_mut_ptr().add(16), _mm512_mul_ps(high, factor));
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch reads nothing that the program can see and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
