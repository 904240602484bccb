//! W as it is stored, and how a block of it is read.

use std::ops::Range;

use crate::backend::cpu::simd::{MAX_LANES, Simd};
use crate::checkpoint::Dtype;

const _: () =
    assert!(cfg!(target_endian = "little"), "the CPU kernels read little-endian weights as they are");

/// What an element of a matrix is to the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    Bf16,
    F16,
    /// Two bf16 columns.
    Bf16Pair,
}

impl Kind {
    /// Bytes of an element.
    const fn width(self) -> usize {
        match self {
            Kind::F32 | Kind::Bf16Pair => 4,
            Kind::Bf16 | Kind::F16 => 2,
        }
    }
}

/// A row-major matrix W of f32, bf16 or f16 values, in bytes of any alignment.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Source<'a> {
    bytes: &'a [u8],
    kind: Kind,
    rows: usize,
    cols: usize,
    /// Bytes from one row to the next.
    stride: usize,
}

impl<'a> Source<'a> {
    /// The rows one after the other.
    pub(in super::super) fn new(bytes: &'a [u8], dtype: Dtype, rows: usize, cols: usize) -> Self {
        Source::strided(bytes, dtype, rows, cols, cols)
    }

    /// Rows whose first elements are `stride` elements apart.
    pub(in super::super) fn strided(
        bytes: &'a [u8],
        dtype: Dtype,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Self {
        let kind = match dtype {
            Dtype::F32 => Kind::F32,
            Dtype::BF16 => Kind::Bf16,
            Dtype::F16 => Kind::F16,
            _ => panic!("{dtype:?} weights"),
        };
        let width = kind.width();
        assert!(rows == 0 || ((rows - 1) * stride + cols) * width <= bytes.len(), "rows of W");
        Source { bytes, kind, rows, cols, stride: stride * width }
    }

    /// A bf16 matrix of an even number of columns as one of pairs.
    pub(super) fn pairs(self) -> Option<Self> {
        let paired = self.kind == Kind::Bf16 && self.cols.is_multiple_of(2);
        paired.then_some(Source { kind: Kind::Bf16Pair, cols: self.cols / 2, ..self })
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(in super::super) fn rows(&self) -> usize {
        self.rows
    }

    pub(in super::super) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes from one row to the next.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// From row `first` to the end of the last of `count` rows.
    pub(super) fn bytes(&self, first: usize, count: usize) -> &'a [u8] {
        let end = (first + count - 1) * self.stride + self.cols * self.kind.width();
        &self.bytes[first * self.stride..end]
    }

    /// Columns `cols` of as many consecutive rows as a vector has lanes, from `first` on; beyond the last row, of that
    /// row again.
    #[inline(always)]
    pub(super) fn group<S: Simd, E: Element>(&self, first: usize, cols: Range<usize>) -> Group<'a> {
        debug_assert_eq!(E::KIND, self.kind);
        assert!(first < self.rows && cols.end <= self.cols);
        let mut offsets = [0; MAX_LANES];
        for (i, offset) in offsets.iter_mut().take(S::LANES).enumerate() {
            *offset = (first + i).min(self.rows - 1) * self.stride;
        }
        let next = (S::LANES * self.stride).wrapping_sub(cols.len() * E::WIDTH);
        Group { bytes: self.bytes, end: cols.end, offsets, next }
    }
}

/// Rows of W that are read together, one per lane.
pub(super) struct Group<'a> {
    bytes: &'a [u8],
    /// Behind the last column.
    end: usize,
    offsets: [usize; MAX_LANES],
    /// Bytes from there to the first column of the row `LANES` further on, which is likely read next.
    next: usize,
}

/// How far ahead of the reading the next cache lines are asked for, in bytes of each row.
const AHEAD: usize = 1024;
/// Bytes of a row that are asked for together.
const RUN: usize = 256;
/// Bytes of a cache line.
const LINE: usize = 64;

impl Group<'_> {
    /// Columns that a block of type `E` holds.
    #[inline(always)]
    pub(super) const fn step<S: Simd, E: Element>() -> usize {
        S::LANES * E::PER_LANE
    }

    /// The transpose of the columns `col .. col + step`, all of which must exist: lane r of vector j holds element(s)
    /// `col + j · PER_LANE ..` of row r, as they are stored.
    #[inline(always)]
    pub(super) fn block<S: Simd, E: Element>(&self, s: S, col: usize) -> S::Block {
        assert!(col + Self::step::<S, E>() <= self.end);
        self.prefetch::<S>(s, col * E::WIDTH, Self::step::<S, E>() * E::WIDTH, self.end * E::WIDTH);
        let start = self.bytes.as_ptr();
        s.transpose(s.block(|i| {
            let at = self.offsets[i] + col * E::WIDTH;
            // SAFETY: `Source` checked that every row lies in `bytes`, and `step` columns from `col` on are in the row.
            unsafe { E::load(s, start.add(at)) }
        }))
    }

    /// Asks for what is read [`AHEAD`] bytes later, `width` bytes of each row at a time. Memory is fastest in order, so a
    /// few rows have several lines each fetched now, the others when the blocks behind this one are read.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, at: usize, width: usize, end: usize) {
        let turns = RUN / width;
        let rows = S::LANES / turns;
        let run = at - at % RUN;
        let ahead = if end > run + AHEAD { run + AHEAD } else { (run + AHEAD).wrapping_add(self.next) };
        let turn = at / width % turns;
        for offset in &self.offsets[turn * rows..(turn + 1) * rows] {
            for line in (0..RUN).step_by(LINE) {
                s.prefetch(self.bytes.as_ptr().wrapping_add(offset.wrapping_add(ahead).wrapping_add(line)));
            }
        }
    }

    /// The same where only `count` columns are left, the others being 0.
    #[inline(always)]
    pub(super) fn partial_block<S: Simd, E: Element>(&self, s: S, col: usize, count: usize) -> S::Block {
        let mut rows = [[0; 4 * MAX_LANES]; MAX_LANES];
        self.copy_tails(S::LANES, col * E::WIDTH, count * E::WIDTH, &mut rows);
        // SAFETY: no vector is longer than a row of `rows`.
        s.transpose(s.block(|i| unsafe { E::load(s, rows[i].as_ptr()) }))
    }

    /// Bytes `start .. start + count` of every row. Not inlined, to keep it out of the loops over whole blocks.
    #[inline(never)]
    fn copy_tails(
        &self,
        lanes: usize,
        start: usize,
        count: usize,
        rows: &mut [[u8; 4 * MAX_LANES]; MAX_LANES],
    ) {
        for (row, offset) in rows.iter_mut().zip(&self.offsets[..lanes]) {
            row[..count].copy_from_slice(&self.bytes[offset + start..][..count]);
        }
    }
}

/// A stored element type.
pub(in super::super) trait Element {
    const KIND: Kind;
    /// Bytes of an element.
    const WIDTH: usize = Self::KIND.width();
    /// Elements that share a lane of a block.
    const PER_LANE: usize;

    /// `LANES · PER_LANE` elements.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F {
        // SAFETY: passed on to the caller.
        unsafe { s.load_bits(from) }
    }
    /// Element `i` of every lane, widened.
    #[inline(always)]
    fn part<S: Simd>(_: S, lanes: S::F, _: usize) -> S::F {
        lanes
    }
    /// sum + x · w, for a widened element and what it is multiplied by.
    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::F, w: S::F, sum: S::F) -> S::F {
        s.fma(x, w, sum)
    }
}

pub(super) struct F32;
pub(super) struct Bf16;
pub(super) struct F16;
pub(super) struct Bf16Pair;

impl Element for F32 {
    const KIND: Kind = Kind::F32;
    const PER_LANE: usize = 1;
}

impl Element for Bf16 {
    const KIND: Kind = Kind::Bf16;
    const PER_LANE: usize = 2;

    #[inline(always)]
    fn part<S: Simd>(s: S, lanes: S::F, i: usize) -> S::F {
        if i == 0 { s.bf16_low(lanes) } else { s.bf16_high(lanes) }
    }
}

impl Element for F16 {
    const KIND: Kind = Kind::F16;
    const PER_LANE: usize = 1;

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const u8) -> S::F {
        // SAFETY: passed on to the caller.
        unsafe { s.load_f16(from) }
    }
}

impl Element for Bf16Pair {
    const KIND: Kind = Kind::Bf16Pair;
    const PER_LANE: usize = 1;

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::F, w: S::F, sum: S::F) -> S::F {
        s.dot_bf16(x, w, sum)
    }
}
