//! Rows of a chunk: which are real, which loss batch they belong to, how far they are apart.

use std::ops::Range;

use crate::backend::{Backend, Batch};

/// Rows of these windows of a batch that are not padding.
pub(super) fn real(batch: &Batch, windows: Range<usize>) -> Vec<usize> {
    (windows.start * batch.length..windows.end * batch.length).filter(|&row| batch.is_real(row)).collect()
}

/// The windows of a chunk by loss batch of `size` windows: its number, and the windows within the chunk.
pub(super) fn batches(
    first_window: usize,
    windows: usize,
    size: usize,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        if start == windows {
            return None;
        }
        let batch = (first_window + start) / size;
        let range = start..((batch + 1) * size - first_window).min(windows);
        start = range.end;
        Some((batch, range))
    })
}

/// Σ (a − b)² over the listed rows of width `d`.
pub(super) fn square(a: &[f32], b: &[f32], rows: &[usize], d: usize) -> f64 {
    let row = |&r: &usize| {
        let range = r * d..(r + 1) * d;
        let pairs = a[range.clone()].iter().zip(&b[range]);
        pairs.map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>()
    };
    rows.iter().map(row).sum()
}

/// A copy of a buffer.
pub(super) fn copy<B: Backend>(backend: &B, x: &B::Buffer, rows: usize) -> crate::backend::Result<B::Buffer> {
    let mut copy = backend.buffer();
    backend.copy_rows(x, 0, rows, &mut copy)?;
    Ok(copy)
}
