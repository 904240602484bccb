//! The orthogonal reduction of a symmetric matrix to tridiagonal form by Householder reflections, in panels of columns
//! (Dongarra, Sorensen and Hammarling 1989). Half of the work is products of the shrinking matrix with one vector,
//! which read its lower triangle once; the other half are products of matrices.

use faer::linalg::householder;
use faer::linalg::matmul::matmul;
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par};
use std::ops::Range;

use faer::dyn_stack::{MemBuffer, MemStack};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Threads;
use super::dense::{self, Real};
use super::threads::part;

/// Columns that are reduced before the rest of the matrix is updated.
const PANEL: usize = 32;

/// Vectors that are taken back through the reflections together.
const BLOCK: usize = 128;

/// Entries of a triangle that are worth a task of their own.
const TASK: usize = 1 << 17;

/// A matrix in tridiagonal form and the reflections that lead there.
pub(super) struct Tridiagonal<T> {
    pub(super) diagonal: Vec<f64>,
    /// One fewer.
    pub(super) below: Vec<f64>,
    /// The vector of reflection j in column j, from row 1 on, one row lower each.
    reflections: Mat<T>,
    /// For every panel the triangle that makes one block of its reflections, side by side.
    triangles: Mat<T>,
}

impl<T: Real> Tridiagonal<T> {
    /// Reduces `a`, of which only the lower triangle is read.
    pub(super) fn reduce(mut a: Mat<T>, threads: Threads) -> Self {
        let n = a.nrows();
        let count = n.saturating_sub(1);
        let mut this = Self {
            diagonal: Vec::with_capacity(n),
            below: Vec::with_capacity(count),
            reflections: Mat::new(),
            triangles: Mat::zeros(PANEL.min(count), count),
        };
        let mut from = 0;
        while from < count {
            let width = PANEL.min(count - from);
            this.panel(a.as_mut().submatrix_mut(from, from, n - from, n - from), width, from, threads);
            from += width;
        }
        if n > 0 {
            this.diagonal.push(a[(n - 1, n - 1)].exact());
        }
        this.reflections = a;
        this
    }

    /// Reduces the first `width` columns of `a` and updates the others.
    fn panel(&mut self, mut a: MatMut<'_, T>, width: usize, from: usize, threads: Threads) {
        let n = a.nrows();
        let (one, minus) = (T::rounded(1.0), T::rounded(-1.0));
        // A becomes A - V Wᵀ - W Vᵀ.
        let (mut v, mut w) = (Mat::<T>::zeros(n, width), Mat::<T>::zeros(n, width));
        for j in 0..width {
            let rest = n - j;
            let (v_row, w_row) = (v.subrows(j, rest), w.subrows(j, rest));
            let mut column = a.as_mut().col_mut(j).subrows_mut(j, rest);
            for (left, right) in [(v_row, w.row(j)), (w_row, v.row(j))] {
                let right = right.subcols(0, j).transpose();
                matmul(
                    column.as_mut().as_mat_mut(),
                    Accum::Add,
                    left.subcols(0, j),
                    right.as_mat(),
                    minus,
                    Par::Seq,
                );
            }
            self.diagonal.push(column[0].exact());
            let (head, mut tail) = column.split_at_row_mut(1).1.split_at_row_mut(1);
            let head = head.get_mut(0);
            let tau = householder::make_householder_in_place(head, tail.as_mut()).tau;
            self.below.push(head.exact());
            self.triangles[(j, from + j)] = tau;
            let inverse = T::rounded(tau.exact().recip());
            v[(j + 1, j)] = one;
            v.as_mut().col_mut(j).subrows_mut(j + 2, rest - 2).copy_from(tail.as_ref());

            // w = (A - V Wᵀ - W Vᵀ) v / τ, less its part along v that would be counted twice.
            let rest = rest - 1;
            let vector = v.col(j).subrows(j + 1, rest).to_owned();
            let mut out = product(a.as_ref().submatrix(j + 1, j + 1, rest, rest), &vector, threads);
            let (vs, ws) = (v.as_ref().submatrix(j + 1, 0, rest, j), w.as_ref().submatrix(j + 1, 0, rest, j));
            for (left, right) in [(vs, ws), (ws, vs)] {
                let mut small = Mat::zeros(j, 1);
                matmul(&mut small, Accum::Replace, right.transpose(), vector.as_mat(), one, Par::Seq);
                matmul(out.as_mut().as_mat_mut(), Accum::Add, left, small.as_ref(), minus, Par::Seq);
            }
            let along = T::rounded(0.5) * inverse * (vector.transpose() * &out);
            for (out, v) in out.iter_mut().zip(vector.iter()) {
                *out = inverse * (*out - along * *v);
            }
            w.as_mut().col_mut(j).subrows_mut(j + 1, rest).copy_from(&out);
        }
        // The reflections of the panel as one block: the products of their vectors, above their τ.
        let mut products = Mat::zeros(width, width);
        matmul(&mut products, Accum::Replace, v.transpose(), v.as_ref(), one, Par::Seq);
        for j in 0..width {
            for i in 0..j {
                self.triangles[(i, from + j)] = products[(i, j)];
            }
        }
        let rest = n - width;
        let (v, w) = (v.subrows(width, rest), w.subrows(width, rest));
        let left = faer::concat![[v, w]];
        let right = faer::concat![[w, v]];
        let a = a.submatrix_mut(width, width, rest, rest);
        dense::add_lower_product(a, left.as_ref(), right.transpose(), minus, threads);
    }

    /// Takes `vectors` of the tridiagonal matrix back to the original one, in place.
    pub(super) fn take_back(&self, mut vectors: Mat<T>, threads: Threads) -> Mat<T> {
        let n = self.reflections.nrows();
        if n > 1 {
            let reflections = self.reflections.submatrix(1, 0, n - 1, n - 1);
            let width = part(vectors.ncols(), BLOCK);
            threads.each(vectors.par_col_chunks_mut(width), |block| {
                let scratch = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(
                    n - 1,
                    self.triangles.nrows(),
                    block.ncols(),
                );
                householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
                    reflections,
                    self.triangles.as_ref(),
                    Conj::No,
                    block.subrows_mut(1, n - 1),
                    Par::Seq,
                    MemStack::new(&mut MemBuffer::new(scratch)),
                );
            });
        }
        vectors
    }
}

/// `a v` for a symmetric `a` of which the lower triangle is read.
fn product<T: Real>(a: MatRef<'_, T>, v: &faer::Col<T>, threads: Threads) -> faer::Col<T> {
    let n = a.nrows();
    let tasks = (n * n / 2).div_ceil(TASK).max(1);
    // Columns of equal area.
    let start = |task: usize| ((1.0 - (1.0 - task as f64 / tasks as f64).sqrt()) * n as f64).round() as usize;
    let mut sums = Mat::<T>::zeros(n, tasks);
    let v = v.try_as_col_major().map(faer::ColRef::as_slice).unwrap_or_default();
    threads.each(sums.par_col_iter_mut().enumerate(), |(task, sum)| {
        if let Some(sum) = sum.try_as_col_major_mut() {
            let (columns, sum) = (start(task)..start(task + 1), sum.as_slice_mut());
            Arch::new().dispatch(AddColumns { a, columns, v, sum });
        }
    });
    let mut total = sums.col(0).to_owned();
    for sum in sums.col_iter().skip(1) {
        total += sum;
    }
    total
}

/// Columns that are read together.
pub(super) const GROUP: usize = 4;

/// Adds the products with some columns of the lower triangle, and with the rows that are their mirror images.
struct AddColumns<'a, T> {
    a: MatRef<'a, T>,
    columns: Range<usize>,
    v: &'a [T],
    sum: &'a mut [T],
}

impl<T: Real> WithSimd for AddColumns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { a, columns, v, sum } = self;
        for j in columns.clone().step_by(GROUP) {
            let group = GROUP.min(columns.end - j);
            // The corner on the diagonal.
            for c in j..j + group {
                sum[c] += a[(c, c)] * v[c];
                for r in c + 1..j + group {
                    sum[r] += a[(r, c)] * v[c];
                    sum[c] += a[(r, c)] * v[r];
                }
            }
            // Where there are fewer columns than four, the last is read again and counts nothing.
            let from = j + group;
            let below = std::array::from_fn(|c| {
                let column = a.col(j + c.min(group - 1)).try_as_col_major();
                column.map(|c| &c.as_slice()[from..]).unwrap_or_default()
            });
            let factors = std::array::from_fn(|c| if c < group { v[j + c] } else { T::rounded(0.0) });
            let mirrored = T::add_group(simd, below, factors, &v[from..], &mut sum[from..]);
            for c in 0..group {
                sum[j + c] += mirrored[c];
            }
        }
    }
}
