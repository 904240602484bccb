//! Exponentials of every instruction set against f64, and packed numbers against their tables.

use super::*;
use crate::checkpoint::{E2M1, E4M3, e8m0};

struct Map<'a> {
    f: Function,
    values: &'a mut [f32],
}

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Silu,
}

impl Task for Map<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for chunk in self.values.chunks_exact_mut(S::LANES) {
            let x = s.load(chunk);
            let y = match self.f {
                Function::Exp => exp::exp(s, x),
                Function::Silu => exp::silu(s, x),
            };
            s.store(y, chunk);
        }
    }
}

fn map(isa: Isa, f: Function, values: &[f32]) -> Vec<f32> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(MAX_LANES), 0.0);
    isa.run(Map { f, values: &mut padded });
    padded.truncate(values.len());
    padded
}

/// Distance in units of the last place of the exact value.
fn ulps(found: f32, exact: f64) -> f64 {
    let place = f64::from((exact as f32).abs().max(f32::MIN_POSITIVE));
    let ulp = (place.log2().floor() - 23.0).exp2();
    (f64::from(found) - exact).abs() / ulp
}

#[test]
fn exp_is_within_two_ulps() {
    let x: Vec<f32> = (0..2_000_000).map(|i| -87.3 + i as f32 * (176.0 / 2e6)).collect();
    for isa in Isa::available() {
        let mut worst = 0.0f64;
        for (x, y) in x.iter().zip(map(isa, Function::Exp, &x)) {
            worst = worst.max(ulps(y, f64::from(*x).exp()));
        }
        assert!(worst <= 2.0, "{isa}: {worst} ulp");
    }
}

#[test]
fn exp_of_the_extremes() {
    let x = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, -100.0, 88.72];
    for isa in Isa::available() {
        let y = map(isa, Function::Exp, &x);
        assert_eq!(y[..4], [1.0, 1.0, f32::INFINITY, 0.0], "{isa}");
        assert!(y[4].is_nan(), "{isa}");
        assert_eq!(y[5..7], [f32::INFINITY, 0.0], "{isa}");
        // A subnormal keeps what precision it has.
        assert!((f64::from(y[7]) - (-100.0f64).exp()).abs() < 2e-45, "{isa}");
        assert!(y[8].is_finite(), "{isa}");
    }
}

#[test]
fn silu_is_precise() {
    let x: Vec<f32> = (-30_000..30_000).map(|i| i as f32 * 1e-3).chain([-200.0, -88.0, 200.0, 0.0]).collect();
    for isa in Isa::available() {
        for (x, y) in x.iter().zip(map(isa, Function::Silu, &x)) {
            let exact = f64::from(*x) / (1.0 + (-f64::from(*x)).exp());
            assert!((f64::from(y) - exact).abs() <= 4e-7 * exact.abs() + 1e-37, "{isa}: silu({x}) = {y}");
        }
    }
}

/// MXFP4 blocks and FP8 codes, decoded.
struct Decode<'a> {
    codes: &'a [u8; 32],
    scale: u8,
    factor: f32,
}

impl Task for Decode<'_> {
    type Output = ([u16; 32], [u16; 32], [f32; 32]);

    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut four, mut bare, mut eight) = ([0; 32], [0; 32], [0.0; 32]);
        s.mxfp4(self.codes.first_chunk().unwrap(), self.scale, &mut four);
        s.fp8_bf16(self.codes, &mut bare);
        s.fp8(self.codes, self.factor, &mut eight);
        (four, bare, eight)
    }
}

/// Every code with scales of every kind: zeros keep their sign, subnormal products are exact, NaN stays NaN.
#[test]
fn packed_numbers_are_those_of_the_tables() {
    let scales =
        (0..=255).zip([1.0, 0.37, -3.5e-3, 1e-40, 2e38, f32::INFINITY, 3e-38, 0.0].into_iter().cycle());
    for (scale, factor) in scales {
        for start in (0..=255).step_by(32) {
            let codes = std::array::from_fn(|i| start + i as u8);
            for isa in Isa::available() {
                let (four, bare, eight) = isa.run(Decode { codes: &codes, scale, factor });
                let exact = codes[..16].iter().flat_map(|code| [code & 15, code >> 4]);
                for (found, code) in four.into_iter().zip(exact) {
                    let (found, value) = (f32::from_bits(u32::from(found) << 16), E2M1[usize::from(code)]);
                    let expected = value * e8m0(scale);
                    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                    // Beyond the largest scale of a file that is read.
                    assert!(same || expected.is_infinite(), "{isa}: {code} with {scale} is {found}");
                }
                for (found, code) in bare.into_iter().zip(codes) {
                    let (found, value) = (f32::from_bits(u32::from(found) << 16), E4M3[usize::from(code)]);
                    let same = found.to_bits() == value.to_bits() || found.is_nan() && value.is_nan();
                    assert!(same, "{isa}: {code} is {found}");
                }
                for (found, code) in eight.into_iter().zip(codes) {
                    let expected = E4M3[usize::from(code)] * factor;
                    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                    assert!(same, "{isa}: {code} times {factor} is {found}");
                }
            }
        }
    }
}

#[test]
fn names_are_read_back() {
    for isa in Isa::available() {
        assert_eq!(isa.name().parse(), Ok(isa));
    }
    let error = "sse9".parse::<Isa>().unwrap_err().to_string();
    assert!(error.starts_with("CPU instructions sse9: this processor has scalar"), "{error}");
}
