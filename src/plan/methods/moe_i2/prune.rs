//! Stage 1: which experts every layer loses.

use super::job::{Job, Prune, RATIO};
use crate::plan::budget::{self, Budget};
use crate::plan::costs::{Costs, FactorDtype};
use crate::plan::methods::naee::{layer_plan, loss_rule, number, rooms};
use crate::plan::options;
use crate::plan::select::Layer;
use crate::plan::{Found, Genetic, LayerPlan, LossSource, Pass, Result, Subsets, inverse_importance};

/// The experts that a layer loses and what that costs.
#[derive(Clone, Default)]
pub(super) struct Pruned {
    pub(super) dropped: Vec<usize>,
    pub(super) loss: Option<f64>,
}

impl Job<'_> {
    /// Loss of every layer without each of its experts; for a layer that must keep all of them, nothing is known.
    pub(super) fn importance(&self, source: &dyn LossSource) -> Result<Vec<Vec<f64>>, String> {
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
    pub(super) fn counts(&self, importance: &[Vec<f64>]) -> Result<Vec<usize>> {
        let layers = &self.profile.moe_layers;
        match self.prune {
            Prune::None => Ok(vec![0; layers.len()]),
            Prune::Total(total) => Ok(self.by_importance(total, importance)),
            Prune::Uniform(budget) => self.evenly(budget),
            Prune::Bytes(size) => {
                let most = self.rooms.iter().sum();
                match self.fewest(size, most, importance)? {
                    (counts, left) if left <= size => Ok(counts),
                    (_, smallest) => Err(budget::too_small(size, smallest)),
                }
            }
            Prune::Until(size) if options::is(&self.options, "allocate", "uniform") => {
                let quarter = self.evenly(Budget::Remove(RATIO))?;
                let enough = self.evenly(Budget::Bytes(size));
                let total = |counts: &[usize]| counts.iter().sum::<usize>();
                Ok(enough.ok().filter(|counts| total(counts) < total(&quarter)).unwrap_or(quarter))
            }
            Prune::Until(size) => {
                let experts: usize = layers.iter().map(|l| l.experts).sum();
                let most = ((RATIO * experts as f64).round_ties_even() as usize).min(self.rooms.iter().sum());
                Ok(self.fewest(size, most, importance)?.0)
            }
        }
    }

    /// How many experts each layer loses where all lose the same share.
    fn evenly(&self, budget: Budget) -> Result<Vec<usize>> {
        let rooms = rooms(self.profile);
        let rooms = rooms.iter().map(Layer::room).collect::<Vec<_>>();
        budget::drops_per_layer(budget, &Costs::new(self.profile, FactorDtype::Auto), &rooms)
    }

    /// The fewest experts, at most `most`, without which the checkpoint is not larger than `size`, and its size then;
    /// where that is not enough, all of these.
    fn fewest(&self, size: u64, most: usize, importance: &[Vec<f64>]) -> Result<(Vec<usize>, u64)> {
        let costs = Costs::new(self.profile, FactorDtype::Auto);
        budget::refuse_enough(size, &costs)?;
        let mut counts = vec![0; self.rooms.len()];
        let mut left = costs.now();
        for total in 1..=most {
            counts = self.by_importance(total, importance);
            let (mut bytes, mut tensors) = (self.profile.bytes, self.profile.tensors);
            for (layer, count) in self.profile.moe_layers.iter().zip(&counts) {
                let freed = costs.dropped(layer) * *count as u64;
                bytes -= freed.bytes;
                tensors -= freed.tensors;
            }
            left = costs.on_disk(bytes, tensors);
            if left <= size {
                break;
            }
        }
        Ok((counts, left))
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
    pub(super) fn prune(&self, counts: &[usize], source: &dyn LossSource) -> Result<Vec<Pruned>, String> {
        if counts.iter().all(|n| *n == 0) {
            return Ok(vec![Pruned::default(); counts.len()]);
        }
        let (rule, keep) = (loss_rule(&self.options), number(&self.options, "candidates"));
        let size = number(&self.options, "block");
        let best = if size > 1 { keep } else { 1 };
        let layers = self.profile.moe_layers.iter().zip(counts);
        let mut pruned = Vec::with_capacity(counts.len());
        source.begin(&self.pass("plan: moe-i2"))?;
        let mut blocks: Vec<Vec<_>> = Vec::new();
        for entry in layers {
            match blocks.last_mut() {
                Some(block) if block.len() < size && !source.begins_stack(entry.0.layer) => block.push(entry),
                _ => blocks.push(vec![entry]),
            }
        }
        for block in blocks {
            let mut found = Vec::with_capacity(block.len());
            if best > 1 {
                source.mark()?;
            }
            for (layer, count) in &block {
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
    ) -> Result<Vec<Found>, String> {
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

    pub(super) fn layers(&self, found: &[Pruned]) -> Vec<LayerPlan> {
        let pairs = self.profile.moe_layers.iter().zip(found);
        pairs.map(|(layer, pruned)| layer_plan(layer, &pruned.dropped, pruned.loss, None)).collect()
    }
}
