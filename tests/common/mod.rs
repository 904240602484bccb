//! Shared by the tests: where data lies, how outputs are compared.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "every test file uses another part of this"
)]

pub mod command;
pub mod generate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moepress::backend::Backend;
use moepress::backend::cpu::{Cpu, Isa};
use moepress::checkpoint::{Checkpoint, Dtype, Entry, Shard, Tensor, write_safetensors};
use moepress::model::{HeadScratch, Model, Stream};
use moepress::tokens::{SourceFile, Windows};

pub mod compress;
pub mod reference;

/// A small checkpoint kept in the repository.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A folder of the larger test data beside the repository; `None`, with a line on standard error, where it is missing.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: ../shared/{name} is not here");
    None
}

/// The tensor `name` of a safetensors file as f64.
pub fn read(path: &Path, name: &str) -> Vec<f64> {
    let tensor = Arc::new(Shard::open(path).unwrap()).tensor(name).unwrap();
    let bytes = tensor.bytes();
    match tensor.dtype() {
        Dtype::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect(),
        _ => tensor.to_f32().unwrap().into_iter().map(f64::from).collect(),
    }
}

/// Shape of a tensor in a safetensors file, if it is there.
pub fn shape(path: &Path, name: &str) -> Option<Vec<usize>> {
    Some(Arc::new(Shard::open(path).unwrap()).tensor(name).ok()?.shape().to_vec())
}

/// Windows from token ids `[count, length]`.
pub fn windows(ids: &[f64], count: usize) -> Windows {
    Windows {
        ids: ids.iter().map(|&id| id as u32).collect(),
        mask: None,
        count,
        length: ids.len() / count,
        files: vec![SourceFile { name: "test".into(), windows: count }],
        decoder: None,
    }
}

/// The inputs of a golden file: ids, and where there is padding a mask.
pub fn golden_windows(golden: &Path) -> Windows {
    let count = shape(golden, "input_ids").unwrap()[0];
    let padded = shape(golden, "attention_mask").is_some();
    let mask = padded.then(|| read(golden, "attention_mask").into_iter().map(|real| real != 0.0).collect());
    Windows { mask, ..windows(&read(golden, "input_ids"), count) }
}

/// The inputs of a golden file of a model with an encoder.
pub fn encoder_windows(golden: &Path) -> Windows {
    let encoder = golden_windows(golden);
    let decoder = windows(&read(golden, "decoder_input_ids"), encoder.count);
    Windows { decoder: Some(Box::new(decoder)), ..encoder }
}

/// Embeddings, the residual stream after every layer, and the logits.
pub struct Trace {
    pub hidden: Vec<Vec<f32>>,
    pub logits: Vec<f32>,
}

/// Runs a checkpoint on the CPU, with the instructions that MOEPRESS_CPU_ISA names, if it is set.
pub fn run(dir: &Path, windows: &Windows) -> Trace {
    if let Ok(name) = std::env::var("MOEPRESS_CPU_ISA") {
        name.parse::<Isa>().unwrap().select().unwrap();
    }
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let mut stream = Stream::new(&model, windows).unwrap();
    let collect = |stream: &Stream<'_, Cpu>| -> Vec<f32> {
        stream.chunks.iter().flat_map(|c| Cpu.download(&c.x).unwrap()).collect()
    };
    let mut hidden = vec![collect(&stream)];
    for l in 0..model.architecture().layers.len() {
        let layer = model.layer(l).unwrap();
        stream.advance(&layer, |_, _| Ok(())).unwrap();
        hidden.push(collect(&stream));
    }
    let head = model.head().unwrap();
    let mut work = HeadScratch::new(&Cpu);
    let logits =
        stream.chunks.iter().flat_map(|c| head.logits(&Cpu, &c.x, 0, c.batch.tokens(), &mut work).unwrap());
    let logits = logits.collect();
    Trace { hidden, logits }
}

/// max |a − b|; lengths must agree.
pub fn max_difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (f64::from(*x) - y).abs()).fold(0.0, f64::max)
}

/// A copy of a checkpoint in a folder of its own, to be broken in one place. Disappears with the value.
pub struct Mutant {
    folder: tempfile::TempDir,
}

impl Mutant {
    /// A copy of the repository's checkpoint `name`, without its golden outputs.
    pub fn of(name: &str) -> Self {
        Mutant::copy(&data(name))
    }

    /// A copy of the checkpoint in `dir`, without golden outputs.
    pub fn copy(dir: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir).unwrap() {
            let file = entry.unwrap();
            if file.file_name() != "golden.safetensors" {
                std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
            }
        }
        Mutant { folder }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Rewrites the text of a file.
    pub fn edit_text(&self, name: &str, edit: impl FnOnce(String) -> String) {
        let path = self.file(name);
        std::fs::write(&path, edit(std::fs::read_to_string(&path).unwrap())).unwrap();
    }

    /// Sets a key of `config.json`.
    pub fn set_config(&self, key: &str, value: serde_json::Value) {
        self.edit_text("config.json", |text| {
            let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
            config[key] = value;
            config.to_string()
        });
    }

    /// Cuts a file to `keep` of its bytes.
    pub fn truncate(&self, name: &str, keep: impl FnOnce(u64) -> u64) {
        let file = std::fs::OpenOptions::new().write(true).open(self.file(name)).unwrap();
        file.set_len(keep(file.metadata().unwrap().len())).unwrap();
    }

    /// Rewrites the tensors of a single-file checkpoint; `edit` may change, add and remove them.
    pub fn edit_tensors(&self, edit: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let path = self.file("model.safetensors");
        let shard = Arc::new(Shard::open(&path).unwrap());
        let mut tensors: BTreeMap<_, _> = shard.tensors().map(|t| (t.name().to_string(), t)).collect();
        edit(&mut tensors);
        let named: Vec<Tensor> =
            tensors.into_iter().map(|(name, tensor)| tensor.renamed(name.as_str())).collect();
        write_safetensors(&path, &BTreeMap::new(), named.iter().map(Entry::tensor).collect()).unwrap();
    }

    /// Rewrites the values of one tensor.
    pub fn edit_values(&self, name: &str, edit: impl FnOnce(&mut [f32])) {
        self.edit_tensors(|tensors| {
            let tensor = &tensors[name];
            let mut values = tensor.to_f32().unwrap();
            edit(&mut values);
            let edited = Tensor::from_f32(name, tensor.dtype(), tensor.shape().to_vec(), &values);
            tensors.insert(name.into(), edited);
        });
    }
}
