//! Work in parts whose number and size depend on the shapes alone.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

/// How many threads one factorisation may use. The result is the same bytes either way: a matrix is cut into the same
/// parts however many threads there are to work on them, every part is computed by one thread, and sums run over the
/// parts in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: right where many matrices are factorised at once.
    One,
    /// Those of the current pool of `rayon`.
    #[default]
    All,
}

impl Threads {
    /// Calls `work` on every part.
    pub(super) fn each<I: IndexedParallelIterator>(self, parts: I, work: impl Fn(I::Item) + Send + Sync) {
        parts.with_min_len(self.at_least()).for_each(work);
    }

    /// The results of `work`, in the order of the parts.
    pub(super) fn map<I, R>(self, parts: I, work: impl Fn(I::Item) -> R + Send + Sync) -> Vec<R>
    where
        I: IndexedParallelIterator,
        R: Send,
    {
        parts.with_min_len(self.at_least()).map(work).collect()
    }

    /// Both results.
    pub(super) fn join<A: Send, B: Send>(
        self,
        a: impl FnOnce() -> A + Send,
        b: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        match self {
            Self::One => (a(), b()),
            Self::All => rayon::join(a, b),
        }
    }

    /// How many parts one task takes.
    fn at_least(self) -> usize {
        match self {
            Self::One => usize::MAX,
            Self::All => 1,
        }
    }
}

/// The length of the parts that `len` is cut into: as equal as possible and at most `most`.
pub(super) fn part(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).max(1)
}
