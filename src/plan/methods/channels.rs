//! Channel pruning: every expert stays, with a narrower hidden vector.

use super::low_rank::check_dense;
use super::{Method, Needs, PROPAGATE, Paper, Request};
use crate::architecture::{MoeProfile, Profile};
use crate::backend::{Moment, Moments};
use crate::plan::budget::{self, Budget};
use crate::plan::channels::Criterion;
use crate::plan::check;
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::error::Place;
use crate::plan::file::LayerPlan;
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::owl;
use crate::plan::score;
use crate::plan::{Action, Channels, Error, OptionSpec, Plan, Result};

/// A method that prunes channels.
pub(super) struct Narrow {
    name: &'static str,
    paper: Paper,
    description: &'static str,
    needs: Needs,
    options: &'static [OptionSpec],
}

const REFIT_HELP: &str = "what becomes of the down matrix. plain: its kept columns; refit: the least-squares optimum on \
                          the tokens; anchored: the kept columns plus a damped correction. The last two need second \
                          moments when compressing (calibrate --moments gate-hidden, or --tokens)";

const fn refit(default: &'static str) -> OptionSpec {
    OptionSpec {
        name: "refit",
        kind: OptionKind::Choice(&["plain", "refit", "anchored"]),
        default: Some(default),
        help: REFIT_HELP,
    }
}

static CAMERA: [OptionSpec; 7] = [
    OptionSpec {
        name: "criterion",
        kind: OptionKind::Choice(&["camera", "energy"]),
        default: Some("camera"),
        help: "score of a channel with the column w of the down matrix. camera: ‖w‖² (0.1 Σ (g z)² + 0.9 max (g z)²); \
               energy: ‖w‖² Σ (g z)²",
    },
    OptionSpec {
        name: "allocate",
        kind: OptionKind::Choice(&["layer", "uniform"]),
        default: Some("layer"),
        help: "layer: the highest scores of all experts of a layer stay, so that widths differ; uniform: as many in \
               every expert, so that the result can be a stock checkpoint",
    },
    refit("plain"),
    PROPAGATE,
    owl::OPTIONS[0],
    owl::OPTIONS[1],
    owl::OPTIONS[2],
];

static MODEGPT: [OptionSpec; 6] = [
    OptionSpec {
        name: "criterion",
        kind: OptionKind::Choice(&["leverage-relative", "leverage-unit"]),
        default: Some("leverage-relative"),
        help: "the diagonal of (C + λ I)⁻¹ C for C = Σ z zᵀ / N. leverage-relative: λ is the mean of the diagonal of \
               C; leverage-unit: λ = 1. Compressing needs second moments (calibrate --moments hidden, or --tokens)",
    },
    refit("refit"),
    PROPAGATE,
    owl::OPTIONS[0],
    owl::OPTIONS[1],
    owl::OPTIONS[2],
];

pub(super) static METHODS: [Narrow; 2] = [
    Narrow {
        name: "camera",
        paper: Paper {
            title: "CAMERA: Multi-Matrix Joint Compression for MoE Models via Micro-Expert Redundancy Analysis",
            arxiv: "2508.02322",
        },
        description: "drops the hidden channels of the least energy, over all experts of a layer together",
        needs: Needs { statistics: true, second_moments: false, tokens: false, checkpoint: false },
        options: &CAMERA,
    },
    Narrow {
        name: "modegpt",
        paper: Paper {
            title: "MoDeGPT: Modular Decomposition for Large Language Model Compression",
            arxiv: "2408.09632",
        },
        description: "drops the hidden channels of the least ridge leverage and refits the down matrix (Nyström)",
        needs: Needs { statistics: false, second_moments: true, tokens: false, checkpoint: false },
        options: &MODEGPT,
    },
];

impl Method for Narrow {
    fn name(&self) -> &'static str {
        self.name
    }

    fn paper(&self) -> Option<Paper> {
        Some(self.paper)
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn needs(&self) -> Needs {
        self.needs
    }

    fn options(&self) -> &'static [OptionSpec] {
        self.options
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(self.name, self.options, request.options)?;
        check_dense(self.name, profile)?;
        let costs = Costs::new(profile, FactorDtype::Auto);
        let of_fraction = |fraction, fractions: &[f64]| of_fraction(profile, fraction, fractions);
        let widths = owl::of_budget(self.name, request, &options, of_fraction, |size| of_size(&costs, size))?;
        let together = options::is(&options, "allocate", "layer");
        let mut plans = Vec::with_capacity(widths.len());
        for (i, (layer, width)) in profile.moe_layers.iter().zip(widths).enumerate() {
            let widths = if together {
                over_all_experts(layer, &moments(request, self.name)?[i], width, &options)?
            } else {
                vec![width; layer.experts]
            };
            plans.push(layer_plan(layer, &widths));
        }
        Plan::assemble(profile, self.name, options, request.source.cloned(), plans, Vec::new())
    }
}

/// The moments of every MoE layer.
fn moments<'a>(request: &Request<'a>, name: &str) -> Result<&'a [Moments]> {
    match request.statistics {
        Some(statistics) if statistics.len() == request.profile.moe_layers.len() => Ok(statistics),
        Some(_) => Err(Place::top().statistics("of another number of MoE layers; calibrate this checkpoint")),
        None => Err(Place::top().statistics(format!(
            "{name} needs them where allocate=layer; give those that calibrate wrote, or --set allocate=uniform"
        ))),
    }
}

/// round(p·(1 − F)) channels of every expert, halves to the even number, with its layer's own of the `fractions` F.
fn of_fraction(profile: &Profile, fraction: f64, fractions: &[f64]) -> Result<Vec<usize>> {
    let budget = Budget::Remove(fraction);
    let width = |layer: &MoeProfile, f: f64| (layer.width as f64 * (1.0 - f)).round_ties_even() as usize;
    for (layer, f) in profile.moe_layers.iter().zip(fractions) {
        let (p, place) = (layer.width, Place::layer(layer.layer));
        let problem = match width(layer, *f) {
            0 => format!(
                "leaves no channel; the largest possible is {}",
                budget::round_down(1.0 - 1.0 / p as f64)
            ),
            w if w == p => {
                format!("removes none of the {p} channels; the smallest possible is {}", 1.0 / p as f64)
            }
            _ => continue,
        };
        return Err(Error::Budget(format!("{budget}: {place}{problem}")));
    }
    Ok(profile.moe_layers.iter().zip(fractions).map(|(layer, f)| width(layer, *f)).collect())
}

/// The widths of the largest uniform share of channels at which the checkpoint is not above `size`.
fn of_size(costs: &Costs<'_>, size: u64) -> Result<Vec<usize>> {
    budget::refuse_enough(size, costs)?;
    let layers = &costs.profile.moe_layers;
    let most = layers.iter().map(|l| l.width).max().unwrap_or(1);
    let widths =
        |part: usize| -> Vec<usize> { layers.iter().map(|l| (l.width * part / most).max(1)).collect() };
    let on_disk = |part: usize| {
        let actions = layers.iter().zip(widths(part)).map(|(l, w)| vec![narrowed(l, w); l.experts]);
        costs.with(&actions.collect::<Vec<_>>())
    };
    let parts: Vec<usize> = (1..most).collect();
    match parts.partition_point(|part| on_disk(*part) <= size) {
        0 => Err(budget::too_small(size, on_disk(1))),
        n => Ok(widths(parts[n - 1])),
    }
}

/// How many channels of each expert are among the E·width of the highest scores in the layer; ties to the lower expert
/// and channel. The highest of every expert always stays.
fn over_all_experts(
    layer: &MoeProfile,
    moments: &Moments,
    width: usize,
    options: &Options,
) -> Result<Vec<usize>> {
    let wrong =
        |expected: String| Error::Option { option: "criterion".into(), value: String::new(), expected };
    let criterion = Criterion::of(options).map_err(wrong)?;
    let p = layer.width;
    let of = |moment| score::finite(layer, moments, moment);
    let (sums, largest) = (of(Moment::GateHiddenSqSum)?, of(Moment::GateHiddenMax)?);
    let scores = criterion.energies(sums, largest, of(Moment::DownNormSq)?);
    let first = |e: usize| {
        let own = &scores[e * p..(e + 1) * p];
        (0..p).reduce(|best, c| if own[c] > own[best] { c } else { best }).map(|c| e * p + c)
    };
    let mut stays = vec![false; scores.len()];
    (0..layer.experts).filter_map(first).for_each(|c| stays[c] = true);
    let mut rest = score::descending(&scores);
    rest.retain(|c| !stays[*c]);
    rest.iter().take(layer.experts * (width - 1)).for_each(|c| stays[*c] = true);
    Ok(stays.chunks_exact(p).map(|own| own.iter().filter(|stays| **stays).count()).collect())
}

fn narrowed(layer: &MoeProfile, width: usize) -> Action {
    if width == layer.width { Action::Keep } else { Action::Channels { keep: Channels::Count(width) } }
}

fn layer_plan(layer: &MoeProfile, widths: &[usize]) -> LayerPlan {
    LayerPlan::new(layer.layer, layer.top_k, widths.iter().map(|width| narrowed(layer, *width)))
}
