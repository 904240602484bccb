//! Scalar functions.

/// 1 / (1 + e^−x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// ln(1 + eˣ).
pub(super) fn softplus(x: f32) -> f32 {
    // Beyond, eˣ is all that counts; it would overflow at 89.
    if x > 20.0 { x } else { x.exp().ln_1p() }
}
