//! The theorems that the factorisations rest on, checked on matrices that are hard for them.

mod eigen;
mod input;
mod reference;
mod refit;
mod svd;
mod threads;
mod whitened;

use super::*;

/// Normal values from a small generator of its own (splitmix64, Box and Muller), the same on every machine.
struct Normal(u64);

impl Normal {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn value(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> Matrix {
        Matrix::new(rows, cols, (0..rows * cols).map(|_| self.value()).collect()).unwrap()
    }
}

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    Normal(seed).matrix(rows, cols)
}

fn mul(a: &Matrix, b: &Matrix) -> Matrix {
    a.matmul(b).unwrap()
}

fn combine(a: &Matrix, b: &Matrix, factor: f64) -> Matrix {
    let data = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| a + factor * b).collect();
    Matrix::new(a.rows(), a.cols(), data).unwrap()
}

/// An orthonormal basis of n-space.
fn rotation(n: usize, seed: u64) -> Matrix {
    let a = random(n, n, seed);
    symmetric_eigen(&combine(&a, &a.transpose(), 1.0)).unwrap().vectors
}

/// A matrix with the given singular values.
fn with_singular_values(rows: usize, cols: usize, values: &[f64], seed: u64) -> Matrix {
    let (left, right) = (rotation(rows, seed), rotation(cols, seed + 1));
    let mut middle = Matrix::zeros(rows, cols);
    for (i, s) in values.iter().enumerate() {
        middle.as_mut_slice()[i * cols + i] = *s;
    }
    mul(&mul(&left, &middle), &right.transpose())
}

/// The second moment of `tokens` inputs with a few strong directions, as activations have them.
fn moment(dim: usize, tokens: usize, seed: u64) -> Matrix {
    let mut x = random(tokens, dim, seed);
    for row in x.as_mut_slice().chunks_exact_mut(dim) {
        for (i, value) in row.iter_mut().enumerate() {
            *value *= 0.1 + 20.0 / (1 + i) as f64;
        }
    }
    mul(&x.transpose(), &x)
}

fn product(f: &Factors) -> Matrix {
    mul(&f.u, &f.v)
}

fn distance(a: &Matrix, b: &Matrix) -> f64 {
    combine(a, b, -1.0).norm_squared()
}

fn tail(f: &Factors) -> f64 {
    f.spectrum[f.rank()..].iter().sum()
}

fn assert_orthonormal(columns: &Matrix) {
    let gram = mul(&columns.transpose(), columns);
    let error = distance(&gram, &Matrix::identity(columns.cols())).sqrt();
    assert!(error < 1e-11 * (1 + columns.cols()) as f64, "not orthonormal by {error:e}");
}

fn assert_descending(values: &[f64]) {
    assert!(values.windows(2).all(|w| w[0] >= w[1]), "not descending");
    assert!(values.iter().all(|x| *x >= 0.0), "negative");
}

/// Shapes on both sides of the block sizes of the solvers, wide, square and tall.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (1, 7), (9, 1), (24, 40), (40, 24), (33, 33), (150, 260), (260, 150), (129, 128)];
