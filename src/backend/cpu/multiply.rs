//! Products of f32 matrices in memory, for training.

use super::gemm::{Columns, Product, Source};
use super::simd::Isa;
use crate::checkpoint::Dtype;

/// `out [n, rows]` = `x [n, cols]` · `w [rows, cols]`ᵀ, all row-major; added to what `out` holds where `accumulate`. Uses
/// the threads of the current pool; the result does not depend on how many there are.
///
/// # Panics
/// Where the lengths do not fit.
pub(crate) fn multiply(x: &[f32], w: &[f32], cols: usize, accumulate: bool, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    assert!(cols > 0, "columns of a product");
    let (n, rows) = (x.len() / cols, w.len() / cols);
    assert_eq!((n * cols, rows * cols, n * rows), (x.len(), w.len(), out.len()), "shapes of a product");
    let w = Source::new(bytemuck::must_cast_slice(w), Dtype::F32, rows, cols);
    Product { x, stride: cols, w, out: Columns::new(out, n, rows, rows), accumulate }.run(Isa::current());
}

/// The transpose of `x`, which has `cols` columns.
pub(crate) fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    const BLOCK: usize = 32;
    let rows = x.len() / cols.max(1);
    let mut out = vec![0.0; x.len()];
    for i in (0..rows).step_by(BLOCK) {
        for j in (0..cols).step_by(BLOCK) {
            for r in i..rows.min(i + BLOCK) {
                for c in j..cols.min(j + BLOCK) {
                    out[c * rows + r] = x[r * cols + c];
                }
            }
        }
    }
    out
}
