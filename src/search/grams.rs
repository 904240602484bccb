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
use crate::plan::Loss;

/// Tokens that one thread works on at a time; fixed, so that sums do not depend on the number of threads.
const SEGMENT: usize = 256;

/// Candidates that one thread works on at a time.
const SLICE: usize = 32;

/// Everything about one layer that its losses depend on.
pub(super) struct LayerGrams {
    rule: Rule,
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
            sums.add(block.batch, &self.squares(&block.tokens, grams, &masks));
        }
        Ok(sums.finish())
    }

    /// Σ ‖D‖² over the tokens of a block, for every mask.
    fn squares(&self, tokens: &Tokens, grams: &[f32], masks: &[Mask]) -> Vec<f64> {
        let (segments, slices) = (tokens.count.div_ceil(SEGMENT), masks.len().div_ceil(SLICE));
        let part = |i: usize| {
            let (first, slice) = (i / slices * SEGMENT, i % slices * SLICE);
            let masks = &masks[slice..masks.len().min(slice + SLICE)];
            let mut sums = vec![0.0; masks.len()];
            let mut work = Work::default();
            for t in first..tokens.count.min(first + SEGMENT) {
                let gram = &grams[t * self.size()..(t + 1) * self.size()];
                for (sum, mask) in sums.iter_mut().zip(masks) {
                    *sum += self.square(tokens, t, gram, mask, &mut work);
                }
            }
            sums
        };
        let parts: Vec<Vec<f64>> = (0..segments * slices).into_par_iter().map(part).collect();
        let mut squares = vec![0.0; masks.len()];
        for (i, part) in parts.iter().enumerate() {
            let slice = i % slices * SLICE;
            squares[slice..].iter_mut().zip(part).for_each(|(square, sum)| *square += sum);
        }
        squares
    }

    /// ‖Σ cⱼ fⱼ‖² of one token, the extra vector with coefficient 1.
    fn square(&self, tokens: &Tokens, t: usize, gram: &[f32], mask: &Mask, work: &mut Work) -> f64 {
        let (ids, weights) = self.rule.original(tokens, t);
        let extra = self.vectors > self.rule.experts();
        work.vectors.clear();
        match self.rule.choose(tokens, t, mask, &mut work.choices) {
            Change::None => {}
            Change::Scaled(factor) => {
                let pairs = ids.iter().zip(weights);
                work.vectors.extend(pairs.map(|(id, w)| (usize::from(*id), w - factor * w)));
            }
            Change::Other => {
                work.vectors.extend(ids.iter().zip(weights).map(|(id, w)| (usize::from(*id), *w)));
                for (id, a) in work.choices.ids.iter().zip(&work.choices.weights) {
                    let id = usize::from(*id);
                    match work.vectors.iter_mut().find(|(other, _)| *other == id) {
                        Some((_, c)) => *c -= a,
                        None => work.vectors.push((id, -a)),
                    }
                }
            }
        }
        if extra {
            work.vectors.push((self.rule.experts(), 1.0));
        }
        let entry = |a: usize, b: usize| {
            let (high, low) = (a.max(b), a.min(b));
            f64::from(gram[high * (high + 1) / 2 + low])
        };
        let mut square = 0.0;
        for (i, &(a, c)) in work.vectors.iter().enumerate() {
            if c != 0.0 {
                let cross: f64 = work.vectors[..i].iter().map(|&(b, d)| d * entry(a, b)).sum();
                square += c * (c * entry(a, a) + 2.0 * cross);
            }
        }
        square.max(0.0)
    }
}

/// What [`LayerGrams::square`] works with.
#[derive(Default)]
struct Work {
    choices: Choices,
    /// Vectors and their coefficients.
    vectors: Vec<(usize, f64)>,
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
