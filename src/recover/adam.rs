//! Adam (Kingma and Ba, arXiv 1412.6980).

use rayon::prelude::*;

use super::map::Parameter;

const MEAN_DECAY: f32 = 0.9;
const VARIANCE_DECAY: f32 = 0.999;
const EPSILON: f32 = 1e-12;

/// Step `t`, from 1, of `parameter` with learning rate `rate`: w ← w − rate · s · m̂ / (√v̂ + ε), where s is the root mean
/// square of the values at the beginning ([`Parameter::scale`]). ε is far below any gradient of a loss that is
/// normalised to 1.
pub(super) fn step(parameter: &mut Parameter, t: usize, rate: f64) {
    let Parameter { values, gradient, mean, variance, scale, .. } = parameter;
    mean.resize(values.len(), 0.0);
    variance.resize(values.len(), 0.0);
    let exponent = t.min(i32::MAX as usize) as i32;
    let unbias = |decay: f32| (1.0 - f64::from(decay).powi(exponent)) as f32;
    let (unbias_mean, unbias_variance) = (unbias(MEAN_DECAY), unbias(VARIANCE_DECAY));
    let rate = rate as f32 * *scale;
    let all = values.par_iter_mut().zip(&gradient[..]).zip(mean).zip(variance).with_min_len(1 << 13);
    all.for_each(|(((w, g), m), v)| {
        *m += (1.0 - MEAN_DECAY) * (g - *m);
        *v += (1.0 - VARIANCE_DECAY) * (g * g - *v);
        *w -= rate * (*m / unbias_mean) / ((*v / unbias_variance).sqrt() + EPSILON);
    });
}

/// The learning rate of step `t` of `steps`, as a share of the largest: up over the first twentieth, then down to 0 along
/// a half cosine.
pub(super) fn schedule(t: usize, steps: usize) -> f64 {
    let warm = (steps / 20).max(1);
    if t <= warm {
        return t as f64 / warm as f64;
    }
    let done = (t - warm) as f64 / (steps - warm) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;

    /// Two steps of PyTorch 2.15's `torch.optim.Adam([w], lr=0.1, eps=1e-12)` on w = [1, -1], gradients [0.5, -2] and
    /// [-0.25, -1].
    #[test]
    fn steps_are_those_of_pytorch() {
        let mut p = Parameter::new(vec![1.0, -1.0], 2, Dtype::F32, 1.0);
        p.gradient = vec![0.5, -2.0];
        step(&mut p, 1, 0.1);
        p.gradient = vec![-0.25, -1.0];
        step(&mut p, 2, 0.1);
        for (found, expected) in p.values.iter().zip([0.873_366_3, -0.806_782]) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn the_rate_rises_and_falls_to_zero() {
        let rates: Vec<f64> = (1..=100).map(|t| schedule(t, 100)).collect();
        assert_eq!(rates[4], 1.0);
        assert!(rates[..5].is_sorted() && rates[4..].is_sorted_by(|a, b| a >= b));
        assert!(rates[99].abs() < 1e-12);
        assert_eq!(schedule(1, 1), 1.0);
    }
}
