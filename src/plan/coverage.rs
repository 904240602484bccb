//! What a plan takes from each kind of text.

use super::Plan;
use crate::backend::{Moment, Moments};

/// For every input file of the statistics, the share of its tokens' expert choices, over all layers, that fell on
/// experts which the plan keeps: 1 where nothing that the text used is dropped. `moments` are those of every MoE layer,
/// in the plan's order. A text far below the others is one that the smaller model forgets.
pub fn coverage(plan: &Plan, moments: &[Moments]) -> Vec<f64> {
    let files = moments.first().map_or(0, |m| m.dims().files);
    let share = |file: usize| {
        let (mut kept, mut all) = (0.0, 0.0);
        for (layer, moments) in plan.layers.iter().zip(moments) {
            let experts = moments.dims().experts;
            let Some(counts) = moments.get(Moment::Coverage) else { continue };
            for (expert, count) in layer.experts.iter().zip(&counts[file * experts..(file + 1) * experts]) {
                all += count;
                kept += if layer.has_row(&expert.action) { *count } else { 0.0 };
            }
        }
        if all > 0.0 { kept / all } else { 1.0 }
    };
    (0..files).map(share).collect()
}
