//! Group-limited routers: which experts may still go.
//!
//! Such a router first keeps the best `top_groups` of `groups` equal runs of experts, then chooses `top_k`
//! experts among those. Whichever groups it keeps, they must hold `top_k` experts; a router without groups is
//! one group.

use crate::architecture::MoeProfile;

/// The experts of one layer by group, while some of them are removed.
#[derive(Clone, Debug)]
pub(super) struct GroupState {
    /// Experts left in each group.
    sizes: Vec<usize>,
    /// Experts of each group that must stay.
    fixed: Vec<usize>,
    /// Experts of each group at the beginning.
    group_size: usize,
    top_groups: usize,
    top_k: usize,
    /// Fewest experts that must be left in the whole layer.
    floor: usize,
}

impl GroupState {
    /// All experts of `layer`, of which any choice of groups must keep `top_k`.
    pub(super) fn new(layer: &MoeProfile, top_k: usize) -> Self {
        let group_size = layer.experts / layer.groups;
        GroupState {
            sizes: vec![group_size; layer.groups],
            fixed: vec![0; layer.groups],
            group_size,
            top_groups: layer.top_groups,
            top_k,
            floor: top_k,
        }
    }

    /// The same with a higher floor and with experts that must stay.
    pub(super) fn with(mut self, floor: usize, protected: &[bool]) -> Self {
        self.floor = self.floor.max(floor);
        for (expert, _) in protected.iter().enumerate().filter(|(_, p)| **p) {
            let group = self.of(expert);
            self.fixed[group] += 1;
        }
        self
    }

    /// The group of an expert.
    pub(super) fn of(&self, expert: usize) -> usize {
        expert / self.group_size
    }

    /// Experts left in each group.
    pub(super) fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Takes one expert out of a group.
    pub(super) fn remove(&mut self, group: usize) {
        self.sizes[group] -= 1;
    }

    /// Whether any choice of groups holds `top_k` experts, and the layer its floor.
    pub(super) fn is_enough(&self) -> bool {
        let mut ascending = self.sizes.clone();
        ascending.sort_unstable();
        ascending.iter().take(self.top_groups).sum::<usize>() >= self.top_k
            && ascending.iter().sum::<usize>() >= self.floor
    }

    /// Whether one more expert of `group` may go.
    pub(super) fn can_remove(&self, group: usize) -> bool {
        if self.sizes[group] <= self.fixed[group] {
            return false;
        }
        let mut after = self.clone();
        after.remove(group);
        after.is_enough()
    }

    /// How many more experts may go at most. Taking from the largest group each time leaves the most: once
    /// that would be one too many, the largest group is among the `top_groups` smallest, and so is every
    /// other.
    pub(super) fn removable(&self) -> usize {
        let total = self.sizes.iter().sum::<usize>();
        if self.sizes.len() == 1 {
            return (total - self.fixed[0]).min(total.saturating_sub(self.floor));
        }
        let mut state = self.clone();
        let mut removed = 0;
        while let Some(group) = state.largest_loose().filter(|g| state.can_remove(*g)) {
            state.remove(group);
            removed += 1;
        }
        removed
    }

    /// The largest group that has an expert which need not stay.
    fn largest_loose(&self) -> Option<usize> {
        let loose = |g: &usize| self.sizes[*g] > self.fixed[*g];
        (0..self.sizes.len()).filter(loose).max_by_key(|g| self.sizes[*g])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::plan::tests::layer;

    fn grouped(experts: usize, groups: usize, top_groups: usize, top_k: usize) -> MoeProfile {
        MoeProfile { groups, top_groups, ..layer(0, experts, top_k) }
    }

    #[test]
    fn one_group_is_bounded_by_the_floor() {
        let state = GroupState::new(&layer(0, 8, 2), 2);
        assert_eq!(state.removable(), 6);
        assert_eq!(state.clone().with(5, &[]).removable(), 3);
        assert_eq!(state.with(0, &[true, false, true, true, false, false, false, false]).removable(), 5);
    }

    #[test]
    fn the_smallest_groups_bound_the_rest() {
        // Any 2 of 3 groups must hold 3 experts: 1, 2 and 2 are the fewest.
        assert_eq!(GroupState::new(&grouped(9, 3, 2, 3), 3).removable(), 4);
    }

    proptest! {
        #[test]
        fn removable_is_the_most_there_is(
            groups in 1usize..4, group_size in 1usize..4, seed in 0usize..1000, protect in 0u32..512,
        ) {
            let top_groups = 1 + seed % groups;
            let top_k = 1 + (seed / 7) % (top_groups * group_size);
            let experts = groups * group_size;
            let protected = (0..experts).map(|e| protect >> e & 1 == 1 && e % 2 == 0).collect::<Vec<_>>();
            let start = GroupState::new(&grouped(experts, groups, top_groups, top_k), top_k).with(0, &protected);
            let mut most = 0;
            for removed in 0u32..1 << experts {
                let mut state = start.clone();
                let gone = (0..experts).filter(|e| removed >> e & 1 == 1).collect::<Vec<_>>();
                for expert in &gone {
                    state.remove(state.of(*expert));
                }
                if state.is_enough() && gone.iter().all(|e| !protected[*e]) {
                    most = most.max(gone.len());
                }
            }
            prop_assert_eq!(start.removable(), most);
        }
    }
}
