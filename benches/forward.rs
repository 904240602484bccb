//! Time of one MoE layer on the CPU: dense and low rank, f32 and bf16, dense FP8 and MXFP4, one token and many. The small shape unless
//! MOEPRESS_BENCH_SHAPE names another of `qwen` and `mixtral`.

mod layers;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use layers::{Format, Layer, SHAPES};

fn forward(c: &mut Criterion) {
    let wanted = std::env::var("MOEPRESS_BENCH_SHAPE").unwrap_or_else(|_| "small".into());
    let shape = SHAPES.into_iter().find(|s| s.name == wanted).expect("a shape: small, qwen or mixtral");
    let mut group = c.benchmark_group(format!("forward/{}", shape.name));
    group.sample_size(10);
    for format in [Format::F32, Format::Bf16, Format::Fp8, Format::Mxfp4] {
        let forms = [("dense", None), ("rank25", Some(25)), ("rank50", Some(50))];
        let is_packed = matches!(format, Format::Fp8 | Format::Mxfp4);
        for (form, percent) in forms.into_iter().take(if is_packed { 1 } else { 3 }) {
            let mut layer = Layer::new(shape, format, percent);
            for tokens in [1, 16, 512] {
                let x = layer.input(tokens);
                group.throughput(Throughput::Elements(tokens as u64));
                let id = BenchmarkId::new(format!("{}/{form}", format.name()), tokens);
                group.bench_function(id, |b| b.iter(|| layer.run(&x).expect("a forward pass")));
            }
        }
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
