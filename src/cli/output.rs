//! Results on standard output.

use std::io::Write as _;

use serde::Serialize;

use super::failure::Failure;

/// `text` without anything that would break the line or reach the terminal as a command: file names may hold it.
pub(crate) fn line(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\r' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(shown).collect()
}

/// Prints text for people.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::output)
}

/// Prints one JSON object.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}
