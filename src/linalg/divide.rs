//! The symmetric tridiagonal eigenproblem by divide and conquer (Cuppen 1981; Gu and Eisenstat 1995).
//!
//! A matrix is cut into two by taking a matrix of rank one out of its middle; the halves are solved, and the sum of their
//! diagonal form and that matrix by its [secular equation](super::secular). Everything but the eigenvectors
//! themselves is computed in f64: the equation needs of the vectors their first and last entries only, which are kept
//! apart. So eigenvalues alone cost little, and the eigenvectors of an f32 problem may be f32.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd_scratch, tridiagonal_self_adjoint_evd};
use faer::{Mat, MatMut, Par, Spec};

use super::Threads;
use super::dense::Real;
use super::merge::Merge;

/// Below this size a matrix is not cut.
const LEAF: usize = 32;

/// The eigenvalues of a part of the matrix, ascending, and of every eigenvector the first and the last entry.
pub(super) struct Solved {
    pub(super) values: Vec<f64>,
    pub(super) first: Vec<f64>,
    pub(super) last: Vec<f64>,
}

/// How many of the eigenvectors are wanted, those of the largest eigenvalues, given all eigenvalues in ascending order.
pub(super) type Wanted<'a> = &'a (dyn Fn(&[f64]) -> usize + Sync);

/// All eigenvalues, ascending, of the symmetric tridiagonal matrix with this `diagonal` and the entries `below` it (one
/// fewer). The columns of `vectors`, if given (`[n, n]`, all zeros), become the eigenvectors; only the last of them, as
/// many as are `wanted`, are computed. `None` if the iteration of a small part did not converge.
pub(super) fn solve<T: Real>(
    diagonal: &[f64],
    below: &[f64],
    vectors: Option<MatMut<'_, T>>,
    wanted: Wanted<'_>,
    threads: Threads,
) -> Option<Vec<f64>> {
    if diagonal.is_empty() {
        return Some(Vec::new());
    }
    let largest = diagonal.iter().chain(below).fold(0.0_f64, |a, x| a.max(x.abs()));
    if !largest.is_finite() {
        return None;
    }
    // A power of two, which rounds nothing.
    let scale = if largest > 0.0 { largest.log2().floor().exp2() } else { 1.0 };
    let scaled = |values: &[f64]| values.iter().map(|x| x / scale).collect::<Vec<_>>();
    let unscaled = |values: &[f64]| values.iter().map(|x| x * scale).collect::<Vec<_>>();
    let wanted = |values: &[f64]| wanted(&unscaled(values));
    let solved = cut(&mut scaled(diagonal), &scaled(below), vectors, Some(&wanted), threads)?;
    Some(unscaled(&solved.values))
}

/// Solves a part; `wanted` is given for the whole.
fn cut<T: Real>(
    diagonal: &mut [f64],
    below: &[f64],
    vectors: Option<MatMut<'_, T>>,
    wanted: Option<Wanted<'_>>,
    threads: Threads,
) -> Option<Solved> {
    let n = diagonal.len();
    if n <= LEAF {
        return leaf(diagonal, below, vectors);
    }
    let middle = n / 2;
    let coupling = below[middle - 1];
    let (top, bottom) = diagonal.split_at_mut(middle);
    top[middle - 1] -= coupling.abs();
    bottom[0] -= coupling.abs();
    let mut vectors = vectors;
    let (top_vectors, bottom_vectors) = match vectors.as_mut() {
        None => (None, None),
        Some(vectors) => {
            let (top, _, _, bottom) = vectors.as_mut().split_at_mut(middle, middle);
            (Some(top), Some(bottom))
        }
    };
    let (top, bottom) = threads.join(
        || cut(top, &below[..middle - 1], top_vectors, None, threads),
        || cut(bottom, &below[middle..], bottom_vectors, None, threads),
    );
    Some(Merge::new(&top?, &bottom?, coupling).finish(vectors, wanted, threads))
}

fn leaf<T: Real>(diagonal: &[f64], below: &[f64], vectors: Option<MatMut<'_, T>>) -> Option<Solved> {
    let n = diagonal.len();
    let (mut d, mut e) = (Diag::zeros(n), Diag::zeros(n));
    for i in 0..n {
        d[i] = diagonal[i];
        e[i] = below.get(i).copied().unwrap_or(0.0);
    }
    let mut values = Diag::zeros(n);
    let mut q = Mat::<f64>::identity(n, n);
    if n > 1 {
        let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Spec::default());
        let stack = &mut MemBuffer::new(scratch);
        let (d, e) = (d.as_ref(), e.as_ref());
        let (stack, spec) = (MemStack::new(stack), Spec::default());
        tridiagonal_self_adjoint_evd(d, e, values.as_mut(), Some(q.as_mut()), Par::Seq, stack, spec).ok()?;
    } else {
        values = d;
    }
    if let Some(mut vectors) = vectors {
        for j in 0..n {
            for i in 0..n {
                vectors[(i, j)] = T::rounded(q[(i, j)]);
            }
        }
    }
    let values = values.column_vector().iter().copied().collect();
    let row = |i: usize| q.row(i).iter().copied().collect();
    Some(Solved { values, first: row(0), last: row(n - 1) })
}
