//! The kernel for bf16 matrices on processors with AMX: tiles of W times tiles of x.
//!
//! The processor multiplies bf16 by bf16 only. An f32 value is the sum of three bf16 values, its *pieces*, so x becomes
//! three columns per token, and the sums of the three are added in the end: nothing is rounded but the sums. Where x is
//! rounded to bf16, one piece is all there is. A sum runs over the columns of W, [`STEP`] at a time, whatever else is
//! computed beside it.

use std::ops::Range;

use rayon::prelude::*;

use super::stream::add;
use super::{Columns, Kind, SMALL, Scratch, Source};
use crate::backend::cpu::simd::amx::{Ahead, Amx, COLUMNS, ROWS, Rows, SIDE, STEP, Shape};
use crate::backend::cpu::simd::{Isa, Simd, Task};

/// Steps of W between which sums go to memory.
const SPAN: usize = 64;

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// Most rows of W in a piece of work with one group of tokens, and with several.
const MOST_ROWS: [usize; 2] = [4 * ROWS, 8 * ROWS];

/// The rows of x, split or rounded and packed for the tiles.
pub(in super::super) struct TiledInput {
    amx: Amx,
    isa: Isa,
    values: Scratch,
    groups: Groups,
    cols: usize,
}

impl TiledInput {
    /// Packs `tokens` rows of `cols` values, `stride` apart; `None` where `isa` has no tiles.
    pub(in super::super) fn new(
        isa: Isa,
        x: &[f32],
        stride: usize,
        (tokens, cols): (usize, usize),
        parallel: bool,
    ) -> Option<Self> {
        let amx = isa.amx()?;
        let groups = Groups { tokens, pieces: if isa.rounds() { 1 } else { 3 } };
        let each = cols.div_ceil(STEP) * Groups::STEP;
        let mut values = Scratch::take(groups.count() * each);
        let pack = |(g, to): (usize, &mut [f32])| {
            let (x, tokens) = (&x[groups.start(g) * stride..], groups.size(g));
            isa.run(PackGroup { x, stride, cols, tokens, pieces: groups.pieces, to });
        };
        if parallel && tokens * cols > SMALL {
            values.par_chunks_exact_mut(each).enumerate().for_each(pack);
        } else {
            values.chunks_exact_mut(each).enumerate().for_each(pack);
        }
        Some(TiledInput { amx, isa, values, groups, cols })
    }

    /// `out [tokens, rows]` = or, where `accumulate`, += x · Wᵀ for a bf16 matrix; its values times `scales`, if there
    /// are any.
    pub(in super::super) fn multiply(
        &self,
        w: Source<'_>,
        scales: Option<BlockScales<'_>>,
        out: Columns<'_>,
        accumulate: bool,
        parallel: bool,
    ) {
        assert!(scales.is_none_or(|s| s.factors.len() == w.rows() * w.cols().div_ceil(s.cols)), "scales");
        assert_eq!((w.kind(), w.cols()), (Kind::Bf16, self.cols), "a matrix for tiles");
        assert_eq!((out.rows(), out.cols()), (self.groups.tokens, w.rows()), "size of a product");
        let groups = self.groups;
        let wanted = if parallel { 4 * rayon::current_num_threads() } else { 1 };
        let most_rows = MOST_ROWS[usize::from(groups.count() > 1)];
        let rows = w.rows().div_ceil(wanted).next_multiple_of(ROWS).min(most_rows);
        let most_groups = groups.most_at_once();
        let (down, across) = (w.rows().div_ceil(rows), groups.count().div_ceil(most_groups));
        let work = |i: usize| {
            let (row, group) = (i / across * rows, i % across * most_groups);
            let rows = row..(row + rows).min(w.rows());
            let range = group..(group + most_groups).min(groups.count());
            let work =
                Work { amx: self.amx, x: &self.values, groups, w, scales, out, accumulate, rows, range };
            self.isa.run(work);
        };
        if parallel {
            (0..down * across).into_par_iter().for_each(work);
        } else {
            (0..down * across).for_each(work);
        }
    }
}

/// Factors of a matrix, `[rows, ⌈columns / cols⌉]`: one for as many columns of each row.
#[derive(Clone, Copy)]
pub(in super::super) struct BlockScales<'a> {
    factors: &'a [f32],
    cols: usize,
}

impl<'a> BlockScales<'a> {
    /// For blocks of `cols` columns; `None` where they do not [`BlockScales::fit`].
    pub(in super::super) fn new(factors: &'a [f32], cols: usize) -> Option<Self> {
        BlockScales::fit(cols).then_some(BlockScales { factors, cols })
    }

    /// Whether blocks of `cols` columns are whole steps.
    pub(in super::super) fn fit(cols: usize) -> bool {
        cols.is_multiple_of(STEP)
    }
}

/// How tokens are cut into groups whose pieces are the columns of a product.
#[derive(Clone, Copy)]
struct Groups {
    tokens: usize,
    pieces: usize,
}

impl Groups {
    /// Most values of a group in a step of W.
    const STEP: usize = SIDE * COLUMNS;

    fn most(self) -> usize {
        COLUMNS / self.pieces
    }

    /// Most groups in a piece of work. Their tiles in a span, and those of W, stay in the second-level cache.
    fn most_at_once(self) -> usize {
        if self.pieces == 1 { 8 } else { 4 }
    }

    fn count(self) -> usize {
        self.tokens.div_ceil(self.most())
    }

    /// First token of group `g`.
    fn start(self, g: usize) -> usize {
        g * self.most()
    }

    fn size(self, g: usize) -> usize {
        self.most().min(self.tokens - self.start(g))
    }

    fn shape(self, g: usize) -> Shape {
        Shape::new(self.pieces * self.size(g))
    }
}

/// Bits of the upper half of a word.
const UPPER: u32 = 0xffff_0000;

/// bf16 values, in the upper halves, whose sum is `x`: each takes the leading bits of what the ones before leave. Alone
/// it is `x` rounded. Infinity and NaN are all in the first.
#[inline(always)]
fn split<const PIECES: usize>(x: f32) -> [u32; PIECES] {
    if PIECES == 1 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & UPPER;
        return [if x.is_nan() { f32::NAN.to_bits() } else { rounded }; PIECES];
    }
    let mut rest = if x.is_finite() { x } else { 0.0 };
    let mut pieces = [0; PIECES];
    for piece in &mut pieces {
        *piece = rest.to_bits() & UPPER;
        rest -= f32::from_bits(*piece);
    }
    let special = if x.is_nan() { f32::NAN } else { x };
    pieces[0] = if x.is_finite() { pieces[0] } else { special.to_bits() };
    pieces
}

/// A group of tokens as tiles of pairs of bf16, `[steps, tiles, SIDE, width]`: piece after piece, and in each piece token
/// after token.
struct PackGroup<'a> {
    x: &'a [f32],
    stride: usize,
    cols: usize,
    tokens: usize,
    pieces: usize,
    to: &'a mut [f32],
}

impl Task for PackGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.pieces == 1 { self.pack::<S, 1>(s) } else { self.pack::<S, 3>(s) }
    }
}

impl PackGroup<'_> {
    #[inline(always)]
    fn pack<S: Simd, const PIECES: usize>(self, s: S) {
        let PackGroup { x, stride, cols, tokens, to, .. } = self;
        let shape = Shape::new(PIECES * tokens);
        let width = shape.width();
        // The columns of a step, those beyond the tokens always 0.
        let mut columns = [[0.0; SIDE]; COLUMNS];
        let mut tile = [[0.0; SIDE]; SIDE];
        let steps = to.chunks_exact_mut(SIDE * shape.columns()).zip((0..cols).step_by(STEP));
        for (to, col) in steps {
            for t in 0..tokens {
                let from = &x[t * stride + col..t * stride + cols.min(col + STEP)];
                let mut x = [0.0; STEP];
                match <&[f32; STEP]>::try_from(from) {
                    Ok(whole) => x = *whole,
                    Err(_) => x[..from.len()].copy_from_slice(from),
                }
                let mut pairs = [[0.0; SIDE]; PIECES];
                for i in 0..SIDE {
                    let (low, high) = (split::<PIECES>(x[2 * i]), split::<PIECES>(x[2 * i + 1]));
                    for p in 0..PIECES {
                        pairs[p][i] = f32::from_bits(low[p] >> 16 | high[p]);
                    }
                }
                for p in 0..PIECES {
                    columns[p * tokens + t] = pairs[p];
                }
            }
            let columns = columns.as_chunks().0;
            if width == SIDE {
                let tiles = to.as_chunks_mut().0.as_chunks_mut().0;
                tiles.iter_mut().zip(columns).for_each(|(to, columns)| transpose(s, columns, to));
                continue;
            }
            transpose(s, &columns[0], &mut tile);
            for (to, row) in to.chunks_exact_mut(width).zip(&tile) {
                to.copy_from_slice(&row[..width]);
            }
        }
    }
}

/// `to` = the transpose of `from`.
#[inline(always)]
fn transpose<S: Simd>(s: S, from: &[[f32; SIDE]; SIDE], to: &mut [[f32; SIDE]; SIDE]) {
    for row in (0..SIDE).step_by(S::LANES) {
        for col in (0..SIDE).step_by(S::LANES) {
            let block = s.transpose(s.block(|i| s.load(&from[row + i][col..])));
            for_each_vector!(S::LANES, j, s.store(block.as_ref()[j], &mut to[col + j][row..]));
        }
    }
}

/// totals += factor · sums.
#[inline(always)]
fn add_scaled<S: Simd>(s: S, factor: f32, sums: &[f32], totals: &mut [f32]) {
    let whole = sums.len() - sums.len() % S::LANES;
    for lane in (0..whole).step_by(S::LANES) {
        let total = s.fma(s.splat(factor), s.load(&sums[lane..]), s.load(&totals[lane..]));
        s.store(total, &mut totals[lane..]);
    }
    for (total, sum) in totals[whole..].iter_mut().zip(&sums[whole..]) {
        *total = sum.mul_add(factor, *total);
    }
}

/// Some rows of W times some groups of tokens.
struct Work<'a> {
    amx: Amx,
    x: &'a [f32],
    groups: Groups,
    w: Source<'a>,
    scales: Option<BlockScales<'a>>,
    out: Columns<'a>,
    accumulate: bool,
    rows: Range<usize>,
    range: Range<usize>,
}

impl Task for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let steps = self.w.cols().div_ceil(STEP);
        // A block that is all columns is scaled piece by piece.
        let most = match self.scales {
            Some(scales) if scales.cols < self.w.cols() => scales.cols / STEP,
            _ => SPAN,
        };
        // Sums of a tile of rows and group, `[ROWS, columns]`: of every one where they are continued later. A vector may be
        // read behind the last.
        let each = ROWS * COLUMNS;
        let firsts = self.rows.clone().step_by(ROWS);
        let kept = if steps > most { firsts.len() * self.range.len() } else { 1 };
        let mut sums = Scratch::take(kept * each + SIDE);
        // Sums of a block of columns, before they are scaled.
        let mut block = Scratch::take(if self.scales.is_some() { each } else { 0 });
        let mut panel = Scratch::take(steps.min(most) * ROWS * SIDE);
        for span in (0..steps).step_by(most) {
            let end = steps.min(span + most);
            let mut starts = (0..kept).map(|i| i * each).cycle();
            for first in firsts.clone() {
                let rows = self.rows_of(first, span..end, &mut panel);
                for (g, start) in self.range.clone().zip(&mut starts) {
                    let total = &mut sums[start..start + each];
                    if let Some(scales) = self.scales {
                        if span == 0 {
                            total.fill(0.0);
                        }
                        let block = &mut block[..ROWS * self.groups.shape(g).columns()];
                        self.multiply(rows, [first, g, span], false, block);
                        self.scale(s, scales, [first, span], block, total);
                    } else {
                        self.multiply(rows, [first, g, span], span > 0, total);
                    }
                    if end == steps {
                        self.settle(s, first, g, &sums[start..start + each + SIDE]);
                    }
                }
            }
        }
    }
}

impl<'a> Work<'a> {
    /// Some steps of the rows from `first` on: as stored, then packed into `panel`. Whole steps of as many rows are used as
    /// they are stored: a copy costs more than it saves.
    fn rows_of<'p>(&self, first: usize, steps: Range<usize>, panel: &'p mut [f32]) -> [Rows<'p>; 2]
    where
        'a: 'p,
    {
        let is_whole = first + ROWS <= self.rows.end;
        let stored =
            if is_whole { steps.end.min(self.w.cols() / STEP).max(steps.start) } else { steps.start };
        let panel = bytemuck::cast_slice_mut(&mut panel[..(steps.end - stored) * ROWS * SIDE]);
        self.pack(first, stored * STEP, panel);
        let bytes =
            if stored > steps.start { &self.w.bytes(first, ROWS)[2 * steps.start * STEP..] } else { &[] };
        [Rows::stored(bytes, self.w.stride(), stored - steps.start), Rows::packed(panel)]
    }

    /// sums = or, where `accumulate`, += `rows`, from row `first` and step `span` of W on, times group `g`.
    fn multiply(
        &self,
        rows: [Rows<'_>; 2],
        [first, g, span]: [usize; 3],
        accumulate: bool,
        sums: &mut [f32],
    ) {
        let (shape, steps) = (self.groups.shape(g), self.w.cols().div_ceil(STEP));
        let each = SIDE * shape.columns();
        let x = &self.x[g * steps * Groups::STEP + span * each..];
        let [stored, packed] = rows;
        let ahead = self.ahead(first, span, g - self.range.start, &shape);
        self.amx.multiply(&shape, stored, ahead, x, accumulate, sums);
        if packed.steps() > 0 {
            self.amx.multiply(&shape, packed, None, &x[stored.steps() * each..], true, sums);
        }
    }

    /// What the `i`-th group fetches: the rows that are used next, half of them beside each of the first two groups. Few
    /// tokens leave long rows to the processor, which fetches by itself what comes behind in the same page.
    fn ahead(&self, first: usize, span: usize, i: usize, shape: &Shape) -> Option<Ahead> {
        let stride = self.w.stride();
        let several = self.range.len() > 1 && shape.columns() == COLUMNS;
        if first + ROWS >= self.w.rows() || i > 1 || (stride > PAGE && !several) {
            return None;
        }
        let offset = (ROWS + i * SIDE) * stride + 2 * span * STEP;
        Some(Ahead { start: self.w.bytes(first, 1).as_ptr().wrapping_add(offset), stride })
    }

    /// totals += the sums `[ROWS, columns]` of the columns of W from a step on, times the factors of the rows from `first` on.
    #[inline(always)]
    fn scale<S: Simd>(
        &self,
        s: S,
        scales: BlockScales<'_>,
        [first, step]: [usize; 2],
        sums: &[f32],
        totals: &mut [f32],
    ) {
        let (per_row, block) = (self.w.cols().div_ceil(scales.cols), step * STEP / scales.cols);
        let columns = sums.len() / ROWS;
        let rows = first..self.rows.end.min(first + ROWS);
        let factor = |row: usize| scales.factors[row * per_row + block];
        // Mostly all rows share one.
        if rows.clone().all(|row| factor(row) == factor(first)) {
            return add_scaled(s, factor(first), sums, totals);
        }
        let lines = sums.chunks_exact(columns).zip(totals.chunks_exact_mut(columns));
        for (row, (sums, totals)) in rows.zip(lines) {
            add_scaled(s, factor(row), sums, totals);
        }
    }

    /// Rows of W from `first` on as `[steps, ROWS, STEP]` bf16 values, from column `col` on; 0 where there are none.
    fn pack(&self, first: usize, col: usize, panel: &mut [u8]) {
        const WIDTH: usize = 2 * STEP;
        panel.fill(0);
        for row in first..self.rows.end.min(first + ROWS) {
            let values = self.w.bytes(row, 1)[2 * col..].chunks(WIDTH);
            for (step, from) in panel.chunks_exact_mut(ROWS * WIDTH).zip(values) {
                step[(row - first) * WIDTH..][..from.len()].copy_from_slice(from);
            }
        }
    }

    /// Adds the sums of the pieces, the smallest first, and writes them to the result.
    #[inline(always)]
    fn settle<S: Simd>(&self, s: S, first: usize, g: usize, sums: &[f32]) {
        let (columns, tokens) = (self.groups.shape(g).columns(), self.groups.size(g));
        let start = self.groups.start(g);
        for row in (first..self.rows.end.min(first + ROWS)).step_by(S::LANES) {
            let rows = S::LANES.min(self.rows.end - row);
            for token in (0..tokens).step_by(S::LANES) {
                let sums = &sums[(row - first) * columns + token..];
                // Lanes behind the last token hold something else, and are not used.
                let mut block = s.block(|i| s.load(&sums[i * columns..]));
                if self.groups.pieces == 3 {
                    let rest = &sums[tokens..];
                    for_each_vector!(S::LANES, i, {
                        let (middle, low) =
                            (s.load(&rest[i * columns..]), s.load(&rest[i * columns + tokens..]));
                        block.as_mut()[i] = s.add(block.as_ref()[i], s.add(middle, low));
                    });
                }
                let block = s.transpose(block);
                let count = S::LANES.min(tokens - token);
                for_each_vector!(S::LANES, t, {
                    if t < count {
                        // SAFETY: pieces of work do not overlap, and this is the only view of it.
                        let out = unsafe { self.out.row(start + token + t, row, rows) };
                        add(s, block.as_ref()[t], !self.accumulate, out);
                    }
                });
            }
        }
    }
}
