//! Results on standard output.

use std::io::Write as _;

use serde::Serialize;

use super::failure::Failure;

/// Prints text for people.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::output)
}

/// Prints one JSON object.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}
