//! How large a rank is worth it.
//!
//! A pair of factors of rank r costs r (out + in) parameters, bytes and multiplications per token in place of out · in.

/// The rank at which two factors cost as much as the matrix they replace: out · in / (out + in); 0 for an empty matrix.
pub fn break_even_rank(out: usize, input: usize) -> f64 {
    if out + input == 0 { 0.0 } else { out as f64 * input as f64 / (out as f64 + input as f64) }
}

/// The largest rank at which two factors cost at most the share `keep` of the matrix: ⌊keep · out · in / (out + in)⌋,
/// never above min(out, in), and 0 for a `keep` that is negative or NaN. A product that is within 1e-9 of the next
/// integer counts as that integer, so that 0.3 means three tenths.
pub fn rank_for_keep(out: usize, input: usize, keep: f64) -> usize {
    // The conversion of a float saturates, and takes NaN to 0.
    let rank = (keep * break_even_rank(out, input) + 1e-9).floor() as usize;
    rank.min(out.min(input))
}

/// The smallest rank whose leading part of `spectrum` (descending, none negative) holds at least the share `energy` of
/// its sum. 0 if the sum is 0: a zero matrix (or an expert that saw no token) needs no factors at all. 0 as well for
/// `energy` ≤ 0; from 1 on everything that is not zero is kept.
pub fn rank_for_energy(spectrum: &[f64], energy: f64) -> usize {
    let total: f64 = spectrum.iter().sum();
    let needed = energy.min(1.0) * total;
    let mut sum = 0.0;
    for (rank, value) in spectrum.iter().enumerate() {
        if sum >= needed {
            return rank;
        }
        sum += value;
    }
    spectrum.len()
}

/// Whether two factors of rank `rank` cost less than the matrix: rank · (out + in) < out · in.
pub fn is_worthwhile(rank: usize, out: usize, input: usize) -> bool {
    (rank as u128) * (out as u128 + input as u128) < out as u128 * input as u128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_published_shapes() {
        assert!((break_even_rank(1408, 2048) - 834.37).abs() < 0.01);
        assert!((break_even_rank(4096, 14336) - 3185.78).abs() < 0.01);
        assert!(break_even_rank(0, 0).abs() < f64::EPSILON);
        assert_eq!(rank_for_keep(1408, 2048, 0.8), 667);
        assert_eq!(rank_for_keep(256, 128, 0.75), 64);
        assert_eq!(rank_for_keep(256, 128, 0.5), 42);
        assert_eq!(rank_for_keep(30, 30, 0.2), 3);
        assert_eq!(rank_for_keep(8, 8, 100.0), 8);
        assert_eq!(rank_for_keep(8, 8, -1.0), 0);
        assert_eq!(rank_for_keep(8, 8, f64::NAN), 0);
        assert!(is_worthwhile(834, 1408, 2048) && !is_worthwhile(835, 1408, 2048));
        assert!(!is_worthwhile(4, 8, 8) && is_worthwhile(3, 8, 8));
        assert!(!is_worthwhile(usize::MAX, usize::MAX, 1));
    }

    #[test]
    fn rank_of_an_energy() {
        let spectrum = [6.0, 3.0, 1.0, 0.0];
        for (energy, rank) in
            [(-1.0, 0), (0.0, 0), (0.6, 1), (0.61, 2), (0.9, 2), (0.91, 3), (1.0, 3), (2.0, 3)]
        {
            assert_eq!(rank_for_energy(&spectrum, energy), rank, "energy {energy}");
        }
        assert_eq!(rank_for_energy(&spectrum, f64::NAN), 3);
        assert_eq!(rank_for_energy(&[0.0; 5], 0.9), 0);
        assert_eq!(rank_for_energy(&[0.0; 5], 1.0), 0);
        assert_eq!(rank_for_energy(&[], 0.5), 0);
    }
}
