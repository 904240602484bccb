//! How much is to go.

use std::cmp::Ordering;
use std::fmt;

use super::costs::Costs;
use super::size::{format_size, parse_size};
use super::{Error, Result};
use crate::architecture::MoeProfile;

/// How small the checkpoint is to become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Remove this fraction of the routed-expert parameters, above 0 and below 1. Where experts are dropped
    /// layer by layer, round(F·E) of the E experts of each layer go, halves to the even number; over all
    /// layers together, round(F·ΣE) of all experts. Where experts differ in size, those with the lowest scores go until
    /// their parameters come nearest to the fraction.
    Remove(f64),
    /// Keep exactly this many experts in every layer.
    Experts(usize),
    /// The largest checkpoint not above this many bytes, safetensors headers included.
    Bytes(u64),
}

impl Budget {
    /// A fraction to remove.
    ///
    /// # Errors
    /// [`Error::Budget`] unless it is above 0 and below 1.
    pub fn remove(fraction: f64) -> Result<Budget> {
        let budget = Budget::Remove(fraction);
        budget.check().map(|()| budget)
    }

    /// A checkpoint size such as `24GiB`, see [`parse_size`].
    ///
    /// # Errors
    /// [`Error::Budget`] where the text is not a size.
    pub fn bytes(size: &str) -> Result<Budget> {
        parse_size(size).map(Budget::Bytes)
    }

    /// Refuses fractions out of range and counts of zero.
    pub(super) fn check(self) -> Result<()> {
        let expected = match self {
            Budget::Remove(fraction) if !(fraction > 0.0 && fraction < 1.0) => {
                "a fraction above 0 and below 1"
            }
            Budget::Experts(0) => "at least 1 expert",
            Budget::Bytes(0) => "at least 1 byte",
            _ => return Ok(()),
        };
        Err(Error::Budget(format!("{self}: expected {expected}")))
    }
}

impl fmt::Display for Budget {
    /// As on the command line: `--remove 0.25`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Remove(fraction) => write!(f, "--remove {fraction}"),
            Budget::Experts(experts) => write!(f, "--experts {experts}"),
            Budget::Bytes(bytes) => write!(f, "--bytes {bytes}"),
        }
    }
}

/// A layer and how many of its experts may be dropped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room<'a> {
    pub(super) layer: &'a MoeProfile,
    pub(super) most: usize,
}

impl Room<'_> {
    /// The error for `n` experts, more than there is room for; `instead` says what would be possible.
    fn exceeded(&self, budget: Budget, n: usize, instead: &str) -> Error {
        let (layer, experts) = (self.layer.layer, self.layer.experts);
        let keep = experts - self.most;
        Error::Budget(format!(
            "{budget}: would drop {n} of the {experts} experts of layer {layer}, which must keep {keep}; {instead}"
        ))
    }
}

/// How many experts of each layer are dropped when every layer loses the same share.
pub(super) fn drops_per_layer(budget: Budget, costs: &Costs<'_>, rooms: &[Room<'_>]) -> Result<Vec<usize>> {
    budget.check()?;
    let drops = match budget {
        Budget::Remove(fraction) => {
            let round = |room: &Room<'_>| (fraction * room.layer.experts as f64).round_ties_even() as usize;
            let share = |room: &Room<'_>| room.most as f64 / room.layer.experts as f64;
            let largest = rooms.iter().map(share).fold(1.0, f64::min);
            let instead = format!("the largest possible is {}", round_down(largest));
            within(budget, rooms, rooms.iter().map(round).collect(), &instead)?
        }
        Budget::Experts(kept) => {
            if let Some(room) = rooms.iter().find(|room| room.layer.experts < kept) {
                let (layer, experts) = (room.layer.layer, room.layer.experts);
                return Err(Error::Budget(format!(
                    "{budget}: layer {layer} has {experts} experts; use fewer"
                )));
            }
            let fewest = rooms.iter().map(|room| room.layer.experts - room.most).max().unwrap_or(0);
            let instead = format!("the smallest possible is {fewest}");
            within(budget, rooms, rooms.iter().map(|room| room.layer.experts - kept).collect(), &instead)?
        }
        Budget::Bytes(size) => return drops_to_size(size, costs, rooms),
    };
    if drops.iter().all(|n| *n == 0) {
        let experts = rooms.iter().map(|room| room.layer.experts).max().unwrap_or(0);
        return Err(Error::Budget(match budget {
            Budget::Experts(_) => {
                format!("{budget}: every layer has {experts} experts, so nothing would be removed")
            }
            _ => nothing_removed(budget, experts),
        }));
    }
    Ok(drops)
}

/// How many experts of each layer are dropped when every layer loses its own share: rounded so that as many go in all as
/// the budget says, the layers with the largest fractions left over first.
pub(super) fn drops_of_fractions(
    budget: Budget,
    rooms: &[Room<'_>],
    fractions: &[f64],
) -> Result<Vec<usize>> {
    let exact: Vec<f64> =
        rooms.iter().zip(fractions).map(|(room, f)| f * room.layer.experts as f64).collect();
    let total = exact.iter().sum::<f64>().round_ties_even() as usize;
    let mut drops: Vec<usize> = exact.iter().map(|n| n.floor().max(0.0) as usize).collect();
    let mut order: Vec<usize> = (0..drops.len()).collect();
    order.sort_by(|a, b| (exact[*b] - exact[*b].floor()).total_cmp(&(exact[*a] - exact[*a].floor())));
    let missing = total.saturating_sub(drops.iter().sum());
    order.iter().take(missing).for_each(|i| drops[*i] += 1);
    if total == 0 {
        let experts = rooms.iter().map(|room| room.layer.experts).sum();
        return Err(Error::Budget(nothing_removed(budget, experts)));
    }
    within(budget, rooms, drops, "use a smaller share, or a smaller owl_lambda")
}

/// How many experts a layer loses whose experts differ in size: as many as come nearest to `fraction` of its parameters,
/// the fewer of two that are equally near. `removed` says how many parameters go with so many experts.
pub(super) fn drops_of_unequal(
    budget: Budget,
    fraction: f64,
    room: &Room<'_>,
    removed: impl Fn(usize) -> Result<u64>,
) -> Result<usize> {
    let all = room.layer.routed().parameters as f64;
    let target = fraction * all;
    let mut before = 0;
    for n in 1..=room.most {
        let after = removed(n)?;
        if after as f64 >= target {
            return Ok(if target - before as f64 <= after as f64 - target { n - 1 } else { n });
        }
        before = after;
    }
    // One more would have been nearer only if it is small.
    if target - before as f64 <= room.layer.expert_parameters as f64 / 2.0 {
        return Ok(room.most);
    }
    let instead = format!("the largest possible is {}", round_down(before as f64 / all));
    Err(room.exceeded(budget, room.most + 1, &instead))
}

/// `drops`, if there is room for them.
fn within(budget: Budget, rooms: &[Room<'_>], drops: Vec<usize>, instead: &str) -> Result<Vec<usize>> {
    match rooms.iter().zip(&drops).find(|(room, n)| room.most < **n) {
        Some((room, n)) => Err(room.exceeded(budget, *n, instead)),
        None => Ok(drops),
    }
}

/// The fewest drops, the same share of every layer, that bring the checkpoint down to `size`. Layers of
/// different sizes take turns: the j-th drop of a layer of E experts is due when the share is (j − ½)/E.
fn drops_to_size(size: u64, costs: &Costs<'_>, rooms: &[Room<'_>]) -> Result<Vec<usize>> {
    refuse_enough(size, costs)?;
    // Twice the shares, as exact fractions.
    let mut turns = Vec::new();
    for (i, room) in rooms.iter().enumerate() {
        turns.extend((1..=room.most).map(|j| (2 * j as u64 - 1, room.layer.experts as u64, i)));
    }
    let share = |a: &(u64, u64, usize), b: &(u64, u64, usize)| -> Ordering {
        (u128::from(a.0) * u128::from(b.1)).cmp(&(u128::from(b.0) * u128::from(a.1)))
    };
    turns.sort_by(share);
    let mut drops = vec![0; rooms.len()];
    let mut meter = Meter::new(costs);
    for due in turns.chunk_by(|a, b| share(a, b) == Ordering::Equal) {
        for (_, _, i) in due {
            drops[*i] += 1;
            meter.drop(rooms[*i].layer);
        }
        if meter.on_disk() <= size {
            return Ok(drops);
        }
    }
    Err(too_small(size, meter.on_disk()))
}

/// The fewest of 1 to `most` steps after which the checkpoint is not above `size`; `after` says how large it is after
/// some, which must not grow with them.
pub(super) fn fewest_steps(size: u64, most: usize, after: impl Fn(usize) -> Result<u64>) -> Result<usize> {
    let (mut low, mut high) = (1, most);
    let smallest = after(most)?;
    if most == 0 || smallest > size {
        return Err(too_small(size, smallest));
    }
    while low < high {
        let middle = low.midpoint(high);
        if after(middle)? <= size {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Ok(low)
}

/// How many of `sequence`, experts of any layer in the order in which they would be dropped, are dropped.
pub(super) fn drops_of_sequence(
    budget: Budget,
    costs: &Costs<'_>,
    sequence: &[(&MoeProfile, usize)],
) -> Result<usize> {
    budget.check()?;
    let experts = costs.profile.moe_layers.iter().map(|l| l.experts).sum::<usize>();
    match budget {
        Budget::Experts(_) => Err(Error::Budget(format!(
            "{budget}: keeps the same number in every layer, which scope=global does not; use --remove or --bytes"
        ))),
        Budget::Remove(fraction) => {
            let n = match nearest(fraction, costs, sequence) {
                Some(n) => n,
                None => (fraction * experts as f64).round_ties_even() as usize,
            };
            if n == 0 {
                return Err(Error::Budget(nothing_removed(budget, experts)));
            }
            if n > sequence.len() {
                let most = sequence.len();
                let largest = round_down(most as f64 / experts as f64);
                return Err(Error::Budget(format!(
                    "{budget}: would drop {n} of all {experts} experts, of which at most {most} can go; the largest \
                     possible is {largest}"
                )));
            }
            Ok(n)
        }
        Budget::Bytes(size) => {
            refuse_enough(size, costs)?;
            let mut meter = Meter::new(costs);
            for (n, (layer, _)) in (1..).zip(sequence) {
                meter.drop(layer);
                if meter.on_disk() <= size {
                    return Ok(n);
                }
            }
            Err(too_small(size, meter.on_disk()))
        }
    }
}

/// Where experts have different sizes, so that counting them is not enough: how many of `sequence` come nearest to the
/// fraction of parameters, the fewer of two that are equally near. More than there are where even all of them stay below
/// it.
fn nearest(fraction: f64, costs: &Costs<'_>, sequence: &[(&MoeProfile, usize)]) -> Option<usize> {
    let layers = &costs.profile.moe_layers;
    let alike = |pair: &[MoeProfile]| pair[0].expert_parameters == pair[1].expert_parameters;
    if layers.iter().all(|layer| layer.each.is_empty()) && layers.windows(2).all(alike) {
        return None;
    }
    let target = fraction * costs.profile.routed_parameters() as f64;
    let mut removed = 0u64;
    for (n, (layer, expert)) in sequence.iter().enumerate() {
        let after = removed + layer.expert(*expert).parameters;
        if after as f64 >= target {
            return Some(if target - removed as f64 <= after as f64 - target { n } else { n + 1 });
        }
        removed = after;
    }
    Some(sequence.len() + 1)
}

/// The checkpoint's size while experts are dropped.
struct Meter<'a> {
    costs: &'a Costs<'a>,
    bytes: u64,
    tensors: u64,
}

impl<'a> Meter<'a> {
    fn new(costs: &'a Costs<'a>) -> Self {
        Meter { costs, bytes: costs.profile.bytes, tensors: costs.profile.tensors }
    }

    fn drop(&mut self, layer: &MoeProfile) {
        let freed = self.costs.dropped(layer);
        self.bytes -= freed.bytes;
        self.tensors -= freed.tensors;
    }

    fn on_disk(&self) -> u64 {
        self.costs.on_disk(self.bytes, self.tensors)
    }
}

/// Refuses a size that the checkpoint already fits into.
pub(super) fn refuse_enough(size: u64, costs: &Costs<'_>) -> Result<()> {
    let now = costs.now();
    if size < now {
        return Ok(());
    }
    let now = format_size(now);
    Err(Error::Budget(format!(
        "{}: the checkpoint has {now}, so nothing needs removing",
        Budget::Bytes(size)
    )))
}

/// The error for a size below everything that can be reached.
pub(super) fn too_small(size: u64, smallest: u64) -> Error {
    let smallest = format_size(smallest);
    Error::Budget(format!("{}: the smallest size this method can reach is {smallest}", Budget::Bytes(size)))
}

/// The message for a fraction that rounds to no expert at all.
pub(super) fn nothing_removed(budget: Budget, experts: usize) -> String {
    let smallest = round_up(1.0 / experts.max(1) as f64);
    format!("{budget}: would drop no expert; the smallest possible is {smallest}, 1 of {experts}")
}

/// A fraction for people, rounded down to four decimals.
pub(super) fn round_down(fraction: f64) -> f64 {
    (fraction * 1e4 + 1e-9).floor() / 1e4
}

/// A fraction for people, rounded up to four decimals.
fn round_up(fraction: f64) -> f64 {
    (fraction * 1e4 - 1e-9).ceil() / 1e4
}
