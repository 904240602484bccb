//! Aligned memory that is kept between calls.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// A cache line.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    /// Buffers of the thread that nobody uses. Borrowed only to take one or to give one back: a thread that waits for
    /// others may meanwhile run another piece of work, which then takes another buffer.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// f32 values with undefined contents, aligned to cache lines; kept by the thread that drops them.
pub(in super::super) struct Scratch {
    lines: Vec<Line>,
    length: usize,
}

impl Scratch {
    /// Room for `length` values.
    pub(in super::super) fn take(length: usize) -> Self {
        let needed = length.div_ceil(16);
        let mut lines = FREE.with_borrow_mut(|free| best(free, needed)).unwrap_or_default();
        if lines.len() < needed {
            lines.resize(needed, Line::zeroed());
        }
        Scratch { lines, length }
    }
}

/// The smallest buffer that is large enough, or the largest, so that large ones stay few.
fn best(free: &mut Vec<Vec<Line>>, needed: usize) -> Option<Vec<Line>> {
    let size = |lines: &Vec<Line>| (lines.len() < needed, lines.len().abs_diff(needed));
    let (i, _) = free.iter().enumerate().min_by_key(|(_, lines)| size(lines))?;
    Some(free.swap_remove(i))
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // While the thread ends there is no list any more, and the memory is simply freed.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_kept() {
        let address = |s: &Scratch| s.as_ptr() as usize;
        let (a, b) = (Scratch::take(100), Scratch::take(5));
        assert_eq!((a.len(), b.len()), (100, 5));
        assert_eq!((address(&a) % 64, address(&b) % 64), (0, 0));
        let first = address(&a);
        drop(b);
        drop(a);
        assert_eq!(address(&Scratch::take(50)), first);
    }
}
