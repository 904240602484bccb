//! Runs a model on tokens for the methods that search on them: how far a layer's output, or that of a block of layers,
//! moves when experts are dropped. Streams like everything else: memory holds one layer of weights (a block of layers
//! while blocks are compared), the residual stream of all tokens, and the inner products of the layer's expert outputs
//! ([`Search::MEMORY`] at most, the rest in a file).

mod block;
mod exact;
mod grams;
mod journal;
mod measure;
mod outcomes;
mod rows;
mod rule;
mod source;
mod state;
mod table;
mod tails;

pub use source::Search;
