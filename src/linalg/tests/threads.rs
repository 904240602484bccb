//! The same on any number of threads, and as good in f32 as in f64.

use super::*;

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
