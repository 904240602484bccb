//! Layer-wise distillation, streamed.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::layer::{Data, Expansion, NONE, TrainedLayer};
use super::rewrite::{Pass, Rewrite, own_layout};
use super::source::{dense_matrices, is_trainable};
use super::sparse::{Schedule, split};
use super::train::train;
use super::{Decomposition, Error, LayerLoss, Result, Training};
use crate::architecture::WeightTarget;
use crate::backend::{Backend, Expert};
use crate::calibrate::Residual;
use crate::checkpoint::{Checkpoint, Tensor};
use crate::compress::{Layout, PLAN_FILE};
use crate::model::{Dissected, FeedForwardSource, LayerSource, LinearSource, Model, MoeSource, Stream};
use crate::plan::Plan;
use crate::progress::Progress;
use crate::tokens::Windows;

/// Which residual stream the compressed experts are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// That of the original model. The target is the routed output of its layer; layers do not depend on each other.
    Original,
    /// That behind the layers already recovered, as the result will have it. The target is what takes it to the
    /// original's residual stream behind the layer.
    #[default]
    Recovered,
}

/// How to recover.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Options {
    /// Least squares and Adam.
    pub training: Training,
    /// Inputs of the experts.
    pub input: Input,
    /// Share of the windows that are held out, evenly spaced.
    pub held_out: f64,
    /// Makes full matrices low rank with sparse rows on the way, as MC-SMoE does with merged experts; a layer may then be
    /// worse at the end.
    pub decompose: Option<Decomposition>,
}

impl Default for Options {
    fn default() -> Self {
        Options { training: Training::default(), input: Input::default(), held_out: 0.1, decompose: None }
    }
}

/// What recovering did; its JSON form is that of `moepress recover`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Every MoE layer whose experts were trained.
    pub layers: Vec<LayerReport>,
    /// Bytes of all tensors of the result.
    pub bytes: u64,
    /// Parameters of its routed experts.
    pub routed_parameters: u64,
    /// `hf` or `moepress`.
    pub layout: &'static str,
    /// Wall-clock time.
    pub seconds: f64,
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// 0-based layer.
    pub layer: usize,
    /// Its losses.
    #[serde(flatten)]
    pub loss: LayerLoss,
}

/// Fits the experts of `compressed` to `original` on `windows`, layer by layer, and writes the result to the new folder
/// `out` in the layout of `compressed`. A run that was stopped goes on after the last finished layer, and gives the same
/// bytes as one that was not.
///
/// # Errors
/// Names the models that do not belong together, the layer or tensor, or what is wrong with tokens, options or the folder.
pub fn recover<B: Backend>(
    original: &Model<'_, B>,
    compressed: &Model<'_, B>,
    windows: &Windows,
    options: &Options,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let start = Instant::now();
    check_pair(original, compressed)?;
    let held_out = held_out(windows, options.held_out)?;
    let identity = |checkpoint: &Checkpoint| checkpoint.identity();
    let key = format!(
        "moepress recover 1\n{}\n{}\n{:?}\n{options:?}\n{}\n",
        identity(original.checkpoint()),
        identity(compressed.checkpoint()),
        (windows.sha256(), windows.length),
        original.backend().arithmetic()
    );
    let layout = match options.decompose {
        None => own_layout(compressed.checkpoint()),
        Some(_) if options.training.steps == 0 => {
            return Err(Error::Request(
                "low rank with sparse rows is found while training: expected at least 1 step".into(),
            ));
        }
        Some(decomposition) => {
            check_rank(compressed, decomposition)?;
            Layout::Moepress
        }
    };
    let name = layout.name();
    let rewrite = Rewrite {
        checkpoint: compressed.checkpoint(),
        architecture: compressed.architecture(),
        layout,
        key,
        sources: &[original.checkpoint(), compressed.checkpoint()],
        task: "recover",
    };
    let recovered = match options.input {
        Input::Original => None,
        Input::Recovered => Some(Stream::new(compressed, windows)?),
    };
    let mut pass = Distillation {
        original,
        compressed,
        options,
        held_out,
        stream: Stream::new(original, windows)?,
        recovered,
    };
    let done = rewrite.run(out, progress, &mut pass)?;
    let layers = done.layers.iter().filter_map(|r| Some(LayerReport { layer: r.layer, loss: r.loss? }));
    Ok(Report {
        layers: layers.collect(),
        bytes: done.bytes,
        routed_parameters: done.routed_parameters,
        layout: name,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Errors unless the models have the same shape outside their experts.
fn check_pair<B: Backend>(original: &Model<'_, B>, compressed: &Model<'_, B>) -> Result<()> {
    let (a, b) = (original.architecture(), compressed.architecture());
    let sizes = [
        ("layers", a.layers.len(), b.layers.len()),
        ("hidden size", a.hidden_size, b.hidden_size),
        ("vocabulary", a.vocabulary, b.vocabulary),
        ("encoder layers", a.encoder_layers, b.encoder_layers),
    ];
    let refuse = |what: String| {
        let dir = original.checkpoint().dir().display();
        let what = format!("{what}; expected a checkpoint that was made from {dir}");
        Err(Error::Pair { compressed: compressed.checkpoint().dir().into(), what })
    };
    if a.family != b.family {
        return refuse(format!("family {}, the original is of {}", b.family, a.family));
    }
    for (what, a, b) in sizes {
        if a != b {
            return refuse(format!("{what} {b}, the original has {a}"));
        }
    }
    match (0..a.layers.len()).find(|&l| a.moe(l).is_some() != b.moe(l).is_some()) {
        Some(l) => return refuse(format!("layer {l} has experts in one of the two only")),
        None if a.moe_layers().next().is_none() => return refuse("no layer has experts".into()),
        None => {}
    }
    // Made by a plan for another checkpoint. A chain of compressions keeps the last plan only, so one that is for neither
    // of the two says nothing.
    let plan = Plan::read(original.checkpoint().dir().join(PLAN_FILE));
    if plan.is_ok_and(|plan| plan.model.identity == compressed.checkpoint().identity()) {
        return refuse("is what the other was made from: the original comes first".into());
    }
    Ok(())
}

/// Errors where factors and rows would hold as many numbers as a matrix that they replace.
fn check_rank<B: Backend>(model: &Model<'_, B>, decomposition: Decomposition) -> Result<()> {
    let Decomposition { rank, rows } = decomposition;
    for (l, _) in model.architecture().moe_layers() {
        let source = LayerSource::locate(model.checkpoint(), model.architecture(), l)?;
        let experts = source.moe().map_or(&[][..], |moe| &moe.experts);
        for weight in experts.iter().flat_map(dense_matrices) {
            let (out, input) = (weight.rows(), weight.cols());
            let largest = decomposition.largest_rank(out, input);
            if rank > largest {
                let instead = match largest {
                    0 => "no rank saves anything; choose fewer rows".into(),
                    _ => format!("the largest rank that saves something is {largest}"),
                };
                return Err(Error::Request(format!(
                    "layer {l}: rank {rank} with a share of {rows} of the rows holds no fewer numbers than a matrix \
                     of {out} × {input}; {instead}"
                )));
            }
        }
    }
    Ok(())
}

/// For every window whether it is held out: a share of them, evenly spaced, at least one.
fn held_out(windows: &Windows, share: f64) -> Result<Vec<bool>> {
    let mask = windows.mask.as_deref();
    let real = |w: usize| {
        let tokens = w * windows.length..(w + 1) * windows.length;
        mask.is_none_or(|m| m[tokens].iter().any(|real| *real))
    };
    let usable: Vec<usize> = (0..windows.count).filter(|&w| real(w)).collect();
    if usable.len() < 2 {
        let n = usable.len();
        return Err(Error::Request(format!(
            "{n} window of tokens: expected at least 2, one to train on and one to judge; use more text or a smaller \
             --window-length"
        )));
    }
    let count = ((usable.len() as f64 * share).round() as usize).clamp(1, usable.len() - 1);
    let mut held = vec![false; windows.count];
    for i in 0..count {
        // The middle one of each of `count` equal parts.
        held[usable[(2 * i + 1) * usable.len() / (2 * count)]] = true;
    }
    Ok(held)
}

/// The pass over both models.
struct Distillation<'a, 'm, B: Backend> {
    original: &'a Model<'m, B>,
    compressed: &'a Model<'m, B>,
    options: &'a Options,
    held_out: Vec<bool>,
    /// The original's residual stream.
    stream: Stream<'m, B>,
    /// That of the result.
    recovered: Option<Stream<'m, B>>,
}

impl<B: Backend> Pass for Distillation<'_, '_, B> {
    fn restore(&mut self, work: &Residual, done: usize) -> Result<usize> {
        if work.layers_done() > done {
            work.forget()?;
        }
        let architecture = self.original.architecture();
        let (hidden, encoder) = (architecture.hidden_size, architecture.encoder_layers);
        let mut streams: Vec<_> = std::iter::once(&mut self.stream).chain(&mut self.recovered).collect();
        Ok(work.restore_all(self.original.backend(), &mut streams, hidden, encoder)?)
    }

    fn save(&self, work: &Residual, done: usize) -> Result<()> {
        let streams: Vec<_> = std::iter::once(&self.stream).chain(&self.recovered).collect();
        Ok(work.save_all(self.original.backend(), &streams, done)?)
    }

    fn layer(&mut self, source: &mut LayerSource) -> Result<(Option<LayerLoss>, String)> {
        let l = source.layer;
        let from = LayerSource::open(self.original.checkpoint(), self.original.architecture(), l)?;
        let outcome = match &mut source.feed_forward {
            FeedForwardSource::Dense(_) | FeedForwardSource::None => {
                let layer = self.original.prepare(&from)?;
                self.stream.advance(&layer, |_, _| Ok(()))?;
                if let Some(recovered) = &mut self.recovered {
                    recovered.advance(&self.compressed.prepare(source)?, |_, _| Ok(()))?;
                }
                (None, "no experts".into())
            }
            FeedForwardSource::Moe(_) => {
                let data = self.gather(&from, source)?;
                let FeedForwardSource::Moe(moe) = &mut source.feed_forward else { unreachable!() };
                let outcome = self.train(l, moe, &data)?;
                drop(data);
                self.leave(source)?;
                outcome
            }
        };
        from.release();
        Ok(outcome)
    }
}

impl<B: Backend> Distillation<'_, '_, B> {
    /// Runs the attention of the layer on both streams and collects what the experts are to be trained on. The original's
    /// stream then stands behind the layer, the other one before its experts.
    fn gather(&mut self, from: &LayerSource, to: &LayerSource) -> Result<Data> {
        let backend = self.original.backend();
        let (teacher, student) = (self.original.prepare(from)?, self.compressed.prepare(to)?);
        let Some(moe) = to.moe() else { return Ok(Data::default()) };
        let mut data = Data {
            hidden_size: self.original.architecture().hidden_size,
            expansion: moe.latent.as_ref().map(|[_, back]| expansion(from.layer, back)).transpose()?,
            top_k: moe.spec.top_k,
            weighs_input: moe.spec.target == WeightTarget::Input,
            ..Data::default()
        };
        let back = moe.latent.as_ref().and_then(|[_, back]| back.bias.as_ref());
        let bias = back.map(Tensor::to_f32).transpose()?;
        let Stream { chunks, scratch, .. } = &mut self.stream;
        let mut others = self.recovered.as_mut().map(|s| s.chunks.iter_mut());
        for chunk in chunks {
            teacher.attend(backend, chunk, scratch)?;
            let mut wanted = teacher.dissect(backend, &chunk.x, scratch)?;
            let found = match others.as_mut().and_then(Iterator::next) {
                None => student.dissect(backend, &chunk.x, scratch)?,
                Some(other) => {
                    student.attend(backend, other, scratch)?;
                    if let (Some(wanted), Some(factor)) = (&mut wanted, student.output_factor()) {
                        // What has been lost before the experts is theirs to make up for, unless a norm stands behind
                        // them.
                        let ours = student.behind_attention(backend, &other.x)?;
                        let theirs = teacher.behind_attention(backend, &chunk.x)?;
                        let drift = theirs.iter().zip(&ours).map(|(t, o)| (t - o) / factor);
                        wanted.routed.iter_mut().zip(drift).for_each(|(w, d)| *w += d);
                    }
                    student.dissect(backend, &other.x, scratch)?
                }
            };
            if let (Some(wanted), Some(found)) = (wanted, found) {
                let held_out = &self.held_out[chunk.first_window..];
                collect(&mut data, moe, &wanted, &found, bias.as_deref(), |row| {
                    chunk.batch.is_real(row).then(|| held_out[row / chunk.batch.length])
                });
            }
            teacher.feed(backend, &mut chunk.x, &chunk.batch, scratch, None)?;
        }
        if data.x.iter().chain(&data.target).all(|v| v.is_finite()) {
            Ok(data)
        } else {
            Err(Error::NonFinite { layer: from.layer })
        }
    }

    fn train(&self, l: usize, moe: &mut MoeSource, data: &Data) -> Result<(Option<LayerLoss>, String)> {
        let mut layer = TrainedLayer::new(moe)?;
        if !is_trainable(&layer) {
            return Ok((None, "nothing to train".into()));
        }
        let training = &self.options.training;
        let unsolved = |(expert, source)| Error::LeastSquares { layer: l, expert, source };
        let schedule = self.options.decompose.map(|Decomposition { rank, rows }| {
            split(&mut layer, rank).map_err(unsolved)?;
            Ok::<_, Error>(Schedule::new(rows, training.steps))
        });
        let schedule = schedule.transpose()?;
        let seed = training.seed.wrapping_add(l as u64);
        let loss = train(&mut layer, data, training, schedule.as_ref(), seed).map_err(unsolved)?;
        if schedule.is_some() || loss.after < loss.before {
            layer.write_to(moe);
        }
        let detail = format!("loss {:.4}, was {:.4}", loss.after, loss.before);
        Ok((Some(loss), detail))
    }

    /// Takes the stream of the result through the new experts.
    fn leave(&mut self, source: &LayerSource) -> Result<()> {
        let Some(Stream { chunks, scratch, .. }) = &mut self.recovered else { return Ok(()) };
        let layer = self.compressed.prepare(source)?;
        for chunk in chunks {
            layer.feed(self.compressed.backend(), &mut chunk.x, &chunk.batch, scratch, None)?;
        }
        Ok(())
    }
}

/// The map behind the experts of layer `layer`.
fn expansion(layer: usize, back: &LinearSource) -> Result<Expansion> {
    Expansion::new(back.weight.to_f32(), back.weight.cols()).map_err(|_| Error::NonFinite { layer })
}

/// Adds the rows that `held_out` does not refuse: `Some(true)` for those that only judge. The target of the routed
/// experts is the whole feed-forward output of the original less what the shared expert, and the bias of the map behind a
/// latent, give already.
fn collect(
    data: &mut Data,
    moe: &MoeSource,
    wanted: &Dissected,
    found: &Dissected,
    bias: Option<&[f32]>,
    held_out: impl Fn(usize) -> Option<bool>,
) {
    let (d, k, width) = (data.hidden_size, data.top_k, data.expert_io());
    let canonical = |id: u32| match moe.experts.get(id as usize) {
        Some(Expert::Alias(of)) => *of as u32,
        Some(Expert::None) | None => NONE,
        Some(_) => id,
    };
    for row in 0..wanted.routed.len() / d {
        let Some(held_out) = held_out(row) else { continue };
        let token = (data.target.len() / d) as u32;
        if held_out {
            data.held_out.push(token);
        } else {
            data.training.push(token);
        }
        let at = row * d..(row + 1) * d;
        data.x.extend_from_slice(&found.input[row * width..(row + 1) * width]);
        let first = data.target.len();
        data.target.extend_from_slice(&wanted.routed[at.clone()]);
        for (shared, sign) in [(&wanted.shared, 1.0), (&found.shared, -1.0)] {
            if let Some(shared) = shared {
                let target = data.target[first..].iter_mut().zip(&shared[at.clone()]);
                target.for_each(|(t, s)| *t += sign * s);
            }
        }
        if let Some(bias) = bias {
            data.target[first..].iter_mut().zip(bias).for_each(|(t, b)| *t -= b);
        }
        let first = data.ids.len();
        for slot in row * k..(row + 1) * k {
            let (id, weight) = (canonical(found.routes.ids[slot]), found.routes.weights[slot]);
            let earlier = data.ids[first..].iter().position(|&e| e == id && id != NONE);
            match earlier.filter(|_| !data.weighs_input) {
                Some(earlier) => {
                    data.weights[first + earlier] += weight;
                    data.ids.push(NONE);
                }
                None => data.ids.push(id),
            }
            data.weights.push(weight);
        }
    }
}
