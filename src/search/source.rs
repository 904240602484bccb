//! A model on tokens, as a source of losses.

use std::cell::RefCell;
use std::path::Path;

use super::state::{Answer, State, Streams};
use crate::backend::Backend;
use crate::calibrate::{self, Residual};
use crate::model::{Model, profile};
use crate::plan::{Loss, LossSource, Pass, Tails};
use crate::progress::Progress;
use crate::tokens::Windows;

/// A [`LossSource`] that runs a model on token windows. What it has answered is kept on disk until
/// [`Search::finish`]: the same search, started again, goes on after its last commit.
pub struct Search<'a, 'm, B: Backend> {
    state: RefCell<State<'a, 'm, B>>,
}

impl<'a, 'm, B: Backend> Search<'a, 'm, B> {
    /// Most bytes of inner products that are kept in memory; beyond that they go to a file beside the result, and are
    /// read again for every generation of candidates. A token of a layer with E experts takes 2 · E · (E + 1) bytes: the
    /// 262144 tokens of NAEE's setting 38 MB for 8 experts and 2.2 GB for 64. Routing facts, about 14 · E bytes, stay in
    /// memory.
    pub const MEMORY: u64 = 2 << 30;

    /// A search on `windows` whose result goes to `out`; `what` names everything else that its questions depend on:
    /// method, options, budget.
    ///
    /// # Errors
    /// Those of [`Residual::open`], and sizes that cannot be read.
    pub fn new(
        model: &'a Model<'m, B>,
        windows: &'a Windows,
        out: &Path,
        what: &str,
        progress: &'a mut dyn Progress,
    ) -> calibrate::Result<Self> {
        let identity = profile(model.checkpoint(), model.architecture())?.identity;
        let (tokens, length) = (windows.sha256(), windows.length);
        let arithmetic = model.backend().arithmetic();
        let key = format!("moepress search 1\n{identity}\n{tokens} {length}\n{arithmetic}\n{what}\n");
        let work = Residual::open(out, &key, &[model.checkpoint()], progress)?;
        let state = State::new(model, windows, progress, work, Self::MEMORY);
        Ok(Search { state: RefCell::new(state) })
    }

    /// The same with another bound than [`Search::MEMORY`].
    #[must_use]
    pub fn with_memory(self, bytes: u64) -> Self {
        self.state.borrow_mut().memory = bytes;
        self
    }

    /// Forgets the search, once its result is in its place.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub fn finish(self) -> calibrate::Result<()> {
        let state = self.state.into_inner();
        state.progress.end();
        state.work.remove()
    }
}

impl<B: Backend> LossSource for Search<'_, '_, B> {
    fn begin(&self, pass: &Pass<'_>) -> Answer<()> {
        self.state.borrow_mut().begin(pass).map_err(|e| e.to_string())
    }

    fn enter(&self, layer: usize) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        state.current = layer;
        if state.journal.is_replaying() {
            return Ok(());
        }
        state.enter(layer).map_err(|e| e.to_string())
    }

    fn losses(&self, dropped: &[Vec<usize>]) -> Answer<Vec<Loss>> {
        let state = &mut *self.state.borrow_mut();
        state.answer(dropped.len(), |state| state.losses(dropped))
    }

    fn leave(&self, dropped: &[usize], detail: &str) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        let known = state.journal.is_replaying();
        if !known {
            state.leave(dropped).map_err(|e| e.to_string())?;
        }
        state.passed.push((state.current, dropped.to_vec()));
        state.position = state.current + 1;
        state.progress.step(if known { "done before" } else { detail });
        Ok(())
    }

    fn commit(&self) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        let replaying = state.journal.is_replaying();
        state.journal.commit(&state.work)?;
        state.commits += 1;
        match &state.streams {
            Some(Streams { inputs, original: None }) if !replaying => {
                state.work.save(state.model.backend(), inputs, state.position).map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }
    }

    fn begins_stack(&self, layer: usize) -> bool {
        self.state.borrow().begins_stack(layer)
    }

    fn mark(&self) -> Answer<()> {
        let state = &mut *self.state.borrow_mut();
        if state.journal.is_replaying() {
            return Ok(());
        }
        state.set_mark().map_err(|e| e.to_string())
    }

    fn block_losses(&self, candidates: &[Vec<Vec<usize>>]) -> Answer<Vec<Loss>> {
        let state = &mut *self.state.borrow_mut();
        let products = candidates.iter().map(Vec::len).product();
        state.answer(products, |state| state.block_losses(candidates))
    }

    fn tails(&self, dropped: &[Vec<usize>]) -> Answer<Vec<Tails>> {
        self.state.borrow_mut().tails(dropped).map_err(|e| e.to_string())
    }
}
