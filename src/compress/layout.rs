//! Which layout the result has, and how its tensors are called in it.

use super::{Error, Result, config, fused};
use crate::architecture::{Architecture, ExpertStorage, FeedForwardSpec, GroupScore, Names, Projection};
use crate::backend::{Expert, Matrix, StoredExpert};
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
        /// number of experts. Where that changes they are left out, and the key that counts them is set to 0.
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
    pub(crate) fn keeps_multi_token(&self) -> bool {
        !matches!(self, Layout::HuggingFace { keeps_multi_token: false, .. })
    }

    /// The MoE tensors of layer `l` under the names that they have in this layout.
    pub(crate) fn tensors(&self, names: &Names, l: usize, moe: &MoeSource) -> Vec<Tensor> {
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
                            Matrix::LowRank { u, v } | Matrix::Delta { u, v } => {
                                tensors
                                    .extend([factor(u, format!("{stem}.u")), factor(v, format!("{stem}.v"))]);
                            }
                            Matrix::LowRankRows { u, v, rows, s } => {
                                let numbers: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
                                tensors.extend([
                                    factor(u, format!("{stem}.u")),
                                    factor(v, format!("{stem}.v")),
                                    Tensor::from_i32(format!("{stem}.rows"), vec![rows.len()], &numbers),
                                    factor(s, format!("{stem}.s")),
                                ]);
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
        for (projection, base) in Projection::ALL.into_iter().zip(&moe.base) {
            tensors.extend(base.iter().flat_map(|base| base.tensors(&names.base(l, projection))));
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
    tensors.extend(moe.router.expert_scales.iter().map(|s| s.clone().renamed(names.expert_scales(l))));
    tensors
}

/// The `config.json` of a stock checkpoint that holds the plan's result, or why there is none.
fn stock_config(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    plan: &Plan,
    densify: bool,
) -> std::result::Result<Layout, String> {
    if architecture.names.storage == ExpertStorage::WithImages {
        return Err("a stock checkpoint has as many experts of images as of text".into());
    }
    let stored = checkpoint.manifest().map_or(&[][..], |m| &m.layers);
    for expert in stored.iter().flat_map(|l| &l.experts) {
        if expert.form != ExpertForm::Dense || expert.width.is_some() {
            return Err("the source has experts in forms that no stock checkpoint can hold".into());
        }
    }
    let (mut kept, mut width) = (None, None);
    for layer in &plan.layers {
        let l = layer.layer;
        if stored.iter().any(|entry| entry.layer == l && entry.skip.is_some()) {
            return Err(format!("layer {l} skips experts, which no stock checkpoint can say"));
        }
        let Some(moe) = architecture.moe(l) else { return Err(format!("layer {l} has no experts")) };
        let fits = |action: &Action| match action {
            Action::Keep | Action::Drop | Action::Channels { .. } => true,
            Action::LowRank { .. } | Action::Delta { .. } => densify,
            Action::Merge { .. } => layer.router == MergedRows::Fuse,
            Action::Constant => false,
        };
        if let Some(e) = layer.experts.iter().find(|e| !fits(&e.action)) {
            let hint = match e.action {
                Action::LowRank { .. } | Action::Delta { .. } => " without --densify",
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
            Action::LowRank { .. } | Action::Delta { .. } => Some("factors multiplied back"),
            Action::Channels { .. } => Some("experts with fewer channels"),
            Action::Merge { .. } => Some("merged experts"),
            _ => None,
        };
        let replaced = layer.experts.iter().find_map(|e| replaces(&e.action));
        if let (Some(what), Some(_)) = (replaced, architecture.packing) {
            return Err(format!("layer {l}: {what} are not packed, but config.json says that weights are"));
        }
        for entry in layer.experts.iter().filter(|e| e.action.is_stored()) {
            let own = match &entry.action {
                Action::Channels { keep } => keep.count(),
                _ => moe.width,
            };
            match width {
                Some(width) if width != own => {
                    let e = entry.expert;
                    return Err(format!(
                        "layer {l}: expert {e} keeps {own} channels and an earlier one {width}; a config holds one number"
                    ));
                }
                _ => width = Some(own),
            }
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
    let mut config = architecture.expert_count_keys.iter().try_fold(source.to_string(), set)?;
    let narrowed = width.filter(|width| architecture.moe_layers().any(|(_, moe)| moe.width != *width));
    if let Some(width) = narrowed {
        config = narrow_config(architecture, &config, width)?;
    }
    let keeps_multi_token =
        narrowed.is_none() && architecture.moe_layers().all(|(_, moe)| moe.experts == kept);
    if keeps_multi_token {
        return Ok(Layout::HuggingFace { config, keeps_multi_token });
    }
    for key in MULTI_TOKEN_LAYERS {
        if let Some(without) = config::set_number(&config, architecture.config_section, key, 0) {
            config = without;
        }
    }
    Ok(Layout::HuggingFace { config, keeps_multi_token })
}

/// Keys that may hold the number of layers for multi-token prediction.
const MULTI_TOKEN_LAYERS: [&str; 2] = ["num_nextn_predict_layers", "mtp_num_hidden_layers"];

/// Keys that may hold the width of a routed expert, the more special one first.
const WIDTHS: [&str; 3] = ["moe_intermediate_size", "ffn_hidden_size", "intermediate_size"];

/// `config` with routed experts of `width` channels, if it has a number for that and for nothing else.
fn narrow_config(
    architecture: &Architecture,
    config: &str,
    width: usize,
) -> std::result::Result<String, String> {
    if matches!(architecture.names.storage, ExpertStorage::Fused { .. })
        && architecture.moe_layers().any(|(_, moe)| moe.expert_bias)
    {
        return Err("biases of experts that are stored together keep their width".into());
    }
    let edit = |key: &&str| config::set_number(config, architecture.config_section, key, width);
    let edited =
        WIDTHS.iter().find_map(edit).ok_or("config.json has no plain number for the experts' width")?;
    let read = |text: &str| Architecture::from_config(text).map_err(|e| format!("config.json: {e}"));
    let mut expected = read(config)?;
    for layer in &mut expected.layers {
        if let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward {
            moe.width = width;
        }
    }
    if format!("{:?}", read(&edited)?) == format!("{expected:?}") {
        return Ok(edited);
    }
    Err("config.json has the same number for the width of routed and of other MLPs".into())
}

/// The entry of layer `l` in `moepress.json`.
pub(crate) fn manifest_entry(l: usize, moe: &MoeSource) -> LayerEntry {
    let counts = |[gate, up, down]: [Option<usize>; 3]| MatrixRanks { gate, up, down };
    let form = |expert: &StoredExpert| match expert {
        Expert::Mlp(mlp) => {
            let maps = Projection::ALL.map(|p| mlp.map(p).map(|map| &map.weight));
            let rank = counts(maps.map(|m| m?.factors().map(|(_, v)| v.rows())));
            let rows = counts(maps.map(|m| match m {
                Some(Matrix::LowRankRows { rows, .. }) => Some(rows.len()),
                _ => None,
            }));
            match () {
                () if mlp.maps().any(|m| m.weight.is_delta()) => ExpertForm::Delta { rank },
                () if rank.is_empty() => ExpertForm::Dense,
                () => ExpertForm::LowRank { rank, rows },
            }
        }
        Expert::Alias(of) => ExpertForm::Alias { of: moe.numbers[*of] },
        Expert::Constant(_) | Expert::None => ExpertForm::Constant,
    };
    let width = |expert: &StoredExpert| match expert {
        Expert::Mlp(_) => Some(expert.width()).filter(|width| *width != moe.width),
        _ => None,
    };
    let entry = |(&number, expert): (&usize, &StoredExpert)| ExpertEntry {
        expert: number,
        width: width(expert),
        form: form(expert),
    };
    let experts = moe.numbers.iter().zip(&moe.experts).map(entry).collect();
    LayerEntry { layer: l, top_k: moe.spec.top_k, skip: moe.spec.skip, experts }
}
