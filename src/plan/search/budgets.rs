//! How many experts each layer loses, when layers matter differently.

/// MoE-I² (arXiv 2411.01016): `total` experts in proportion to the inverse importance of the layers. With
/// sᵢ = 1 / (Iᵢ + 1e-12), layer i loses ⌊total · sᵢ / (Σ s + 1e-12)⌋, at most `caps[i]`; the rest goes one by one,
/// cyclically, in descending order of what was rounded off (ties to the lower layer), past layers that are full.
/// `total` must not exceed the sum of the caps.
pub fn inverse_importance(importance: &[f64], total: usize, caps: &[usize]) -> Vec<usize> {
    let inverse: Vec<f64> = importance.iter().map(|i| 1.0 / (i + 1e-12)).collect();
    let sum = inverse.iter().sum::<f64>() + 1e-12;
    let raw: Vec<f64> = inverse.iter().map(|s| total as f64 * s / sum).collect();
    let mut counts: Vec<usize> = raw.iter().zip(caps).map(|(raw, cap)| (*raw as usize).min(*cap)).collect();
    let mut order: Vec<usize> = (0..raw.len()).collect();
    let rest = |i: usize| raw[i] - counts[i] as f64;
    // Stable: equal remainders stay in the order of the layers.
    order.sort_by(|&a, &b| rest(b).total_cmp(&rest(a)));
    let mut left = total.min(caps.iter().sum()).saturating_sub(counts.iter().sum());
    while left > 0 {
        for &i in &order {
            if left > 0 && counts[i] < caps[i] {
                counts[i] += 1;
                left -= 1;
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn by_hand() {
        assert_eq!(inverse_importance(&[1.0, 2.0, 4.0, 8.0], 8, &[4; 4]), [4, 2, 1, 1]);
        assert_eq!(inverse_importance(&[1.0, 1.0, 1.0], 4, &[4; 3]), [2, 1, 1]);
        assert_eq!(inverse_importance(&[0.0, 5.0], 6, &[4; 2]), [4, 2]);
    }

    proptest! {
        #[test]
        fn the_total_is_kept(importance in prop::collection::vec(0.0f64..100.0, 1..8), cap in 1usize..9, share in 0usize..101) {
            let caps = vec![cap; importance.len()];
            let total = cap * importance.len() * share / 100;
            let counts = inverse_importance(&importance, total, &caps);
            prop_assert_eq!(counts.iter().sum::<usize>(), total);
            prop_assert!(counts.iter().all(|c| *c <= cap));
        }
    }
}
