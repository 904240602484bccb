//! What a search was told, on disk: a run that was stopped asks the same questions again and hears the same answers.

use std::collections::VecDeque;
use std::path::PathBuf;

use crate::calibrate::Residual;
use crate::checkpoint::write_atomic;

/// Answers in the order of the questions, in units that were committed together.
pub(super) struct Journal {
    /// Unit at hand.
    unit: usize,
    /// Units that an earlier run committed.
    known: usize,
    /// The file of the unit at hand.
    path: PathBuf,
    /// Answers of the unit at hand: those still to be given again, or those given so far.
    answers: VecDeque<f64>,
}

fn name(unit: usize) -> String {
    format!("unit-{unit:05}.f64")
}

impl Journal {
    /// What is left of an earlier run.
    pub(super) fn open(work: &Residual) -> Self {
        let known = (0..usize::MAX).take_while(|unit| work.path(&name(*unit)).is_file()).count();
        let mut journal = Journal { unit: 0, known, path: PathBuf::new(), answers: VecDeque::new() };
        journal.load(work);
        journal
    }

    /// Whether the answers at hand are those of an earlier run.
    pub(super) fn is_replaying(&self) -> bool {
        self.unit < self.known
    }

    fn load(&mut self, work: &Residual) {
        self.answers.clear();
        self.path = work.path(&name(self.unit));
        if self.is_replaying() {
            match std::fs::read(&self.path) {
                Ok(bytes) => self.answers.extend(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b))),
                // It was there a moment ago; go on as if it had never been.
                Err(_) => self.known = self.unit,
            }
        }
    }

    /// The next `count` numbers of an earlier run.
    pub(super) fn replay(&mut self, count: usize) -> Result<Vec<f64>, String> {
        if self.answers.len() < count {
            let path = self.path.display();
            return Err(format!(
                "{path}: the notes of an earlier run do not fit; remove the folder that it is in"
            ));
        }
        Ok(self.answers.drain(..count).collect())
    }

    /// Notes an answer.
    pub(super) fn note(&mut self, numbers: impl IntoIterator<Item = f64>) {
        self.answers.extend(numbers);
    }

    /// Ends the unit at hand.
    pub(super) fn commit(&mut self, work: &Residual) -> Result<(), String> {
        if !self.is_replaying() {
            let bytes: Vec<u8> = self.answers.iter().flat_map(|a| a.to_le_bytes()).collect();
            write_atomic(&work.path(&name(self.unit)), &bytes).map_err(|e| e.to_string())?;
            self.known = self.unit + 1;
        }
        self.unit += 1;
        self.load(work);
        Ok(())
    }
}
