//! Rotary embedding and causal attention.

use std::cell::RefCell;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::CpuBuffer;
use crate::architecture::{Pairing, Rope};
use crate::backend::{AttentionShape, Batch, HeadLayout, Keys};

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

thread_local! {
    /// The block of scores of the thread. Borrowed only around code that does not enter rayon.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn attend(
    query: &CpuBuffer,
    keys: &Keys<'_, CpuBuffer>,
    sinks: Option<&[f32]>,
    shape: AttentionShape,
    batch: &Batch,
    out: &mut CpuBuffer,
) {
    let out_cols = out.cols;
    let length = batch.length;
    out.data.par_chunks_mut(length * out_cols).enumerate().for_each(|(window, out)| {
        out.par_chunks_mut(QUERY_BLOCK * out_cols).enumerate().for_each(|(block, out)| {
            let block = Block {
                first_row: window * length,
                first_query: block * QUERY_BLOCK,
                queries: out.len() / out_cols,
            };
            SCORES.with_borrow_mut(|scores| {
                for head in 0..shape.heads {
                    let sink = sinks.map(|s| s[head]);
                    block.attend_head(head, query, keys, sink, shape, batch, scores, out);
                }
            });
        });
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
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let Block { first_row, first_query, queries } = *self;
        // Keys that at least one query of the block sees.
        let key_start = shape.span.first(first_query);
        let key_count = first_query + queries - key_start;
        let key_row = first_row + key_start;
        scores.resize(queries * key_count, 0.0);
        let view = |buffer: &'_ CpuBuffer, row: usize, count: usize, col: usize, width: usize| {
            (row * buffer.cols + col, count, width, buffer.cols)
        };
        let query_row = first_row + first_query;
        let part = |col: usize, width: usize| {
            let at = view(query, query_row, queries, head * shape.query_dim + col, width);
            matrix(&query.data, at)
        };
        let mut score = MatMut::from_row_major_slice_mut(scores, queries, key_count);
        let value = match *keys {
            Keys::Grouped { key, value, kv_heads } => {
                let kv = head / (shape.heads / kv_heads);
                let k =
                    matrix(&key.data, view(key, key_row, key_count, kv * shape.query_dim, shape.query_dim));
                matmul(
                    score.as_mut(),
                    Accum::Replace,
                    part(0, shape.query_dim),
                    k.transpose(),
                    shape.scale,
                    Par::Seq,
                );
                matrix(&value.data, view(value, key_row, key_count, kv * shape.value_dim, shape.value_dim))
            }
            Keys::Latent { expanded, shared, rope_start, nope_dim } => {
                let rope_dim = shape.query_dim - nope_dim;
                let start = head * (nope_dim + shape.value_dim);
                let nope = matrix(&expanded.data, view(expanded, key_row, key_count, start, nope_dim));
                let rope = matrix(&shared.data, view(shared, key_row, key_count, rope_start, rope_dim));
                let q = part(0, nope_dim);
                matmul(score.as_mut(), Accum::Replace, q, nope.transpose(), shape.scale, Par::Seq);
                let q = part(nope_dim, rope_dim);
                matmul(score.as_mut(), Accum::Add, q, rope.transpose(), shape.scale, Par::Seq);
                let start = start + nope_dim;
                matrix(&expanded.data, view(expanded, key_row, key_count, start, shape.value_dim))
            }
        };
        for (i, row) in scores.chunks_exact_mut(key_count).enumerate() {
            let position = first_query + i;
            let first = shape.span.first(position) - key_start;
            let end = position + 1 - key_start;
            row[..first].fill(0.0);
            row[end..].fill(0.0);
            if let Some(temperature) = shape.temperature {
                let factor = temperature.at(position);
                row[first..end].iter_mut().for_each(|score| *score *= factor);
            }
            softmax(&mut row[first..end], sink, |j| batch.is_real(key_row + first + j));
        }
        let probabilities = MatRef::from_row_major_slice(scores, queries, key_count);
        let width = shape.value_dim;
        let out_cols = shape.heads * width;
        let target = &mut out[head * width..];
        // faer 0.24 confuses the strides of `from_row_major_slice_with_stride_mut`.
        let target =
            MatMut::from_column_major_slice_with_stride_mut(target, width, queries, out_cols).transpose_mut();
        matmul(target, Accum::Replace, probabilities, value, 1.0, Par::Seq);
    }
}

/// A strided view: start, rows, columns, distance between rows.
fn matrix(data: &[f32], (start, rows, cols, stride): (usize, usize, usize, usize)) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice_with_stride(&data[start..], rows, cols, stride)
}

/// In place; entries for which `visible` is false get probability 0, and so does everything where none is visible. A
/// sink takes part in the sum alone.
fn softmax(scores: &mut [f32], sink: Option<f32>, visible: impl Fn(usize) -> bool) {
    let mut max = sink.unwrap_or(f32::NEG_INFINITY);
    for (j, score) in scores.iter_mut().enumerate() {
        if !visible(j) {
            *score = f32::NEG_INFINITY;
        }
        max = max.max(*score);
    }
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    let mut sum = sink.map_or(0.0, |sink| (sink - max).exp());
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    let inverse = 1.0 / sum;
    for score in scores {
        *score *= inverse;
    }
}
