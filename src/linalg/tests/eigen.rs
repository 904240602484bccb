//! Symmetric eigenproblems.

use super::*;

#[test]
fn eigenvectors_diagonalise() {
    for n in [0, 1, 2, 3, 17, 127, 128, 200] {
        let a = random(n, n, 5);
        let a = combine(&a, &a.transpose(), 1.0);
        let e = symmetric_eigen(&a).unwrap();
        assert!(e.values.windows(2).all(|w| w[0] >= w[1]));
        assert_orthonormal(&e.vectors);
        let mut scaled = e.vectors.clone();
        for i in 0..n {
            for j in 0..n {
                scaled.as_mut_slice()[i * n + j] *= e.values[j];
            }
        }
        assert!(distance(&mul(&a, &e.vectors), &scaled) <= 1e-22 * (1.0 + a.norm_squared()) * (1 + n) as f64);
        for j in 0..n {
            let column: Vec<f64> = (0..n).map(|i| e.vectors.as_slice()[i * n + j]).collect();
            let largest = column.iter().fold(0.0_f64, |a, x| if x.abs() > a.abs() { *x } else { a });
            assert!(largest > 0.0);
        }
    }
}

/// The tridiagonal matrix with this diagonal and subdiagonal.
fn tridiagonal(diagonal: &[f64], below: &[f64]) -> Matrix {
    let n = diagonal.len();
    let mut m = Matrix::zeros(n, n);
    for i in 0..n {
        m.as_mut_slice()[i * n + i] = diagonal[i];
        if i + 1 < n {
            m.as_mut_slice()[i * n + i + 1] = below[i];
            m.as_mut_slice()[(i + 1) * n + i] = below[i];
        }
    }
    m
}

/// Matrices that take a divide-and-conquer solver through all of its cases: equal eigenvalues, some that agree to
/// rounding, halves that do not touch, entries of very different size.
#[test]
fn eigenvectors_of_tridiagonal_matrices() {
    let wilkinson = |n: usize| (0..n).map(|i| (i as f64 - (n / 2) as f64).abs()).collect::<Vec<_>>();
    let glued: Vec<f64> = (0..5).flat_map(|_| wilkinson(21)).collect();
    let links = (1..105).map(|i| if i % 21 == 0 { 1e-9 } else { 1.0 }).collect();
    let graded = (0..130).map(|i| 10f64.powi(-(i / 8))).collect::<Vec<_>>();
    let cases: [(&str, Vec<f64>, Vec<f64>); 8] = [
        ("laplacian", vec![2.0; 333], vec![-1.0; 332]),
        ("wilkinson", wilkinson(101), vec![1.0; 100]),
        ("glued", glued, links),
        ("identity", vec![1.0; 97], vec![0.0; 96]),
        ("zero diagonal", vec![0.0; 150], vec![1.0; 149]),
        ("weak middle", vec![1.0; 120], (0..119).map(|i| if i == 59 { 1e-300 } else { 0.5 }).collect()),
        ("graded", graded.clone(), graded[1..].to_vec()),
        ("large", vec![1e200; 70], vec![-3e200; 69]),
    ];
    for (name, diagonal, below) in cases {
        let (n, a) = (diagonal.len(), tridiagonal(&diagonal, &below));
        let scale = a.as_slice().iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        let a = Matrix::new(n, n, a.into_vec().into_iter().map(|x| x / scale).collect()).unwrap();
        let e = symmetric_eigen(&a).unwrap();
        assert!(e.values.windows(2).all(|w| w[0] >= w[1]), "{name}");
        assert_orthonormal(&e.vectors);
        let mut scaled = e.vectors.clone();
        for (i, value) in scaled.as_mut_slice().iter_mut().enumerate() {
            *value *= e.values[i % n];
        }
        let error = distance(&mul(&a, &e.vectors), &scaled).sqrt();
        assert!(error < 1e-14 * n as f64, "{name}: {error:e}");
        if name == "laplacian" {
            for (k, value) in e.values.iter().rev().enumerate() {
                let angle = std::f64::consts::PI * (k + 1) as f64 / (n + 1) as f64;
                assert!((value - (1.0 - angle.cos())).abs() < 1e-14, "{k}");
            }
        }
    }
}

#[test]
fn eigenvectors_of_degenerate_matrices() {
    for n in [5, 160] {
        for a in [Matrix::zeros(n, n), Matrix::identity(n)] {
            let e = symmetric_eigen(&a).unwrap();
            assert_orthonormal(&e.vectors);
            assert!(e.values.iter().all(|x| (x - a.as_slice()[0]).abs() < 1e-14));
        }
        let x = random(n, 3, 1);
        let e = symmetric_eigen(&mul(&x, &x.transpose())).unwrap();
        assert_orthonormal(&e.vectors);
        assert!(e.values[3].abs() < 1e-12 * e.values[0]);
    }
}
