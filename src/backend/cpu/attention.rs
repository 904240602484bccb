//! Rotary embedding and causal attention.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Product, Scratch, Source, WeightedRows};
use super::simd::Isa;
use super::softmax::Softmax;
use crate::architecture::{DynamicRope, Pairing, Rope};
use crate::backend::{AttentionShape, AttentionTerms, Batch, HeadLayout, Keys};
use crate::checkpoint::Dtype;

/// Cosines and sines for every position.
#[derive(Debug)]
pub struct CpuRotation {
    pairing: Pairing,
    half: usize,
    usual: Arc<Table>,
    /// For texts longer than this.
    long: Option<(usize, Arc<Table>)>,
    dynamic: Option<DynamicRope>,
    /// The last table that was made for the length of a text.
    recent: Mutex<Option<(usize, Arc<Table>)>>,
}

/// `[length, dim / 2]` each.
#[derive(Debug)]
struct Table {
    /// Position of the first row.
    first: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    fn new(inverse_frequencies: &[f32], magnitude: f32, positions: Range<usize>) -> Self {
        let first = positions.start;
        // Angles in f32, as the models were trained with.
        let angles = positions.flat_map(|p| inverse_frequencies.iter().map(move |f| p as f32 * f));
        let (sin, cos) = angles.map(|a| (a.sin() * magnitude, a.cos() * magnitude)).unzip();
        Table { first, cos, sin }
    }
}

impl CpuRotation {
    pub(super) fn new(rope: &Rope, length: usize) -> Self {
        let long = rope.long.as_ref().filter(|long| length > long.positions);
        let usual = rope.dynamic.map_or(length, |dynamic| length.min(dynamic.positions));
        let table = |inverse_frequencies: &[f32], magnitude, length| {
            Arc::new(Table::new(inverse_frequencies, magnitude, 0..length))
        };
        CpuRotation {
            pairing: rope.pairing,
            half: rope.inverse_frequencies.len(),
            usual: table(&rope.inverse_frequencies, rope.magnitude, usual),
            long: long.map(|l| (l.positions, table(&l.inverse_frequencies, l.magnitude, length))),
            dynamic: rope.dynamic,
            recent: Mutex::default(),
        }
    }

    /// A table that has the positions of `batch`.
    fn table(&self, batch: &Batch) -> Arc<Table> {
        let length = batch.text_length;
        match (&self.long, self.dynamic) {
            (Some((positions, table)), _) if length > *positions => table.clone(),
            (_, Some(dynamic)) if length > dynamic.positions => self.table_of_length(dynamic, batch),
            _ => self.usual.clone(),
        }
    }

    /// The table of a text whose length decides about it. All layers and heads ask for the same one after another.
    fn table_of_length(&self, dynamic: DynamicRope, batch: &Batch) -> Arc<Table> {
        let positions = batch.start..batch.start + batch.length;
        let fits =
            |table: &Table| table.first == positions.start && table.cos.len() == positions.len() * self.half;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        match &*recent {
            Some((length, table)) if *length == batch.text_length && fits(table) => table.clone(),
            _ => {
                let inverse_frequencies = dynamic.inverse_frequencies(2 * self.half, batch.text_length);
                let table = Arc::new(Table::new(&inverse_frequencies, 1.0, positions));
                *recent = Some((batch.text_length, table.clone()));
                table
            }
        }
    }
}

pub(super) fn rotate(x: &mut CpuBuffer, rotation: &CpuRotation, heads: HeadLayout, batch: &Batch) {
    let half = rotation.half;
    let table = rotation.table(batch);
    let rows = x.data.par_chunks_exact_mut(x.cols).enumerate().with_min_len(16);
    rows.for_each(|(t, row)| {
        let position = batch.start + t % batch.length - table.first;
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

/// One piece of work per window, block of queries and head; where windows have one query each, per window and heads that
/// share keys. A query's result does not depend on the queries or heads that share its piece: what it sees is summed in
/// the same order, and what it does not see has weight 0.
pub(super) fn attend(
    query: &CpuBuffer,
    keys: &Keys<'_, CpuBuffer>,
    terms: &AttentionTerms<'_, Vec<f32>>,
    shape: AttentionShape,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let (rows, cols) = (out.rows, out.cols);
    let out = Columns::new(&mut out.data, rows, cols, cols);
    let attention = Attention { query, keys, terms, shape, batch, out };
    let Batch { windows, length, .. } = *batch;
    let blocks = length.div_ceil(QUERY_BLOCK);
    let group = match keys {
        Keys::Grouped { kv_heads, .. } if length == 1 => shape.heads / kv_heads,
        _ => 1,
    };
    // Heads in a piece: those of a group, unless threads would be left without work.
    let heads = group.min((windows * shape.heads).div_ceil(rayon::current_num_threads()));
    let (groups, per_group) = (shape.heads / group, group.div_ceil(heads));
    // Later blocks see more keys and go first, lest the longest piece be the last.
    (0..windows * blocks * groups * per_group).into_par_iter().for_each(|i| {
        let (block, i) = (blocks - 1 - i % blocks, i / blocks);
        let (part, i) = (i % per_group, i / per_group);
        let (group_index, window) = (i % groups, i / groups);
        let (first, first_query) = (part * heads, block * QUERY_BLOCK);
        attention.run(&Piece {
            window,
            first_query,
            queries: QUERY_BLOCK.min(length - first_query),
            head: group_index * group + first,
            heads: heads.min(group - first),
        });
    });
}

/// What all pieces of work share.
struct Attention<'a> {
    query: &'a CpuBuffer,
    keys: &'a Keys<'a, CpuBuffer>,
    terms: &'a AttentionTerms<'a, Vec<f32>>,
    shape: AttentionShape,
    batch: &'a Batch,
    out: Columns<'a>,
}

/// Some consecutive queries of one window and one head, or one query and some heads with the same keys. Either way the
/// pairs of query and head are the rows of a matrix.
struct Piece {
    window: usize,
    /// In the window's part of the batch.
    first_query: usize,
    queries: usize,
    head: usize,
    heads: usize,
}

impl Attention<'_> {
    fn run(&self, piece: &Piece) {
        let Attention { query, shape, batch, .. } = *self;
        let Piece { window, first_query, queries, head, heads } = *piece;
        let isa = Isa::current();
        let first_position = batch.start + first_query;
        // Keys that at least one query of the piece sees.
        let key_start = shape.span.first(first_position);
        let key_count = shape.span.end(first_position + queries - 1, shape.end_key) - key_start;
        let keys_per_window = shape.end_key - shape.first_key;
        let key_row = window * keys_per_window + key_start - shape.first_key;
        let query_row = window * batch.length + first_query;
        let rows = queries * heads;
        let stride = if heads == 1 { query.cols } else { shape.query_dim };
        let mut scores = Scratch::take(rows * key_count);
        // Queries times some columns of the keys: `col ..` of the head's query, `key_col ..` of the key.
        let mut score = |key: &CpuBuffer, key_col: usize, col: usize, width: usize, accumulate: bool| {
            let start = query_row * query.cols + head * shape.query_dim + col;
            let w = &key.data[key_row * key.cols + key_col..];
            Product {
                x: &query.data[start..],
                stride,
                w: Source::strided(bytemuck::cast_slice(w), Dtype::F32, key_count, width, key.cols),
                out: Columns::new(&mut scores, rows, key_count, key_count),
                accumulate,
            }
            .run_here(isa);
        };
        let (value, value_col) = match *self.keys {
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
            let position = first_position + i % queries;
            let first = shape.span.first(position) - key_start;
            let end = shape.span.end(position, shape.end_key) - key_start;
            row[..first].fill(0.0);
            row[end..].fill(0.0);
            let visible = &mut row[first..end];
            let head = head + i / queries;
            let mut scale = shape.scale * shape.temperature.map_or(1.0, |t| t.at(position));
            if let Some(bias) = self.terms.bias {
                let row = bias.len() / shape.heads;
                let bias = &bias[head * row..(head + 1) * row];
                for (score, key) in visible.iter_mut().zip(key_start + first..) {
                    // Distance + reach, at least 0.
                    let entry = (key + row / 2).saturating_sub(position).min(row - 1);
                    *score = *score * scale + bias[entry];
                }
                scale = 1.0;
            }
            if let Some(mask) = self.terms.mask {
                for (score, real) in visible.iter_mut().zip(&mask[key_row + first..]) {
                    *score = if *real { *score } else { f32::NEG_INFINITY };
                }
            }
            let sink = self.terms.sinks.map(|s| s[head]);
            isa.run(Softmax { scores: visible, scale, sink });
        }
        let out = self.out.part(query_row, queries, head * shape.value_dim, heads * shape.value_dim);
        isa.run(WeightedRows {
            weights: &scores,
            count: key_count,
            rows: &value.data[key_row * value.cols + value_col..],
            stride: value.cols,
            first: key_start,
            out: if heads == 1 { out } else { out.fold(shape.value_dim) },
        });
    }
}
