//! Losses by running every candidate: slow, and what the inner products are checked against.

use super::grams::Sums;
use super::rows::{batches, real, square};
use super::state::{Entered, drop_experts};
use crate::backend::Backend;
use crate::model::{Layer, Result, Stream};
use crate::plan::Loss;

/// The routed outputs of the entered layer on every chunk.
pub(super) fn outputs<B: Backend>(
    backend: &B,
    layer: &Layer<B>,
    stream: &mut Stream<'_, B>,
    router: Option<&B::Router>,
) -> Result<Vec<Vec<f32>>> {
    let Stream { chunks, scratch, .. } = stream;
    let output = |chunk: &crate::model::Chunk<B>, scratch: &mut _| {
        layer.route(backend, &chunk.x, scratch, router)?;
        layer.routed_output(backend, scratch)
    };
    chunks.iter().map(|chunk| output(chunk, scratch)).collect()
}

/// The loss of every set of dropped experts against `targets`, the original's outputs.
pub(super) fn losses<B: Backend>(
    backend: &B,
    entered: &Entered<B>,
    stream: &mut Stream<'_, B>,
    targets: &[Vec<f32>],
    dropped: &[Vec<usize>],
    batch_size: usize,
) -> Result<Vec<Loss>> {
    let mut losses = Vec::with_capacity(dropped.len());
    for set in dropped {
        let router = drop_experts(backend, &entered.source, set)?;
        let outputs = outputs(backend, &entered.layer, stream, router.as_ref())?;
        let mut sums = Sums::new(1);
        for ((chunk, output), target) in stream.chunks.iter().zip(&outputs).zip(targets) {
            let d = output.len() / chunk.batch.tokens();
            for (batch, windows) in batches(chunk.first_window, chunk.batch.windows, batch_size) {
                sums.add(batch, &[square(output, target, &real(&chunk.batch, windows), d)]);
            }
        }
        losses.extend(sums.finish());
    }
    Ok(losses)
}
