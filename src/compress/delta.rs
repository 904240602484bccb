//! Experts as differences from a base that all of them share (D²-MoE, arXiv 2502.17298).

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::align::{self, Matching};
use super::apply::Measured;
use super::factorise::{FactorOptions, factors, stem, stored};
use super::merge::{dense_mlp, in_batches};
use super::{Error, Result};
use crate::architecture::Projection;
use crate::backend::{Base, Expert, Linear, Matrix as Form, Mlp, Moment, StoredExpert};
use crate::checkpoint::{Tensor, Weight};
use crate::linalg::{self, Matrix, Threads, regression_base};
use crate::model::MoeSource;
use crate::plan::{Action, LayerPlan};

/// What the experts of a layer have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseKind {
    /// The mean of the experts.
    Mean,
    /// Their mean weighted with the number of tokens routed to them.
    #[default]
    Frequency,
    /// The matrix with the least error on their inputs, (Σ W C) (Σ C + δ I)⁻¹ with δ = 1e-6 of the mean of the diagonal.
    Gram,
}

/// What a base is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseOptions {
    /// How experts are averaged.
    pub kind: BaseKind,
    /// Whether the hidden neurons of all experts are first brought into the order of the most used one's (ties to the
    /// lower).
    pub align: bool,
}

/// Gate, up and down of one expert.
type Maps = [Option<Linear<Form<Weight>, Tensor>>; 3];

/// Experts whose weights are held in f64 at the same time.
const AT_ONCE: usize = 8;

/// A base, and the experts of some slots as differences from it.
pub(super) type Deltas = (Base<Weight>, Vec<(usize, StoredExpert)>);

/// The base of those experts of `plan` that become differences from it, and what becomes of each: (slot, expert).
pub(super) fn deltas(
    plan: &LayerPlan,
    source: &MoeSource,
    measured: Measured<'_>,
    base_options: BaseOptions,
    options: FactorOptions,
) -> Result<Deltas> {
    let ranks: Vec<(usize, usize)> = plan
        .experts
        .iter()
        .filter_map(|e| if let Action::Delta { rank } = e.action { Some((e.expert, rank)) } else { None })
        .collect();
    if ranks.is_empty() {
        return Ok((source.base.clone(), Vec::new()));
    }
    for (slot, _) in &ranks {
        let dense = match &source.experts[*slot] {
            Expert::Mlp(mlp) => mlp.maps().all(|m| matches!(m.weight, Form::Dense(_))),
            _ => false,
        };
        if !dense || source.experts[*slot].width() != source.width {
            let what = "is not dense and of full width; start from the original checkpoint".into();
            return Err(Error::Action { layer: plan.layer, expert: *slot, what });
        }
    }
    let orders = if base_options.align {
        let slots: Vec<usize> = ranks.iter().map(|(slot, _)| *slot).collect();
        orders(plan.layer, source, measured, &slots)?
    } else {
        BTreeMap::new()
    };
    let mut base = [None, None, None];
    let mut maps: Vec<Maps> = vec![[None, None, None]; ranks.len()];
    let there = |projection: &Projection| match &source.experts[ranks[0].0] {
        Expert::Mlp(mlp) => mlp.map(*projection).is_some(),
        _ => false,
    };
    for projection in Projection::ALL.into_iter().filter(there) {
        let layer = Matrices { layer: plan.layer, source, measured, projection, orders: &orders, options };
        let shared = layer.base(&ranks, base_options.kind)?;
        let first = layer.map(ranks[0].0);
        let shared = stored("base.weight", first.weight.left().replacement_dtype(), &shared);
        let part = |&(slot, rank): &(usize, usize)| layer.difference(slot, rank, &shared);
        let parts: Vec<_> = ranks.par_iter().map(part).collect::<Result<_>>()?;
        maps.iter_mut().zip(parts).for_each(|(maps, part)| maps[projection as usize] = Some(part));
        base[projection as usize] = (!options.densify).then_some(shared);
    }
    let experts = ranks.iter().zip(maps).map(|((slot, _), maps)| {
        let activation = match &source.experts[*slot] {
            Expert::Mlp(mlp) => mlp.activation,
            _ => unreachable!("checked above"),
        };
        let [Some(gate), up, Some(down)] = maps else { unreachable!("every expert has both") };
        (*slot, Expert::Mlp(Mlp { gate, up, down, activation }))
    });
    Ok((base, experts.collect()))
}

/// For every slot but that of the most used expert the order of its hidden neurons that is nearest to that one's.
fn orders(
    layer: usize,
    source: &MoeSource,
    measured: Measured<'_>,
    slots: &[usize],
) -> Result<BTreeMap<usize, Vec<usize>>> {
    let refuse = |slot| move |what| Error::Action { layer, expert: slot, what };
    let Some(count) = measured.get(Moment::Count) else {
        let what = "the number of its tokens, which decides whose order all experts get, was not measured";
        return Err(refuse(slots[0])(what.into()));
    };
    let first = |best: usize, slot: usize| if count[slot] > count[best] { slot } else { best };
    let reference = slots.iter().copied().fold(slots[0], first);
    let mlp = |slot: usize| dense_mlp(source, slot).map_err(refuse(slot));
    let target = mlp(reference)?;
    let others = slots.iter().copied().filter(|slot| *slot != reference).collect();
    let size =
        |_: &usize| align::memory(target.gate.weight.rows(), target.gate.weight.cols(), Matching::Weights);
    let order = |slot| Ok((slot, align::align(&target, &mlp(slot)?, Matching::Weights)?.permutation));
    Ok(in_batches(others, size, order)?.into_iter().collect())
}

/// The matrices of one kind of a layer's experts.
struct Matrices<'a> {
    layer: usize,
    source: &'a MoeSource,
    measured: Measured<'a>,
    projection: Projection,
    /// The order of the hidden neurons of a slot, where it is not the stored one.
    orders: &'a BTreeMap<usize, Vec<usize>>,
    options: FactorOptions,
}

impl<'a> Matrices<'a> {
    fn map(&self, slot: usize) -> &'a Linear<Form<Weight>, Tensor> {
        let map = match &self.source.experts[slot] {
            Expert::Mlp(mlp) => mlp.map(self.projection),
            _ => None,
        };
        map.unwrap_or_else(|| unreachable!("checked before"))
    }

    fn weight(&self, slot: usize) -> std::result::Result<Matrix, linalg::Error> {
        let w = self.map(slot).weight.left();
        let (rows, cols, values) = (w.rows(), w.cols(), w.to_f32());
        let Some(order) = self.orders.get(&slot) else { return Matrix::from_f32(rows, cols, &values) };
        let ordered: Vec<f32> = if self.projection == Projection::Down {
            values.chunks_exact(cols).flat_map(|row| order.iter().map(|&j| row[j])).collect()
        } else {
            order.iter().flat_map(|&i| &values[i * cols..(i + 1) * cols]).copied().collect()
        };
        Matrix::from_f32(rows, cols, &ordered)
    }

    /// The bias of the expert's map, in the order of its hidden neurons.
    fn bias(&self, slot: usize) -> Option<Tensor> {
        let bias = self.map(slot).bias.as_ref()?;
        let order = self.orders.get(&slot).filter(|_| self.projection != Projection::Down);
        Some(order.map_or_else(|| bias.clone(), |order| bias.select_rows(order)))
    }

    /// Second moment of the expert's inputs, where it was measured.
    fn gram(&self, slot: usize) -> std::result::Result<Option<Matrix>, linalg::Error> {
        let moment = match self.projection {
            Projection::Down => Moment::HiddenGram,
            _ => Moment::InputGram,
        };
        let side = self.map(slot).weight.left().cols();
        let Some(gram) = self.measured.gram(moment, slot, side) else { return Ok(None) };
        let order = self.orders.get(&slot).filter(|_| moment == Moment::HiddenGram);
        let values = match order {
            None => gram.into_owned(),
            Some(order) => {
                let row = |&i: &usize| {
                    let row = &gram[i * side..(i + 1) * side];
                    order.iter().map(move |&j| row[j])
                };
                order.iter().flat_map(row).collect()
            }
        };
        Matrix::new(side, side, values).map(Some)
    }

    fn failed(&self, slot: usize) -> impl Fn(linalg::Error) -> Error + '_ {
        let matrix = self.projection.name();
        move |source| Error::Factorise { layer: self.layer, expert: slot, matrix, source }
    }

    fn missing(&self, slot: usize, what: &str) -> Error {
        let what = format!("{what}, which its base needs, was not measured");
        Error::Action { layer: self.layer, expert: slot, what }
    }

    /// The base, summed in the order of the experts.
    fn base(&self, ranks: &[(usize, usize)], kind: BaseKind) -> Result<Matrix> {
        let first = ranks[0].0;
        let (out, input) = self.weight(first).map_err(self.failed(first))?.shape();
        let shares = match kind {
            BaseKind::Frequency => {
                let count = self.measured.get(Moment::Count);
                let count = count.ok_or_else(|| self.missing(first, "the number of its tokens"))?;
                let shares: Vec<f64> = ranks.iter().map(|(slot, _)| count[*slot]).collect();
                // Experts that saw no token at all weigh the same.
                if shares.iter().sum::<f64>() > 0.0 { shares } else { vec![1.0; ranks.len()] }
            }
            _ => vec![1.0; ranks.len()],
        };
        let (mut sum, mut grams) = (Matrix::zeros(out, input), Matrix::zeros(input, input));
        for (ranks, shares) in ranks.chunks(AT_ONCE).zip(shares.chunks(AT_ONCE)) {
            let term = |(&(slot, _), share): (&(usize, usize), &f64)| -> Result<_> {
                let failed = self.failed(slot);
                let mut w = self.weight(slot).map_err(&failed)?;
                let mut gram = None;
                if kind == BaseKind::Gram {
                    let c = self.gram(slot).map_err(&failed)?;
                    let c = c.ok_or_else(|| self.missing(slot, "the second moment of its inputs"))?;
                    w = w.matmul(&c).map_err(&failed)?;
                    gram = Some(c);
                } else {
                    w.as_mut_slice().iter_mut().for_each(|v| *v *= share);
                }
                Ok((w, gram))
            };
            let terms: Vec<_> = ranks.par_iter().zip(shares).map(term).collect::<Result<_>>()?;
            for (w, gram) in terms {
                add(&mut sum, &w);
                if let Some(gram) = gram {
                    add(&mut grams, &gram);
                }
            }
        }
        if kind == BaseKind::Gram {
            return match regression_base(&sum, &grams).map_err(self.failed(first))? {
                Some(base) => Ok(base),
                None => self.base(ranks, BaseKind::Mean),
            };
        }
        let total: f64 = shares.iter().sum();
        sum.as_mut_slice().iter_mut().for_each(|v| *v /= total);
        Ok(sum)
    }

    /// The matrix of `slot` as its difference from `base`, of rank `rank`.
    fn difference(&self, slot: usize, rank: usize, base: &Weight) -> Result<Linear<Form<Weight>, Tensor>> {
        let weight = self.map(slot).weight.left();
        let build = || -> std::result::Result<Form<Weight>, linalg::Error> {
            let mut rest = self.weight(slot)?;
            let shared = base.to_f32();
            rest.as_mut_slice().iter_mut().zip(&shared).for_each(|(w, b)| *w -= f64::from(*b));
            let gram = if self.options.whiten { self.gram(slot)? } else { None };
            if self.options.densify {
                let (u, v) =
                    factors(&rest, gram.as_ref(), rank, crate::checkpoint::Dtype::F32, Threads::One)?;
                let mut whole = u.matmul(&v)?;
                whole.as_mut_slice().iter_mut().zip(&shared).for_each(|(w, b)| *w += f64::from(*b));
                return Ok(Form::Dense(stored(weight.name(), weight.replacement_dtype(), &whole)));
            }
            let dtype = self.options.dtype.unwrap_or(weight.replacement_dtype());
            let (u, v) = factors(&rest, gram.as_ref(), rank, dtype, Threads::One)?;
            let store = |suffix: &str, m: &Matrix| stored(&format!("{}.{suffix}", stem(weight)), dtype, m);
            Ok(Form::Delta { u: store("u", &u), v: store("v", &v) })
        };
        Ok(Linear { weight: build().map_err(self.failed(slot))?, bias: self.bias(slot) })
    }
}

fn add(sum: &mut Matrix, term: &Matrix) {
    sum.as_mut_slice().iter_mut().zip(term.as_slice()).for_each(|(s, t)| *s += t);
}
