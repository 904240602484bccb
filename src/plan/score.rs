//! Saliency scores: one number per expert, the larger the more worth keeping.

use rand_chacha::rand_core::Rng;

use super::Result;
use super::error::Place;
use crate::architecture::MoeProfile;
use crate::backend::{Moment, Moments};
use crate::random::generator;

/// How a score comes from the moments of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// No moments: pseudorandom numbers.
    Random,
    /// The moment itself.
    Sum(Moment),
    /// The moment divided by the number of tokens routed to the expert.
    Mean(Moment),
    /// The moment times the spread of the expert's outputs f: the root of the sum over coordinates of their population
    /// variance over the routed tokens (MoNE, arXiv 2507.00390).
    Spread(Moment),
}

/// Scores of the experts of `layer`; 0 for an expert that saw no token.
pub(super) fn scores(
    rule: Rule,
    layer: &MoeProfile,
    moments: Option<&Moments>,
    seed: u64,
) -> Result<Vec<f64>> {
    let moment = match rule {
        Rule::Random => return Ok(random(layer, seed)),
        Rule::Sum(moment) | Rule::Mean(moment) | Rule::Spread(moment) => moment,
    };
    let Some(moments) = moments else {
        return Err(Place::top().statistics("this method needs them; give those that calibrate wrote"));
    };
    let count = counts(layer, moments)?;
    let sums = finite(layer, moments, moment)?;
    let factors = match rule {
        Rule::Spread(_) => spreads(layer, moments, count)?,
        _ => vec![1.0; count.len()],
    };
    let score = |e: usize| match rule {
        _ if count[e] <= 0.0 => 0.0,
        Rule::Mean(_) => sums[e] / count[e],
        _ => sums[e] * factors[e],
    };
    // Adding 0 turns -0 into 0, so that the two tie.
    let scores = (0..count.len()).map(|e| score(e) + 0.0).collect::<Vec<_>>();
    match scores.iter().position(|s| !s.is_finite()) {
        Some(e) => {
            let place = Place::layer(layer.layer).expert(e).field(moment.name());
            Err(place.statistics(format!("{} over {} tokens is no finite score", sums[e], count[e])))
        }
        None => Ok(scores),
    }
}

/// Root of the summed variances of every expert's outputs; 0 where there were none.
fn spreads(layer: &MoeProfile, moments: &Moments, count: &[f64]) -> Result<Vec<f64>> {
    let sums = finite(layer, moments, Moment::OutputSum)?;
    let squares = finite(layer, moments, Moment::OutputSqSum)?;
    let d = sums.len() / count.len();
    let spread = |(e, &n): (usize, &f64)| {
        if n <= 0.0 {
            return 0.0;
        }
        let pairs = sums[e * d..(e + 1) * d].iter().zip(&squares[e * d..(e + 1) * d]);
        // Rounding may leave a variance of 0 slightly negative.
        pairs.map(|(sum, square)| (square / n - (sum / n).powi(2)).max(0.0)).sum::<f64>().sqrt()
    };
    Ok(count.iter().enumerate().map(spread).collect())
}

/// Tokens per expert of a layer, at least one of which is not zero.
pub(super) fn counts<'a>(layer: &MoeProfile, moments: &'a Moments) -> Result<&'a [f64]> {
    let count = finite(layer, moments, Moment::Count)?;
    if count.iter().all(|n| *n <= 0.0) {
        let problem = "no token was routed to any expert; calibrate again, with more tokens";
        return Err(Place::layer(layer.layer).statistics(problem));
    }
    Ok(count)
}

/// A moment with one finite number, or one vector of them, per expert.
pub(super) fn finite<'a>(layer: &MoeProfile, moments: &'a Moments, moment: Moment) -> Result<&'a [f64]> {
    let place = || Place::layer(layer.layer);
    let Some(values) = moments.get(moment) else {
        return Err(place().field(moment.name()).statistics("not measured; calibrate again"));
    };
    let dims = moments.dims();
    let each = moment.shape(dims).iter().skip(1).product::<usize>();
    if values.len() != layer.experts * each {
        let experts = values.len() / each.max(1);
        let problem = format!("measured for {experts} experts, the checkpoint has {}", layer.experts);
        return Err(place().field(moment.name()).statistics(problem));
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => {
            let place = place().expert(i / each).field(moment.name());
            Err(place.statistics(format!("found {}, expected a finite number; calibrate again", values[i])))
        }
        None => Ok(values),
    }
}

/// Uniform numbers in [0, 1): the upper 53 bits of the 64-bit outputs of [`generator`], on the stream numbered like the
/// decoder layer.
fn random(layer: &MoeProfile, seed: u64) -> Vec<f64> {
    let mut generator = generator(seed, layer.layer as u64);
    (0..layer.experts).map(|_| (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64).collect()
}

/// Positions by descending score, ties to the lower one.
pub(super) fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order
}

/// The reverse of [`descending`]: the first of this order go first.
pub(super) fn worst_first(scores: &[f64]) -> Vec<usize> {
    let mut order = descending(scores);
    order.reverse();
    order
}

/// The `count` largest of `scores`, ascending by position; ties to the lower one.
pub fn largest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order = descending(scores);
    order.truncate(count);
    order.sort_unstable();
    order
}
