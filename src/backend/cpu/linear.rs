//! Weight matrices, mapped in their stored type, and x Wᵀ.

#[cfg(target_arch = "x86_64")]
use std::cell::OnceCell;
use std::ops::Range;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::gemm::{BlockScales, TiledInput, is_shared};
use super::gemm::{Columns, Product, Scratch, Source};
use super::simd::{Isa, Simd, Task};
use crate::checkpoint::{Dtype, PackedRow, Storage, Weight, e4m3};

/// A weight matrix `[rows, cols]` = `[out, in]` as stored.
#[derive(Clone, Debug)]
pub struct CpuWeight {
    weight: Weight,
    rows: usize,
    cols: usize,
}

impl CpuWeight {
    /// Whether all values are bf16, though the kernels cannot read them as they are.
    fn is_bf16(&self) -> bool {
        match self.weight.storage() {
            Storage::InputMajor(tensor, _) => tensor.dtype() == Dtype::BF16,
            Storage::Mxfp4 { .. } => true,
            Storage::Plain(_) | Storage::Fp8 { .. } | Storage::Int4 { .. } => false,
        }
    }

    /// Whether tiles of bf16 do for it: for all its values, or for FP8 codes without their scales.
    #[cfg(target_arch = "x86_64")]
    fn fits_tiles(&self) -> bool {
        match self.weight.storage() {
            Storage::Plain(tensor) => tensor.dtype() == Dtype::BF16,
            Storage::Fp8 { block: [_, block], .. } => BlockScales::fit(*block),
            _ => self.is_bf16(),
        }
    }

    /// Columns that are widened at a time, at most `most`, a power of two: whole chains of sums and whole blocks that share
    /// a scale.
    fn tile_cols(&self, most: usize) -> usize {
        match self.weight.storage() {
            Storage::Fp8 { block: [_, block], .. } | Storage::Int4 { group: block, .. }
                if !most.is_multiple_of(*block) =>
            {
                self.cols
            }
            _ => most.min(self.cols),
        }
    }

    pub(super) fn new(weight: &Weight) -> Self {
        CpuWeight { weight: weight.clone(), rows: weight.rows(), cols: weight.cols() }
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Widens the rows from `row` on into `out`.
    pub(super) fn decode_rows(&self, row: usize, out: &mut [f32]) {
        self.weight.decode_rows(row, out);
    }

    /// The stored matrix, where the kernels can read it as it is.
    fn source(&self) -> Option<Source<'_>> {
        self.source_rows(0, self.rows)
    }

    /// `count` rows of the stored matrix from `first` on, where the kernels can read it as it is.
    pub(super) fn source_rows(&self, first: usize, count: usize) -> Option<Source<'_>> {
        let Storage::Plain(tensor) = self.weight.storage() else { return None };
        let row = self.cols * tensor.dtype().bitsize() / 8;
        let bytes = &tensor.bytes()[first * row..(first + count) * row];
        Some(Source::new(bytes, tensor.dtype(), count, self.cols))
    }
}

/// Rows that are multiplied by one matrix or several of as many columns.
pub(super) struct Input<'a> {
    rows: &'a [f32],
    stride: usize,
    /// Packed for tiles, once a matrix needs them so.
    #[cfg(target_arch = "x86_64")]
    tiled: OnceCell<TiledInput>,
}

impl<'a> Input<'a> {
    /// Rows that begin `stride` values apart.
    pub(super) fn new(rows: &'a [f32], stride: usize) -> Self {
        Input {
            rows,
            stride,
            #[cfg(target_arch = "x86_64")]
            tiled: OnceCell::new(),
        }
    }

    /// The first `cols` columns of `n` rows; `None` where `isa` has no tiles.
    #[cfg(target_arch = "x86_64")]
    fn tiled(&self, isa: Isa, (n, cols): (usize, usize)) -> Option<&TiledInput> {
        if self.tiled.get().is_none() {
            let packed = TiledInput::new(isa, self.rows, self.stride, (n, cols), true)?;
            return Some(self.tiled.get_or_init(|| packed));
        }
        self.tiled.get()
    }
}

/// `out [n, rows] = x [n, cols] · Wᵀ`, row-major.
pub(super) fn linear(x: &Input<'_>, weight: &CpuWeight, out: &mut [f32]) {
    product(x, weight, out, false);
}

/// The same, added to what is in `out`.
pub(super) fn add_linear(x: &Input<'_>, weight: &CpuWeight, out: &mut [f32]) {
    product(x, weight, out, true);
}

fn product(x: &Input<'_>, weight: &CpuWeight, out: &mut [f32], accumulate: bool) {
    if out.is_empty() {
        return;
    }
    let CpuWeight { rows, cols, .. } = *weight;
    let n = out.len() / rows;
    let isa = Isa::current();
    let out = Columns::new(out, n, rows, rows);
    #[cfg(target_arch = "x86_64")]
    if weight.fits_tiles()
        && cols > 0
        && let Some(x) = x.tiled(isa, (n, cols))
    {
        return tiled(x, weight, out, accumulate);
    }
    let &Input { rows: x, stride, .. } = x;
    if let Some(w) = weight.source() {
        return Product { x, stride, w, out, accumulate }.run(isa);
    }
    // Other weights are decoded a tile at a time, into a cache. Values do not depend on the tiles.
    let is_bf16 = weight.is_bf16();
    let tile_rows = if n <= FEW { 16 } else { 128 };
    let tile_cols = weight.tile_cols(if n <= FEW { 4096 } else { 512 });
    // Rows must not compete for the same places in the cache.
    let tile_stride = tile_cols + 32;
    (0..rows.div_ceil(tile_rows)).into_par_iter().for_each(|i| {
        let first = i * tile_rows;
        let count = tile_rows.min(rows - first);
        let mut tile = Scratch::take(count * tile_stride);
        for col in (0..cols.max(1)).step_by(tile_cols.max(1)) {
            let cols = col..cols.min(col + tile_cols);
            let (width, weight) = (cols.len(), &weight.weight);
            let (bytes, dtype) = if is_bf16 {
                let out: &mut [u16] = &mut bytemuck::must_cast_slice_mut(&mut tile)[..count * tile_stride];
                isa.run(Narrow { weight, first, cols, stride: tile_stride, out });
                (bytemuck::must_cast_slice(out), Dtype::BF16)
            } else {
                isa.run(Widen { weight, first, cols, stride: tile_stride, out: &mut tile });
                (bytemuck::must_cast_slice(&tile), Dtype::F32)
            };
            let w = Source::strided(bytes, dtype, count, width, tile_stride);
            let accumulate = accumulate || col > 0;
            let product = Product { x: &x[col..], stride, w, out: out.part(0, n, first, count), accumulate };
            if n <= FEW { product.run_here(isa) } else { product.run(isa) }
        }
    });
}

/// The product with a matrix of bf16 values, or such values and scales. Where they are not stored as such, they are
/// brought into that form some rows at a time.
#[cfg(target_arch = "x86_64")]
fn tiled(x: &TiledInput, weight: &CpuWeight, out: Columns<'_>, accumulate: bool) {
    let CpuWeight { rows, cols, .. } = *weight;
    if let Some(w) = weight.source() {
        let parallel = is_shared(out.rows() * rows * cols);
        return x.multiply(w, None, out, accumulate, parallel);
    }
    let isa = Isa::current();
    let is_transposed = matches!(weight.weight.storage(), Storage::InputMajor(..));
    let tile_rows = if is_transposed { 128 } else { 32 };
    (0..rows.div_ceil(tile_rows)).into_par_iter().for_each(|i| {
        let first = i * tile_rows;
        let count = tile_rows.min(rows - first);
        let mut narrow = Scratch::take((count * cols).div_ceil(2));
        let narrow: &mut [u16] = &mut bytemuck::must_cast_slice_mut(&mut narrow)[..count * cols];
        isa.run(Narrow { weight: &weight.weight, first, cols: 0..cols, stride: cols, out: narrow });
        let w = Source::new(bytemuck::must_cast_slice(narrow), Dtype::BF16, count, cols);
        let (factors, block) = factors(&weight.weight, first, count);
        let scales = BlockScales::new(&factors, block).filter(|_| !factors.is_empty());
        x.multiply(w, scales, out.part(0, out.rows(), first, count), accumulate, false);
    });
}

/// Tokens that small tiles are for: packing them anew for each costs nothing.
const FEW: usize = 12;

/// The scales of some rows of FP8 codes, `[count, blocks]`, and the columns of a block; none of other matrices.
#[cfg(target_arch = "x86_64")]
fn factors(weight: &Weight, first: usize, count: usize) -> (Scratch, usize) {
    let Storage::Fp8 { block: [_, block], .. } = weight.storage() else { return (Scratch::take(0), 0) };
    let per_row = weight.cols().div_ceil(*block);
    let mut factors = Scratch::take(count * per_row);
    for (row, factors) in (first..).zip(factors.chunks_exact_mut(per_row)) {
        if let Some(PackedRow::Fp8 { scales, .. }) = weight.packed_row(row) {
            factors.iter_mut().enumerate().for_each(|(i, factor)| *factor = scales.get(i));
        }
    }
    (factors, *block)
}

/// A tile of a matrix that holds bf16 values alone, in that type; of FP8 the codes without their scales.
struct Narrow<'a> {
    weight: &'a Weight,
    first: usize,
    cols: Range<usize>,
    /// Of the rows of `out`.
    stride: usize,
    out: &'a mut [u16],
}

impl Task for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Narrow { weight, first, cols, stride, out } = self;
        let count = out.len() / stride;
        if weight.packed_row(first).is_none() {
            return transposed(weight, first, cols, stride, out);
        }
        for (row, out) in (first..).zip(out.chunks_exact_mut(stride)) {
            let (whole, rest) = out[..cols.len()].as_chunks_mut();
            match weight.packed_row(row).map(|row| row.skip(cols.start)) {
                Some(PackedRow::Mxfp4 { blocks, scales }) => {
                    let packed = blocks.iter().zip(scales);
                    for (out, (block, &scale)) in whole.iter_mut().zip(packed) {
                        s.mxfp4(block, scale, out);
                    }
                }
                Some(PackedRow::Fp8 { codes, .. }) => {
                    let (codes, last) = codes[..cols.len()].as_chunks();
                    whole.iter_mut().zip(codes).for_each(|(out, codes)| s.fp8_bf16(codes, out));
                    for (out, &code) in rest.iter_mut().zip(last) {
                        *out = (e4m3(code).to_bits() >> 16) as u16;
                    }
                }
                Some(PackedRow::Int4 { .. }) | None => {}
            }
            fetch(s, weight, row + count, &cols);
        }
    }
}

/// A tile of a transposed matrix. Memory is read in the order in which it is stored.
#[inline(always)]
fn transposed(weight: &Weight, first: usize, cols: Range<usize>, stride: usize, out: &mut [u16]) {
    const WIDE: usize = 128;
    let mut values = Scratch::take(out.len() / stride * WIDE);
    for col in cols.clone().step_by(WIDE) {
        let width = WIDE.min(cols.end - col);
        weight.decode_transposed(first, col..col + width, WIDE, &mut values);
        for (out, values) in out.chunks_exact_mut(stride).zip(values.chunks_exact(WIDE)) {
            for (out, value) in out[col - cols.start..][..width].iter_mut().zip(values) {
                *out = (value.to_bits() >> 16) as u16;
            }
        }
    }
}

/// A tile of a matrix in f32.
struct Widen<'a> {
    weight: &'a Weight,
    first: usize,
    cols: Range<usize>,
    /// Of the rows of `out`.
    stride: usize,
    out: &'a mut [f32],
}

impl Task for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Widen { weight, first, cols, stride, out } = self;
        if weight.packed_row(first).is_none() {
            return weight.decode_transposed(first, cols, stride, out);
        }
        let count = out.len() / stride;
        for (row, out) in (first..).zip(out.chunks_exact_mut(stride)) {
            let out = &mut out[..cols.len()];
            match weight.packed_row(row).map(|row| row.skip(cols.start)) {
                Some(PackedRow::Fp8 { codes, scales, block }) => {
                    for (i, (out, codes)) in out.chunks_mut(block).zip(codes.chunks(block)).enumerate() {
                        let factor = scales.get(i);
                        let (whole, rest) = out.as_chunks_mut();
                        for (out, codes) in whole.iter_mut().zip(codes.as_chunks().0) {
                            s.fp8(codes, factor, out);
                        }
                        let codes = &codes[32 * whole.len()..];
                        rest.iter_mut().zip(codes).for_each(|(out, &code)| *out = e4m3(code) * factor);
                    }
                }
                Some(row) => row.decode(out),
                None => {}
            }
            fetch(s, weight, row + count, &cols);
        }
    }
}

/// Asks for the codes of a row that is decoded soon.
#[inline(always)]
fn fetch<S: Simd>(s: S, weight: &Weight, row: usize, cols: &Range<usize>) {
    let Some(row) = weight.packed_row(row) else { return };
    let codes = row.codes();
    let at = |col: usize| col * codes.len() / weight.cols();
    codes[at(cols.start)..at(cols.end)].chunks(64).for_each(|line| s.prefetch(line.as_ptr()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Stride, Tensor};

    /// Every stored type, widths around the tile size, one row and many.
    #[test]
    fn linear_is_the_sum_of_products() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (n, rows, cols) in [(1, 5, 3), (7, 300, 40), (33, 16, 257), (3, 515, 64)] {
                // Small multiples of 1/4 are exact in every type and so are their sums.
                let value = |i: usize| ((i * 7 + 3) % 11) as f32 / 4.0 - 1.25;
                let w: Vec<f32> = (0..rows * cols).map(value).collect();
                let x: Vec<f32> = (0..n * cols).map(|i| value(i + 5)).collect();
                let stored = Weight::plain(Tensor::from_f32("w", dtype, vec![rows, cols], &w)).unwrap();
                let weight = CpuWeight::new(&stored);
                let mut out = vec![f32::NAN; n * rows];
                linear(&Input::new(&x, cols), &weight, &mut out);
                for (i, row) in out.chunks_exact(rows).enumerate() {
                    for (j, found) in row.iter().enumerate() {
                        let terms = x[i * cols..][..cols].iter().zip(&w[j * cols..][..cols]);
                        let expected: f32 = terms.map(|(a, b)| a * b).sum();
                        assert!((found - expected).abs() < 1e-4, "{dtype:?} {n}x{rows}x{cols}: [{i}, {j}]");
                    }
                }
            }
        }
    }

    /// Matrices that are widened on the way have the products of what they stand for, whichever tiles and blocks.
    #[test]
    fn packed_matrices_multiply_as_what_they_stand_for() {
        let (rows, cols) = (150usize, 4192usize);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 253) as u8 & 0xf7).collect();
        let fp8 = |block: [usize; 2]| {
            let shape = vec![rows.div_ceil(block[0]), cols.div_ceil(block[1])];
            let scales: Vec<f32> = (0..shape[0] * shape[1]).map(|i| 0.01 + (i % 7) as f32 / 64.0).collect();
            let values = Tensor::owned("w", Dtype::F8_E4M3, vec![rows, cols], codes.clone());
            Weight::fp8(values, Tensor::from_f32("s", Dtype::F32, shape, &scales), block).unwrap()
        };
        let blocks = Tensor::owned("b", Dtype::U8, vec![rows, cols / 32, 16], &codes[..rows * cols / 2]);
        let scales: Vec<u8> = (0..rows * cols / 32).map(|i| 118 + (i % 9) as u8).collect();
        let scales = Tensor::owned("s", Dtype::U8, vec![rows, cols / 32], scales);
        let halves = Stride { first: 1, step: 2 };
        let values: Vec<f32> = codes.iter().map(|&code| f32::from(code) / 64.0 - 2.0).collect();
        let turned = Tensor::from_f32("t", Dtype::BF16, vec![cols, rows], &values);
        let weights = [
            fp8([128, 128]),
            fp8([1, cols]),
            fp8([rows, cols]),
            fp8([64, 96]),
            Weight::mxfp4(blocks.clone(), scales.clone(), Stride::ALL, rows).unwrap(),
            Weight::mxfp4(blocks, scales, halves, rows / 2).unwrap(),
            Weight::input_major(turned, halves, rows / 2).unwrap(),
        ];
        for weight in weights {
            let rows = weight.rows();
            let is_fp8 = matches!(weight.storage(), Storage::Fp8 { .. });
            let dtype = if is_fp8 { Dtype::F32 } else { Dtype::BF16 };
            let shape = vec![rows, cols];
            let values = weight.to_f32();
            let plain = Weight::plain(Tensor::from_f32("w", dtype, shape, &values));
            let (packed, plain) = (CpuWeight::new(&weight), CpuWeight::new(&plain.unwrap()));
            for n in [1, 12, 13, 40] {
                let x: Vec<f32> = (0..n * cols).map(|i| (i * 31 % 17) as f32 * 0.3 - 2.0).collect();
                let [mut out, mut expected] = [(); 2].map(|()| vec![0.25; n * rows]);
                add_linear(&Input::new(&x, cols), &packed, &mut out);
                let check = |out: &[f32], expected: &[f32], start: f64| {
                    if !is_fp8 || Isa::current().agrees() {
                        return assert_eq!(out, expected, "{n}");
                    }
                    // With tiles, FP8 codes are scaled behind the sums, whose rounding is bounded.
                    for (i, &found) in out.iter().enumerate() {
                        let (x, w) = (&x[i / rows * cols..][..cols], &values[i % rows * cols..][..cols]);
                        let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        let bound = 2.0 * (cols as f64 + 8.0) * (-24f64).exp2();
                        let error = (f64::from(found) - start - terms().sum::<f64>()).abs();
                        assert!(
                            error <= bound * (start + terms().map(f64::abs).sum::<f64>()),
                            "{n}: {found}"
                        );
                    }
                };
                add_linear(&Input::new(&x, cols), &plain, &mut expected);
                check(&out, &expected, 0.25);
                linear(&Input::new(&x, cols), &packed, &mut out);
                linear(&Input::new(&x, cols), &plain, &mut expected);
                check(&out, &expected, 0.0);
            }
        }
    }
}
