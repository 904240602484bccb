//! Which tokens end a text.

use std::path::Path;

use serde_json::Value;

use super::{Error, Result};

/// The tokens that end a text, as the checkpoint in `dir` says: `eos_token_id`, a number or a list of them, of
/// `generation_config.json`, or else of `config.json`. None where neither has it.
///
/// # Errors
/// Names the file whose `eos_token_id` is something else.
pub fn end_tokens(dir: &Path) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let invalid = |what: String| Error::Config { path: path.clone(), what };
        let text = std::fs::read(&path).map_err(|e| invalid(e.to_string()))?;
        let config: Value =
            serde_json::from_slice(&text).map_err(|e| invalid(format!("not valid JSON: {e}")))?;
        let inner = &config["text_config"]["eos_token_id"];
        let value = [&config["eos_token_id"], inner].into_iter().find(|v| !v.is_null());
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            None => continue,
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        return ids.ok_or_else(|| invalid("eos_token_id: expected a token id or a list of them".into()));
    }
    Ok(Vec::new())
}
