//! Ranks of the experts of a layer, when experts matter differently.

/// How ranks follow importance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankRule {
    /// Exponent of the importance.
    pub alpha: f64,
    /// Added to the importance.
    pub epsilon: f64,
}

/// MoE-I² (arXiv 2411.01016): Rⱼ = ⌊(Iⱼ + ε)^α / Σ (I + ε)^α · average · n⌋ for the n experts that stay, at least 1 and
/// at most `most`.
pub fn ranks_by_importance(importance: &[f64], average: usize, most: usize, rule: RankRule) -> Vec<usize> {
    let powers: Vec<f64> = importance.iter().map(|i| (i + rule.epsilon).powf(rule.alpha)).collect();
    let sum: f64 = powers.iter().sum();
    let all = (average * importance.len()) as f64;
    powers.iter().map(|p| ((p * all / sum) as usize).clamp(1, most)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAPER: RankRule = RankRule { alpha: 0.15, epsilon: 1e-8 };

    #[test]
    fn by_hand() {
        assert_eq!(ranks_by_importance(&[0.5, 1.0, 2.0, 8.0], 100, 1000, PAPER), [82, 91, 101, 124]);
        assert_eq!(ranks_by_importance(&[0.5, 1.0, 2.0, 8.0], 100, 101, PAPER), [82, 91, 101, 101]);
        assert_eq!(ranks_by_importance(&[0.0, 1e9], 1, 10, PAPER), [1, 1]);
        let even = RankRule { alpha: 0.0, ..PAPER };
        for experts in 1..20 {
            let importance: Vec<f64> = (0..experts).map(f64::from).collect();
            assert!(ranks_by_importance(&importance, 57, 100, even).iter().all(|r| *r == 57));
        }
    }
}
