//! What a budget and the options ask of the two stages.

use crate::architecture::Profile;
use crate::plan::budget::{self, Budget};
use crate::plan::methods::low_rank::check_dense;
use crate::plan::methods::naee::rooms;
use crate::plan::options::{self, Options};
use crate::plan::select::Layer;
use crate::plan::{Error, Result};

/// Share of the experts that stage 1 removes where nothing else is said.
pub(super) const RATIO: f64 = 0.25;

/// How far the routed experts are to shrink in stage 2.
#[derive(Clone, Copy)]
pub(super) enum Target {
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
pub(super) enum Prune {
    None,
    /// Of all.
    Total(usize),
    /// In every layer alike, as the budget says.
    Uniform(Budget),
    /// The fewest with which the checkpoint is not larger than this.
    Bytes(u64),
    /// The same, but no more than [`RATIO`] of all: stage 2 does the rest.
    Until(u64),
}

/// One request: what the budget and the options come to.
pub(super) struct Job<'a> {
    pub(super) profile: &'a Profile,
    pub(super) options: Options,
    pub(super) rooms: Vec<usize>,
    pub(super) prune: Prune,
    pub(super) target: Target,
}

impl<'a> Job<'a> {
    /// What the budget and the options come to, before any work.
    pub(super) fn new(profile: &'a Profile, options: Options, budget: Option<Budget>) -> Result<Self> {
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
            Error::Missing(format!("moe-i2: no budget; give --remove or --bytes, or the option {needed}"))
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
                let own = || {
                    // As many whole experts as fit and can go; the rest is left to stage 2.
                    let fits = (fraction * experts as f64 + 1e-9) as usize;
                    let quarter = (RATIO * experts as f64).round_ties_even() as usize;
                    match fits.min(quarter).min(rooms.iter().sum()) {
                        0 => Prune::None,
                        _ if uniform => total(RATIO.min(fraction)),
                        most => Prune::Total(most),
                    }
                };
                (ratio.map_or_else(own, total), Target::Share(1.0 - fraction))
            }
            (Some(Budget::Bytes(size)), ..) => (ratio.map_or(Prune::Until(size), total), Target::Bytes(size)),
            // Refused above.
            (Some(Budget::Experts(_)), ..) => (Prune::None, Target::Dense),
        };
        if !matches!(target, Target::Dense) {
            check_dense("moe-i2", profile)?;
        }
        if let Target::Rank(rank) = target {
            for layer in &profile.moe_layers {
                let (l, most) = (layer.layer, profile.expert_io(layer).min(layer.width));
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
}
