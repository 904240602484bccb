//! A matrix of results that several threads write at once, each its own columns.

use std::marker::PhantomData;

/// A row-major matrix of which disjoint rectangles are written from different threads.
#[derive(Clone, Copy)]
pub(in super::super) struct Columns<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: all access goes through `row`, whose callers promise that no two threads touch the same element.
unsafe impl Send for Columns<'_> {}
// SAFETY: as above.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// `rows` rows of `cols` values, `stride` apart, of which the first starts at `matrix[0]`.
    pub(in super::super) fn new(matrix: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * stride + cols <= matrix.len(), "matrix out of its slice");
        Columns { start: matrix.as_mut_ptr(), rows, cols, stride, matrix: PhantomData }
    }

    /// Number of rows.
    pub(in super::super) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(in super::super) fn cols(&self) -> usize {
        self.cols
    }

    /// The rectangle of `rows` rows from `row` on and `cols` columns from `col` on.
    pub(in super::super) fn part(self, row: usize, rows: usize, col: usize, cols: usize) -> Self {
        assert!(row + rows <= self.rows && col + cols <= self.cols, "part out of its matrix");
        if rows * cols == 0 {
            return Columns { rows, cols, ..self };
        }
        // SAFETY: the first element of the part is in the matrix.
        let start = unsafe { self.start.add(row * self.stride + col) };
        Columns { start, rows, cols, ..self }
    }

    /// The only row as several rows of `cols` columns.
    pub(in super::super) fn fold(self, cols: usize) -> Self {
        assert!(self.rows == 1 && self.cols.is_multiple_of(cols), "fold of a matrix");
        Columns { rows: self.cols / cols, cols, stride: cols, ..self }
    }

    /// Columns `col .. col + count` of row `row`.
    ///
    /// # Safety
    /// While the result lives nobody else may use these elements.
    #[allow(clippy::mut_from_ref, reason = "that is what this type is for")]
    #[inline(always)]
    pub(in super::super) unsafe fn row(&self, row: usize, col: usize, count: usize) -> &mut [f32] {
        assert!(row < self.rows && col <= self.cols && count <= self.cols - col, "element out of its matrix");
        // SAFETY: the elements are in the matrix, and the caller vouches that they are used here alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride + col), count) }
    }
}
