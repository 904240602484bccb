//! Factors that are optimal on data.

use super::*;

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
