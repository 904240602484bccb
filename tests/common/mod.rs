//! Shared by the tests: where data lies, how outputs are compared.

#![allow(dead_code, unreachable_pub, reason = "every test file uses another part of this")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moepress::backend::Backend;
use moepress::backend::cpu::{Cpu, Isa};
use moepress::checkpoint::{Checkpoint, Dtype, Shard};
use moepress::model::{HeadScratch, Model, Stream};
use moepress::tokens::{SourceFile, Windows};

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
    }
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
    let model = Model::new(&checkpoint, &Cpu, windows.length).unwrap();
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
