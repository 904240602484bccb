//! Progress on standard error: a bar on a terminal, otherwise one line per step.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{FormattedDuration, ProgressBar, ProgressState, ProgressStyle};
use moepress::progress::Progress;

/// Shows the library's progress.
#[derive(Debug)]
pub(crate) struct Report {
    mode: Mode,
    task: String,
    steps: usize,
    done: usize,
}

#[derive(Debug)]
enum Mode {
    Silent,
    Lines,
    Bar(Option<ProgressBar>),
}

impl Report {
    /// As fits standard error; nothing at all with `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        let mode = match quiet {
            true => Mode::Silent,
            false if std::io::stderr().is_terminal() => Mode::Bar(None),
            false => Mode::Lines,
        };
        Report { mode, task: String::new(), steps: 0, done: 0 }
    }

    /// Says something worth knowing before the work begins.
    pub(crate) fn note(&self, message: &str) {
        match &self.mode {
            Mode::Silent => {}
            Mode::Bar(Some(bar)) => bar.suspend(|| line(message)),
            Mode::Bar(None) | Mode::Lines => line(message),
        }
    }
}

impl Progress for Report {
    fn begin(&mut self, task: &str, steps: usize) {
        self.end();
        self.task = task.into();
        self.steps = steps;
        self.done = 0;
        if let Mode::Bar(bar) = &mut self.mode {
            let new = ProgressBar::new(steps as u64).with_style(style()).with_prefix(task.to_string());
            new.enable_steady_tick(Duration::from_millis(500));
            *bar = Some(new);
        }
    }

    fn step(&mut self, detail: &str) {
        self.done += 1;
        match &self.mode {
            Mode::Silent | Mode::Bar(None) => {}
            Mode::Bar(Some(bar)) => {
                bar.set_message(detail.to_string());
                bar.inc(1);
            }
            Mode::Lines => {
                let Report { task, steps, done, .. } = self;
                let separator = if detail.is_empty() { "" } else { ": " };
                line(&format!("{task} {done}/{steps}{separator}{detail}"));
            }
        }
    }

    fn warn(&mut self, message: &str) {
        self.note(&format!("warning: {message}"));
    }

    fn end(&mut self) {
        if let Mode::Bar(bar) = &mut self.mode
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        // An error that follows starts on a line of its own.
        self.end();
    }
}

fn line(message: &str) {
    // Progress must not stop the work where standard error is closed.
    let _ = writeln!(std::io::stderr().lock(), "{}", super::output::line(message));
}

fn style() -> ProgressStyle {
    let template = "{prefix} {pos}/{len} [{bar:30}] {elapsed_precise} elapsed, {left} left  {wide_msg}";
    let left = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        // Before the first step nothing is known.
        let _ = match state.pos() {
            0 => out.write_str("–:––:––"),
            _ => write!(out, "{}", FormattedDuration(state.eta())),
        };
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.with_key("left", left).progress_chars("=> ")
}
