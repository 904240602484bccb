//! The statistics file: per MoE layer the moments, and where they came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::{Error, Result};
use crate::architecture::Profile;
use crate::backend::{Moment, MomentDims, Moments};
use crate::checkpoint::{
    Dtype, Entry, SafetensorsWriter, Shard, Tensor, safetensors_bytes, write_safetensors,
};

/// Which tokens the statistics were measured on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// SHA-256 of the token ids, see [`crate::tokens::Windows::sha256`]; after adding up, those of the parts joined
    /// by `+`.
    pub sha256: String,
    /// Tokens seen, padding left out.
    pub tokens: u64,
    /// Windows.
    pub windows: u64,
    /// Tokens per window.
    pub window_length: u64,
    /// Names of the input files, in the order of [`Moment::Coverage`]'s rows.
    pub files: Vec<String>,
    /// The sampling rule of [`Moment::SampleOutputSum`].
    pub sample: String,
}

/// A statistics file, opened. First moments are read when asked for, second moments one layer at a time.
#[derive(Debug)]
pub struct Statistics {
    path: PathBuf,
    profile: Profile,
    tokens: TokenInfo,
    shards: BTreeMap<usize, Arc<Shard>>,
}

/// How evenly the experts of a layer are used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerUsage {
    /// 0-based layer.
    pub layer: usize,
    /// Routed experts.
    pub experts: usize,
    /// Share of all choices that fell on the most frequent expert.
    pub busiest: f64,
    /// Share of the least frequent one.
    pub least: f64,
    /// Experts that no token chose.
    pub never_chosen: usize,
}

impl LayerUsage {
    pub(super) fn new(layer: usize, count: &[f64]) -> Self {
        let total = count.iter().sum::<f64>().max(1.0);
        LayerUsage {
            layer,
            experts: count.len(),
            busiest: count.iter().copied().fold(0.0, f64::max) / total,
            least: count.iter().copied().fold(total, f64::min) / total,
            never_chosen: count.iter().filter(|c| **c == 0.0).count(),
        }
    }
}

const VERSION: &str = "1";

impl Statistics {
    /// Opens a statistics file.
    ///
    /// # Errors
    /// Names the file and what is missing or of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let shard = Arc::new(Shard::open(path)?);
        let invalid = |what: String| Error::File { path: path.into(), what };
        let text = |key: &str| {
            let what = || format!("has no metadata `{key}`; it is no statistics file of moepress calibrate");
            shard.metadata(key).ok_or_else(|| invalid(what()))
        };
        let version = text("format_version")?;
        if version != VERSION {
            return Err(invalid(format!(
                "has format version {version}, this moepress reads version {VERSION}"
            )));
        }
        let number = |key: &str| -> Result<u64> {
            let value = text(key)?;
            value.parse().map_err(|_| invalid(format!("metadata `{key}` is `{value}`, expected a number")))
        };
        let json = |key: &str, e: serde_json::Error| invalid(format!("metadata `{key}`: {e}"));
        let profile: Profile = serde_json::from_str(text("model")?).map_err(|e| json("model", e))?;
        let tokens = TokenInfo {
            sha256: text("tokens_sha256")?.into(),
            tokens: number("tokens")?,
            windows: number("windows")?,
            window_length: number("window_length")?,
            files: serde_json::from_str(text("files")?).map_err(|e| json("files", e))?,
            sample: text("sample")?.into(),
        };
        let shards = profile.moe_layers.iter().map(|l| (l.layer, shard.clone())).collect();
        Ok(Statistics { path: path.into(), profile, tokens, shards })
    }

    /// Statistics whose layers lie in a file each, as a pass leaves them.
    pub(super) fn from_layers(
        profile: Profile,
        tokens: TokenInfo,
        layers: &[(usize, PathBuf)],
    ) -> Result<Self> {
        let shards = layers
            .iter()
            .map(|(l, path)| Ok((*l, Arc::new(Shard::open(path)?))))
            .collect::<Result<BTreeMap<_, _>>>()?;
        Ok(Statistics { path: PathBuf::new(), profile, tokens, shards })
    }

    /// Statistics that are in no file; messages call them `name`.
    pub(super) fn in_memory(
        name: &Path,
        profile: Profile,
        tokens: TokenInfo,
        layers: &[(usize, Moments)],
    ) -> Result<Self> {
        let bytes = |l: usize, moments| safetensors_bytes(&BTreeMap::new(), entries(l, moments));
        let shards = layers
            .iter()
            .map(|(l, moments)| Ok((*l, Arc::new(Shard::from_bytes(name, bytes(*l, moments))?))))
            .collect::<Result<BTreeMap<_, _>>>()?;
        Ok(Statistics { path: name.into(), profile, tokens, shards })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sizes of the model that was measured.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The tokens that were measured.
    pub fn tokens(&self) -> &TokenInfo {
        &self.tokens
    }

    /// Whether second moment `moment` was measured.
    pub fn has(&self, moment: Moment) -> bool {
        self.shards.iter().all(|(l, shard)| shard.tensor(&tensor_name(*l, moment)).is_ok())
    }

    /// First moments of every MoE layer, in order.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen or not finite.
    pub fn first_moments(&self) -> Result<Vec<Moments>> {
        let first = |m: &Moment| !Moment::SECOND.contains(m);
        let wanted: Vec<Moment> = Moment::ALL.into_iter().filter(first).collect();
        self.profile.moe_layers.iter().map(|l| self.moments(l.layer, &wanted)).collect()
    }

    /// The listed moments of layer `layer`; second moments that were not measured are left out.
    ///
    /// # Errors
    /// Names the tensor that is missing, misshapen or not finite.
    pub fn moments(&self, layer: usize, wanted: &[Moment]) -> Result<Moments> {
        let invalid = |what: String| Error::File { path: self.path.clone(), what };
        let dims = self.dims(layer).ok_or_else(|| invalid(format!("layer {layer} is no MoE layer")))?;
        let mut arrays = BTreeMap::new();
        for &moment in wanted {
            let Some(tensor) = self.tensor(layer, moment, dims)? else { continue };
            let name = tensor.name();
            let values: Vec<f64> =
                tensor.bytes().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
            tensor.release();
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(invalid(format!(
                    "{name} holds {} at flat index {i}; statistics must be finite",
                    values[i]
                )));
            }
            arrays.insert(moment, values);
        }
        Moments::from_arrays(dims, arrays).ok_or_else(|| invalid(format!("layer {layer}: shapes disagree")))
    }

    /// A moment of a layer as it is stored, of the type and shape that it has to have; `None` where it is a second moment
    /// that was not measured.
    fn tensor(&self, layer: usize, moment: Moment, dims: MomentDims) -> Result<Option<Tensor>> {
        let invalid = |what: String| Error::File { path: self.path.clone(), what };
        let name = tensor_name(layer, moment);
        let tensor = match self.shards[&layer].tensor(&name) {
            Ok(tensor) => tensor,
            Err(_) if Moment::SECOND.contains(&moment) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        tensor.check_shape(&moment.shape(dims)).map_err(|e| invalid(e.to_string()))?;
        if tensor.dtype() != Dtype::F64 {
            return Err(invalid(format!("{name} has dtype {:?}, expected F64", tensor.dtype())));
        }
        Ok(Some(tensor))
    }

    /// How evenly the experts of every MoE layer are used.
    ///
    /// # Errors
    /// Those of [`Statistics::moments`].
    pub fn usage(&self) -> Result<Vec<LayerUsage>> {
        let usage = |layer: usize| {
            let moments = self.moments(layer, &[Moment::Count])?;
            Ok(LayerUsage::new(layer, moments.per_expert(Moment::Count)))
        };
        self.profile.moe_layers.iter().map(|l| usage(l.layer)).collect()
    }

    fn dims(&self, layer: usize) -> Option<MomentDims> {
        let moe = self.profile.moe_layers.iter().find(|l| l.layer == layer)?;
        let (experts, hidden_size, width) = (moe.experts, self.profile.expert_io(moe), moe.width);
        Some(MomentDims { experts, hidden_size, width, files: self.tokens.files.len() })
    }

    /// Writes everything to one file, atomically.
    ///
    /// # Errors
    /// Names the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let layers = self.shards.iter();
        let tensors: Vec<Tensor> = layers
            .flat_map(|(l, shard)| {
                let names = Moment::ALL.into_iter().map(|m| tensor_name(*l, m));
                names.filter_map(|name| shard.tensor(&name).ok())
            })
            .collect();
        Ok(write_safetensors(path, &self.metadata()?, tensors.iter().map(Entry::tensor).collect())?)
    }

    fn metadata(&self) -> Result<BTreeMap<String, String>> {
        let json = |e: serde_json::Error| Error::Mismatch(e.to_string());
        let TokenInfo { sha256, tokens, windows, window_length, files, sample } = &self.tokens;
        let pairs = [
            ("format_version", VERSION.to_string()),
            ("model_identity", self.profile.identity.clone()),
            ("model", serde_json::to_string(&self.profile).map_err(json)?),
            ("tokens_sha256", sha256.clone()),
            ("tokens", tokens.to_string()),
            ("windows", windows.to_string()),
            ("window_length", window_length.to_string()),
            ("files", serde_json::to_string(files).map_err(json)?),
            ("sample", sample.clone()),
        ];
        Ok(pairs.into_iter().map(|(k, v)| (k.to_string(), v)).collect())
    }

    /// Adds up statistics of disjoint token sets and writes the sum to `path`: what one pass over all of them would
    /// have measured, up to the rounding of f64 sums. Rows of [`Moment::Coverage`] are joined by file name.
    ///
    /// # Errors
    /// Says which two differ, and in what: the model, the window length, the sampling rule, the moments measured, or
    /// that they were measured on the same tokens.
    pub fn merge(parts: &[Statistics], path: &Path) -> Result<()> {
        let [first, rest @ ..] = parts else { return Err(Error::Mismatch("there are none".into())) };
        let mut files = first.tokens.files.clone();
        let mut info = first.tokens.clone();
        for part in rest {
            let differ = |what: &str| {
                let (a, b) = (first.path.display(), part.path.display());
                Error::Mismatch(format!("{a} and {b} {what}"))
            };
            if part.profile != first.profile {
                return Err(differ("come from different models"));
            }
            let [ours, theirs] = [first, part].map(|s| s.tokens.window_length);
            if theirs != ours {
                return Err(differ(&format!("have windows of different length, {ours} and {theirs} tokens")));
            }
            if part.tokens.sample != first.tokens.sample {
                return Err(differ("sample tokens differently"));
            }
            if info.sha256.split('+').any(|sha| part.tokens.sha256.split('+').any(|other| other == sha)) {
                return Err(differ("were measured on the same tokens"));
            }
            if Moment::SECOND.iter().any(|m| part.has(*m) != first.has(*m)) {
                return Err(differ("hold different second moments"));
            }
            for file in &part.tokens.files {
                if !files.contains(file) {
                    files.push(file.clone());
                }
            }
            info.sha256 = format!("{}+{}", info.sha256, part.tokens.sha256);
            info.tokens += part.tokens.tokens;
            info.windows += part.tokens.windows;
        }
        info.files = files;
        let second: Vec<Moment> = Moment::SECOND.into_iter().filter(|m| first.has(*m)).collect();
        // Sizes come from the metadata; nothing is allocated before all tensors have them.
        for part in parts {
            for moe in &part.profile.moe_layers {
                let dims = part.dims(moe.layer).unwrap_or_else(|| unreachable!());
                Moments::with(&second).try_for_each(|m| part.tensor(moe.layer, m, dims).map(drop))?;
            }
        }
        let dims = |layer: usize| {
            let dims = first.dims(layer).unwrap_or_else(|| unreachable!());
            MomentDims { files: info.files.len(), ..dims }
        };
        let layers = || first.profile.moe_layers.iter().map(|moe| moe.layer);
        let tensors = |l: usize| {
            let dims = dims(l);
            Moments::with(&second).map(move |m| (tensor_name(l, m), Dtype::F64, m.shape(dims)))
        };
        let metadata = Statistics {
            path: path.into(),
            profile: first.profile.clone(),
            tokens: info.clone(),
            shards: BTreeMap::new(),
        };
        // One layer in memory at a time: second moments of all of them can be larger than the model.
        let tensors = layers().flat_map(tensors).collect();
        let mut file = SafetensorsWriter::create(path, &metadata.metadata()?, tensors)?;
        for l in layers() {
            let mut sum = Moments::zeros(dims(l), &second);
            for part in parts {
                add(&mut sum, &info.files, &part.moments(l, &Moment::ALL)?, &part.tokens.files);
            }
            for (moment, values) in sum.iter() {
                file.write(&tensor_name(l, moment), 0, bytemuck::cast_slice(values))?;
            }
        }
        Ok(file.commit()?)
    }
}

fn add(sum: &mut Moments, sum_files: &[String], part: &Moments, part_files: &[String]) {
    let experts = part.dims().experts;
    for (moment, values) in part.iter() {
        let Some(target) = sum.get_mut(moment) else { continue };
        if moment == Moment::Coverage {
            for (row, file) in values.chunks_exact(experts).zip(part_files) {
                let to = sum_files.iter().position(|f| f == file).unwrap_or(0) * experts;
                target[to..to + experts].iter_mut().zip(row).for_each(|(t, v)| *t += v);
            }
        } else if moment.is_maximum() {
            target.iter_mut().zip(values).for_each(|(t, v)| *t = t.max(*v));
        } else {
            target.iter_mut().zip(values).for_each(|(t, v)| *t += v);
        }
    }
}

/// Name of a moment's tensor.
fn tensor_name(layer: usize, moment: Moment) -> String {
    format!("layers.{layer}.{}", moment.name())
}

/// The tensors of one layer, to be written.
pub(super) fn entries(layer: usize, moments: &Moments) -> Vec<Entry<'_>> {
    let dims = moments.dims();
    moments.iter().map(|(m, values)| Entry::f64(tensor_name(layer, m), m.shape(dims), values)).collect()
}
