//! Norms, activations and sums.

use rayon::prelude::*;

use super::CpuBuffer;
use super::math::{sigmoid, softplus};
use super::simd::exp::silu;
use super::simd::{Isa, MAX_LANES, Simd, Task};
use super::softmax::Softmax;
use crate::architecture::Activation;
use crate::backend::HeadLayout;

/// Values per parallel piece.
const PIECE: usize = 1 << 14;

fn normalise(x: &mut [f32], weight: &[f32], eps: f32) {
    // f64: 4096 squares in f32 lose more than the norm's own rounding.
    let sum: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    let inverse = (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
    for (v, w) in x.iter_mut().zip(weight) {
        *v = *v * inverse * w;
    }
}

/// The layer norm: f64 sums for the same reason.
fn normalise_with_mean(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let count = x.len() as f64;
    let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let variance = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
    let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
    for (v, (w, b)) in x.iter_mut().zip(weight.iter().zip(bias)) {
        *v = ((f64::from(*v) - mean) * inverse) as f32 * w + b;
    }
}

pub(super) fn norm(x: &CpuBuffer, weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut CpuBuffer) {
    let rows = out.data.par_chunks_exact_mut(weight.len()).zip(x.data.par_chunks_exact(x.cols));
    rows.with_min_len(16).for_each(|(out, x)| {
        out.copy_from_slice(&x[..weight.len()]);
        match bias {
            None => normalise(out, weight, eps),
            Some(bias) => normalise_with_mean(out, weight, bias, eps),
        }
    });
}

pub(super) fn rms_norm_heads(x: &mut CpuBuffer, weight: &[f32], eps: f32) {
    x.data.par_chunks_exact_mut(weight.len()).with_min_len(64).for_each(|head| normalise(head, weight, eps));
}

pub(super) fn rms_norm_groups(x: &mut CpuBuffer, weight: &[f32], groups: usize, eps: f32) {
    let width = weight.len() / groups;
    x.data.par_chunks_exact_mut(weight.len()).with_min_len(16).for_each(|row| {
        for (group, weight) in row.chunks_exact_mut(width).zip(weight.chunks_exact(width)) {
            normalise(group, weight, eps);
        }
    });
}

/// Adds `bias` to every row of `x`.
pub(crate) fn add_bias(x: &mut [f32], bias: &[f32]) {
    x.par_chunks_exact_mut(bias.len()).with_min_len(16).for_each(|row| {
        for (v, b) in row.iter_mut().zip(bias) {
            *v += b;
        }
    });
}

pub(super) fn clamp(x: &mut CpuBuffer, limit: f32) {
    x.data.par_chunks_mut(PIECE).for_each(|piece| {
        for v in piece {
            *v = v.clamp(-limit, limit);
        }
    });
}

/// The activation of `gate`, in place; `up` is used by gated ones alone.
pub(crate) fn activate(gate: &mut [f32], up: &[f32], activation: Activation) {
    if !activation.is_gated() {
        return gate.par_chunks_mut(PIECE).for_each(|gate| activate_alone(gate, activation));
    }
    gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE)).for_each(|(gate, up)| match activation {
        Activation::SwiGlu => Isa::current().run(Swiglu { gate, up }),
        Activation::ClampedSwiGlu { limit, slope } => {
            for (g, u) in gate.iter_mut().zip(up) {
                // Unlike `min`, lets NaN through.
                let clamped = if *g > limit { limit } else { *g };
                *g = clamped * sigmoid(slope * clamped) * (u.clamp(-limit, limit) + 1.0);
            }
        }
        Activation::GeGluTanh => {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = gelu_tanh(*g) * u;
            }
        }
        Activation::Relu | Activation::SquaredRelu | Activation::GeluTanh => unreachable!("not gated"),
    });
}

/// Activations without a gate, in place.
fn activate_alone(x: &mut [f32], activation: Activation) {
    match activation {
        // Unlike `max`, lets NaN through.
        Activation::Relu => x.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v }),
        Activation::SquaredRelu => x.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v * *v }),
        Activation::GeluTanh => x.iter_mut().for_each(|v| *v = gelu_tanh(*v)),
        Activation::SwiGlu | Activation::ClampedSwiGlu { .. } | Activation::GeGluTanh => {
            unreachable!("gated")
        }
    }
}

/// GELU by its tanh approximation.
fn gelu_tanh(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    x * (0.5 * (1.0 + inner.tanh()))
}

/// silu(gate) ∘ up into `gate`.
struct Swiglu<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Task for Swiglu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.gate.len() - self.gate.len() % S::LANES;
        let (gate, gate_rest) = self.gate.split_at_mut(whole);
        let (up, up_rest) = self.up.split_at(whole);
        for (gate, up) in gate.chunks_exact_mut(S::LANES).zip(up.chunks_exact(S::LANES)) {
            let value = s.mul(silu(s, s.load(gate)), s.load(up));
            s.store(value, gate);
        }
        // The rest by the same instructions, so that a value does not depend on where it lies.
        let mut lanes = [0.0; MAX_LANES];
        lanes[..gate_rest.len()].copy_from_slice(gate_rest);
        let value = silu(s, s.load(&lanes));
        s.store(value, &mut lanes);
        for ((gate, up), value) in gate_rest.iter_mut().zip(up_rest).zip(lanes) {
            *gate = value * up;
        }
    }
}

pub(super) fn scale(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(PIECE).for_each(|x| x.iter_mut().for_each(|v| *v *= factor));
}

pub(super) fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| {
        for (a, b) in x.iter_mut().zip(y) {
            *a += b;
        }
    });
}

pub(super) fn multiply(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| {
        for (a, b) in x.iter_mut().zip(y) {
            *a *= b;
        }
    });
}

pub(super) fn copy_heads(x: &CpuBuffer, heads: HeadLayout, width: usize, out: &mut CpuBuffer, column: usize) {
    let rows = out.data.par_chunks_exact_mut(out.cols).zip(x.data.par_chunks_exact(x.cols));
    rows.with_min_len(16).for_each(|(out, x)| {
        for (head, to) in out[column..].chunks_exact_mut(width).take(heads.heads).enumerate() {
            to.copy_from_slice(&x[heads.start + head * heads.stride..][..width]);
        }
    });
}

pub(super) fn sigmoid_gate(x: &mut CpuBuffer, gate: &CpuBuffer) {
    if gate.cols > 1 {
        let pieces = x.data.par_chunks_mut(PIECE).zip(gate.data.par_chunks(PIECE));
        return pieces.for_each(|(x, gate)| {
            for (v, gate) in x.iter_mut().zip(gate) {
                *v *= sigmoid(*gate);
            }
        });
    }
    x.data.par_chunks_exact_mut(x.cols).zip(gate.data.par_iter()).with_min_len(16).for_each(
        |(row, &gate)| {
            let factor = sigmoid(gate);
            for v in row {
                *v *= factor;
            }
        },
    );
}

pub(super) fn softplus_gate(x: &mut CpuBuffer, gate: &CpuBuffer) {
    let width = x.cols / gate.cols;
    let rows = x.data.par_chunks_exact_mut(x.cols).zip(gate.data.par_chunks_exact(gate.cols));
    rows.with_min_len(16).for_each(|(row, gate)| {
        for (part, &gate) in row.chunks_exact_mut(width).zip(gate) {
            let factor = softplus(gate);
            for v in part {
                *v *= factor;
            }
        }
    });
}

pub(super) fn mix_experts(x: &mut CpuBuffer, gate: &mut CpuBuffer, turns: usize) {
    let width = x.cols / (turns * gate.cols);
    let isa = Isa::current();
    let rows = x.data.par_chunks_exact_mut(x.cols).zip(gate.data.par_chunks_exact_mut(gate.cols));
    rows.with_min_len(16).for_each(|(row, gate)| {
        isa.run(Softmax { scores: gate, scale: 1.0, sink: None });
        for (part, factor) in row.chunks_exact_mut(width).zip(gate.iter().cycle()) {
            for v in part {
                *v *= factor;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(data: &[f32], cols: usize) -> CpuBuffer {
        CpuBuffer { rows: data.len() / cols, cols, data: data.to_vec() }
    }

    #[test]
    fn both_norms_by_hand() {
        let x = buffer(&[1.0, 3.0, 5.0, 7.0], 2);
        let mut out = buffer(&[0.0; 4], 2);
        norm(&x, &[1.0, 2.0], None, 0.0, &mut out);
        let expected = [1.0 / 5f32.sqrt(), 6.0 / 5f32.sqrt(), 5.0 / 37f32.sqrt(), 14.0 / 37f32.sqrt()];
        assert!(out.data.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{out:?}");
        norm(&x, &[1.0, 2.0], Some(&[0.5, -0.5]), 0.0, &mut out);
        assert_eq!(out.data, [-0.5, 1.5, -0.5, 1.5]);
    }

    #[test]
    fn softplus_gates_of_heads_and_of_elements() {
        let mut x = buffer(&[1.0, 2.0, 3.0, 4.0], 4);
        softplus_gate(&mut x, &buffer(&[0.0, 50.0], 2));
        let ln2 = 2f32.ln();
        assert_eq!(x.data, [ln2, 2.0 * ln2, 150.0, 200.0]);
        softplus_gate(&mut x, &buffer(&[50.0, 0.0, -200.0, 0.0], 4));
        assert_eq!(x.data, [50.0 * ln2, 2.0 * ln2 * ln2, 0.0, 200.0 * ln2]);
    }

    #[test]
    fn experts_are_mixed_in_turns() {
        let gate = || buffer(&[0.0, 3f32.ln(), 1e30, 0.0], 2);
        let mut x = buffer(&[4.0; 16], 8);
        mix_experts(&mut x, &mut gate(), 1);
        let second = [4.0, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0, 0.0];
        assert!(
            x.data
                .iter()
                .zip([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0].iter().chain(&second))
                .all(|(a, b)| (a - b).abs() < 1e-6)
        );
        let mut x = buffer(&[4.0; 16], 8);
        mix_experts(&mut x, &mut gate(), 2);
        let expected = [1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0, 4.0, 4.0, 0.0, 0.0, 4.0, 4.0, 0.0, 0.0];
        assert!(x.data.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{x:?}");
    }

    #[test]
    fn clamped_swiglu_by_hand() {
        let (slope, sigmoid) = (1.702f32, |x: f32| 1.0 / (1.0 + (-x).exp()));
        let mut gate = [1.0, 9.0, -9.0, 2.0];
        activate(&mut gate, &[0.5, 9.0, -9.0, 0.0], Activation::ClampedSwiGlu { limit: 7.0, slope });
        let expected = [
            sigmoid(slope) * 1.5,
            7.0 * sigmoid(7.0 * slope) * 8.0,
            -9.0 * sigmoid(-9.0 * slope) * -6.0,
            2.0 * sigmoid(2.0 * slope),
        ];
        assert!(gate.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{gate:?} {expected:?}");
    }
}
