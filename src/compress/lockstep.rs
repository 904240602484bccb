//! Several plans for one checkpoint, carried out side by side in memory; nothing is written.

use std::time::{Duration, Instant};

use super::layout::Layout;
use super::measure::{Follower, Wanted};
use super::run::{Job, Record};
use super::{Options, Result};
use crate::architecture::Profile;
use crate::backend::Backend;
use crate::model::{FeedForwardSource, LayerSource, Model};
use crate::plan::Plan;

/// Plans that advance together, a layer at a time. Those that need measurements of the original model share one residual
/// stream of the calibration tokens; a plan that measures behind its own compressed layers (`propagate`) has its own.
pub struct Lockstep<'a, 'm, B: Backend> {
    model: &'a Model<'m, B>,
    jobs: Vec<(Job<'a>, Option<Follower<'a, 'm, B>>)>,
    shared: Option<Follower<'a, 'm, B>>,
}

/// One layer under one plan.
#[derive(Clone, Debug)]
pub struct PlannedLayer {
    /// The layer; experts that the plan leaves alone are still mapped.
    pub source: LayerSource,
    /// Bytes of router and experts, as the moepress layout stores them.
    pub bytes: u64,
    /// Parameters of the routed experts.
    pub routed_parameters: u64,
    /// What it took, without measurements that plans share.
    pub elapsed: Duration,
}

impl<'a, 'm, B: Backend> Lockstep<'a, 'm, B> {
    /// Begins before the first layer. `options` are those of [`super::compress`], but for the layout; the second result
    /// says for every plan why it cannot be carried out, and those plans take no part.
    ///
    /// # Errors
    /// Names what is wrong with the tokens or the embedding.
    pub fn new(
        model: &'a Model<'m, B>,
        profile: &'a Profile,
        plans: &[&'a Plan],
        options: &'a Options<'a>,
    ) -> Result<(Self, Vec<Result<()>>)> {
        let mut jobs = Vec::new();
        let mut outcomes = Vec::new();
        let mut wanted: Option<Wanted> = None;
        for plan in plans {
            let job = plan.check(profile).map_err(Into::into).and_then(|()| {
                let job = Job::new(model.checkpoint(), profile, plan, options)?;
                if job.follow && options.tokens.is_none() { Err(job.missing_tokens()) } else { Ok(job) }
            });
            let job = match job {
                Ok(job) => job,
                Err(e) => {
                    outcomes.push(Err(e));
                    continue;
                }
            };
            outcomes.push(Ok(()));
            let own = match options.tokens {
                Some(tokens) if job.propagate => Some(Follower::new(model, tokens, job.wanted(), true)?),
                _ => None,
            };
            if job.follow && own.is_none() {
                wanted.get_or_insert_default().join(job.wanted());
            }
            jobs.push((job, own));
        }
        let shared = match (wanted, options.tokens) {
            (Some(wanted), Some(tokens)) => Some(Follower::new(model, tokens, wanted, false)?),
            _ => None,
        };
        Ok((Lockstep { model, jobs, shared }, outcomes))
    }

    /// Carries all plans out on `source`, the next layer of the original. `each` is given the position of the plan among
    /// those that take part, and its layer; what it was given is gone when it returns. Later layers of a plan that has
    /// failed mean nothing.
    ///
    /// # Errors
    /// Of measurements that plans share; errors of one plan go to `each`.
    pub fn layer<E: From<super::Error>>(
        &mut self,
        source: &LayerSource,
        mut each: impl FnMut(usize, Result<PlannedLayer>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let shared = match &mut self.shared {
            Some(follower) => follower.measure(source).map_err(E::from)?,
            None => None,
        };
        for (i, (job, own)) in self.jobs.iter_mut().enumerate() {
            let start = Instant::now();
            let mut layer = || {
                let mut source = source.clone();
                let measured = own.as_mut().map(|f| f.measure(&source)).transpose()?.flatten();
                job.layer(&mut source, measured.as_ref().or(shared.as_ref().filter(|_| job.follow)))?;
                own.iter_mut().try_for_each(|f| f.leave(&source))?;
                let bytes = stored_bytes(self.model, &source);
                let routed_parameters = Record::new(&source).routed_parameters;
                Ok(PlannedLayer { source, bytes, routed_parameters, elapsed: start.elapsed() })
            };
            each(i, layer())?;
        }
        Ok(())
    }
}

/// Bytes of a layer's router and experts in the moepress layout; 0 where it has none.
pub fn stored_bytes<B: Backend>(model: &Model<'_, B>, source: &LayerSource) -> u64 {
    let FeedForwardSource::Moe(moe) = &source.feed_forward else { return 0 };
    let tensors = Layout::Moepress.tensors(&model.architecture().names, source.layer, moe);
    tensors.iter().map(|t| t.bytes().len() as u64).sum()
}
