//! What can go wrong in a factorisation.

/// Why a factorisation was refused or failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An input holds a NaN or an infinity.
    #[error("{what} is not finite: {value} at row {row}, column {col}")]
    NonFinite {
        /// Which matrix.
        what: &'static str,
        /// Row of the first such value, from 0.
        row: usize,
        /// Column of the first such value, from 0.
        col: usize,
        /// The value.
        value: f64,
    },
    /// The inputs are finite but so large that their products are not.
    #[error("{what} overflows: the entries of its factors are too large")]
    Overflow {
        /// Which product.
        what: &'static str,
    },
    /// Two inputs do not fit together, or a buffer does not fit its shape.
    #[error("{what} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which matrix.
        what: &'static str,
        /// Its rows and columns.
        found: (usize, usize),
        /// The rows and columns it should have.
        expected: (usize, usize),
    },
    /// A buffer does not hold `rows * cols` values.
    #[error("a {rows} x {cols} matrix cannot be made of {len} values")]
    Length {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Values given.
        len: usize,
    },
    /// The rank is larger than the smaller side of the matrix.
    #[error("rank {rank} is larger than {max}, the smaller side of the matrix")]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// The largest possible one.
        max: usize,
    },
    /// A matrix that must be a second moment has a clearly negative eigenvalue, so it is none.
    #[error("{what} is not positive semidefinite")]
    NotSemidefinite {
        /// Which matrix.
        what: &'static str,
    },
    /// An iteration did not converge, or its result failed the check against the spectrum.
    #[error("{what} did not converge")]
    NoConvergence {
        /// Which decomposition.
        what: &'static str,
    },
}
