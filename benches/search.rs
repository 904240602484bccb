//! Speed of searching: candidates of one layer that are evaluated on 16384 tokens, and a whole search by greedy
//! descent and swaps. The hidden size is small, since it does not matter once every expert has run on every token.

#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is a failed bench")]

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::Checkpoint;
use moepress::model::{Model, profile};
use moepress::plan::{LossRule, LossSource, Pass, Subsets, greedy_and_swap};
use moepress::search::Search;
use moepress::tokens::read_token_file;

#[allow(dead_code, unreachable_pub, reason = "shared with the tests, which use all of it")]
#[path = "../tests/common/generate.rs"]
mod generate;

/// Experts, experts per token and dropped experts: Mixtral, and the size of Qwen1.5-MoE (with Mixtral's router).
const LAYERS: [(usize, usize, usize); 2] = [(8, 2, 4), (60, 4, 15)];
const WINDOWS: usize = 64;
const LENGTH: usize = 256;

fn write_model(dir: &Path, experts: usize, top_k: usize) {
    generate::mixtral(dir, &generate::Sizes { layers: 1, hidden: 64, width: 32, experts });
    let path = dir.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["num_experts_per_tok"] = top_k.into();
    std::fs::write(path, config.to_string()).unwrap();
}

fn search(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    generate::tokens(&file, WINDOWS, LENGTH, 512);
    let windows = read_token_file(&file).unwrap();
    let mut group = c.benchmark_group("search");
    group.sample_size(10);
    for (experts, top_k, count) in LAYERS {
        let dir = folder.path().join(experts.to_string());
        write_model(&dir, experts, top_k);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let model = Model::new(&checkpoint, &Cpu, LENGTH).unwrap();
        let sizes = profile(&checkpoint, model.architecture()).unwrap();
        let mut silent = ();
        let source = Search::new(&model, &windows, &folder.path().join("out"), "", &mut silent).unwrap();
        source.begin(&Pass { task: "", batch: 8, progressive: false, exact: false }).unwrap();
        source.enter(0).unwrap();
        // Runs every expert; what is measured is what follows.
        source.losses(&[vec![0]]).unwrap();
        let subsets = Subsets::new(&sizes.moe_layers[0], count);
        let candidates: Vec<Vec<usize>> = subsets.all().take(600).collect();
        group.throughput(Throughput::Elements((candidates.len() * windows.ids.len()) as u64));
        let name = format!("{count} of {experts}, top {top_k}");
        group.bench_function(BenchmarkId::new("candidates", &name), |b| {
            b.iter(|| source.losses(black_box(&candidates)).unwrap());
        });
        group.throughput(Throughput::Elements(windows.ids.len() as u64));
        group.bench_function(BenchmarkId::new("greedy and swap", &name), |b| {
            b.iter(|| greedy_and_swap(&subsets, &source, LossRule::BatchSum, 100).unwrap());
        });
        drop(source);
    }
    group.finish();
}

criterion_group!(benches, search);
criterion_main!(benches);
