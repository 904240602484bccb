//! Keys and values of the tokens that a layer has seen.

use crate::architecture::Span;
use crate::backend::{Backend, Batch, Result};

/// What one layer keeps of the earlier tokens of one text, so that a new token costs one token's work: the keys and
/// values of grouped attention after norm and rotation; of latent attention the normed latent and the rotated key part
/// that the heads share, `latent_dim + rope_dim` numbers per token whatever the number of heads.
///
/// Tokens that no later query can see are dropped, not one by one but when at least half of the rows are such: a sliding
/// window of w holds at most about 2w, and a token is moved at most once on average.
pub struct LayerCache<B: Backend> {
    rows: Rows<B>,
    span: Span,
    /// Position of the first row.
    first: usize,
    /// Number of rows.
    held: usize,
}

/// Keys and values of the encoder's output in one layer of a decoder, computed once: `[tokens, kv_heads · head_dim]` each.
pub struct CrossCache<B: Backend> {
    pub(super) keys: B::Buffer,
    pub(super) values: B::Buffer,
    pub(super) tokens: usize,
}

/// One row per token.
pub(super) enum Rows<B: Backend> {
    /// `[tokens, kv_heads · head_dim]` each.
    Grouped { keys: B::Buffer, values: B::Buffer },
    /// `[tokens, latent_dim + rope_dim]`.
    Latent(B::Buffer),
}

impl<B: Backend> LayerCache<B> {
    /// An empty cache whose buffers have their widths.
    pub(super) fn new(rows: Rows<B>, span: Span) -> Self {
        LayerCache { rows, span, first: 0, held: 0 }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.first, self.held) = (0, 0);
    }

    /// Position of the first row.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// Number of rows.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    pub(super) fn rows(&self) -> &Rows<B> {
        &self.rows
    }

    /// Makes room for the tokens of `batch`, which follow those that are held, and has `write` fill it from the given row
    /// on.
    pub(super) fn append(
        &mut self,
        backend: &B,
        batch: &Batch,
        write: impl FnOnce(&mut Rows<B>, usize) -> Result<()>,
    ) -> Result<()> {
        debug_assert_eq!(self.first + self.held, batch.start, "the tokens that follow");
        let stale = self.span.first(batch.start).saturating_sub(self.first).min(self.held);
        let dropped = if stale >= self.held - stale { stale } else { 0 };
        self.first += dropped;
        let kept = self.held - dropped;
        self.held = kept + batch.length;
        let keep = |buffer: &mut B::Buffer| backend.keep_rows(buffer, dropped, kept, self.held);
        match &mut self.rows {
            Rows::Grouped { keys, values } => {
                keep(keys)?;
                keep(values)?;
            }
            Rows::Latent(rows) => keep(rows)?,
        }
        write(&mut self.rows, kept)
    }
}
