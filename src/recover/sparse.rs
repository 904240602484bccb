//! Rows that go step by step: the decomposition W = U·V + S of LoSparse (arXiv 2306.11222) as MC-SMoE (arXiv 2310.01334,
//! section 3.3) uses it.

use rayon::prelude::*;
use serde::Serialize;

use super::expert::Trained;
use super::layer::TrainedLayer;
use super::map::{Map, Parameter, Part};
use crate::backend::cpu::{multiply, transpose};
use crate::linalg::{self, Factors, Matrix, truncated_svd};
use crate::plan::largest;

/// Full matrices become U·V + S while they are trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Decomposition {
    /// Rank of U·V; at most that of the matrix.
    pub rank: usize,
    /// Share of the rows of all S of a layer that is left at the end, between 0 and 1.
    pub rows: f64,
}

impl Decomposition {
    /// The largest rank at which U·V and the rows of S hold fewer numbers than a matrix `[out, input]` itself.
    pub(super) fn largest_rank(&self, out: usize, input: usize) -> usize {
        let rows = (self.rows * out as f64).round() as usize;
        (out.saturating_sub(rows) * input).saturating_sub(1) / (out + input)
    }
}

/// How many rows of S are left at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Share of the rows of all S of a layer that is left at the end.
    pub share: f64,
    /// Steps before the first row goes.
    pub warm_up: usize,
    /// Steps after the last row has gone.
    pub cool_down: usize,
}

impl Schedule {
    /// A schedule for `steps` steps in the proportions of the paper: 400 and 1600 of 10 000.
    pub fn new(share: f64, steps: usize) -> Self {
        Schedule { share, warm_up: steps * 4 / 100, cool_down: steps * 16 / 100 }
    }

    /// Share of the rows that is left after step `t` of `steps`: 1 up to the warm-up W, then
    /// P + (1 − P)(1 − (t − W) / (steps − W − C))³, and P once t > steps − C (the form of the official code; the paper also
    /// takes C from the numerator).
    pub fn kept(&self, t: usize, steps: usize) -> f64 {
        let Schedule { share, warm_up, cool_down } = *self;
        if t <= warm_up {
            return 1.0;
        }
        if t + cool_down > steps {
            return share;
        }
        let left = 1.0 - (t - warm_up) as f64 / (steps - warm_up - cool_down) as f64;
        share + (1.0 - share) * left.powi(3)
    }
}

/// Decay of the smoothed importance.
const SMOOTHING: f64 = 0.85;

/// Chooses the rows of all S of a layer by their importance: the mean over a row of |s · ∂L/∂s|, smoothed over the steps
/// (Ī ← 0.85 Ī + 0.15 I; that mean and smoothing are linear, so rows suffice). Rows that go are set to 0 but stay
/// trainable, and may come back while others still go.
#[derive(Debug)]
pub(super) struct LoSparse {
    schedule: Schedule,
    /// Of every row of every S, in the order of experts, maps and rows.
    importance: Vec<f64>,
}

impl LoSparse {
    pub(super) fn new(layer: &mut TrainedLayer, schedule: Schedule) -> Self {
        let rows = sparse_parts(layer).iter().map(|s| s.rows()).sum();
        LoSparse { schedule, importance: vec![0.0; rows] }
    }

    /// Takes the gradients of a step in, before its values change.
    pub(super) fn observe(&mut self, layer: &mut TrainedLayer) {
        let mut importance = self.importance.iter_mut();
        for s in sparse_parts(layer) {
            let rows = s.values.chunks_exact(s.cols).zip(s.gradient.chunks_exact(s.cols));
            for ((values, gradient), smoothed) in rows.zip(&mut importance) {
                let sum: f64 = values.iter().zip(gradient).map(|(v, g)| f64::from((v * g).abs())).sum();
                *smoothed = SMOOTHING * *smoothed + (1.0 - SMOOTHING) * sum / s.cols as f64;
            }
        }
    }

    /// Sets all but the most important rows to 0, as many as step `t` of `steps` leaves; of equals the earlier stay.
    pub(super) fn prune(&mut self, layer: &mut TrainedLayer, t: usize, steps: usize) {
        let total = self.importance.len();
        let kept = (self.schedule.kept(t, steps) * total as f64).round() as usize;
        if kept >= total {
            return;
        }
        let mut keep = vec![false; total];
        for row in largest(&self.importance, kept) {
            keep[row] = true;
        }
        let mut keep = keep.into_iter();
        for s in sparse_parts(layer) {
            let cols = s.cols;
            for (row, keep) in s.values.chunks_exact_mut(cols).zip(&mut keep) {
                if !keep {
                    row.fill(0.0);
                }
            }
        }
    }
}

/// Splits every full matrix W that is trained into U·V of rank `rank`, by SVD, and S = W − U·V with all its rows, so that
/// nothing is lost yet. U and V share the singular values: U √Σ and √Σ V.
///
/// # Errors
/// What the decomposition says, and of which expert.
pub(super) fn split(layer: &mut TrainedLayer, rank: usize) -> Result<(), (usize, linalg::Error)> {
    let experts = layer.experts.par_iter_mut().enumerate();
    experts.try_for_each(|(e, expert)| {
        let Trained::Mlp(mlp) = expert else { return Ok(()) };
        mlp.maps().try_for_each(|map| split_map(map, rank)).map_err(|error| (e, error))
    })
}

fn split_map(map: &mut Map, rank: usize) -> Result<(), linalg::Error> {
    let [Part::Dense(w)] = &map.parts[..] else { return Ok(()) };
    let (rows, cols, dtype) = (w.rows(), w.cols, w.dtype);
    let whole = Matrix::from_f32(rows, cols, &w.values)?;
    let Factors { u, v, .. } = truncated_svd(&whole, rank.min(rows).min(cols))?;
    let rank = v.rows();
    let (mut u, mut v) = (u.to_f32(), v.to_f32());
    for k in 0..rank {
        let norm = |sum: f64| sum.sqrt().max(f64::MIN_POSITIVE);
        let left = norm(u.iter().skip(k).step_by(rank).map(|x| f64::from(*x).powi(2)).sum());
        let right = norm(v[k * cols..(k + 1) * cols].iter().map(|x| f64::from(*x).powi(2)).sum());
        let factor = (right / left).sqrt() as f32;
        u.iter_mut().skip(k).step_by(rank).for_each(|x| *x *= factor);
        v[k * cols..(k + 1) * cols].iter_mut().for_each(|x| *x /= factor);
    }
    let mut rest = w.values.clone();
    let negative: Vec<f32> = u.iter().map(|x| -x).collect();
    multiply(&negative, &transpose(&v, cols), rank, true, &mut rest);
    let scale = w.scale;
    let parameter = |values: Vec<f32>, cols: usize| Parameter::new(values, cols, dtype, scale);
    map.parts = vec![
        Part::Product { u: parameter(u, rank), v: parameter(v, cols) },
        Part::Rows { rows: (0..rows as u32).collect(), s: parameter(rest, cols) },
    ];
    Ok(())
}

/// Takes out the rows of every S that are 0.
pub(super) fn drop_empty_rows(layer: &mut TrainedLayer) {
    for part in sparse_maps(layer).flat_map(|map| &mut map.parts) {
        let Part::Rows { rows, s } = part else { continue };
        let cols = s.cols;
        let filled = |i: usize| s.values[i * cols..(i + 1) * cols].iter().any(|v| *v != 0.0);
        let kept: Vec<usize> = (0..rows.len()).filter(|&i| filled(i)).collect();
        let values = kept.iter().flat_map(|&i| &s.values[i * cols..(i + 1) * cols]).copied().collect();
        *rows = kept.iter().map(|&i| rows[i]).collect();
        *s = Parameter::new(values, cols, s.dtype, s.scale);
    }
}

fn sparse_maps(layer: &mut TrainedLayer) -> impl Iterator<Item = &mut Map> {
    let mlps =
        layer.experts.iter_mut().filter_map(|e| if let Trained::Mlp(mlp) = e { Some(mlp) } else { None });
    mlps.flat_map(|mlp| mlp.maps())
}

/// Every S of the layer.
fn sparse_parts(layer: &mut TrainedLayer) -> Vec<&mut Parameter> {
    let parts = sparse_maps(layer).flat_map(|map| &mut map.parts);
    parts.filter_map(|part| if let Part::Rows { s, .. } = part { Some(s) } else { None }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_rank_saves_something_and_one_more_does_not() {
        let numbers = |rank: usize| rank * (16 + 32) + 2 * 32;
        assert_eq!(Decomposition { rank: 1, rows: 0.1 }.largest_rank(16, 32), 9);
        assert!(numbers(9) < 16 * 32 && numbers(10) >= 16 * 32);
        // 6 · 4 − 1 − 4 · 4 of 6 + 4; 8 · 8 is as many as 4 · (8 + 8).
        assert_eq!(Decomposition { rank: 1, rows: 0.7 }.largest_rank(6, 4), 0);
        assert_eq!(Decomposition { rank: 1, rows: 0.01 }.largest_rank(8, 8), 3);
    }

    #[test]
    fn the_schedule_is_that_of_the_code() {
        let schedule = Schedule { share: 0.1, warm_up: 400, cool_down: 1600 };
        assert_eq!(Schedule::new(0.1, 10_000), schedule);
        let expected = [
            (1, 1.0),
            (400, 1.0),
            (401, 0.9997),
            (2000, 0.5608),
            (4000, 0.2497),
            (6000, 0.1243),
            (8000, 0.1001),
            (8401, 0.1),
            (10_000, 0.1),
        ];
        for (t, share) in expected {
            assert!((schedule.kept(t, 10_000) - share).abs() < 5e-5, "{t}: {}", schedule.kept(t, 10_000));
        }
    }
}
