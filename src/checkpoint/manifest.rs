//! `moepress.json`: what the experts of a checkpoint in the moepress layout look like.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::architecture::Skip;

/// Contents of `moepress.json`. `config.json` beside it stays the original's; the router of a listed layer has
/// one row per entry of [`LayerEntry::experts`], in that order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version; 1.
    pub moepress: u32,
    /// Where the folder came from: method, options and identity of the original.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub origin: serde_json::Value,
    /// The MoE layers, ascending.
    pub layers: Vec<LayerEntry>,
}

/// One MoE layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerEntry {
    /// 0-based decoder layer.
    pub layer: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Which of those are left out, for layers that skip experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip: Option<Skip>,
    /// The experts that the router can choose, in the order of its rows.
    pub experts: Vec<ExpertEntry>,
}

/// One expert: its number in the original model (which its tensors' names carry) and its form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertEntry {
    /// Number of the expert in the original model.
    pub expert: usize,
    /// Its hidden width, where that is less than the config's: a dense or low-rank expert that lost channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// What is stored for it.
    #[serde(flatten)]
    pub form: ExpertForm,
}

/// The form of an expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "form", rename_all = "snake_case")]
pub enum ExpertForm {
    /// gate, up and down as full matrices.
    Dense,
    /// Some of the three matrices as U·V.
    LowRank {
        /// The ranks; a matrix without one is stored dense.
        rank: MatrixRanks,
        /// Numbers of dense rows that are added, of matrices with a rank: tensors `.rows` and `.s`.
        #[serde(default, skip_serializing_if = "MatrixRanks::is_empty")]
        rows: MatrixRanks,
    },
    /// The layer's base, tensors `…experts.base.…`, plus U·V.
    Delta {
        /// The ranks; a matrix without one is stored dense, and has nothing of the base.
        rank: MatrixRanks,
    },
    /// Another expert's weights.
    Alias {
        /// Original number of that expert.
        of: usize,
    },
    /// A constant output, tensor `…experts.{e}.constant`.
    Constant,
}

/// Ranks of an expert's three matrices (or numbers of rows); `None` is dense (or no row).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatrixRanks {
    /// Gate projection.
    pub gate: Option<usize>,
    /// Up projection.
    pub up: Option<usize>,
    /// Down projection.
    pub down: Option<usize>,
}

impl MatrixRanks {
    /// Gate, up and down.
    pub fn all(&self) -> [Option<usize>; 3] {
        [self.gate, self.up, self.down]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl ExpertForm {
    /// What contradicts itself in the form of an expert of `width` (`None`: the config's).
    fn contradiction(&self, width: Option<usize>) -> Option<&'static str> {
        match self {
            _ if width == Some(0) => Some("has width 0, expected at least 1"),
            ExpertForm::LowRank { rank, rows } => {
                let lonely =
                    rank.all().iter().zip(rows.all()).any(|(rank, rows)| rows.is_some() && rank.is_none());
                lonely.then_some("has dense rows beside a matrix without a rank")
            }
            ExpertForm::Dense => None,
            _ if width.is_some() => Some("has a width, which only dense and low_rank experts have"),
            ExpertForm::Delta { rank } => rank.is_empty().then_some("is a delta without any rank; use dense"),
            ExpertForm::Alias { .. } | ExpertForm::Constant => None,
        }
    }
}

impl Manifest {
    /// Reads the text of the file at `path`.
    ///
    /// # Errors
    /// Names the file and what is wrong: not JSON, an unknown version, experts listed twice, aliases of nothing.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let invalid = |what: String| Error::Manifest { path: path.into(), what };
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| invalid(e.to_string()))?;
        if manifest.moepress != 1 {
            return Err(invalid(format!("has version {}, this moepress reads version 1", manifest.moepress)));
        }
        let mut last = None;
        for LayerEntry { layer, top_k, skip, experts } in &manifest.layers {
            if last.is_some_and(|l| l >= *layer) {
                return Err(invalid(format!("layer {layer} is listed twice or out of order")));
            }
            last = Some(*layer);
            if *top_k == 0 || *top_k > experts.len() {
                let n = experts.len();
                return Err(invalid(format!(
                    "layer {layer}: top_k is {top_k}, expected 1 to {n} (the experts listed)"
                )));
            }
            if let Some(Err(what)) = skip.map(|s| s.check(*top_k)) {
                return Err(invalid(format!("layer {layer}: skip: {what}")));
            }
            let is_alias = |entry: &ExpertEntry| matches!(entry.form, ExpertForm::Alias { .. });
            let stored: BTreeSet<usize> = experts.iter().filter(|e| !is_alias(e)).map(|e| e.expert).collect();
            let mut seen = BTreeSet::new();
            for entry in experts {
                let e = entry.expert;
                if !seen.insert(e) {
                    return Err(invalid(format!("layer {layer}: expert {e} is listed twice")));
                }
                if let Some(what) = entry.form.contradiction(entry.width) {
                    return Err(invalid(format!("layer {layer}: expert {e} {what}")));
                }
                if let ExpertForm::Alias { of } = entry.form
                    && !stored.contains(&of)
                {
                    return Err(invalid(format!(
                        "layer {layer}: expert {e} is an alias of {of}, which is not stored"
                    )));
                }
            }
        }
        Ok(manifest)
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}
