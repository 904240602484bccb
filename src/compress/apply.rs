//! A layer's plan applied to its tensors, in memory.

use std::borrow::Cow;

use rayon::prelude::*;

use super::factorise::{FactorOptions, Whitening, factorise_on};
use super::merge::{Merged, merge};
use super::{Alignment, Error, Result};
use crate::architecture::Projection;
use crate::backend::{Expert, Linear, Matrix, Moment, Moments, StoredExpert};
use crate::checkpoint::{Dtype, Tensor, Weight};
use crate::linalg::Threads;
use crate::model::MoeSource;
use crate::plan::{Action, LayerPlan, Plan, Ranks};

/// Router and experts after compression, and which slots of the source they came from.
#[derive(Clone, Debug)]
pub struct CompressedLayer {
    /// Router and experts; can be prepared and run like any other.
    pub moe: MoeSource,
    /// Slot of the source behind each expert.
    pub slots: Vec<usize>,
    /// How the merged experts were aligned, in the order of their targets; empty where they were not.
    pub alignments: Vec<Alignment>,
}

/// Errors where `plan` has an action that [`apply_layer`] does not know, so that this is said before any work.
pub(super) fn check_actions(plan: &Plan) -> Result<()> {
    for layer in &plan.layers {
        for entry in &layer.experts {
            if !matches!(
                entry.action,
                Action::Keep
                    | Action::Drop
                    | Action::Merge { .. }
                    | Action::Constant
                    | Action::LowRank { .. }
            ) {
                return Err(unknown_action(layer.layer, entry.expert, &entry.action));
            }
        }
    }
    Ok(())
}

fn unknown_action(layer: usize, expert: usize, action: &Action) -> Error {
    let what = format!(
        "action `{}` cannot be carried out by this version; known: keep, drop, merge, constant, low_rank",
        action.name()
    );
    Error::Action { layer, expert, what }
}

/// Applies `plan` to the experts of `source`: merges first, so that what becomes of an expert that takes in others becomes
/// of their mean. `moments` holds what was measured of the layer and is needed: for constants [`Moment::Count`] and
/// [`Moment::OutputSum`]; where low-rank experts are to be whitened [`Moment::InputGram`] for gate and up,
/// [`Moment::HiddenGram`] for down.
///
/// # Errors
/// Names the layer and expert, and what cannot be done.
pub fn apply_layer(
    plan: &LayerPlan,
    source: &MoeSource,
    moments: Option<&Moments>,
    options: FactorOptions,
) -> Result<CompressedLayer> {
    let merged = merge(plan, source, options)?;
    let source = merged.as_ref().map_or(source, |m| &m.moe);
    let slots: Vec<usize> =
        plan.experts.iter().filter(|e| plan.has_row(&e.action)).map(|e| e.expert).collect();
    // Experts at once or one after the other: whatever leaves no thread without work.
    let factorised =
        slots.iter().filter(|&&s| matches!(plan.experts[s].action, Action::LowRank { .. })).count();
    let threads = if factorised < rayon::current_num_threads() { Threads::All } else { Threads::One };
    let expert = |&slot: &usize| -> Result<StoredExpert> {
        let refuse = |what: String| Error::Action { layer: plan.layer, expert: slot, what };
        match &plan.experts[slot].action {
            Action::Keep | Action::Drop | Action::Merge { .. } => keep(source, slot, &slots).map_err(refuse),
            Action::LowRank { rank } => {
                let gram = |moment: Moment, side: usize| {
                    moments
                        .filter(|_| options.whiten)
                        .and_then(|all| Merged::gram(merged.as_ref(), all, moment, slot, side))
                };
                low_rank(plan.layer, slot, &source.experts[slot], *rank, gram, options, threads)
            }
            Action::Constant => novice(slot, moments).map_err(refuse),
            other => Err(unknown_action(plan.layer, slot, other)),
        }
    };
    let experts: Vec<_> = slots.par_iter().map(expert).collect::<Result<_>>()?;
    let router = if slots.len() == source.experts.len() {
        source.router.clone()
    } else {
        source.router.select(&slots)
    };
    let mut spec = source.spec.clone();
    spec.top_k = plan.top_k;
    spec.skip = plan.skip.or(spec.skip);
    let moe = MoeSource {
        router,
        spec,
        experts,
        numbers: slots.iter().map(|&s| source.numbers[s]).collect(),
        original_experts: source.original_experts,
        shared: source.shared.clone(),
        fused: source.fused.clone(),
    };
    let members = merged.iter().flat_map(Merged::members);
    let alignments = members.filter_map(|m| m.alignment.clone()).collect();
    Ok(CompressedLayer { moe, slots, alignments })
}

/// The expert as it is; an alias is pointed at its target's new slot.
fn keep(source: &MoeSource, slot: usize, slots: &[usize]) -> std::result::Result<StoredExpert, String> {
    match &source.experts[slot] {
        Expert::Alias(of) => match slots.iter().position(|s| s == of) {
            Some(target) => Ok(Expert::Alias(target)),
            None => Err(format!("is an alias of expert {of}, which the plan drops; drop both or keep both")),
        },
        other => Ok(other.clone()),
    }
}

/// The mean output over the tokens routed to the expert, in f32; 0 where there were none (MoNE, arXiv 2507.00390).
fn novice(slot: usize, moments: Option<&Moments>) -> std::result::Result<StoredExpert, String> {
    let get = |moment: Moment| moments.and_then(|m| m.get(moment));
    let (Some(count), Some(sum)) = (get(Moment::Count), get(Moment::OutputSum)) else {
        return Err("its mean output, which is to take its place, was not measured".into());
    };
    let d = sum.len() / count.len();
    let tokens = count[slot].max(1.0);
    let mean: Vec<f32> = sum[slot * d..(slot + 1) * d].iter().map(|s| (s / tokens) as f32).collect();
    Ok(Expert::Constant(Tensor::from_f32("constant", Dtype::F32, vec![d], &mean)))
}

fn low_rank<'g>(
    layer: usize,
    slot: usize,
    expert: &StoredExpert,
    rank: Ranks,
    gram: impl Fn(Moment, usize) -> Option<Cow<'g, [f64]>>,
    options: FactorOptions,
    threads: Threads,
) -> Result<StoredExpert> {
    let Expert::Mlp(mlp) = expert else {
        let what = format!("is {} and has no matrices to factorise; keep or drop it", expert.form());
        return Err(Error::Action { layer, expert: slot, what });
    };
    let map = |p: Projection, source: &Linear<Matrix<Weight>, Tensor>| {
        let Some(rank) = rank.get(p) else { return Ok(source.clone()) };
        let Matrix::Dense(weight) = &source.weight else {
            let what = format!("{} is already low rank; start from the original checkpoint", p.name());
            return Err(Error::Action { layer, expert: slot, what });
        };
        let moment = if p == Projection::Down { Moment::HiddenGram } else { Moment::InputGram };
        let gram = gram(moment, weight.cols());
        let whitening = gram.as_deref().map_or(Whitening::None, Whitening::Gram);
        let factors = factorise_on(weight, rank, whitening, options, threads);
        let weight =
            factors.map_err(|source| Error::Factorise { layer, expert: slot, matrix: p.name(), source })?;
        Ok(Linear { weight, bias: source.bias.clone() })
    };
    Ok(Expert::Mlp(mlp.try_map_named(map)?))
}
