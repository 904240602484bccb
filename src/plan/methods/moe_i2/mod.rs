//! MoE-I²: prunes experts where layers matter least, then factorises what stays by how much each expert matters.

use super::low_rank::{Shape, check_dense};
use super::naee::{LOSS, layer_plan, loss_rule, number, rooms, source};
use super::{Method, Needs, Paper, Request};
use crate::architecture::Profile;
use crate::plan::budget::{self, Budget};
use crate::plan::check;
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::options::{self, OptionKind, Options};
use crate::plan::select::Layer;
use crate::plan::{
    Action, Error, Expected, Genetic, LayerPlan, LossSource, OptionSpec, Pass, Plan, RankRule, Ranks, Result,
    Subsets, inverse_importance, ranks_by_importance,
};

/// The method.
pub(super) struct MoeI2;

/// Share of the experts that stage 1 removes where nothing else is said.
const RATIO: f64 = 0.25;

static OPTIONS: [OptionSpec; 17] = [
    OptionSpec {
        name: "stage",
        kind: OptionKind::Choice(&["both", "prune", "low_rank"]),
        default: Some("both"),
        help: "prune: stage 1 alone, inter-expert pruning; low_rank: stage 2 alone, intra-expert decomposition",
    },
    OptionSpec {
        name: "ratio",
        kind: OptionKind::Fraction,
        default: None,
        help: "share of all experts that stage 1 removes; where not given 0.25, or all that is to be removed where that \
               is less. The ranks of stage 2 come from what then remains of the budget",
    },
    OptionSpec {
        name: "rank",
        kind: OptionKind::Integer(1),
        default: None,
        help: "average rank R_a of stage 2, in place of a budget",
    },
    OptionSpec {
        name: "alpha",
        kind: OptionKind::Fraction,
        default: Some("0.15"),
        help: "ranks are proportional to this power of the importance of the expert",
    },
    OptionSpec {
        name: "epsilon",
        kind: OptionKind::Fraction,
        default: Some("0.00000001"),
        help: "added to the importance",
    },
    OptionSpec {
        name: "allocate",
        kind: OptionKind::Choice(&["importance", "uniform"]),
        default: Some("importance"),
        help: "importance: layers lose experts in proportion to their inverse importance; uniform: all the same share",
    },
    LOSS[0],
    LOSS[1],
    OptionSpec {
        name: "population",
        kind: OptionKind::Integer(2),
        default: Some("100"),
        help: "individuals of the genetic search",
    },
    OptionSpec {
        name: "generations",
        kind: OptionKind::Integer(0),
        default: Some("50"),
        help: "generations of the genetic search",
    },
    OptionSpec {
        name: "mutation",
        kind: OptionKind::Fraction,
        default: Some("0.3"),
        help: "probability that a child is mutated; children that were tried before always are",
    },
    OptionSpec {
        name: "seed",
        kind: OptionKind::Integer(0),
        default: Some("42"),
        help: "seed of the genetic search",
    },
    OptionSpec {
        name: "enumerate",
        kind: OptionKind::Integer(0),
        default: Some("5000"),
        help: "try all subsets of a layer that has at most so many, in place of the genetic search",
    },
    OptionSpec {
        name: "candidates",
        kind: OptionKind::Integer(1),
        default: Some("3"),
        help: "K: best subsets of each layer that are compared in its block; 1 leaves blocks out",
    },
    OptionSpec {
        name: "block",
        kind: OptionKind::Integer(1),
        default: Some("3"),
        help: "T: consecutive MoE layers of a block, whose weights are in memory together; 1 leaves blocks out",
    },
    OptionSpec {
        name: "whiten",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "factorise in the basis of the inputs, as low-rank does, in place of the plain truncated SVD",
    },
    OptionSpec {
        name: "factor_dtype",
        kind: OptionKind::Choice(&FactorDtype::NAMES),
        default: Some("auto"),
        help: "number type of the factors; auto: that of the weights",
    },
];

impl Method for MoeI2 {
    fn name(&self) -> &'static str {
        "moe-i2"
    }

    fn paper(&self) -> Option<Paper> {
        Some(Paper {
            title: "MoE-I²: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert Low-Rank \
                    Decomposition",
            arxiv: "2411.01016",
        })
    }

    fn description(&self) -> &'static str {
        "prunes each layer by its importance (genetic search, compared in blocks of layers), then factorises the experts \
         that stay, with ranks by their importance"
    }

    fn needs(&self) -> Needs {
        Needs { tokens: true, ..Needs::default() }
    }

    fn options(&self) -> &'static [OptionSpec] {
        &OPTIONS
    }

    fn plan(&self, request: &Request<'_>) -> Result<Plan> {
        let profile = request.profile;
        check::profile(profile)?;
        let options = options::resolve(self.name(), &OPTIONS, request.options)?;
        let job = Job::new(profile, options, request.budget)?;
        let source = source(self.name(), request)?;
        let importance = job.importance(source).map_err(Error::Search)?;
        let counts = job.counts(&importance)?;
        let found = job.prune(&counts, source).map_err(Error::Search)?;
        let mut layers = job.layers(&found);
        job.factorise(&mut layers, &importance)?;
        Plan::assemble(profile, self.name(), job.options, request.source.cloned(), layers, Vec::new())
    }
}

/// How far the routed experts are to shrink in stage 2.
#[derive(Clone, Copy)]
enum Target {
    /// Not at all.
    Dense,
    /// To this average rank.
    Rank(usize),
    /// To this share of all their parameters.
    Share(f64),
    /// Until the checkpoint is not larger than this.
    Bytes(u64),
}

/// How many experts stage 1 removes.
#[derive(Clone, Copy)]
enum Prune {
    None,
    /// Of all.
    Total(usize),
    /// In every layer alike, as the budget says.
    Uniform(Budget),
    /// The fewest with which the checkpoint is not larger than this.
    Bytes(u64),
}

struct Job<'a> {
    profile: &'a Profile,
    options: Options,
    rooms: Vec<usize>,
    prune: Prune,
    target: Target,
}

/// The experts that a layer loses and what that costs.
#[derive(Clone, Default)]
struct Pruned {
    dropped: Vec<usize>,
    loss: Option<f64>,
}

impl<'a> Job<'a> {
    /// What the budget and the options come to, before any work.
    fn new(profile: &'a Profile, options: Options, budget: Option<Budget>) -> Result<Self> {
        if let Some(budget) = budget {
            budget.check()?;
        }
        let rooms: Vec<usize> = rooms(profile).iter().map(|layer| Layer::room(layer).most).collect();
        let experts: usize = profile.moe_layers.iter().map(|l| l.experts).sum();
        let stage = |name: &str| options::is(&options, "stage", name);
        let rank = options::integer(&options, "rank").map(|r| usize::try_from(r).unwrap_or(usize::MAX));
        let ratio = options::fraction(&options, "ratio");
        let conflict = |option: &str, value: String, other: &str| Error::Option {
            option: option.into(),
            value,
            expected: format!("cannot be combined with {other}; leave one of them out"),
        };
        if let Some(ratio) = ratio.filter(|_| stage("low_rank")) {
            return Err(conflict("ratio", ratio.to_string(), "stage=low_rank"));
        }
        if let Some(rank) = rank {
            if stage("prune") {
                return Err(conflict("rank", rank.to_string(), "stage=prune"));
            }
            if let Some(budget) = budget {
                return Err(conflict("rank", rank.to_string(), &budget.to_string()));
            }
        }
        if let (Some(ratio), Some(budget), true) = (ratio, budget, stage("prune")) {
            return Err(conflict("ratio", ratio.to_string(), &budget.to_string()));
        }
        let uniform = options::is(&options, "allocate", "uniform");
        if let Some(Budget::Experts(_)) = budget
            && !(stage("prune") && uniform)
        {
            let message = "keeps the same number in every layer, which moe-i2 does with stage=prune and \
                           allocate=uniform alone; use --remove or --bytes";
            return Err(Error::Budget(format!(
                "{}: {message}",
                budget.map_or_else(String::new, |b| b.to_string())
            )));
        }
        let total = |ratio: f64| {
            if uniform {
                Prune::Uniform(Budget::Remove(ratio))
            } else {
                Prune::Total((ratio * experts as f64).round_ties_even() as usize)
            }
        };
        let no_budget = |needed: &str| {
            Error::Budget(format!("moe-i2: no budget; give --remove or --bytes, or the option {needed}"))
        };
        let (prune, target) = match (budget, stage("prune"), stage("low_rank")) {
            (None, true, _) => (total(ratio.ok_or_else(|| no_budget("ratio"))?), Target::Dense),
            (Some(budget), true, _) if uniform => (Prune::Uniform(budget), Target::Dense),
            (Some(Budget::Remove(fraction)), true, _) => (total(fraction), Target::Dense),
            (Some(Budget::Bytes(size)), true, _) => (Prune::Bytes(size), Target::Dense),
            (None, _, true) => (Prune::None, Target::Rank(rank.ok_or_else(|| no_budget("rank"))?)),
            (None, ..) => {
                (total(ratio.unwrap_or(RATIO)), Target::Rank(rank.ok_or_else(|| no_budget("rank"))?))
            }
            (Some(Budget::Remove(fraction)), _, true) => (Prune::None, Target::Share(1.0 - fraction)),
            (Some(Budget::Bytes(size)), _, true) => (Prune::None, Target::Bytes(size)),
            (Some(Budget::Remove(fraction)), ..) => {
                (total(ratio.unwrap_or(RATIO.min(fraction))), Target::Share(1.0 - fraction))
            }
            (Some(Budget::Bytes(size)), ..) => (total(ratio.unwrap_or(RATIO)), Target::Bytes(size)),
            // Refused above.
            (Some(Budget::Experts(_)), ..) => (Prune::None, Target::Dense),
        };
        if !matches!(target, Target::Dense) {
            check_dense("moe-i2", profile)?;
        }
        if let Target::Rank(rank) = target {
            for layer in &profile.moe_layers {
                let (l, most) = (layer.layer, profile.hidden_size.min(layer.width));
                if rank > most {
                    let expected = format!("expected at most {most} for the matrices of layer {l}");
                    return Err(Error::Option { option: "rank".into(), value: rank.to_string(), expected });
                }
            }
        }
        let job = Job { profile, options, rooms, prune, target };
        if let Prune::Total(total) = job.prune {
            job.check_total(total, experts)?;
        }
        Ok(job)
    }

    fn check_total(&self, total: usize, experts: usize) -> Result<()> {
        let most: usize = self.rooms.iter().sum();
        if total == 0 {
            let smallest = 1.0 / experts as f64;
            let message = format!(
                "moe-i2: would prune none of {experts} experts; the smallest possible is {smallest:.4}"
            );
            return Err(Error::Budget(message));
        }
        if total > most {
            let largest = budget::round_down(most as f64 / experts as f64);
            return Err(Error::Budget(format!(
                "moe-i2: would prune {total} of {experts} experts, of which at most {most} can go; the largest possible \
                 is {largest}"
            )));
        }
        Ok(())
    }

    /// Loss of every layer without each of its experts; for a layer that must keep all of them, nothing is known.
    fn importance(&self, source: &dyn LossSource) -> Result<Vec<Vec<f64>>, String> {
        let rule = loss_rule(&self.options);
        source.begin(&self.pass("plan: importance"))?;
        let mut importance = Vec::with_capacity(self.rooms.len());
        for (layer, room) in self.profile.moe_layers.iter().zip(&self.rooms) {
            source.enter(layer.layer)?;
            let values = if *room == 0 {
                vec![0.0; layer.experts]
            } else {
                let alone: Vec<Vec<usize>> = (0..layer.experts).map(|e| vec![e]).collect();
                source.losses(&alone)?.into_iter().map(|loss| loss.get(rule)).collect()
            };
            source.leave(&[], &format!("importance {:.4}", values.iter().sum::<f64>()))?;
            source.commit()?;
            importance.push(values);
        }
        Ok(importance)
    }

    fn pass<'t>(&self, task: &'t str) -> Pass<'t> {
        Pass { task, batch: number(&self.options, "batch"), progressive: false, exact: false }
    }

    /// How many experts each layer loses.
    fn counts(&self, importance: &[Vec<f64>]) -> Result<Vec<usize>> {
        let layers = &self.profile.moe_layers;
        match self.prune {
            Prune::None => Ok(vec![0; layers.len()]),
            Prune::Total(total) => Ok(self.by_importance(total, importance)),
            Prune::Uniform(budget) => {
                let rooms = rooms(self.profile);
                let rooms = rooms.iter().map(Layer::room).collect::<Vec<_>>();
                budget::drops_per_layer(budget, &Costs::new(self.profile, FactorDtype::Auto), &rooms)
            }
            Prune::Bytes(size) => {
                let costs = Costs::new(self.profile, FactorDtype::Auto);
                budget::refuse_enough(size, &costs)?;
                let on_disk = |counts: &[usize]| {
                    let (mut bytes, mut tensors) = (self.profile.bytes, self.profile.tensors);
                    for (layer, count) in layers.iter().zip(counts) {
                        let freed = costs.dropped(layer) * *count as u64;
                        bytes -= freed.bytes;
                        tensors -= freed.tensors;
                    }
                    costs.on_disk(bytes, tensors)
                };
                let most: usize = self.rooms.iter().sum();
                let mut smallest = costs.now();
                for total in 1..=most {
                    let counts = self.by_importance(total, importance);
                    smallest = on_disk(&counts);
                    if smallest <= size {
                        return Ok(counts);
                    }
                }
                Err(budget::too_small(size, smallest))
            }
        }
    }

    /// `total` experts by the inverse importance of the layers that can lose any.
    fn by_importance(&self, total: usize, importance: &[Vec<f64>]) -> Vec<usize> {
        let open: Vec<usize> = (0..self.rooms.len()).filter(|&i| self.rooms[i] > 0).collect();
        let sums: Vec<f64> = open.iter().map(|&i| importance[i].iter().sum()).collect();
        let caps: Vec<usize> = open.iter().map(|&i| self.rooms[i]).collect();
        let mut counts = vec![0; self.rooms.len()];
        for (i, count) in open.into_iter().zip(inverse_importance(&sums, total, &caps)) {
            counts[i] = count;
        }
        counts
    }

    /// Searches every layer, and compares the best of each in blocks.
    fn prune(&self, counts: &[usize], source: &dyn LossSource) -> Result<Vec<Pruned>, String> {
        if counts.iter().all(|n| *n == 0) {
            return Ok(vec![Pruned::default(); counts.len()]);
        }
        let (rule, keep) = (loss_rule(&self.options), number(&self.options, "candidates"));
        let size = number(&self.options, "block");
        let best = if size > 1 { keep } else { 1 };
        let layers: Vec<_> = self.profile.moe_layers.iter().zip(counts).collect();
        let mut pruned = Vec::with_capacity(layers.len());
        source.begin(&self.pass("plan: moe-i2"))?;
        for block in layers.chunks(size) {
            let mut found = Vec::with_capacity(block.len());
            if best > 1 {
                source.mark()?;
            }
            for (layer, count) in block {
                source.enter(layer.layer)?;
                let sets = if **count == 0 {
                    Vec::new()
                } else {
                    self.search(&Subsets::new(layer, **count), source, best)?
                };
                let losses: Vec<f64> = sets.iter().map(|f| f.loss.get(rule)).collect();
                let mut sets: Vec<Pruned> = sets
                    .into_iter()
                    .map(|f| Pruned { loss: Some(f.loss.get(rule)), dropped: f.dropped })
                    .collect();
                if **count == 0 {
                    sets.push(Pruned::default());
                }
                let Some(first) = sets.first() else {
                    return Err(format!("layer {}: no {count} experts can go", layer.layer));
                };
                let loss = losses.first().map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
                let kept = layer.experts - **count;
                source
                    .leave(&first.dropped.clone(), &format!("{kept} of {} experts{loss}", layer.experts))?;
                found.push(sets);
            }
            pruned.extend(self.choose(&found, source)?);
            source.commit()?;
        }
        Ok(pruned)
    }

    /// The best sets of one layer.
    fn search(
        &self,
        subsets: &Subsets<'_>,
        source: &dyn LossSource,
        best: usize,
    ) -> Result<Vec<crate::plan::Found>, String> {
        let rule = loss_rule(&self.options);
        if subsets.number() <= number(&self.options, "enumerate") as u64 {
            return subsets.enumerate(source, rule, best);
        }
        let genetic = Genetic {
            population: number(&self.options, "population"),
            generations: number(&self.options, "generations"),
            mutation: options::fraction(&self.options, "mutation").unwrap_or(0.0),
            seed: options::integer(&self.options, "seed").unwrap_or(0),
        };
        genetic.search(subsets, source, rule, best)
    }

    /// Of the candidates of a block's layers the product that moves the residual stream behind the block least.
    fn choose(&self, found: &[Vec<Pruned>], source: &dyn LossSource) -> Result<Vec<Pruned>, String> {
        let mut index = 0;
        if found.len() > 1 && found.iter().any(|sets| sets.len() > 1) {
            let sets = |sets: &Vec<Pruned>| sets.iter().map(|s| s.dropped.clone()).collect::<Vec<_>>();
            let losses = source.block_losses(&found.iter().map(sets).collect::<Vec<_>>())?;
            let rule = loss_rule(&self.options);
            for (i, loss) in losses.iter().enumerate() {
                if loss.get(rule) < losses[index].get(rule) {
                    index = i;
                }
            }
        }
        // The last layer is the fastest digit.
        let mut chosen = Vec::with_capacity(found.len());
        for sets in found.iter().rev() {
            chosen.push(sets[index % sets.len()].clone());
            index /= sets.len();
        }
        chosen.reverse();
        Ok(chosen)
    }

    fn layers(&self, found: &[Pruned]) -> Vec<LayerPlan> {
        let pairs = self.profile.moe_layers.iter().zip(found);
        pairs.map(|(layer, pruned)| layer_plan(layer, &pruned.dropped, pruned.loss, None)).collect()
    }

    /// Gives ranks to the experts that stay.
    fn factorise(&self, layers: &mut [LayerPlan], importance: &[Vec<f64>]) -> Result<()> {
        let profile = self.profile;
        let dtype = FactorDtype::NAMES.into_iter().find(|n| options::is(&self.options, "factor_dtype", n));
        let costs = Costs::new(profile, dtype.and_then(FactorDtype::from_name).unwrap_or_default());
        let pruned = Expected::of(&costs, layers);
        let shapes: Vec<Shape<'_>> = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).collect();
        let share_of = |share: f64| {
            // What rounding in the product can cost stays far below the distance of two ranks.
            shapes.iter().map(|shape| (share * shape.break_even() + 1e-9) as usize).collect::<Vec<_>>()
        };
        let averages = match self.target {
            Target::Dense => return Ok(()),
            Target::Rank(rank) => vec![rank; shapes.len()],
            Target::Share(share) => {
                let share = share * profile.routed_parameters() as f64 / pruned.routed_parameters as f64;
                if share >= 1.0 - 1e-9 {
                    return Ok(());
                }
                let averages = share_of(share);
                if let Some(shape) =
                    shapes.iter().zip(&averages).find(|(_, rank)| **rank == 0).map(|(s, _)| s)
                {
                    let (l, kept) = (shape.layer().layer, pruned.routed_parameters as f64);
                    let least = shapes.iter().map(|s| 1.0 / s.break_even()).fold(0.0, f64::max);
                    let largest = 1.0 - least * kept / profile.routed_parameters() as f64;
                    return Err(Error::Budget(format!(
                        "moe-i2: the budget leaves no rank to the matrices of layer {l}; the largest --remove possible \
                         is {}",
                        budget::round_down(largest)
                    )));
                }
                averages
            }
            Target::Bytes(size) => {
                budget::refuse_enough(size, &costs)?;
                let on_disk = |averages: &[usize]| {
                    let mut layers = layers.to_vec();
                    self.set_ranks(&mut layers, importance, averages);
                    costs.size_of(&layers)
                };
                if costs.size_of(layers) <= size {
                    return Ok(());
                }
                let steps = shapes.iter().map(Shape::largest).max().unwrap_or(0).max(1);
                let averages = |step: usize| {
                    share_of(step as f64 / steps as f64).into_iter().map(|r| r.max(1)).collect()
                };
                let all: Vec<Vec<usize>> = (1..=steps).map(averages).collect();
                match all.partition_point(|averages| on_disk(averages) <= size) {
                    0 => return Err(budget::too_small(size, on_disk(&vec![1; shapes.len()]))),
                    n => all[n - 1].clone(),
                }
            }
        };
        self.set_ranks(layers, importance, &averages);
        Ok(())
    }

    /// Sets the ranks of the experts that stay, with these average ranks.
    fn set_ranks(&self, layers: &mut [LayerPlan], importance: &[Vec<f64>], averages: &[usize]) {
        let fraction = |name: &str| options::fraction(&self.options, name).unwrap_or(0.0);
        let rule = RankRule { alpha: fraction("alpha"), epsilon: fraction("epsilon") };
        for (i, (plan, average)) in layers.iter_mut().zip(averages).enumerate() {
            let layer = &self.profile.moe_layers[i];
            let shape = Shape::new(self.profile, layer);
            let kept: Vec<usize> =
                plan.experts.iter().filter(|e| e.action == Action::Keep).map(|e| e.expert).collect();
            let values: Vec<f64> = kept.iter().map(|&e| importance[i][e]).collect();
            let most = self.profile.hidden_size.min(layer.width);
            for (&expert, rank) in kept.iter().zip(ranks_by_importance(&values, *average, most, rule)) {
                let rank: Ranks = shape.ranks(rank);
                if !rank.is_dense() {
                    plan.experts[expert].action = Action::low_rank(rank);
                }
            }
        }
    }
}
