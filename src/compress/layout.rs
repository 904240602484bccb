//! Which layout the result has, and how its tensors are called in it.

use super::{Error, Result, config};
use crate::architecture::{Architecture, Names, Projection};
use crate::backend::{Expert, Matrix};
use crate::checkpoint::{Checkpoint, ExpertEntry, ExpertForm, LayerEntry, MatrixRanks, Tensor};
use crate::model::MoeSource;
use crate::plan::{Action, Plan};

/// The layout asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayoutChoice {
    /// Stock Hugging Face where the family can express the result, else moepress.
    #[default]
    Auto,
    /// Stock Hugging Face.
    HuggingFace,
    /// moepress.
    Moepress,
}

/// The layout chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The family's own layout: experts numbered from 0, `config.json` edited in place.
    HuggingFace {
        /// The edited `config.json`.
        config: String,
    },
    /// Tensors under their original numbers, `config.json` untouched, `moepress.json` beside.
    Moepress,
}

impl Layout {
    /// Name in results: `hf` or `moepress`.
    pub fn name(&self) -> &'static str {
        match self {
            Layout::HuggingFace { .. } => "hf",
            Layout::Moepress => "moepress",
        }
    }

    /// Decides the layout of `plan`'s result.
    ///
    /// # Errors
    /// Says why the stock layout cannot hold it, where that was asked for.
    pub(super) fn choose(
        choice: LayoutChoice,
        checkpoint: &Checkpoint,
        architecture: &Architecture,
        plan: &Plan,
        densify: bool,
    ) -> Result<Self> {
        match (choice, stock_config(checkpoint, architecture, plan, densify)) {
            (LayoutChoice::Moepress, _) | (LayoutChoice::Auto, Err(_)) => Ok(Layout::Moepress),
            (_, Ok(config)) => Ok(Layout::HuggingFace { config }),
            (LayoutChoice::HuggingFace, Err(why)) => Err(Error::Layout(why)),
        }
    }

    /// The MoE tensors of layer `l` under the names that they have in this layout.
    pub(super) fn tensors(&self, names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
        let mut tensors = vec![moe.router.clone().renamed(names.router(l))];
        for (slot, expert) in moe.experts.iter().enumerate() {
            let number = if matches!(self, Layout::Moepress) { moe.numbers[slot] } else { slot };
            match expert {
                Expert::Mlp(mlp) => {
                    for (projection, matrix) in Projection::ALL.into_iter().zip(mlp.matrices()) {
                        let stem = names.expert(l, number, projection);
                        match matrix {
                            Matrix::Dense(w) => tensors.push(w.clone().renamed(format!("{stem}.weight"))),
                            Matrix::LowRank { u, v } => {
                                tensors.push(u.clone().renamed(format!("{stem}.u")));
                                tensors.push(v.clone().renamed(format!("{stem}.v")));
                            }
                        }
                    }
                }
                Expert::Constant(vector) => {
                    tensors
                        .push(vector.clone().renamed(format!("{}constant", names.expert_prefix(l, number))));
                }
                Expert::Alias(_) | Expert::None => {}
            }
        }
        tensors
    }
}

/// The `config.json` of a stock checkpoint that holds the plan's result, or why there is none.
fn stock_config(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    plan: &Plan,
    densify: bool,
) -> std::result::Result<String, String> {
    let stored = checkpoint.manifest().map_or(&[][..], |m| &m.layers);
    for expert in stored.iter().flat_map(|l| &l.experts) {
        if expert.form != ExpertForm::Dense {
            return Err("the source has experts in forms that no stock checkpoint can hold".into());
        }
    }
    let mut kept = None;
    for layer in &plan.layers {
        let l = layer.layer;
        let Some(moe) = architecture.moe(l) else { return Err(format!("layer {l} has no experts")) };
        let fits = |action: &Action| match action {
            Action::Keep | Action::Drop => true,
            Action::LowRank { .. } => densify,
            _ => false,
        };
        if let Some(e) = layer.experts.iter().find(|e| !fits(&e.action)) {
            let hint = if matches!(e.action, Action::LowRank { .. }) { " without --densify" } else { "" };
            return Err(format!("layer {l}: no stock checkpoint can hold `{}`{hint}", e.action.name()));
        }
        if layer.top_k != moe.router.top_k {
            let (k, own) = (layer.top_k, moe.router.top_k);
            return Err(format!("layer {l} chooses {k} experts, config.json says {own} for every layer"));
        }
        let routed = layer.routed();
        match kept {
            Some(n) if n != routed => {
                return Err(format!(
                    "layer {l} keeps {routed} experts and an earlier layer {n}; a config holds one number"
                ));
            }
            _ => kept = Some(routed),
        }
        if let Some(limit) = moe.router.groups {
            let entry = stored.iter().find(|entry| entry.layer == l);
            let number = |e: usize| entry.map_or(e, |entry| entry.experts[e].expert);
            let mut sizes = vec![0; limit.count];
            for e in layer.experts.iter().filter(|e| e.action.is_routed()) {
                sizes[number(e.expert) / (moe.experts / limit.count)] += 1;
            }
            if sizes.iter().any(|&n| n != sizes[0]) {
                return Err(format!(
                    "layer {l} keeps {sizes:?} experts of its groups; a stock router needs equal groups"
                ));
            }
        }
    }
    let Some(kept) = kept else { return Ok(checkpoint.config().into()) };
    let set = |text: String, key: &&str| {
        config::set_number(&text, key, kept)
            .ok_or_else(|| format!("config.json: {key} is not a plain number"))
    };
    architecture.expert_count_keys.iter().try_fold(checkpoint.config().to_string(), set)
}

/// The entry of layer `l` in `moepress.json`.
pub(super) fn manifest_entry(l: usize, moe: &MoeSource) -> LayerEntry {
    let rank = |m: &Matrix<Tensor>| match m {
        Matrix::Dense(_) => None,
        Matrix::LowRank { v, .. } => Some(v.shape()[0]),
    };
    let form = |expert: &Expert<Tensor>| match expert {
        Expert::Mlp(mlp) => match mlp.matrices().map(rank) {
            [None, None, None] => ExpertForm::Dense,
            [gate, up, down] => ExpertForm::LowRank { rank: MatrixRanks { gate, up, down } },
        },
        Expert::Alias(of) => ExpertForm::Alias { of: moe.numbers[*of] },
        Expert::Constant(_) | Expert::None => ExpertForm::Constant,
    };
    let entry = |(&expert, form_of): (&usize, &Expert<Tensor>)| ExpertEntry { expert, form: form(form_of) };
    let experts = moe.numbers.iter().zip(&moe.experts).map(entry).collect();
    LayerEntry { layer: l, top_k: moe.spec.top_k, experts }
}
