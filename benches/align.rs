//! Time to align the hidden neurons of one expert with those of another: the work that `compress` does for every expert
//! that is merged.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moepress::architecture::Activation;
use moepress::backend::{Linear, Mlp};
use moepress::checkpoint::{Dtype, Tensor, Weight};
use moepress::compress::{Matching, align};
use moepress::linalg::{Matrix, assignment};
use moepress::model::LinearSource;

/// Width and hidden size of the experts of Qwen3-30B-A3B and of Qwen1.5-MoE and DeepSeek-V2-Lite.
const SHAPES: [(usize, usize); 2] = [(768, 2048), (1408, 2048)];

/// Values without structure, from -1 to 1.
fn noise(count: usize, seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
    .take(count)
}

fn expert(width: usize, hidden: usize, seed: u64) -> Mlp<LinearSource> {
    let map = |rows: usize, cols: usize, seed: u64| {
        let values: Vec<f32> = noise(rows * cols, seed).map(|v| v as f32).collect();
        let tensor = Tensor::from_f32("noise", Dtype::BF16, vec![rows, cols], &values);
        Linear { weight: Weight::plain(tensor).expect("plain numbers"), bias: None }
    };
    Mlp {
        gate: map(width, hidden, seed),
        up: Some(map(width, hidden, seed + 1)),
        down: map(hidden, width, seed + 2),
        activation: Activation::SwiGlu,
    }
}

fn alignment(c: &mut Criterion) {
    let mut group = c.benchmark_group("align");
    group.sample_size(10);
    for (width, hidden) in SHAPES {
        let (a, b) = (expert(width, hidden, 1), expert(width, hidden, 10));
        group.bench_function(BenchmarkId::new("experts", format!("{width}x{hidden}")), |bench| {
            bench.iter(|| align(black_box(&a), black_box(&b), Matching::Weights).expect("finite"));
        });
        let costs = Matrix::new(width, width, noise(width * width, 3).collect()).expect("square");
        group.bench_function(BenchmarkId::new("assignment", width), |bench| {
            bench.iter(|| assignment(black_box(costs.clone())).expect("finite"));
        });
    }
    group.finish();
}

criterion_group!(benches, alignment);
criterion_main!(benches);
