//! HC-SMoE: experts with similar outputs, by hierarchical clustering.

use super::linkage::{Linkage, cluster, cut};
use super::{EXCLUDE, Groups, Job, MERGE_DTYPE, align_by_option, align_option, counts, router_option, rows};
use crate::architecture::MoeProfile;
use crate::backend::{Moment, Moments};
use crate::plan::error::Place;
use crate::plan::methods::{Method, Needs, Paper, Request};
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::{OptionSpec, Plan, Result, check};

/// The method.
pub(in crate::plan) struct HcSmoe;

static OPTIONS: [OptionSpec; 7] = [
    OptionSpec {
        name: "basis",
        kind: OptionKind::Choice(&["all", "routed"]),
        default: Some("all"),
        help: "outputs that are compared: mean over all tokens that calibrate sampled, wherever they were routed \
               (--sample all for every token), or over those routed to the expert",
    },
    OptionSpec {
        name: "linkage",
        kind: OptionKind::Choice(&["average", "single", "complete"]),
        default: Some("average"),
        help: "distance of clusters: the mean, least or greatest of their members",
    },
    align_option("false"),
    align_by_option("weights"),
    router_option("redirect"),
    EXCLUDE,
    MERGE_DTYPE,
];

impl Method for HcSmoe {
    fn name(&self) -> &'static str {
        "hc-smoe"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering",
            arxiv: "2410.08589",
        })
    }

    fn description(&self) -> &'static str {
        "merges experts whose mean outputs are near each other, by hierarchical clustering"
    }

    fn needs(&self) -> Needs {
        Needs { statistics: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        check::profile(request.profile)?;
        let job = Job::new(self.name(), &OPTIONS, request)?;
        let count = counts(&job)?;
        let linkage = [("single", Linkage::Single), ("complete", Linkage::Complete)];
        let chosen = linkage.into_iter().find(|(name, _)| options::is(&job.options, "linkage", name));
        let linkage = chosen.map_or(Linkage::Average, |(_, linkage)| linkage);
        let mut steps = Vec::new();
        for ((i, layer), count) in job.layers().zip(&count) {
            let points = mean_outputs(layer, &job.moments[i], count, &job.options)?;
            steps.push((layer.experts, cluster(&points, layer.experts, linkage)));
        }
        let groups = |wanted: &[usize]| {
            let layer = |(i, (experts, steps)): (usize, &(usize, Vec<_>))| -> Groups {
                let mut groups = cut(steps, *experts, wanted[i]);
                for group in &mut groups {
                    lead_by_most_frequent(group, &count[i]);
                }
                groups
            };
            Ok(steps.iter().enumerate().map(layer).collect())
        };
        let plans = job.meet(groups, &count, |_| {})?;
        let warnings = job.warnings()?;
        Plan::assemble(request.profile, self.name(), job.options, request.source.cloned(), plans, warnings)
    }
}

/// Puts the most frequent expert of a group, ties to the lowest, to its front.
fn lead_by_most_frequent(group: &mut [usize], count: &[f64]) {
    let mut best = 0;
    for (i, e) in group.iter().enumerate() {
        if count[*e] > count[group[best]] {
            best = i;
        }
    }
    group[..=best].rotate_right(1);
}

/// The mean output of every expert, `[experts, hidden]`; 0 for one without tokens.
fn mean_outputs(layer: &MoeProfile, moments: &Moments, count: &[f64], options: &Options) -> Result<Vec<f64>> {
    let width = moments.dims().hidden_size;
    if options::is(options, "basis", "routed") {
        let sums = rows(layer, moments, Moment::OutputSum, width, "calibrate again with this version")?;
        let mean = |(i, sum): (usize, &f64)| sum / count[i / width].max(1.0);
        return Ok(sums.iter().enumerate().map(mean).collect());
    }
    let how = "calibrate with --sample all, or plan with --set basis=routed";
    let sums = rows(layer, moments, Moment::SampleOutputSum, width, how)?;
    let sampled = moments.get(Moment::SampleCount).and_then(|n| n.first()).copied().unwrap_or(0.0);
    if sampled < 1.0 {
        let place = Place::layer(layer.layer).field(Moment::SampleCount.name());
        return Err(place.statistics(format!("no token was sampled; {how}")));
    }
    Ok(sums.iter().map(|sum| sum / sampled).collect())
}
