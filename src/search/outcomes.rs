//! What a token can come to when experts are dropped.
//!
//! Where a router takes the first live experts of an order that no mask changes, a token that loses up to n of its experts
//! can choose only among its first k + n, and what it then chooses follows from which of these are dropped. There are far
//! fewer such outcomes than sets of dropped experts: 495 of 12 870 where 8 of 16 experts go and 4 are chosen. So what an
//! outcome costs is computed once per token, and a set only looks up which one it leads to.

use super::rule::Mask;

/// Most positions of the order that a table may look at, and most outcomes of a token.
const POSITIONS: usize = 16;
const OUTCOMES: usize = 4096;

/// The outcomes of a token, whatever its order is.
pub(super) struct Outcomes {
    /// Positions that are looked at: experts that are chosen and experts that are dropped.
    positions: usize,
    /// The outcome for every set of positions that are dropped; 0: what is chosen where none is.
    of: Vec<u16>,
    /// Positions that are chosen, by outcome.
    chosen: Vec<Vec<u8>>,
}

impl Outcomes {
    /// For sets of at most `dropped` of `live` experts and a router that chooses `top_k`; `None` where there are too many
    /// outcomes, or too few experts.
    pub(super) fn new(top_k: usize, dropped: usize, live: usize) -> Option<Self> {
        let positions = top_k + dropped;
        if positions > POSITIONS.min(live) {
            return None;
        }
        let mut outcomes = Outcomes { positions, of: vec![u16::MAX; 1 << positions], chosen: Vec::new() };
        let mut known = std::collections::BTreeMap::new();
        for set in 0..1usize << positions {
            if set.count_ones() as usize > dropped {
                continue;
            }
            let kept = (0..positions as u8).filter(|p| set >> p & 1 == 0);
            let chosen: Vec<u8> = kept.take(top_k).collect();
            let next = known.len();
            let id = *known.entry(chosen).or_insert(next);
            if id == OUTCOMES {
                return None;
            }
            outcomes.of[set] = id as u16;
        }
        let mut chosen: Vec<(Vec<u8>, usize)> = known.into_iter().collect();
        chosen.sort_by_key(|(_, id)| *id);
        outcomes.chosen = chosen.into_iter().map(|(positions, _)| positions).collect();
        Some(outcomes)
    }

    /// Their number.
    pub(super) fn len(&self) -> usize {
        self.chosen.len()
    }

    /// The experts of an outcome, given the order of a token's experts.
    pub(super) fn experts<'a>(&'a self, outcome: usize, order: &'a [u16]) -> impl Iterator<Item = u16> + 'a {
        self.chosen[outcome].iter().map(|&position| order[usize::from(position)])
    }
}

/// Sets of experts as bytes of bits, and what each byte comes to for one token.
pub(super) struct Sets {
    /// Bytes per set.
    bytes: usize,
    /// `[sets, bytes]`.
    bits: Vec<u8>,
}

impl Sets {
    /// The sets that `masks` drop.
    pub(super) fn new(masks: &[Mask], experts: usize) -> Self {
        let bytes = experts.div_ceil(8);
        let mut bits = vec![0; masks.len() * bytes];
        for (mask, bits) in masks.iter().zip(bits.chunks_exact_mut(bytes.max(1))) {
            mask.dropped.iter().for_each(|e| bits[e / 8] |= 1 << (e % 8));
        }
        Sets { bytes, bits }
    }
}

/// What the sets come to for one token.
#[derive(Default)]
pub(super) struct Lookup {
    /// Positions of the order that a byte drops, `[bytes, 256]`.
    positions: Vec<u16>,
    /// Sum of the scores that it drops, `[bytes, 256]`; empty where weights do not depend on it.
    scores: Vec<f64>,
}

impl Lookup {
    /// For a token with this order, and with these scores where they matter.
    pub(super) fn fill(&mut self, sets: &Sets, outcomes: &Outcomes, order: &[u16], scores: Option<&[f64]>) {
        let mut place = vec![0u16; 8 * sets.bytes];
        for (position, &expert) in order[..outcomes.positions].iter().enumerate() {
            place[usize::from(expert)] = 1 << position;
        }
        self.positions.clear();
        self.scores.clear();
        for byte in 0..sets.bytes {
            let start = self.positions.len();
            self.positions.push(0);
            for set in 1..256usize {
                let (rest, last) = (set & (set - 1), set.trailing_zeros() as usize);
                self.positions.push(self.positions[start + rest] | place[8 * byte + last]);
            }
            let Some(scores) = scores else { continue };
            self.scores.push(0.0);
            for set in 1..256usize {
                let (rest, last) = (set & (set - 1), set.trailing_zeros() as usize);
                let score = scores.get(8 * byte + last).copied().unwrap_or(0.0);
                self.scores.push(self.scores[start + rest] + score);
            }
        }
    }

    /// For every set from the `first`-th on its outcome and the sum of the scores that it drops.
    pub(super) fn each<'a>(
        &'a self,
        sets: &'a Sets,
        outcomes: &'a Outcomes,
        first: usize,
    ) -> impl Iterator<Item = (usize, f64)> + 'a {
        sets.bits[first * sets.bytes..].chunks_exact(sets.bytes).map(move |bits| {
            let (mut positions, mut dropped) = (0, 0.0);
            for (byte, &set) in bits.iter().enumerate() {
                positions |= self.positions[256 * byte + usize::from(set)];
                if !self.scores.is_empty() {
                    dropped += self.scores[256 * byte + usize::from(set)];
                }
            }
            (usize::from(outcomes.of[usize::from(positions)]), dropped)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_the_first_that_are_left() {
        let outcomes = Outcomes::new(2, 2, 8).unwrap_or_else(|| unreachable!("six outcomes"));
        assert_eq!((outcomes.len(), outcomes.positions), (6, 4));
        let order = [5, 3, 7, 1, 0, 2, 4, 6];
        for (set, expected) in [(0, [5, 3]), (1, [3, 7]), (0b11, [7, 1]), (0b100, [5, 3]), (0b110, [5, 1])] {
            let outcome = usize::from(outcomes.of[set]);
            assert_eq!(outcomes.experts(outcome, &order).collect::<Vec<_>>(), expected);
        }
        assert_eq!(outcomes.of[0b1000], 0);
        assert!(Outcomes::new(4, 8, 16).is_some_and(|o| o.len() == 495));
        assert!(Outcomes::new(2, 7, 8).is_none(), "too few are left to choose from");
        assert!(Outcomes::new(4, 13, 60).is_none(), "more positions than a table has");
    }
}
