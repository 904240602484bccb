//! The calibration pass.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::statistics::{LayerUsage, entries};
use super::{Error, Residual, Result, Sample, Statistics, TokenInfo};
use crate::architecture::{MoeProfile, Profile};
use crate::backend::{Backend, Expert, Matrix, Moment, MomentDims, Moments};
use crate::checkpoint::write_safetensors;
use crate::model::{LayerSource, Model, MoeSource, Stream, profile};
use crate::progress::Progress;
use crate::tokens::Windows;

/// What to measure beyond the first moments.
#[derive(Clone, Debug)]
pub struct Options {
    /// Second moments, from [`Moment::SECOND`].
    pub second: Vec<Moment>,
    /// Tokens on which every expert is run.
    pub sample: Sample,
}

impl Default for Options {
    fn default() -> Self {
        Options { second: Vec::new(), sample: Sample::PerWindow(32) }
    }
}

/// Bytes that the listed second moments of all layers take in the statistics file.
pub fn second_moment_bytes(profile: &Profile, second: &[Moment]) -> u64 {
    let layer = |layer: &MoeProfile| -> u64 {
        let (experts, hidden_size, width) = (layer.experts, profile.expert_io(layer), layer.width);
        let dims = MomentDims { experts, hidden_size, width, files: 0 };
        second.iter().map(|m| m.shape(dims).iter().map(|&n| n as u64).product::<u64>() * 8).sum()
    };
    profile.moe_layers.iter().map(layer).sum()
}

/// Runs `windows` through `model`, a layer at a time, and writes the statistics of every MoE layer to `out`. A run that
/// was stopped goes on after the last finished layer, and gives the same bytes as one that was not.
///
/// # Errors
/// Names the layer, tensor or file; `out` is then as it was before.
pub fn calibrate<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    options: &Options,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Statistics> {
    let architecture = model.architecture();
    let backend = model.backend();
    let profile = profile(model.checkpoint(), architecture)?;
    let tokens = token_info(windows, options);
    let key = key(&profile, &tokens, options, &backend.arithmetic());
    let mut work = Residual::open(out, &key, &[model.checkpoint()], progress)?;
    if work.is_finished() {
        // Killed while its notes were being removed: what is left of them is of no use.
        work.begin()?;
    }
    let mut stream = Stream::new(model, windows)?;
    let done = work.restore(backend, &mut stream, architecture.hidden_size, architecture.encoder_layers)?;
    let layers = architecture.layers.len();
    let layer_file = |l: usize| work.path(&format!("layer-{l:05}.safetensors"));

    progress.begin("calibrate: layer", layers);
    for _ in 0..done {
        progress.step("done before");
    }
    for l in done..layers {
        let moments = advance(model, &mut stream, windows, options, l)?;
        if let Some(moments) = &moments {
            write_safetensors(&layer_file(l), &BTreeMap::new(), entries(l, moments))?;
        }
        let detail = moments.map_or("no experts".into(), |m| describe(l, &m));
        work.save(backend, &stream, l + 1)?;
        progress.step(&detail);
    }
    drop(stream);
    let files: Vec<_> = architecture.moe_layers().map(|(l, _)| (l, layer_file(l))).collect();
    Statistics::from_layers(profile, tokens, &files)?.write(out)?;
    work.remove()?;
    progress.end();
    Statistics::open(out)
}

/// The statistics that [`calibrate`] writes, kept in memory: for callers that use them once. Second moments of all
/// layers together can be large.
///
/// # Errors
/// Names the layer or tensor.
pub fn measure<B: Backend>(
    model: &Model<'_, B>,
    windows: &Windows,
    options: &Options,
    progress: &mut dyn Progress,
) -> Result<Statistics> {
    let profile = profile(model.checkpoint(), model.architecture())?;
    let mut stream = Stream::new(model, windows)?;
    let mut measured = Vec::new();
    let layers = model.architecture().layers.len();
    progress.begin("calibrate: layer", layers);
    for l in 0..layers {
        let moments = advance(model, &mut stream, windows, options, l)?;
        progress.step(&moments.as_ref().map_or("no experts".into(), |m| describe(l, m)));
        measured.extend(moments.map(|m| (l, m)));
    }
    progress.end();
    let name = Path::new("calibration tokens");
    Statistics::in_memory(name, profile, token_info(windows, options), &measured)
}

fn token_info(windows: &Windows, options: &Options) -> TokenInfo {
    TokenInfo {
        sha256: windows.sha256(),
        tokens: windows.real_tokens() as u64,
        windows: windows.count as u64,
        window_length: windows.length as u64,
        files: windows.files.iter().map(|f| f.name.clone()).collect(),
        sample: options.sample.to_string(),
    }
}

/// Advances `stream` by layer `l` and measures, where the layer has experts.
fn advance<B: Backend>(
    model: &Model<'_, B>,
    stream: &mut Stream<'_, B>,
    windows: &Windows,
    options: &Options,
    l: usize,
) -> Result<Option<Moments>> {
    let (architecture, backend) = (model.architecture(), model.backend());
    let source = LayerSource::open(model.checkpoint(), architecture, l)?;
    let layer = model.prepare(&source)?;
    let moments = if let Some(moe) = architecture.moe(l) {
        let dims = MomentDims {
            experts: source.moe().map_or(0, |m| m.experts.len()),
            hidden_size: architecture.expert_io(moe),
            width: moe.width,
            files: windows.files.len(),
        };
        let mut observer = backend.observer(dims, &options.second)?;
        let windows = windows.of_layer(architecture.in_encoder(l));
        stream.observe(&layer, &mut observer, |chunk| sampled_rows(windows, options.sample, chunk))?;
        let mut moments = backend.moments(observer)?;
        if let Some(moe) = source.moe() {
            moments.put(Moment::DownNormSq, down_norms(moe, dims.width));
        }
        check_finite(l, &moments)?;
        Some(moments)
    } else {
        stream.advance(&layer, |_, _| Ok(()))?;
        None
    };
    drop(layer);
    source.release();
    // Before the layer is written down.
    model.checkpoint().check_unchanged()?;
    Ok(moments)
}

/// [`Moment::DownNormSq`]; 0 where an expert has no dense down matrix.
fn down_norms(moe: &MoeSource, width: usize) -> Vec<f64> {
    let mut norms = vec![0.0; moe.experts.len() * width];
    norms.par_chunks_exact_mut(width).zip(&moe.experts).for_each(|(norms, expert)| {
        let Expert::Mlp(mlp) = expert else { return };
        let Matrix::Dense(weight) = &mlp.down.weight else { return };
        for row in weight.to_f32().chunks_exact(weight.cols()) {
            for (norm, w) in norms.iter_mut().zip(row) {
                *norm += f64::from(*w).powi(2);
            }
        }
    });
    norms
}

/// Everything that the numbers depend on.
fn key(profile: &Profile, tokens: &TokenInfo, options: &Options, arithmetic: &str) -> String {
    let second: Vec<&str> = options.second.iter().map(|m| m.name()).collect();
    format!("moepress calibrate 1\n{}\n{tokens:?}\n{second:?}\n{arithmetic}\n", profile.identity)
}

/// Rows of a chunk that are sampled: never padding.
fn sampled_rows<B: Backend>(windows: &Windows, sample: Sample, chunk: &crate::model::Chunk<B>) -> Vec<usize> {
    let length = windows.length;
    let rows = (0..chunk.batch.windows).flat_map(|w| {
        let start = (chunk.first_window + w) * length;
        let positions = sample.positions(&windows.ids[start..start + length]);
        positions.into_iter().map(move |p| w * length + p)
    });
    rows.filter(|&row| chunk.batch.is_real(row)).collect()
}

/// Errors where a moment of `layer` is not finite.
pub(crate) fn check_finite(layer: usize, moments: &Moments) -> Result<()> {
    for (moment, values) in moments.iter() {
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            let expert = i / (values.len() / moments.dims().experts.max(1)).max(1);
            return Err(Error::NonFinite { layer, moment: moment.name(), expert, value: values[i] });
        }
    }
    Ok(())
}

/// One line about a layer: how evenly its experts are used.
fn describe(layer: usize, moments: &Moments) -> String {
    let usage = LayerUsage::new(layer, moments.per_expert(Moment::Count));
    let share = format!("busiest expert {:.1} %", 100.0 * usage.busiest);
    if usage.never_chosen == 0 { share } else { format!("{share}, {} never chosen", usage.never_chosen) }
}
