//! Where there are too many subsets to try: greedy descent, then swaps.

use super::subsets::keep_best;
use super::{Found, LossRule, LossSource, Subsets};

/// Drops one expert after the other, each time the one that leaves the least loss; then exchanges a dropped expert for
/// a kept one, each time the pair that lowers the loss most, until no pair does. Ties go to the set that is first in
/// lexicographic order. At most `count` · (experts + rounds · kept) subsets are tried; the result is a local optimum
/// with respect to swaps.
///
/// # Errors
/// Those of [`LossSource::losses`].
pub fn greedy_and_swap(
    subsets: &Subsets<'_>,
    source: &dyn LossSource,
    rule: LossRule,
    rounds: usize,
) -> Result<Found, String> {
    let experts = subsets.layer().experts;
    let mut found = Found { dropped: Vec::new(), loss: super::Loss::default() };
    for _ in 0..subsets.count() {
        let kept = (0..experts).filter(|e| !found.dropped.contains(e));
        let sets = kept.map(|e| with(&found.dropped, e)).filter(|set| subsets.allows(set)).collect();
        found =
            best(source, rule, sets)?.ok_or("no set of experts leaves every token enough to choose from")?;
    }
    for _ in 0..rounds {
        let swaps = found.dropped.iter().flat_map(|&back| {
            let rest: Vec<usize> = found.dropped.iter().copied().filter(|&e| e != back).collect();
            let kept = (0..experts).filter(|e| !found.dropped.contains(e));
            kept.map(move |e| with(&rest, e)).collect::<Vec<_>>()
        });
        let swaps = swaps.filter(|set| subsets.allows(set)).collect();
        match best(source, rule, swaps)? {
            Some(better) if better.loss.get(rule) < found.loss.get(rule) => found = better,
            _ => break,
        }
    }
    Ok(found)
}

/// `set` with one more expert, ascending.
fn with(set: &[usize], expert: usize) -> Vec<usize> {
    let mut set = set.to_vec();
    set.insert(set.partition_point(|e| *e < expert), expert);
    set
}

fn best(source: &dyn LossSource, rule: LossRule, sets: Vec<Vec<usize>>) -> Result<Option<Found>, String> {
    let losses = source.losses(&sets)?;
    let mut found = sets.into_iter().zip(losses).map(|(dropped, loss)| Found { dropped, loss }).collect();
    keep_best(&mut found, rule, 1);
    Ok(found.pop())
}
