//! A dense matrix of `f64`, row by row.

use faer::MatRef;

use super::Error;

/// A dense `rows` x `cols` matrix of `f64`, row-major: element (i, j) is `data[i * cols + j]`, the layout of a
/// weight `[out, in]` in a checkpoint.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl Matrix {
    /// A matrix of `rows * cols` values, row by row.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` holds another number of values.
    pub fn new(rows: usize, cols: usize, data: Vec<f64>) -> Result<Self, Error> {
        if rows.checked_mul(cols) == Some(data.len()) {
            Ok(Self { rows, cols, data })
        } else {
            Err(Error::Length { rows, cols, len: data.len() })
        }
    }

    /// The same from `f32`, every value exactly.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` holds another number of values than `rows * cols`.
    pub fn from_f32(rows: usize, cols: usize, data: &[f32]) -> Result<Self, Error> {
        Self::new(rows, cols, data.iter().map(|&x| f64::from(x)).collect())
    }

    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// The identity of size `n`.
    pub fn identity(n: usize) -> Self {
        let mut m = Self::zeros(n, n);
        for i in 0..n {
            m.data[i * n + i] = 1.0;
        }
        m
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// All values, row by row.
    pub fn as_slice(&self) -> &[f64] {
        &self.data
    }

    /// All values, row by row, to be changed in place.
    pub fn as_mut_slice(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// All values, row by row, without the shape.
    pub fn into_vec(self) -> Vec<f64> {
        self.data
    }

    /// Row `i`. Panics if there is none, as indexing a slice does.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// The values rounded once to `f32`, row by row.
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }

    /// The transposed matrix.
    #[must_use]
    pub fn transpose(&self) -> Self {
        Self::from_view(self.view().transpose())
    }

    /// The product `self * other`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `other` has not as many rows as `self` has columns.
    pub fn matmul(&self, other: &Self) -> Result<Self, Error> {
        other.expect_shape("the right factor", (self.cols, other.cols))?;
        Ok(super::dense::product_by_rows(self.view(), other.view(), super::Threads::One))
    }

    /// Σ of the squares of all values: the squared Frobenius norm.
    pub fn norm_squared(&self) -> f64 {
        super::dense::norm_squared(self.view())
    }

    /// The same values as a matrix of `faer`, without a copy.
    pub(crate) fn view(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    /// [`view`](Self::view), to be written to.
    pub(crate) fn view_mut(&mut self) -> faer::MatMut<'_, f64> {
        faer::MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.cols)
    }

    pub(crate) fn from_view(m: MatRef<'_, f64>) -> Self {
        let (rows, cols) = m.shape();
        let mut out = Self::zeros(rows, cols);
        out.view_mut().copy_from(m);
        out
    }

    pub(crate) fn expect_shape(&self, what: &'static str, expected: (usize, usize)) -> Result<(), Error> {
        if self.shape() == expected {
            Ok(())
        } else {
            Err(Error::Shape { what, found: self.shape(), expected })
        }
    }

    pub(crate) fn expect_finite(&self, what: &'static str) -> Result<(), Error> {
        match self.data.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(at) => {
                Err(Error::NonFinite { what, row: at / self.cols, col: at % self.cols, value: self.data[at] })
            }
        }
    }
}
