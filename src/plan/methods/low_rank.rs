//! Low rank: every expert stays, as products of thin matrices.
//!
//! A matrix of d × p values at rank r takes r·(d + p) values, fewer than before while r < d·p/(d + p).

use super::{FACTOR_DTYPE, Method, Needs, PROPAGATE, Paper, Request, SpectrumSource};
use crate::architecture::{MoeProfile, Profile};
use crate::plan::budget::{self, Budget};
use crate::plan::check;
use crate::plan::costs::{Costs, Sizes};
use crate::plan::error::Place;
use crate::plan::file::LayerPlan;
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::owl;
use crate::plan::{Action, Error, OptionSpec, Plan, Projection, Ranks, Result};

/// The method.
pub(super) struct LowRank;

static OPTIONS: [OptionSpec; 9] = [
    OptionSpec {
        name: "whiten",
        kind: OptionKind::Flag,
        default: Some("true"),
        help: "factorise in the basis of the inputs: the least error on them instead of on the weights. \
               Compressing then needs second moments, in the statistics or measured from --tokens",
    },
    OptionSpec {
        name: "rank",
        kind: OptionKind::Integer(1),
        default: None,
        help: "this rank for every matrix, in place of a budget",
    },
    OptionSpec {
        name: "energy",
        kind: OptionKind::Fraction,
        default: None,
        help: "per matrix the smallest rank that keeps this share of the spectrum, in place of a budget",
    },
    OptionSpec {
        name: "allocate",
        kind: OptionKind::Choice(&["uniform", "spectrum"]),
        default: Some("uniform"),
        help: "uniform: the same rank for every expert; spectrum: the largest eigenvalues of all experts of \
               a layer are kept, so that ranks differ",
    },
    FACTOR_DTYPE,
    PROPAGATE,
    owl::OPTIONS[0],
    owl::OPTIONS[1],
    owl::OPTIONS[2],
];

impl Method for LowRank {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
            arxiv: "2403.07378",
        })
    }

    fn description(&self) -> &'static str {
        "replaces the matrices of every expert by products of thin ones, by (whitened) SVD"
    }

    fn needs(&self) -> Needs {
        Needs { second_moments: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(self.name(), &OPTIONS, request.options)?;
        check_dense(self.name(), profile)?;
        let costs = Costs::of_options(profile, &options);
        let layers = match Target::new(request.budget, &options)? {
            Target::Energy(energy) => {
                let spectra = spectra(request, "energy")?;
                let layer = |l| by_energy(&Shape::new(profile, l), energy, spectra);
                profile.moe_layers.iter().map(layer).collect::<Result<Vec<_>>>()?
            }
            target => {
                let ranks = match target {
                    Target::Rank(rank) => explicit(profile, rank)?,
                    Target::Remove(fraction) => {
                        let fractions = owl::fractions(request, &options, fraction)?;
                        of_fraction(profile, fraction, &fractions)?
                    }
                    Target::Bytes(size) if owl::is_owl(&options) => {
                        return Err(owl::needs_fraction(Budget::Bytes(size)));
                    }
                    Target::Bytes(size) => of_size(&costs, size)?,
                    Target::Energy(_) => Vec::new(),
                };
                let shapes = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).zip(ranks);
                if options::is(&options, "allocate", "spectrum") {
                    let spectra = spectra(request, "allocate=spectrum")?;
                    shapes.map(|(shape, rank)| by_spectrum(&shape, rank, spectra)).collect::<Result<_>>()?
                } else {
                    shapes.map(|(shape, rank)| vec![shape.ranks(rank); shape.layer.experts]).collect()
                }
            }
        };
        let plans =
            profile.moe_layers.iter().zip(&layers).map(|(layer, ranks)| layer_plan(layer, ranks)).collect();
        let mut warnings = Vec::new();
        if layers.iter().flatten().all(Ranks::is_dense) {
            let shapes = profile.moe_layers.iter().map(|l| Shape::new(profile, l));
            let largest = shapes.map(|shape| shape.largest()).max().unwrap_or(0);
            warnings
                .push(format!("every matrix stays dense: factors save something up to rank {largest} only"));
        }
        Plan::assemble(profile, self.name(), options, request.source.cloned(), plans, warnings)
    }
}

/// Refuses experts that have been compressed already.
pub(super) fn check_dense(method: &str, profile: &Profile) -> Result<()> {
    for layer in &profile.moe_layers {
        let values = layer.dense_values(profile.expert_io(layer));
        if u128::from(layer.expert_parameters) < values {
            let (has, place) =
                (layer.expert_parameters, Place::layer(layer.layer).field("expert_parameters"));
            let problem =
                format!("found {has}, but a dense expert has {values}; {method} needs dense experts");
            return Err(place.profile(problem));
        }
    }
    Ok(())
}

/// What decides the ranks.
#[derive(Clone, Copy)]
enum Target {
    Rank(u64),
    Energy(f64),
    Remove(f64),
    Bytes(u64),
}

impl Target {
    /// The one thing that was asked for.
    fn new(budget: Option<Budget>, options: &Options) -> Result<Target> {
        let conflict = |option: &str, value: String, other: &str| {
            let expected = format!("cannot be combined with {other}; give one of them");
            Err(Error::Option { option: option.into(), value, expected })
        };
        let rank = options::integer(options, "rank");
        let energy = options::fraction(options, "energy");
        match (rank, energy, budget) {
            (Some(rank), Some(_), _) => conflict("rank", rank.to_string(), "energy"),
            (Some(rank), None, Some(budget)) => conflict("rank", rank.to_string(), &budget.to_string()),
            (None, Some(energy), Some(budget)) => conflict("energy", energy.to_string(), &budget.to_string()),
            (None, Some(energy), None) if options::is(options, "allocate", "spectrum") => {
                conflict("energy", energy.to_string(), "allocate=spectrum")
            }
            (Some(rank), None, None) => Ok(Target::Rank(rank)),
            (None, Some(energy), None) => Ok(Target::Energy(energy)),
            (None, None, Some(Budget::Remove(fraction))) => {
                Budget::Remove(fraction).check().map(|()| Target::Remove(fraction))
            }
            (None, None, Some(Budget::Bytes(size))) => Ok(Target::Bytes(size)),
            (None, None, Some(budget @ Budget::Experts(_))) => Err(Error::Budget(format!(
                "{budget}: low-rank keeps every expert; use --remove, --bytes, or the option rank or energy"
            ))),
            (None, None, None) => Err(Error::Missing(
                "low-rank: no budget; give --remove, --bytes, or the option rank or energy".into(),
            )),
        }
    }
}

/// The matrices of one layer's experts: all have d·p values and d + p rows and columns.
pub(super) struct Shape<'a> {
    layer: &'a MoeProfile,
    d: usize,
    p: usize,
}

impl<'a> Shape<'a> {
    pub(super) fn new(profile: &'a Profile, layer: &'a MoeProfile) -> Self {
        Shape { layer, d: profile.expert_io(layer), p: layer.width }
    }

    /// The layer.
    pub(super) fn layer(&self) -> &'a MoeProfile {
        self.layer
    }

    /// Values of a dense matrix.
    fn values(&self) -> u128 {
        self.d as u128 * self.p as u128
    }

    /// Values that one more rank takes.
    fn step(&self) -> u128 {
        self.d as u128 + self.p as u128
    }

    /// The rank at which factors take as many values as the matrix.
    pub(super) fn break_even(&self) -> f64 {
        self.values() as f64 / self.step() as f64
    }

    /// The largest rank that saves anything; 0 where none does.
    pub(super) fn largest(&self) -> usize {
        ((self.values() - 1) / self.step()) as usize
    }

    /// `rank`, or dense where the factors would save nothing.
    fn useful(&self, rank: usize) -> Option<usize> {
        (rank <= self.largest()).then_some(rank)
    }

    /// The same rank for all matrices.
    pub(super) fn ranks(&self, rank: usize) -> Ranks {
        let mut ranks = Ranks::default();
        for &matrix in self.layer.projections() {
            *ranks.get_mut(matrix) = self.useful(rank);
        }
        ranks
    }
}

/// The rank that was asked for, in every layer.
fn explicit(profile: &Profile, rank: u64) -> Result<Vec<usize>> {
    let refuse =
        |expected: String| Err(Error::Option { option: "rank".into(), value: rank.to_string(), expected });
    let shapes = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).collect::<Vec<_>>();
    let rank = usize::try_from(rank).unwrap_or(usize::MAX);
    for Shape { layer, d, p } in &shapes {
        if rank > *d.min(p) {
            let (layer, most) = (layer.layer, d.min(p));
            return refuse(format!("expected at most {most} for the matrices of layer {layer}, {p} × {d}"));
        }
    }
    Ok(vec![rank; shapes.len()])
}

/// Rank floor((1 − F)·d·p/(d + p)) of every layer, with its own of the `fractions` F. A rank of 0 is refused.
fn of_fraction(profile: &Profile, fraction: f64, fractions: &[f64]) -> Result<Vec<usize>> {
    let shapes = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).collect::<Vec<_>>();
    // What rounding in the product can cost stays far below the distance of two ranks.
    let rank = |(shape, f): (&Shape<'_>, &f64)| ((1.0 - f) * shape.break_even() + 1e-9).floor() as usize;
    if let Some((shape, _)) = shapes.iter().zip(fractions).find(|pair| rank(*pair) == 0) {
        let keep = shapes.iter().map(|s| 1.0 / s.break_even()).fold(0.0, f64::max);
        let (budget, layer) = (Budget::Remove(fraction), shape.layer.layer);
        let instead = match budget::round_down(1.0 - keep) {
            largest if largest > 0.0 => format!("the largest possible is {largest}"),
            _ => format!("its matrices, {} × {}, are too small for low rank", shape.p, shape.d),
        };
        return Err(Error::Budget(format!(
            "{budget}: leaves no rank to the matrices of layer {layer}; {instead}"
        )));
    }
    Ok(shapes.iter().zip(fractions).map(rank).collect())
}

/// The ranks of the largest uniform share of parameters at which the checkpoint is not above `size`.
fn of_size(costs: &Costs<'_>, size: u64) -> Result<Vec<usize>> {
    budget::refuse_enough(size, costs)?;
    let profile = costs.profile;
    let shapes = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).collect::<Vec<_>>();
    // Only shares at which some layer gains a rank can make a difference: r·(d + p) of d·p.
    let mut shares = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        if shapes[..i].iter().all(|other| other.p != shape.p) {
            shares.extend((1..=shape.largest() as u128).map(|r| (r * shape.step(), shape.values())));
        }
    }
    let rank =
        |shape: &Shape<'_>, (part, whole): (u128, u128)| part * shape.values() / (whole * shape.step());
    shares.retain(|share| shapes.iter().all(|shape| rank(shape, *share) > 0));
    shares.sort_by(|a, b| (a.0 * b.1).cmp(&(b.0 * a.1)));
    let ranks = |share| shapes.iter().map(|shape| rank(shape, share) as usize).collect::<Vec<_>>();
    let fits = |share: &(u128, u128)| on_disk(costs, &shapes, &ranks(*share)) <= size;
    match shares.partition_point(fits) {
        0 => Err(match shares.first() {
            Some(share) => budget::too_small(size, on_disk(costs, &shapes, &ranks(*share))),
            None => budget::too_small(size, costs.now()),
        }),
        n => Ok(ranks(shares[n - 1])),
    }
}

/// Size of the checkpoint with these ranks, one per layer.
fn on_disk(costs: &Costs<'_>, shapes: &[Shape<'_>], ranks: &[usize]) -> u64 {
    let profile = costs.profile;
    let (mut before, mut after) = (Sizes::default(), Sizes::default());
    for (shape, rank) in shapes.iter().zip(ranks) {
        let action = Action::low_rank(shape.ranks(*rank));
        before += costs.expert(shape.layer, &Action::Keep) * shape.layer.experts as u64;
        after += costs.expert(shape.layer, &action) * shape.layer.experts as u64;
    }
    let bytes = profile.bytes - before.bytes + after.bytes;
    costs.on_disk(bytes, profile.tensors - before.tensors + after.tensors)
}

/// The spectra, which `option` cannot do without.
fn spectra<'a>(request: &Request<'a>, option: &str) -> Result<&'a dyn SpectrumSource> {
    let problem = || format!("{option} needs the spectra of the weights; give the checkpoint with --model");
    request.spectra.ok_or_else(|| Error::Missing(problem()))
}

/// The spectrum of one matrix: finite, descending, without negative rounding errors.
fn spectrum(
    shape: &Shape<'_>,
    source: &dyn SpectrumSource,
    expert: usize,
    matrix: Projection,
) -> Result<Vec<f64>> {
    let place = || Place::layer(shape.layer.layer).expert(expert).field(matrix.name());
    let values = source.spectrum(shape.layer.layer, expert, matrix);
    let mut values = values.map_err(|problem| place().spectrum(problem))?;
    let most = shape.d.min(shape.p);
    if values.is_empty() || values.len() > most {
        return Err(
            place().spectrum(format!("the spectrum has {} values, expected 1 to {most}", values.len()))
        );
    }
    if let Some(value) = values.iter().find(|v| !v.is_finite()) {
        return Err(place().spectrum(format!("the spectrum holds {value}, expected finite values")));
    }
    for value in &mut values {
        *value = value.max(0.0);
    }
    if values.windows(2).any(|pair| pair[0] < pair[1]) {
        return Err(place().spectrum("the spectrum is not in descending order"));
    }
    Ok(values)
}

/// Per matrix the smallest rank, at least 1, whose values add up to `energy` of all.
fn by_energy(shape: &Shape<'_>, energy: f64, source: &dyn SpectrumSource) -> Result<Vec<Ranks>> {
    let mut layer = vec![Ranks::default(); shape.layer.experts];
    for (expert, ranks) in layer.iter_mut().enumerate() {
        for &matrix in shape.layer.projections() {
            let values = spectrum(shape, source, expert, matrix)?;
            let target = energy * values.iter().sum::<f64>();
            let mut kept = 0.0;
            let reached = values.iter().position(|v| {
                kept += v;
                kept >= target
            });
            *ranks.get_mut(matrix) = shape.useful(reached.map_or(values.len(), |i| i + 1));
        }
    }
    Ok(layer)
}

/// Per kind of matrix the E·rank largest values of all experts of the layer are kept, ties to the lower
/// expert and then to the lower position; the rank of an expert is how many of its own are among them. The
/// largest of every expert is always one of them, so that no rank is 0.
fn by_spectrum(shape: &Shape<'_>, rank: usize, source: &dyn SpectrumSource) -> Result<Vec<Ranks>> {
    let experts = shape.layer.experts;
    let mut layer = vec![Ranks::default(); experts];
    for &matrix in shape.layer.projections() {
        let mut rest = Vec::new();
        for expert in 0..experts {
            let values = spectrum(shape, source, expert, matrix)?;
            rest.extend(values.into_iter().skip(1).map(|value| (value, expert)));
        }
        // Stable, and already ascending by expert and position.
        rest.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut counts = vec![1; experts];
        rest.iter().take(experts * (rank - 1)).for_each(|(_, expert)| counts[*expert] += 1);
        for (ranks, count) in layer.iter_mut().zip(counts) {
            *ranks.get_mut(matrix) = shape.useful(count);
        }
    }
    Ok(layer)
}

fn layer_plan(layer: &MoeProfile, ranks: &[Ranks]) -> LayerPlan {
    let action = |rank: &Ranks| if rank.is_dense() { Action::Keep } else { Action::low_rank(*rank) };
    LayerPlan::new(layer.layer, layer.top_k, ranks.iter().map(action))
}
