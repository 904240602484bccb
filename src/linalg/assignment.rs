//! The linear sum assignment problem.

use super::{Error, Matrix};

/// The permutation π that minimises Σᵢ costs[i, π(i)], by the algorithm of Jonker and Volgenant ("A Shortest Augmenting
/// Path Algorithm for Dense and Sparse Linear Assignment Problems", Computing 38, 1987). Of several optima it finds
/// always the same one. Takes O(n³) in the worst case, and about O(n²) where costs are unrelated.
///
/// # Errors
/// [`Error::Shape`] unless the matrix is square, [`Error::NonFinite`].
pub fn assignment(costs: Matrix) -> Result<Vec<usize>, Error> {
    let n = costs.rows();
    costs.expect_shape("the matrix of costs", (n, n))?;
    costs.expect_finite("the matrix of costs")?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let failed = Error::NoConvergence { what: "the assignment" };
    let costs = lapjv::Matrix::from_shape_vec((n, n), costs.into_vec()).map_err(|_| failed.clone())?;
    lapjv::lapjv(&costs).map(|(columns, _)| columns).map_err(|_| failed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use proptest::prelude::*;

    use super::*;

    fn cost(costs: &Matrix, permutation: &[usize]) -> f64 {
        permutation.iter().enumerate().map(|(i, &j)| costs.row(i)[j]).sum()
    }

    /// The least cost of all permutations of the columns not `used`, from row `i` on.
    fn least(costs: &Matrix, i: usize, used: u32) -> f64 {
        if i == costs.rows() {
            return 0.0;
        }
        let free = (0..costs.cols()).filter(|j| used >> j & 1 == 0);
        free.map(|j| costs.row(i)[j] + least(costs, i + 1, used | 1 << j)).fold(f64::INFINITY, f64::min)
    }

    proptest! {
        /// Numbers of every size, and few different ones, so that many optima tie.
        #[test]
        fn as_good_as_the_best_of_all(
            n in 0usize..7, values in prop::collection::vec(-1e6..1e6, 36), rounded in any::<bool>(),
        ) {
            let value = |v: &f64| if rounded { (v / 4e5).round() } else { *v };
            let costs = Matrix::new(n, n, values[..n * n].iter().map(value).collect()).unwrap();
            let found = assignment(costs.clone()).unwrap();
            let mut sorted = found.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            let (found, best) = (cost(&costs, &found), least(&costs, 0, 0));
            prop_assert!((found - best).abs() <= 1e-9 * (1.0 + best.abs()), "{found} instead of {best}");
        }
    }

    #[test]
    fn equal_costs_end() {
        for n in [1, 2, 65, 300] {
            let mut found = assignment(Matrix::zeros(n, n)).unwrap();
            found.sort_unstable();
            assert_eq!(found, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn costs_that_are_none_are_refused() {
        let error = assignment(Matrix::zeros(2, 3)).unwrap_err().to_string();
        assert_eq!(error, "the matrix of costs has shape (2, 3), expected (2, 2)");
        let error = assignment(Matrix::new(1, 1, vec![f64::NAN]).unwrap()).unwrap_err().to_string();
        assert_eq!(error, "the matrix of costs is not finite: NaN at row 0, column 0");
    }
}
