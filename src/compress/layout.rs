//! Which layout the result has, and how its tensors are called in it.

use super::{Error, Result, config, fused};
use crate::architecture::{Architecture, GroupScore, Names, Projection};
use crate::backend::{Expert, Linear, Matrix, StoredExpert};
use crate::checkpoint::{Checkpoint, ExpertEntry, ExpertForm, LayerEntry, MatrixRanks, Tensor, Weight};
use crate::model::MoeSource;
use crate::plan::{Action, MergedRows, Plan};

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
        /// Whether layers for multi-token prediction can stay: they have experts of their own, and a config holds one
        /// number of experts. Where that changes they are left out, and `num_nextn_predict_layers` is set to 0.
        keeps_multi_token: bool,
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
            (_, Ok(layout)) => Ok(layout),
            (LayoutChoice::HuggingFace, Err(why)) => Err(Error::Layout(why)),
        }
    }

    /// Whether the source's layers for multi-token prediction are copied.
    pub(super) fn keeps_multi_token(&self) -> bool {
        !matches!(self, Layout::HuggingFace { keeps_multi_token: false, .. })
    }

    /// The MoE tensors of layer `l` under the names that they have in this layout.
    pub(super) fn tensors(&self, names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
        let mut tensors = router_tensors(names, l, moe);
        let stock = matches!(self, Layout::HuggingFace { .. });
        if stock && !moe.fused.is_empty() {
            tensors.extend(fused::tensors(names, l, moe));
            return tensors;
        }
        for (slot, expert) in moe.experts.iter().enumerate() {
            let number = if stock { slot } else { moe.numbers[slot] };
            match expert {
                Expert::Mlp(mlp) => {
                    for (projection, map) in mlp.named() {
                        let stem = names.expert(l, number, projection);
                        match &map.weight {
                            Matrix::Dense(w) => tensors.extend(w.tensors(&stem)),
                            Matrix::LowRank { u, v } => {
                                tensors
                                    .extend([factor(u, format!("{stem}.u")), factor(v, format!("{stem}.v"))]);
                            }
                        }
                        tensors.extend(map.bias.iter().map(|b| b.clone().renamed(format!("{stem}.bias"))));
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

/// A factor under the name `name`; factors are always plain matrices.
fn factor(weight: &Weight, name: String) -> Tensor {
    weight.tensors("").swap_remove(0).renamed(name)
}

/// The router's tensors under their published names.
fn router_tensors(names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
    let [router, _] = names.routers(l);
    let mut tensors = vec![moe.router.weight.clone().renamed(format!("{router}.weight"))];
    tensors.extend(moe.router.bias.iter().map(|b| b.clone().renamed(format!("{router}.bias"))));
    if let Some(bias) = &moe.router.choice_bias {
        let [name, _] = names.choice_biases(l);
        let bias = bias.clone().renamed(name);
        tensors.push(if names.choice_bias_is_row { bias.as_row() } else { bias });
    }
    tensors
}

/// The `config.json` of a stock checkpoint that holds the plan's result, or why there is none.
fn stock_config(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    plan: &Plan,
    densify: bool,
) -> std::result::Result<Layout, String> {
    let stored = checkpoint.manifest().map_or(&[][..], |m| &m.layers);
    for expert in stored.iter().flat_map(|l| &l.experts) {
        if expert.form != ExpertForm::Dense {
            return Err("the source has experts in forms that no stock checkpoint can hold".into());
        }
    }
    let mut kept = None;
    for layer in &plan.layers {
        let l = layer.layer;
        if stored.iter().any(|entry| entry.layer == l && entry.skip.is_some()) {
            return Err(format!("layer {l} skips experts, which no stock checkpoint can say"));
        }
        let Some(moe) = architecture.moe(l) else { return Err(format!("layer {l} has no experts")) };
        let fits = |action: &Action| match action {
            Action::Keep | Action::Drop => true,
            Action::LowRank { .. } => densify,
            Action::Merge { .. } => layer.router == MergedRows::Fuse,
            _ => false,
        };
        if let Some(e) = layer.experts.iter().find(|e| !fits(&e.action)) {
            let hint = match e.action {
                Action::LowRank { .. } => " without --densify",
                Action::Merge { .. } => " without router=fuse",
                _ => "",
            };
            return Err(format!("layer {l}: no stock checkpoint can hold `{}`{hint}", e.action.name()));
        }
        if layer.top_k != moe.router.top_k {
            let (k, own) = (layer.top_k, moe.router.top_k);
            return Err(format!("layer {l} chooses {k} experts, config.json says {own} for every layer"));
        }
        if layer.skip.is_some() {
            return Err(format!("layer {l} skips experts, which no stock checkpoint can say"));
        }
        let replaces = |action: &Action| match action {
            Action::LowRank { .. } => Some("factors multiplied back"),
            Action::Merge { .. } => Some("merged experts"),
            _ => None,
        };
        let replaced = layer.experts.iter().find_map(|e| replaces(&e.action));
        if let (Some(what), Some(_)) = (replaced, architecture.packing) {
            return Err(format!("layer {l}: {what} are not packed, but config.json says that weights are"));
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
            for e in layer.experts.iter().filter(|e| layer.has_row(&e.action)) {
                sizes[number(e.expert) / (moe.experts / limit.count)] += 1;
            }
            if sizes.iter().any(|&n| n != sizes[0]) {
                return Err(format!(
                    "layer {l} keeps {sizes:?} experts of its groups; a stock router needs equal groups"
                ));
            }
            if limit.score == GroupScore::TwoLargest && sizes[0] < 2 {
                return Err(format!(
                    "layer {l} keeps {} expert in each group; a stock router scores groups by two",
                    sizes[0]
                ));
            }
        }
    }
    let source = checkpoint.config();
    let Some(kept) = kept else {
        return Ok(Layout::HuggingFace { config: source.into(), keeps_multi_token: true });
    };
    let set = |text: String, key: &&str| {
        config::set_number(&text, architecture.config_section, key, kept)
            .ok_or_else(|| format!("config.json: {key} is not a plain number"))
    };
    let config = architecture.expert_count_keys.iter().try_fold(source.to_string(), set)?;
    let keeps_multi_token = architecture.moe_layers().all(|(_, moe)| moe.experts == kept);
    if keeps_multi_token {
        return Ok(Layout::HuggingFace { config, keeps_multi_token });
    }
    let without = config::set_number(&config, architecture.config_section, "num_nextn_predict_layers", 0);
    Ok(Layout::HuggingFace { config: without.unwrap_or(config), keeps_multi_token })
}

/// The entry of layer `l` in `moepress.json`.
pub(super) fn manifest_entry(l: usize, moe: &MoeSource) -> LayerEntry {
    let rank = |map: Option<&Linear<Matrix<Weight>, Tensor>>| match &map?.weight {
        Matrix::Dense(_) => None,
        Matrix::LowRank { v, .. } => Some(v.rows()),
    };
    let form = |expert: &StoredExpert| match expert {
        Expert::Mlp(mlp) => match Projection::ALL.map(|p| rank(mlp.map(p))) {
            [None, None, None] => ExpertForm::Dense,
            [gate, up, down] => ExpertForm::LowRank { rank: MatrixRanks { gate, up, down } },
        },
        Expert::Alias(of) => ExpertForm::Alias { of: moe.numbers[*of] },
        Expert::Constant(_) | Expert::None => ExpertForm::Constant,
    };
    let entry = |(&expert, form_of): (&usize, &StoredExpert)| ExpertEntry { expert, form: form(form_of) };
    let experts = moe.numbers.iter().zip(&moe.experts).map(entry).collect();
    LayerEntry { layer: l, top_k: moe.spec.top_k, skip: moe.spec.skip, experts }
}
