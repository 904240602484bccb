//! `moepress_router`.

use super::convert::{count, list, tensor, wrong};
use super::types;
use crate::architecture::{
    Choice, GroupLimit, GroupScore, RouterSpec, Scoring, Skip, SkipThreshold, WeightRule, WeightTarget,
};
use crate::backend::RouterRule;
use crate::backend::cuda::{LayerRouter, Result};
use crate::checkpoint::Tensor;

/// A router, its tensors copied.
pub(super) struct OwnedRouter {
    rule: RouterRule,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    choice_bias: Option<Tensor>,
}

impl OwnedRouter {
    /// Of `experts` rows.
    ///
    /// # Safety
    /// The router's pointers point to what the header says.
    pub(super) unsafe fn new(
        router: &types::Router,
        [experts, hidden, top_k]: [usize; 3],
        target: WeightTarget,
    ) -> Result<Self> {
        let groups = group_limit(router, experts)?;
        let group_of = match groups {
            None => vec![0; experts],
            Some(limit) if router.group_of.is_null() => {
                (0..experts).map(|e| (e / (experts / limit.count)) as u32).collect()
            }
            Some(_) => {
                // SAFETY: the caller's promise.
                let groups = unsafe { list(router.group_of, experts, "router.group_of") }?;
                groups.iter().map(|&group| group as u32).collect()
            }
        };
        let live = if router.live.is_null() {
            vec![true; experts]
        } else {
            // SAFETY: the caller's promise.
            unsafe { list(router.live, experts, "router.live") }?.iter().map(|&live| live != 0).collect()
        };
        let spec = spec(router, top_k, groups, target)?;
        // SAFETY: the caller's promise.
        unsafe {
            Ok(OwnedRouter {
                rule: RouterRule { spec, group_of, live },
                weight: tensor(router.weight, &[experts, hidden], "router.weight")?,
                bias: tensor(router.bias, &[experts], "router.bias")?,
                choice_bias: tensor(router.choice_bias, &[experts], "router.choice_bias")?,
            })
        }
    }

    pub(super) fn borrow(&self) -> LayerRouter<'_> {
        LayerRouter {
            rule: &self.rule,
            weight: self.weight.as_ref(),
            bias: self.bias.as_ref(),
            choice_bias: self.choice_bias.as_ref(),
        }
    }
}

fn spec(
    router: &types::Router,
    top_k: usize,
    groups: Option<GroupLimit>,
    target: WeightTarget,
) -> Result<RouterSpec> {
    let scale = if router.scale == 0.0 { 1.0 } else { router.scale };
    Ok(RouterSpec {
        top_k,
        bias: !router.bias.is_null(),
        scoring: match router.scoring {
            0 => Scoring::Softmax,
            1 => Scoring::Sigmoid,
            2 => Scoring::SparseMixer { threshold: router.sparse_mixer_threshold },
            other => return Err(wrong("router.scoring", other.to_string(), "a moepress_scoring")),
        },
        choice: match router.choice {
            0 => Choice::Score,
            1 => Choice::BiasedScore,
            2 => Choice::Logit,
            other => return Err(wrong("router.choice", other.to_string(), "a moepress_choice")),
        },
        groups,
        weights: match router.renormalise {
            0 => WeightRule::Scaled(scale),
            _ => WeightRule::Renormalised { added: router.added, least: router.least, scale },
        },
        expert_scales: false,
        target,
        skip: (router.skip_tail != 0.0).then_some(Skip {
            threshold: SkipThreshold::Tail(f64::from(router.skip_tail)),
            rescale: router.skip_keeps_weights == 0,
        }),
    })
}

fn group_limit(router: &types::Router, experts: usize) -> Result<Option<GroupLimit>> {
    let found = count(router.groups, "router.groups")?;
    if found == 0 {
        return Ok(None);
    }
    if router.group_of.is_null() && !experts.is_multiple_of(found) {
        let expected = format!("a divisor of {experts}, or group_of");
        return Err(wrong("router.groups", found.to_string(), &expected));
    }
    let kept = count(router.groups_kept, "router.groups_kept")?;
    let score = match router.groups_by_two {
        0 => GroupScore::Largest,
        _ => GroupScore::TwoLargest,
    };
    Ok(Some(GroupLimit { count: found, kept, score }))
}
