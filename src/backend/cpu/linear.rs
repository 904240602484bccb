//! Weight matrices, mapped in their stored type, and x Wᵀ.

use rayon::prelude::*;

use super::gemm::{Columns, Product, Scratch, Source};
use super::simd::Isa;
use crate::checkpoint::{Dtype, Storage, Weight};

/// A weight matrix `[rows, cols]` = `[out, in]` as stored.
#[derive(Clone, Debug)]
pub struct CpuWeight {
    weight: Weight,
    rows: usize,
    cols: usize,
}

impl CpuWeight {
    /// Values of a packed matrix that are widened at a time: half a MiB of f32.
    const TILE: usize = 1 << 17;

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

/// `out [n, rows] = x [n, cols] · Wᵀ`, row-major; the rows of x are `stride` apart.
pub(super) fn linear(x: &[f32], stride: usize, weight: &CpuWeight, out: &mut [f32]) {
    product(x, stride, weight, out, false);
}

/// The same, added to what is in `out`.
pub(super) fn add_linear(x: &[f32], stride: usize, weight: &CpuWeight, out: &mut [f32]) {
    product(x, stride, weight, out, true);
}

fn product(x: &[f32], stride: usize, weight: &CpuWeight, out: &mut [f32], accumulate: bool) {
    if out.is_empty() {
        return;
    }
    let CpuWeight { rows, cols, .. } = *weight;
    let n = out.len() / rows;
    let isa = Isa::current();
    let out = Columns::new(out, n, rows, rows);
    if let Some(w) = weight.source() {
        return Product { x, stride, w, out, accumulate }.run(isa);
    }
    // Packed weights are widened a tile at a time. Values do not depend on the tiles.
    let tile_rows = (CpuWeight::TILE / cols.max(1)).max(16);
    (0..rows.div_ceil(tile_rows)).into_par_iter().for_each(|i| {
        let first = i * tile_rows;
        let count = tile_rows.min(rows - first);
        let mut tile = Scratch::take(count * cols);
        weight.decode_rows(first, &mut tile);
        let w = Source::new(bytemuck::must_cast_slice(&tile), Dtype::F32, count, cols);
        Product { x, stride, w, out: out.part(0, n, first, count), accumulate }.run(isa);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Tensor;

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
                linear(&x, cols, &weight, &mut out);
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
}
