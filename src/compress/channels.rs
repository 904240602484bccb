//! Experts with fewer hidden channels.

use super::apply::Measured;
use super::factorise::stored;
use crate::architecture::Projection;
use crate::backend::{Expert, Linear, Matrix as Form, Mlp, Moment, StoredExpert};
use crate::checkpoint::{Tensor, Weight};
use crate::linalg::{self, Matrix, Refit, refit_columns, ridge_leverage};
use crate::plan::{Channels, Criterion, largest};

/// How channels are chosen and what becomes of the down matrix.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChannelOptions {
    /// Which channels stay, where a plan says only how many.
    pub criterion: Criterion,
    /// How the down matrix makes up for the others.
    pub refit: Refit,
}

/// What is wrong: a message, or the decomposition of the down matrix.
pub(super) enum Problem {
    Action(String),
    Linalg(linalg::Error),
}

impl From<linalg::Error> for Problem {
    fn from(error: linalg::Error) -> Self {
        Problem::Linalg(error)
    }
}

/// The expert in `slot` of a layer, with the channels `keep` of its `width`.
pub(super) fn narrow(
    slot: usize,
    expert: &StoredExpert,
    width: usize,
    keep: &Channels,
    measured: Measured<'_>,
    options: ChannelOptions,
) -> Result<StoredExpert, Problem> {
    let refuse = |what: &str| Err(Problem::Action(what.into()));
    let Expert::Mlp(mlp) = expert else {
        return refuse(&format!("is {} and has no channels; keep or drop it", expert.form()));
    };
    let Mlp { gate, up, down, activation } = mlp;
    let dense = mlp.maps().all(|map| matches!(map.weight, Form::Dense(_)));
    let (true, Form::Dense(w_down)) = (dense, &down.weight) else {
        return refuse("is not dense; start from the original checkpoint");
    };
    if expert.width() != width {
        return refuse("has lost channels already; start from the original checkpoint");
    }
    let w = Matrix::from_f32(w_down.rows(), width, &w_down.to_f32())?;
    let keep = match keep {
        Channels::List(list) => list.clone(),
        Channels::Count(count) if *count == width => (0..width).collect(),
        Channels::Count(count) => largest(&scores(slot, &w, measured, options.criterion)?, *count),
    };
    if keep.len() == width {
        return Ok(expert.clone());
    }
    let h = match options.refit {
        Refit::Plain => None,
        _ => Some(gram(slot, width, measured, Moment::GateHiddenGram)?),
    };
    let fitted = refit_columns(&w, h.as_ref(), &keep, options.refit)?;
    let down = Linear {
        weight: Form::Dense(stored(w_down.name(), w_down.replacement_dtype(), &fitted)),
        bias: down.bias.clone(),
    };
    let rows = |map: &Linear<Form<Weight>, Tensor>| Linear {
        weight: Form::Dense(select(map.weight.left(), &keep)),
        bias: map.bias.as_ref().map(|b| b.select_rows(&keep)),
    };
    Ok(Expert::Mlp(Mlp { gate: rows(gate), up: up.as_ref().map(rows), down, activation: *activation }))
}

/// Rows of a matrix: exactly, where it is not packed.
fn select(weight: &Weight, rows: &[usize]) -> Weight {
    let (all, cols) = (weight.to_f32(), weight.cols());
    let values: Vec<f32> = rows.iter().flat_map(|r| &all[r * cols..(r + 1) * cols]).copied().collect();
    let tensor = Tensor::from_f32(weight.name(), weight.replacement_dtype(), vec![rows.len(), cols], &values);
    Weight::plain(tensor).unwrap_or_else(|_| unreachable!("a matrix of plain numbers"))
}

/// The scores of an expert's channels; `w` is its down matrix.
fn scores(
    slot: usize,
    w: &Matrix,
    measured: Measured<'_>,
    criterion: Criterion,
) -> Result<Vec<f64>, Problem> {
    let p = w.cols();
    if criterion.is_energy() {
        let of = |moment: Moment| match measured.get(moment) {
            Some(all) => Ok(&all[slot * p..(slot + 1) * p]),
            None => Err(missing(moment)),
        };
        let mut norms = vec![0.0; p];
        for i in 0..w.rows() {
            norms.iter_mut().zip(w.row(i)).for_each(|(n, w)| *n += w * w);
        }
        return Ok(criterion.energies(of(Moment::GateHiddenSqSum)?, of(Moment::GateHiddenMax)?, &norms));
    }
    let mut c = gram(slot, p, measured, Moment::HiddenGram)?;
    let count = measured.get(Moment::Count).ok_or_else(|| missing(Moment::Count))?[slot];
    c.as_mut_slice().iter_mut().for_each(|v| *v /= count.max(1.0));
    let trace: f64 = (0..p).map(|i| c.row(i)[i]).sum();
    let lambda = if criterion == Criterion::LeverageUnit { 1.0 } else { trace / p as f64 };
    Ok(ridge_leverage(&c, lambda)?)
}

/// A second moment of one expert's hidden vectors.
fn gram(slot: usize, p: usize, measured: Measured<'_>, moment: Moment) -> Result<Matrix, Problem> {
    let gram = measured.gram(moment, slot, p).ok_or_else(|| missing(moment))?;
    Ok(Matrix::new(p, p, gram.into_owned())?)
}

fn missing(moment: Moment) -> Problem {
    Problem::Action(format!("{} of its {} channels was not measured", moment.name(), Projection::Down.name()))
}
