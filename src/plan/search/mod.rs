//! Searching for the experts that can go: what planners ask of whoever can run the model, and how they search.

mod budgets;
mod genetic;
mod local;
mod ranks;
mod subsets;

pub use budgets::inverse_importance;
pub use genetic::Genetic;
pub use local::greedy_and_swap;
pub use ranks::{RankRule, ranks_by_importance};
pub use subsets::{Found, Subsets};

/// How far a matrix of a layer's routed outputs, one row per token, moves: D is its difference from the original's.
/// Routed outputs are before the residual is added and without shared experts; padding does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    /// Σ ‖D_b‖_F over the loss batches b: so many consecutive windows each, in order (the published code of NAEE, arXiv
    /// 2402.14800).
    pub batch_sum: f64,
    /// ‖D‖_F over all tokens (NAEE, eq. 3).
    pub single: f64,
}

impl Loss {
    /// The one of the two that `rule` names.
    pub fn get(self, rule: LossRule) -> f64 {
        match rule {
            LossRule::BatchSum => self.batch_sum,
            LossRule::Single => self.single,
        }
    }
}

/// By which loss subsets are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LossRule {
    /// [`Loss::batch_sum`].
    #[default]
    BatchSum,
    /// [`Loss::single`].
    Single,
}

/// One pass over the layers, from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass<'a> {
    /// What it is for, as progress shows it.
    pub task: &'a str,
    /// Windows of a loss batch.
    pub batch: usize,
    /// Whether a layer's inputs come from the model whose earlier layers have lost their experts already; what its
    /// outputs are compared with stays the original model's.
    pub progressive: bool,
    /// Whether every candidate is run, in place of the inner products of all experts' outputs.
    pub exact: bool,
}

/// The weights that a router gives the experts it chooses, over all tokens: what skipping is calibrated with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tails {
    /// Median of w₂/w₁, for routers that choose two experts.
    pub ratio: Option<f64>,
    /// For i from 1 to k − 1 the median share of the whole weight that the experts behind the i largest have.
    pub after: Vec<f64>,
}

/// Losses of dropping experts, from whoever can run the model on the tokens. A pass visits layers in ascending order:
/// [`LossSource::enter`], any number of questions, [`LossSource::leave`].
///
/// Every error is one line that says what failed.
pub trait LossSource {
    /// Begins a pass at the first layer.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn begin(&self, pass: &Pass<'_>) -> Result<(), String>;

    /// Stands at MoE layer `layer`; the layers before it have been passed.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn enter(&self, layer: usize) -> Result<(), String>;

    /// Losses of the layer that was entered, when its router cannot choose the listed experts: −∞ in place of their
    /// logits.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn losses(&self, dropped: &[Vec<usize>]) -> Result<Vec<Loss>, String>;

    /// Passes the layer that was entered; in a progressive pass without the experts `dropped`. `detail` says in a few
    /// words what was found.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn leave(&self, dropped: &[usize], detail: &str) -> Result<(), String>;

    /// Everything since the last commit can be taken up again by a later run.
    ///
    /// # Errors
    /// What cannot be written.
    fn commit(&self) -> Result<(), String>;

    /// Whether `layer` is the first with experts of a decoder behind an encoder: no block extends across its beginning.
    fn begins_stack(&self, _layer: usize) -> bool {
        false
    }

    /// Remembers that a block begins with the layer that is entered next.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn mark(&self) -> Result<(), String>;

    /// Losses of the residual stream behind the last layer of the block, whose layers have all been left: one list of
    /// candidates for every layer since [`LossSource::mark`], every product of them, the first layer slowest. The
    /// layers are run whole, on the original model's residual stream before the block.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn block_losses(&self, candidates: &[Vec<Vec<usize>>]) -> Result<Vec<Loss>, String>;

    /// For every MoE layer the weights of the experts that its router chooses, in the model that has lost the experts
    /// `dropped` of each.
    ///
    /// # Errors
    /// What cannot be read or run.
    fn tails(&self, dropped: &[Vec<usize>]) -> Result<Vec<Tails>, String>;
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;
    use crate::plan::tests::layer;

    /// Losses that a formula gives: values of single experts and of pairs, so that the least sum is not the least set.
    struct Formula {
        asked: RefCell<Vec<Vec<usize>>>,
        seed: u64,
    }

    impl Formula {
        fn loss(&self, set: &[usize]) -> f64 {
            let noise = |x: u64| (x.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / f64::from(1 << 24);
            let alone = set.iter().map(|&e| noise(self.seed * 1000 + e as u64)).sum::<f64>();
            let pairs = set.iter().flat_map(|&a| set.iter().map(move |&b| (a, b))).filter(|(a, b)| a < b);
            alone + pairs.map(|(a, b)| 0.3 * noise(self.seed * 7919 + (a * 64 + b) as u64)).sum::<f64>()
        }
    }

    impl LossSource for Formula {
        fn begin(&self, _: &Pass<'_>) -> Result<(), String> {
            Ok(())
        }
        fn enter(&self, _: usize) -> Result<(), String> {
            Ok(())
        }
        fn losses(&self, dropped: &[Vec<usize>]) -> Result<Vec<Loss>, String> {
            self.asked.borrow_mut().extend_from_slice(dropped);
            Ok(dropped.iter().map(|set| Loss { batch_sum: self.loss(set), single: 0.0 }).collect())
        }
        fn leave(&self, _: &[usize], _: &str) -> Result<(), String> {
            Ok(())
        }
        fn commit(&self) -> Result<(), String> {
            Ok(())
        }
        fn mark(&self) -> Result<(), String> {
            Ok(())
        }
        fn block_losses(&self, _: &[Vec<Vec<usize>>]) -> Result<Vec<Loss>, String> {
            Ok(Vec::new())
        }
        fn tails(&self, _: &[Vec<usize>]) -> Result<Vec<Tails>, String> {
            Ok(Vec::new())
        }
    }

    const GENETIC: Genetic = Genetic { population: 40, generations: 25, mutation: 0.3, seed: 42 };

    #[test]
    fn the_genetic_search_finds_the_optimum() {
        for seed in 0..10 {
            let profile = layer(0, 16, 2);
            let subsets = Subsets::new(&profile, 5);
            let source = Formula { asked: RefCell::default(), seed };
            let found = GENETIC.search(&subsets, &source, LossRule::BatchSum, 1).unwrap();
            let mut asked = source.asked.take();
            let tried = asked.len();
            assert!(tried <= 40 + 25 * 32, "{tried}");
            asked.sort();
            asked.dedup();
            assert_eq!(asked.len(), tried, "a set was evaluated twice");
            let best = subsets.enumerate(&source, LossRule::BatchSum, 1).unwrap();
            assert_eq!(found, best, "seed {seed}");
            assert_eq!(GENETIC.search(&subsets, &source, LossRule::BatchSum, 1).unwrap(), found);
        }
    }

    /// Fewer subsets than individuals: all are tried, and the search ends.
    #[test]
    fn small_layers_are_enumerated() {
        let profile = layer(3, 8, 2);
        let source = Formula { asked: RefCell::default(), seed: 1 };
        let found = GENETIC.search(&Subsets::new(&profile, 2), &source, LossRule::BatchSum, 3).unwrap();
        assert_eq!(source.asked.take().len(), 28);
        assert_eq!(found.len(), 3);
        let none = GENETIC.search(&Subsets::new(&profile, 6), &source, LossRule::BatchSum, 100).unwrap();
        assert_eq!(none.len(), 28);
    }

    proptest! {
        /// No swap betters what greedy_and_swap finds; groups keep what every choice of them needs.
        #[test]
        fn no_swap_helps(seed in 0u64..500, count in 1usize..6, grouped in any::<bool>()) {
            let mut profile = layer(0, 12, 2);
            if grouped {
                (profile.groups, profile.top_groups) = (3, 2);
            }
            let subsets = Subsets::new(&profile, count);
            let source = Formula { asked: RefCell::default(), seed };
            let found = greedy_and_swap(&subsets, &source, LossRule::BatchSum, 100).unwrap();
            prop_assert!(subsets.allows(&found.dropped));
            for out in 0..count {
                for expert in (0..12).filter(|e| !found.dropped.contains(e)) {
                    let mut other = found.dropped.clone();
                    other[out] = expert;
                    other.sort_unstable();
                    if subsets.allows(&other) {
                        prop_assert!(source.loss(&other) >= found.loss.batch_sum);
                    }
                }
            }
            let genetic = GENETIC.search(&subsets, &source, LossRule::BatchSum, 2).unwrap();
            prop_assert!(genetic.iter().all(|f| subsets.allows(&f.dropped) && f.dropped.len() == count));
        }
    }
}
