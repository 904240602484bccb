//! A layer's plan applied to its tensors, in memory.

use std::borrow::Cow;

use rayon::prelude::*;

use serde_json::Value;

use super::activations::Inputs;
use super::channels::{self, ChannelOptions, Problem};
use super::delta::{self, BaseKind, BaseOptions};
use super::factorise::{AlignBy, FactorOptions, Whitening, factorise_on, factorise_with_rows};
use super::merge::{Merged, merge};
use super::{Alignment, Error, Result};
use crate::architecture::Projection;
use crate::backend::{Expert, Linear, Matrix, Moment, Moments, StoredExpert};
use crate::checkpoint::{Dtype, Tensor, Weight};
use crate::linalg::Threads;
use crate::model::MoeSource;
use crate::plan::{Action, Criterion, LayerPlan, Plan, Ranks, refit};

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

/// How [`apply_layer`] carries out a plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct ApplyOptions {
    /// Of factors and differences.
    pub factors: FactorOptions,
    /// Of experts that lose channels.
    pub channels: ChannelOptions,
    /// Of experts that become differences from a base.
    pub base: BaseOptions,
}

impl ApplyOptions {
    /// What the options of `plan` say.
    ///
    /// # Errors
    /// [`Error::Missing`] with the option that has a value of no meaning.
    pub fn of(plan: &Plan, densify: bool) -> Result<Self> {
        let wrong = |name: &str, expected: &str| {
            let value = &plan.options[name];
            Error::Missing(format!("the plan's option {name} is {value}, expected {expected}"))
        };
        let option =
            |name: &str| plan.options.get(name).filter(|v| !v.is_null()).map(|v| v.as_str().unwrap_or(""));
        let dtype_of = |name: &str| match option(name) {
            None | Some("auto") => Ok(None),
            Some("f32") => Ok(Some(Dtype::F32)),
            Some("bf16") => Ok(Some(Dtype::BF16)),
            Some("f16") => Ok(Some(Dtype::F16)),
            Some(_) => Err(wrong(name, "auto, f32, bf16 or f16")),
        };
        let (dtype, merge_dtype) = (dtype_of("factor_dtype")?, dtype_of("merge_dtype")?);
        let kind = match option("base") {
            None | Some("frequency") => BaseKind::Frequency,
            Some("mean") => BaseKind::Mean,
            Some("gram") => BaseKind::Gram,
            Some(_) => return Err(wrong("base", "mean, frequency or gram")),
        };
        let flag = |name: &str, default: bool| match plan.options.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(wrong(name, "true or false")),
        };
        let (whiten, align) = (flag("whiten", false)?, flag("align", true)?);
        let align_by = match option("align_by") {
            None | Some("weights") => AlignBy::Weights,
            Some("activations") => AlignBy::Activations,
            Some("both") => AlignBy::Both,
            Some(_) => return Err(wrong("align_by", "weights, activations or both")),
        };
        let criterion = Criterion::of(&plan.options).map_err(|expected| wrong("criterion", &expected))?;
        let refit = refit(&plan.options).map_err(|expected| wrong("refit", &expected))?;
        Ok(ApplyOptions {
            factors: FactorOptions { dtype, densify, whiten, align, align_by, merge_dtype },
            channels: ChannelOptions { criterion, refit },
            base: BaseOptions { kind, align: flag("align", false)? },
        })
    }
}

impl From<FactorOptions> for ApplyOptions {
    fn from(factors: FactorOptions) -> Self {
        ApplyOptions { factors, ..ApplyOptions::default() }
    }
}

/// What was measured of a layer before it is compressed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Observed<'a> {
    /// Sums over its tokens.
    pub moments: Option<&'a Moments>,
    /// Inputs of its experts, where experts are compared by what they are on tokens ([`AlignBy`]).
    pub inputs: Option<&'a Inputs>,
}

impl<'a> From<Option<&'a Moments>> for Observed<'a> {
    fn from(moments: Option<&'a Moments>) -> Self {
        Observed { moments, inputs: None }
    }
}

/// What was measured of a layer, and which of its experts stand for several.
#[derive(Clone, Copy)]
pub(super) struct Measured<'a> {
    pub(super) moments: Option<&'a Moments>,
    merged: Option<&'a Merged>,
}

impl<'a> Measured<'a> {
    /// A second moment `[side, side]` of what the expert in `slot` stands for.
    pub(super) fn gram(&self, moment: Moment, slot: usize, side: usize) -> Option<Cow<'a, [f64]>> {
        Merged::gram(self.merged, self.moments?, moment, slot, side)
    }

    /// A moment of the layer.
    pub(super) fn get(&self, moment: Moment) -> Option<&'a [f64]> {
        self.moments?.get(moment)
    }
}

/// Applies `plan` to the experts of `source`: merges first, so that what becomes of an expert that takes in others becomes
/// of their mean. `observed` holds what was measured of the layer and is needed: for constants [`Moment::Count`] and
/// [`Moment::OutputSum`]; where low-rank experts and differences are to be whitened [`Moment::InputGram`] for gate and up,
/// [`Moment::HiddenGram`] for down; for channels what their criterion is made of, and [`Moment::GateHiddenGram`] for a
/// refit.
///
/// # Errors
/// Names the layer and expert, and what cannot be done.
pub fn apply_layer<'a>(
    plan: &LayerPlan,
    source: &MoeSource,
    observed: impl Into<Observed<'a>>,
    options: impl Into<ApplyOptions>,
) -> Result<CompressedLayer> {
    let (options, Observed { moments, inputs }) = (options.into(), observed.into());
    let merged = merge(plan, source, inputs, options.factors)?;
    let source = merged.as_ref().map_or(source, |m| &m.moe);
    let slots: Vec<usize> =
        plan.experts.iter().filter(|e| plan.has_row(&e.action)).map(|e| e.expert).collect();
    // Experts at once or one after the other: whatever leaves no thread without work.
    let factorised =
        slots.iter().filter(|&&s| matches!(plan.experts[s].action, Action::LowRank { .. })).count();
    let threads = if factorised < rayon::current_num_threads() { Threads::All } else { Threads::One };
    let measured = Measured { moments, merged: merged.as_ref() };
    let (base, deltas) = delta::deltas(plan, source, measured, options.base, options.factors)?;
    let expert = |&slot: &usize| -> Result<StoredExpert> {
        let refuse = |what: String| Error::Action { layer: plan.layer, expert: slot, what };
        match &plan.experts[slot].action {
            Action::Keep | Action::Drop | Action::Merge { .. } => Ok(keep(plan, source, slot, &slots)),
            Action::LowRank { rank, rows } => {
                let expert = &source.experts[slot];
                low_rank(
                    [plan.layer, slot, source.width],
                    expert,
                    [*rank, *rows],
                    measured,
                    options.factors,
                    threads,
                )
            }
            Action::Channels { keep } => {
                let expert = &source.experts[slot];
                let narrow = channels::narrow(slot, expert, source.width, keep, measured, options.channels);
                narrow.map_err(|problem| match problem {
                    Problem::Action(what) => refuse(what),
                    Problem::Linalg(source) => {
                        Error::Factorise { layer: plan.layer, expert: slot, matrix: "down", source }
                    }
                })
            }
            Action::Delta { .. } => {
                let found = deltas.iter().find(|(s, _)| *s == slot).map(|(_, expert)| expert.clone());
                found.ok_or_else(|| refuse("has no difference from the base".into()))
            }
            Action::Constant => novice(slot, moments).map_err(refuse),
        }
    };
    let experts: Vec<_> = slots.par_iter().map(expert).collect::<Result<_>>()?;
    let router = if slots.len() == source.experts.len() {
        source.router.clone()
    } else {
        source.router.select(&slots)
    };
    let base = Projection::ALL.map(|p| {
        let is_delta = |expert: &StoredExpert| match expert {
            Expert::Mlp(mlp) => mlp.map(p).is_some_and(|map| map.weight.is_delta()),
            _ => false,
        };
        base[p as usize].clone().filter(|_| experts.iter().any(is_delta))
    });
    let mut spec = source.spec.clone();
    spec.top_k = plan.top_k;
    spec.skip = plan.skip.or(spec.skip);
    let moe = MoeSource {
        norms: source.norms.clone(),
        latent: source.latent.clone(),
        router,
        spec,
        capacity: source.capacity,
        experts,
        base,
        width: source.width,
        numbers: slots.iter().map(|&s| source.numbers[s]).collect(),
        original_experts: source.original_experts,
        shared: source.shared.clone(),
        averaged: source.averaged,
        fused: source.fused.clone(),
        fused_output_major: source.fused_output_major,
    };
    let members = merged.iter().flat_map(Merged::members);
    let alignments = members.filter_map(|m| m.alignment.clone()).collect();
    Ok(CompressedLayer { moe, slots, alignments })
}

/// The expert as it is. An alias is pointed at the new slot of what it stands for, and where that goes, the first of its
/// aliases takes the weights over.
fn keep(plan: &LayerPlan, source: &MoeSource, slot: usize, slots: &[usize]) -> StoredExpert {
    let Expert::Alias(of) = source.experts[slot] else { return source.experts[slot].clone() };
    let stays = plan.has_row(&plan.experts[of].action) && plan.experts[of].action != Action::Constant;
    let is_heir = |s: &usize| {
        matches!(source.experts[*s], Expert::Alias(other) if other == of)
            && plan.experts[*s].action == Action::Keep
    };
    let owner = if stays { Some(of) } else { slots.iter().copied().find(is_heir) };
    match owner.and_then(|owner| slots.iter().position(|s| *s == owner)) {
        Some(target) if owner != Some(slot) => Expert::Alias(target),
        _ => source.experts[of].clone(),
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
    if mean.iter().any(|v| !v.is_finite()) {
        return Err("its mean output is not finite".into());
    }
    Ok(Expert::Constant(Tensor::from_f32("constant", Dtype::F32, vec![d], &mean)))
}

fn low_rank(
    [layer, slot, width]: [usize; 3],
    expert: &StoredExpert,
    [rank, rows]: [Ranks; 2],
    measured: Measured<'_>,
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
        if options.whiten && p == Projection::Down && weight.cols() != width {
            let what =
                format!("has {} of {width} channels; start from the original checkpoint", weight.cols());
            return Err(Error::Action { layer, expert: slot, what });
        }
        let gram = if options.whiten { measured.gram(moment, slot, weight.cols()) } else { None };
        let whitening = gram.as_deref().map_or(Whitening::None, Whitening::Gram);
        let factors = match rows.get(p) {
            None => factorise_on(weight, rank, whitening, options, threads),
            Some(rows) => factorise_with_rows(weight, rank, rows, whitening, options, threads),
        };
        let weight =
            factors.map_err(|source| Error::Factorise { layer, expert: slot, matrix: p.name(), source })?;
        Ok(Linear { weight, bias: source.bias.clone() })
    };
    Ok(Expert::Mlp(mlp.try_map_named(map)?))
}
