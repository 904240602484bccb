//! The plain truncated SVD.

use super::*;
use crate::linalg::svd::truncated_svd_direct;

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
fn spectra_without_factors_are_the_same() {
    for (out, input) in SHAPES {
        let w = random(out, input, 101);
        let f = truncated_svd(&w, 0).unwrap();
        for (a, b) in spectrum(&w, None).unwrap().iter().zip(&f.spectrum) {
            assert!((a - b).abs() <= 1e-12 * f.spectrum[0]);
        }
    }
}
