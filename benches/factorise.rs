//! Time to factorise one expert weight: the work that `compress` does for every matrix it makes low rank.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moepress::linalg::{Matrix, spectrum, truncated_svd, whitened_svd};

/// The gate or up projection of a small model and of Qwen3-30B-A3B, and the down projection of the former.
const SHAPES: [(usize, usize); 3] = [(512, 256), (256, 512), (768, 2048)];

/// Values without structure, from -1 to 1.
fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    Matrix::new(rows, cols, (0..rows * cols).map(|_| next()).collect()).expect("as many values as entries")
}

fn factorise(c: &mut Criterion) {
    let mut group = c.benchmark_group("factorise");
    group.sample_size(10);
    for (out, input) in SHAPES {
        let shape = format!("{out}x{input}");
        let w = noise(out, input, 1);
        let x = noise(2 * input, input, 2);
        let gram = x.transpose().matmul(&x).expect("shapes fit");
        let short = out.min(input);
        group.bench_function(BenchmarkId::new("spectrum", &shape), |b| {
            b.iter(|| spectrum(black_box(&w), None).expect("finite"));
        });
        for percent in [25, 50] {
            let rank = short * percent / 100;
            let id = format!("{shape}/{percent}%");
            group.bench_function(BenchmarkId::new("truncated", &id), |b| {
                b.iter(|| truncated_svd(black_box(&w), rank).expect("finite"));
            });
            group.bench_function(BenchmarkId::new("whitened", &id), |b| {
                b.iter(|| whitened_svd(black_box(&w), black_box(&gram), rank).expect("finite"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, factorise);
criterion_main!(benches);
