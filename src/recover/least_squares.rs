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
//! Experts that write a latent stand before a map F: r is missing behind it, and F⁺ r takes its place. That is the optimum of
//! the same objective with F ŷ for ŷ and F Δ for Δ in the ridge.
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
    let whole = Outputs::new(data, (0..data.expert_io() as u32).collect()).map_err(|error| (0, error))?;
    for (e, (expert, pairs)) in layer.experts.iter_mut().zip(all).enumerate() {
        if !pairs.is_empty() {
            improve(expert, &whole, data, tokens, &pairs, rest, ridge).map_err(|error| (e, error))?;
        }
    }
    Ok(())
}

/// Coordinates of what experts write, and how they stand in what is missing.
struct Outputs {
    hidden: usize,
    rows: Vec<u32>,
    /// F and F⁺ of these rows, where there is a map behind the experts.
    behind: Option<[Vec<f32>; 2]>,
}

impl Outputs {
    fn new(data: &Data, rows: Vec<u32>) -> Result<Self, crate::linalg::Error> {
        let behind = data.expansion.as_ref().map(|expansion| expansion.of(&rows)).transpose()?;
        Ok(Outputs { hidden: data.hidden_size, rows, behind })
    }

    /// What `pairs` lack of these coordinates, `[pairs, rows]`.
    fn missing(&self, pairs: &[Pair], rest: &[f32]) -> Vec<f32> {
        let start = |p: &Pair| p.row as usize * self.hidden;
        let Some([_, inverse]) = &self.behind else {
            let row =
                |p: &Pair| self.rows.iter().map(move |r| rest[start(p) + *r as usize]).collect::<Vec<_>>();
            return pairs.iter().flat_map(row).collect();
        };
        let whole: Vec<f32> =
            pairs.iter().flat_map(|p| &rest[start(p)..start(p) + self.hidden]).copied().collect();
        let mut missing = vec![0.0; pairs.len() * self.rows.len()];
        multiply(&whole, inverse, self.hidden, false, &mut missing);
        missing
    }

    /// Takes `added [pairs, rows]`, as the pairs weigh it, from what is missing.
    fn take(&self, pairs: &[Pair], added: &[f32], rest: &mut [f32]) {
        let count = self.rows.len();
        // A token has one pair with an expert unless weights multiply inputs, so rows of what is missing may repeat.
        match &self.behind {
            None => {
                for (p, added) in pairs.iter().zip(added.chunks_exact(count)) {
                    let row = &mut rest[p.row as usize * self.hidden..][..self.hidden];
                    self.rows.iter().zip(added).for_each(|(&r, a)| row[r as usize] -= p.weight * a);
                }
            }
            Some([matrix, _]) => {
                let mut whole = vec![0.0; pairs.len() * self.hidden];
                multiply(added, matrix, count, false, &mut whole);
                for (p, added) in pairs.iter().zip(whole.chunks_exact(self.hidden)) {
                    let row = &mut rest[p.row as usize * self.hidden..][..self.hidden];
                    row.iter_mut().zip(added).for_each(|(rest, a)| *rest -= p.weight * a);
                }
            }
        }
    }
}

/// The best last factor of one expert, the others held; `whole` are all coordinates.
fn improve(
    expert: &mut Trained,
    whole: &Outputs,
    data: &Data,
    tokens: &[u32],
    pairs: &[Pair],
    rest: &mut [f32],
    ridge: f64,
) -> Result<(), crate::linalg::Error> {
    match expert {
        Trained::Idle => {}
        Trained::Constant(c) => {
            let features = |pairs: &[Pair]| vec![1.0; pairs.len()];
            let delta = solve(&features, 1, whole, pairs, rest, ridge)?;
            c.values.iter_mut().zip(&delta).for_each(|(c, delta)| *c += delta);
            apply(&features, 1, &delta, whole, pairs, rest);
        }
        Trained::Mlp(mlp) => {
            let hidden = |pairs: &[Pair]| mlp.forward(&data.inputs(tokens, pairs)).1.hidden;
            let width = mlp.down.inputs;
            let mut deltas = Vec::new();
            for part in &mlp.down.parts {
                match part {
                    Part::Dense(_) => {
                        let delta = solve(&hidden, width, whole, pairs, rest, ridge)?;
                        apply(&hidden, width, &delta, whole, pairs, rest);
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
                        let delta = solve(&inner, rank, whole, pairs, rest, ridge)?;
                        apply(&inner, rank, &delta, whole, pairs, rest);
                        deltas.push(delta);
                    }
                    Part::Rows { rows, .. } if !rows.is_empty() => {
                        let some = Outputs::new(data, rows.clone())?;
                        let delta = solve(&hidden, width, &some, pairs, rest, ridge)?;
                        apply(&hidden, width, &delta, &some, pairs, rest);
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

/// Δ `[rows, dim]` for these outputs.
fn solve(
    features: &Features<'_>,
    dim: usize,
    outputs: &Outputs,
    pairs: &[Pair],
    rest: &[f32],
    ridge: f64,
) -> Result<Vec<f32>, crate::linalg::Error> {
    let rows = outputs.rows.len();
    let (mut gram, mut right) = (Mat::<f64>::zeros(dim, dim), Mat::<f64>::zeros(dim, rows));
    for pairs in pairs.chunks(TOKENS) {
        let phi = features(pairs);
        let weighted: Vec<f64> = pairs
            .iter()
            .zip(phi.chunks_exact(dim))
            .flat_map(|(p, row)| row.iter().map(|v| f64::from(p.weight) * f64::from(*v)))
            .collect();
        let wanted: Vec<f64> = outputs.missing(pairs, rest).into_iter().map(f64::from).collect();
        let phi = MatRef::from_row_major_slice(&weighted, pairs.len(), dim);
        let wanted = MatRef::from_row_major_slice(&wanted, pairs.len(), rows);
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
    Ok((0..rows).flat_map(|r| (0..dim).map(move |c| (r, c))).map(|(r, c)| delta[(c, r)] as f32).collect())
}

/// Takes the outputs that `delta` adds from what is missing.
fn apply(
    features: &Features<'_>,
    dim: usize,
    delta: &[f32],
    outputs: &Outputs,
    pairs: &[Pair],
    rest: &mut [f32],
) {
    for pairs in pairs.chunks(TOKENS) {
        let mut added = vec![0.0; pairs.len() * outputs.rows.len()];
        multiply(&features(pairs), delta, dim, false, &mut added);
        outputs.take(pairs, &added, rest);
    }
}
