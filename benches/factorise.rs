//! Time to factorise expert weights: the work that `compress` does for every matrix it makes low rank.
//!
//! `cargo bench` measures small shapes. With arguments it is our side of `benches/peers/lapack_svd.py`: kind (`plain`,
//! `whitened` or `experts`, several plain ones at once), rows, columns and threads. Each input line `percent runs` is
//! answered by a JSON list of seconds per matrix at that percentage of full rank; no runs are answered by the loss
//! above the optimum, relative to it.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use moepress::linalg::{Matrix, Threads, data_loss, low_rank, spectrum, truncated_svd, whitened_svd};
use rayon::prelude::*;

/// The gate or up projection of a small model and of Qwen3-30B-A3B, and the down projection of the former.
const SHAPES: [(usize, usize); 3] = [(512, 256), (256, 512), (768, 2048)];

/// Matrices of one layer that are factorised at once.
const EXPERTS: usize = 8;

/// Values without structure: sums of four uniform ones, close to normal, as weights are.
fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let values = (0..rows * cols).map(|_| f64::from((0..4).map(|_| next()).sum::<f64>() as f32));
    Matrix::new(rows, cols, values.collect()).expect("as many values as entries")
}

/// The second moment of twice as many inputs as there are features.
fn moment(features: usize) -> Matrix {
    let x = noise(2 * features, features, 2);
    x.transpose().matmul(&x).expect("shapes fit")
}

fn factorise(c: &mut Criterion) {
    let mut group = c.benchmark_group("factorise");
    group.sample_size(10);
    for (out, input) in SHAPES {
        let shape = format!("{out}x{input}");
        let (w, gram) = (noise(out, input, 1), moment(input));
        let short = out.min(input);
        group.bench_function(BenchmarkId::new("spectrum", &shape), |b| {
            b.iter(|| spectrum(black_box(&w), None).expect("finite"));
        });
        for percent in [25, 50] {
            let rank = short * percent / 100;
            let id = format!("{shape}/{percent}%");
            group.bench_function(BenchmarkId::new("factors alone", &id), |b| {
                b.iter(|| low_rank(black_box(&w), None, rank, Threads::All).expect("finite"));
            });
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

fn serve(kind: &str, rows: usize, cols: usize) -> Result<(), Box<dyn std::error::Error>> {
    let count = if kind == "experts" { EXPERTS } else { 1 };
    let weights: Vec<Matrix> = (0..count).map(|e| noise(rows, cols, e as u64 + 1)).collect();
    let gram = (kind == "whitened").then(|| moment(cols));
    let gram = gram.as_ref();
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (percent, runs) = line.split_once(' ').ok_or("a line: percent runs")?;
        let (rank, runs): (usize, usize) = (rows.min(cols) * percent.parse::<usize>()? / 100, runs.parse()?);
        if runs == 0 {
            let found = low_rank(&weights[0], gram, rank, Threads::All)?;
            let best: f64 = spectrum(&weights[0], gram)?[rank..].iter().sum();
            let product = found.u.matmul(&found.v)?;
            let lost = if let Some(gram) = gram {
                data_loss(&weights[0], &product, gram)?
            } else {
                let pairs = weights[0].as_slice().iter().zip(product.as_slice());
                pairs.map(|(a, b)| (a - b) * (a - b)).sum()
            };
            writeln!(out, "{}", serde_json::to_string(&(lost / best - 1.0))?)?;
        } else {
            let run = || {
                let start = Instant::now();
                match &weights[..] {
                    [one] => drop(black_box(low_rank(one, gram, rank, Threads::All))),
                    all => all.par_iter().for_each(|w| {
                        drop(black_box(low_rank(w, gram, rank, Threads::One)));
                    }),
                }
                start.elapsed()
            };
            let seconds: Vec<f64> =
                (0..runs).map(|_| run()).map(|t: Duration| t.as_secs_f64() / count as f64).collect();
            writeln!(out, "{}", serde_json::to_string(&seconds)?)?;
        }
        out.flush()?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [kind, rows, cols, threads] = &args[..] {
        rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build_global()?;
        return serve(kind, rows.parse()?, cols.parse()?);
    }
    let mut criterion = Criterion::default().configure_from_args();
    factorise(&mut criterion);
    criterion.final_summary();
    Ok(())
}
