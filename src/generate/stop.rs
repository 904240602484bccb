//! Which tokens begin and end a text.

use std::path::Path;

use serde_json::Value;

use super::{Error, Result};
use crate::architecture::parse_json;
use crate::checkpoint::read_file;

/// The tokens that end a text, as the checkpoint in `dir` says: `eos_token_id`, a number or a list of them, of
/// `generation_config.json`, or else of `config.json`. None where neither has it.
///
/// # Errors
/// Names the file whose `eos_token_id` is something else.
pub fn end_tokens(dir: &Path) -> Result<Vec<u32>> {
    Ok(tokens(dir, "eos_token_id")?.unwrap_or_default())
}

/// The token that the decoder behind an encoder begins with, as the checkpoint in `dir` says: `decoder_start_token_id`,
/// or else `bos_token_id`, as in transformers.
///
/// # Errors
/// Names the file whose key is something else than a token id, and the key where neither is there.
pub fn start_token(dir: &Path) -> Result<u32> {
    for key in ["decoder_start_token_id", "bos_token_id"] {
        if let Some(&[id]) = tokens(dir, key)?.as_deref() {
            return Ok(id);
        }
    }
    let what = "decoder_start_token_id is missing: the decoder needs a token to begin with".into();
    Err(Error::Config { path: dir.join("config.json"), what })
}

/// What `generation_config.json`, or else `config.json`, has under `key`.
fn tokens(dir: &Path, key: &str) -> Result<Option<Vec<u32>>> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let invalid = |what: String| Error::Config { path: path.clone(), what };
        let text = read_file(&path).map_err(|e| invalid(e.to_string()))?;
        let text = String::from_utf8(text).map_err(|e| invalid(e.to_string()))?;
        let config = parse_json(&text).map_err(|e| invalid(format!("not valid JSON: {e}")))?;
        let inner = &config["text_config"][key];
        let value = [&config[key], inner].into_iter().find(|v| !v.is_null());
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = match value {
            None => continue,
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        let ids = ids.ok_or_else(|| invalid(format!("{key}: expected a token id or a list of them")))?;
        return Ok(Some(ids));
    }
    Ok(None)
}
