//! Norms, activations and sums.

use rayon::prelude::*;

use super::CpuBuffer;
use super::math::sigmoid;
use super::simd::exp::silu;
use super::simd::{Isa, MAX_LANES, Simd, Task};

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

pub(super) fn rms_norm(x: &CpuBuffer, weight: &[f32], eps: f32, out: &mut CpuBuffer) {
    let rows = out.data.par_chunks_exact_mut(weight.len()).zip(x.data.par_chunks_exact(x.cols));
    rows.with_min_len(16).for_each(|(out, x)| {
        out.copy_from_slice(&x[..weight.len()]);
        normalise(out, weight, eps);
    });
}

pub(super) fn rms_norm_heads(x: &mut CpuBuffer, weight: &[f32], eps: f32) {
    x.data.par_chunks_exact_mut(weight.len()).with_min_len(64).for_each(|head| normalise(head, weight, eps));
}

pub(super) fn add_bias(x: &mut CpuBuffer, bias: &[f32]) {
    x.data.par_chunks_exact_mut(bias.len()).with_min_len(16).for_each(|row| {
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

pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE)).for_each(|(gate, up)| {
        Isa::current().run(Swiglu { gate, up });
    });
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

pub(super) fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| {
        for (a, b) in x.iter_mut().zip(y) {
            *a += b;
        }
    });
}

pub(super) fn sigmoid_gate(x: &mut CpuBuffer, gate: &CpuBuffer) {
    x.data.par_chunks_exact_mut(x.cols).zip(gate.data.par_iter()).with_min_len(16).for_each(
        |(row, &gate)| {
            let factor = sigmoid(gate);
            for v in row {
                *v *= factor;
            }
        },
    );
}
