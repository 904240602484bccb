//! REAM: the experts with the highest REAP saliency take in those whose outputs and router logits are most alike.
//!
//! What differs from the published code: outputs are compared by their gated sum over routed tokens, where that runs every
//! expert on every token; hidden neurons are aligned by their weights, as published only with `align_by=both`, and then
//! without first reducing the weights to 64 principal components; and each layer is grouped by what was measured in the
//! original model, unless `propagate=true` asks for the published order.

use super::{
    EXCLUDE, Groups, Job, MERGE_DTYPE, align_by_option, align_option, logit_cosines, router_option, rows,
};
use crate::architecture::MoeProfile;
use crate::backend::{Moment, Moments};
use crate::plan::file::{LayerPlan, MergedRows};
use crate::plan::methods::{Method, Needs, Paper, Request};
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::score::{self, Rule, descending};
use crate::plan::select::Layer;
use crate::plan::{Action, Error, OptionSpec, Plan, Result, check};

/// The method.
pub(in crate::plan) struct Ream;

static OPTIONS: [OptionSpec; 7] = [
    OptionSpec {
        name: "group_size",
        kind: OptionKind::Integer(2),
        default: Some("16"),
        help: "most experts in a group: the most salient expert takes in the nearest until its group has so many, then \
               the next one",
    },
    align_option("true"),
    align_by_option("weights"),
    router_option("fuse"),
    EXCLUDE,
    MERGE_DTYPE,
    OptionSpec {
        name: "propagate",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "while compressing, measure each layer again behind the compressed ones before it, and group anew, as \
               published",
    },
];

impl Method for Ream {
    fn name(&self) -> &'static str {
        "ream"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper { title: "REAM: Merging Improves Pruning of Experts in LLMs", arxiv: "2604.04356" })
    }

    fn description(&self) -> &'static str {
        "merges experts into those with the highest REAP saliency, by outputs and router logits"
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
        let mut views = Vec::new();
        for (i, layer) in job.layers() {
            views.push(View::new(layer, &job.moments[i])?);
        }
        let size = group_size(&job.options);
        let groups = |wanted: &[usize]| {
            views.iter().zip(wanted).map(|(view, n)| view.group(*n, size, job.rows)).collect()
        };
        let saliency: Vec<Vec<f64>> = views.iter().map(|v| v.saliency.clone()).collect();
        let plans = job.meet(groups, &saliency, |_| {})?;
        let warnings = job.warnings()?;
        Plan::assemble(request.profile, self.name(), job.options, request.source.cloned(), plans, warnings)
    }
}

/// Groups the experts of one layer anew, into as many groups as `plan` has, by moments measured again.
///
/// # Errors
/// [`Error::Method`] for another method than `ream`, [`Error::Option`] for options that it does not take,
/// [`Error::Statistics`] for moments that are missing or damaged.
pub fn regroup_layer(
    method: &str,
    options: &Options,
    layer: &MoeProfile,
    moments: &Moments,
    plan: &LayerPlan,
) -> Result<LayerPlan> {
    if method != Ream.name() {
        return Err(Error::Method { name: method.into(), known: Ream.name().into() });
    }
    let options = options::resolve(method, &OPTIONS, &options::given(options))?;
    let view = View::new(layer, moments)?;
    let count = plan.experts.iter().filter(|e| e.action.is_stored()).count();
    let groups = view.group(count, group_size(&options), plan.router)?;
    let mut fresh = LayerPlan::new(plan.layer, plan.top_k, vec![Action::Keep; layer.experts]);
    (fresh.router, fresh.skip) = (plan.router, plan.skip);
    super::merge_groups(&mut fresh, &groups, &view.saliency);
    Ok(fresh)
}

fn group_size(options: &Options) -> usize {
    options::integer(options, "group_size").unwrap_or(16) as usize
}

/// What the experts of a layer look like to this method.
struct View<'a> {
    layer: &'a MoeProfile,
    saliency: Vec<f64>,
    /// Cosines of outputs plus cosines of router logits, `[experts, experts]`.
    similarity: Vec<f64>,
}

impl<'a> View<'a> {
    fn new(layer: &'a MoeProfile, moments: &Moments) -> Result<Self> {
        let saliency = score::scores(Rule::Mean(Moment::GateNormSum), layer, Some(moments), 0)?;
        let width = moments.dims().hidden_size;
        let outputs =
            rows(layer, moments, Moment::GateOutputSum, width, "calibrate again with this version")?;
        let mut similarity = logit_cosines(layer, moments)?;
        let output = |e: usize| &outputs[e * width..(e + 1) * width];
        let product = |a: usize, b: usize| output(a).iter().zip(output(b)).map(|(x, y)| x * y).sum::<f64>();
        let norms: Vec<f64> = (0..layer.experts).map(|e| product(e, e).sqrt()).collect();
        for (i, s) in similarity.iter_mut().enumerate() {
            let (a, b) = (i / layer.experts, i % layer.experts);
            let norm = norms[a] * norms[b];
            *s += if norm > 0.0 { product(a, b) / norm } else { 0.0 };
        }
        Ok(View { layer, saliency, similarity })
    }

    /// The `count` most salient experts, in descending order each with the nearest that are left. Where rows go and the
    /// router is group-limited, the most salient of each of its groups.
    fn group(&self, count: usize, size: usize, rows: MergedRows) -> Result<Groups> {
        let experts = self.layer.experts;
        if count.saturating_mul(size) < experts {
            let (layer, least) = (self.layer.layer, experts.div_ceil(count));
            let expected = format!(
                "{count} groups of layer {layer} cannot hold its {experts} experts; use at least {least}"
            );
            return Err(Error::Option { option: "group_size".into(), value: size.to_string(), expected });
        }
        let mut order = descending(&self.saliency);
        let mut left = match rows {
            MergedRows::Redirect => order.split_off(count),
            MergedRows::Fuse => {
                let choice = Layer::new(self.layer, 0, vec![false; experts]);
                choice.choose(&score::worst_first(&self.saliency), experts - count)?
            }
        };
        left.sort_unstable();
        order.retain(|e| left.binary_search(e).is_err());
        let group = |centre: usize| {
            // Stable, so that ties go to the lower expert.
            left.sort_by(|a, b| {
                let similarity = |e: &usize| self.similarity[centre * experts + e];
                similarity(b).total_cmp(&similarity(a)).then(a.cmp(b))
            });
            let taken = left.drain(..left.len().min(size - 1));
            std::iter::once(centre).chain(taken).collect()
        };
        Ok(order.into_iter().map(group).collect())
    }
}
