//! Speed of a calibration pass: tokens per second with first moments only, and with second moments.

#![allow(clippy::unwrap_used, missing_docs, reason = "a failed unwrap is a failed bench")]

use std::hint::black_box;
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::model::Model;
use moepress::tokens::{Bos, Tokenizer};

fn pass(c: &mut Criterion) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
    let checkpoint = Checkpoint::open(data.join("model")).unwrap();
    let tokenizer = Tokenizer::open(checkpoint.dir(), Bos::Auto).unwrap();
    let mut windows = tokenizer.windows(&[data.join("text/code.calibration.txt")], 256).unwrap();
    windows.truncate_files(16);
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut group = c.benchmark_group("calibrate");
    group.sample_size(10).throughput(Throughput::Elements(windows.ids.len() as u64));
    for (name, second) in
        [("first moments", Vec::new()), ("second moments", vec![Moment::InputGram, Moment::HiddenGram])]
    {
        let options = Options { second, ..Options::default() };
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| {
                black_box(calibrate(&model, &windows, &options, &dir.path().join("out"), &mut ()).unwrap())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, pass);
criterion_main!(benches);
