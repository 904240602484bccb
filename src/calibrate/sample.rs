//! The tokens on which every expert is run, to compare experts on equal inputs.

/// Which tokens of a window are sampled. The choice depends on the window's own tokens only, so that two runs over two
/// halves of the data sample exactly what one run over both would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// Evenly spaced tokens, this many per window.
    PerWindow(usize),
    /// Every token.
    All,
}

impl Sample {
    /// Positions of a window with the given ids, ascending.
    pub fn positions(self, ids: &[u32]) -> Vec<usize> {
        let length = ids.len();
        let count = match self {
            Sample::All => length,
            Sample::PerWindow(count) => count.min(length),
        };
        // FNV-1a of the ids shifts the grid, so that no position is favoured.
        let hash = ids.iter().flat_map(|id| id.to_le_bytes());
        let hash =
            hash.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let offset = (hash % length.max(1) as u64) as usize;
        let mut positions: Vec<usize> = (0..count).map(|i| (offset + i * length / count) % length).collect();
        positions.sort_unstable();
        positions
    }
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Sample::All => write!(f, "all"),
            Sample::PerWindow(count) => write!(f, "{count}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_distinct_and_within_the_window() {
        for length in [1, 2, 7, 64, 255] {
            for count in [0, 1, 3, 7, 100, 255, 1000] {
                let ids: Vec<u32> = (0..length as u32).map(|i| i * 31 + count as u32).collect();
                let mut positions = Sample::PerWindow(count).positions(&ids);
                assert_eq!(positions.len(), count.min(length));
                assert!(positions.iter().all(|p| *p < length));
                positions.dedup();
                assert_eq!(positions.len(), count.min(length), "length {length}, count {count}");
            }
        }
    }
}
