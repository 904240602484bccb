//! Losses of many sets of dropped experts, one value per token and outcome.
//!
//! Where weights depend on nothing but which experts are chosen, an outcome has one loss, the very number that the set by
//! itself would have. Where they depend on the scores of all that can be chosen, it is a polynomial in one number.

use super::grams::{LayerGrams, Work, entry, quadratic};
use super::outcomes::{Lookup, Outcomes, Sets};
use super::rule::{Mask, Tokens};

/// The outcomes that a set of masks can lead to.
pub(super) struct Table {
    outcomes: Outcomes,
    sets: Sets,
}

/// One token of a layer.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) tokens: &'a Tokens,
    /// Its number among these.
    pub(super) t: usize,
    /// Its packed triangle.
    pub(super) gram: &'a [f32],
}

/// A token of a router whose weights depend on the scores of all that can be chosen: what its routed output z, the extra
/// vector e and the sum y of what it chooses, each with its score, have to do with each other.
struct Original {
    /// z and e as coefficients.
    output: Vec<(usize, f64)>,
    extra: Vec<(usize, f64)>,
    /// What the scores are multiplied by where nothing is dropped.
    factor: f64,
    zz: f64,
    ze: f64,
    ee: f64,
}

/// The part of an outcome in that.
#[derive(Clone, Copy)]
struct Part {
    yy: f64,
    zy: f64,
    ye: f64,
    /// Sum of the scores of what is chosen.
    sum: f64,
}

impl Original {
    fn new(grams: &LayerGrams, token: Token<'_>, outcomes: &Outcomes, work: &mut Work) -> Self {
        let Token { tokens, t, gram } = token;
        let (ids, weights) = grams.rule.original(tokens, t);
        let output: Vec<(usize, f64)> =
            ids.iter().zip(weights).map(|(id, w)| (usize::from(*id), *w)).collect();
        let mut extra = Vec::new();
        grams.add_extra(&mut extra);
        let (zz, ze) = (product(gram, &output, &output), product(gram, &output, &extra));
        let ee = product(gram, &extra, &extra);
        let mut original = Original { output, extra, factor: 0.0, zz, ze, ee };
        let sum = Part::new(grams, token, outcomes, 0, &original, work).sum;
        original.factor = grams.rule.factor(sum, tokens.totals[t]);
        original
    }

    /// ‖z − `factor` · y + e‖²; `same` where y is what is chosen with all experts, so that z is a multiple of it.
    fn square(&self, part: Part, factor: f64, same: bool) -> f64 {
        let Part { yy, zy, ye, .. } = part;
        if same {
            let c = self.factor - factor;
            return (c * (c * yy + 2.0 * ye) + self.ee).max(0.0);
        }
        (self.zz - factor * (2.0 * zy - factor * yy) + 2.0 * (self.ze - factor * ye) + self.ee).max(0.0)
    }
}

impl Part {
    fn new(
        grams: &LayerGrams,
        Token { tokens, t, gram }: Token<'_>,
        outcomes: &Outcomes,
        outcome: usize,
        original: &Original,
        work: &mut Work,
    ) -> Self {
        let scores = grams.rule.scores(tokens, t);
        let chosen = outcomes.experts(outcome, grams.rule.order(tokens, t)).map(usize::from);
        work.vectors.clear();
        work.vectors.extend(chosen.map(|id| (id, scores[id])));
        let y = &work.vectors;
        Part {
            yy: product(gram, y, y),
            zy: product(gram, &original.output, y),
            ye: product(gram, y, &original.extra),
            sum: y.iter().map(|(_, score)| score).sum(),
        }
    }
}

/// What a table is used with, one token at a time.
#[derive(Default)]
pub(super) struct TableWork {
    lookup: Lookup,
    /// By outcome of the token at hand, as far as known.
    squares: Vec<f64>,
    parts: Vec<Option<Part>>,
}

impl LayerGrams {
    /// A table for `masks`, where the router allows one. Whether it does depends on how many experts they drop and not on
    /// how many masks there are, so that sets of one size are always computed alike.
    pub(super) fn table(&self, masks: &[Mask]) -> Option<Table> {
        let (top_k, live) = self.rule.choice();
        let dropped = masks.iter().map(|mask| mask.dropped.len()).max()?;
        let outcomes = Outcomes::new(top_k, dropped, live)?;
        Some(Table { outcomes, sets: Sets::new(masks, self.rule.experts()) })
    }

    /// Adds ‖Σ cⱼ fⱼ‖² of one token to `sums`, one of every mask, of which the first is the `first`-th of the table's.
    pub(super) fn add_squares(
        &self,
        token: Token<'_>,
        (masks, first): (&[Mask], usize),
        table: &Table,
        work: &mut Work,
        sums: &mut [f64],
    ) {
        let (Token { tokens, t, .. }, Table { outcomes, sets }) = (token, table);
        let (order, fixed) = (self.rule.order(tokens, t), self.rule.is_fixed());
        let mut lookup = std::mem::take(&mut work.table.lookup);
        lookup.fill(sets, outcomes, order, (!fixed).then(|| self.rule.scores(tokens, t)));
        let found = lookup.each(sets, outcomes, first);
        if fixed {
            let mut squares = std::mem::take(&mut work.table.squares);
            squares.clear();
            squares.resize(outcomes.len(), f64::NAN);
            for (sum, (outcome, _)) in sums.iter_mut().zip(found) {
                // Not a number: not computed yet. If it stays so, so be it.
                if squares[outcome].is_nan() {
                    squares[outcome] = self.square_of_choice(token, outcomes, outcome, work);
                }
                *sum += squares[outcome];
            }
            work.table.squares = squares;
        } else {
            let original = Original::new(self, token, outcomes, work);
            let mut parts = std::mem::take(&mut work.table.parts);
            parts.clear();
            parts.resize(outcomes.len(), None);
            for ((sum, mask), (outcome, dropped)) in sums.iter_mut().zip(masks).zip(found) {
                let part = match parts[outcome] {
                    Some(part) => part,
                    None => {
                        *parts[outcome].insert(Part::new(self, token, outcomes, outcome, &original, work))
                    }
                };
                let rest = self.rule.rest_without(tokens, t, mask, dropped);
                *sum += original.square(part, self.rule.factor(part.sum, rest), outcome == 0);
            }
            work.table.parts = parts;
        }
        work.table.lookup = lookup;
    }

    /// ‖Σ cⱼ fⱼ‖² of one token that chooses what an outcome says, where that alone decides the weights.
    fn square_of_choice(
        &self,
        Token { tokens, t, gram }: Token<'_>,
        outcomes: &Outcomes,
        outcome: usize,
        work: &mut Work,
    ) -> f64 {
        let (ids, weights) = self.rule.original(tokens, t);
        work.vectors.clear();
        if outcome > 0 {
            work.choices.ids.clear();
            work.choices.ids.extend(outcomes.experts(outcome, self.rule.order(tokens, t)));
            self.rule.weigh(tokens, t, 1.0, &mut work.choices);
            work.add_change(ids, weights);
        }
        self.add_extra(&mut work.vectors);
        quadratic(gram, &work.vectors)
    }
}

/// ⟨Σ cᵢ fᵢ, Σ dⱼ fⱼ⟩.
fn product(gram: &[f32], left: &[(usize, f64)], right: &[(usize, f64)]) -> f64 {
    let row = |&(a, c): &(usize, f64)| c * right.iter().map(|&(b, d)| d * entry(gram, a, b)).sum::<f64>();
    left.iter().map(row).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::rule::Rule;
    use super::*;
    use crate::architecture::{RouterSpec, WeightRule};
    use crate::backend::RouterRule;

    const EXPERTS: usize = 11;
    const HIDDEN: usize = 5;

    /// A layer of `tokens` tokens with outputs of [`EXPERTS`] experts, and of one more vector where there is an extra one.
    fn layer(top_k: usize, weights: WeightRule, extra: bool, tokens: usize, values: &[f32]) -> LayerGrams {
        let rule = RouterRule {
            spec: RouterSpec::softmax(top_k, weights),
            group_of: vec![0; EXPERTS],
            live: vec![true; EXPERTS],
        };
        let mut grams = LayerGrams::new(Rule::new(rule, Vec::new()), extra, 1 << 20);
        let vectors = EXPERTS + usize::from(extra);
        let value = |i: usize| values[i * 7919 % values.len()];
        let logits: Vec<f32> = (0..tokens * EXPERTS).map(|i| 3.0 * value(i)).collect();
        let mut triangles = Vec::new();
        for t in 0..tokens {
            let of = |v: usize| (0..HIDDEN).map(move |h| value(((t * vectors) + v) * HIDDEN + h + 3));
            for a in 0..vectors {
                triangles.extend((0..=a).map(|b| of(a).zip(of(b)).map(|(x, y)| x * y).sum::<f32>()));
            }
        }
        let written = grams.push(0, &logits, triangles, std::path::Path::new(""));
        assert!(written.is_ok());
        grams
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// A set has the loss that it has by itself: to the bit where weights follow from what is chosen, otherwise up to
        /// the rounding of sums.
        #[test]
        fn tables_change_nothing(
            values in prop::collection::vec(-1.0f32..1.0, 997),
            sets in prop::collection::vec(prop::collection::btree_set(0..EXPERTS, 0..6), 1..60),
            top_k in 1usize..5, rule in 0..3, extra in any::<bool>(),
        ) {
            let weights = match rule {
                0 => WeightRule::Renormalised { added: 0.0, least: 0.0, scale: 1.0 },
                1 => WeightRule::Scaled(1.5),
                _ => WeightRule::Renormalised { added: 0.1, least: 0.2, scale: 2.0 },
            };
            let grams = layer(top_k, weights, extra, 300, &values);
            let masks: Vec<Mask> =
                sets.iter().map(|set| grams.rule.mask(&set.iter().copied().collect::<Vec<_>>())).collect();
            let table = grams.table(&masks);
            prop_assert!(table.is_some());
            for (found, alone) in grams.both_ways(&masks) {
                if rule == 0 {
                    prop_assert_eq!(found.to_bits(), alone.to_bits());
                } else {
                    prop_assert!((found - alone).abs() <= 1e-11 * alone + 1e-12, "{} for {}", found, alone);
                }
            }
        }
    }
}
