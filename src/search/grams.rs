//! Losses of dropping experts, from the inner products of all experts' outputs for every token.
//!
//! With the weights w that the router gives and the weights a that it would give, both zero for experts that are not
//! chosen, the routed output of a token moves by Σ cⱼ fⱼ, c = w − a, and the square of that is cᵀ G c with
//! G = (⟨fᵢ, fⱼ⟩). So once every expert has run on every token, a candidate costs no product of matrices.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use rayon::prelude::*;

use super::rule::{Change, Choices, Mask, Rule, Tokens};
use super::table::{Table, TableWork, Token};
use crate::plan::Loss;

/// Tokens that one thread works on at a time; fixed, so that sums do not depend on the number of threads.
const SEGMENT: usize = 256;

/// Candidates that one thread works on at a time, one by one and by a table of outcomes.
const SLICE: usize = 32;
const TABLE_SLICE: usize = 4096;

/// Everything about one layer that its losses depend on.
pub(super) struct LayerGrams {
    pub(super) rule: Rule,
    /// Vectors per token: experts, and one more where inputs differ from the original's.
    vectors: usize,
    blocks: Vec<Block>,
    /// Bytes in memory, and most of them.
    held: u64,
    memory: u64,
    overflow: Option<File>,
}

/// Consecutive tokens of one loss batch.
struct Block {
    batch: usize,
    tokens: Tokens,
    gram: Gram,
}

/// Packed triangles, `[tokens, vectors · (vectors + 1) / 2]`.
enum Gram {
    Memory(Vec<f32>),
    /// From this byte of the overflow file on.
    File(u64),
}

impl LayerGrams {
    /// For a layer without any token. Triangles beyond `memory` bytes go to a file.
    pub(super) fn new(rule: Rule, extra: bool, memory: u64) -> Self {
        let vectors = rule.experts() + usize::from(extra);
        LayerGrams { rule, vectors, blocks: Vec::new(), held: 0, memory, overflow: None }
    }

    /// Values in a token's triangle.
    fn size(&self) -> usize {
        self.vectors * (self.vectors + 1) / 2
    }

    /// Adds tokens of loss batch `batch`: their logits `[tokens, experts]` and triangles. `path` is where an overflow
    /// file may be made.
    pub(super) fn push(
        &mut self,
        batch: usize,
        logits: &[f32],
        grams: Vec<f32>,
        path: &Path,
    ) -> io::Result<()> {
        let mut tokens = Tokens::default();
        let mut work = Choices::default();
        for logits in logits.chunks_exact(self.rule.experts()) {
            self.rule.push(&mut tokens, logits, &mut work);
        }
        let bytes = grams.len() as u64 * 4;
        let gram = if self.held + bytes <= self.memory {
            self.held += bytes;
            Gram::Memory(grams)
        } else {
            if self.overflow.is_none() {
                let made = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
                self.overflow = Some(made);
            }
            let Some(file) = &mut self.overflow else { return Ok(()) };
            let start = file.seek(SeekFrom::End(0))?;
            file.write_all(bytemuck::cast_slice(&grams))?;
            Gram::File(start)
        };
        self.blocks.push(Block { batch, tokens, gram });
        Ok(())
    }

    /// The loss of every set of dropped experts.
    pub(super) fn losses(&self, dropped: &[Vec<usize>]) -> io::Result<Vec<Loss>> {
        let masks: Vec<Mask> = dropped.iter().map(|set| self.rule.mask(set)).collect();
        let table = self.table(&masks);
        let mut sums = Sums::new(masks.len());
        let mut loaded = Vec::new();
        for block in &self.blocks {
            let grams = match &block.gram {
                Gram::Memory(grams) => grams,
                Gram::File(start) => {
                    loaded.resize(block.tokens.count * self.size(), 0.0);
                    if let Some(mut file) = self.overflow.as_ref() {
                        file.seek(SeekFrom::Start(*start))?;
                        file.read_exact(bytemuck::cast_slice_mut(&mut loaded))?;
                    }
                    &loaded
                }
            };
            sums.add(block.batch, &self.squares(&block.tokens, grams, &masks, table.as_ref()));
        }
        Ok(sums.finish())
    }

    /// Σ ‖D‖² over the tokens of a block, for every mask.
    fn squares(&self, tokens: &Tokens, grams: &[f32], masks: &[Mask], table: Option<&Table>) -> Vec<f64> {
        let at_once = if table.is_some() { TABLE_SLICE } else { SLICE };
        let (segments, slices) = (tokens.count.div_ceil(SEGMENT), masks.len().div_ceil(at_once));
        let part = |i: usize| {
            let (first, slice) = (i / slices * SEGMENT, i % slices * at_once);
            let masks = &masks[slice..masks.len().min(slice + at_once)];
            let mut sums = vec![0.0; masks.len()];
            let mut work = Work::default();
            for t in first..tokens.count.min(first + SEGMENT) {
                let gram = &grams[t * self.size()..(t + 1) * self.size()];
                if let Some(table) = table.filter(|_| !tokens.exact[t]) {
                    self.add_squares(Token { tokens, t, gram }, (masks, slice), table, &mut work, &mut sums);
                    continue;
                }
                for (sum, mask) in sums.iter_mut().zip(masks) {
                    *sum += self.square(tokens, t, gram, mask, &mut work);
                }
            }
            sums
        };
        let parts: Vec<Vec<f64>> = (0..segments * slices).into_par_iter().map(part).collect();
        let mut squares = vec![0.0; masks.len()];
        for (i, part) in parts.iter().enumerate() {
            let slice = i % slices * at_once;
            squares[slice..].iter_mut().zip(part).for_each(|(square, sum)| *square += sum);
        }
        squares
    }

    /// Squares by a table, where there is one, and by themselves.
    #[cfg(test)]
    pub(super) fn both_ways(&self, masks: &[Mask]) -> Vec<(f64, f64)> {
        let mut pairs = vec![(0.0, 0.0); masks.len()];
        for block in &self.blocks {
            let Gram::Memory(grams) = &block.gram else { continue };
            let table = self.table(masks);
            let with = self.squares(&block.tokens, grams, masks, table.as_ref());
            let without = self.squares(&block.tokens, grams, masks, None);
            pairs.iter_mut().zip(with.iter().zip(&without)).for_each(|(p, (a, b))| {
                p.0 += a;
                p.1 += b;
            });
        }
        pairs
    }

    /// The vector that is there whatever is chosen.
    pub(super) fn add_extra(&self, vectors: &mut Vec<(usize, f64)>) {
        if self.vectors > self.rule.experts() {
            vectors.push((self.rule.experts(), 1.0));
        }
    }

    /// ‖Σ cⱼ fⱼ‖² of one token, the extra vector with coefficient 1.
    fn square(&self, tokens: &Tokens, t: usize, gram: &[f32], mask: &Mask, work: &mut Work) -> f64 {
        let (ids, weights) = self.rule.original(tokens, t);
        work.vectors.clear();
        match self.rule.choose(tokens, t, mask, &mut work.choices) {
            Change::None => {}
            Change::Scaled(factor) => {
                let pairs = ids.iter().zip(weights);
                work.vectors.extend(pairs.map(|(id, w)| (usize::from(*id), w - factor * w)));
            }
            Change::Other => work.add_change(ids, weights),
        }
        self.add_extra(&mut work.vectors);
        quadratic(gram, &work.vectors)
    }
}

/// ‖Σ cⱼ fⱼ‖² for these vectors and coefficients.
pub(super) fn quadratic(gram: &[f32], vectors: &[(usize, f64)]) -> f64 {
    let mut square = 0.0;
    for (i, &(a, c)) in vectors.iter().enumerate() {
        if c != 0.0 {
            let cross: f64 = vectors[..i].iter().map(|&(b, d)| d * entry(gram, a, b)).sum();
            square += c * (c * entry(gram, a, a) + 2.0 * cross);
        }
    }
    square.max(0.0)
}

/// ⟨fₐ, f_b⟩ of a packed triangle.
pub(super) fn entry(gram: &[f32], a: usize, b: usize) -> f64 {
    let (high, low) = (a.max(b), a.min(b));
    f64::from(gram[high * (high + 1) / 2 + low])
}

/// What losses of tokens are computed with.
#[derive(Default)]
pub(super) struct Work {
    pub(super) choices: Choices,
    /// Vectors and their coefficients.
    pub(super) vectors: Vec<(usize, f64)>,
    pub(super) table: TableWork,
}

impl Work {
    /// The coefficients of a change from the experts `ids` with `weights` to what is chosen now.
    pub(super) fn add_change(&mut self, ids: &[u16], weights: &[f64]) {
        self.vectors.extend(ids.iter().zip(weights).map(|(id, w)| (usize::from(*id), *w)));
        for (id, a) in self.choices.ids.iter().zip(&self.choices.weights) {
            let id = usize::from(*id);
            match self.vectors.iter_mut().find(|(other, _)| *other == id) {
                Some((_, c)) => *c -= a,
                None => self.vectors.push((id, -a)),
            }
        }
    }
}

/// Squares of candidates, summed up over batches.
pub(super) struct Sums {
    batch: usize,
    current: Vec<f64>,
    losses: Vec<Loss>,
}

impl Sums {
    pub(super) fn new(candidates: usize) -> Self {
        Sums { batch: 0, current: vec![0.0; candidates], losses: vec![Loss::default(); candidates] }
    }

    /// Adds the squares of some tokens of loss batch `batch`; batches come in ascending order.
    pub(super) fn add(&mut self, batch: usize, squares: &[f64]) {
        if batch != self.batch {
            self.close();
            self.batch = batch;
        }
        self.current.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
    }

    fn close(&mut self) {
        for (loss, square) in self.losses.iter_mut().zip(&mut self.current) {
            loss.batch_sum += square.sqrt();
            loss.single += std::mem::take(square);
        }
    }

    pub(super) fn finish(mut self) -> Vec<Loss> {
        self.close();
        self.losses.iter().map(|l| Loss { single: l.single.sqrt(), ..*l }).collect()
    }
}
