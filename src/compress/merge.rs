//! Experts that go into others: aligned, then averaged.

use std::borrow::Cow;
use std::collections::BTreeMap;

use rayon::prelude::*;

use super::activations::Inputs;
use super::align::{self, Alignment, Matching, align};
use super::factorise::{AlignBy, FactorOptions};
use super::{Error, Result};
use crate::architecture::Projection;
use crate::backend::{Expert, Linear, Matrix, Mlp, Moment, Moments, StoredExpert};
use crate::checkpoint::{Dtype, Tensor, Weight, encode_f64};
use crate::model::{LinearSource, MoeSource};
use crate::plan::{Action, LayerPlan, NOT_DENSE};

/// A layer whose merged experts are aliases of the averages that took their targets' place.
pub(super) struct Merged {
    pub(super) moe: MoeSource,
    /// What was merged, by target.
    members: BTreeMap<usize, Vec<Member>>,
}

/// An expert that went into another.
#[derive(Clone, Debug)]
pub(super) struct Member {
    slot: usize,
    /// Its share of the average.
    weight: f64,
    pub(super) alignment: Option<Alignment>,
}

/// Bytes of work space that merging may take at a time beside one expert's.
const MEMORY: usize = 4 << 30;

/// Carries out the `merge` actions of `plan`: each target becomes the mean of its members and itself, weighted by the
/// plan's shares, summed in f64 and rounded once to [`FactorOptions::merge_dtype`]. With [`FactorOptions::align`], hidden
/// neurons of members are first brought into the target's order, where [`AlignBy`] says so by what they are on `inputs`.
/// `None` where nothing is merged.
///
/// # Errors
/// Names the expert that has no dense matrices, or others than its target.
pub(super) fn merge(
    plan: &LayerPlan,
    source: &MoeSource,
    inputs: Option<&Inputs>,
    options: FactorOptions,
) -> Result<Option<Merged>> {
    let mut members: BTreeMap<usize, Vec<Member>> = BTreeMap::new();
    for entry in &plan.experts {
        if let Action::Merge { into, weight } = entry.action {
            let member = Member { slot: entry.expert, weight, alignment: None };
            members.entry(into).or_default().push(member);
        }
    }
    if members.is_empty() {
        return Ok(None);
    }
    let mut dense = BTreeMap::new();
    for (&into, group) in &members {
        for slot in group.iter().map(|m| m.slot).chain([into]) {
            let refuse = |what| Error::Action { layer: plan.layer, expert: slot, what };
            dense.insert(slot, dense_mlp(source, slot).map_err(refuse)?);
        }
        for member in group {
            let refuse = |what| Error::Action { layer: plan.layer, expert: member.slot, what };
            check_alike(&dense[&member.slot], &dense[&into], into).map_err(refuse)?;
        }
    }
    if options.align {
        let matching = matching(plan.layer, inputs, options.align_by)?;
        let pairs: Vec<(usize, &mut Member)> =
            members.iter_mut().flat_map(|(into, group)| group.iter_mut().map(|m| (*into, m))).collect();
        let size = |(into, _): &(usize, &mut Member)| {
            let gate = &dense[into].gate.weight;
            align::memory(gate.rows(), gate.cols(), matching)
        };
        in_batches(pairs, size, |(into, member)| {
            member.alignment = Some(align(&dense[&into], &dense[&member.slot], matching)?);
            Ok(())
        })?;
    }
    let size = |(into, _): &(&usize, &Vec<Member>)| 16 * dense[into].gate.weight.len();
    let averages = in_batches(members.iter().collect(), size, |(&into, group)| {
        Ok((into, average(&dense[&into], group, &dense, options.merge_dtype)))
    })?;
    let mut moe = source.clone();
    for (into, mlp) in averages {
        moe.experts[into] = mlp;
    }
    for (&into, group) in &members {
        for member in group {
            moe.experts[member.slot] = Expert::Alias(into);
        }
    }
    // An alias that an earlier compression left follows the expert it stands for.
    let targets: Vec<Option<usize>> = moe.experts.iter().map(alias).collect();
    for expert in &mut moe.experts {
        if let Some(target) = alias(expert).and_then(|of| targets[of]) {
            *expert = Expert::Alias(target);
        }
    }
    Ok(Some(Merged { moe, members }))
}

/// By what the experts of layer `layer` are aligned.
fn matching(layer: usize, inputs: Option<&Inputs>, by: AlignBy) -> Result<Matching<'_>> {
    let inputs = inputs.ok_or_else(|| {
        Error::Missing(format!("layer {layer}: the inputs on which experts are compared were not measured"))
    });
    Ok(match by {
        AlignBy::Weights => Matching::Weights,
        AlignBy::Activations => Matching::Activations(inputs?),
        AlignBy::Both => Matching::Both(inputs?),
    })
}

fn alias(expert: &StoredExpert) -> Option<usize> {
    if let Expert::Alias(of) = expert { Some(*of) } else { None }
}

impl Merged {
    /// What was merged, in the order of targets.
    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values().flatten()
    }

    /// The second moment `moment`, `[side, side]`, of what the expert in `slot` now stands for: the sum over all that
    /// went into it, the hidden neurons in its order. For inputs that is what its tokens would show, but that one which
    /// chose several of the experts counts several times; the hidden vectors are those of the original experts.
    pub(super) fn gram<'a>(
        merged: Option<&Self>,
        moments: &'a Moments,
        moment: Moment,
        slot: usize,
        side: usize,
    ) -> Option<Cow<'a, [f64]>> {
        let all = moments.get(moment)?;
        let of = |slot: usize| &all[slot * side * side..(slot + 1) * side * side];
        let Some(group) = merged.and_then(|m| m.members.get(&slot)) else {
            return Some(Cow::Borrowed(of(slot)));
        };
        let hidden = matches!(moment, Moment::HiddenGram | Moment::GateHiddenGram);
        let mut sum = of(slot).to_vec();
        for member in group {
            let gram = of(member.slot);
            let order = member.alignment.as_ref().filter(|_| hidden).map(|a| &a.permutation);
            sum.par_chunks_exact_mut(side).enumerate().for_each(|(i, row)| match order {
                None => row.iter_mut().zip(&gram[i * side..]).for_each(|(s, g)| *s += g),
                Some(order) => {
                    let gram = &gram[order[i] * side..][..side];
                    row.iter_mut().zip(order).for_each(|(s, &j)| *s += gram[j]);
                }
            });
        }
        Some(Cow::Owned(sum))
    }
}

/// The dense matrices of the expert in `slot`, or that it has none.
pub(super) fn dense_mlp(source: &MoeSource, slot: usize) -> std::result::Result<Mlp<LinearSource>, String> {
    let Expert::Mlp(mlp) = &source.experts[slot] else { return Err(NOT_DENSE.into()) };
    mlp.try_map(|map| match &map.weight {
        Matrix::Dense(weight) => Ok(Linear { weight: weight.clone(), bias: map.bias.clone() }),
        _ => Err(NOT_DENSE.into()),
    })
}

/// Errors unless both have matrices of the same shapes, and biases at the same places.
fn check_alike(
    member: &Mlp<LinearSource>,
    target: &Mlp<LinearSource>,
    into: usize,
) -> std::result::Result<(), String> {
    for ((projection, a), b) in member.named().zip(target.maps()) {
        let shape = |map: &LinearSource| (map.weight.rows(), map.weight.cols());
        let ((rows, cols), (r, c)) = (shape(a), shape(b));
        let name = projection.name();
        if (rows, cols) != (r, c) {
            return Err(format!(
                "{name} is {rows} × {cols}, that of expert {into} {r} × {c}; experts that are merged must have one width"
            ));
        }
        if a.bias.is_some() != b.bias.is_some() {
            return Err(format!(
                "{name} and that of expert {into} do not both have a bias; they cannot be merged"
            ));
        }
    }
    Ok(())
}

/// Applies `work` to all items, as many at a time as there are threads and as fit into [`MEMORY`]; in order.
pub(super) fn in_batches<T: Send, R: Send>(
    mut items: Vec<T>,
    size: impl Fn(&T) -> usize,
    work: impl Fn(T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let largest = items.iter().map(size).max().unwrap_or(0).max(1);
    let at_once = (MEMORY / largest).clamp(1, rayon::current_num_threads());
    let mut done = Vec::with_capacity(items.len());
    while !items.is_empty() {
        let rest = items.split_off(at_once.min(items.len()));
        done.extend(items.into_par_iter().map(&work).collect::<Result<Vec<R>>>()?);
        items = rest;
    }
    Ok(done)
}

/// An expert on its way into an average: its share, and the order of its hidden neurons.
type Share<'a> = (&'a Mlp<LinearSource>, f64, Option<&'a [usize]>);

/// The weighted mean of a target and its members.
fn average(
    target: &Mlp<LinearSource>,
    group: &[Member],
    dense: &BTreeMap<usize, Mlp<LinearSource>>,
    dtype: Option<Dtype>,
) -> StoredExpert {
    let own = 1.0 - group.iter().map(|m| m.weight).sum::<f64>();
    let order = |m: &'_ Member| m.alignment.as_ref().map(|a| a.permutation.clone());
    let orders: Vec<Option<Vec<usize>>> = group.iter().map(order).collect();
    let members = group.iter().zip(&orders).map(|(m, order)| (&dense[&m.slot], m.weight, order.as_deref()));
    let shares: Vec<Share<'_>> = std::iter::once((target, own.max(0.0), None)).chain(members).collect();
    let map = |p: Projection, own: &LinearSource| Linear {
        weight: Matrix::Dense(mean_weight(&own.weight, &shares, p, dtype)),
        bias: own.bias.as_ref().and_then(|bias| mean_bias(bias, &shares, p)),
    };
    Expert::Mlp(Mlp {
        gate: map(Projection::Gate, &target.gate),
        up: target.up.as_ref().map(|up| map(Projection::Up, up)),
        down: map(Projection::Down, &target.down),
        activation: target.activation,
    })
}

/// The mean of the matrices of this name, of which the target's is `first`.
fn mean_weight(first: &Weight, shares: &[Share<'_>], p: Projection, dtype: Option<Dtype>) -> Weight {
    let (rows, cols) = (first.rows(), first.cols());
    let mut sum = vec![0.0; rows * cols];
    for (mlp, share, order) in shares {
        let Some(map) = mlp.map(p) else { continue };
        let values = map.weight.to_f32();
        let add = |(i, sum): (usize, &mut [f64])| match order {
            Some(order) if p == Projection::Down => {
                let row = &values[i * cols..][..cols];
                sum.iter_mut().zip(*order).for_each(|(s, &j)| *s += share * f64::from(row[j]));
            }
            _ => {
                let row = &values[order.map_or(i, |order| order[i]) * cols..][..cols];
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += share * f64::from(*v));
            }
        };
        sum.par_chunks_exact_mut(cols).enumerate().for_each(add);
    }
    let tensor = rounded(first.name(), dtype.unwrap_or(first.replacement_dtype()), vec![rows, cols], &sum);
    Weight::plain(tensor).unwrap_or_else(|_| unreachable!("a matrix of plain numbers"))
}

/// The mean of their biases; `None` where one has none.
fn mean_bias(first: &Tensor, shares: &[Share<'_>], p: Projection) -> Option<Tensor> {
    let mut sum = vec![0.0; first.len()];
    for (mlp, share, order) in shares {
        let values = mlp.map(p)?.bias.as_ref()?.to_f32().ok()?;
        let order = order.filter(|_| p != Projection::Down);
        for (i, s) in sum.iter_mut().enumerate() {
            *s += share * f64::from(values[order.map_or(i, |order| order[i])]);
        }
    }
    Some(rounded(first.name(), first.dtype(), first.shape().to_vec(), &sum))
}

/// The values rounded once to `dtype`.
fn rounded(name: &str, dtype: Dtype, shape: Vec<usize>, values: &[f64]) -> Tensor {
    let bytes: Vec<u8> = values.par_chunks(1 << 16).flat_map_iter(|chunk| encode_f64(dtype, chunk)).collect();
    Tensor::owned(name, dtype, shape, bytes)
}
