//! Log-probabilities of one position: exponentials in f32, sums in f64.

/// The softmax of one row of finite logits.
pub(super) struct Softmax<'a> {
    logits: &'a [f32],
    max: f32,
    /// Σ exp(logit − max).
    sum: f64,
}

impl<'a> Softmax<'a> {
    /// `None` where a logit is NaN or infinite, for then nothing that follows would mean anything.
    pub(super) fn new(logits: &'a [f32]) -> Option<Self> {
        // Without early exit, so that it vectorises.
        if !logits.iter().fold(true, |finite, x| finite & x.is_finite()) {
            return None;
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
        Some(Softmax { logits, max, sum })
    }

    /// ln Σ exp(logit).
    fn log_normaliser(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }

    /// −ln p(`token`), in nats.
    pub(super) fn loss(&self, token: u32) -> f64 {
        self.log_normaliser() - f64::from(self.logits[token as usize])
    }

    /// The most probable token; of equals, the lowest.
    pub(super) fn top(&self) -> usize {
        // Every logit is at most `max` and one equals it.
        self.logits.iter().position(|&x| x >= self.max).unwrap_or(0)
    }

    /// KL(self ‖ other) = Σ p (ln p − ln q), in nats. Exactly 0 for equal logits; never negative, which rounding
    /// (about 1e-7 nats) could otherwise make it.
    pub(super) fn divergence(&self, other: &Self) -> f64 {
        let pairs = self.logits.iter().zip(other.logits);
        let weighted: f64 =
            pairs.map(|(&x, &y)| f64::from((x - self.max).exp()) * (f64::from(x) - f64::from(y))).sum();
        (weighted / self.sum - self.log_normaliser() + other.log_normaliser()).max(0.0)
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "zeros that are exact")]
mod tests {
    use super::Softmax;

    #[test]
    fn agrees_with_the_definition() {
        let (p, q) = ([0.5f32, -1.25, 3.0, 3.0], [0.25f32, 2.0, -0.5, 1.0]);
        let probabilities = |x: &[f32]| {
            let e: Vec<f64> = x.iter().map(|&v| f64::from(v).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|v| v / sum).collect::<Vec<_>>()
        };
        let (p_exact, q_exact) = (probabilities(&p), probabilities(&q));
        let (p, q) = (Softmax::new(&p).unwrap(), Softmax::new(&q).unwrap());
        for (token, exact) in p_exact.iter().enumerate() {
            assert!((p.loss(token as u32) + exact.ln()).abs() < 1e-6);
        }
        let exact: f64 = p_exact.iter().zip(&q_exact).map(|(a, b)| a * (a / b).ln()).sum();
        assert!((p.divergence(&q) - exact).abs() < 1e-6);
        assert!(p.divergence(&p) == 0.0);
        assert_eq!(p.top(), 2);
    }

    #[test]
    fn does_not_overflow() {
        let row = [1e30f32, -1e30, 0.0];
        let softmax = Softmax::new(&row).unwrap();
        assert!(softmax.loss(0) == 0.0);
        assert!(softmax.loss(1).is_finite());
    }

    #[test]
    fn refuses_what_is_not_finite() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Softmax::new(&[0.0, bad, 1.0]).is_none());
        }
    }
}
