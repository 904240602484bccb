//! What has no factors, and what hardly has.

use super::*;

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
