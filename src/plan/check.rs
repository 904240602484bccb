//! What a plan must satisfy, by itself and for a checkpoint.

use std::collections::BTreeMap;

use super::error::Place;
use super::file::{LayerPlan, VERSION};
use super::groups::GroupState;
use super::options;
use super::{Action, Channels, Plan, Projection, Result};
use crate::architecture::{ExpertSize, MoeProfile, Profile};

/// Why an expert that is no MLP of dense matrices cannot be averaged with others.
pub(crate) const NOT_DENSE: &str =
    "has no dense matrices of its own to average; start from the original checkpoint";

/// Everything that can be checked without the checkpoint.
pub(super) fn structure(plan: &Plan) -> Result<()> {
    if plan.version != VERSION {
        let problem = format!("version {}; this program reads version {VERSION}", plan.version);
        return Err(Place::top().field("moepress").plan(problem));
    }
    for pair in plan.layers.windows(2) {
        if pair[0].layer >= pair[1].layer {
            return Err(
                Place::layer(pair[1].layer).plan("listed twice or out of order; list every layer once")
            );
        }
    }
    plan.layers.iter().try_for_each(layer_structure)
}

fn layer_structure(layer: &LayerPlan) -> Result<()> {
    let place = Place::layer(layer.layer);
    for (position, entry) in layer.experts.iter().enumerate() {
        let place = place.expert(entry.expert);
        if position > 0 && layer.experts[position - 1].expert >= entry.expert {
            return Err(place.plan("listed twice or out of order; list every expert once"));
        }
    }
    for entry in &layer.experts {
        action_structure(layer, entry.expert, &entry.action, &place.expert(entry.expert))?;
    }
    let routed = layer.routed();
    if layer.top_k == 0 || layer.top_k > routed {
        let problem = match routed {
            0 => "no expert is left to choose from; keep as many as are chosen per token".into(),
            _ => format!("{} with {routed} experts left to choose from; use 1 to {routed}", layer.top_k),
        };
        return Err(place.field("top_k").plan(problem));
    }
    if let Some(Err(problem)) = layer.skip.map(|s| s.check(layer.top_k)) {
        return Err(place.field("skip").plan(problem));
    }
    merge_shares(layer, &place)
}

fn action_structure(layer: &LayerPlan, expert: usize, action: &Action, place: &Place) -> Result<()> {
    match action {
        Action::Merge { into, weight } => {
            let found = layer.experts.binary_search_by_key(into, |e| e.expert);
            let target = found.ok().map(|position| &layer.experts[position].action);
            let wrong = |problem: String| Err(place.field("into").plan(problem));
            match target {
                _ if *into == expert => wrong(format!("{into} is the expert itself; name another one")),
                None => wrong(format!("the layer has no expert {into}")),
                Some(action) if !action.is_stored() => {
                    let name = action.name();
                    wrong(format!("expert {into} has the action {name} itself; name one that stays"))
                }
                Some(Action::Constant) => wrong(format!(
                    "expert {into} becomes a constant, which takes in no weights; name another one"
                )),
                Some(_) if !(0.0..=1.0).contains(weight) => {
                    Err(place.field("weight").plan(format!("found {weight}, expected a share from 0 to 1")))
                }
                Some(_) => Ok(()),
            }
        }
        Action::LowRank { rank, .. } if rank.is_dense() => {
            Err(place.field("rank").plan("no matrix has a rank; give one of gate, up, down, or use keep"))
        }
        Action::LowRank { rank, rows } => Projection::ALL.iter().try_for_each(|&matrix| {
            let field = |name| place.field(name).field(matrix.name());
            match (rank.get(matrix), rows.get(matrix)) {
                (Some(0), _) => {
                    Err(field("rank").plan("found 0, expected at least 1, or null for a dense matrix"))
                }
                (_, Some(0)) => Err(field("rows").plan("found 0, expected at least 1, or null for no row")),
                (None, Some(_)) => Err(field("rows").plan("the matrix has no rank and is dense as a whole")),
                _ => Ok(()),
            }
        }),
        Action::Delta { rank: 0 } => Err(place.field("rank").plan("found 0, expected at least 1")),
        Action::Channels { keep } if keep.count() == 0 => {
            Err(place.field("keep").plan("no channel is kept; keep at least 1, or use drop"))
        }
        Action::Channels { keep: Channels::List(list) } if list.windows(2).any(|pair| pair[0] >= pair[1]) => {
            Err(place.field("keep").plan("channels must be in ascending order, each once"))
        }
        _ => Ok(()),
    }
}

/// The shares of the experts merged into one target must leave it a share of its own.
fn merge_shares(layer: &LayerPlan, place: &Place) -> Result<()> {
    let mut shares = BTreeMap::<usize, f64>::new();
    for entry in &layer.experts {
        if let Action::Merge { into, weight } = entry.action {
            *shares.entry(into).or_default() += weight;
        }
    }
    match shares.into_iter().find(|(_, sum)| *sum > 1.0 + 1e-9) {
        Some((target, sum)) => {
            let problem = format!("the weights merged into it add up to {sum}, expected at most 1");
            Err(place.expert(target).plan(problem))
        }
        None => Ok(()),
    }
}

/// Everything that needs the checkpoint's sizes; `plan` has passed [`structure`].
pub(super) fn against(plan: &Plan, profile: &Profile) -> Result<()> {
    self::profile(profile)?;
    let model = Place::top().field("model");
    if plan.model.family != profile.family {
        let problem = format!("the plan is for {}, the checkpoint is {}", plan.model.family, profile.family);
        return Err(model.field("family").plan(problem));
    }
    if plan.model.identity != profile.identity {
        let (theirs, ours) = (&plan.model.identity, &profile.identity);
        let problem = format!("the plan is for the checkpoint {theirs}, this one is {ours}; make a new plan");
        return Err(model.field("identity").plan(problem));
    }
    let chosen_again = options::flag(&plan.options, "propagate");
    let moe = profile.moe_layers.iter().map(|l| l.layer).collect::<Vec<_>>();
    if let Some(stray) = plan.layers.iter().find(|l| !moe.contains(&l.layer)) {
        return Err(
            Place::layer(stray.layer).plan(format!("not a MoE layer; the MoE layers are {}", spans(&moe)))
        );
    }
    for (position, layer) in profile.moe_layers.iter().enumerate() {
        match plan.layers.get(position) {
            Some(entry) if entry.layer == layer.layer => {
                layer_against(entry, layer, profile)?;
                merges_against(entry, layer, profile.expert_io(layer), chosen_again)?;
            }
            _ => return Err(Place::layer(layer.layer).plan("missing; a plan lists every MoE layer")),
        }
    }
    Ok(())
}

fn layer_against(plan: &LayerPlan, layer: &MoeProfile, profile: &Profile) -> Result<()> {
    let place = Place::layer(layer.layer);
    let (experts, last) = (layer.experts, layer.experts - 1);
    if let Some(stray) =
        plan.experts.iter().map(|e| e.expert).chain(plan.protected.iter().copied()).find(|e| *e > last)
    {
        return Err(place.expert(stray).plan(format!("the layer has {experts} experts, 0 to {last}")));
    }
    // Ascending, without repetition and in range: the first gap is where position and number part.
    if plan.experts.len() != experts {
        let gap =
            plan.experts.iter().zip(0..).find(|(e, i)| e.expert != *i).map_or(plan.experts.len(), |(_, i)| i);
        return Err(place.expert(gap).plan(format!("missing; list all {experts} experts")));
    }
    for entry in &plan.experts {
        action_against(&entry.action, layer, profile.expert_io(layer), &place.expert(entry.expert))?;
    }
    let mut groups = GroupState::new(layer, plan.top_k);
    plan.without_row().for_each(|e| groups.remove(groups.of(e)));
    if !groups.is_enough() {
        let (top_groups, sizes) = (layer.top_groups, groups.sizes());
        let problem = format!(
            "{} with {sizes:?} experts left by group; any {top_groups} groups must hold that many, keep more",
            plan.top_k
        );
        return Err(place.field("top_k").plan(problem));
    }
    Ok(())
}

/// Experts are averaged with those of the same width, all of them dense. Where groups are chosen again while compressing,
/// any expert of the layer may be averaged with any other.
fn merges_against(plan: &LayerPlan, layer: &MoeProfile, expert_io: usize, chosen_again: bool) -> Result<()> {
    let width = |e: usize| {
        let place = Place::layer(layer.layer).expert(e);
        layer.dense_width(e, expert_io).ok_or_else(|| place.plan(NOT_DENSE))
    };
    let pairs = plan.experts.iter().filter_map(|entry| match entry.action {
        Action::Merge { into, .. } => Some((entry.expert, into)),
        _ => None,
    });
    let mut pairs: Vec<(usize, usize)> = pairs.collect();
    if let (true, Some(&(_, into))) = (chosen_again, pairs.first()) {
        pairs = (0..layer.experts).map(|e| (e, into)).collect();
    }
    for (expert, into) in pairs {
        let [own, other] = [width(expert)?, width(into)?];
        if own != other {
            let problem = format!(
                "has {own} channels, expert {into} has {other}; experts that are merged must have one width"
            );
            return Err(Place::layer(layer.layer).expert(expert).plan(problem));
        }
    }
    Ok(())
}

fn action_against(action: &Action, layer: &MoeProfile, expert_io: usize, place: &Place) -> Result<()> {
    let (d, p) = (expert_io, layer.width);
    let rank = |field: Place, rank: usize| {
        let most = d.min(p);
        let problem = || format!("found {rank}, expected 1 to {most} for matrices of {p} × {d}");
        if rank > most { Err(field.plan(problem())) } else { Ok(()) }
    };
    let reshapes = matches!(action, Action::LowRank { .. } | Action::Channels { .. } | Action::Delta { .. });
    if reshapes && u128::from(layer.expert_parameters) < layer.dense_values(d) {
        let problem =
            "the experts of this layer are not all dense; low_rank, channels and delta do not apply";
        return Err(place.field("action").plan(problem));
    }
    match action {
        Action::LowRank { rank: ranks, .. } if layer.ungated && ranks.up.is_some() => {
            let problem = "the experts of this layer have no such matrix; use null";
            Err(place.field("rank").field("up").plan(problem))
        }
        Action::LowRank { rank: ranks, rows } => Projection::ALL.iter().try_for_each(|&m| {
            let most = if m == Projection::Down { d } else { p };
            match rows.get(m) {
                Some(rows) if rows > most => {
                    let problem = format!("found {rows}, expected 1 to {most}, the rows of the matrix");
                    Err(place.field("rows").field(m.name()).plan(problem))
                }
                _ => ranks.get(m).map_or(Ok(()), |r| rank(place.field("rank").field(m.name()), r)),
            }
        }),
        Action::Delta { rank: r } => rank(place.field("rank"), *r),
        Action::Channels { keep: Channels::Count(count) } if *count > p => {
            Err(place.field("keep").plan(format!("found {count}, expected 1 to {p} channels")))
        }
        Action::Channels { keep: Channels::List(list) } => match list.iter().find(|c| **c >= p) {
            Some(c) => Err(place.field("keep").plan(format!("found channel {c}, expected 0 to {}", p - 1))),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Checks the sizes of a checkpoint, which may come from a file: all arithmetic of this module relies on
/// them.
pub(super) fn profile(profile: &Profile) -> Result<()> {
    if profile.moe_layers.is_empty() {
        return Err(Place::top().profile("the checkpoint has no MoE layer"));
    }
    let (mut parameters, mut bytes) = (0u128, 0u128);
    for layer in &profile.moe_layers {
        let place = Place::layer(layer.layer);
        let zero = [
            ("hidden_size", profile.hidden_size as u64),
            ("experts", layer.experts as u64),
            ("top_k", layer.top_k as u64),
            ("width", layer.width as u64),
            ("latent", layer.latent.unwrap_or(1) as u64),
            ("groups", layer.groups as u64),
            ("top_groups", layer.top_groups as u64),
            ("expert_parameters", layer.expert_parameters),
            ("expert_bytes", layer.expert_bytes),
        ];
        if let Some((field, _)) = zero.iter().find(|(_, value)| *value == 0) {
            return Err(place.field(field).profile("found 0, expected at least 1"));
        }
        let (experts, groups, top_groups) = (layer.experts, layer.groups, layer.top_groups);
        if groups > experts || !experts.is_multiple_of(groups) || top_groups > groups {
            let problem = format!("{top_groups} of {groups} groups does not fit {experts} experts");
            return Err(place.field("groups").profile(problem));
        }
        let reach = experts / groups * top_groups;
        if layer.top_k > reach {
            let problem =
                format!("found {}, expected at most {reach}, the experts within reach", layer.top_k);
            return Err(place.field("top_k").profile(problem));
        }
        if !layer.each.is_empty() && layer.each.len() != experts {
            let problem = format!("found {}, expected {experts}, one per expert", layer.each.len());
            return Err(place.field("each").profile(problem));
        }
        let widths = &layer.dense_widths;
        if !widths.is_empty() && widths.len() != experts {
            let problem = format!("found {}, expected {experts}, one per expert", widths.len());
            return Err(place.field("dense_widths").profile(problem));
        }
        let routed = |size: fn(ExpertSize) -> u64| {
            (0..experts).map(|e| u128::from(size(layer.expert(e)))).sum::<u128>()
                + u128::from(size(layer.base))
        };
        parameters += routed(|s| s.parameters) + experts as u128 * u128::from(layer.router_parameters);
        bytes += routed(|s| s.bytes) + experts as u128 * u128::from(layer.router_bytes);
    }
    if profile.moe_layers.windows(2).any(|pair| pair[0].layer >= pair[1].layer) {
        return Err(Place::top().field("moe_layers").profile("layers must be in ascending order, each once"));
    }
    // Far above any checkpoint, and low enough that no sum of sizes can overflow.
    for (field, value) in [("parameters", profile.parameters), ("bytes", profile.bytes)] {
        if value >= 1 << 56 {
            return Err(Place::top().field(field).profile(format!("found {value}, expected less than 2^56")));
        }
    }
    if parameters > u128::from(profile.parameters) {
        let problem = format!("found {}, but the routed experts alone have {parameters}", profile.parameters);
        return Err(Place::top().field("parameters").profile(problem));
    }
    if bytes > u128::from(profile.bytes) {
        let problem = format!("found {}, but the routed experts alone have {bytes}", profile.bytes);
        return Err(Place::top().field("bytes").profile(problem));
    }
    Ok(())
}

/// Ascending numbers for people: `0 to 3, 5, 7 to 9`.
pub(super) fn spans(numbers: &[usize]) -> String {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match spans.last_mut() {
            Some((_, last)) if *last + 1 == n => *last = n,
            _ => spans.push((n, n)),
        }
    }
    let span = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first} to {last}") }
    };
    spans.iter().map(span).collect::<Vec<_>>().join(", ")
}
