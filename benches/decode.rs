//! Speed of generation on the trained model of the examples: the prompt as one batch, then token by token.

#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is a failed bench")]

use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::Checkpoint;
use moepress::model::{Decoder, Model};

/// New tokens of one measurement.
const TOKENS: usize = 32;

fn decode(c: &mut Criterion) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/model");
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, 512).unwrap();
    let decoder = Decoder::new(&model, &mut ()).unwrap();
    let ids: Vec<u32> = (0..512u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 12) % 2048).collect();
    let mut group = c.benchmark_group("decode");
    group.sample_size(10);
    for context in [1, 128, 448] {
        group.throughput(Throughput::Elements(context as u64));
        group.bench_function(BenchmarkId::new("prefill", context), |b| {
            b.iter_batched_ref(
                || decoder.sequence().unwrap(),
                |sequence| black_box(sequence.extend(&ids[..context]).unwrap().len()),
                BatchSize::SmallInput,
            );
        });
        group.throughput(Throughput::Elements(TOKENS as u64));
        group.bench_function(BenchmarkId::new("token by token after", context), |b| {
            b.iter_batched_ref(
                || {
                    let mut sequence = decoder.sequence().unwrap();
                    sequence.extend(&ids[..context]).unwrap();
                    sequence
                },
                |sequence| {
                    for id in &ids[context..context + TOKENS] {
                        black_box(sequence.extend(&[*id]).unwrap());
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
