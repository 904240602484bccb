//! Keys and values of the tokens that a layer has seen, or the state that these have left.

use crate::architecture::Span;
use crate::backend::{Backend, Batch, Result};

/// What one layer keeps of the earlier tokens of one text, so that a new token costs one token's work: the keys and
/// values of grouped attention after norm and rotation; of latent attention the normed latent and the rotated key part
/// that the heads share, `latent_dim + rope_dim` numbers per token whatever the number of heads. Gated delta networks,
/// short convolutions and state space models keep no rows of tokens but a state of fixed size.
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
    /// `[tokens, kv_heads · head_dim]` and `[tokens, kv_heads · value_dim]`.
    Grouped { keys: B::Buffer, values: B::Buffer },
    /// `[tokens, latent_dim + rope_dim]`.
    Latent(B::Buffer),
    /// What the tokens so far have left; means nothing before the first one.
    State(State<B>),
}

/// State of fixed size.
pub(super) struct State<B: Backend> {
    /// The last inputs of the convolution, `[kernel − 1, channels]`.
    pub(super) tail: B::Buffer,
    /// State of every value head of a gated delta network, `[value_heads · key_dim, value_dim]`; of every head or channel of
    /// a state space model, `[heads · state_dim, head_dim]` or `[state_dim, channels]`.
    pub(super) heads: B::Buffer,
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

    /// The state, of a layer that has one.
    pub(super) fn state(&mut self) -> &mut State<B> {
        match &mut self.rows {
            Rows::State(state) => state,
            Rows::Grouped { .. } | Rows::Latent(_) => unreachable!("a layer's cache is made by itself"),
        }
    }

    /// Both parts of the state, where there is a cache.
    pub(super) fn tail_and_heads(
        cache: Option<&mut Self>,
    ) -> (Option<&mut B::Buffer>, Option<&mut B::Buffer>) {
        cache.map(LayerCache::state).map(|state| (&mut state.tail, &mut state.heads)).unzip()
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
            Rows::State(_) => unreachable!("a state has no rows of tokens"),
        }
        write(&mut self.rows, kept)
    }
}
