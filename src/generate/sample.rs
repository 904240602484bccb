//! Choosing a token from logits.

use rand::{RngExt as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 chooses the largest.
    pub temperature: f64,
    /// Only the fewest most probable tokens whose probabilities add up to this take part (Holtzman et al., arXiv
    /// 1904.09751); 1 for all.
    pub top_p: f64,
    /// Seed of the choices.
    pub seed: u64,
}

impl Sampling {
    /// Always the most probable token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Chooses one token after the other. The same seed and logits give the same tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    generator: ChaCha8Rng,
    /// Tokens that take part, with their weights; kept for its memory.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// A sampler at its first token.
    ///
    /// # Errors
    /// A temperature below 0 or not finite, a `top_p` outside (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_p, seed } = sampling;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let expected = "0 (always the most probable token) or more";
            return Err(Error::Sampling { what: "temperature", value: temperature, expected });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let expected = "more than 0 and at most 1";
            return Err(Error::Sampling { what: "top-p", value: top_p, expected });
        }
        let generator = ChaCha8Rng::seed_from_u64(seed);
        Ok(Sampler { sampling, generator, candidates: Vec::new() })
    }

    /// The next token; of equals, the lowest. `None` where a logit is not finite.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        if logits.is_empty() || !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if self.sampling.temperature == 0.0 {
            return logits.iter().position(|&logit| logit >= largest).map(|i| i as u32);
        }
        let total = self.nucleus(logits, largest);
        let mut left = self.generator.random::<f64>() * total;
        for &(id, weight) in &self.candidates {
            left -= weight;
            if left < 0.0 {
                return Some(id);
            }
        }
        // Rounding used up the candidates.
        self.candidates.last().map(|(id, _)| *id)
    }

    /// Leaves in `candidates` the tokens that may be chosen, with weights proportional to their probabilities; returns
    /// the sum of the weights.
    fn nucleus(&mut self, logits: &[f32], largest: f32) -> f64 {
        let Sampling { temperature, top_p, .. } = self.sampling;
        let weigh = |logit: f32| ((f64::from(logit) - f64::from(largest)) / temperature).exp();
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(i, &logit)| (i as u32, weigh(logit))));
        let total: f64 = self.candidates.iter().map(|(_, weight)| weight).sum();
        if top_p >= 1.0 {
            return total;
        }
        // All tokens below this together have less than 1 − top_p, so they are never needed; few are left to sort.
        let least = (1.0 - top_p) * total / logits.len() as f64;
        self.candidates.retain(|(_, weight)| *weight >= least);
        self.candidates.sort_unstable_by(|(i, a), (j, b)| b.total_cmp(a).then(i.cmp(j)));
        let mut sum = 0.0;
        let enough = self.candidates.iter().position(|(_, weight)| {
            sum += weight;
            sum >= top_p * total
        });
        self.candidates.truncate(enough.map_or(self.candidates.len(), |last| last + 1));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Log-probabilities of 0.5, 0.25, 0.15, 0.1 in another order.
    const PROBABILITIES: [f64; 4] = [0.15, 0.5, 0.1, 0.25];

    fn logits() -> Vec<f32> {
        PROBABILITIES.iter().map(|p| p.ln() as f32).collect()
    }

    fn counts(sampling: Sampling, draws: usize) -> [usize; 4] {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = [0; 4];
        (0..draws).for_each(|_| counts[sampler.choose(&logits()).unwrap() as usize] += 1);
        counts
    }

    /// Within five standard deviations of the binomial.
    fn assert_shares(counts: [usize; 4], shares: [f64; 4]) {
        let draws = counts.iter().sum::<usize>() as f64;
        for (count, share) in counts.into_iter().zip(shares) {
            let deviation = (share * (1.0 - share) / draws).sqrt();
            assert!((count as f64 / draws - share).abs() <= 5.0 * deviation, "{counts:?} {shares:?}");
        }
    }

    #[test]
    fn shares_follow_the_probabilities() {
        let base = Sampling { temperature: 1.0, top_p: 1.0, seed: 3 };
        assert_shares(counts(base, 20_000), PROBABILITIES);
        // At temperature 1/2 probabilities are squared.
        let squares = PROBABILITIES.map(|p| p * p);
        let sum: f64 = squares.iter().sum();
        let cold = Sampling { temperature: 0.5, ..base };
        assert_shares(counts(cold, 20_000), squares.map(|s| s / sum));
    }

    /// The fewest tokens with enough probability, and their shares among themselves.
    #[test]
    fn top_p_keeps_the_nucleus() {
        let sampling = |top_p| Sampling { temperature: 1.0, top_p, seed: 4 };
        for (top_p, kept) in [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.89, 3), (0.91, 4)] {
            let order = [1, 3, 0, 2];
            let mut shares = [0.0; 4];
            order[..kept].iter().for_each(|&i: &usize| shares[i] = PROBABILITIES[i]);
            let sum: f64 = shares.iter().sum();
            assert_shares(counts(sampling(top_p), 5000), shares.map(|s| s / sum));
        }
    }

    #[test]
    fn equal_tokens_are_kept_from_the_lowest() {
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.5, seed: 0 }).unwrap();
        for _ in 0..100 {
            assert!(sampler.choose(&[2.0; 6]).unwrap() < 3);
        }
        let mut greedy = Sampler::new(Sampling::GREEDY).unwrap();
        assert_eq!(greedy.choose(&[1.0, 7.0, 7.0, -3.0]), Some(1));
    }

    #[test]
    fn seeds_repeat() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 1.0, seed }).unwrap();
            (0..64).map(|_| sampler.choose(&logits()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn nonsense_is_refused() {
        for temperature in [-1.0, f64::NAN, f64::INFINITY] {
            let error = Sampler::new(Sampling { temperature, ..Sampling::GREEDY }).unwrap_err();
            assert!(error.to_string().starts_with("temperature is "), "{error}");
        }
        for top_p in [0.0, -0.5, 1.5, f64::NAN] {
            let error = Sampler::new(Sampling { top_p, ..Sampling::GREEDY }).unwrap_err();
            assert!(error.to_string().starts_with("top-p is "), "{error}");
        }
        let mut sampler = Sampler::new(Sampling::GREEDY).unwrap();
        assert_eq!(sampler.choose(&[0.0, f32::NAN]), None);
        assert_eq!(sampler.choose(&[0.0, f32::INFINITY]), None);
        assert_eq!(sampler.choose(&[]), None);
    }
}
