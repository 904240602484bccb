//! x Wᵀ with W mapped in its stored type: tiles of W are widened to f32 and multiplied by the library GEMM.

use std::cell::RefCell;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::checkpoint::{Dtype, Storage, Weight};

/// A weight matrix `[rows, cols]` = `[out, in]` as stored.
#[derive(Clone, Debug)]
pub struct CpuWeight {
    weight: Weight,
    rows: usize,
    cols: usize,
}

impl CpuWeight {
    /// Elements of W that are widened at a time: half a MiB of f32, so that tile and activations share the cache.
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

    /// The stored values, where they are aligned f32.
    fn as_f32(&self) -> Option<&[f32]> {
        match self.weight.storage() {
            Storage::Plain(tensor) if tensor.dtype() == Dtype::F32 && cfg!(target_endian = "little") => {
                bytemuck::try_cast_slice(tensor.bytes()).ok()
            }
            _ => None,
        }
    }

    /// Rows of W in a tile: a function of the shape alone, so that results do not depend on the threads.
    fn tile_rows(&self) -> usize {
        (CpuWeight::TILE / self.cols.max(1)).clamp(16, 256).next_multiple_of(16)
    }
}

thread_local! {
    /// The widened tile of the thread. Borrowed only around code that does not enter rayon.
    static TILE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out [n, rows] = x [n, cols] · Wᵀ`, row-major.
pub(super) fn linear(x: &[f32], weight: &CpuWeight, out: &mut [f32]) {
    let (rows, cols) = (weight.rows, weight.cols);
    if out.is_empty() {
        return;
    }
    let n = out.len() / rows;
    if cols == 0 {
        out.fill(0.0);
        return;
    }
    let x = MatRef::from_row_major_slice(x, n, cols);
    let tile_rows = weight.tile_rows();
    let columns = MatMut::from_row_major_slice_mut(out, n, rows).par_col_chunks_mut(tile_rows);
    columns.enumerate().for_each(|(i, out)| {
        let first = i * tile_rows;
        let count = out.ncols();
        if let Some(all) = weight.as_f32() {
            multiply(x, &all[first * cols..(first + count) * cols], out);
        } else {
            TILE.with_borrow_mut(|tile| {
                tile.resize(count * cols, 0.0);
                weight.decode_rows(first, tile);
                multiply(x, tile, out);
            });
        }
    });
}

fn multiply(x: MatRef<'_, f32>, tile: &[f32], out: MatMut<'_, f32>) {
    let tile = MatRef::from_row_major_slice(tile, out.ncols(), x.ncols());
    matmul(out, Accum::Replace, x, tile.transpose(), 1.0, Par::Seq);
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
                linear(&x, &weight, &mut out);
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
