//! What families with state space models share.

use super::{Config, Error, Result};

/// What the list `key`, with a word for each layer, says by `words`; `None` where a config has no such list.
pub(super) fn kinds<K: Copy>(config: &Config, key: &str, words: &[(&str, K)]) -> Result<Option<Vec<K>>> {
    let Some(list) = config.strings(key)? else { return Ok(None) };
    let kind = |(l, word): (usize, &String)| {
        let known = words.iter().find(|(known, _)| known == word);
        known.map(|(_, kind)| *kind).ok_or_else(|| {
            let known: Vec<String> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
            Error::invalid(key, format!("is `{word}` in layer {l}, expected one of {}", known.join(", ")))
        })
    };
    list.iter().enumerate().map(kind).collect::<Result<_>>().map(Some)
}

/// Errors unless `key` speaks of as many layers as there are.
pub(super) fn check_count(key: &str, count: usize, layers: usize) -> Result<()> {
    if count == layers {
        return Ok(());
    }
    let what = format!("has {count} entries, expected {layers}, as num_hidden_layers says");
    Err(Error::invalid(key, what))
}

/// Smallest and largest Δ of Mamba-2 where a config does not say.
pub(super) const UNLIMITED_STEPS: [f64; 2] = [0.0, f64::INFINITY];
