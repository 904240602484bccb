//! Saliency scores: one number per expert, the larger the more worth keeping.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Result;
use super::error::Place;
use crate::architecture::MoeProfile;
use crate::backend::{Moment, Moments};

/// How a score comes from the moments of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// No moments: pseudorandom numbers.
    Random,
    /// The moment itself.
    Sum(Moment),
    /// The moment divided by the number of tokens routed to the expert.
    Mean(Moment),
}

/// Scores of the experts of `layer`; 0 for an expert that saw no token.
pub(super) fn scores(
    rule: Rule,
    layer: &MoeProfile,
    moments: Option<&Moments>,
    seed: u64,
) -> Result<Vec<f64>> {
    let (moment, mean) = match rule {
        Rule::Random => return Ok(random(layer, seed)),
        Rule::Sum(moment) => (moment, false),
        Rule::Mean(moment) => (moment, true),
    };
    let Some(moments) = moments else {
        return Err(Place::top().statistics("this method needs them; give those that calibrate wrote"));
    };
    let count = counts(layer, moments)?;
    let sums = finite(layer, moments, moment)?;
    let score = |(&sum, &n): (&f64, &f64)| match (n > 0.0, mean) {
        (false, _) => 0.0,
        (true, false) => sum,
        (true, true) => sum / n,
    };
    // Adding 0 turns -0 into 0, so that the two tie.
    let scores = sums.iter().zip(count).map(|pair| score(pair) + 0.0).collect::<Vec<_>>();
    match scores.iter().position(|s| !s.is_finite()) {
        Some(e) => {
            let place = Place::layer(layer.layer).expert(e).field(moment.name());
            Err(place.statistics(format!("{} over {} tokens is no finite score", sums[e], count[e])))
        }
        None => Ok(scores),
    }
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

/// A moment with one finite number per expert.
pub(super) fn finite<'a>(layer: &MoeProfile, moments: &'a Moments, moment: Moment) -> Result<&'a [f64]> {
    let place = || Place::layer(layer.layer);
    let Some(values) = moments.get(moment) else {
        return Err(place().field(moment.name()).statistics("not measured; calibrate again"));
    };
    if values.len() != layer.experts {
        let problem = format!("measured for {} experts, the checkpoint has {}", values.len(), layer.experts);
        return Err(place().field(moment.name()).statistics(problem));
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(e) => {
            let place = place().expert(e).field(moment.name());
            Err(place.statistics(format!("found {}, expected a finite number; calibrate again", values[e])))
        }
        None => Ok(values),
    }
}

/// Uniform numbers in [0, 1): the upper 53 bits of the 64-bit outputs of ChaCha8 whose key begins with the
/// little-endian seed and is zero from there on, on the stream numbered like the decoder layer.
fn random(layer: &MoeProfile, seed: u64) -> Vec<f64> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_stream(layer.layer as u64);
    (0..layer.experts).map(|_| (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64).collect()
}

/// Experts by descending score, ties to the lower index, read from the end: the first of this order go first.
pub(super) fn worst_first(scores: &[f64]) -> Vec<usize> {
    let mut order = (0..scores.len()).collect::<Vec<_>>();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(b.cmp(a)));
    order
}
