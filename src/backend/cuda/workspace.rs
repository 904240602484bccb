//! The intermediate buffers of a forward pass.

use super::arena::Arena;
use super::layer::{MoeLayer, Tables};
use super::params::{MAX_SLOTS, SORT_CHUNK, STAGES};
use super::{Error, Result};
use crate::architecture::WeightTarget;

/// Most pairs of a token and a slot in one pass, so that tiles can be counted in 32 bits.
const MOST_PAIRS: usize = 1 << 27;

/// Addresses of the buffers for a number of tokens T, S slots, P = T · S pairs, E rows of the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workspace {
    /// f32 `[T, logits]`.
    pub(super) logits: u64,
    /// i32 `[T, S]`.
    pub(super) ids: u64,
    /// f32 `[T, S]`.
    pub(super) weights: u64,
    /// i32 `[E + 1]`.
    pub(super) offsets: u64,
    /// i32 `[STAGES, E + 1]`.
    pub(super) tile_first: u64,
    /// i32 `[chunks, E]`.
    pub(super) histogram: u64,
    /// i32 `[P]`.
    pub(super) pair_token: u64,
    /// f32 `[P]`.
    pub(super) pair_weight: u64,
    /// i32 `[T, S]`.
    pub(super) slot_source: u64,
    /// f32 `[T, S]`.
    pub(super) slot_weight: u64,
    /// Inputs times their weights, `[P, ldy]`; where combine weights multiply inputs.
    pub(super) scaled: u64,
    /// `[P, ldz]`, of gate and up, then of down.
    pub(super) z: u64,
    /// `[P, ldh]`.
    pub(super) h: u64,
    /// `[P, ldy]`.
    pub(super) y: u64,
    /// i32 `[2]`, and i32 `[STAGES, 2]`: the one expert of the base.
    pub(super) base_offsets: u64,
    pub(super) base_tile_first: u64,
    /// Base of gate and up, `[T, columns]`.
    pub(super) base_in: u64,
    /// Σ weight · h of the pairs whose down has a base, `[T, ldh]`.
    pub(super) base_hidden: u64,
    /// Base of down, `[T, ldy]`.
    pub(super) base_out: u64,
}

/// Elements from one row to the next of a buffer of `columns` columns.
pub(super) fn stride(columns: usize) -> usize {
    columns.next_multiple_of(8)
}

/// Blocks of the sort.
pub(super) fn chunks(pairs: usize) -> usize {
    pairs.div_ceil(SORT_CHUNK)
}

impl Tables {
    /// Lays the workspace of `tokens` tokens out.
    pub(super) fn workspace(&self, tokens: usize, arena: &mut Arena<'_>) -> Result<Workspace> {
        let most = MOST_PAIRS / MAX_SLOTS;
        if tokens > most {
            return Err(Error::argument("tokens", tokens.to_string(), format!("at most {most}")));
        }
        let (slots, rows, size) = (self.slots, self.rows, self.element.bytes());
        let pairs = tokens * slots;
        let logits = self.router.filter(|router| router.has_weight).map_or(0, |router| router.rows);
        let scaled = if self.target == WeightTarget::Input { pairs } else { 0 };
        let base = self.base.is_some();
        let base_columns = self.base.map_or(0, |base| base.columns);
        let base_down = if self.extent.base_down { tokens } else { 0 };
        let (ldz, ldh, ldy) = (stride(self.extent.z()), stride(self.extent.width), stride(self.hidden));
        Ok(Workspace {
            logits: arena.reserve(tokens * logits, 4)?,
            ids: arena.reserve(pairs, 4)?,
            weights: arena.reserve(pairs, 4)?,
            offsets: arena.reserve(rows + 1, 4)?,
            tile_first: arena.reserve(STAGES * (rows + 1), 4)?,
            histogram: arena.reserve(if pairs > SORT_CHUNK { chunks(pairs) * rows } else { 0 }, 4)?,
            pair_token: arena.reserve(pairs, 4)?,
            pair_weight: arena.reserve(pairs, 4)?,
            slot_source: arena.reserve(pairs, 4)?,
            slot_weight: arena.reserve(pairs, 4)?,
            scaled: arena.reserve(scaled, ldy * size)?,
            z: arena.reserve(pairs, ldz * size)?,
            h: arena.reserve(pairs, ldh * size)?,
            y: arena.reserve(pairs, ldy * size)?,
            base_offsets: arena.reserve(if base { 2 } else { 0 }, 4)?,
            base_tile_first: arena.reserve(if base { 2 * STAGES } else { 0 }, 4)?,
            base_in: arena.reserve(tokens, stride(base_columns) * size)?,
            base_hidden: arena.reserve(base_down, ldh * size)?,
            base_out: arena.reserve(base_down, ldy * size)?,
        })
    }
}

impl<B> MoeLayer<B> {
    /// Bytes of workspace that a forward pass of up to `max_tokens` tokens needs. Never less for more tokens.
    ///
    /// # Errors
    /// For more than 4 067 203 tokens, whose pairs the kernels could not count, and for more than 2^60 bytes.
    pub fn workspace_bytes(&self, max_tokens: usize) -> Result<usize> {
        let mut arena = Arena::counting();
        self.tables.workspace(max_tokens, &mut arena)?;
        arena.used()
    }
}
