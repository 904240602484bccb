//! How a command can end badly, and what is then said.

use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::ExitCode;

/// Why a command did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line asks for something impossible; exit status 2.
    Usage(String),
    /// The work failed; exit status 1.
    Work(String),
    /// Whoever read the output has had enough, as `head` does; no error.
    Closed,
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        use moepress::plan::Error;
        use moepress::tokens::Error as TokensError;
        use moepress::upcycle::Error as UpcycleError;
        let any: &dyn std::error::Error = &error;
        let usage = matches!(
            any.downcast_ref(),
            Some(
                Error::Method { .. } | Error::UnknownOption { .. } | Error::Option { .. } | Error::Missing(_)
            )
        ) || matches!(any.downcast_ref(), Some(UpcycleError::Choice(_)));
        match any.downcast_ref() {
            _ if usage => Failure::Usage(error.to_string()),
            // Windows have at least two tokens.
            Some(TokensError::TooShort { tokens: tokens @ 2.., .. }) => {
                Failure::Work(format!("{error}; choose --window-length {tokens} or less"))
            }
            _ => Failure::Work(error.to_string()),
        }
    }
}

impl Failure {
    /// Standard output could not be written.
    #[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
    pub(crate) fn output(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::Work(format!("standard output: {error}")),
        }
    }

    /// The same, where what was asked for is complete in `out` and only could not be shown.
    pub(crate) fn but_wrote(self, out: &Path) -> Failure {
        match self {
            Failure::Work(message) => {
                Failure::Work(format!("{message}; the result is complete, in {}", out.display()))
            }
            other => other,
        }
    }

    /// Says it on standard error, in exactly one line, and gives the exit status.
    pub(crate) fn report(self) -> ExitCode {
        let (message, status) = match self {
            Failure::Usage(message) => (message, 2),
            Failure::Work(message) => (message, 1),
            Failure::Closed => return ExitCode::SUCCESS,
        };
        let line = shortened(super::output::line(&message));
        // Where standard error is closed there is nobody left to tell.
        let _ = writeln!(std::io::stderr().lock(), "error: {line}");
        ExitCode::from(status)
    }
}

/// Without the middle of what no one reads to its end: a message may quote a file.
fn shortened(line: String) -> String {
    const HEAD: usize = 1200;
    const TAIL: usize = 300;
    if line.chars().count() <= HEAD + TAIL {
        return line;
    }
    let head: String = line.chars().take(HEAD).collect();
    let tail: Vec<char> = line.chars().rev().take(TAIL).collect();
    head + " … " + &tail.into_iter().rev().collect::<String>()
}
