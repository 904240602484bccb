//! Two solved halves of a tridiagonal matrix joined to the solution of the whole.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, Par};
use pulp::Arch;
use rayon::prelude::*;

use super::Threads;
use super::dense::Real;
use super::divide::{Solved, Wanted};
use super::secular::{Consistent, Root, Secular, Solve, Vector};
use super::threads::part;

/// Roots, entries or columns that are computed together.
const PART: usize = 64;

/// Columns of a product that are computed together.
const COLUMNS: usize = 256;

/// Two solved halves that are coupled, `diag(d) + ρ z zᵀ` in the basis of their eigenvectors, by ascending `d`.
pub(super) struct Merge {
    /// Size of the upper half.
    top: usize,
    rho: f64,
    d: Vec<f64>,
    z: Vec<f64>,
    first: Vec<f64>,
    last: Vec<f64>,
    /// Which column of the halves' eigenvectors.
    column: Vec<usize>,
    /// Whether it has entries in the upper and the lower half.
    halves: Vec<[bool; 2]>,
    /// Rotations of two columns, [`rotate`], in order.
    rotations: Vec<(usize, usize, f64, f64)>,
    /// What the coupling changes.
    coupled: Vec<usize>,
    /// What is an eigenvector already, to rounding.
    deflated: Vec<usize>,
}

/// An eigenvalue of the whole: a root, or entry of [`Merge::deflated`].
#[derive(Clone, Copy)]
enum Origin {
    Root(usize),
    Deflated(usize),
}

impl Merge {
    pub(super) fn new(top: &Solved, bottom: &Solved, coupling: f64) -> Self {
        let (upper, n) = (top.values.len(), top.values.len() + bottom.values.len());
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let z = top.last.iter().map(|x| x * half);
        let z: Vec<f64> = z.chain(bottom.first.iter().map(|x| x * half.copysign(coupling))).collect();
        let d: Vec<f64> = top.values.iter().chain(&bottom.values).copied().collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| d[a].total_cmp(&d[b]));
        let entry =
            |values: &[f64], at: Option<usize>| at.and_then(|at| values.get(at)).copied().unwrap_or(0.0);
        let mut merge = Self {
            top: upper,
            rho: 2.0 * coupling.abs(),
            d: order.iter().map(|&i| d[i]).collect(),
            z: order.iter().map(|&i| z[i]).collect(),
            first: order.iter().map(|&i| entry(&top.first, Some(i))).collect(),
            last: order.iter().map(|&i| entry(&bottom.last, i.checked_sub(upper))).collect(),
            halves: order.iter().map(|&i| [i < upper, i >= upper]).collect(),
            column: order,
            rotations: Vec::new(),
            coupled: Vec::new(),
            deflated: Vec::new(),
        };
        merge.deflate();
        merge
    }

    /// Sorts out entries that the coupling does not change by more than rounding: small ones, and one of every two with
    /// (almost) the same `d`, after a rotation that makes it zero.
    fn deflate(&mut self) {
        let largest = |values: &[f64]| values.iter().fold(0.0_f64, |a, x| a.max(x.abs()));
        let small = 8.0 * f64::EPSILON * largest(&self.d).max(largest(&self.z));
        let mut pending: Option<usize> = None;
        for i in 0..self.d.len() {
            if self.rho * self.z[i].abs() <= small {
                self.deflated.push(i);
                continue;
            }
            let Some(p) = pending.replace(i) else { continue };
            let length = self.z[i].hypot(self.z[p]);
            let (c, s) = (self.z[i] / length, -self.z[p] / length);
            if ((self.d[i] - self.d[p]) * c * s).abs() > small {
                self.coupled.push(p);
                continue;
            }
            (self.z[p], self.z[i]) = (0.0, length);
            let (dp, di) = (self.d[p], self.d[i]);
            (self.d[p], self.d[i]) = (dp * c * c + di * s * s, dp * s * s + di * c * c);
            (self.first[p], self.first[i]) = rotate(self.first[p], self.first[i], c, s);
            (self.last[p], self.last[i]) = rotate(self.last[p], self.last[i], c, s);
            let halves = [0, 1].map(|half| self.halves[p][half] || self.halves[i][half]);
            (self.halves[p], self.halves[i]) = (halves, halves);
            self.rotations.push((self.column[p], self.column[i], c, s));
            self.deflated.push(p);
        }
        self.coupled.extend(pending);
    }

    /// The whole. The columns of `vectors`, if given, hold those of the halves.
    pub(super) fn finish<T: Real>(
        self,
        vectors: Option<MatMut<'_, T>>,
        wanted: Option<Wanted<'_>>,
        threads: Threads,
    ) -> Solved {
        let (n, count) = (self.d.len(), self.coupled.len());
        let of = |values: &[f64]| self.coupled.iter().map(|&i| values[i]).collect::<Vec<_>>();
        let (d, z, first, last) = (of(&self.d), of(&self.z), of(&self.first), of(&self.last));
        let secular = Secular { d: &d, z: &z, rho: self.rho };
        let mut roots = vec![Root::NONE; count];
        threads.each(roots.par_chunks_mut(PART).enumerate(), |(i, roots)| {
            Arch::new().dispatch(Solve { secular: &secular, from: i * PART, roots });
        });

        let rooted = roots.iter().enumerate().map(|(j, &root)| (secular.value(root), Origin::Root(j)));
        let deflated = self.deflated.iter().map(|&i| (self.d[i], Origin::Deflated(i)));
        let mut all: Vec<(f64, Origin)> = rooted.chain(deflated).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let values: Vec<f64> = all.iter().map(|x| x.0).collect();
        if wanted.is_some() && vectors.is_none() {
            return Solved { values, first: Vec::new(), last: Vec::new() };
        }

        let mut consistent = vec![0.0; count];
        threads.each(consistent.par_chunks_mut(PART).enumerate(), |(i, z)| {
            Arch::new().dispatch(Consistent { secular: &secular, roots: &roots, from: i * PART, z });
        });
        // The eigenvectors in the basis of the coupled columns, for the wanted roots, and their first and last entries.
        let from = wanted.map_or(0, |wanted| n - wanted(&values));
        let wanted: Vec<(usize, Root)> = all
            .iter()
            .enumerate()
            .skip(from)
            .filter_map(|(at, x)| if let Origin::Root(j) = x.1 { Some((at, roots[j])) } else { None })
            .collect();
        let mut small = Mat::<T>::zeros(if vectors.is_some() { count } else { 0 }, wanted.len());
        let columns = small.par_col_chunks_mut(PART).zip(wanted.par_chunks(PART));
        let parts = threads.map(columns, |(mut columns, roots)| {
            let mut vector = vec![0.0; count];
            let mut found = Vec::with_capacity(roots.len());
            for (j, &(_, root)) in roots.iter().enumerate() {
                let (secular, out) = (&secular, &mut vector[..]);
                found.push(Arch::new().dispatch(Vector {
                    secular,
                    z: &consistent,
                    root,
                    out,
                    others: [&first, &last],
                }));
                for (to, from) in columns.as_mut().col_mut(j).iter_mut().zip(&vector) {
                    *to = T::rounded(*from);
                }
            }
            found
        });
        let mut ends: Vec<[f64; 2]> = all
            .iter()
            .map(|x| if let Origin::Deflated(i) = x.1 { [self.first[i], self.last[i]] } else { [0.0; 2] })
            .collect();
        for ((at, _), found) in wanted.iter().zip(parts.into_iter().flatten()) {
            ends[*at] = found;
        }
        if let Some(vectors) = vectors {
            let order = all[from..].iter().map(|x| x.1);
            self.take_back(vectors, order, &small, threads);
        }
        let (first, last) = ends.into_iter().map(<(f64, f64)>::from).unzip();
        Solved { values, first, last }
    }

    /// Replaces the last columns of `vectors`, which hold those of the halves, by those of the whole in the given
    /// `order`; the columns of `small` are those of the roots in the basis of the coupled columns.
    fn take_back<T: Real>(
        &self,
        mut vectors: MatMut<'_, T>,
        order: impl ExactSizeIterator<Item = Origin>,
        small: &Mat<T>,
        threads: Threads,
    ) {
        let n = self.d.len();
        for &(p, i, c, s) in &self.rotations {
            let (c, s) = (T::rounded(c), T::rounded(s));
            for row in 0..n {
                let (x, y) = rotate(vectors[(row, p)], vectors[(row, i)], c, s);
                (vectors[(row, p)], vectors[(row, i)]) = (x, y);
            }
        }
        let order: Vec<Origin> = order.collect();
        let from = n - order.len();
        // Each half of the rows is a product of the columns that have entries there.
        let rows = [(0, self.top), (self.top, n - self.top)];
        let products = rows.map(|(row, height)| {
            let half = usize::from(row > 0);
            let inner: Vec<usize> =
                (0..self.coupled.len()).filter(|&k| self.halves[self.coupled[k]][half]).collect();
            let column = |k: usize| vectors.as_ref().col(self.column[self.coupled[k]]).subrows(row, height);
            let mut left = Mat::<T>::zeros(height, inner.len());
            threads.each(left.par_col_chunks_mut(PART).zip(inner.par_chunks(PART)), |(left, inner)| {
                for (mut to, &k) in left.col_iter_mut().zip(inner) {
                    to.copy_from(column(k));
                }
            });
            let mut right = Mat::<T>::zeros(inner.len(), small.ncols());
            threads.each(right.par_col_chunks_mut(PART).zip(small.par_col_chunks(PART)), |(right, small)| {
                for (mut to, from) in right.col_iter_mut().zip(small.col_iter()) {
                    for (i, &k) in inner.iter().enumerate() {
                        to[i] = from[k];
                    }
                }
            });
            let mut out = Mat::<T>::zeros(height, small.ncols());
            let width = part(out.ncols(), COLUMNS);
            threads.each(out.par_col_chunks_mut(width).zip(right.par_col_chunks(width)), |(out, right)| {
                matmul(out, Accum::Replace, left.as_ref(), right, T::rounded(1.0), Par::Seq);
            });
            out
        });
        let deflated = order.iter().filter_map(|x| if let Origin::Deflated(i) = x { Some(*i) } else { None });
        let kept: Vec<_> = deflated.map(|i| vectors.as_ref().col(self.column[i]).to_owned()).collect();
        let (mut roots, mut kept) = (0.., kept.into_iter());
        for (to, origin) in vectors.subcols_mut(from, order.len()).col_iter_mut().zip(&order) {
            let (mut top, mut bottom) = to.split_at_row_mut(self.top);
            match origin {
                Origin::Root(_) => {
                    let j = roots.next().unwrap_or(0);
                    top.copy_from(products[0].col(j));
                    bottom.copy_from(products[1].col(j));
                }
                Origin::Deflated(_) => {
                    if let Some(column) = kept.next() {
                        top.copy_from(column.subrows(0, self.top));
                        bottom.copy_from(column.subrows(self.top, n - self.top));
                    }
                }
            }
        }
    }
}

/// A plane rotation of the columns (p, i).
fn rotate<T: Real>(p: T, i: T, c: T, s: T) -> (T, T) {
    (c * p + s * i, c * i - s * p)
}
