//! The numbers of packed checkpoints: eight-bit and four-bit floats, four-bit integers and power-of-two scales, decoded
//! exactly.

use super::{Dtype, Tensor};

/// Value of every FP8 e4m3 code (Micikevicius et al., arXiv 2209.05433, §3; the variant without infinities): 1 bit of
/// sign, 4 of exponent with bias 7, 3 of mantissa; NaN at 0x7f and 0xff.
pub const E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
        let magnitude = if code & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 / 512.0
        } else {
            // Exponent biased for f32, mantissa at the top of its 23 bits.
            f32::from_bits(((exponent + 120) << 23 | mantissa << 20) as u32)
        };
        values[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    values
};

/// Value of every FP4 e2m1 code (OCP Microscaling Formats 1.0, §5.3.3).
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// [`E2M1`] in bf16, which holds it exactly.
pub(crate) const E2M1_BF16: [u16; 16] = {
    let mut values = [0; 16];
    let mut code = 0;
    while code < 16 {
        values[code] = (E2M1[code].to_bits() >> 16) as u16;
        code += 1;
    }
    values
};

/// Values that share a scale in MXFP4 (OCP Microscaling Formats 1.0, §5.2).
pub(crate) const MX_BLOCK: usize = 32;

/// 2^(code − 127), the E8M0 scale of the microscaling formats; 255 stands for NaN.
pub const fn e8m0(code: u8) -> f32 {
    match code {
        // Below the smallest normal f32.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits((code as u32) << 23),
    }
}

/// Largest E8M0 code whose product with every FP4 value is a finite f32: 6 · 2^125.
pub(super) const E8M0_LARGEST: u8 = 252;

/// Largest FP8 value.
pub(super) const E4M3_LARGEST: f32 = 448.0;

/// The same for every FP8 value: 448 · 2^119.
pub(super) const E8M0_LARGEST_OF_FP8: u8 = 246;

/// [`E4M3`] by arithmetic, which vectors can do.
#[inline(always)]
pub(crate) fn e4m3(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    // Exponent biased for f32; below 8 there is no leading one.
    let normal = (magnitude << 20) + (120 << 23);
    let bits = if magnitude < 8 { (magnitude as f32 / 512.0).to_bits() } else { normal };
    let bits = if magnitude == 0x7f { f32::NAN.to_bits() } else { bits };
    f32::from_bits(bits | sign)
}

/// [`E2M1`] by arithmetic, which vectors can do.
#[inline(always)]
fn e2m1(code: u8) -> f32 {
    let (sign, magnitude) = (u32::from(code & 8) << 28, u32::from(code & 7));
    let normal = (magnitude << 22) + (126 << 23);
    let bits = if magnitude < 2 { (magnitude as f32 / 2.0).to_bits() } else { normal };
    f32::from_bits(bits | sign)
}

/// The 32 values of one MXFP4 block: 16 bytes of two codes, the lower half-byte first, times 2^(scale − 127).
#[inline(always)]
pub(crate) fn decode_mxfp4(block: &[u8; MX_BLOCK / 2], scale: u8, out: &mut [f32; MX_BLOCK]) {
    let scale = e8m0(scale);
    for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
        *pair = [e2m1(byte & 15) * scale, e2m1(byte >> 4) * scale];
    }
}

/// Four-bit integers plus 8, two to a byte and the lower half first, times `scale`.
#[inline(always)]
pub(crate) fn decode_int4(codes: &[u8], scale: f32, out: &mut [f32]) {
    let value = |code: u8| (f32::from(code) - 8.0) * scale;
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(codes) {
        *pair = [value(byte & 15), value(byte >> 4)];
    }
    for (out, &byte) in last.iter_mut().zip(&codes[codes.len().min(pairs.len())..]) {
        *out = value(byte & 15);
    }
}

/// How the scales of packed weights, and of their inputs, are called.
const SCALES: [&str; 4] = ["_scale_inv", ".weight_scale", ".input_scale", "activation_scale"];

impl Tensor {
    /// Number of parameters that the tensor stands for: two per byte of MXFP4 blocks, eight per number of packed integers
    /// (those that fill the last of a row too), none in the scales and shapes of packed weights and in the numbers of dense
    /// rows, else its elements. These are told by name and type.
    pub fn parameters(&self) -> u64 {
        let ends = |suffix: &str| self.name().ends_with(suffix);
        match self.dtype() {
            Dtype::U8 if ends("_blocks") => 2 * self.len() as u64,
            Dtype::U8 if ends("_scales") => 0,
            Dtype::I32 if ends(".weight_packed") => 8 * self.len() as u64,
            Dtype::I32 | Dtype::I64 if ends(".rows") || ends(".weight_shape") => 0,
            Dtype::F8_E8M0 => 0,
            Dtype::F32 | Dtype::BF16 | Dtype::F16 if SCALES.iter().any(|suffix| ends(suffix)) => 0,
            _ => self.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the tables of the papers: extremes, subnormals, ones, and the sign.
    #[test]
    fn fp8_values() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x09, 0.017_578_125),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x40, 2.0),
            (0x77, 240.0),
            (0x78, 256.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(E4M3[code], value, "{code:#x}");
            assert_eq!(E4M3[code | 0x80].to_bits(), (-value).to_bits(), "{:#x}", code | 0x80);
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert_eq!(E4M3.iter().filter(|v| v.is_nan()).count(), 2);
        assert!(E4M3[..0x7f].windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn arithmetic_gives_the_tables() {
        for code in 0..=255 {
            assert_eq!(e4m3(code).to_bits(), E4M3[usize::from(code)].to_bits(), "{code:#x}");
        }
        for code in 0..16 {
            assert_eq!(e2m1(code).to_bits(), E2M1[usize::from(code)].to_bits(), "{code:#x}");
        }
    }

    #[test]
    fn power_of_two_scales() {
        for (code, exponent) in [(0u8, -127), (1, -126), (126, -1), (127, 0), (128, 1), (254, 127)] {
            assert_eq!(f64::from(e8m0(code)), 2f64.powi(exponent), "{code}");
        }
        assert!(e8m0(255).is_nan());
        let [most, over] = [E8M0_LARGEST_OF_FP8, E8M0_LARGEST_OF_FP8 + 1];
        assert!((448.0 * e8m0(most)).is_finite() && (448.0 * e8m0(over)).is_infinite());
        assert!((6.0 * e8m0(E8M0_LARGEST)).is_finite() && (6.0 * e8m0(E8M0_LARGEST + 1)).is_infinite());
    }

    #[test]
    fn mxfp4_blocks() {
        let mut block = [0; 16];
        block[..8].copy_from_slice(&[0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
        let mut out = [f32::NAN; 32];
        decode_mxfp4(&block, 128, &mut out);
        assert_eq!(out[..8], [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]);
        assert_eq!(out[8..16], [-0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0]);
        assert!(out[8].is_sign_negative() && out[16..].iter().all(|v| *v == 0.0));
        // Down to the smallest scale, where products are subnormal, nothing is rounded.
        decode_mxfp4(&block, 0, &mut out);
        assert_eq!(f64::from(out[1]), 2f64.powi(-128));
        assert_eq!(f64::from(out[15]), -6.0 * 2f64.powi(-127));
    }
}
