//! The eigenvalues and eigenvectors of a diagonal matrix plus one of rank one, `diag(d) + ρ z zᵀ` with ρ > 0: the step
//! that joins the halves of a divide-and-conquer eigensolver.
//!
//! The eigenvalues are the roots of 1/ρ + Σ zᵢ² / (dᵢ - λ), one behind every pole. Each is held as a pole and an offset
//! from it, so that all differences dᵢ - λ are known to full relative precision, and the eigenvectors are those of the
//! z that has exactly these roots (Gu and Eisenstat 1995), which makes them orthogonal however close the roots are.

use pulp::{Simd, WithSimd};

/// Partial sums of a loop.
const LANES: usize = 16;

/// An eigenvalue, `d[pole] + offset`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pole: usize,
    offset: f64,
}

/// The problem: `d` strictly ascending, no `z` zero.
pub(super) struct Secular<'a> {
    pub(super) d: &'a [f64],
    pub(super) z: &'a [f64],
    pub(super) rho: f64,
}

/// Σ zᵢ² / (dᵢ - λ) over the poles on one side of a root, and its derivative.
#[derive(Clone, Copy)]
struct Side {
    value: f64,
    slope: f64,
}

impl Secular<'_> {
    pub(super) fn value(&self, root: Root) -> f64 {
        self.d[root.pole] + root.offset
    }

    /// Both sides of root `j` at `d[origin] + offset`.
    #[inline(always)]
    fn sides(&self, j: usize, origin: usize, offset: f64) -> (Side, Side) {
        let at = self.d[origin];
        let (below, above) = (..=j, j + 1..);
        (
            side(&self.d[below], &self.z[below], at, offset),
            side(&self.d[above.clone()], &self.z[above], at, offset),
        )
    }

    /// Between two poles the function is modelled by one with those two poles that has its value and, on either side,
    /// its slope (the middle way of Li 1993); behind the last pole by one with that pole (Bunch, Nielsen and Sorensen
    /// 1978). A bracket guards both.
    #[inline(always)]
    fn root(&self, j: usize) -> Root {
        const ITERATIONS: usize = 200;
        const TRUSTED: usize = 24;
        let constant = self.rho.recip();
        let is_last = j + 1 == self.d.len();
        let width = if is_last {
            self.z.iter().map(|z| z * z).sum::<f64>() * self.rho
        } else {
            self.d[j + 1] - self.d[j]
        };
        let half = 0.5 * width;
        let (below, above) = self.sides(j, j, half);
        let is_upper = constant + below.value + above.value < 0.0;
        let (pole, mut low, mut high, mut offset) = match (is_upper, is_last) {
            (false, _) => (j, 0.0, half, half),
            (true, true) => (j, half, width * (1.0 + 4.0 * f64::EPSILON), half),
            (true, false) => (j + 1, -half, 0.0, -half),
        };
        // The poles next to the root, seen from the origin.
        let left = self.d[j] - self.d[pole];
        let right = if is_last { 0.0 } else { self.d[j + 1] - self.d[pole] };
        for iteration in 0..ITERATIONS {
            let (below, above) = self.sides(j, pole, offset);
            let value = constant + below.value + above.value;
            let rounding = 8.0 * f64::EPSILON * (constant - below.value + above.value);
            if value.abs() <= rounding {
                break;
            }
            if value < 0.0 {
                low = offset;
            } else {
                high = offset;
            }
            let (a, b) = (left - offset, right - offset);
            let step = if is_last {
                // value + slope-matched pole: c + s / (a - step) = 0.
                let c = value - a * below.slope;
                a + a * a * below.slope / c
            } else {
                let c = value - a * below.slope - b * above.slope;
                let half_sum = 0.5 * ((a + b) * value - a * b * (below.slope + above.slope));
                let product = a * b * value;
                let root = (half_sum * half_sum - product * c).max(0.0).sqrt();
                if half_sum <= 0.0 { (half_sum - root) / c } else { product / (half_sum + root) }
            };
            let mut next = offset + step;
            if !(next > low && next < high) || iteration >= TRUSTED {
                next = between(low, high);
            }
            if next == offset || !(next > low && next < high) {
                break;
            }
            offset = next;
        }
        Root { pole, offset }
    }
}

/// Finds the roots with the numbers from `from` on.
pub(super) struct Solve<'a> {
    pub(super) secular: &'a Secular<'a>,
    pub(super) from: usize,
    pub(super) roots: &'a mut [Root],
}

impl WithSimd for Solve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (j, root) in self.roots.iter_mut().enumerate() {
            *root = self.secular.root(self.from + j);
        }
    }
}

/// Finds the z that has exactly these roots, from entry `from` on.
pub(super) struct Consistent<'a> {
    pub(super) secular: &'a Secular<'a>,
    pub(super) roots: &'a [Root],
    pub(super) from: usize,
    pub(super) z: &'a mut [f64],
}

impl WithSimd for Consistent<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { secular, roots, from, z } = self;
        let count = z.len();
        let d = &secular.d[from..from + count];
        z.fill(1.0);
        for (j, root) in roots.iter().enumerate() {
            let (origin, pole) = (secular.d[root.pole], secular.d[j]);
            // Entry j itself has no pole to be divided by.
            let own = j.checked_sub(from).filter(|own| *own < count);
            let kept = own.map(|own| z[own] * (root.offset - (d[own] - origin)));
            for (z, d) in z.iter_mut().zip(d) {
                *z *= (root.offset - (d - origin)) / (pole - d);
            }
            if let (Some(own), Some(kept)) = (own, kept) {
                z[own] = kept;
            }
        }
        for (z, sign) in z.iter_mut().zip(&secular.z[from..]) {
            *z = z.abs().sqrt().copysign(*sign);
        }
    }
}

/// The eigenvector of `root`, of unit length, for the z of [`Consistent`]; gives its products with two others.
pub(super) struct Vector<'a> {
    pub(super) secular: &'a Secular<'a>,
    pub(super) z: &'a [f64],
    pub(super) root: Root,
    pub(super) out: &'a mut [f64],
    pub(super) others: [&'a [f64]; 2],
}

impl WithSimd for Vector<'_> {
    type Output = [f64; 2];

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> [f64; 2] {
        let Self { secular, z, root, out, others } = self;
        let origin = secular.d[root.pole];
        for ((v, z), d) in out.iter_mut().zip(z).zip(secular.d) {
            *v = z / ((d - origin) - root.offset);
        }
        let scale = dot(out, out).sqrt().recip();
        for v in out.iter_mut() {
            *v *= scale;
        }
        [dot(out, others[0]), dot(out, others[1])]
    }
}

impl Root {
    pub(super) const NONE: Self = Self { pole: 0, offset: 0.0 };
}

/// A number between two that are not of opposite signs: the geometric mean where they are far apart.
fn between(low: f64, high: f64) -> f64 {
    const FAR: f64 = 16.0;
    let (near, far) = if low.abs() < high.abs() { (low, high) } else { (high, low) };
    if near == 0.0 {
        far / FAR
    } else if far / near > FAR {
        (near.abs().sqrt() * far.abs().sqrt()).copysign(far)
    } else {
        0.5 * (low + high)
    }
}

#[inline(always)]
fn side(d: &[f64], z: &[f64], origin: f64, offset: f64) -> Side {
    let term = |d: f64, z: f64| {
        let inverse = ((d - origin) - offset).recip();
        let value = z * z * inverse;
        (value, value * inverse)
    };
    let (mut values, mut slopes) = ([0.0; LANES], [0.0; LANES]);
    let (ds, rest_d) = d.as_chunks::<LANES>();
    let (zs, rest_z) = z.as_chunks::<LANES>();
    for (d, z) in ds.iter().zip(zs) {
        for lane in 0..LANES {
            let (value, slope) = term(d[lane], z[lane]);
            values[lane] += value;
            slopes[lane] += slope;
        }
    }
    for (lane, (&d, &z)) in rest_d.iter().zip(rest_z).enumerate() {
        let (value, slope) = term(d, z);
        values[lane] += value;
        slopes[lane] += slope;
    }
    Side { value: values.iter().sum(), slope: slopes.iter().sum() }
}

/// Σ aᵢ bᵢ.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; LANES];
    let (xs, rest_a) = a.as_chunks::<LANES>();
    let (ys, rest_b) = b.as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in rest_a.iter().zip(rest_b).enumerate() {
        sums[lane] += x * y;
    }
    sums.iter().sum()
}
