//! Every instruction set of this processor against sums in f64, and the promises that results make.

use rayon::ThreadPoolBuilder;

use super::*;
use crate::checkpoint::{decode_f32, encode_f32};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

/// Values without structure, from −1 to 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// What this processor has, the instructions that round bf16 products too.
fn every() -> impl Iterator<Item = Isa> {
    Isa::available().chain([Isa::Avx512Bf16, Isa::AmxBf16].into_iter().filter(|isa| isa.is_available()))
}

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect()
}

/// W in stored form, `offset` bytes into its buffer, and its values.
struct Weight {
    bytes: Vec<u8>,
    offset: usize,
    values: Vec<f32>,
    dtype: Dtype,
}

impl Weight {
    fn new(dtype: Dtype, rows: usize, cols: usize, offset: usize) -> Self {
        let stored = encode_f32(dtype, &noise(rows * cols, 7 + rows as u64));
        let mut values = vec![0.0; rows * cols];
        decode_f32(dtype, &stored, &mut values);
        let mut bytes = vec![0xff; offset];
        bytes.extend(stored);
        Weight { bytes, offset, values, dtype }
    }

    fn source(&self, rows: usize, cols: usize) -> Source<'_> {
        Source::new(&self.bytes[self.offset..], self.dtype, rows, cols)
    }
}

fn product(isa: Isa, x: &[f32], w: Source<'_>, n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n * w.rows()];
    multiply(isa, x, w.cols(), w, Columns::new(&mut out, n, w.rows(), w.rows()));
    out
}

fn multiply(isa: Isa, x: &[f32], stride: usize, w: Source<'_>, out: Columns<'_>) {
    Product { x, stride, w, out, accumulate: false }.run(isa);
}

/// |out − exact| ≤ (K + 8) · 2⁻²⁴ · Σ |w||x|, for every element.
fn check(isa: Isa, dtype: Dtype, (n, rows, cols): (usize, usize, usize), offset: usize) {
    let weight = Weight::new(dtype, rows, cols, offset);
    let x = noise(n * cols, 3);
    let out = product(isa, &x, weight.source(rows, cols), n);
    let paired = isa.rounds() && dtype == Dtype::BF16 && (cols.is_multiple_of(2) || isa == Isa::AmxBf16);
    let x = if paired { rounded(&x) } else { x };
    check_against(&out, &x, &weight.values, cols, &format!("{isa} {dtype:?} {n}x{rows}x{cols}+{offset}"));
}

fn check_against(out: &[f32], x: &[f32], w: &[f32], cols: usize, context: &str) {
    let rows = w.len() / cols;
    for (i, &found) in out.iter().enumerate() {
        let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
        let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
        let bound = (cols as f64 + 8.0) * (-24f64).exp2() * size;
        let error = (f64::from(found) - exact).abs();
        assert!(error <= bound, "{context}: [{i}] {found}, not {exact}");
    }
}

#[test]
fn products_are_within_the_bound() {
    for isa in every() {
        for dtype in DTYPES {
            for n in [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 48, 49, 64, 65, 130] {
                for (rows, cols) in [(1, 1), (15, 16), (16, 15), (17, 100), (100, 17), (65, 33)] {
                    for offset in [0, 1, 2] {
                        check(isa, dtype, (n, rows, cols), offset);
                    }
                }
            }
            for shape in [(1, 300, 1100), (13, 131, 513), (40, 260, 1024), (3, 64, 512), (29, 40, 1537)] {
                check(isa, dtype, shape, 1);
            }
        }
    }
}

#[test]
fn empty_products_are_zero_or_nothing() {
    for isa in every() {
        for n in [1, 20] {
            let weight = Weight::new(Dtype::F32, 5, 0, 0);
            assert_eq!(product(isa, &[], weight.source(5, 0), n), vec![0.0; 5 * n]);
            assert_eq!(product(isa, &vec![1.0; 4 * n], weight.source(0, 4), n), [0.0; 0]);
        }
        let weight = Weight::new(Dtype::F32, 5, 4, 0);
        assert_eq!(product(isa, &[], weight.source(5, 4), 0), [0.0; 0]);
    }
}

/// A token's result does not depend on the other tokens, nor a row's on the other rows.
#[test]
fn results_do_not_depend_on_the_batch() {
    let (rows, cols, most) = (150, 1200, 70);
    let x = noise(most * cols, 3);
    for isa in every() {
        for dtype in DTYPES {
            let weight = Weight::new(dtype, rows, cols, 0);
            let all = product(isa, &x, weight.source(rows, cols), most);
            for n in [1, 2, 5, 6, 11, 12, 13, 14, 15, 16, 17, 29, 48, 49, 69] {
                let some = product(isa, &x[..n * cols], weight.source(rows, cols), n);
                assert_eq!(some, all[..n * rows], "{isa} {dtype:?} {n}");
            }
            let single = Source::new(&weight.bytes[33 * cols * dtype.bitsize() / 8..], dtype, 1, cols);
            assert_eq!(product(isa, &x[..cols], single, 1), all[33..34], "{isa} {dtype:?}");
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    for isa in every() {
        for (n, rows, cols) in [(1, 700, 600), (9, 90, 700), (130, 333, 530)] {
            let weight = Weight::new(Dtype::BF16, rows, cols, 0);
            let x = noise(n * cols, 3);
            let run = |threads: usize| {
                let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| product(isa, &x, weight.source(rows, cols), n))
            };
            let one = run(1);
            assert_eq!(run(2), one, "{isa} {n}");
            assert_eq!(run(8), one, "{isa} {n}");
        }
    }
}

/// All instruction sets with fused multiply-add give the same bits.
#[test]
fn results_do_not_depend_on_instructions() {
    for (n, rows, cols) in [(1, 70, 600), (13, 90, 700)] {
        let weight = Weight::new(Dtype::F16, rows, cols, 0);
        let x = noise(n * cols, 3);
        let results =
            Isa::available().filter(|isa| isa.agrees()).map(|i| product(i, &x, weight.source(rows, cols), n));
        let results: Vec<_> = results.collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{n}");
    }
}

/// What stands in for the products of bf16 where the processor has none.
#[test]
fn pairs_are_multiplied_alike_by_all_instructions() {
    let (n, rows, cols) = (40, 70, 300);
    let (weight, x) = (Weight::new(Dtype::BF16, rows, cols, 1), noise(n * cols, 3));
    let mut pairs = vec![0.0; n * cols / 2];
    round_pairs(&x, &mut pairs);
    for isa in every() {
        let mut out = vec![f32::NAN; n * rows];
        let w = weight.source(rows, cols).pairs().unwrap();
        let columns = Columns::new(&mut out, n, rows, rows);
        Product { x: &pairs, stride: cols / 2, w, out: columns, accumulate: false }.multiply(isa, false);
        check_against(&out, &rounded(&x), &weight.values, cols, isa.name());
    }
}

#[test]
fn strided_rows_are_read_in_place() {
    let (n, rows, cols, stride) = (3, 20, 40, 50);
    let (x, w) = (noise(n * stride, 3), noise(rows * stride, 4));
    for isa in every() {
        let source = Source::strided(bytemuck::cast_slice(&w), Dtype::F32, rows, cols, stride);
        let mut out = vec![f32::NAN; n * 30];
        multiply(isa, &x, stride, source, Columns::new(&mut out, n, rows, 30));
        let tight =
            |all: &[f32]| -> Vec<f32> { all.chunks(stride).flat_map(|r| &r[..cols]).copied().collect() };
        let (x, w) = (tight(&x), tight(&w));
        let expected = product(isa, &x, Source::new(bytemuck::cast_slice(&w), Dtype::F32, rows, cols), n);
        for (t, row) in out.chunks_exact(30).enumerate() {
            assert_eq!(row[..rows], expected[t * rows..(t + 1) * rows]);
            assert!(row[rows..].iter().all(|v| v.is_nan()));
        }
    }
}

#[test]
fn products_are_added_where_asked() {
    let (rows, cols) = (70, 40);
    let weight = Weight::new(Dtype::BF16, rows, cols, 0);
    for isa in every() {
        for n in [1, 40] {
            let x = noise(n * cols, 3);
            let once = product(isa, &x, weight.source(rows, cols), n);
            let mut out = once.clone();
            let (w, stride) = (weight.source(rows, cols), cols);
            let columns = Columns::new(&mut out, n, rows, rows);
            Product { x: &x, stride, w, out: columns, accumulate: true }.run_here(isa);
            assert!(out.iter().zip(&once).all(|(sum, v)| *sum == v + v), "{isa} {n}");
        }
    }
}

/// Infinity, NaN of any bits, and the largest and smallest numbers go through a product as they are.
#[test]
fn extremes_go_through() {
    let (rows, cols) = (40, 70);
    let ones = vec![1.0; rows * cols];
    let bytes = encode_f32(Dtype::BF16, &ones);
    let quiet = f32::from_bits(0x7f80_0001);
    let extremes = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, quiet, f32::MAX, -f32::MAX, 1.2e-38, 3e-5];
    for isa in every() {
        for at in [0, 31, 69] {
            let mut x = vec![0.0; extremes.len() * cols];
            for (row, value) in x.chunks_exact_mut(cols).zip(extremes) {
                row[at] = value;
            }
            let out = product(isa, &x, Source::new(&bytes, Dtype::BF16, rows, cols), extremes.len());
            for (out, value) in out.chunks_exact(rows).zip(extremes) {
                let value = if isa.rounds() { half::bf16::from_f32(value).to_f32() } else { value };
                // What is smaller than a normal number may count as 0.
                let close = |found: f32| found == value || (found - value).abs() <= f32::MIN_POSITIVE;
                let same = |found: &f32| close(*found) || found.is_nan() && value.is_nan();
                assert!(out.iter().all(same), "{isa}: {value} at {at} became {}", out[0]);
            }
        }
    }
}

#[test]
fn weighted_rows_are_within_the_bound() {
    for isa in every() {
        for (n, count, width) in
            [(1, 1, 1), (1, 700, 200), (5, 37, 64), (64, 600, 48), (15, 3, 17), (1, 9, 130)]
        {
            let (stride, first) = (width + 3, 100);
            let (weights, rows) = (noise(n * count, 1), noise(count * stride, 2));
            let mut out = vec![f32::NAN; n * width];
            let columns = Columns::new(&mut out, n, width, width);
            isa.run(WeightedRows { weights: &weights, count, rows: &rows, stride, first, out: columns });
            for (i, found) in out.into_iter().enumerate() {
                let weights = &weights[i / width * count..][..count];
                let terms =
                    || (0..count).map(|k| f64::from(weights[k]) * f64::from(rows[k * stride + i % width]));
                let bound = (count as f64 + 8.0) * (-24f64).exp2() * terms().map(f64::abs).sum::<f64>();
                assert!(
                    (f64::from(found) - terms().sum::<f64>()).abs() <= bound,
                    "{isa} {n}x{count}x{width}"
                );
            }
        }
    }
}

/// Tokens on their own, and rows with weight 0 left out.
#[test]
fn weighted_rows_do_not_depend_on_the_batch() {
    let (n, count, width) = (30, 1100, 80);
    let (mut weights, rows) = (noise(n * count, 1), noise(count * width, 2));
    weights.chunks_exact_mut(count).for_each(|w| w[..600].fill(0.0));
    for isa in every() {
        let run = |weights: &[f32], first: usize, tokens: usize| {
            let mut out = vec![f32::NAN; tokens * width];
            let columns = Columns::new(&mut out, tokens, width, width);
            let (count, rows) = (count - first, &rows[first * width..]);
            isa.run(WeightedRows { weights, count, rows, stride: width, first, out: columns });
            out
        };
        let all = run(&weights, 0, n);
        for t in 0..n {
            let own = &weights[t * count..(t + 1) * count];
            assert_eq!(run(own, 0, 1), all[t * width..(t + 1) * width], "{isa}");
            assert_eq!(run(&own[600..], 600, 1), all[t * width..(t + 1) * width], "{isa}");
        }
    }
}
