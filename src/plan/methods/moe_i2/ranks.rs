//! Stage 2: the ranks of the experts that stay.

use super::job::{Job, Target};
use crate::plan::budget;
use crate::plan::costs::Costs;
use crate::plan::methods::low_rank::Shape;
use crate::plan::options;
use crate::plan::{Action, Error, Expected, LayerPlan, RankRule, Ranks, Result, ranks_by_importance};

impl Job<'_> {
    /// Gives ranks to the experts that stay.
    pub(super) fn factorise(&self, layers: &mut [LayerPlan], importance: &[Vec<f64>]) -> Result<()> {
        let profile = self.profile;
        let costs = Costs::of_options(profile, &self.options);
        let pruned = Expected::of(&costs, layers);
        let shapes: Vec<Shape<'_>> = profile.moe_layers.iter().map(|l| Shape::new(profile, l)).collect();
        let share_of = |share: f64| {
            // What rounding in the product can cost stays far below the distance of two ranks.
            shapes.iter().map(|shape| (share * shape.break_even() + 1e-9) as usize).collect::<Vec<_>>()
        };
        let averages = match self.target {
            Target::Dense => return Ok(()),
            Target::Rank(rank) => vec![rank; shapes.len()],
            Target::Share(of_all) => {
                let share = of_all * profile.routed_parameters() as f64 / pruned.routed_parameters as f64;
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
                let most = of_all * profile.routed_parameters() as f64;
                self.enlarged(layers, importance, averages, |layers| {
                    Expected::of(&costs, layers).routed_parameters as f64 <= most
                })
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

    /// These average ranks, or where some experts stay dense, which cannot use theirs, the largest that fit.
    fn enlarged(
        &self,
        layers: &[LayerPlan],
        importance: &[Vec<f64>],
        mut averages: Vec<usize>,
        fits: impl Fn(&[LayerPlan]) -> bool,
    ) -> Vec<usize> {
        let with = |averages: &[usize]| {
            let mut layers = layers.to_vec();
            self.set_ranks(&mut layers, importance, averages);
            layers
        };
        let stays = |layers: &[LayerPlan]| {
            layers.iter().flat_map(|l| &l.experts).filter(|e| e.action == Action::Keep).count()
        };
        loop {
            let now = with(&averages);
            let larger: Vec<usize> = averages.iter().map(|rank| rank + 1).collect();
            if !(1..=stays(layers)).contains(&stays(&now)) || !fits(&with(&larger)) {
                return averages;
            }
            averages = larger;
        }
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
            let most = self.profile.expert_io(layer).min(layer.width);
            for (&expert, rank) in kept.iter().zip(ranks_by_importance(&values, *average, most, rule)) {
                let rank: Ranks = shape.ranks(rank);
                if !rank.is_dense() {
                    plan.experts[expert].action = Action::low_rank(rank);
                }
            }
        }
    }
}
