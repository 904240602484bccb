//! Exponentials of every instruction set against f64.

use super::*;

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

#[test]
fn names_are_read_back() {
    for isa in Isa::available() {
        assert_eq!(isa.name().parse(), Ok(isa));
    }
    let error = "sse9".parse::<Isa>().unwrap_err().to_string();
    assert!(error.starts_with("CPU instructions sse9: this processor has scalar"), "{error}");
}
