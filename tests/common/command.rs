//! Commands as scripts see them: exit status, standard output and standard error.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a command did.
pub struct Outcome {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Standard output of a success.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "{}", self.stderr);
        self.stdout
    }

    /// The JSON of a success.
    #[track_caller]
    pub fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }

    /// The message of a failure with `status`: one line, and nothing on standard output.
    #[track_caller]
    pub fn error(self, status: i32) -> String {
        assert_eq!(self.status, status, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        let message = self.stderr.strip_suffix('\n').unwrap_or(&self.stderr);
        assert!(message.starts_with("error: "), "{message}");
        assert!(!message.contains('\n'), "more than one line: {message}");
        message.strip_prefix("error: ").unwrap().into()
    }
}

/// The `moepress` command with `arguments`, reading nothing.
pub fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moepress"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs `moepress` with `arguments`.
pub fn moepress<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Outcome {
    outcome(command(arguments))
}

/// Runs a command to its end.
pub fn outcome(mut command: Command) -> Outcome {
    let output = command.output().unwrap();
    Outcome {
        status: output.status.code().unwrap(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
