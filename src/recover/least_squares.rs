//! The last factor of every expert in closed form.
//!
//! The output of a layer, ŷ_t = Σ_e g_te f_e(x_t), is linear in the last factor A_e of each expert: f_e(x) = A_e φ_e(x) + …
//! with φ the hidden vector z for a dense down projection, V z for a product U·V, and 1 for a constant. The objective is
//! that of the whole recovery, with a ridge that holds A near where it is:
//!
//! ```text
//! Σ_t ‖y_t − ŷ_t‖² + Σ_e λ_e ‖Δ_e‖²,    A_e ← A_e + Δ_e,    λ_e = ridge · tr(H_e) / dim
//! ```
//!
//! Experts share tokens, so that their normal equations are coupled. They are solved one expert after the other with the
//! others held (block Gauss-Seidel), each time exactly, so that the objective never rises. With r_t = y_t − ŷ_t at that
//! moment and sums over the tokens of expert e:
//!
//! ```text
//! Δ_e (H_e + λ_e I) = B_e,    H_e = Σ g² φ φᵀ,    B_e = Σ g r φᵀ
//! ```
//!
//! Only the tokens of the expert count, weighted as the layer weighs them: H is [`crate::backend::Moment::GateHiddenGram`].

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::expert::Trained;
use super::layer::{Data, Pair, TOKENS, TrainedLayer};
use super::map::Part;
use crate::backend::cpu::multiply;
use crate::linalg::{Threads, solve_semidefinite};

/// One sweep over all experts. `tokens` are the tokens that count, `rest` what is missing to their targets, `[tokens,
/// hidden]`; it is kept up to date.
///
/// # Errors
/// Names the expert whose equations cannot be solved.
pub(super) fn sweep(
    layer: &mut TrainedLayer,
    data: &Data,
    tokens: &[u32],
    rest: &mut [f32],
    ridge: f64,
) -> Result<(), (usize, crate::linalg::Error)> {
    let all = data.pairs(tokens, layer.experts.len());
    for (e, (expert, pairs)) in layer.experts.iter_mut().zip(all).enumerate() {
        if !pairs.is_empty() {
            improve(expert, data, tokens, &pairs, rest, ridge).map_err(|error| (e, error))?;
        }
    }
    Ok(())
}

/// The best last factor of one expert, the others held.
fn improve(
    expert: &mut Trained,
    data: &Data,
    tokens: &[u32],
    pairs: &[Pair],
    rest: &mut [f32],
    ridge: f64,
) -> Result<(), crate::linalg::Error> {
    let d = data.hidden_size;
    match expert {
        Trained::Idle => {}
        Trained::Constant(c) => {
            let rows: Vec<u32> = (0..d as u32).collect();
            let features = |pairs: &[Pair]| vec![1.0; pairs.len()];
            let delta = solve(&features, 1, &rows, d, pairs, rest, ridge)?;
            c.values.iter_mut().zip(&delta).for_each(|(c, delta)| *c += delta);
            apply(&features, 1, &delta, &rows, d, pairs, rest);
        }
        Trained::Mlp(mlp) => {
            let hidden = |pairs: &[Pair]| mlp.forward(&data.inputs(tokens, pairs)).1.hidden;
            let width = mlp.down.inputs;
            let mut deltas = Vec::new();
            for part in &mlp.down.parts {
                let all: Vec<u32> = (0..d as u32).collect();
                match part {
                    Part::Dense(_) => {
                        let delta = solve(&hidden, width, &all, d, pairs, rest, ridge)?;
                        apply(&hidden, width, &delta, &all, d, pairs, rest);
                        deltas.push(delta);
                    }
                    Part::Product { v, .. } if v.rows() > 0 => {
                        let rank = v.rows();
                        let inner = |pairs: &[Pair]| {
                            let z = hidden(pairs);
                            let mut inner = vec![0.0; pairs.len() * rank];
                            multiply(&z, &v.values, width, false, &mut inner);
                            inner
                        };
                        let delta = solve(&inner, rank, &all, d, pairs, rest, ridge)?;
                        apply(&inner, rank, &delta, &all, d, pairs, rest);
                        deltas.push(delta);
                    }
                    Part::Rows { rows, .. } if !rows.is_empty() => {
                        let delta = solve(&hidden, width, rows, d, pairs, rest, ridge)?;
                        apply(&hidden, width, &delta, rows, d, pairs, rest);
                        deltas.push(delta);
                    }
                    _ => deltas.push(Vec::new()),
                }
            }
            for (part, delta) in mlp.down.parts.iter_mut().zip(deltas) {
                if let Part::Dense(p) | Part::Product { u: p, .. } | Part::Rows { s: p, .. } = part {
                    p.values.iter_mut().zip(&delta).for_each(|(w, delta)| *w += delta);
                }
            }
        }
    }
    Ok(())
}

/// Features `[pairs, dim]` of some pairs.
type Features<'a> = dyn Fn(&[Pair]) -> Vec<f32> + 'a;

/// Δ `[rows, dim]` for the outputs `rows`.
fn solve(
    features: &Features<'_>,
    dim: usize,
    rows: &[u32],
    d: usize,
    pairs: &[Pair],
    rest: &[f32],
    ridge: f64,
) -> Result<Vec<f32>, crate::linalg::Error> {
    let (mut gram, mut right) = (Mat::<f64>::zeros(dim, dim), Mat::<f64>::zeros(dim, rows.len()));
    for pairs in pairs.chunks(TOKENS) {
        let phi = features(pairs);
        let weighted: Vec<f64> = pairs
            .iter()
            .zip(phi.chunks_exact(dim))
            .flat_map(|(p, row)| row.iter().map(|v| f64::from(p.weight) * f64::from(*v)))
            .collect();
        let wanted: Vec<f64> = pairs
            .iter()
            .flat_map(|p| rows.iter().map(|r| f64::from(rest[p.row as usize * d + *r as usize])))
            .collect();
        let phi = MatRef::from_row_major_slice(&weighted, pairs.len(), dim);
        let wanted = MatRef::from_row_major_slice(&wanted, pairs.len(), rows.len());
        // One thread each: faer's parallel sums depend on how many there are.
        rayon::join(
            || matmul(gram.as_mut(), Accum::Add, phi.transpose(), phi, 1.0, Par::Seq),
            || matmul(right.as_mut(), Accum::Add, phi.transpose(), wanted, 1.0, Par::Seq),
        );
    }
    let trace: f64 = (0..dim).map(|i| gram[(i, i)]).sum();
    for i in 0..dim {
        gram[(i, i)] += ridge * trace / dim as f64;
    }
    let delta = solve_semidefinite(gram.as_ref(), right.as_ref(), Threads::All)?;
    Ok((0..rows.len())
        .flat_map(|r| (0..dim).map(move |c| (r, c)))
        .map(|(r, c)| delta[(c, r)] as f32)
        .collect())
}

/// Takes the outputs that `delta` adds from what is missing.
fn apply(
    features: &Features<'_>,
    dim: usize,
    delta: &[f32],
    rows: &[u32],
    d: usize,
    pairs: &[Pair],
    rest: &mut [f32],
) {
    for pairs in pairs.chunks(TOKENS) {
        let mut added = vec![0.0; pairs.len() * rows.len()];
        multiply(&features(pairs), delta, dim, false, &mut added);
        // A token has one pair with an expert unless weights multiply inputs, so rows may repeat.
        for (p, added) in pairs.iter().zip(added.chunks_exact(rows.len())) {
            let row = &mut rest[p.row as usize * d..(p.row as usize + 1) * d];
            rows.iter().zip(added).for_each(|(&r, a)| row[r as usize] -= p.weight * a);
        }
    }
}
