//! Latent attention in its absorbed form: what turns queries to the latent, and sums of latents to values.

use rayon::prelude::*;

use super::gemm::{Columns, Product, Scratch, Source, WeightedRows};
use super::simd::Isa;
use super::{CpuBuffer, CpuWeight};
use crate::backend::LatentShape;
use crate::checkpoint::Dtype;

/// One piece of work per head: `out` is `[tokens, heads · (latent_dim + rope_dim)]`.
pub(super) fn absorb_queries(query: &CpuBuffer, expand: &CpuWeight, shape: LatentShape, out: &mut CpuBuffer) {
    let LatentShape { heads, latent_dim, nope_dim, rope_dim, .. } = shape;
    let tokens = query.rows;
    let (from, to) = (nope_dim + rope_dim, latent_dim + rope_dim);
    let out = Columns::new(&mut out.data, tokens, heads * to, heads * to);
    (0..heads).into_par_iter().for_each(|head| {
        let target = out.part(0, tokens, head * to, to);
        let mut queries = Scratch::take(tokens * nope_dim);
        for (t, nope) in queries.chunks_exact_mut(nope_dim).enumerate() {
            let row = &query.row(t)[head * from..(head + 1) * from];
            nope.copy_from_slice(&row[..nope_dim]);
            // SAFETY: heads do not overlap, and the view ends here.
            unsafe { target.row(t, latent_dim, rope_dim) }.copy_from_slice(&row[nope_dim..]);
        }
        let mut rows = Scratch::take(nope_dim * latent_dim);
        expand.decode_rows(head * shape.expanded_dim(), &mut rows);
        Isa::current().run(WeightedRows {
            weights: &queries,
            count: nope_dim,
            rows: &rows,
            stride: latent_dim,
            first: 0,
            out: target.part(0, tokens, 0, latent_dim),
        });
    });
}

/// One piece of work per head: `out` is `[tokens, heads · value_dim]`.
pub(super) fn expand_values(sums: &CpuBuffer, expand: &CpuWeight, shape: LatentShape, out: &mut CpuBuffer) {
    let LatentShape { heads, latent_dim, nope_dim, value_dim, .. } = shape;
    let tokens = sums.rows;
    let out = Columns::new(&mut out.data, tokens, heads * value_dim, heads * value_dim);
    (0..heads).into_par_iter().for_each(|head| {
        let first = head * shape.expanded_dim() + nope_dim;
        let out = out.part(0, tokens, head * value_dim, value_dim);
        let x = &sums.data[head * latent_dim..];
        let multiply = |w: Source<'_>| {
            Product { x, stride: sums.cols, w, out, accumulate: false }.run_here(Isa::current());
        };
        if let Some(w) = expand.source_rows(first, value_dim) {
            return multiply(w);
        }
        let mut rows = Scratch::take(value_dim * latent_dim);
        expand.decode_rows(first, &mut rows);
        multiply(Source::new(bytemuck::must_cast_slice(&rows), Dtype::F32, value_dim, latent_dim));
    });
}
