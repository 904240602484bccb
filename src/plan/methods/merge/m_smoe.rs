//! M-SMoE and MC-SMoE: "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy".

use super::{
    EXCLUDE, Groups, Job, MERGE_DTYPE, align_by_option, align_option, counts, logit_cosines, router_option,
};
use crate::architecture::MoeProfile;
use crate::plan::check::{self, spans};
use crate::plan::file::LayerPlan;
use crate::plan::methods::{FACTOR_DTYPE, Method, Needs, Paper, Request};
use crate::plan::options::{self, OptionKind};
use crate::plan::score::descending;
use crate::plan::{Action, Budget, Error, OptionSpec, Plan, Projection, Ranks, Result};

/// Merging alone.
pub(in crate::plan) static M_SMOE: MSmoe = MSmoe { compress: false };
/// Merging, then low rank and sparse rows.
pub(in crate::plan) static MC_SMOE: MSmoe = MSmoe { compress: true };

/// The method, with or without the second step.
pub(in crate::plan) struct MSmoe {
    compress: bool,
}

static OPTIONS: [OptionSpec; 11] = [
    OptionSpec {
        name: "grouping",
        kind: OptionKind::Choice(&["exact", "strict", "uniform"]),
        default: Some("exact"),
        help: "exact: layers whose experts are used more evenly keep more groups, as many in all as asked for; strict: \
               the published threshold, which ties can leave with fewer; uniform: every layer keeps as many",
    },
    OptionSpec {
        name: "capacity",
        kind: OptionKind::Integer(2),
        default: None,
        help: "most experts in a group",
    },
    align_option("true"),
    align_by_option("weights"),
    router_option("redirect"),
    EXCLUDE,
    MERGE_DTYPE,
    OptionSpec {
        name: "rank",
        kind: OptionKind::Integer(1),
        default: Some("32"),
        help: "rank of every matrix of the merged experts",
    },
    OptionSpec {
        name: "dense_rows",
        kind: OptionKind::Share,
        default: Some("0.1"),
        help: "share of the rows of every matrix that stay as they are beside its factors; 0: none",
    },
    OptionSpec {
        name: "whiten",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "factorise in the basis of the inputs instead of the published plain SVD. Compressing then needs second \
               moments, in the statistics or measured from --tokens",
    },
    FACTOR_DTYPE,
];

impl Method for MSmoe {
    fn name(&self) -> &'static str {
        if self.compress { "mc-smoe" } else { "m-smoe" }
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
            arxiv: "2310.01334",
        })
    }

    fn description(&self) -> &'static str {
        if self.compress {
            "m-smoe, then low rank and a few dense rows for every expert of its layers; budgets are those of merging \
             (--experts with all of them: no merging)"
        } else {
            "merges experts into the most used ones, by the similarity of their router logits"
        }
    }

    fn needs(&self) -> Needs {
        Needs { statistics: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        if self.compress { &OPTIONS } else { &OPTIONS[..7] }
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        check::profile(request.profile)?;
        let job = Job::new(self.name(), self.options(), request)?;
        let frequencies = frequencies(&job)?;
        let mut cosines = Vec::new();
        for (i, layer) in job.layers() {
            cosines.push(logit_cosines(layer, &job.moments[i])?);
        }
        let layers: Vec<&MoeProfile> = job.layers().map(|(_, layer)| layer).collect();
        let capacity = options::integer(&job.options, "capacity").map(|c| c as usize);
        let groups = |wanted: &[usize]| {
            let total = wanted.iter().sum();
            let counts = if options::is(&job.options, "grouping", "uniform") {
                wanted.to_vec()
            } else if options::is(&job.options, "grouping", "strict") {
                let counts = strict(&frequencies, total);
                counts.iter().zip(&layers).map(|(n, layer)| *n.max(&job.floor(layer))).collect()
            } else {
                let floors: Vec<usize> = layers.iter().map(|l| job.floor(l)).collect();
                exact(&frequencies, &floors, total)
            };
            let layer = |i: usize| group(layers[i], &frequencies[i], &cosines[i], counts[i], capacity);
            (0..layers.len()).map(layer).collect::<Result<Vec<Groups>>>()
        };
        let (mut actions, mut dense) = (Vec::new(), Vec::new());
        if self.compress {
            let rank = options::integer(&job.options, "rank").unwrap_or(32) as usize;
            let rows = options::fraction(&job.options, "dense_rows").unwrap_or(0.1);
            for (i, layer) in job.layers() {
                let hidden = request.profile.expert_io(layer);
                let most = hidden.min(layer.width);
                if rank > most && request.options.contains_key("rank") {
                    let (layer, width) = (layer.layer, layer.width);
                    let expected = format!(
                        "expected at most {most} for the matrices of layer {layer}, {width} × {hidden}"
                    );
                    return Err(Error::Option { option: "rank".into(), value: rank.to_string(), expected });
                }
                let action = decomposed(hidden, layer, rank, rows);
                if action == Action::Keep {
                    dense.push(layer.layer);
                }
                actions.push((i, action));
            }
        }
        let decompose = |plans: &mut [LayerPlan]| {
            for (i, action) in &actions {
                let stored = plans[*i].experts.iter_mut().filter(|e| e.action.is_stored());
                stored.for_each(|e| e.action = action.clone());
            }
        };
        let plans = match job.budget {
            // Nothing is merged, and the second step compresses alone.
            Budget::Experts(n) if self.compress && layers.iter().all(|l| l.experts == n) => {
                let mut plans = job.plans(&groups(&vec![n; layers.len()])?, &frequencies);
                decompose(&mut plans);
                plans
            }
            _ => job.meet(groups, &frequencies, decompose)?,
        };
        let mut warnings = job.warnings()?;
        if !dense.is_empty() {
            let (layers, rank) = (spans(&dense), &job.options["rank"]);
            warnings.push(format!(
                "layer {layers}: factors of rank {rank} and dense rows would not be smaller than the matrices, which stay as \
                 they are; give a smaller rank"
            ));
        }
        Plan::assemble(request.profile, self.name(), job.options, request.source.cloned(), plans, warnings)
    }
}

/// Share of the layer's expert choices that fell on each expert, per layer that takes part.
fn frequencies(job: &Job<'_>) -> Result<Vec<Vec<f64>>> {
    let share = |counts: Vec<f64>| {
        let total: f64 = counts.iter().sum();
        counts.iter().map(|n| n / total).collect()
    };
    Ok(counts(job)?.into_iter().map(share).collect())
}

/// Groups per layer: `floors`, and the rest of `total` to the layers of the most frequent other experts, ties to the lower
/// layer and expert.
fn exact(frequencies: &[Vec<f64>], floors: &[usize], total: usize) -> Vec<usize> {
    let mut rest = Vec::new();
    for (l, (frequency, floor)) in frequencies.iter().zip(floors).enumerate() {
        rest.extend(descending(frequency).split_off(*floor).into_iter().map(|e| (frequency[e], l, e)));
    }
    rest.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut counts = floors.to_vec();
    let more = total.saturating_sub(floors.iter().sum());
    rest.iter().take(more).for_each(|(_, l, _)| counts[*l] += 1);
    counts
}

/// Groups per layer by the published rule: as many as experts are above the frequency in place `total` of all, counted
/// from 0, where the most frequent expert of each layer counts as 1.
fn strict(frequencies: &[Vec<f64>], total: usize) -> Vec<usize> {
    let mut raised = frequencies.to_vec();
    for frequency in &mut raised {
        let first = descending(frequency)[0];
        frequency[first] = 1.0;
    }
    let mut all = raised.concat();
    all.sort_by(|a, b| b.total_cmp(a));
    let threshold = all.get(total).copied().unwrap_or(0.0);
    raised.iter().map(|layer| layer.iter().filter(|f| **f > threshold).count()).collect()
}

/// The `count` most frequent experts, each with those that are most similar to it, none with more than `capacity`.
fn group(
    layer: &MoeProfile,
    frequency: &[f64],
    cosines: &[f64],
    count: usize,
    capacity: Option<usize>,
) -> Result<Groups> {
    let experts = layer.experts;
    let capacity = capacity.unwrap_or(experts);
    if count * capacity < experts {
        let expected = format!(
            "{count} groups of layer {} cannot hold its {experts} experts; use at least {}",
            layer.layer,
            experts.div_ceil(count)
        );
        return Err(Error::Option { option: "capacity".into(), value: capacity.to_string(), expected });
    }
    let mut order = descending(frequency);
    let others = order.split_off(count);
    let mut groups: Groups = order.into_iter().map(|e| vec![e]).collect();
    for expert in others {
        let similarity = |group: &Vec<usize>| cosines[expert * experts + group[0]];
        let mut best: Option<usize> = None;
        for (g, candidate) in groups.iter().enumerate().filter(|(_, g)| g.len() < capacity) {
            if best.is_none_or(|b| similarity(candidate) > similarity(&groups[b])) {
                best = Some(g);
            }
        }
        if let Some(best) = best {
            groups[best].push(expert);
        }
    }
    Ok(groups)
}

/// What becomes of a merged expert: factors of this rank and a share of dense rows, rounded to whole ones, for every
/// matrix where they save something.
fn decomposed(hidden_size: usize, layer: &MoeProfile, rank: usize, share: f64) -> Action {
    let (d, p) = (hidden_size, layer.width);
    let (mut ranks, mut rows) = (Ranks::default(), Ranks::default());
    for &matrix in layer.projections() {
        let (out, input) = if matrix == Projection::Down { (d, p) } else { (p, d) };
        let dense = (share * out as f64).round() as usize;
        if rank as u128 * (d + p) as u128 + dense as u128 * (input as u128) < d as u128 * p as u128 {
            *ranks.get_mut(matrix) = Some(rank);
            *rows.get_mut(matrix) = (dense > 0).then_some(dense);
        }
    }
    if ranks.is_dense() { Action::Keep } else { Action::LowRank { rank: ranks, rows } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::layer;

    /// The published example of three layers of four experts and two groups on average.
    #[test]
    fn groups_go_to_layers_that_use_their_experts_evenly() {
        let frequencies =
            [vec![0.4, 0.3, 0.2, 0.1], vec![0.7, 0.2, 0.06, 0.04], vec![0.25, 0.25, 0.26, 0.24]];
        assert_eq!(strict(&frequencies, 6), [2, 1, 3]);
        assert_eq!(exact(&frequencies, &[1; 3], 6), [2, 1, 3]);
        assert_eq!(exact(&frequencies, &[2; 3], 6), [2, 2, 2]);
    }

    /// The matrices of Switch-base: rank 32 and a tenth of the rows, as published.
    #[test]
    fn a_tenth_of_the_rows_stays_dense() {
        let switch = MoeProfile { width: 3072, ungated: true, ..layer(0, 32, 1) };
        let rank = Ranks { gate: Some(32), up: None, down: Some(32) };
        let rows = Ranks { gate: Some(307), up: None, down: Some(77) };
        assert_eq!(decomposed(768, &switch, 32, 0.1), Action::LowRank { rank, rows });
        assert_eq!(decomposed(768, &switch, 32, 0.0), Action::low_rank(rank));
        assert_eq!(decomposed(768, &switch, 32, 0.96), Action::Keep);
    }

    /// Frequencies equal to the threshold: the published rule drops them all, the exact one fills up.
    #[test]
    fn ties_at_the_threshold() {
        let frequencies = [vec![0.4, 0.2, 0.2, 0.2], vec![0.4, 0.2, 0.2, 0.2]];
        assert_eq!(strict(&frequencies, 4), [1, 1]);
        assert_eq!(exact(&frequencies, &[1; 2], 4), [3, 1]);
    }

    #[test]
    fn the_most_similar_takes_in_ties_the_more_frequent_and_full_groups_none() {
        let frequency = [0.1, 0.4, 0.2, 0.3];
        let mut cosines = vec![0.0; 16];
        cosines[3] = 0.0;
        let found = |capacity, cosines: &[f64]| group(&layer(0, 4, 1), &frequency, cosines, 2, capacity);
        assert_eq!(found(None, &cosines).unwrap_or_default(), [vec![1, 2, 0], vec![3]]);
        assert_eq!(found(Some(2), &cosines).unwrap_or_default(), [vec![1, 2], vec![3, 0]]);
        cosines[2 * 4 + 3] = 0.5;
        assert_eq!(found(None, &cosines).unwrap_or_default(), [vec![1, 0], vec![3, 2]]);
        let error = group(&layer(0, 4, 1), &frequency, &cosines, 1, Some(3)).unwrap_err().to_string();
        assert_eq!(error, "option capacity=3: 1 groups of layer 0 cannot hold its 4 experts; use at least 4");
    }
}
