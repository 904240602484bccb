//! out = x · Wᵀ for W in its stored type, row-major and possibly unaligned.
//!
//! Every element of the result is summed alike, whatever kernel computes it: for each block of [`DEPTH`] columns one
//! chain of fused multiply-adds in column order that starts at 0, and the blocks added in order. So a value depends on
//! its row of x and its row of W alone, not on the other rows, the number of threads, or which instructions with fused
//! multiply-add do the work. That is possible because vectors run along the rows of W: W is transposed on the fly.
//!
//! Two kernels share the work. Few tokens: [`stream`] reads W once, transposes blocks in registers and uses them there.
//! Many tokens: [`panel`] widens and transposes a tile of W into scratch memory and multiplies all tokens by it.
//!
//! With [`Isa::Amx`] products with bf16 matrices are those of [`tiled`], which are summed in another order.
//!
//! Where [`Isa::rounds`], two bf16 columns of W are one column of pairs, x is rounded to pairs as well, and products of
//! pairs take the place of products. All else is the same, except that the result is not the other instructions' one.

/// Runs `$body` for every vector `$j` of a block, unrolled: the blocks must stay in registers.
macro_rules! for_each_vector {
    ($lanes:expr, $j:ident, $body:expr) => {
        for_each_vector!(@ $lanes, $j, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $lanes:expr, $j:ident, $body:expr, $($i:literal)*) => {
        $(if $i < $lanes {
            let $j: usize = $i;
            $body
        })*
    };
}

mod columns;
mod panel;
mod scratch;
mod source;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiled;
mod weighted;

use rayon::prelude::*;

pub(super) use columns::Columns;
pub(super) use scratch::Scratch;
pub(super) use source::Source;
#[cfg(target_arch = "x86_64")]
pub(super) use tiled::{BlockScales, TiledInput};
pub(super) use weighted::WeightedRows;

use super::simd::{Isa, Simd, Task};
use source::{Bf16, Bf16Pair, Element, F16, F32, Kind};

use crate::checkpoint::Dtype;

/// Columns that are summed in one chain: long enough to cost nothing, short enough to keep rounding errors small. Part
/// of the definition of the result.
pub(super) const DEPTH: usize = 64;

/// Multiplications below which a product is not worth sharing.
const SMALL: usize = 1 << 15;

/// Whether a product of so many multiplications is shared among the threads of the current rayon pool.
pub(super) fn is_shared(multiplications: usize) -> bool {
    multiplications > SMALL && rayon::current_num_threads() > 1
}

/// The rows of x, packed for the kernels: tokens in groups of [`Groups::size`] values, each group `[cols, tokens]`.
#[derive(Clone, Copy)]
struct Packed<'a> {
    values: &'a [f32],
    cols: usize,
    groups: Groups,
}

/// How tokens are cut into groups that a kernel keeps in registers: as equal as possible.
#[derive(Clone, Copy)]
struct Groups {
    tokens: usize,
    count: usize,
}

impl Groups {
    fn new(tokens: usize, most: usize) -> Self {
        Groups { tokens, count: tokens.div_ceil(most) }
    }

    /// First token of group `g`.
    fn start(self, g: usize) -> usize {
        g * self.tokens / self.count
    }

    fn size(self, g: usize) -> usize {
        self.start(g + 1) - self.start(g)
    }

    /// Size of the largest group.
    fn largest(self) -> usize {
        self.tokens.div_ceil(self.count)
    }
}

impl<'a> Packed<'a> {
    /// Values of group `g`, from column `col` on.
    #[inline(always)]
    fn group(&self, g: usize, col: usize) -> &'a [f32] {
        let (start, size) = (self.groups.start(g), self.groups.size(g));
        &self.values[start * self.cols + col * size..(start + size) * self.cols]
    }
}

/// `to [cols, tokens]` = the transpose of `tokens` rows; fast where these are no more than a vector has lanes.
struct PackGroup<'a> {
    rows: &'a [f32],
    stride: usize,
    tokens: usize,
    to: &'a mut [f32],
}

impl Task for PackGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let PackGroup { rows, stride, tokens, to } = self;
        let cols = to.len() / tokens;
        let whole = if tokens <= S::LANES { cols - cols % S::LANES } else { 0 };
        if whole > 0 {
            let source = Source::strided(bytemuck::must_cast_slice(rows), Dtype::F32, tokens, cols, stride);
            let group = source.group::<S, F32>(0, 0..cols);
            for col in (0..whole).step_by(S::LANES) {
                let block = group.block::<S, F32>(s, col);
                for_each_vector!(S::LANES, j, {
                    // What a vector holds beyond the tokens is overwritten by the next ones.
                    let to = &mut to[(col + j) * tokens..];
                    let count = if to.len() < S::LANES { tokens } else { S::LANES };
                    stream::store_part(s, block.as_ref()[j], &mut to[..count]);
                });
            }
        }
        for col in whole..cols {
            for t in 0..tokens {
                to[col * tokens + t] = rows[t * stride + col];
            }
        }
    }
}

/// `out [n, rows] = x [n, cols] · Wᵀ`.
pub(super) struct Product<'a> {
    /// The rows of x begin here, `stride` apart.
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    pub(super) w: Source<'a>,
    pub(super) out: Columns<'a>,
    /// Whether `out` keeps what it has and the product is added to it.
    pub(super) accumulate: bool,
}

impl Product<'_> {
    /// Computes it on the threads of the current rayon pool.
    pub(super) fn run(self, isa: Isa) {
        let parallel = is_shared(self.out.rows() * self.w.rows() * self.w.cols());
        self.compute(isa, parallel);
    }

    /// Computes it on this thread alone.
    pub(super) fn run_here(self, isa: Isa) {
        self.compute(isa, false);
    }

    fn compute(self, isa: Isa, parallel: bool) {
        let Product { x, stride, w, out, accumulate } = self;
        let (n, rows, cols) = (out.rows(), w.rows(), w.cols());
        assert_eq!(out.cols(), rows, "columns of a product");
        if n == 0 || rows == 0 {
            return;
        }
        if cols == 0 {
            if !accumulate {
                // SAFETY: nobody else uses `out` yet.
                (0..n).for_each(|t| unsafe { out.row(t, 0, rows) }.fill(0.0));
            }
            return;
        }
        assert!((n - 1) * stride + cols <= x.len(), "rows of x");
        #[cfg(target_arch = "x86_64")]
        if w.kind() == Kind::Bf16
            && let Some(x) = TiledInput::new(isa, x, stride, (n, cols), parallel)
        {
            return x.multiply(w, None, out, accumulate, parallel);
        }
        if let (true, Some(w)) = (isa.rounds(), w.pairs()) {
            let cols = w.cols();
            let mut pairs = Scratch::take(n * cols);
            let round = |(to, x): (&mut [f32], &[f32])| round_pairs(&x[..2 * cols], to);
            if parallel {
                let rows = pairs.par_chunks_exact_mut(cols).zip(x.par_chunks(stride));
                rows.with_min_len(SMALL.div_ceil(cols)).for_each(round);
            } else {
                pairs.chunks_exact_mut(cols).zip(x.chunks(stride)).for_each(round);
            }
            return Product { x: &pairs, stride: cols, w, out, accumulate }.multiply(isa, parallel);
        }
        self.multiply(isa, parallel);
    }

    fn multiply(self, isa: Isa, parallel: bool) {
        let Product { x, stride, w, out, accumulate } = self;
        let (n, cols) = (out.rows(), w.cols());
        let cut = isa.run(Shape { n });
        let groups = Groups::new(n, cut.group);
        let mut memory;
        let values = if n == 1 {
            &x[..cols]
        } else {
            memory = Scratch::take(n * cols);
            pack(isa, x, stride, cols, groups, parallel, &mut memory);
            &memory
        };
        let x = Packed { values, cols, groups };
        let tiles = Tiles::new(cut, &w, groups, parallel);
        let tile = |i: usize| {
            let tile = Tile { streamed: cut.streamed, x, w, out, accumulate, range: tiles.get(i) };
            if w.kind() == Kind::Bf16Pair { isa.run_bf16(PairTile(tile)) } else { isa.run(tile) }
        };
        if parallel {
            (0..tiles.len()).into_par_iter().for_each(tile);
        } else {
            (0..tiles.len()).for_each(tile);
        }
    }
}

/// Every two values rounded to bf16 as the bits of one, the first in the low half.
fn round_pairs(x: &[f32], to: &mut [f32]) {
    for (x, to) in x.chunks_exact(2).zip(to) {
        let [low, high] = [x[0], x[1]].map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
        *to = f32::from_bits(high << 16 | low);
    }
}

fn pack(isa: Isa, x: &[f32], stride: usize, cols: usize, groups: Groups, parallel: bool, to: &mut [f32]) {
    let to = Columns::new(to, 1, groups.tokens * cols, groups.tokens * cols);
    let pack = |g: usize| {
        let (start, size) = (groups.start(g), groups.size(g));
        // SAFETY: groups do not overlap, and each is packed once.
        let to = unsafe { to.row(0, start * cols, size * cols) };
        isa.run(PackGroup { rows: &x[start * stride..], stride, tokens: size, to });
    };
    if parallel && groups.tokens * cols > SMALL {
        (0..groups.count).into_par_iter().for_each(pack);
    } else {
        (0..groups.count).for_each(pack);
    }
}

/// Which kernel computes `n` tokens, and how it cuts them and the rows of W.
struct Shape {
    n: usize,
}

#[derive(Clone, Copy)]
struct Cut {
    streamed: bool,
    /// Tokens of a group.
    group: usize,
    /// Smallest number of rows of W in a tile.
    step: usize,
}

impl Task for Shape {
    type Output = Cut;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Cut {
        if self.n <= S::STREAM_TOKENS {
            Cut { streamed: true, group: S::STREAM_TOKENS, step: 4 * S::LANES }
        } else {
            Cut { streamed: false, group: S::PANEL_TOKENS, step: 2 * S::LANES }
        }
    }
}

/// A grid of tiles: ranges of rows of W times ranges of token groups.
struct Tiles {
    rows: usize,
    tile_rows: usize,
    groups: usize,
    tile_groups: usize,
}

/// Rows of W and token groups of one tile.
struct Range {
    rows: std::ops::Range<usize>,
    groups: std::ops::Range<usize>,
}

impl Tiles {
    /// Most rows of W in a tile: `ROWS · DEPTH` values of W stay in the second-level cache.
    const ROWS: usize = 128;
    /// Fewest token groups for which it pays to transpose a tile of W once more.
    const GROUPS: usize = 8;

    fn new(cut: Cut, w: &Source<'_>, groups: Groups, parallel: bool) -> Self {
        let rows = w.rows();
        let wanted = if parallel { 4 * rayon::current_num_threads() } else { 1 };
        let even = rows.div_ceil(wanted).next_multiple_of(cut.step);
        let most = if cut.streamed { cut.step } else { Tiles::ROWS.next_multiple_of(cut.step) };
        let tile_rows = even.clamp(cut.step, most);
        let in_rows = rows.div_ceil(tile_rows);
        let tile_groups =
            groups.count.div_ceil(wanted.div_ceil(in_rows)).max(Tiles::GROUPS).min(groups.count);
        Tiles { rows, tile_rows, groups: groups.count, tile_groups }
    }

    fn in_groups(&self) -> usize {
        self.groups.div_ceil(self.tile_groups)
    }

    fn len(&self) -> usize {
        self.rows.div_ceil(self.tile_rows) * self.in_groups()
    }

    fn get(&self, i: usize) -> Range {
        let (r, g) = (i / self.in_groups() * self.tile_rows, i % self.in_groups() * self.tile_groups);
        Range {
            rows: r..(r + self.tile_rows).min(self.rows),
            groups: g..(g + self.tile_groups).min(self.groups),
        }
    }
}

/// One tile of a product.
struct Tile<'a> {
    streamed: bool,
    x: Packed<'a>,
    w: Source<'a>,
    out: Columns<'a>,
    accumulate: bool,
    range: Range,
}

impl Task for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.w.kind() {
            Kind::F32 => self.run_as::<S, F32>(s),
            Kind::Bf16 => self.run_as::<S, Bf16>(s),
            Kind::F16 => self.run_as::<S, F16>(s),
            Kind::Bf16Pair => unreachable!("another task"),
        }
    }
}

/// One tile of a product with pairs of bf16 columns.
struct PairTile<'a>(Tile<'a>);

impl Task for PairTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run_as::<S, Bf16Pair>(s);
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(self, s: S) {
        if self.streamed {
            stream::tile::<S, E>(s, &self);
        } else {
            panel::tile::<S, E>(s, &self);
        }
    }
}
