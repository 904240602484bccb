//! Every expert on every token.

use std::path::Path;

use super::exact;
use super::grams::LayerGrams;
use super::rows::{batches, real};
use super::rule::Rule;
use super::state::Entered;
use crate::backend::Backend;
use crate::model::{Model, Result, Stream, TOKENS_PER_CHUNK};

/// Runs every expert of the entered layer on every token. With `original`, the stream that targets come from, the
/// difference of the routed outputs on the two inputs is one more vector of every token.
pub(super) fn measure<B: Backend>(
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
    let scales = moe.router.expert_scales.as_ref().map(crate::checkpoint::Tensor::to_f32).transpose()?;
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
                let mut triangles = layer.output_grams(backend, rows, extra.as_deref(), scratch)?;
                if let Some(scales) = &scales {
                    scale_outputs(&mut triangles, scales, experts + usize::from(extra.is_some()));
                }
                values.extend(triangles);
                logits.extend(rows.iter().flat_map(|r| &routes.logits[r * experts..(r + 1) * experts]));
            }
            let io = |source| crate::checkpoint::Error::Io { path: path.into(), source };
            grams.push(batch, &logits, values, path).map_err(io)?;
        }
    }
    Ok(grams)
}

/// Makes the experts' factors of combine weights, which the rule does not know, factors of their outputs. `triangles` hold
/// the inner products of these and of `vectors` − `scales.len()` others.
fn scale_outputs(triangles: &mut [f32], scales: &[f32], vectors: usize) {
    let scale = |v: usize| scales.get(v).copied().unwrap_or(1.0);
    for triangle in triangles.chunks_exact_mut(vectors * (vectors + 1) / 2) {
        let pairs = (0..vectors).flat_map(|a| (0..=a).map(move |b| (a, b)));
        for (product, (a, b)) in triangle.iter_mut().zip(pairs) {
            *product *= scale(a) * scale(b);
        }
    }
}
