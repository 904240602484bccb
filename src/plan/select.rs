//! Which experts are dropped, given their scores.

use super::budget::Room;
use super::error::Place;
use super::groups::GroupState;
use super::{Error, Result};
use crate::architecture::MoeProfile;

/// One layer while its experts are chosen.
#[derive(Clone, Debug)]
pub(super) struct Layer<'a> {
    profile: &'a MoeProfile,
    protected: Vec<bool>,
    state: GroupState,
}

impl<'a> Layer<'a> {
    /// A layer that keeps at least `floor` experts (`top_k` where that is more), and those that are
    /// protected.
    pub(super) fn new(profile: &'a MoeProfile, floor: usize, protected: Vec<bool>) -> Self {
        let state = GroupState::new(profile, profile.top_k).with(floor, &protected);
        Layer { profile, protected, state }
    }

    /// How many experts may be dropped.
    pub(super) fn room(&self) -> Room<'a> {
        Room { layer: self.profile, most: self.state.removable() }
    }

    /// The `n` experts of the layer that are dropped, ascending; `order` lists all experts, those to go first
    /// at the front. A group-limited router loses the same number in every group where that is possible, so
    /// that ordinary checkpoints can still express it; otherwise the first of the order go that leave any
    /// choice of groups enough experts.
    pub(super) fn choose(&self, order: &[usize], n: usize) -> Result<Vec<usize>> {
        let most = self.state.removable();
        if n > most {
            let problem = format!("cannot drop {n} of {} experts, at most {most}", self.profile.experts);
            return Err(Error::Budget(format!("{}{problem}", Place::layer(self.profile.layer))));
        }
        let mut dropped = match self.evenly(order, n) {
            Some(dropped) => dropped,
            None => self.greedily(order, n),
        };
        dropped.sort_unstable();
        Ok(dropped)
    }

    /// The first `n / groups` of the order in every group.
    fn evenly(&self, order: &[usize], n: usize) -> Option<Vec<usize>> {
        let groups = self.profile.groups;
        if groups == 1 || !n.is_multiple_of(groups) {
            return None;
        }
        let mut dropped = Vec::with_capacity(n);
        let mut state = self.state.clone();
        for group in 0..groups {
            let loose = |e: &&usize| state.of(**e) == group && !self.protected[**e];
            dropped.extend(order.iter().filter(loose).take(n / groups));
        }
        for expert in &dropped {
            state.remove(state.of(*expert));
        }
        (dropped.len() == n && state.is_enough()).then_some(dropped)
    }

    /// The first of the order after which the rest of the `n` can still go.
    fn greedily(&self, order: &[usize], n: usize) -> Vec<usize> {
        let mut state = self.state.clone();
        let mut dropped = Vec::with_capacity(n);
        for &expert in order.iter().filter(|e| !self.protected[**e]) {
            if dropped.len() == n {
                break;
            }
            let mut after = state.clone();
            after.remove(after.of(expert));
            if after.is_enough() && after.removable() >= n - dropped.len() - 1 {
                state = after;
                dropped.push(expert);
            }
        }
        dropped
    }
}

/// All experts that can be dropped, as (position of the layer, expert), in ascending order of (score, layer,
/// expert); one is passed over when its layer, or any choice of its groups, holds no more than it must.
pub(super) fn sequence(layers: &[Layer<'_>], scores: &[Vec<f64>]) -> Vec<(usize, usize)> {
    let mut order = Vec::new();
    for (position, layer) in layers.iter().enumerate() {
        let loose = (0..layer.profile.experts).filter(|e| !layer.protected[*e]);
        order.extend(loose.map(|expert| (position, expert)));
    }
    // Stable, and already ascending by layer and expert.
    order.sort_by(|a, b| scores[a.0][a.1].total_cmp(&scores[b.0][b.1]));
    let mut states = layers.iter().map(|layer| layer.state.clone()).collect::<Vec<_>>();
    order.retain(|&(position, expert)| {
        let state = &mut states[position];
        let group = state.of(expert);
        let goes = state.can_remove(group);
        if goes {
            state.remove(group);
        }
        goes
    });
    order
}
