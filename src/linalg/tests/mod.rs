//! The theorems that the factorisations rest on, checked on matrices that are hard for them.

use super::svd::truncated_svd_direct;
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

#[test]
fn the_loss_is_the_tail_of_the_spectrum() {
    for (out, input) in SHAPES {
        let w = random(out, input, 11);
        let short = out.min(input);
        for rank in [0, 1, short / 4, short / 2, short - 1, short] {
            let f = truncated_svd(&w, rank).unwrap();
            assert_eq!((f.u.shape(), f.v.shape(), f.spectrum.len()), ((out, rank), (rank, input), short));
            assert_descending(&f.spectrum);
            assert!((f.energy() / w.norm_squared() - 1.0).abs() < 1e-12);
            let measured = distance(&w, &product(&f));
            assert!((measured - f.loss).abs() <= 1e-12 * f.energy());
            assert!((tail(&f) - f.loss).abs() <= 1e-12 * f.energy());
            if out <= input {
                assert_orthonormal(&f.u);
            } else {
                assert_orthonormal(&f.v.transpose());
            }
        }
    }
}

#[test]
fn full_rank_gives_the_weight_back() {
    for (out, input) in SHAPES {
        let w = random(out, input, 3);
        let short = out.min(input);
        for tokens in [0, 1, short / 2, 3 * input] {
            let c = moment(input, tokens, 4);
            for f in [truncated_svd(&w, short).unwrap(), whitened_svd(&w, &c, short).unwrap()] {
                let error = (distance(&w, &product(&f)) / w.norm_squared()).sqrt();
                assert!(error < 1e-10, "{out} x {input}, {tokens} tokens: {error:e}");
            }
        }
    }
}

#[test]
fn an_exact_low_rank_is_recovered() {
    for (out, input) in [(60, 200), (200, 60), (140, 300), (300, 140)] {
        let w = mul(&random(out, 20, 1), &random(20, input, 2));
        let c = moment(input, 2 * input, 3);
        for f in [truncated_svd(&w, 20).unwrap(), truncated_svd(&w, 33).unwrap()] {
            assert!((distance(&w, &product(&f)) / w.norm_squared()).sqrt() < 1e-12);
            assert!(f.spectrum[20] < 1e-13 * f.spectrum[0]);
        }
        for rank in [20, 33] {
            let f = whitened_svd(&w, &c, rank).unwrap();
            assert!((distance(&w, &product(&f)) / w.norm_squared()).sqrt() < 1e-7);
            assert!(f.loss < 1e-12 * f.energy());
            assert_orthonormal(&f.u);
        }
    }
}

#[test]
fn columns_without_entries_do_no_harm() {
    // The QR decomposition of the tall ones meets columns that it cannot use, at the front, inside and at the end.
    for (out, input) in [(70, 40), (300, 200), (40, 70)] {
        let mut w = random(out, input, 8);
        for row in w.as_mut_slice().chunks_exact_mut(input) {
            for j in [0, 1, 17, 18, 30, input - 1] {
                row[j] = 0.0;
            }
            row[21] = 2.0 * row[20];
            row[5] = row[25] - row[12];
        }
        for tokens in [0, 10, 2 * input] {
            let c = moment(input, tokens, 9);
            for rank in [1, 20, out.min(input)] {
                let f = whitened_svd(&w, &c, rank).unwrap();
                let loss = data_loss(&w, &product(&f), &c).unwrap();
                assert_orthonormal(&f.u);
                assert!((loss - tail(&f)).abs() <= 2e-7 * f.energy(), "{out} x {input}: {loss} {}", tail(&f));
                let right = mul(&f.u.transpose(), &w);
                assert!(distance(&right, &f.v) <= 1e-20 * w.norm_squared());
            }
        }
    }
}

#[test]
fn ill_conditioned_weights_reach_the_optimum() {
    let n = 160;
    let values: Vec<f64> = (0..n).map(|i| 1e7_f64.powf(-(i as f64) / (n - 1) as f64)).collect();
    for (out, input) in [(n, 230), (230, n)] {
        let w = with_singular_values(out, input, &values, 21);
        for rank in [n / 4, n / 2, 3 * n / 4] {
            let best: f64 = values[rank..].iter().map(|s| s * s).sum();
            for f in [truncated_svd(&w, rank).unwrap(), truncated_svd_direct(&w, rank).unwrap()] {
                let measured = distance(&w, &product(&f));
                assert!((measured / best - 1.0).abs() < 1e-6, "rank {rank}: {measured:e} for {best:e}");
                assert!((f.loss / best - 1.0).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn both_routes_agree() {
    for (out, input) in SHAPES {
        let w = random(out, input, 17);
        let rank = out.min(input) / 2;
        let (gram, direct) = (truncated_svd(&w, rank).unwrap(), truncated_svd_direct(&w, rank).unwrap());
        assert!(distance(&product(&gram), &product(&direct)) < 1e-18 * w.norm_squared());
        for (a, b) in gram.spectrum.iter().zip(&direct.spectrum) {
            assert!((a - b).abs() < 1e-12 * gram.spectrum[0]);
        }
    }
}

#[test]
fn the_data_loss_is_the_tail_of_the_spectrum() {
    for (out, input) in SHAPES {
        let w = random(out, input, 31);
        let short = out.min(input);
        for tokens in [0, 1, short / 3, input, 4 * input] {
            let c = moment(input, tokens, 32);
            let all = spectrum(&w, Some(&c)).unwrap();
            for rank in [0, 1, short / 4, short / 2, short - 1, short] {
                let f = whitened_svd(&w, &c, rank).unwrap();
                assert_eq!((f.u.shape(), f.v.shape(), f.spectrum.len()), ((out, rank), (rank, input), short));
                assert_descending(&f.spectrum);
                assert_orthonormal(&f.u);
                let measured = data_loss(&w, &product(&f), &c).unwrap();
                let energy = data_loss(&w, &Matrix::zeros(out, input), &c).unwrap();
                assert!((f.energy() - energy).abs() <= 1e-11 * energy);
                assert!((measured - tail(&f)).abs() <= 2e-7 * energy, "{out} x {input}, {tokens} tokens");
                assert!((measured - f.loss).abs() <= 1e-11 * energy);
                for (a, b) in all.iter().zip(&f.spectrum) {
                    assert!((a - b).abs() <= 1e-12 * energy);
                }
            }
        }
    }
}

#[test]
fn the_optimum_is_that_of_any_whitening() {
    // SVD-LLM literally: truncate W T with T = V sqrt(Λ) from C = V Λ Vᵀ.
    for (out, input) in [(50, 80), (80, 50)] {
        let (w, c) = (random(out, input, 41), moment(input, 4 * input, 42));
        let e = symmetric_eigen(&c).unwrap();
        let (mut t, mut inverse) = (e.vectors.clone(), e.vectors.transpose());
        for i in 0..input {
            for j in 0..input {
                t.as_mut_slice()[i * input + j] *= e.values[j].sqrt();
                inverse.as_mut_slice()[i * input + j] /= e.values[i].sqrt();
            }
        }
        let whitened = truncated_svd(&mul(&w, &t), 20).unwrap();
        let expected = mul(&product(&whitened), &inverse);
        let f = whitened_svd(&w, &c, 20).unwrap();
        assert!((f.loss / whitened.loss - 1.0).abs() < 1e-9);
        assert!(distance(&product(&f), &expected) < 1e-14 * w.norm_squared());
    }
}

#[test]
fn no_small_change_of_the_factors_is_better() {
    let mut noise = Normal(50);
    for (out, input) in [(20, 30), (30, 20)] {
        let w = noise.matrix(out, input);
        for tokens in [6, 100] {
            let c = moment(input, tokens, 51);
            let plain = truncated_svd(&w, 5).unwrap();
            let aware = whitened_svd(&w, &c, 5).unwrap();
            for step in [1e-6, 1e-4, 1e-2, 1.0] {
                for _ in 0..20 {
                    let mut changed = |f: &Factors| {
                        let u = combine(&f.u, &noise.matrix(out, 5), step);
                        let v = combine(&f.v, &noise.matrix(5, input), step);
                        mul(&u, &v)
                    };
                    assert!(distance(&w, &changed(&plain)) >= plain.loss * (1.0 - 1e-12));
                    let loss = data_loss(&w, &changed(&aware), &c).unwrap();
                    assert!(loss >= aware.loss - 1e-12 * aware.energy());
                }
            }
            assert!(aware.loss <= data_loss(&w, &product(&plain), &c).unwrap());
        }
    }
}

#[test]
fn directions_without_data_follow_the_weight() {
    for (out, input) in [(24, 40), (40, 24)] {
        let w = random(out, input, 61);
        // No token at all: the plain truncation, at no loss on data.
        let f = whitened_svd(&w, &Matrix::zeros(input, input), 7).unwrap();
        let plain = truncated_svd(&w, 7).unwrap();
        assert!(distance(&product(&f), &product(&plain)) < 1e-18 * w.norm_squared());
        assert!(f.loss == 0.0 && f.spectrum.iter().all(|x| *x == 0.0));
        // Three tokens: their directions first, then the best of what is left of the weight.
        let c = moment(input, 3, 62);
        let three = whitened_svd(&w, &c, 3).unwrap();
        let ten = whitened_svd(&w, &c, 10).unwrap();
        assert!(three.loss < 1e-12 * three.energy());
        let rest = truncated_svd(&combine(&w, &product(&three), -1.0), 7).unwrap();
        assert!((distance(&w, &product(&ten)) / rest.loss - 1.0).abs() < 1e-5);
    }
}

#[test]
fn damping_never_costs_more_than_promised() {
    // The data use only directions in which the weight is small: damping everything would lose most of the energy.
    let (out, input) = (30, 50);
    let mut w = random(out, input, 71);
    for row in w.as_mut_slice().chunks_exact_mut(input) {
        row[..10].iter_mut().for_each(|x| *x *= 1e-4);
    }
    let mut c = Matrix::zeros(input, input);
    for i in 0..10 {
        c.as_mut_slice()[i * input + i] = (1 + i) as f64;
    }
    for rank in [2, 5, 10, 20] {
        let f = whitened_svd(&w, &c, rank).unwrap();
        let loss = data_loss(&w, &product(&f), &c).unwrap();
        assert!((loss - tail(&f)).abs() <= 2e-7 * f.energy(), "rank {rank}: {loss:e} for {:e}", tail(&f));
    }
}

#[test]
fn data_that_miss_the_weight_count_as_none() {
    // C is large, but W C is rounding only.
    for (out, input) in [(12, 30), (40, 30)] {
        let basis = rotation(input, 81);
        let split = |from: usize, to: usize| {
            let rows: Vec<f64> = (from..to).flat_map(|j| basis.transpose().row(j).to_vec()).collect();
            Matrix::new(to - from, input, rows).unwrap()
        };
        let (seen, stored) = (split(0, 10), split(10, input));
        let w = mul(&random(out, input - 10, 82), &stored);
        let f = whitened_svd(&w, &mul(&seen.transpose(), &seen), 8).unwrap();
        assert!(f.energy() < 1e-12 * w.norm_squared());
        let plain = truncated_svd(&w, 8).unwrap();
        assert!((distance(&w, &product(&f)) / plain.loss - 1.0).abs() < 1e-6);
    }
}

#[test]
fn moments_rounded_to_f32_are_accepted() {
    let (out, input) = (30, 60);
    let w = random(out, input, 91);
    for tokens in [5, 100] {
        let c = moment(input, tokens, 92);
        let rounded = Matrix::from_f32(input, input, &c.to_f32()).unwrap();
        for rank in [3, 15, 29] {
            let (f, g) = (whitened_svd(&w, &c, rank).unwrap(), whitened_svd(&w, &rounded, rank).unwrap());
            let loss = data_loss(&w, &product(&g), &c).unwrap();
            assert!((loss - f.loss).abs() < 1e-5 * f.energy());
        }
    }
}

#[test]
fn spectra_without_factors_are_the_same() {
    for (out, input) in SHAPES {
        let w = random(out, input, 101);
        let f = truncated_svd(&w, 0).unwrap();
        for (a, b) in spectrum(&w, None).unwrap().iter().zip(&f.spectrum) {
            assert!((a - b).abs() <= 1e-12 * f.spectrum[0]);
        }
    }
}

fn to_bf16(m: &Matrix) -> Matrix {
    let data = m.as_slice().iter().map(|&x| half::bf16::from_f64(x).to_f64()).collect();
    Matrix::new(m.rows(), m.cols(), data).unwrap()
}

#[test]
fn refitting_makes_up_for_rounding() {
    for (out, input) in [(40, 90), (90, 40)] {
        let (w, c) = (random(out, input, 111), moment(input, 3 * input, 112));
        let f = whitened_svd(&w, &c, 15).unwrap();
        let (u, v) = (to_bf16(&f.u), to_bf16(&f.v));
        let rounded = data_loss(&w, &mul(&u, &v), &c).unwrap();
        let left = refit_left(&w, &v, Some(&c)).unwrap();
        assert!(data_loss(&w, &mul(&left, &v), &c).unwrap() < rounded);

        // The residual of a least squares solution is orthogonal to what it was fitted with.
        let right = refit_right(&u, &w).unwrap();
        let rest = combine(&w, &mul(&u, &right), -1.0);
        assert!(mul(&u.transpose(), &rest).norm_squared() < 1e-22 * w.norm_squared());
        let left = refit_left(&w, &v, None).unwrap();
        let rest = combine(&w, &mul(&left, &v), -1.0);
        assert!(mul(&rest, &v.transpose()).norm_squared() < 1e-22 * w.norm_squared() * v.norm_squared());
        let plain = truncated_svd(&w, 15).unwrap();
        let best = plain.loss;
        let (u, v) = (to_bf16(&plain.u), to_bf16(&plain.v));
        let rounded = distance(&w, &mul(&u, &v));
        let fitted = distance(&w, &mul(&u, &refit_right(&u, &w).unwrap()));
        assert!(best <= fitted && fitted < rounded);
    }
}

#[test]
fn refitting_accepts_factors_that_are_dependent() {
    let w = random(20, 30, 121);
    let mut u = random(20, 6, 122);
    for row in u.as_mut_slice().chunks_exact_mut(6) {
        row[2] = 0.0;
        row[5] = row[0] + row[1];
    }
    let best = {
        let kept: Vec<f64> = u.as_slice().chunks_exact(6).flat_map(|r| [r[0], r[1], r[3], r[4]]).collect();
        let kept = Matrix::new(20, 4, kept).unwrap();
        distance(&w, &mul(&kept, &refit_right(&kept, &w).unwrap()))
    };
    let v = refit_right(&u, &w).unwrap();
    assert!((distance(&w, &mul(&u, &v)) / best - 1.0).abs() < 1e-9);
    assert!(v.row(2).iter().all(|x| *x == 0.0));

    // Without data the plain solution stays; with three tokens it is never worse on them.
    let v = random(6, 30, 123);
    let plain = refit_left(&w, &v, None).unwrap();
    assert_eq!(refit_left(&w, &v, Some(&Matrix::zeros(30, 30))).unwrap(), plain);
    let c = moment(30, 3, 124);
    let fitted = refit_left(&w, &v, Some(&c)).unwrap();
    let loss = |u: &Matrix| data_loss(&w, &mul(u, &v), &c).unwrap();
    assert!(loss(&fitted) < 1e-6 * loss(&plain));
    assert_eq!(refit_right(&Matrix::zeros(20, 0), &w).unwrap().shape(), (0, 30));
}

#[test]
fn the_bytes_do_not_depend_on_the_threads() {
    let (w, c) = (random(170, 300, 131), moment(300, 90, 132));
    let (t, d) = (w.transpose(), moment(170, 400, 133));
    let run = || {
        [
            truncated_svd(&w, 60).unwrap(),
            truncated_svd(&t, 60).unwrap(),
            whitened_svd(&w, &c, 120).unwrap(),
            whitened_svd(&t, &d, 60).unwrap(),
        ]
        .map(|f| {
            let refit = (refit_right(&f.u, &mul(&f.u, &f.v)).unwrap(), f.loss.to_bits());
            (f, refit)
        })
    };
    let alone = run();
    for threads in [1, 2, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(run) == alone, "{threads} threads");
    }
}

/// Large enough for every product, update and merge to be cut into parts, in f32 and in f64.
#[test]
fn large_factors_are_optimal_and_the_same_on_any_threads() {
    let (w, c) = (random(560, 700, 141), moment(700, 300, 142));
    let tall = w.transpose();
    let run = |threads| {
        [
            low_rank(&w, None, 140, threads),
            low_rank(&tall, None, 140, threads),
            low_rank(&w, Some(&c), 100, threads),
        ]
        .map(Result::unwrap)
    };
    let alone = run(Threads::One);
    for threads in [1, 2, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(|| run(Threads::All)) == alone, "{threads} threads");
    }
    for (w, found) in [(&w, &alone[0]), (&tall, &alone[1])] {
        let best: f64 = spectrum(w, None).unwrap()[140..].iter().sum();
        let lost = distance(w, &mul(&found.u, &found.v));
        assert!((lost / best - 1.0).abs() < 1e-6, "{lost} instead of {best}");
        assert!(
            (found.loss / lost - 1.0).abs() < 1e-5 && (found.energy / w.norm_squared() - 1.0).abs() < 1e-12
        );
    }
    let best: f64 = spectrum(&w, Some(&c)).unwrap()[100..].iter().sum();
    let lost = data_loss(&w, &mul(&alone[2].u, &alone[2].v), &c).unwrap();
    assert!((lost / best - 1.0).abs() < 1e-6, "{lost} instead of {best}");
}

/// Weights that f32 cannot factorise well go to f64, whatever their scale.
#[test]
fn factors_alone_are_as_good_as_those_with_a_spectrum() {
    for decay in [1e-2, 1e-4, 1e-8_f64] {
        for scale in [1e-30, 1.0, 1e30] {
            // One value far above the others hides them from f32.
            let value = |i| if i == 0 { 0.1 / decay } else { decay.powf(i as f64 / 259.0) };
            let values: Vec<f64> = (0..260).map(|i| scale * value(i)).collect();
            let w = with_singular_values(260, 300, &values, 151);
            for rank in [0, 1, 130, 250] {
                let found = low_rank(&w, None, rank, Threads::All).unwrap();
                let best: f64 = values[rank..].iter().map(|s| s * s).sum();
                let energy: f64 = values.iter().map(|s| s * s).sum();
                let lost = distance(&w, &mul(&found.u, &found.v));
                assert!(
                    lost <= best * (1.0 + 1e-6) + 1e-12 * energy,
                    "{decay} {scale} {rank}: {lost} {best}"
                );
            }
        }
    }
}

#[test]
fn bad_input_is_an_error() {
    let (w, c) = (random(4, 6, 1), Matrix::identity(6));
    let poke = |m: &Matrix, at: usize, value: f64| {
        let mut m = m.clone();
        m.as_mut_slice()[at] = value;
        m
    };
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let bad = poke(&w, 8, value);
        for error in [
            truncated_svd(&bad, 2).unwrap_err(),
            whitened_svd(&bad, &c, 2).unwrap_err(),
            spectrum(&bad, None).unwrap_err(),
            spectrum(&bad, Some(&c)).unwrap_err(),
            refit_right(&random(4, 2, 1), &bad).unwrap_err(),
            refit_left(&bad, &random(2, 6, 1), None).unwrap_err(),
        ] {
            assert!(matches!(error, Error::NonFinite { what: "the weight", row: 1, col: 2, .. }), "{error}");
        }
        let bad = poke(&c, 7, value);
        for error in [
            whitened_svd(&w, &bad, 2).unwrap_err(),
            symmetric_eigen(&bad).unwrap_err(),
            refit_left(&w, &random(2, 6, 1), Some(&bad)).unwrap_err(),
        ] {
            assert!(matches!(error, Error::NonFinite { row: 1, col: 1, .. }), "{error}");
        }
    }
    let message = truncated_svd(&poke(&w, 8, f64::NAN), 2).unwrap_err().to_string();
    assert_eq!(message, "the weight is not finite: NaN at row 1, column 2");

    assert_eq!(truncated_svd(&w, 5).unwrap_err(), Error::Rank { rank: 5, max: 4 });
    assert_eq!(whitened_svd(&w, &c, 5).unwrap_err(), Error::Rank { rank: 5, max: 4 });
    let small = Matrix::identity(5);
    assert!(matches!(whitened_svd(&w, &small, 2).unwrap_err(), Error::Shape { found: (5, 5), .. }));
    assert!(matches!(refit_right(&small, &w).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(refit_left(&w, &small, None).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(symmetric_eigen(&w).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(w.matmul(&w).unwrap_err(), Error::Shape { .. }));
    assert!(matches!(Matrix::new(2, 3, vec![0.0; 5]).unwrap_err(), Error::Length { .. }));
    assert!(matches!(Matrix::new(usize::MAX, 2, vec![]).unwrap_err(), Error::Length { .. }));

    let huge = poke(&w, 8, 1e300);
    assert!(matches!(truncated_svd(&huge, 2).unwrap_err(), Error::Overflow { .. }));
    assert!(matches!(whitened_svd(&huge, &c, 2).unwrap_err(), Error::Overflow { .. }));
    let indefinite = poke(&c, 7, -3.0);
    assert!(matches!(whitened_svd(&w, &indefinite, 2).unwrap_err(), Error::NotSemidefinite { .. }));
    assert!(matches!(spectrum(&w, Some(&indefinite)).unwrap_err(), Error::NotSemidefinite { .. }));
}

#[test]
fn weights_without_energy_or_entries() {
    for (out, input) in [(0, 0), (0, 5), (5, 0), (6, 9), (9, 6)] {
        let (w, c) = (Matrix::zeros(out, input), Matrix::identity(input));
        let rank = out.min(input) / 2;
        for f in [truncated_svd(&w, rank).unwrap(), whitened_svd(&w, &c, rank).unwrap()] {
            assert_eq!((f.u.shape(), f.v.shape(), f.loss), ((out, rank), (rank, input), 0.0));
            assert_eq!(f.spectrum, vec![0.0; out.min(input)]);
            assert_eq!(product(&f), w);
        }
        assert_eq!(spectrum(&w, None).unwrap(), vec![0.0; out.min(input)]);
        assert_eq!(spectrum(&w, Some(&c)).unwrap(), vec![0.0; out.min(input)]);
    }
}

/// Agreement with numbers that an independent implementation computed for a small trained Mixtral.
mod reference {
    use std::path::Path;

    use safetensors::{Dtype, SafeTensors};

    use super::*;

    struct File(Vec<u8>);

    impl File {
        fn f64(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
            let tensors = SafeTensors::deserialize(&self.0).unwrap();
            let t = tensors.tensor(name).unwrap();
            let data = match t.dtype() {
                Dtype::F64 => t.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                Dtype::BF16 => t
                    .data()
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|b| half::bf16::from_le_bytes(*b).to_f64())
                    .collect(),
                other => panic!("{name} is {other:?}"),
            };
            (t.shape().to_vec(), data)
        }

        fn matrix(&self, name: &str) -> Matrix {
            let (shape, data) = self.f64(name);
            Matrix::new(shape[0], shape[1], data).unwrap()
        }
    }

    /// A file of the material that lies beside the checkout; nothing where there is none.
    fn open(path: &str) -> Option<File> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
        let file = std::fs::read(&path).ok().map(File);
        if file.is_none() {
            eprintln!("skipped: there is no {}", path.display());
        }
        file
    }

    const FAMILIES: [&str; 3] = ["w1", "w3", "w2"];

    fn weight(model: &File, layer: usize, expert: usize, family: usize) -> Matrix {
        let family = FAMILIES[family];
        model.matrix(&format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{family}.weight"))
    }

    #[test]
    fn plain_singular_values() {
        let (Some(model), Some(expected)) =
            (open("models/mixtral/model.safetensors"), open("reference/mixtral/low_rank.safetensors"))
        else {
            return;
        };
        let (shape, values) = expected.f64("plain_singular_values");
        let (_, curves) = expected.f64("plain_loss_curve");
        let (experts, n) = (shape[1], shape[3]);
        let mut worst = 0.0_f64;
        for index in 0..values.len() / n {
            let (layer, expert, family) = (index / 3 / experts, index / 3 % experts, index % 3);
            let w = weight(&model, layer, expert, family);
            let values = &values[index * n..][..n];
            let curve = &curves[index * (n + 1)..][..=n];
            for (a, b) in spectrum(&w, None).unwrap().iter().zip(values) {
                worst = worst.max((a.sqrt() - b).abs() / values[0]);
            }
            if layer == 0 {
                for rank in [21, 42, 64] {
                    let f = truncated_svd(&w, rank).unwrap();
                    worst = worst.max((f.loss - curve[rank]).abs() / curve[0]);
                }
            }
        }
        eprintln!("largest difference {worst:e}");
        assert!(worst < 1e-10);
    }

    #[test]
    fn whitened_eigenvalues() {
        let (Some(model), Some(expected), Some(moments)) = (
            open("models/mixtral/model.safetensors"),
            open("reference/mixtral/low_rank.safetensors"),
            open("reference/mixtral/stats.safetensors"),
        ) else {
            return;
        };
        let (shape, values) = expected.f64("whitened_eigenvalues");
        let (_, curves) = expected.f64("whitened_loss_curve");
        let (_, plain_curves) = expected.f64("plain_data_loss_curve");
        let n = shape[3];
        let (gram_shape, grams) = moments.f64("gram_Cx.layer0");
        let dim = gram_shape[1];
        let mut worst = 0.0_f64;
        for expert in 0..gram_shape[0] {
            let c = Matrix::new(dim, dim, grams[expert * dim * dim..][..dim * dim].to_vec()).unwrap();
            for family in [0, 1] {
                let w = weight(&model, 0, expert, family);
                let index = expert * 3 + family;
                let values = &values[index * n..][..n];
                let curve = &curves[index * (n + 1)..][..=n];
                let plain_curve = &plain_curves[index * (n + 1)..][..=n];
                for (a, b) in spectrum(&w, Some(&c)).unwrap().iter().zip(values) {
                    worst = worst.max((a - b).abs() / curve[0]);
                }
                for rank in [0, 21, 42, 64, 128] {
                    let f = whitened_svd(&w, &c, rank).unwrap();
                    let measured = data_loss(&w, &product(&f), &c).unwrap();
                    worst = worst.max((measured - curve[rank]).abs() / curve[0]);
                    let plain = truncated_svd(&w, rank).unwrap();
                    let measured = data_loss(&w, &product(&plain), &c).unwrap();
                    worst = worst.max((measured - plain_curve[rank]).abs() / curve[0]);
                }
            }
        }
        eprintln!("largest difference {worst:e}");
        assert!(worst < 1e-9);
    }
}
