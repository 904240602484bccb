//! The super-expert guard: a few experts with enormous outputs without which the model breaks.
//!
//! "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279); the rule is that
//! of the code published with REAP (arXiv 2510.13999).

/// Which experts to protect, from the largest |output coordinate| of every expert of every MoE layer. Those
/// strictly above max(99.5th percentile of all, largest / 10) are; unless `all_layers`, only in the first
/// three quarters of the MoE layers, rounded down. The percentile interpolates linearly between order
/// statistics.
pub(super) fn super_experts(largest: &[&[f64]], all_layers: bool) -> Vec<Vec<bool>> {
    let mut sorted = largest.concat();
    sorted.sort_by(f64::total_cmp);
    let threshold = match sorted.last() {
        Some(last) => percentile(&sorted, 0.995).max(last / 10.0),
        None => f64::INFINITY,
    };
    let guarded = if all_layers { largest.len() } else { largest.len() * 3 / 4 };
    let above = |(i, layer): (usize, &&[f64])| layer.iter().map(|v| i < guarded && *v > threshold).collect();
    largest.iter().enumerate().map(above).collect()
}

/// The `q` quantile of ascending, non-empty numbers.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    low + (high - low) * position.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        assert!((percentile(&[3.0], 0.995) - 3.0).abs() < 1e-15);
        assert!((percentile(&[0.0, 10.0], 0.25) - 2.5).abs() < 1e-15);
    }

    #[test]
    fn only_outliers_of_the_early_layers_are_protected() {
        let quiet = vec![1.0; 300];
        let mut loud = quiet.clone();
        loud[7] = 50.0;
        let layers = [&loud[..], &quiet, &quiet, &loud];
        let found = |all| {
            let protected = super_experts(&layers, all);
            let layer =
                |l: &Vec<bool>| l.iter().enumerate().filter(|(_, p)| **p).map(|(e, _)| e).collect::<Vec<_>>();
            protected.iter().map(layer).collect::<Vec<_>>()
        };
        assert_eq!(found(false), [vec![7], vec![], vec![], vec![]]);
        assert_eq!(found(true), [vec![7], vec![], vec![], vec![7]]);
    }

    #[test]
    fn equal_experts_are_not_super() {
        assert_eq!(super_experts(&[&[2.0, 2.0]], true), [[false, false]]);
    }
}
