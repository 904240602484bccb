//! Weight matrices, mapped in their stored type, and x Wᵀ.

use std::borrow::Cow;

use super::gemm::{Columns, Product, Source};
use super::simd::Isa;
use crate::backend::Result;
use crate::checkpoint::{Dtype, Tensor, decode_f32};

/// A weight matrix `[rows, cols]` = `[out, in]` in its stored type.
#[derive(Clone, Debug)]
pub struct CpuWeight {
    tensor: Tensor,
    rows: usize,
    cols: usize,
}

impl CpuWeight {
    pub(super) fn new(tensor: &Tensor) -> Result<Self> {
        tensor.check_float()?;
        let &[rows, cols] = tensor.shape() else {
            let expected = vec![0, 0];
            return Err(crate::checkpoint::Error::Shape {
                name: tensor.name().into(),
                found: tensor.shape().to_vec(),
                expected,
            }
            .into());
        };
        Ok(CpuWeight { tensor: tensor.clone(), rows, cols })
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Widens the row `row` into `out`.
    pub(super) fn decode_rows(&self, row: usize, out: &mut [f32]) {
        let width = self.tensor.dtype().bitsize() / 8;
        let start = row * self.cols * width;
        decode_f32(self.tensor.dtype(), &self.tensor.bytes()[start..start + out.len() * width], out);
    }

    /// All values as f32, borrowed where they are stored so.
    pub(super) fn to_f32(&self) -> Cow<'_, [f32]> {
        if let Some(values) = self.as_f32() {
            return Cow::Borrowed(values);
        }
        let mut out = vec![0.0; self.rows * self.cols];
        self.decode_rows(0, &mut out);
        Cow::Owned(out)
    }

    /// The stored values, where they are aligned f32.
    fn as_f32(&self) -> Option<&[f32]> {
        if self.tensor.dtype() == Dtype::F32 && cfg!(target_endian = "little") {
            bytemuck::try_cast_slice(self.tensor.bytes()).ok()
        } else {
            None
        }
    }

    /// The stored matrix, for the kernels.
    pub(super) fn source(&self) -> Source<'_> {
        Source::new(self.tensor.bytes(), self.tensor.dtype(), self.rows, self.cols)
    }
}

/// `out [n, rows] = x [n, cols] · Wᵀ`, row-major.
pub(super) fn linear(x: &[f32], weight: &CpuWeight, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let (n, rows) = (out.len() / weight.rows, weight.rows);
    let out = Columns::new(out, n, rows, rows);
    Product { x, stride: weight.cols, w: weight.source(), out, accumulate: false }.run(Isa::current());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every stored type, widths around the tile size, one row and many.
    #[test]
    fn linear_is_the_sum_of_products() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            for (n, rows, cols) in [(1, 5, 3), (7, 300, 40), (33, 16, 257), (3, 515, 64)] {
                // Small multiples of 1/4 are exact in every type and so are their sums.
                let value = |i: usize| ((i * 7 + 3) % 11) as f32 / 4.0 - 1.25;
                let w: Vec<f32> = (0..rows * cols).map(value).collect();
                let x: Vec<f32> = (0..n * cols).map(|i| value(i + 5)).collect();
                let weight = CpuWeight::new(&Tensor::from_f32("w", dtype, vec![rows, cols], &w)).unwrap();
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
