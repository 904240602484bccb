//! Causal depthwise convolution.

use rayon::prelude::*;

use super::CpuBuffer;
use super::simd::exp::silu;
use super::simd::{Isa, MAX_LANES, Simd, Task};
use crate::backend::Batch;

/// Rows per parallel piece.
const ROWS: usize = 16;

/// See [`Backend::causal_convolution`](crate::backend::Backend::causal_convolution); `out` has its shape.
pub(super) fn causal_convolution(
    x: &CpuBuffer,
    kernel: &[f32],
    bias: Option<&[f32]>,
    apply_silu: bool,
    mut tail: Option<&mut CpuBuffer>,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let (channels, before) = (x.cols, kernel.len() / x.cols - 1);
    if let Some(tail) = tail.as_deref_mut()
        && batch.start == 0
    {
        tail.reshape(before, channels);
        tail.data.fill(0.0);
    }
    let history = tail.as_deref();
    let pieces = out.data.par_chunks_mut(ROWS * channels).enumerate();
    pieces.for_each(|(piece, out)| {
        for (i, out) in out.chunks_exact_mut(channels).enumerate() {
            let row = piece * ROWS + i;
            let position = row % batch.length;
            // The row `back` rows earlier, where there is one.
            let earlier = |back: usize| match history {
                _ if back <= position => Some(x.row(row - back)),
                Some(tail) => Some(tail.row(before + position - back)),
                None => None,
            };
            Isa::current().run(Row { earlier, kernel, bias, apply_silu, out });
        }
    });
    if let Some(tail) = tail {
        advance(tail, x);
    }
}

/// Makes `tail` the last rows of what it is, followed by `x`.
fn advance(tail: &mut CpuBuffer, x: &CpuBuffer) {
    let kept = tail.rows.saturating_sub(x.rows);
    tail.data.copy_within((tail.rows - kept) * tail.cols.., 0);
    let new = tail.rows - kept;
    tail.data[kept * tail.cols..].copy_from_slice(&x.data[(x.rows - new) * x.cols..]);
}

/// One row of the result. Every element is one chain of multiply-adds from the earliest row to its own.
struct Row<'a, F> {
    earlier: F,
    kernel: &'a [f32],
    bias: Option<&'a [f32]>,
    apply_silu: bool,
    out: &'a mut [f32],
}

impl<'a, F: Fn(usize) -> Option<&'a [f32]>> Task for Row<'a, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { earlier, kernel, bias, apply_silu, out } = self;
        let channels = out.len();
        match bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(0.0),
        }
        let last = kernel.len() / channels - 1;
        for (j, weights) in kernel.chunks_exact(channels).enumerate() {
            if let Some(x) = earlier(last - j) {
                lanes(s, out, [weights, x], |sum, [w, x]| s.fma(w, x, sum));
            }
        }
        if apply_silu {
            lanes(s, out, [], |sum, []| silu(s, sum));
        }
    }
}

/// `of` of all elements of `out` and `with`, into `out`. The rest behind the last whole vector goes by the same
/// instructions, so that a value does not depend on where it lies.
#[inline(always)]
fn lanes<S: Simd, const N: usize>(
    s: S,
    out: &mut [f32],
    with: [&[f32]; N],
    of: impl Fn(S::F, [S::F; N]) -> S::F,
) {
    let whole = out.len() - out.len() % S::LANES;
    for at in (0..whole).step_by(S::LANES) {
        let value = of(s.load(&out[at..]), with.map(|w| s.load(&w[at..])));
        s.store(value, &mut out[at..]);
    }
    let rest = out.len() - whole;
    let padded = |values: &[f32]| {
        let mut lanes = [0.0; MAX_LANES];
        lanes[..rest].copy_from_slice(&values[whole..whole + rest]);
        s.load(&lanes)
    };
    if rest > 0 {
        let mut lanes = [0.0; MAX_LANES];
        s.store(of(padded(out), with.map(padded)), &mut lanes);
        out[whole..].copy_from_slice(&lanes[..rest]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(rows: usize, cols: usize, value: impl Fn(usize) -> f32) -> CpuBuffer {
        CpuBuffer { rows, cols, data: (0..rows * cols).map(value).collect() }
    }

    fn batch(windows: usize, length: usize) -> Batch {
        Batch { windows, ..Batch::piece(0, length, length) }
    }

    /// Two windows of three tokens, a kernel of two: nothing crosses from one window to the other.
    #[test]
    fn by_hand() {
        let x = buffer(6, 1, |i| (i + 1) as f32);
        let mut out = buffer(6, 1, |_| f32::NAN);
        causal_convolution(&x, &[10.0, 1.0], Some(&[0.5]), false, None, &batch(2, 3), &mut out);
        assert_eq!(out.data, [1.5, 12.5, 23.5, 4.5, 45.5, 56.5]);
    }

    /// A text in pieces, some shorter than the kernel, gives the bits of the whole.
    #[test]
    fn pieces() {
        let (length, channels, kernel_rows) = (13, 21, 4);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 30.0;
        let x = buffer(length, channels, value);
        let kernel: Vec<f32> = (0..kernel_rows * channels).map(|i| value(i + 7)).collect();
        let mut whole = buffer(length, channels, |_| f32::NAN);
        causal_convolution(&x, &kernel, None, true, None, &batch(1, length), &mut whole);
        for pieces in [&[13][..], &[1; 13], &[2, 1, 3, 7], &[12, 1]] {
            let mut tail = CpuBuffer::default();
            let (mut found, mut start) = (Vec::new(), 0);
            for &count in pieces {
                let part = buffer(count, channels, |i| x.data[start * channels + i]);
                let mut out = buffer(count, channels, |_| f32::NAN);
                let batch = Batch::piece(start, count, length);
                causal_convolution(&part, &kernel, None, true, Some(&mut tail), &batch, &mut out);
                found.extend(out.data);
                start += count;
            }
            assert_eq!(found, whole.data, "{pieces:?}");
        }
    }
}
