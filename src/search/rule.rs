//! What a router does to one token when some experts cannot be chosen, without computing its logits again.

use std::cmp::Ordering;

use crate::architecture::{Choice, Scoring, WeightRule, WeightTarget};
use crate::backend::{RouterRule, Routes};

/// The experts that a candidate drops.
pub(super) struct Mask {
    pub(super) dropped: Vec<usize>,
    /// The rule without them.
    without: RouterRule,
}

/// A layer's routing rule, applied to stored logits.
pub(super) struct Rule {
    full: RouterRule,
    choice_bias: Vec<f32>,
    /// Whether the chosen experts are the first live ones of an order that no mask changes.
    ordered: bool,
    softmax: bool,
    /// Whether the weights depend on nothing but which experts are chosen.
    fixed: bool,
}

/// Routing facts of some tokens, [tokens, …] each.
#[derive(Default)]
pub(super) struct Tokens {
    pub(super) count: usize,
    logits: Vec<f32>,
    /// Experts in the order of choice, `[tokens, experts]`; unused where `exact`.
    order: Vec<u16>,
    /// exp(l − max l), or the sigmoid of l, `[tokens, experts]`.
    scores: Vec<f64>,
    /// Sum of a token's scores.
    pub(super) totals: Vec<f64>,
    /// Tokens for which only the router's own arithmetic decides: two logits are as close as its rounding.
    pub(super) exact: Vec<bool>,
    /// What the router chooses from all experts, `[tokens, top_k]`.
    ids: Vec<u16>,
    weights: Vec<f64>,
}

/// Experts and combine weights of one token.
#[derive(Default)]
pub(super) struct Choices {
    pub(super) ids: Vec<u16>,
    pub(super) weights: Vec<f64>,
    scores: Vec<f32>,
    raw_ids: Vec<u32>,
    raw_weights: Vec<f32>,
}

/// How a mask changes the choice.
pub(super) enum Change {
    /// Not at all.
    None,
    /// The same experts with weights multiplied by this.
    Scaled(f64),
    /// What [`Choices`] says.
    Other,
}

impl Rule {
    pub(super) fn new(rule: RouterRule, choice_bias: Vec<f32>) -> Self {
        let spec = &rule.spec;
        let softmax = spec.scoring == Scoring::Softmax;
        let sparse = matches!(spec.scoring, Scoring::SparseMixer { .. });
        let biased = softmax && spec.choice == Choice::BiasedScore;
        let summed = match spec.weights {
            WeightRule::Renormalised { added, least, .. } => added != 0.0 || least != 0.0,
            WeightRule::Scaled(_) => true,
        };
        Rule {
            ordered: spec.groups.is_none() && spec.skip.is_none() && !sparse && !biased,
            softmax,
            fixed: spec.target == WeightTarget::Input || !(sparse || (softmax && summed)),
            choice_bias,
            full: rule,
        }
    }

    pub(super) fn experts(&self) -> usize {
        self.full.live.len()
    }

    /// The rule without the experts `dropped`.
    pub(super) fn mask(&self, dropped: &[usize]) -> Mask {
        let mut rule = self.full.clone();
        for &e in dropped {
            rule.live[e] = false;
        }
        Mask { dropped: dropped.to_vec(), without: rule }
    }

    /// Adds a token with these logits.
    pub(super) fn push(&self, tokens: &mut Tokens, logits: &[f32], work: &mut Choices) {
        let e = logits.len();
        work.decide(&self.full, logits, &self.choice_bias);
        let spec = &self.full.spec;
        let live = &self.full.live;
        let most = (0..e).filter(|&i| live[i]).map(|i| logits[i]).fold(f32::NEG_INFINITY, f32::max);
        let least = (0..e).filter(|&i| live[i]).map(|i| logits[i]).fold(f32::INFINITY, f32::min);
        let range = most - least;
        // Beyond this range sums of exponentials in f64 could vanish.
        let mut exact = !self.ordered || range.is_nan() || range > 600.0;
        let by_logit = spec.choice == Choice::Logit || (self.softmax && spec.choice == Choice::Score);
        let value = |i: usize| match spec.choice {
            _ if by_logit => logits[i],
            Choice::BiasedScore => work.scores[i] + self.choice_bias[i],
            _ => work.scores[i],
        };
        let mut order: Vec<u16> = (0..e as u16).filter(|&i| live[usize::from(i)]).collect();
        if !exact {
            order.sort_by(|&a, &b| {
                let (x, y) = (value(usize::from(a)), value(usize::from(b)));
                y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(&b))
            });
            // Softmax scores can round to equal numbers, or the other way round, where logits are this close.
            let close = 1e-6 * (1.0 + range);
            let tie = |pair: &[u16]| {
                let gap = value(usize::from(pair[0])) - value(usize::from(pair[1]));
                gap > 0.0 && gap <= close
            };
            exact = self.softmax && spec.choice == Choice::Score && order.windows(2).any(tie);
        }
        order.resize(e, u16::MAX);
        let score = |i: usize| match (live[i], self.softmax) {
            (false, _) => 0.0,
            (true, true) => (f64::from(logits[i]) - f64::from(most)).exp(),
            (true, false) => f64::from(work.scores[i]),
        };
        let start = tokens.scores.len();
        tokens.scores.extend((0..e).map(score));
        tokens.totals.push(tokens.scores[start..].iter().sum());
        tokens.logits.extend_from_slice(logits);
        tokens.order.extend_from_slice(&order);
        tokens.exact.push(exact);
        let t = tokens.count;
        tokens.count += 1;
        if !exact {
            let none = self.mask(&[]);
            self.walk(tokens, t, &none, work);
        }
        // Slots that are skipped, in models that skip, have no expert and weigh nothing.
        work.ids.resize(spec.top_k, 0);
        work.weights.resize(spec.top_k, 0.0);
        tokens.ids.extend_from_slice(&work.ids);
        tokens.weights.extend_from_slice(&work.weights);
    }

    /// What the router chooses for token `t` under `mask`; where it says [`Change::Other`], the choice is in `work`.
    pub(super) fn choose(&self, tokens: &Tokens, t: usize, mask: &Mask, work: &mut Choices) -> Change {
        let (ids, weights) = self.original(tokens, t);
        let live = &mask.without.live;
        let same = ids.iter().all(|&id| live[usize::from(id)]);
        if tokens.exact[t] {
            let e = self.experts();
            work.decide(&mask.without, &tokens.logits[t * e..(t + 1) * e], &self.choice_bias);
            let kept = work.weights.len();
            let equal = kept == ids.len() && work.ids == ids;
            return if equal && (self.fixed || work.weights == weights) {
                Change::None
            } else {
                Change::Other
            };
        }
        if same && self.fixed {
            return Change::None;
        }
        if same && let WeightRule::Scaled(_) = self.full.spec.weights {
            return Change::Scaled(tokens.totals[t] / self.rest(tokens, t, mask));
        }
        self.walk(tokens, t, mask, work);
        Change::Other
    }

    /// Experts and weights that token `t` has without a mask.
    pub(super) fn original<'a>(&self, tokens: &'a Tokens, t: usize) -> (&'a [u16], &'a [f64]) {
        let slots = t * self.full.spec.top_k..(t + 1) * self.full.spec.top_k;
        (&tokens.ids[slots.clone()], &tokens.weights[slots])
    }

    /// The first live experts of the token's order, and their weights.
    fn walk(&self, tokens: &Tokens, t: usize, mask: &Mask, work: &mut Choices) {
        let order = self.order(tokens, t);
        let live = |id: &&u16| mask.without.live.get(usize::from(**id)).is_some_and(|live| *live);
        work.ids.clear();
        work.ids.extend(order.iter().filter(live).take(self.full.spec.top_k));
        let rest = if self.fixed || !self.softmax { 1.0 } else { self.rest(tokens, t, mask) };
        self.weigh(tokens, t, rest, work);
    }

    /// The weights of the experts in `work`; `rest` is the sum of the scores of all that can be chosen, where weights
    /// depend on it.
    pub(super) fn weigh(&self, tokens: &Tokens, t: usize, rest: f64, work: &mut Choices) {
        let (spec, scores) = (&self.full.spec, self.scores(tokens, t));
        work.weights.clear();
        if spec.target == WeightTarget::Input {
            work.weights.resize(work.ids.len(), 1.0);
            return;
        }
        let chosen = work.ids.iter().map(|&id| scores[usize::from(id)]);
        let sum: f64 = chosen.clone().sum();
        match spec.weights {
            WeightRule::Renormalised { added: 0.0, least: 0.0, scale } => {
                work.weights.extend(chosen.map(|s| s / sum * f64::from(scale)));
            }
            WeightRule::Scaled(scale) => {
                work.weights.extend(chosen.map(|s| s / self.whole(rest) * f64::from(scale)));
            }
            WeightRule::Renormalised { .. } => {
                let factor = self.factor(sum, rest);
                work.weights.extend(chosen.map(|s| s * factor));
            }
        }
    }

    /// What scores are divided by before they become weights.
    fn whole(&self, rest: f64) -> f64 {
        if self.softmax { rest } else { 1.0 }
    }

    /// What the scores of chosen experts are multiplied by, given their `sum`.
    pub(super) fn factor(&self, sum: f64, rest: f64) -> f64 {
        let whole = self.whole(rest);
        match self.full.spec.weights {
            WeightRule::Scaled(scale) => f64::from(scale) / whole,
            WeightRule::Renormalised { added, least, scale } => {
                f64::from(scale) / (whole * (sum / whole + f64::from(added)).max(f64::from(least)))
            }
        }
    }

    /// A token's experts in the order of choice; those that cannot be chosen are left out, and `u16::MAX` fills up.
    pub(super) fn order<'a>(&self, tokens: &'a Tokens, t: usize) -> &'a [u16] {
        &tokens.order[t * self.experts()..(t + 1) * self.experts()]
    }

    /// A token's scores.
    pub(super) fn scores<'a>(&self, tokens: &'a Tokens, t: usize) -> &'a [f64] {
        &tokens.scores[t * self.experts()..(t + 1) * self.experts()]
    }

    /// Whether a token's weights depend on nothing but which experts are chosen.
    pub(super) fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// Experts that are chosen, and experts that can be.
    pub(super) fn choice(&self) -> (usize, usize) {
        (self.full.spec.top_k, self.full.live.iter().filter(|live| **live).count())
    }

    /// Sum of the scores of the experts that can be chosen.
    fn rest(&self, tokens: &Tokens, t: usize, mask: &Mask) -> f64 {
        let scores = self.scores(tokens, t);
        self.rest_without(tokens, t, mask, mask.dropped.iter().map(|&d| scores[d]).sum())
    }

    /// The same, given the sum of the scores that `mask` drops.
    pub(super) fn rest_without(&self, tokens: &Tokens, t: usize, mask: &Mask, dropped: f64) -> f64 {
        let (scores, total) = (self.scores(tokens, t), tokens.totals[t]);
        let rest = total - dropped;
        // Where nearly everything goes, the difference has lost its digits.
        if rest > 1e-3 * total {
            rest
        } else {
            (0..self.experts()).filter(|&i| mask.without.live[i]).map(|i| scores[i]).sum()
        }
    }
}

impl Choices {
    /// The router's own arithmetic.
    fn decide(&mut self, rule: &RouterRule, logits: &[f32], choice_bias: &[f32]) {
        self.scores.resize(logits.len(), 0.0);
        self.raw_ids.resize(rule.spec.top_k, 0);
        self.raw_weights.resize(rule.spec.top_k, 0.0);
        rule.decide(logits, choice_bias, &mut self.scores, &mut self.raw_ids, &mut self.raw_weights);
        self.ids.clear();
        self.weights.clear();
        let input = rule.spec.target == WeightTarget::Input;
        for (id, weight) in
            self.raw_ids.iter().zip(&self.raw_weights).filter(|(id, _)| **id != Routes::SKIPPED)
        {
            self.ids.push(*id as u16);
            self.weights.push(if input { 1.0 } else { f64::from(*weight) });
        }
    }
}
