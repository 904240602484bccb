//! Dense checkpoints that are alike in all but their values.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use super::config::DenseConfig;
use super::{Error, Result, Target};
use crate::checkpoint::{Checkpoint, Tensor, read_file};

/// Buffers of old checkpoints, which follow from the config.
const FREQUENCIES: &str = "rotary_emb.inv_freq";

/// Linear maps of a layer's attention.
pub(super) const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// Those of its MLP.
pub(super) const MLP: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Dense checkpoints of one shape.
pub(super) struct Dense {
    pub(super) checkpoints: Vec<Checkpoint>,
    pub(super) config: DenseConfig,
}

impl Dense {
    /// Opens `folders`, and errors unless they differ in nothing but values.
    pub(super) fn open(folders: &[PathBuf], target: Target) -> Result<Self> {
        let [first, _, ..] = folders else {
            let what = format!("expected at least two dense checkpoints, found {}", folders.len());
            return Err(Error::Choice(what));
        };
        let checkpoints = folders.iter().map(Checkpoint::open).collect::<std::result::Result<Vec<_>, _>>()?;
        let read = |checkpoint: &Checkpoint| {
            let refuse = |what| Error::Dense { path: checkpoint.dir().join("config.json"), what };
            DenseConfig::parse(checkpoint.config(), target).map_err(refuse)
        };
        let config = read(&checkpoints[0])?;
        for checkpoint in &checkpoints[1..] {
            if let Some(difference) = read(checkpoint)?.difference(&config) {
                let what = format!("{difference} in {}", first.display());
                return Err(Error::Dense { path: checkpoint.dir().join("config.json"), what });
            }
        }
        let dense = Dense { checkpoints, config };
        dense.check_tensors()?;
        dense.check_tokenizers()?;
        Ok(dense)
    }

    /// Number of layers.
    pub(super) fn layers(&self) -> usize {
        self.config.size("num_hidden_layers")
    }

    /// Name of a weight of layer `l`.
    pub(super) fn in_layer(l: usize, parameter: &str) -> String {
        format!("model.layers.{l}.{parameter}.weight")
    }

    /// The tensors outside all layers.
    pub(super) fn outside(&self) -> Vec<&'static str> {
        let mut names = vec!["model.embed_tokens.weight", "model.norm.weight"];
        if !self.config.is_tied() {
            names.push("lm_head.weight");
        }
        names
    }

    /// Tensor `name` of every checkpoint.
    pub(super) fn each(&self, name: &str) -> Result<Vec<Tensor>> {
        let tensors = self.checkpoints.iter().map(|checkpoint| checkpoint.tensor(name));
        Ok(tensors.collect::<std::result::Result<_, _>>()?)
    }

    /// Shape of the weight of a linear map of a layer.
    fn shape(&self, map: &str) -> [usize; 2] {
        let size = |key: &str| self.config.size(key);
        let (hidden, width) = (size("hidden_size"), size("intermediate_size"));
        let heads = |key: &str| size(key) * size("head_dim");
        match map {
            "q_proj" => [heads("num_attention_heads"), hidden],
            "k_proj" | "v_proj" => [heads("num_key_value_heads"), hidden],
            "o_proj" => [hidden, heads("num_attention_heads")],
            "down_proj" => [hidden, width],
            _ => [width, hidden],
        }
    }

    /// All tensors, by name and shape.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.config.size("hidden_size");
        let outside = self.outside().into_iter().map(|name| {
            let table = name != "model.norm.weight";
            let rows = table.then(|| self.config.size("vocab_size"));
            (name.to_owned(), rows.into_iter().chain([hidden]).collect())
        });
        let mut expected: Vec<_> = outside.collect();
        for l in 0..self.layers() {
            let norms = self.config.family.norms().iter();
            expected.extend(norms.map(|norm| (Dense::in_layer(l, norm), vec![hidden])));
            for (module, maps) in [("self_attn", &ATTENTION[..]), ("mlp", &MLP[..])] {
                let map =
                    |map: &&str| (Dense::in_layer(l, &format!("{module}.{map}")), self.shape(map).into());
                expected.extend(maps.iter().map(map));
            }
        }
        expected
    }

    /// Errors unless every checkpoint has the tensors that its config speaks of, of one type, and no others.
    fn check_tensors(&self) -> Result<()> {
        let expected = self.expected();
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        for checkpoint in &self.checkpoints {
            let refuse = |what| Error::Dense { path: checkpoint.dir().into(), what };
            for (name, shape) in &expected {
                let tensor = checkpoint.tensor(name)?;
                tensor.check_float()?;
                if tensor.shape() != shape {
                    let what = format!("{name} has shape {:?}, expected {shape:?}", tensor.shape());
                    return Err(refuse(what));
                }
                let first = self.checkpoints[0].tensor(name)?;
                if tensor.dtype() != first.dtype() {
                    let (found, other) = (tensor.dtype(), self.checkpoints[0].dir().display());
                    let what = format!("{name} is {found:?}, but {:?} in {other}", first.dtype());
                    return Err(refuse(what));
                }
            }
            let is_extra = |name: &str| {
                let head = self.config.is_tied() && name == "lm_head.weight";
                !known.contains(name) && !head && !name.ends_with(FREQUENCIES)
            };
            if let Some(extra) = checkpoint.tensors().find(|tensor| is_extra(tensor.name())) {
                let what = format!("holds {}, which the result would have no place for", extra.name());
                return Err(refuse(what));
            }
        }
        Ok(())
    }

    /// Errors unless all checkpoints that have a tokeniser have the same vocabulary: an embedding of the mean model stands
    /// for one token.
    fn check_tokenizers(&self) -> Result<()> {
        const FILE: &str = "tokenizer.json";
        let vocabulary = |checkpoint: &Checkpoint| {
            let text = read_file(&checkpoint.dir().join(FILE)).ok()?;
            let tokenizer: Value = serde_json::from_slice(&text).ok()?;
            Some((tokenizer["model"]["vocab"].clone(), tokenizer["added_tokens"].clone()))
        };
        let found: Vec<_> = self.checkpoints.iter().filter_map(|c| Some((c.dir(), vocabulary(c)?))).collect();
        let Some((first, known)) = found.first() else { return Ok(()) };
        match found.iter().find(|(_, vocabulary)| vocabulary != known) {
            None => Ok(()),
            Some((dir, _)) => {
                let what = format!("has another vocabulary than that of {}", first.display());
                Err(Error::Dense { path: dir.join(FILE), what })
            }
        }
    }
}
