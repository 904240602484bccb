//! Routing: logits, scores, top-k and combine weights.

use rayon::prelude::*;

use super::CpuBuffer;
use super::gemm::{Columns, Product, Source};
use super::math::sigmoid;
use super::simd::Isa;
use crate::architecture::{Choice, GroupLimit, GroupScore, Scoring, Skip, WeightRule, WeightTarget};
use crate::backend::{Result, RouterRule, RouterWeights, Routes};
use crate::checkpoint::{Dtype, Tensor};

/// A router: f32 weight `[experts, hidden]`, biases and factors `[experts]` and its rule.
#[derive(Clone, Debug)]
pub struct CpuRouter {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    choice_bias: Vec<f32>,
    expert_scales: Option<Vec<f32>>,
    rule: RouterRule,
}

/// Chosen experts of a batch and the workspace of the expert computation; grows to the largest batch and stays.
#[derive(Clone, Debug, Default)]
pub struct CpuRouting {
    pub(super) experts: usize,
    pub(super) top_k: usize,
    /// Whether weights multiply the input of experts instead of their output.
    pub(super) weighs_input: bool,
    /// `[tokens, experts]`.
    pub(super) logits: Vec<f32>,
    /// Scores, `[tokens, experts]`; 0 for rows that may not be chosen.
    pub(super) scores: Vec<f32>,
    /// `[tokens, top_k]`.
    pub(super) ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
    /// Tokens of each expert in a window.
    taken: Vec<usize>,
    pub(super) work: super::experts::Workspace,
}

impl CpuRouter {
    pub(super) fn new(weights: &RouterWeights, rule: RouterRule) -> Result<Self> {
        let vector = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::to_f32).transpose();
        Ok(CpuRouter {
            weight: weights.weight.to_f32()?,
            bias: vector(&weights.bias)?,
            choice_bias: vector(&weights.choice_bias)?.unwrap_or_default(),
            expert_scales: vector(&weights.expert_scales)?,
            rule,
        })
    }

    pub(super) fn route(&self, x: &CpuBuffer, routing: &mut CpuRouting) {
        let (tokens, e, k) = (x.rows, self.rule.live.len(), self.rule.spec.top_k);
        routing.experts = e;
        routing.top_k = k;
        routing.weighs_input = self.rule.spec.target == WeightTarget::Input;
        routing.logits.resize(tokens * e, 0.0);
        routing.scores.resize(tokens * e, 0.0);
        routing.ids.resize(tokens * k, 0);
        routing.weights.resize(tokens * k, 0.0);
        let out = Columns::new(&mut routing.logits, tokens, e, e);
        let w = Source::new(bytemuck::cast_slice(&self.weight), Dtype::F32, e, x.cols);
        Product { x: &x.data, stride: x.cols, w, out, accumulate: false }.run(Isa::current().exact());
        let logits = routing.logits.par_chunks_exact_mut(e);
        let scores = routing.scores.par_chunks_exact_mut(e);
        let chosen = routing.ids.par_chunks_exact_mut(k).zip(routing.weights.par_chunks_exact_mut(k));
        logits.zip(scores).zip(chosen).with_min_len(4).for_each(|((logits, scores), (ids, weights))| {
            if let Some(bias) = &self.bias {
                logits.iter_mut().zip(bias).for_each(|(logit, b)| *logit += b);
            }
            self.rule.decide(logits, &self.choice_bias, scores, ids, weights);
            if let Some(scales) = &self.expert_scales {
                for (id, weight) in ids.iter().zip(weights).filter(|(id, _)| **id != Routes::SKIPPED) {
                    *weight *= scales[*id as usize];
                }
            }
        });
    }
}

impl CpuRouting {
    /// Leaves out the tokens of an expert behind the first `capacity`, in every window of `length` tokens.
    pub(super) fn limit_tokens(&mut self, capacity: usize, length: usize) {
        let slots = (length * self.top_k).max(1);
        let windows = self.ids.chunks_mut(slots).zip(self.weights.chunks_mut(slots));
        for (ids, weights) in windows {
            self.taken.clear();
            self.taken.resize(self.experts, 0);
            for (id, weight) in ids.iter_mut().zip(weights).filter(|(id, _)| **id != Routes::SKIPPED) {
                let taken = &mut self.taken[*id as usize];
                if *taken == capacity {
                    (*id, *weight) = (Routes::SKIPPED, 0.0);
                } else {
                    *taken += 1;
                }
            }
        }
    }

    /// Every token of `rows` chooses every expert: with weight 1, or where weights multiply the input, with what it
    /// would have.
    pub(super) fn choose_all(&mut self, rows: &[usize], experts: usize) {
        self.experts = experts;
        self.top_k = experts;
        self.ids.clear();
        self.ids.extend(rows.iter().flat_map(|_| 0..experts as u32));
        self.weights.clear();
        if self.weighs_input {
            let scores = rows.iter().flat_map(|&row| &self.scores[row * experts..(row + 1) * experts]);
            self.weights.extend(scores);
        } else {
            self.weights.resize(rows.len() * experts, 1.0);
        }
    }

    /// The combine weight of `token`'s output from slot `expert`, if it chose it.
    pub(super) fn slot_weight(&self, token: usize, expert: usize) -> Option<f32> {
        let slots = token * self.top_k..(token + 1) * self.top_k;
        let slot = self.ids[slots.clone()].iter().position(|&id| id as usize == expert)?;
        Some(if self.weighs_input { 1.0 } else { self.weights[slots.start + slot] })
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

/// A logit that is NaN or −∞ counts as the least finite number, +∞ as the largest.
#[expect(clippy::manual_clamp, reason = "`clamp` lets NaN through, `max` gives the other operand for it")]
fn finite(logit: f32) -> f32 {
    logit.max(f32::MIN).min(f32::MAX)
}

/// What takes part in comparisons for a value that may be NaN: NaN counts as the smallest.
fn order(value: f32) -> f32 {
    if value.is_nan() { f32::NEG_INFINITY } else { value }
}

impl RouterRule {
    /// Scores of all experts, and the `top_k` chosen ones with their combine weights, from the logits of one token; experts'
    /// factors of these are not part of the rule.
    ///
    /// Whatever the logits, the ids are distinct and in range, scores and weights finite: a logit that is NaN or −∞ counts
    /// as the least finite number, +∞ as the largest, and weights whose sum is 0 are not divided by it. (What is wrong with
    /// a token shows in the outputs of its experts.)
    ///
    /// Rows that are not live take part in nothing, and sums run in row order, so the result is bit for bit that of a
    /// router without them.
    pub fn decide(
        &self,
        logits: &[f32],
        choice_bias: &[f32],
        scores: &mut [f32],
        ids: &mut [u32],
        weights: &mut [f32],
    ) {
        match self.spec.scoring {
            Scoring::Softmax | Scoring::SparseMixer { .. } => self.softmax(logits, scores),
            Scoring::Sigmoid => {
                for (i, score) in scores.iter_mut().enumerate() {
                    *score = if self.live[i] { sigmoid(finite(logits[i])) } else { 0.0 };
                }
            }
        }
        if let Scoring::SparseMixer { threshold } = self.spec.scoring {
            self.sparse_mixer(logits, threshold, ids, weights);
        } else {
            self.choose_and_weigh(logits, choice_bias, scores, ids, weights);
        }
        if let Some(skip) = &self.spec.skip {
            leave_out(skip, ids, weights);
        }
    }

    /// The chosen experts by their scores, and their weights.
    fn choose_and_weigh(
        &self,
        logits: &[f32],
        choice_bias: &[f32],
        scores: &[f32],
        ids: &mut [u32],
        weights: &mut [f32],
    ) {
        match self.spec.choice {
            Choice::Score => self.choose(|i| scores[i], ids),
            Choice::BiasedScore => self.choose(|i| scores[i] + choice_bias[i], ids),
            Choice::Logit => self.choose(|i| finite(logits[i]), ids),
        }
        for (weight, &id) in weights.iter_mut().zip(&*ids) {
            *weight = scores[id as usize];
        }
        match self.spec.weights {
            WeightRule::Scaled(scale) => weights.iter_mut().for_each(|w| *w *= scale),
            WeightRule::Renormalised { added, least, scale } => {
                let sum: f32 = weights.iter().sum();
                let denominator = (sum + added).max(least);
                for weight in weights {
                    *weight = if denominator == 0.0 { *weight } else { *weight / denominator } * scale;
                }
            }
        }
    }

    /// Softmax over the live rows; the others get 0, which adds nothing to any sum.
    fn softmax(&self, logits: &[f32], scores: &mut [f32]) {
        let live = |i: usize| self.live[i];
        let max = (0..logits.len()).filter(|&i| live(i)).map(|i| finite(logits[i])).fold(f32::MIN, f32::max);
        let mut sum = 0.0f32;
        for (i, score) in scores.iter_mut().enumerate() {
            *score = if live(i) { (finite(logits[i]) - max).exp() } else { 0.0 };
            sum += *score;
        }
        for score in scores {
            *score /= sum;
        }
    }

    /// The live rows with the largest values, descending, ties to the lower row.
    fn choose(&self, value: impl Fn(usize) -> f32, ids: &mut [u32]) {
        let value = |i: usize| order(value(i));
        let kept_groups = self.spec.groups.map(|limit| KeptGroups::choose(limit, &value, self));
        let mut found = 0;
        for i in 0..self.live.len() {
            let open = self.live[i] && kept_groups.as_ref().is_none_or(|g| g.kept[self.group_of[i] as usize]);
            if !open || (found == ids.len() && value(i) <= value(ids[found - 1] as usize)) {
                continue;
            }
            let mut slot = found.min(ids.len() - 1);
            while slot > 0 && value(i) > value(ids[slot - 1] as usize) {
                ids[slot] = ids[slot - 1];
                slot -= 1;
            }
            ids[slot] = i as u32;
            found = (found + 1).min(ids.len());
        }
    }

    /// One choice after the other, see [`Scoring::SparseMixer`].
    fn sparse_mixer(&self, logits: &[f32], threshold: f32, ids: &mut [u32], weights: &mut [f32]) {
        for (slot, weight) in weights.iter_mut().enumerate() {
            let (before, rest) = ids.split_at_mut(slot);
            let open = |i: &usize| self.live[*i] && !before.contains(&(*i as u32));
            let ahead =
                |best: usize, i: usize| if finite(logits[i]) > finite(logits[best]) { i } else { best };
            let Some(best) = (0..logits.len()).filter(open).reduce(ahead) else { return };
            let max = finite(logits[best]);
            let mut sum = 0.0f32;
            for z in (0..logits.len()).filter(open).map(|i| finite(logits[i])) {
                let far = (max - z) / z.abs().max(max) > threshold;
                sum += if far { 0.0 } else { (z - max).exp() };
            }
            rest[0] = best as u32;
            *weight = 1.0 / sum;
        }
    }
}

/// Leaves out the slots of least weight, see [`Skip`]: their ids become [`Routes::SKIPPED`] and their weights 0; the
/// others stay in place.
fn leave_out(skip: &Skip, ids: &mut [u32], weights: &mut [f32]) {
    let k = weights.len();
    // Slot m in descending order of weight, ties to the earlier slot; the slots usually stand in this order.
    let sorted = weights.is_sorted_by(|a, b| a >= b);
    let slot = |weights: &[f32], m: usize| {
        let ahead = |a: usize, b: usize| weights[b] > weights[a] || (weights[b] == weights[a] && b < a);
        let rank = |a: usize| (0..k).filter(|&b| ahead(a, b)).count();
        if sorted { m } else { (0..k).find(|&a| rank(a) == m).unwrap_or(m) }
    };
    let tail =
        |weights: &[f32], m: usize| (m..k).rev().fold(0.0f32, |sum, m| sum + weights[slot(weights, m)]);
    let total = tail(weights, 0);
    let limit = skip.tail() * total;
    let Some(kept) = (1..k).find(|&i| tail(weights, i) < limit) else { return };
    let sum = (0..kept).fold(0.0f32, |sum, m| sum + weights[slot(weights, m)]);
    // From the least on, each of which then stays the least.
    for m in (kept..k).rev() {
        let s = slot(weights, m);
        (ids[s], weights[s]) = (Routes::SKIPPED, 0.0);
    }
    if skip.rescale {
        for (id, weight) in ids.iter().zip(weights) {
            if *id != Routes::SKIPPED {
                *weight = total * (*weight / sum);
            }
        }
    }
}

/// The groups that a token may choose from.
struct KeptGroups {
    kept: [bool; GroupLimit::MAX_GROUPS],
}

impl KeptGroups {
    /// The `limit.kept` groups with the largest scores, ties to the lower group.
    fn choose(limit: GroupLimit, value: &impl Fn(usize) -> f32, rule: &RouterRule) -> Self {
        // The two largest values of each group.
        let mut best = [[f32::NEG_INFINITY; 2]; GroupLimit::MAX_GROUPS];
        let mut sizes = [0; GroupLimit::MAX_GROUPS];
        for i in (0..rule.live.len()).filter(|&i| rule.live[i]) {
            let group = rule.group_of[i] as usize;
            let [first, second] = &mut best[group];
            let value = value(i);
            *second = second.max(value.min(*first));
            *first = first.max(value);
            sizes[group] += 1;
        }
        let score = |g: usize| match limit.score {
            GroupScore::TwoLargest if sizes[g] > 1 => order(best[g][0] + best[g][1]),
            _ => best[g][0],
        };
        let mut kept = [false; GroupLimit::MAX_GROUPS];
        for (g, kept) in kept.iter_mut().enumerate().take(limit.count) {
            let before = |h: usize| score(h) > score(g) || (score(h) == score(g) && h < g);
            *kept = (0..limit.count).filter(|&h| before(h)).count() < limit.kept;
        }
        KeptGroups { kept }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::architecture::{RouterSpec, SkipThreshold};

    fn rule(spec: RouterSpec, experts: usize) -> RouterRule {
        let size = spec.groups.map_or(experts, |g| experts / g.count);
        RouterRule {
            spec,
            group_of: (0..experts).map(|e| (e / size) as u32).collect(),
            live: vec![true; experts],
        }
    }

    fn decide(rule: &RouterRule, logits: &[f32], choice_bias: &[f32]) -> (Vec<u32>, Vec<f32>, Vec<f32>) {
        let mut scores = vec![f32::NAN; logits.len()];
        let (mut ids, mut weights) = (vec![99; rule.spec.top_k], vec![f32::NAN; rule.spec.top_k]);
        rule.decide(logits, choice_bias, &mut scores, &mut ids, &mut weights);
        (ids, weights, scores)
    }

    fn close(found: &[f32], expected: &[f64]) {
        let near = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs() < 1e-6;
        assert!(found.iter().zip(expected).all(near), "{found:?} {expected:?}");
    }

    fn sigmoid64(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    fn deepseek_v3(top_k: usize, groups: Option<[usize; 2]>) -> RouterSpec {
        let weights = WeightRule::Renormalised { added: 1e-20, least: 0.0, scale: 2.5 };
        RouterSpec {
            scoring: Scoring::Sigmoid,
            choice: Choice::BiasedScore,
            groups: groups.map(|[count, kept]| GroupLimit { count, kept, score: GroupScore::TwoLargest }),
            ..RouterSpec::softmax(top_k, weights)
        }
    }

    /// The bias decides who is chosen and never how much.
    #[test]
    fn biased_sigmoid_by_hand() {
        let (ids, weights, scores) =
            decide(&rule(deepseek_v3(2, None), 4), &[2.0, 1.0, 0.0, -1.0], &[-0.9, 0.0, 0.0, 0.6]);
        assert_eq!(ids, [3, 1]);
        let (a, b) = (sigmoid64(-1.0), sigmoid64(1.0));
        close(&weights, &[2.5 * a / (a + b), 2.5 * b / (a + b)]);
        close(&scores, &[sigmoid64(2.0), b, 0.5, a]);
    }

    /// Two good experts in a group are worth more than the single best one; the largest score alone says otherwise.
    #[test]
    fn groups_by_two_and_by_one() {
        let logits = [3.0, -3.0, 1.0, 0.9, 0.0, -4.0];
        let two = deepseek_v3(2, Some([3, 1]));
        assert_eq!(decide(&rule(two.clone(), 6), &logits, &[0.0; 6]).0, [2, 3]);
        let mut one = two;
        one.groups = one.groups.map(|g| GroupLimit { score: GroupScore::Largest, ..g });
        assert_eq!(decide(&rule(one.clone(), 6), &logits, &[0.0; 6]).0, [0, 1]);
        // A negative bias everywhere: excluded experts are −∞, not 0.
        assert_eq!(decide(&rule(one, 6), &logits, &[-2.0; 6]).0, [0, 1]);
    }

    /// gpt-oss: the largest logits with their bias, softmax over those alone, also where the softmax over all
    /// underflows.
    #[test]
    fn top_k_of_the_logits() {
        let spec = RouterSpec { choice: Choice::Logit, ..RouterSpec::softmax(2, WeightRule::RENORMALISED) };
        let (ids, weights, _) = decide(&rule(spec.clone(), 4), &[0.5, -2.0, 1.5, 1.0], &[]);
        assert_eq!(ids, [2, 3]);
        let e = 0.5f64.exp();
        close(&weights, &[e / (1.0 + e), 1.0 / (1.0 + e)]);
        let (ids, weights, _) = decide(&rule(spec, 4), &[-300.0, -200.0, 100.0, -250.0], &[]);
        assert_eq!((ids, weights), (vec![2, 1], vec![1.0, 0.0]));
    }

    /// Llama 4: sigmoid weights of the largest logits, told apart even where their sigmoids are both 1.
    #[test]
    fn sigmoid_of_the_largest_logit() {
        let spec = RouterSpec {
            scoring: Scoring::Sigmoid,
            choice: Choice::Logit,
            ..RouterSpec::softmax(1, WeightRule::Scaled(1.0))
        };
        let (ids, weights, _) = decide(&rule(spec.clone(), 3), &[-1.0, 0.5, 0.25], &[]);
        assert_eq!(ids, [1]);
        close(&weights, &[sigmoid64(0.5)]);
        assert_eq!(decide(&rule(spec, 3), &[30.0, 40.0, 35.0], &[]).0, [1]);
    }

    /// ERNIE: softmax plus bias chooses, and the sum has a floor.
    #[test]
    fn biased_softmax_by_hand() {
        let weights = WeightRule::Renormalised { added: 0.0, least: 0.5, scale: 1.0 };
        let spec = RouterSpec { choice: Choice::BiasedScore, ..RouterSpec::softmax(1, weights) };
        let logits = [3f32.ln(), 0.0, 0.0];
        assert_eq!(decide(&rule(spec.clone(), 3), &logits, &[0.0; 3]).0, [0]);
        let (ids, weights, scores) = decide(&rule(spec, 3), &logits, &[-0.5, 0.0, 0.01]);
        assert_eq!(ids, [2]);
        close(&scores, &[0.6, 0.2, 0.2]);
        close(&weights, &[0.4]);
    }

    /// Both softmaxes leave out what is too far from the maximum of the moment.
    #[test]
    fn sparse_mixer_by_hand() {
        let spec = RouterSpec {
            scoring: Scoring::SparseMixer { threshold: 0.2 },
            ..RouterSpec::softmax(2, WeightRule::Scaled(1.0))
        };
        // Around 2.0: 1.7 is within 20 %, 1.5 is not; around 1.7: 1.5 is, 1.0 is not.
        let (ids, weights, _) = decide(&rule(spec.clone(), 4), &[1.5, 2.0, 1.0, 1.7], &[]);
        assert_eq!(ids, [1, 3]);
        close(&weights, &[1.0 / (1.0 + (-0.3f64).exp()), 1.0 / (1.0 + (-0.2f64).exp())]);
        // Below zero the distance is measured against |z|: −1.2 is 0.2 / 1.2 away from −1.
        let (ids, weights, _) = decide(&rule(spec, 3), &[-1.2, -1.0, -9.0], &[]);
        assert_eq!(ids, [1, 0]);
        close(&weights, &[1.0 / (1.0 + (-0.2f64).exp()), 1.0]);
    }

    fn skipping(threshold: SkipThreshold, rescale: bool, weights: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut ids, mut weights) = ((0..weights.len() as u32).collect::<Vec<_>>(), weights.to_vec());
        leave_out(&Skip { threshold, rescale }, &mut ids, &mut weights);
        (ids, weights)
    }

    /// The second of two goes where its weight is strictly below the ratio, and the first then weighs exactly 1.
    #[test]
    fn the_second_of_two_is_skipped() {
        let ratio = SkipThreshold::Ratio(1.0 / 3.0);
        assert_eq!(skipping(ratio, true, &[0.8, 0.2]), (vec![0, Routes::SKIPPED], vec![1.0, 0.0]));
        assert_eq!(skipping(ratio, false, &[0.8, 0.2]), (vec![0, Routes::SKIPPED], vec![0.8, 0.0]));
        assert_eq!(skipping(ratio, true, &[0.7, 0.3]), (vec![0, 1], vec![0.7, 0.3]));
        assert_eq!(skipping(ratio, true, &[0.75, 0.25]), (vec![0, 1], vec![0.75, 0.25]));
    }

    /// The vectors of the general rule, and weights that do not stand in order.
    #[test]
    fn tails_are_skipped() {
        for (weights, tail, kept) in [
            (vec![0.4, 0.3, 0.2, 0.1], 0.15, vec![0, 1, 2]),
            (vec![0.4, 0.3, 0.2, 0.1], 0.35, vec![0, 1]),
            (vec![0.4, 0.3, 0.2, 0.1], 0.65, vec![0]),
            (vec![0.7, 0.1, 0.1, 0.1], 0.3 + 1e-6, vec![0]),
            (vec![0.1, 0.4, 0.2, 0.3], 0.35, vec![1, 3]),
            (vec![0.25, 0.25, 0.25, 0.25], 0.3, vec![0, 1, 2]),
            (vec![f32::NAN, 0.5], 0.9, vec![0, 1]),
            (vec![0.0, 0.0], 0.9, vec![0, 1]),
        ] {
            let (ids, scaled) = skipping(SkipThreshold::Tail(tail), true, &weights);
            let left: Vec<u32> = ids.iter().copied().filter(|id| *id != Routes::SKIPPED).collect();
            assert_eq!(left, kept, "{weights:?} {tail}");
            let sum: f32 = weights.iter().sum();
            if !sum.is_nan() {
                assert!((scaled.iter().sum::<f32>() - sum).abs() < 1e-6, "{scaled:?}");
            }
        }
    }

    /// The rules of all families that choose `top_k` of 8 experts.
    fn rules(top_k: usize) -> Vec<RouterSpec> {
        let softmax = RouterSpec::softmax(top_k, WeightRule::RENORMALISED);
        let groups = Some(GroupLimit { count: 4, kept: 3, score: GroupScore::Largest });
        vec![
            softmax.clone(),
            RouterSpec { groups, ..RouterSpec::softmax(top_k, WeightRule::Scaled(16.0)) },
            deepseek_v3(top_k, None),
            deepseek_v3(top_k, Some([4, 3])),
            RouterSpec { choice: Choice::BiasedScore, ..softmax.clone() },
            RouterSpec { choice: Choice::Logit, ..softmax.clone() },
            RouterSpec { scoring: Scoring::Sigmoid, choice: Choice::Logit, ..softmax.clone() },
            RouterSpec { scoring: Scoring::SparseMixer { threshold: 0.02 }, ..softmax },
        ]
    }

    fn logit() -> impl Strategy<Value = f32> {
        prop_oneof![
            6 => -4.0f32..4.0,
            1 => Just(0.0),
            1 => Just(f32::NAN),
            1 => Just(f32::INFINITY),
            1 => Just(f32::NEG_INFINITY),
        ]
    }

    proptest! {
        #[test]
        fn any_logits_give_distinct_ids_and_finite_weights(
            logits in prop::collection::vec(logit(), 8), bias in prop::collection::vec(-1.0f32..1.0, 8), top_k in 1usize..5,
        ) {
            for spec in rules(top_k) {
                let (mut ids, weights, scores) = decide(&rule(spec, 8), &logits, &bias);
                prop_assert!(ids.iter().all(|&id| id < 8));
                prop_assert!(weights.iter().chain(&scores).all(|v| v.is_finite()), "{:?} {:?}", weights, scores);
                ids.sort_unstable();
                ids.dedup();
                prop_assert_eq!(ids.len(), top_k);
            }
        }

        /// A row that may not be chosen is as good as none.
        #[test]
        fn dead_rows_are_absent_rows(
            logits in prop::collection::vec(-4.0f32..4.0, 8), bias in prop::collection::vec(-1.0f32..1.0, 8),
            dead in 0usize..8, other in 0usize..8,
        ) {
            for spec in rules(2) {
                let mut masked = rule(spec, 8);
                masked.live[dead] = false;
                masked.live[other] = false;
                let keep: Vec<usize> = (0..8).filter(|&e| masked.live[e]).collect();
                let pick = |values: &[f32]| -> Vec<f32> { keep.iter().map(|&e| values[e]).collect() };
                let sliced = RouterRule {
                    spec: masked.spec.clone(),
                    group_of: keep.iter().map(|&e| masked.group_of[e]).collect(),
                    live: vec![true; keep.len()],
                };
                let (ids, weights, scores) = decide(&masked, &logits, &bias);
                let (sliced_ids, sliced_weights, sliced_scores) = decide(&sliced, &pick(&logits), &pick(&bias));
                let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
                let renumbered: Vec<u32> = sliced_ids.iter().map(|&i| keep[i as usize] as u32).collect();
                prop_assert_eq!(ids, renumbered);
                prop_assert_eq!(bits(&weights), bits(&sliced_weights));
                prop_assert_eq!(bits(&pick(&scores)), bits(&sliced_scores));
            }
        }
    }
}
