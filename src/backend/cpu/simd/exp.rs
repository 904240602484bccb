//! eˣ and what is made of it.

use super::Simd;

/// eˣ, within 2 ulp of the exact value where that is a normal f32, and +∞ and 0 beyond; NaN stays NaN. x is written as
/// n ln 2 + r with |r| ≤ ½ ln 2, and eʳ is a polynomial (the coefficients are those of Cephes `expf`).
#[inline(always)]
pub(in super::super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond these the result is 0 or ∞ anyway; NaN is the second operand and stays.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    // Adding 1.5 · 2²³ rounds to the nearest integer, ties to even.
    let shift = s.splat(12_582_912.0);
    let round = |v| s.sub(s.add(v, shift), shift);
    let n = round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first with few enough bits for n · part to be exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_2e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(coefficient));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    // In two steps, because 2ⁿ itself may be out of range.
    let half = round(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(p, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// x · σ(x) = x / (1 + e⁻ˣ).
#[inline(always)]
pub(in super::super) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}
