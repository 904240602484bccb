//! How long work reports that it is alive; the library never prints.

/// Hears about the progress of one piece of work at a time.
pub trait Progress {
    /// Work called `task` begins; it has `steps` steps (usually layers). A task reads well before "3/27", such as
    /// `calibrate: layer`.
    fn begin(&mut self, task: &str, steps: usize) {
        let _ = (task, steps);
    }

    /// One more step is done; `detail` says in a few words what it showed.
    fn step(&mut self, detail: &str) {
        let _ = detail;
    }

    /// Something the user should know and that does not stop the work.
    fn warn(&mut self, message: &str) {
        let _ = message;
    }

    /// The work is complete.
    fn end(&mut self) {}
}

/// Reports nothing.
impl Progress for () {}
