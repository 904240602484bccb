//! Subsets of a layer's experts, in lexicographic order.

use super::{Loss, LossRule, LossSource};
use crate::architecture::MoeProfile;
use crate::plan::groups::GroupState;

/// A subset of the experts and its loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The dropped experts, ascending.
    pub dropped: Vec<usize>,
    /// What dropping them costs.
    pub loss: Loss,
}

/// The sets of `count` experts that a layer can lose. A group-limited router loses the same number in every group where
/// that is possible, so that ordinary checkpoints can still express it; otherwise any number that leaves every choice
/// of groups enough experts.
#[derive(Clone, Debug)]
pub struct Subsets<'a> {
    layer: &'a MoeProfile,
    count: usize,
    /// Experts lost in every group, where it is the same number.
    even: Option<usize>,
}

/// Candidates that are evaluated in one call.
const AT_A_TIME: usize = 4096;

impl<'a> Subsets<'a> {
    /// The sets of `count` experts of `layer`.
    pub fn new(layer: &'a MoeProfile, count: usize) -> Self {
        let even = layer.groups > 1 && count.is_multiple_of(layer.groups);
        let each = count / layer.groups;
        let mut state = GroupState::new(layer, layer.top_k);
        let fits = even && each <= layer.experts / layer.groups && {
            (0..layer.groups).for_each(|group| (0..each).for_each(|_| state.remove(group)));
            state.is_enough()
        };
        Subsets { layer, count, even: fits.then_some(each) }
    }

    /// The layer.
    pub fn layer(&self) -> &'a MoeProfile {
        self.layer
    }

    /// Experts in every set.
    pub fn count(&self) -> usize {
        self.count
    }

    /// How many sets there are at most, saturating.
    pub fn number(&self) -> u64 {
        match self.even {
            Some(each) => {
                let one = binomial(self.layer.experts / self.layer.groups, each);
                (0..self.layer.groups).fold(1, |all: u64, _| all.saturating_mul(one))
            }
            None => binomial(self.layer.experts, self.count),
        }
    }

    /// Whether the layer can lose these experts, `count` of them or fewer.
    pub fn allows(&self, dropped: &[usize]) -> bool {
        if self.layer.groups == 1 {
            return true;
        }
        let mut state = GroupState::new(self.layer, self.layer.top_k);
        for &expert in dropped {
            state.remove(state.of(expert));
        }
        match self.even {
            Some(each) => {
                let size = self.layer.experts / self.layer.groups;
                let full = dropped.len() == self.count;
                state.sizes().iter().all(|&left| if full { left == size - each } else { left + each >= size })
            }
            None => state.is_enough(),
        }
    }

    /// Every set, in lexicographic order of its ascending experts.
    pub fn all(&self) -> impl Iterator<Item = Vec<usize>> + use<'_, 'a> {
        let mut next = Some((0..self.count).collect::<Vec<_>>());
        let all = std::iter::from_fn(move || {
            let current = next.take()?;
            next = following(&current, self.layer.experts);
            Some(current)
        });
        all.filter(|set| self.allows(set))
    }

    /// The `best` sets of least loss, by trying all; of equal ones the first in lexicographic order.
    ///
    /// # Errors
    /// Those of [`LossSource::losses`].
    pub fn enumerate(
        &self,
        source: &dyn LossSource,
        rule: LossRule,
        best: usize,
    ) -> Result<Vec<Found>, String> {
        let mut found: Vec<Found> = Vec::new();
        let mut sets = self.all();
        loop {
            let batch: Vec<Vec<usize>> = sets.by_ref().take(AT_A_TIME).collect();
            if batch.is_empty() {
                return Ok(found);
            }
            let losses = source.losses(&batch)?;
            found.extend(batch.into_iter().zip(losses).map(|(dropped, loss)| Found { dropped, loss }));
            keep_best(&mut found, rule, best);
        }
    }
}

/// Keeps the `best` of least loss, in order; of equal ones the first in lexicographic order.
pub(super) fn keep_best(found: &mut Vec<Found>, rule: LossRule, best: usize) {
    found.sort_by(|a, b| {
        a.loss.get(rule).total_cmp(&b.loss.get(rule)).then_with(|| a.dropped.cmp(&b.dropped))
    });
    found.truncate(best);
}

/// The set of as many of `experts` experts that follows in lexicographic order.
fn following(set: &[usize], experts: usize) -> Option<Vec<usize>> {
    let k = set.len();
    let position = (0..k).rev().find(|&i| set[i] < experts - k + i)?;
    let mut next = set.to_vec();
    let first = next[position] + 1;
    next.splice(position.., first..first + k - position);
    Some(next)
}

/// n choose k, saturating.
fn binomial(n: usize, k: usize) -> u64 {
    let k = k.min(n - k.min(n));
    let mut value = 1u128;
    for i in 0..k as u128 {
        // Divisible at every step: a product of i + 1 consecutive numbers.
        value = value * (n as u128 - i) / (i + 1);
        if value > u128::from(u64::MAX) {
            return u64::MAX;
        }
    }
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::layer;

    #[test]
    fn pairs_in_lexicographic_order() {
        let profile = layer(0, 4, 2);
        let all: Vec<_> = Subsets::new(&profile, 2).all().collect();
        assert_eq!(all, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]);
    }

    #[test]
    fn numbers_of_subsets() {
        assert_eq!(binomial(8, 4), 70);
        assert_eq!(binomial(32, 6), 906_192);
        assert_eq!(binomial(5, 0), 1);
        assert_eq!(binomial(64, 16), 488_526_937_079_580);
        assert_eq!(binomial(512, 256), u64::MAX);
    }

    #[test]
    fn groups_lose_the_same_number_where_possible() {
        let grouped = MoeProfile { groups: 2, top_groups: 1, ..layer(0, 6, 2) };
        let even = Subsets::new(&grouped, 2);
        assert_eq!(even.number(), 9);
        assert_eq!(even.all().count(), 9);
        assert!(even.all().all(|set| set[0] < 3 && set[1] >= 3));
        let one = Subsets::new(&grouped, 1);
        assert_eq!(one.all().count(), 6);
        assert!(!one.allows(&[0, 1]));
    }
}
