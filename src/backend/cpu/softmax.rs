//! Softmax over rows of scores.

use super::simd::exp::exp;
use super::simd::{MAX_LANES, Simd, Task};

/// Scores become probabilities, in place.
pub(super) struct Softmax<'a> {
    /// At least one. −∞ gets probability 0, and so does everything where nothing is larger.
    pub(super) scores: &'a mut [f32],
    /// Factor of the scores.
    pub(super) scale: f32,
    /// One more score, not scaled, that takes part in the sum alone.
    pub(super) sink: Option<f32>,
}

impl Task for Softmax<'_> {
    type Output = ();

    /// Sums run over [`MAX_LANES`] lanes on every processor, then across them: an order that depends on the length alone.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = s.splat(self.scale);
        let (body, rest) = self.scores.as_chunks_mut::<MAX_LANES>();
        let mut tail = [f32::NEG_INFINITY; MAX_LANES];
        tail[..rest.len()].copy_from_slice(rest);
        let mut max = s.splat(f32::NEG_INFINITY);
        for chunk in body.iter_mut().chain([&mut tail]) {
            for part in chunk.chunks_exact_mut(S::LANES) {
                let scaled = s.mul(s.load(part), scale);
                max = s.max(scaled, max);
                s.store(scaled, part);
            }
        }
        let mut lanes = [f32::NEG_INFINITY; MAX_LANES];
        s.store(max, &mut lanes);
        let largest = lanes.into_iter().fold(self.sink.unwrap_or(f32::NEG_INFINITY), f32::max);
        if largest == f32::NEG_INFINITY {
            body.as_flattened_mut().fill(0.0);
            rest.fill(0.0);
            return;
        }
        let max = s.splat(largest);
        let mut sums = [0.0; MAX_LANES];
        for chunk in body.iter_mut().chain([&mut tail]) {
            for (part, sums) in chunk.chunks_exact_mut(S::LANES).zip(sums.chunks_exact_mut(S::LANES)) {
                let value = exp(s, s.sub(s.load(part), max));
                s.store(value, part);
                s.store(s.add(s.load(sums), value), sums);
            }
        }
        let sink = self.sink.map_or(0.0, |sink| (sink - largest).exp());
        let factor = s.splat(1.0 / (sums.into_iter().sum::<f32>() + sink));
        for chunk in body.iter_mut().chain([&mut tail]) {
            for part in chunk.chunks_exact_mut(S::LANES) {
                s.store(s.mul(s.load(part), factor), part);
            }
        }
        let count = rest.len();
        rest.copy_from_slice(&tail[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::Isa;

    #[test]
    fn softmax_is_precise() {
        for isa in Isa::available() {
            for count in [1, 2, 7, 16, 17, 100, 1000] {
                let scores: Vec<f32> = (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 3.0).collect();
                let mut found = scores.clone();
                isa.run(Softmax { scores: &mut found, scale: 0.5, sink: None });
                let exact: Vec<f64> = scores.iter().map(|&v| (0.5 * f64::from(v)).exp()).collect();
                let sum: f64 = exact.iter().sum();
                for (found, exact) in found.iter().zip(exact) {
                    assert!((f64::from(*found) * sum / exact - 1.0).abs() < 2e-6, "{isa} {count}");
                }
            }
        }
    }

    #[test]
    fn hidden_scores_get_nothing() {
        for isa in Isa::available() {
            let mut scores = [f32::NEG_INFINITY; 21];
            isa.run(Softmax { scores: &mut scores, scale: 1.0, sink: None });
            assert_eq!(scores, [0.0; 21], "{isa}");
            let mut scores = [f32::NEG_INFINITY; 21];
            scores[20] = -3.0;
            scores[3] = -3.0;
            isa.run(Softmax { scores: &mut scores, scale: 1.0, sink: None });
            assert_eq!((scores[3], scores[20], scores.iter().sum::<f32>()), (0.5, 0.5, 1.0), "{isa}");
        }
    }
}
