//! A model on tokens, as a source of losses.

use std::cell::RefCell;
use std::path::Path;

use super::block::{self, Mark};
use super::exact;
use super::grams::LayerGrams;
use super::journal::Journal;
use super::rows::{batches, real};
use super::rule::Rule;
use super::tails::Collector;
use crate::architecture::Architecture;
use crate::backend::{Backend, Expert};
use crate::calibrate::{self, Residual};
use crate::model::{FeedForwardSource, Layer, LayerSource, Model, Result, Stream, TOKENS_PER_CHUNK, profile};
use crate::plan::{Loss, LossSource, Pass, Tails};
use crate::progress::Progress;
use crate::tokens::Windows;

/// What a [`LossSource`] answers.
type Answer<T> = std::result::Result<T, String>;

/// A [`LossSource`] that runs a model on token windows. What it has answered is kept on disk until
/// [`Search::finish`]: the same search, started again, goes on after its last commit.
pub struct Search<'a, 'm, B: Backend> {
    state: RefCell<State<'a, 'm, B>>,
}

struct State<'a, 'm, B: Backend> {
    model: &'a Model<'m, B>,
    windows: &'a Windows,
    progress: &'a mut dyn Progress,
    work: Residual,
    journal: Journal,
    memory: u64,
    settings: Settings,
    /// Decoder layers that this pass has passed.
    position: usize,
    /// MoE layer that was entered.
    current: usize,
    /// What the MoE layers that were left have lost.
    passed: Vec<(usize, Vec<usize>)>,
    /// Commits of this pass.
    commits: usize,
    /// Where the pass stands; `None` until something has to be computed.
    streams: Option<Streams<'m, B>>,
    entered: Option<Entered<B>>,
    mark: Option<Mark<B>>,
}

/// What a pass does, see [`Pass`].
#[derive(Clone, Copy)]
struct Settings {
    batch: usize,
    progressive: bool,
    exact: bool,
}

struct Streams<'m, B: Backend> {
    /// In a progressive pass behind the layers that have lost experts.
    inputs: Stream<'m, B>,
    /// The original model's, in a progressive pass.
    original: Option<Stream<'m, B>>,
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

impl<'a, 'm, B: Backend> Search<'a, 'm, B> {
    /// Most bytes of inner products that are kept in memory; beyond that they go to a file beside the result, and are
    /// read again for every generation of candidates. A token of a layer with E experts takes 2 · E · (E + 1) bytes: the
    /// 262144 tokens of NAEE's setting 38 MB for 8 experts and 2.2 GB for 64. Routing facts, about 14 · E bytes, stay in
    /// memory.
    pub const MEMORY: u64 = 2 << 30;

    /// A search on `windows` whose result goes to `out`; `what` names everything else that its questions depend on:
    /// method, options, budget.
    ///
    /// # Errors
    /// Those of [`Residual::open`], and sizes that cannot be read.
    pub fn new(
        model: &'a Model<'m, B>,
        windows: &'a Windows,
        out: &Path,
        what: &str,
        progress: &'a mut dyn Progress,
    ) -> calibrate::Result<Self> {
        let identity = profile(model.checkpoint(), model.architecture())?.identity;
        let (tokens, length, device) = (windows.sha256(), windows.length, model.backend().device());
        let key = format!("moepress search 1\n{identity}\n{tokens} {length}\n{device}\n{what}\n");
        let work = Residual::open(out, &key, &[model.checkpoint()], progress)?;
        let journal = Journal::open(&work);
        let state = State {
            model,
            windows,
            progress,
            work,
            journal,
            memory: Self::MEMORY,
            settings: Settings { batch: 1, progressive: false, exact: false },
            position: 0,
            current: 0,
            passed: Vec::new(),
            commits: 0,
            streams: None,
            entered: None,
            mark: None,
        };
        Ok(Search { state: RefCell::new(state) })
    }

    /// The same with another bound than [`Search::MEMORY`].
    #[must_use]
    pub fn with_memory(self, bytes: u64) -> Self {
        self.state.borrow_mut().memory = bytes;
        self
    }

    /// Forgets the search, once its result is in its place.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub fn finish(self) -> calibrate::Result<()> {
        let state = self.state.into_inner();
        state.progress.end();
        state.work.remove()
    }
}

impl<B: Backend> LossSource for Search<'_, '_, B> {
    fn begin(&self, pass: &Pass<'_>) -> Answer<()> {
        self.state.borrow_mut().begin(pass).map_err(|e| e.to_string())
    }

    fn enter(&self, layer: usize) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        state.current = layer;
        if state.journal.is_replaying() {
            return Ok(());
        }
        state.enter(layer).map_err(|e| e.to_string())
    }

    fn losses(&self, dropped: &[Vec<usize>]) -> Answer<Vec<Loss>> {
        let state = &mut *self.state.borrow_mut();
        state.answer(dropped.len(), |state| state.losses(dropped))
    }

    fn leave(&self, dropped: &[usize], detail: &str) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        let known = state.journal.is_replaying();
        if !known {
            state.leave(dropped).map_err(|e| e.to_string())?;
        }
        state.passed.push((state.current, dropped.to_vec()));
        state.position = state.current + 1;
        state.progress.step(if known { "done before" } else { detail });
        Ok(())
    }

    fn commit(&self) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        let replaying = state.journal.is_replaying();
        state.journal.commit(&state.work)?;
        state.commits += 1;
        match &state.streams {
            Some(Streams { inputs, original: None }) if !replaying => {
                state.work.save(state.model.backend(), inputs, state.position).map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }
    }

    fn mark(&self) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        if state.journal.is_replaying() {
            return Ok(());
        }
        state.set_mark().map_err(|e| e.to_string())
    }

    fn block_losses(&self, candidates: &[Vec<Vec<usize>>]) -> Answer<Vec<Loss>> {
        let state = &mut *self.state.borrow_mut();
        let products = candidates.iter().map(Vec::len).product();
        state.answer(products, |state| state.block_losses(candidates))
    }

    fn tails(&self, dropped: &[Vec<usize>]) -> Answer<Vec<Tails>> {
        self.state.borrow_mut().tails(dropped).map_err(|e| e.to_string())
    }
}

impl<'m, B: Backend> State<'_, 'm, B> {
    fn begin(&mut self, pass: &Pass<'_>) -> calibrate::Result<()> {
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
    fn answer(
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
    fn reach(&mut self, target: usize) -> calibrate::Result<()> {
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

    fn enter(&mut self, l: usize) -> calibrate::Result<()> {
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

    fn losses(&mut self, dropped: &[Vec<usize>]) -> calibrate::Result<Vec<Loss>> {
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

    fn leave(&mut self, dropped: &[usize]) -> Result<()> {
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

    fn set_mark(&mut self) -> calibrate::Result<()> {
        if self.model.architecture().encoder_layers > 0 {
            let what =
                "blocks of layers cannot be compared across encoder and decoder; use --set block=1".into();
            return Err(crate::model::Error::Inconsistent { layer: self.position, what }.into());
        }
        let position = self.position;
        self.reach(position)?;
        let chunks = self.streams.as_ref().map_or(&[][..], |s| &s.inputs.chunks);
        self.mark = Some(block::mark(self.model.backend(), position, chunks)?);
        Ok(())
    }

    fn block_losses(&mut self, candidates: &[Vec<Vec<usize>>]) -> calibrate::Result<Vec<Loss>> {
        let (Some(mark), Some(streams)) = (&self.mark, &self.streams) else { return Ok(Vec::new()) };
        let chunks = &streams.inputs.chunks;
        Ok(block::losses(self.model, mark, chunks, self.position, candidates, self.settings.batch)?)
    }

    fn tails(&mut self, dropped: &[Vec<usize>]) -> Result<Vec<Tails>> {
        let (model, backend) = (self.model, self.model.backend());
        let architecture = model.architecture();
        let mut stream = Stream::new(model, self.windows)?;
        let mut lost = dropped.iter();
        let mut tails = Vec::with_capacity(dropped.len());
        self.progress.begin("plan: skipping, layer", architecture.layers.len());
        for l in 0..architecture.layers.len() {
            let mut source = LayerSource::open(model.checkpoint(), architecture, l)?;
            let mut collector = Collector::default();
            if let FeedForwardSource::Moe(moe) = &mut source.feed_forward {
                moe.spec.skip = None;
                for &e in lost.next().into_iter().flatten() {
                    moe.experts[e] = Expert::None;
                }
            }
            let layer = model.prepare(&source)?;
            stream.advance(&layer, |chunk, scratch| {
                if layer.is_moe() {
                    collector.add(&backend.routes(&scratch.routing)?, &chunk.batch);
                }
                Ok(())
            })?;
            if layer.is_moe() {
                tails.push(collector.finish());
            }
            drop(layer);
            source.release();
            self.progress.step("");
        }
        self.progress.end();
        Ok(tails)
    }
}

impl<'m, B: Backend> Streams<'m, B> {
    fn all(&mut self) -> impl Iterator<Item = &mut Stream<'m, B>> {
        std::iter::once(&mut self.inputs).chain(&mut self.original)
    }
}

/// Runs every expert of the entered layer on every token. With `original`, the stream that targets come from, the
/// difference of the routed outputs on the two inputs is one more vector of every token.
fn measure<B: Backend>(
    model: &Model<'_, B>,
    entered: &Entered<B>,
    inputs: &mut Stream<'_, B>,
    original: Option<&mut Stream<'_, B>>,
    batch_size: usize,
    memory: u64,
    path: &Path,
) -> Result<LayerGrams> {
    let (backend, layer) = (model.backend(), &entered.layer);
    let Some(moe) = entered.source.moe() else {
        return Err(crate::model::Error::Inconsistent {
            layer: entered.source.layer,
            what: "has no experts".into(),
        });
    };
    let experts = moe.experts.len();
    let choice_bias = moe.router.choice_bias.as_ref().map(crate::checkpoint::Tensor::to_f32).transpose()?;
    let rule = Rule::new(moe.rule(), choice_bias.unwrap_or_default());
    let mut grams = LayerGrams::new(rule, original.is_some(), memory);
    // As many rows of experts as an ordinary forward pass has.
    let at_a_time = (TOKENS_PER_CHUNK * moe.spec.top_k / experts).clamp(16, TOKENS_PER_CHUNK);
    let targets = original.map(|stream| exact::outputs(backend, layer, stream, None)).transpose()?;
    let d = model.architecture().hidden_size;
    let Stream { chunks, scratch, .. } = inputs;
    for (i, chunk) in chunks.iter().enumerate() {
        let routes = layer.route(backend, &chunk.x, scratch, None)?;
        let moved = match &targets {
            None => None,
            Some(targets) => {
                let mut moved = layer.routed_output(backend, scratch)?;
                moved.iter_mut().zip(&targets[i]).for_each(|(own, target)| *own = target - *own);
                Some(moved)
            }
        };
        for (batch, windows) in batches(chunk.first_window, chunk.batch.windows, batch_size) {
            let rows = real(&chunk.batch, windows);
            let (mut logits, mut values) = (Vec::new(), Vec::new());
            for rows in rows.chunks(at_a_time) {
                let extra: Option<Vec<f32>> = moved
                    .as_ref()
                    .map(|moved| rows.iter().flat_map(|r| &moved[r * d..(r + 1) * d]).copied().collect());
                values.extend(layer.output_grams(backend, rows, extra.as_deref(), scratch)?);
                logits.extend(rows.iter().flat_map(|r| &routes.logits[r * experts..(r + 1) * experts]));
            }
            let io = |source| crate::checkpoint::Error::Io { path: path.into(), source };
            grams.push(batch, &logits, values, path).map_err(io)?;
        }
    }
    Ok(grams)
}
