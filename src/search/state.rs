//! Where a search stands: the streams before the layer that was entered, and what is known of it.

use super::block::Mark;
use super::exact;
use super::grams::LayerGrams;
use super::journal::Journal;
use super::measure::measure;
use crate::architecture::Architecture;
use crate::backend::{Backend, Expert};
use crate::calibrate::{self, Residual};
use crate::model::{FeedForwardSource, Layer, LayerSource, Model, Result, Stream};
use crate::plan::{Loss, Pass};
use crate::progress::Progress;
use crate::tokens::Windows;

/// What a [`LossSource`](crate::plan::LossSource) answers.
pub(super) type Answer<T> = std::result::Result<T, String>;

/// A search: the model, the notes, and where the pass stands.
pub(super) struct State<'a, 'm, B: Backend> {
    pub(super) model: &'a Model<'m, B>,
    pub(super) windows: &'a Windows,
    pub(super) progress: &'a mut dyn Progress,
    pub(super) work: Residual,
    pub(super) journal: Journal,
    pub(super) memory: u64,
    pub(super) settings: Settings,
    /// Decoder layers that this pass has passed.
    pub(super) position: usize,
    /// MoE layer that was entered.
    pub(super) current: usize,
    /// What the MoE layers that were left have lost.
    pub(super) passed: Vec<(usize, Vec<usize>)>,
    /// Commits of this pass.
    pub(super) commits: usize,
    /// Where the pass stands; `None` until something has to be computed.
    pub(super) streams: Option<Streams<'m, B>>,
    entered: Option<Entered<B>>,
    pub(super) mark: Option<Mark<B>>,
}

/// What a pass does, see [`Pass`].
#[derive(Clone, Copy)]
pub(super) struct Settings {
    pub(super) batch: usize,
    progressive: bool,
    exact: bool,
}

/// The residual streams of a pass.
pub(super) struct Streams<'m, B: Backend> {
    /// In a progressive pass behind the layers that have lost experts.
    pub(super) inputs: Stream<'m, B>,
    /// The original model's, in a progressive pass.
    pub(super) original: Option<Stream<'m, B>>,
}

/// The layer that was entered; the residual streams stand between its attention and its experts.
pub(super) struct Entered<B: Backend> {
    pub(super) source: LayerSource,
    pub(super) layer: Layer<B>,
    grams: Option<LayerGrams>,
    /// The original's routed outputs, where candidates are run.
    targets: Option<Vec<Vec<f32>>>,
}

/// The router of a layer without the experts `dropped`; `None` where there are none of these.
pub(super) fn drop_experts<B: Backend>(
    backend: &B,
    source: &LayerSource,
    dropped: &[usize],
) -> Result<Option<B::Router>> {
    let FeedForwardSource::Moe(moe) = &source.feed_forward else { return Ok(None) };
    if dropped.is_empty() {
        return Ok(None);
    }
    let mut moe = moe.clone();
    for &e in dropped {
        moe.experts[e] = Expert::None;
    }
    Layer::<B>::router(backend, source.layer, &moe).map(Some)
}

impl<'a, 'm, B: Backend> State<'a, 'm, B> {
    /// Before the first pass, with the notes in `work`.
    pub(super) fn new(
        model: &'a Model<'m, B>,
        windows: &'a Windows,
        progress: &'a mut dyn Progress,
        work: Residual,
        memory: u64,
    ) -> Self {
        let journal = Journal::open(&work);
        State {
            model,
            windows,
            progress,
            work,
            journal,
            memory,
            settings: Settings { batch: 1, progressive: false, exact: false },
            position: 0,
            current: 0,
            passed: Vec::new(),
            commits: 0,
            streams: None,
            entered: None,
            mark: None,
        }
    }

    pub(super) fn begin(&mut self, pass: &Pass<'_>) -> calibrate::Result<()> {
        self.settings = Settings { batch: pass.batch, progressive: pass.progressive, exact: pass.exact };
        (self.position, self.commits) = (0, 0);
        self.passed.clear();
        (self.streams, self.entered, self.mark) = (None, None, None);
        if !self.journal.is_replaying() {
            self.work.forget()?;
        }
        let layers = self.model.architecture().moe_layers().count();
        self.progress.begin(&format!("{}: layer", pass.task), layers);
        Ok(())
    }

    /// Repeats an answer of an earlier run, or finds it and notes it.
    pub(super) fn answer(
        &mut self,
        count: usize,
        find: impl FnOnce(&mut Self) -> calibrate::Result<Vec<Loss>>,
    ) -> Answer<Vec<Loss>> {
        if self.journal.is_replaying() {
            let numbers = self.journal.replay(2 * count)?;
            let pairs = numbers.as_chunks::<2>().0.iter();
            return Ok(pairs
                .map(|[batch_sum, single]| Loss { batch_sum: *batch_sum, single: *single })
                .collect());
        }
        let losses = find(self).map_err(|e| e.to_string())?;
        if let Some(loss) = losses.iter().find(|l| !l.batch_sum.is_finite()) {
            let (layer, loss) = (self.current, loss.batch_sum);
            return Err(format!("layer {layer}: a loss is {loss}; the model's activations are not finite"));
        }
        self.journal.note(losses.iter().flat_map(|l| [l.batch_sum, l.single]));
        Ok(losses)
    }

    /// Brings the streams before decoder layer `target`.
    pub(super) fn reach(&mut self, target: usize) -> calibrate::Result<()> {
        let mut from = self.position;
        if self.streams.is_none() {
            let model = self.model;
            let stream = || Stream::new(model, self.windows);
            let mut streams = Streams { inputs: stream()?, original: None };
            from = 0;
            if self.settings.progressive {
                streams.original = Some(stream()?);
            } else if self.commits > 0 && self.work.layers_done() <= self.position {
                let Architecture { hidden_size, encoder_layers, .. } = *model.architecture();
                from =
                    self.work.restore(model.backend(), &mut streams.inputs, hidden_size, encoder_layers)?;
            }
            self.streams = Some(streams);
        }
        for l in from..target {
            self.pass(l)?;
        }
        self.position = target;
        Ok(())
    }

    /// Passes decoder layer `l` with what it has lost in this pass.
    fn pass(&mut self, l: usize) -> Result<()> {
        let model = self.model;
        let Some(streams) = &mut self.streams else { return Ok(()) };
        let source = LayerSource::open(model.checkpoint(), model.architecture(), l)?;
        let layer = model.prepare(&source)?;
        let lost = self.passed.iter().find(|(layer, _)| *layer == l).map(|(_, dropped)| &dropped[..]);
        let router = match &streams.original {
            None => None,
            Some(_) => drop_experts(model.backend(), &source, lost.unwrap_or_default())?,
        };
        streams.inputs.advance_with(&layer, router.as_ref())?;
        if let Some(original) = &mut streams.original {
            original.advance(&layer, |_, _| Ok(()))?;
        }
        drop(layer);
        source.release();
        Ok(())
    }

    pub(super) fn enter(&mut self, l: usize) -> calibrate::Result<()> {
        self.reach(l)?;
        let model = self.model;
        let source = LayerSource::open(model.checkpoint(), model.architecture(), l)?;
        let layer = model.prepare(&source)?;
        for Stream { chunks, scratch, .. } in self.streams.iter_mut().flat_map(Streams::all) {
            for chunk in chunks {
                layer.attend(model.backend(), chunk, scratch)?;
            }
        }
        self.entered = Some(Entered { source, layer, grams: None, targets: None });
        Ok(())
    }

    pub(super) fn losses(&mut self, dropped: &[Vec<usize>]) -> calibrate::Result<Vec<Loss>> {
        let model = self.model;
        let (Some(entered), Some(streams)) = (&mut self.entered, &mut self.streams) else {
            return Ok(Vec::new());
        };
        // Inputs are the original's until the first expert is gone.
        let moved = self.passed.iter().any(|(_, dropped)| !dropped.is_empty());
        let moved = moved && streams.original.is_some();
        if self.settings.exact {
            if entered.targets.is_none() {
                let stream = streams.original.as_mut().unwrap_or(&mut streams.inputs);
                entered.targets = Some(exact::outputs(model.backend(), &entered.layer, stream, None)?);
            }
            let targets = entered.targets.as_deref().unwrap_or_default();
            let batch = self.settings.batch;
            return Ok(exact::losses(
                model.backend(),
                entered,
                &mut streams.inputs,
                targets,
                dropped,
                batch,
            )?);
        }
        let path = self.work.path("grams.f32");
        if entered.grams.is_none() {
            let original = streams.original.as_mut().filter(|_| moved);
            let (settings, memory) = (self.settings, self.memory);
            let grams =
                measure(model, entered, &mut streams.inputs, original, settings.batch, memory, &path)?;
            entered.grams = Some(grams);
        }
        let losses = entered.grams.as_ref().map(|grams| grams.losses(dropped));
        let io = |source| crate::checkpoint::Error::Io { path, source };
        Ok(losses.transpose().map_err(io)?.unwrap_or_default())
    }

    pub(super) fn leave(&mut self, dropped: &[usize]) -> Result<()> {
        let model = self.model;
        let Some(Entered { source, layer, .. }) = self.entered.take() else { return Ok(()) };
        let Some(streams) = &mut self.streams else { return Ok(()) };
        let router = match &streams.original {
            None => None,
            Some(_) => drop_experts(model.backend(), &source, dropped)?,
        };
        let feed = |stream: &mut Stream<'m, B>, router: Option<&B::Router>| -> Result<()> {
            let Stream { chunks, scratch, .. } = stream;
            for chunk in chunks {
                match router {
                    Some(router) => {
                        layer.feed_with(model.backend(), &mut chunk.x, &chunk.batch, scratch, router)?;
                    }
                    None => layer.feed(model.backend(), &mut chunk.x, &chunk.batch, scratch, None)?,
                }
            }
            Ok(())
        };
        feed(&mut streams.inputs, router.as_ref())?;
        if let Some(original) = &mut streams.original {
            feed(original, None)?;
        }
        drop(layer);
        source.release();
        // It may not be there, and what is left of it goes with the folder.
        let _ = std::fs::remove_file(self.work.path("grams.f32"));
        Ok(())
    }
}

impl<'m, B: Backend> Streams<'m, B> {
    fn all(&mut self) -> impl Iterator<Item = &mut Stream<'m, B>> {
        std::iter::once(&mut self.inputs).chain(&mut self.original)
    }
}
