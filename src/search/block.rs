//! Losses behind a block of whole decoder layers, for every product of the layers' candidates.

use super::grams::Sums;
use super::rows::{batches, copy, real, square};
use super::state::{State, drop_experts};
use crate::backend::{Backend, Batch};
use crate::calibrate;
use crate::model::{Chunk, Layer, LayerSource, Memory, Model, Result, Scratch};
use crate::plan::Loss;

/// The residual stream before a block.
pub(super) struct Mark<B: Backend> {
    /// First decoder layer of the block.
    pub(super) layer: usize,
    /// Of every chunk.
    pub(super) x: Vec<B::Buffer>,
}

/// A layer of the block and the routers of its candidates; none for a layer without experts.
struct Stage<B: Backend> {
    layer: Layer<B>,
    routers: Option<Vec<Option<B::Router>>>,
}

impl<B: Backend> State<'_, '_, B> {
    /// Whether decoder layer `l` is the first with experts in its stack, and not of the whole model.
    pub(super) fn begins_stack(&self, l: usize) -> bool {
        let architecture = self.model.architecture();
        let in_decoder = |l: &usize| *l >= architecture.encoder_layers;
        let mut layers = architecture.moe_layers().map(|(l, _)| l);
        architecture.encoder_layers > 0 && layers.find(in_decoder) == Some(l)
    }

    pub(super) fn set_mark(&mut self) -> calibrate::Result<()> {
        let (model, architecture) = (self.model, self.model.architecture());
        let next = architecture.moe_layers().map(|(l, _)| l).find(|l| *l >= self.position);
        // A block of a decoder begins with the decoder, where the encoder's last layers have no experts.
        let begins = next.is_some_and(|l| l >= architecture.encoder_layers);
        let position = if begins { self.position.max(architecture.encoder_layers) } else { self.position };
        self.reach(position)?;
        let mut chunks = &mut [][..];
        if let Some(streams) = &mut self.streams {
            chunks = &mut streams.inputs.chunks;
        }
        if position > 0 && position == architecture.encoder_layers {
            let source = LayerSource::open(model.checkpoint(), architecture, position)?;
            let layer = model.prepare(&source)?;
            chunks.iter_mut().try_for_each(|chunk| layer.enter(model.backend(), chunk))?;
        }
        self.mark = Some(mark(model.backend(), position, chunks)?);
        Ok(())
    }

    pub(super) fn block_losses(&mut self, candidates: &[Vec<Vec<usize>>]) -> calibrate::Result<Vec<Loss>> {
        let (Some(mark), Some(streams)) = (&self.mark, &self.streams) else { return Ok(Vec::new()) };
        let chunks = &streams.inputs.chunks;
        Ok(losses(self.model, mark, chunks, self.position, candidates, self.settings.batch)?)
    }
}

/// Losses of the residual stream of `chunks`, which stand behind decoder layer `end` − 1, when the layers from the mark on
/// lose experts: one list of candidates for every MoE layer, the first slowest. What candidates have in common runs once.
fn losses<B: Backend>(
    model: &Model<'_, B>,
    mark: &Mark<B>,
    chunks: &[Chunk<B>],
    end: usize,
    candidates: &[Vec<Vec<usize>>],
    batch_size: usize,
) -> Result<Vec<Loss>> {
    let backend = model.backend();
    let mut lists = candidates.iter();
    let mut stages = Vec::with_capacity(end - mark.layer);
    for l in mark.layer..end {
        let source = LayerSource::open(model.checkpoint(), model.architecture(), l)?;
        let layer = model.prepare(&source)?;
        let routers = match source.moe().and_then(|_| lists.next()) {
            None => None,
            Some(sets) => {
                let routers = sets.iter().map(|set| drop_experts(backend, &source, set));
                Some(routers.collect::<Result<Vec<_>>>()?)
            }
        };
        stages.push(Stage { layer, routers });
    }
    let products = candidates.iter().map(Vec::len).product();
    let mut sums = Sums::new(products);
    let mut scratch = Scratch::new(backend);
    let mut levels: Vec<[B::Buffer; 2]> =
        stages.iter().map(|_| [backend.buffer(), backend.buffer()]).collect();
    for (chunk, x) in chunks.iter().zip(&mark.x) {
        let mut leaves = Vec::with_capacity(products);
        let target = backend.download(&chunk.x)?;
        let d = target.len() / chunk.batch.tokens();
        let parts: Vec<_> = batches(chunk.first_window, chunk.batch.windows, batch_size)
            .map(|(batch, windows)| (batch, real(&chunk.batch, windows)))
            .collect();
        let mut leaf = |x: &B::Buffer| {
            let output = backend.download(x)?;
            leaves.push(parts.iter().map(|(_, rows)| square(&output, &target, rows, d)).collect::<Vec<_>>());
            Ok(())
        };
        let of = (&chunk.batch, chunk.memory.as_ref());
        descend(backend, &stages, &mut levels, x, of, &mut scratch, &mut leaf)?;
        for (i, (batch, _)) in parts.iter().enumerate() {
            sums.add(*batch, &leaves.iter().map(|leaf| leaf[i]).collect::<Vec<_>>());
        }
    }
    Ok(sums.finish())
}

/// Runs the first of `stages` with each of its routers and what follows behind each; `leaf` sees every result. With `x`
/// goes its shape, and in a decoder what it sees of the encoder.
fn descend<B: Backend>(
    backend: &B,
    stages: &[Stage<B>],
    levels: &mut [[B::Buffer; 2]],
    x: &B::Buffer,
    (batch, memory): (&Batch, Option<&Memory<B>>),
    scratch: &mut Scratch<B>,
    leaf: &mut dyn FnMut(&B::Buffer) -> Result<()>,
) -> Result<()> {
    let (Some((stage, stages)), Some(([attended, out], levels))) =
        (stages.split_first(), levels.split_first_mut())
    else {
        return leaf(x);
    };
    backend.copy_rows(x, 0, batch.tokens(), attended)?;
    stage.layer.attend_behind(backend, attended, batch, memory, scratch)?;
    let one = [None];
    for router in stage.routers.as_deref().unwrap_or(&one) {
        backend.copy_rows(attended, 0, batch.tokens(), out)?;
        match router {
            Some(router) => stage.layer.feed_with(backend, out, batch, scratch, router)?,
            None => stage.layer.feed(backend, out, batch, scratch, None)?,
        }
        descend(backend, stages, levels, out, (batch, memory), scratch, leaf)?;
    }
    Ok(())
}

/// A copy of every chunk's residual stream.
fn mark<B: Backend>(backend: &B, layer: usize, chunks: &[Chunk<B>]) -> Result<Mark<B>> {
    let x = chunks.iter().map(|c| Ok(copy(backend, &c.x, c.batch.tokens())?)).collect::<Result<_>>()?;
    Ok(Mark { layer, x })
}
