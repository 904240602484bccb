//! Factors fitted to others.

use super::*;

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
