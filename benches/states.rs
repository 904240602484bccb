//! Speed of what takes the place of attention, in the shapes of Qwen3-Next (16 key heads and 32 value heads of 128), LFM2
//! (2048 channels, kernel of 3), Nemotron 3 Nano (Mamba-2 with 64 heads of 128×64 in 8 groups) and Jamba Mini (Mamba with
//! 8192 channels of 16): one token and a window of 512.
//!
//! Per token and value head the gated delta rule has 7 floating-point operations for each of the 128 · 128 numbers of
//! the state (one product, three multiply-adds), 3.67 MFLOP per token in all: the floor for 512 tokens is that over the
//! speed of the vector units. A single token reads and writes the state, 2 MiB each: there the floor is 4 MiB over the
//! bandwidth of the cache that holds it. Mamba-2 has 5 operations for each of 64 · 128 · 64 numbers, 2.62 MFLOP per token,
//! and a state of 2 MiB as well. Mamba has an exponential for each of 8192 · 16 numbers per token.
//!
//! Measured on two cores of a shared AMD EPYC with AVX-512, otherwise idle: the rule on 512 tokens 10.6 ms (178 GFLOP/s), on
//! a single one 93 µs (45 GB/s); the convolution 0.13 ms and 0.64 µs.

#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is a failed bench")]

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moepress::architecture::{DeltaProjections, GatedDelta, Mamba2};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Backend, Batch, ChannelTerms, DeltaGates, ScanTerms};
use moepress::checkpoint::{Dtype, Tensor};

#[allow(dead_code, reason = "shared with the benches of layers")]
mod layers;

type Buffer = <Cpu as Backend>::Buffer;

fn buffer(rows: usize, cols: usize, seed: u64) -> Buffer {
    let mut buffer = Cpu.buffer();
    Cpu.upload(&layers::noise(rows * cols, seed, 1.0), rows, cols, &mut buffer).unwrap();
    buffer
}

fn of_values(values: &[f32]) -> <Cpu as Backend>::Vector {
    Cpu.vector(&Tensor::from_f32("v", Dtype::F32, vec![values.len()], values)).unwrap()
}

fn vector(length: usize, seed: u64) -> <Cpu as Backend>::Vector {
    of_values(&layers::noise(length, seed, 1.0))
}

/// exp(A_log).
fn rates(length: usize, seed: u64) -> <Cpu as Backend>::Vector {
    let rates: Vec<f32> = layers::noise(length, seed, 1.0).into_iter().map(f32::exp).collect();
    of_values(&rates)
}

fn delta_rule(c: &mut Criterion) {
    let shape = GatedDelta {
        key_heads: 16,
        value_heads: 32,
        key_dim: 128,
        value_dim: 128,
        kernel: 4,
        kimi: false,
        projections: DeltaProjections::ByKeyHead,
    };
    let (log_rates, dt_bias) = (vector(shape.value_heads, 1), vector(shape.value_heads, 2));
    let mut group = c.benchmark_group("gated delta rule");
    for tokens in [1, 512] {
        let inputs = [shape.qkv_dim(), shape.value_heads, shape.value_heads];
        let inputs = [0, 1, 2].map(|i| buffer(tokens, inputs[i], i as u64 + 3));
        let (mut state, mut out) = (Cpu.buffer(), Cpu.buffer());
        // The state of a text of one token, so that those of the measurement are its next ones.
        let batch = |start: usize| Batch::piece(start, tokens, start + tokens);
        group.throughput(Throughput::Elements(tokens as u64));
        let mut run = |[qkv, b, a]: &mut [Buffer; 3], start: usize| {
            let gates = DeltaGates { b, a, log_rates: &log_rates, dt_bias: &dt_bias };
            Cpu.gated_delta_rule(qkv, gates, shape, Some(&mut state), &batch(start), &mut out).unwrap();
            black_box(out.data());
        };
        run(&mut inputs.clone(), 0);
        group.bench_function(BenchmarkId::new("tokens", tokens), |b| {
            b.iter_batched_ref(|| inputs.clone(), |inputs| run(inputs, tokens), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn mamba2(c: &mut Criterion) {
    let shape = Mamba2 {
        heads: 64,
        head_dim: 64,
        state_dim: 128,
        groups: 8,
        kernel: 4,
        convolution_bias: true,
        projection_bias: false,
        step_limits: [0.0, f32::INFINITY],
    };
    let [dt_bias, skip] = [1, 2].map(|seed| vector(shape.heads, seed));
    let rates = rates(shape.heads, 3);
    let mut group = c.benchmark_group("Mamba-2");
    for tokens in [1, 512] {
        let (x, steps) = (buffer(tokens, shape.channels(), 4), buffer(tokens, shape.heads, 5));
        let (mut state, mut out) = (Cpu.buffer(), Cpu.buffer());
        group.throughput(Throughput::Elements(tokens as u64));
        let mut run = |steps: &mut Buffer, start: usize| {
            let terms = ScanTerms { steps, dt_bias: &dt_bias, rates: &rates, skip: &skip };
            let batch = Batch::piece(start, tokens, start + tokens);
            Cpu.mamba2_scan(&x, terms, shape, Some(&mut state), &batch, &mut out).unwrap();
            black_box(out.data());
        };
        run(&mut steps.clone(), 0);
        group.bench_function(BenchmarkId::new("tokens", tokens), |b| {
            b.iter_batched_ref(|| steps.clone(), |steps| run(steps, tokens), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn mamba(c: &mut Criterion) {
    const CHANNELS: usize = 8192;
    const STATE: usize = 16;
    let skip = vector(CHANNELS, 1);
    let rates = rates(STATE * CHANNELS, 2);
    let mut group = c.benchmark_group("Mamba");
    for tokens in [1, 512] {
        let [x, steps] = [3, 4].map(|seed| buffer(tokens, CHANNELS, seed));
        let [b, at] = [5, 6].map(|seed| buffer(tokens, STATE, seed));
        let (mut state, mut out) = (Cpu.buffer(), Cpu.buffer());
        group.throughput(Throughput::Elements(tokens as u64));
        let mut run = |steps: &mut Buffer, start: usize| {
            let terms = ChannelTerms { steps, b: &b, c: &at, rates: &rates, skip: &skip };
            let batch = Batch::piece(start, tokens, start + tokens);
            Cpu.mamba_scan(&x, terms, Some(&mut state), &batch, &mut out).unwrap();
            black_box(out.data());
        };
        run(&mut steps.clone(), 0);
        group.bench_function(BenchmarkId::new("tokens", tokens), |bench| {
            bench.iter_batched_ref(|| steps.clone(), |steps| run(steps, tokens), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn convolution(c: &mut Criterion) {
    const CHANNELS: usize = 2048;
    let kernel = vector(3 * CHANNELS, 1);
    let mut group = c.benchmark_group("causal convolution");
    for tokens in [1, 512] {
        let (x, mut tail, mut out) = (buffer(tokens, CHANNELS, 2), Cpu.buffer(), Cpu.buffer());
        let mut run = |start: usize| {
            let batch = Batch::piece(start, tokens, start + tokens);
            Cpu.causal_convolution(&x, &kernel, None, false, Some(&mut tail), &batch, &mut out).unwrap();
            black_box(out.data());
        };
        run(0);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::new("tokens", tokens), |b| b.iter(|| run(tokens)));
    }
    group.finish();
}

criterion_group!(benches, delta_rule, mamba, mamba2, convolution);
criterion_main!(benches);
