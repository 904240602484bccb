//! The genetic search of MoE-I² (arXiv 2411.01016).

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use super::subsets::keep_best;
use super::{Found, Loss, LossRule, LossSource, Subsets};
use crate::random::generator;

/// A genetic search for the subset of least loss. Individuals are sets of dropped experts. Of every generation the best
/// fifth, at least two, live on and are the parents; a child takes its experts at random from the union of two
/// parents, and one of them is exchanged for a kept expert (with the probability `mutation`, and always where the
/// child is a set that was tried before). No set is evaluated twice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Genetic {
    /// Individuals of a generation.
    pub population: usize,
    /// Generations after the first.
    pub generations: usize,
    /// Probability of a mutation.
    pub mutation: f64,
    /// Seed; every layer has a sequence of its own.
    pub seed: u64,
}

/// Mutations in a row after which a child may be a set that was tried before.
const ATTEMPTS: usize = 16;

impl Genetic {
    /// The `best` sets of least loss among all that were tried; of equal ones the first in lexicographic order. Where
    /// there are no more sets than individuals, all are tried.
    ///
    /// # Errors
    /// Those of [`LossSource::losses`].
    pub fn search(
        &self,
        subsets: &Subsets<'_>,
        source: &dyn LossSource,
        rule: LossRule,
        best: usize,
    ) -> Result<Vec<Found>, String> {
        if subsets.number() <= self.population as u64 {
            return subsets.enumerate(source, rule, best);
        }
        let mut random = Random::new(self.seed, subsets.layer().layer as u64);
        let mut known = BTreeMap::new();
        let first = first_generation(subsets, self.population, &mut random);
        let mut living = evaluate(source, &mut known, first)?;
        let parents = (self.population / 5).max(2).min(self.population);
        for _ in 0..self.generations {
            keep_best(&mut living, rule, parents);
            let mut children = Vec::with_capacity(self.population - living.len());
            for _ in living.len()..self.population {
                let child = self.child(subsets, &living, &known, &children, &mut random);
                children.push(child);
            }
            living.extend(evaluate(source, &mut known, children)?);
        }
        let mut found = known.into_iter().map(|(dropped, loss)| Found { dropped, loss }).collect();
        keep_best(&mut found, rule, best);
        Ok(found)
    }

    fn child(
        &self,
        subsets: &Subsets<'_>,
        parents: &[Found],
        known: &BTreeMap<Vec<usize>, Loss>,
        siblings: &[Vec<usize>],
        random: &mut Random,
    ) -> Vec<usize> {
        let first = random.below(parents.len());
        let second = match parents.len() {
            1 => first,
            n => (first + 1 + random.below(n - 1)) % n,
        };
        let mut union = [&parents[first].dropped[..], &parents[second].dropped].concat();
        union.sort_unstable();
        union.dedup();
        let mut child = choose(subsets, &union, random);
        if random.unit() < self.mutation {
            swap(subsets, &mut child, random);
        }
        for _ in 0..ATTEMPTS {
            if !known.contains_key(&child) && !siblings.contains(&child) {
                break;
            }
            swap(subsets, &mut child, random);
        }
        child
    }
}

/// So many sets, all different where that comes about within a few attempts each.
fn first_generation(subsets: &Subsets<'_>, population: usize, random: &mut Random) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..subsets.layer().experts).collect();
    let mut sets: Vec<Vec<usize>> = Vec::with_capacity(population);
    for _ in 0..population {
        let mut set = choose(subsets, &all, random);
        for _ in 0..ATTEMPTS {
            if !sets.contains(&set) {
                break;
            }
            set = choose(subsets, &all, random);
        }
        sets.push(set);
    }
    sets
}

/// Looks up or evaluates every set.
fn evaluate(
    source: &dyn LossSource,
    known: &mut BTreeMap<Vec<usize>, Loss>,
    sets: Vec<Vec<usize>>,
) -> Result<Vec<Found>, String> {
    let mut new: Vec<Vec<usize>> = sets.iter().filter(|set| !known.contains_key(*set)).cloned().collect();
    new.sort_unstable();
    new.dedup();
    let losses = source.losses(&new)?;
    known.extend(new.into_iter().zip(losses));
    Ok(sets.into_iter().map(|dropped| Found { loss: known[&dropped], dropped }).collect())
}

/// A random set of experts, those of `preferred` first, that the layer can lose.
fn choose(subsets: &Subsets<'_>, preferred: &[usize], random: &mut Random) -> Vec<usize> {
    let mut order = preferred.to_vec();
    random.shuffle(&mut order);
    let mut others: Vec<usize> = (0..subsets.layer().experts).filter(|e| !preferred.contains(e)).collect();
    random.shuffle(&mut others);
    order.extend(others);
    let mut set = Vec::with_capacity(subsets.count());
    for expert in order {
        if set.len() < subsets.count() {
            set.push(expert);
            if !subsets.allows(&set) {
                set.pop();
            }
        }
    }
    set.sort_unstable();
    set
}

/// Exchanges a random expert of the set for a random one outside, of the same group where the router has groups.
fn swap(subsets: &Subsets<'_>, set: &mut [usize], random: &mut Random) {
    let layer = subsets.layer();
    let size = layer.experts / layer.groups;
    let position = random.below(set.len());
    let group = set[position] / size;
    let outside: Vec<usize> = (group * size..(group + 1) * size).filter(|e| !set.contains(e)).collect();
    if !outside.is_empty() {
        set[position] = outside[random.below(outside.len())];
        set.sort_unstable();
    }
}

/// ChaCha8 keyed with the seed, on the stream of the layer.
struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64, stream: u64) -> Self {
        Random(generator(seed, stream))
    }

    /// A whole number below `n`, which is far below 2⁶⁴, so that the bias is far below anything.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// A number from 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn shuffle(&mut self, values: &mut [usize]) {
        for i in (1..values.len()).rev() {
            let j = self.below(i + 1);
            values.swap(i, j);
        }
    }
}
