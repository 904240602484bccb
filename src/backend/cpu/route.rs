//! Routing: logits, scores, top-k and combine weights.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Product, Source};
use super::linear::CpuWeight;
use super::simd::Isa;
use crate::architecture::{GroupLimit, WeightRule};
use crate::backend::{Result, RouterRule, Routes};
use crate::checkpoint::{Dtype, Tensor};

/// A router: f32 weight `[experts, hidden]` and its rule.
#[derive(Clone, Debug)]
pub struct CpuRouter {
    weight: Vec<f32>,
    experts: usize,
    rule: RouterRule,
}

/// Chosen experts of a batch and the workspace of the expert computation; grows to the largest batch and stays.
#[derive(Clone, Debug, Default)]
pub struct CpuRouting {
    pub(super) experts: usize,
    pub(super) top_k: usize,
    /// `[tokens, experts]`.
    pub(super) logits: Vec<f32>,
    /// Softmax probabilities, `[tokens, experts]`; 0 for rows that may not be chosen.
    pub(super) scores: Vec<f32>,
    /// `[tokens, top_k]`.
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
    pub(super) work: super::experts::Workspace,
}

impl CpuRouter {
    pub(super) fn new(weight: &Tensor, rule: RouterRule) -> Result<Self> {
        let prepared = CpuWeight::new(weight)?;
        Ok(CpuRouter { weight: prepared.to_f32().into_owned(), experts: prepared.rows(), rule })
    }

    pub(super) fn route(&self, x: &CpuBuffer, routing: &mut CpuRouting) {
        let (tokens, e, k) = (x.rows, self.experts, self.rule.spec.top_k);
        routing.experts = e;
        routing.top_k = k;
        routing.logits.resize(tokens * e, 0.0);
        routing.scores.resize(tokens * e, 0.0);
        routing.ids.resize(tokens * k, 0);
        routing.weights.resize(tokens * k, 0.0);
        let out = Columns::new(&mut routing.logits, tokens, e, e);
        let w = Source::new(bytemuck::cast_slice(&self.weight), Dtype::F32, e, x.cols);
        Product { x: &x.data, stride: x.cols, w, out, accumulate: false }.run(Isa::current());
        let logits = routing.logits.par_chunks_exact(e);
        let scores = routing.scores.par_chunks_exact_mut(e);
        let chosen = routing.ids.par_chunks_exact_mut(k).zip(routing.weights.par_chunks_exact_mut(k));
        logits.zip(scores).zip(chosen).with_min_len(4).for_each(|((logits, scores), (ids, weights))| {
            self.rule.softmax(logits, scores);
            self.rule.choose(scores, ids, weights);
        });
    }
}

impl CpuRouting {
    /// Every token chooses every expert, with weight 1.
    pub(super) fn choose_all(&mut self, tokens: usize, experts: usize) {
        self.experts = experts;
        self.top_k = experts;
        self.ids.clear();
        self.ids.extend((0..tokens).flat_map(|_| 0..experts as u32));
        self.weights.clear();
        self.weights.resize(tokens * experts, 1.0);
    }

    /// The combine weight that `token` gives slot `expert`, if it chose it.
    pub(super) fn slot_weight(&self, token: usize, expert: usize) -> Option<f32> {
        let slots = token * self.top_k..(token + 1) * self.top_k;
        let slot = self.ids[slots.clone()].iter().position(|&id| id as usize == expert)?;
        Some(self.weights[slots.start + slot])
    }

    pub(super) fn to_routes(&self) -> Routes {
        Routes {
            top_k: self.top_k,
            logits: self.logits.clone(),
            ids: self.ids.clone(),
            weights: self.weights.clone(),
        }
    }
}

impl RouterRule {
    /// Softmax over the live rows; the others get 0. Terms are added in row order, and a dead row would add an exact
    /// 0, so the result is bit for bit that of a router without the dead rows.
    fn softmax(&self, logits: &[f32], scores: &mut [f32]) {
        let live = |i: usize| self.live[i];
        let max = (0..logits.len()).filter(|&i| live(i)).map(|i| logits[i]).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0f32;
        for (i, score) in scores.iter_mut().enumerate() {
            *score = if live(i) { (logits[i] - max).exp() } else { 0.0 };
            sum += *score;
        }
        for score in scores {
            *score /= sum;
        }
    }

    /// The `top_k` largest scores, descending, ties to the lower row, and their combine weights. The ids are distinct
    /// and in range whatever the scores: NaN counts as the smallest.
    fn choose(&self, scores: &[f32], ids: &mut [u32], weights: &mut [f32]) {
        let key = |score: f32| if score.is_nan() { f32::NEG_INFINITY } else { score };
        let kept_groups = self.spec.groups.map(|limit| KeptGroups::choose(limit, scores, self));
        let mut found = 0;
        for (i, &score) in scores.iter().enumerate() {
            let open = self.live[i] && kept_groups.as_ref().is_none_or(|g| g.kept[self.group_of[i] as usize]);
            if !open || (found == ids.len() && key(score) <= key(weights[found - 1])) {
                continue;
            }
            let mut slot = found.min(ids.len() - 1);
            while slot > 0 && key(score) > key(weights[slot - 1]) {
                ids[slot] = ids[slot - 1];
                weights[slot] = weights[slot - 1];
                slot -= 1;
            }
            ids[slot] = i as u32;
            weights[slot] = score;
            found = (found + 1).min(ids.len());
        }
        match self.spec.weights {
            WeightRule::Scaled(scale) => weights.iter_mut().for_each(|w| *w *= scale),
            WeightRule::Renormalised => {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= sum);
            }
        }
    }
}

/// The groups that a token may choose from.
struct KeptGroups {
    kept: [bool; GroupLimit::MAX_GROUPS],
}

impl KeptGroups {
    /// The `limit.kept` groups with the largest single score, ties to the lower group.
    fn choose(limit: GroupLimit, scores: &[f32], rule: &RouterRule) -> Self {
        let mut best = [0.0f32; GroupLimit::MAX_GROUPS];
        for (i, &score) in scores.iter().enumerate() {
            let group = &mut best[rule.group_of[i] as usize];
            *group = group.max(score);
        }
        let best = &best[..limit.count];
        let mut kept = [false; GroupLimit::MAX_GROUPS];
        for (g, &score) in best.iter().enumerate() {
            let ahead = best.iter().enumerate().filter(|&(h, &s)| s > score || (s == score && h < g)).count();
            kept[g] = ahead < limit.kept;
        }
        KeptGroups { kept }
    }
}
