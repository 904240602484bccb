//! The routing rule of a layer, as the kernel takes it.

use super::arena::Arena;
use super::layer::RouterTable;
use super::params::MoeRouteParams;
use super::workspace::stride;
use super::{Element, Error, Result};
use crate::architecture::{Choice, GroupLimit, GroupScore, Scoring, Skip, WeightRule, WeightTarget};
use crate::backend::RouterRule;
use crate::checkpoint::{Dtype, Tensor, decode_f32, encode_f32};

/// A router: the rule, and what of its tensors the layer is to apply. Whatever the logits, a token's ids are distinct and
/// its weights finite, by the rule of [`RouterRule::decide`].
#[derive(Clone, Copy, Debug)]
pub struct LayerRouter<'a> {
    /// From logits to experts and weights.
    pub rule: &'a RouterRule,
    /// `[experts, hidden]`: to make the logits from the tokens; else they come from the caller.
    pub weight: Option<&'a Tensor>,
    /// Bias of the logits, `[experts]`.
    pub bias: Option<&'a Tensor>,
    /// Bias that only choices see, `[experts]`.
    pub choice_bias: Option<&'a Tensor>,
}

/// What the router has to agree with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) element: Element,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) shared: bool,
}

/// A router's weight as a sum of matrices of 16 bits, see `cuda/logits_many.cu`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RouterParts {
    /// `[count, rows, hidden]`.
    pub(super) address: u64,
    /// 0 where there are none: in f32, and where a weight is beyond the element type.
    pub(super) count: usize,
}

/// Places the router's tables. `gate` is that of the shared expert.
pub(super) fn place(
    router: &LayerRouter<'_>,
    sizes: Sizes,
    gate: Option<&Tensor>,
    target: WeightTarget,
    arena: &mut Arena<'_>,
) -> Result<RouterTable> {
    check(router.rule, sizes, target)?;
    let Sizes { hidden, element, experts, top_k, shared } = sizes;
    let RouterRule { spec, group_of, live } = router.rule;
    let rows = experts + usize::from(gate.is_some());
    let mut vector = |tensor: Option<&Tensor>, what: &str| match tensor {
        Some(tensor) => {
            check_len(what, tensor, experts)?;
            arena.put_values(&tensor.to_f32()?)
        }
        None => Ok(0),
    };
    let logit_bias = vector(router.bias, "router bias")?;
    let choice_bias = vector(router.choice_bias, "router choice bias")?;
    if spec.bias && logit_bias == 0 && router.bias.is_none() {
        return Err(Error::argument("router bias", "none", "one, by the rule"));
    }
    if spec.choice == Choice::BiasedScore && router.choice_bias.is_none() {
        return Err(Error::argument("router choice bias", "none", "one, by the rule"));
    }
    let weight_stride = hidden.next_multiple_of(4);
    let (mut weight, mut parts) = (0, RouterParts::default());
    if let Some(tensor) = router.weight {
        if tensor.shape() != [experts, hidden] {
            let found = format!("{:?}", tensor.shape());
            return Err(Error::argument("router weight", found, format!("{:?}", [experts, hidden])));
        }
        if let Some(gate) = gate {
            check_len("gate of the shared expert", gate, hidden)?;
        }
        let values = logit_weights(tensor, gate)?;
        let padded = pad(&values, hidden, weight_stride);
        weight = arena.put(rows * weight_stride, 4, || Ok(encode_f32(Dtype::F32, &padded)))?;
        let found = split(pad(&values, hidden, stride(hidden)), element);
        let address = arena.put(found.concat().len(), 1, || Ok(found.concat()))?;
        parts = RouterParts { address, count: found.len() };
    }
    let group_of = spec.groups.map_or(Ok(0), |_| arena.put_values(group_of))?;
    let all_live = live.iter().all(|&live| live);
    let live: Vec<u8> = live.iter().map(|&live| u8::from(live)).collect();
    let params = MoeRouteParams {
        logit_bias,
        choice_bias,
        group_of,
        live: if all_live { 0 } else { arena.put_values(&live)? },
        experts: experts as i32,
        top_k: top_k as i32,
        slots: (top_k + usize::from(shared)) as i32,
        shared_expert: if shared { experts as i32 } else { -1 },
        shared_gate: if gate.is_some() { experts as i32 } else { -1 },
        ..rule_params(router.rule)
    };
    Ok(RouterTable { params, weight, has_weight: router.weight.is_some(), weight_stride, parts, rows })
}

/// The rule alone.
fn rule_params(rule: &RouterRule) -> MoeRouteParams {
    let (spec, groups) = (&rule.spec, rule.spec.groups);
    let (scoring, jitter) = match spec.scoring {
        Scoring::Softmax => (0, 0.0),
        Scoring::Sigmoid => (1, 0.0),
        Scoring::SparseMixer { threshold } => (2, threshold),
    };
    let choice = match spec.choice {
        Choice::Score => 0,
        Choice::BiasedScore => 1,
        Choice::Logit => 2,
    };
    let (renormalise, scale, added, least) = match spec.weights {
        WeightRule::Scaled(scale) => (0, scale, 0.0, 0.0),
        WeightRule::Renormalised { added, least, scale } => (1, scale, added, least),
    };
    let group_score = match groups.map(|limit| limit.score) {
        None | Some(GroupScore::Largest) => 0,
        Some(GroupScore::TwoLargest) => 1,
    };
    let skip_rule = match &spec.skip {
        None => 0,
        Some(skip) if !skip.rescale => 1,
        Some(_) => 2,
    };
    MoeRouteParams {
        scoring,
        jitter,
        choice,
        renormalise,
        scale,
        added,
        least,
        groups: groups.map_or(0, |limit| limit.count as i32),
        groups_kept: groups.map_or(0, |limit| limit.kept as i32),
        group_score,
        skip_rule,
        skip: spec.skip.as_ref().map_or(0.0, Skip::tail),
        ..bytemuck::Zeroable::zeroed()
    }
}

/// The router's rows, then the shared expert's gate.
fn logit_weights(weight: &Tensor, gate: Option<&Tensor>) -> Result<Vec<f32>> {
    let mut values = weight.to_f32()?;
    if let Some(gate) = gate {
        values.extend(gate.to_f32()?);
    }
    Ok(values)
}

/// Rows of `hidden` values, `stride` apart.
fn pad(values: &[f32], hidden: usize, stride: usize) -> Vec<f32> {
    let mut padded = vec![0.0; values.len() / hidden * stride];
    for (row, values) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(hidden)) {
        row[..hidden].copy_from_slice(values);
    }
    padded
}

/// Up to three parts of the element type that sum up to the values, each of what the ones before left over; in f16 that is
/// scaled, since it would vanish among its least numbers.
fn split(values: Vec<f32>, element: Element) -> Vec<Vec<u8>> {
    let scale = match element {
        Element::F32 => return Vec::new(),
        Element::F16 => 2048.0,
        Element::Bf16 => 1.0,
    };
    let mut rest = values;
    let mut parts = Vec::new();
    while parts.len() < 3 && (parts.is_empty() || rest.iter().any(|&value| value != 0.0)) {
        let part = encode_f32(element.dtype(), &rest);
        let mut rounded = vec![0.0; rest.len()];
        decode_f32(element.dtype(), &part, &mut rounded);
        for (rest, rounded) in rest.iter_mut().zip(rounded) {
            *rest = (*rest - rounded) * scale;
        }
        if rest.iter().any(|value| !value.is_finite()) {
            return Vec::new();
        }
        parts.push(part);
    }
    parts
}

fn check(rule: &RouterRule, sizes: Sizes, target: WeightTarget) -> Result<()> {
    let wrong = |what: &str, found: String, expected: String| {
        Err(Error::argument(format!("router, {what}"), found, expected))
    };
    let Sizes { experts, top_k, .. } = sizes;
    if rule.spec.top_k != top_k {
        return wrong("top_k", rule.spec.top_k.to_string(), top_k.to_string());
    }
    if rule.spec.expert_scales {
        return wrong("factors of experts", "some".into(), "none".into());
    }
    if rule.spec.target != target {
        return wrong("target of weights", format!("{:?}", rule.spec.target), format!("{target:?}"));
    }
    if rule.live.len() != experts || rule.group_of.len() != experts {
        let found = format!("live {}, group_of {}", rule.live.len(), rule.group_of.len());
        return wrong("rows", found, experts.to_string());
    }
    if let Some(skip) = rule.spec.skip.filter(|skip| skip.check(top_k).is_err()) {
        let found = format!("{:?} with top_k {top_k}", skip.threshold);
        return wrong("skip", found, "a tail of 0 to 1, or with top_k 2 a ratio; top_k 2 or more".into());
    }
    let live = rule.live.iter().filter(|&&live| live).count();
    if live < top_k {
        return wrong("live rows", live.to_string(), format!("{top_k} or more"));
    }
    let Some(limit) = rule.spec.groups else { return Ok(()) };
    if limit.count == 0 || limit.count > GroupLimit::MAX_GROUPS || limit.kept > limit.count || limit.kept == 0
    {
        let expected = format!("1 to {} groups, and as many kept at most", GroupLimit::MAX_GROUPS);
        return wrong("groups", format!("{} of {}", limit.kept, limit.count), expected);
    }
    let mut sizes = vec![0; limit.count];
    for (&group, _) in rule.group_of.iter().zip(&rule.live).filter(|(_, live)| **live) {
        match sizes.get_mut(group as usize) {
            Some(size) => *size += 1,
            None => return wrong("group", group.to_string(), format!("below {}", limit.count)),
        }
    }
    sizes.sort_unstable();
    let fewest: usize = sizes.iter().take(limit.kept).sum();
    if fewest < top_k {
        let expected = format!("{top_k} or more in any {} groups", limit.kept);
        return wrong("live rows of the kept groups", fewest.to_string(), expected);
    }
    Ok(())
}

fn check_len(what: &str, tensor: &Tensor, expected: usize) -> Result<()> {
    if tensor.len() != expected {
        let found = format!("{:?}", tensor.shape());
        return Err(Error::argument(what, found, format!("{expected} elements")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One part where the values are of the type already; else their sum is as good as f32, from large to tiny ones.
    #[test]
    fn parts_sum_up() {
        let sum = |element: Element, parts: &[Vec<u8>]| {
            let scale = if element == Element::F16 { 2048.0f64 } else { 1.0 };
            let mut sums = vec![0.0; parts.first().map_or(0, Vec::len) / 2];
            for (i, part) in parts.iter().enumerate() {
                let mut values = vec![0.0; sums.len()];
                decode_f32(element.dtype(), part, &mut values);
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += f64::from(value) / scale.powi(i as i32);
                }
            }
            sums
        };
        let values: Vec<f32> = (1..2000).map(|i| 3.7f32.powi(i % 21 - 12) * (i as f32).sin()).collect();
        for element in [Element::Bf16, Element::F16] {
            let parts = split(values.clone(), element);
            assert_eq!(parts.len(), 3);
            for (sum, &value) in sum(element, &parts).into_iter().zip(&values) {
                let near = (sum - f64::from(value)).abs() <= 2f64.powi(-24) * f64::from(value.abs()) + 1e-14;
                assert!(near, "{element:?}: {sum}, expected {value}");
            }
            let mut rounded = vec![0.0; values.len()];
            decode_f32(element.dtype(), &parts[0], &mut rounded);
            assert_eq!(split(rounded, element), parts[..1]);
            assert_eq!(split(vec![0.0; 8], element).len(), 1);
            assert!(split(vec![1.0, f32::NAN], element).is_empty());
        }
        assert!(split(vec![1e5], Element::F16).is_empty());
        assert!(split(values, Element::F32).is_empty());
    }
}
