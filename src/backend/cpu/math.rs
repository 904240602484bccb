//! Scalar functions and the dot product of fixed summation order.

/// 1 / (1 + e^−x).
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Number of independent partial sums of [`dot`].
const LANES: usize = 16;

/// Σ aᵢ bᵢ in an order that depends on the length alone: the value of one router logit must not change when other
/// rows of the router are removed, which a blocked GEMM does not promise.
#[inline]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for (lane, (p, q)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += p * q;
        }
    }
    for (lane, (p, q)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += p * q;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
