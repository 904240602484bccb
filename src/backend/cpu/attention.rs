//! Rotary embedding and causal attention.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Product, Scratch, Source, WeightedRows};
use super::simd::Isa;
use super::softmax::Softmax;
use crate::architecture::{Pairing, Rope};
use crate::backend::{AttentionShape, Batch, HeadLayout, Keys};
use crate::checkpoint::Dtype;

/// Cosines and sines for every position.
#[derive(Clone, Debug)]
pub struct CpuRotation {
    pairing: Pairing,
    half: usize,
    usual: Table,
    /// For windows longer than this.
    long: Option<(usize, Table)>,
}

/// `[length, dim / 2]` each.
#[derive(Clone, Debug)]
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    fn new(inverse_frequencies: &[f32], magnitude: f32, length: usize) -> Self {
        // Angles in f32, as the models were trained with.
        let angles = (0..length).flat_map(|p| inverse_frequencies.iter().map(move |f| p as f32 * f));
        let (sin, cos) = angles.map(|a| (a.sin() * magnitude, a.cos() * magnitude)).unzip();
        Table { cos, sin }
    }
}

impl CpuRotation {
    pub(super) fn new(rope: &Rope, length: usize) -> Self {
        let long = rope.long.as_ref().filter(|long| length > long.positions);
        CpuRotation {
            pairing: rope.pairing,
            half: rope.inverse_frequencies.len(),
            usual: Table::new(&rope.inverse_frequencies, rope.magnitude, length),
            long: long.map(|l| (l.positions, Table::new(&l.inverse_frequencies, l.magnitude, length))),
        }
    }

    /// The table for windows of `length` tokens.
    fn table(&self, length: usize) -> &Table {
        match &self.long {
            Some((positions, table)) if length > *positions => table,
            _ => &self.usual,
        }
    }
}

pub(super) fn rotate(x: &mut CpuBuffer, rotation: &CpuRotation, heads: HeadLayout, batch: &Batch) {
    let half = rotation.half;
    let table = rotation.table(batch.length);
    let rows = x.data.par_chunks_exact_mut(x.cols).enumerate().with_min_len(16);
    rows.for_each(|(t, row)| {
        let position = t % batch.length;
        let cos = &table.cos[position * half..(position + 1) * half];
        let sin = &table.sin[position * half..(position + 1) * half];
        for h in 0..heads.heads {
            let start = heads.start + h * heads.stride;
            let head = &mut row[start..start + 2 * half];
            for i in 0..half {
                let (a, b) = match rotation.pairing {
                    Pairing::Halves => (i, i + half),
                    Pairing::Adjacent => (2 * i, 2 * i + 1),
                };
                let (p, q) = (head[a], head[b]);
                head[a] = p * cos[i] - q * sin[i];
                head[b] = q * cos[i] + p * sin[i];
            }
        }
    });
}

/// Queries that share one block of scores.
const QUERY_BLOCK: usize = 64;

/// One piece of work per window, block of queries and head. A query's result does not depend on the queries that share
/// its block: what it sees is summed in the same order, and what it does not see has weight 0.
pub(super) fn attend(
    query: &CpuBuffer,
    keys: &Keys<'_, CpuBuffer>,
    sinks: Option<&[f32]>,
    shape: AttentionShape,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let length = batch.length;
    let blocks = length.div_ceil(QUERY_BLOCK);
    let (rows, cols) = (out.rows, out.cols);
    let out = Columns::new(&mut out.data, rows, cols, cols);
    // Later blocks see more keys and go first, lest the longest piece be the last.
    (0..batch.windows * blocks * shape.heads).into_par_iter().for_each(|i| {
        let (block, i) = (blocks - 1 - i % blocks, i / blocks);
        let (head, window) = (i % shape.heads, i / shape.heads);
        let first_query = block * QUERY_BLOCK;
        let queries = QUERY_BLOCK.min(length - first_query);
        let block = Block { first_row: window * length, first_query, queries };
        let target =
            out.part(window * length + first_query, queries, head * shape.value_dim, shape.value_dim);
        let sink = sinks.map(|s| s[head]);
        block.attend_head(head, query, keys, sink, shape, batch, target);
    });
}

/// Some consecutive queries of one window.
struct Block {
    /// Row of the window's first token.
    first_row: usize,
    /// Position of the first query in the window.
    first_query: usize,
    queries: usize,
}

impl Block {
    fn attend_head(
        &self,
        head: usize,
        query: &CpuBuffer,
        keys: &Keys<'_, CpuBuffer>,
        sink: Option<f32>,
        shape: AttentionShape,
        batch: &Batch,
        out: Columns<'_>,
    ) {
        let Block { first_row, first_query, queries } = *self;
        let isa = Isa::current();
        // Keys that at least one query of the block sees.
        let key_start = shape.span.first(first_query);
        let key_count = first_query + queries - key_start;
        let key_row = first_row + key_start;
        let mut scores = Scratch::take(queries * key_count);
        // Queries times some columns of the keys: `col ..` of the head's query, `key_col ..` of the key.
        let mut score = |key: &CpuBuffer, key_col: usize, col: usize, width: usize, accumulate: bool| {
            let start = (first_row + first_query) * query.cols + head * shape.query_dim + col;
            let w = &key.data[key_row * key.cols + key_col..];
            Product {
                x: &query.data[start..],
                stride: query.cols,
                w: Source::strided(bytemuck::cast_slice(w), Dtype::F32, key_count, width, key.cols),
                out: Columns::new(&mut scores, queries, key_count, key_count),
                accumulate,
            }
            .run_here(isa);
        };
        let (value, value_col) = match *keys {
            Keys::Grouped { key, value, kv_heads } => {
                let kv = head / (shape.heads / kv_heads);
                score(key, kv * shape.query_dim, 0, shape.query_dim, false);
                (value, kv * shape.value_dim)
            }
            Keys::Latent { expanded, shared, rope_start, nope_dim } => {
                let start = head * (nope_dim + shape.value_dim);
                score(expanded, start, 0, nope_dim, false);
                score(shared, rope_start, nope_dim, shape.query_dim - nope_dim, true);
                (expanded, start + nope_dim)
            }
        };
        for (i, row) in scores.chunks_exact_mut(key_count).enumerate() {
            let position = first_query + i;
            let first = shape.span.first(position) - key_start;
            let end = position + 1 - key_start;
            row[..first].fill(0.0);
            row[end..].fill(0.0);
            let visible = &mut row[first..end];
            if let Some(mask) = &batch.mask {
                for (score, real) in visible.iter_mut().zip(&mask[key_row + first..]) {
                    *score = if *real { *score } else { f32::NEG_INFINITY };
                }
            }
            let temperature = shape.temperature.map_or(1.0, |t| t.at(position));
            isa.run(Softmax { scores: visible, scale: shape.scale * temperature, sink });
        }
        isa.run(WeightedRows {
            weights: &scores,
            count: key_count,
            rows: &value.data[key_row * value.cols + value_col..],
            stride: value.cols,
            first: key_start,
            out,
        });
    }
}
