//! LoRA adapters (arXiv 2106.09685) as the PEFT library stores them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::{Error, Result};
use crate::checkpoint::{Shard, Tensor, read_file};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What of `adapter_config.json` decides the matrices.
#[derive(Debug, Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
}

/// An adapter, opened.
#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) path: PathBuf,
    /// In the order of their modules' names.
    pub(super) updates: Vec<Update>,
}

/// ΔW = scale · B A of one module, or of all experts of a layer.
#[derive(Clone, Debug)]
pub(super) struct Update {
    /// Module as the base model names it.
    pub(super) module: String,
    /// `[rank, in]`; of all experts `[experts · rank, in]`.
    a: Tensor,
    /// `[out, rank]`; of all experts `[out, rank · experts]`.
    b: Tensor,
    /// Rank of one matrix.
    pub(super) rank: usize,
    scale: f64,
}

/// One ΔW in factors: `b [out, rank]`, with the scale in it, times `a [rank, in]`.
#[derive(Clone, Debug)]
pub(super) struct Delta {
    pub(super) b: Vec<f32>,
    pub(super) a: Vec<f32>,
    pub(super) rank: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl Adapter {
    /// Reads the folder `dir`.
    ///
    /// # Errors
    /// Names the file and what in it is missing, misshapen or of another kind than LoRA.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let invalid = |what: String| Error::Adapter { path: path.clone(), what };
        let text = read_file(&path).map_err(|e| {
            invalid(format!("{e}; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT saves it"))
        })?;
        let config: Config = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
        let refuse = |what: &str| Err(invalid(what.into()));
        if config.peft_type != "LORA" {
            return refuse(&format!("peft_type is {}, expected LORA", config.peft_type));
        }
        if config.use_dora {
            return refuse("use_dora is true; DoRA changes magnitudes too: merge it with PEFT");
        }
        if config.fan_in_fan_out {
            return refuse("fan_in_fan_out is true, expected weights [out, in]");
        }
        let path = dir.join(WEIGHTS_FILE);
        let shard = Arc::new(Shard::open(&path)?);
        let mut halves: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
        let mut others = Vec::new();
        for tensor in shard.tensors() {
            match half(tensor.name()) {
                Some((module, i)) => halves.entry(module).or_default()[i] = Some(tensor),
                None => others.push(tensor.name().to_string()),
            }
        }
        let invalid = |what: String| Error::Adapter { path: path.clone(), what };
        if !others.is_empty() {
            let list = some(&others);
            return Err(invalid(format!("holds tensors that are no LoRA matrices of linear maps: {list}")));
        }
        if halves.is_empty() {
            return Err(invalid("holds no LoRA matrices".into()));
        }
        let updates = halves.into_iter().map(|(module, halves)| {
            let [Some(a), Some(b)] = halves else {
                return Err(invalid(format!("{module}: one of lora_A and lora_B is missing")));
            };
            let update = Update::new(module, a, b, &config);
            update.map_err(|what| Error::Adapter { path: path.clone(), what })
        });
        Ok(Adapter { updates: updates.collect::<Result<_>>()?, path })
    }
}

/// Module and half (A, B) of a tensor's name.
fn half(name: &str) -> Option<(String, usize)> {
    let name = name.strip_prefix("base_model.model.")?.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    let of = |suffix: &str, i: usize| name.strip_suffix(suffix).map(|module| (module.to_string(), i));
    of(".lora_A", 0).or_else(|| of(".lora_B", 1))
}

/// The first few of a list.
pub(super) fn some(list: &[String]) -> String {
    const FEW: usize = 3;
    let few = list[..list.len().min(FEW)].join(", ");
    match list.len() - list.len().min(FEW) {
        0 => few,
        more => format!("{few} and {more} more"),
    }
}

impl Update {
    fn new(module: String, a: Tensor, b: Tensor, config: &Config) -> std::result::Result<Self, String> {
        // PEFT's patterns: a module whose name ends with the key, on a boundary.
        let matches = |key: &str| {
            module.strip_suffix(key).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let keys = config.rank_pattern.keys().chain(config.alpha_pattern.keys());
        if let Some(key) = keys.into_iter().find(|k| k.contains(['*', '[', '(', '^', '$', '\\', '|'])) {
            return Err(format!(
                "the pattern `{key}` of {CONFIG_FILE} is a regular expression, expected a name"
            ));
        }
        let rank = config.rank_pattern.iter().find(|(k, _)| matches(k)).map_or(config.r, |(_, r)| *r);
        let alpha =
            config.alpha_pattern.iter().find(|(k, _)| matches(k)).map_or(config.lora_alpha, |(_, a)| *a);
        let divisor = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        let fits = matches!((a.shape(), b.shape()), ([rows, _], [_, cols]) if rows == cols && *rows > 0)
            && rank > 0
            && a.shape()[0].is_multiple_of(rank);
        if !fits {
            return Err(format!(
                "{module}: lora_A is {:?} and lora_B {:?}, expected [{rank}, in] and [out, {rank}]",
                a.shape(),
                b.shape()
            ));
        }
        for tensor in [&a, &b] {
            tensor.check_float().and_then(|()| tensor.check_finite()).map_err(|e| e.to_string())?;
        }
        Ok(Update { module, a, b, rank, scale: alpha / divisor })
    }

    /// Everything besides the tensors that the result depends on.
    pub(super) fn describe(&self) -> String {
        format!("{} {} {}", self.module, self.rank, self.scale)
    }

    /// Number of matrices that it updates.
    pub(super) fn experts(&self) -> usize {
        self.a.shape()[0] / self.rank
    }

    /// ΔW of expert `e`, or of the module with `e` = 0. A's rows are expert-major, B's columns rank-major, as PEFT's
    /// `ParamWrapper` has them.
    pub(super) fn delta(&self, e: usize) -> Result<Delta> {
        let (rank, experts) = (self.rank, self.experts());
        let (inputs, outputs) = (self.a.shape()[1], self.b.shape()[0]);
        let a = self.a.to_f32()?[e * rank * inputs..(e + 1) * rank * inputs].to_vec();
        let b = self.b.to_f32()?;
        let columns = |row: &[f32]| {
            (0..rank).map(|k| (f64::from(row[k * experts + e]) * self.scale) as f32).collect::<Vec<_>>()
        };
        let b = b.chunks_exact(rank * experts).flat_map(columns).collect();
        Ok(Delta { b, a, rank, outputs, inputs })
    }
}

impl Delta {
    /// ΔWᵀ.
    pub(super) fn transposed(self) -> Self {
        let Delta { b, a, rank, outputs, inputs } = self;
        let turn = |m: &[f32], cols: usize| crate::backend::cpu::transpose(m, cols);
        Delta { b: turn(&a, inputs), a: turn(&b, rank), rank, outputs: inputs, inputs: outputs }
    }

    /// Some rows of ΔW.
    pub(super) fn rows(&self, rows: impl Iterator<Item = usize>) -> Self {
        let rank = self.rank;
        let b: Vec<f32> = rows.flat_map(|r| &self.b[r * rank..(r + 1) * rank]).copied().collect();
        Delta { outputs: b.len() / rank, b, ..self.clone() }
    }
}
