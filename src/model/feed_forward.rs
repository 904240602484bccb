//! The feed-forward half of a layer: a dense MLP, or router, experts and shared expert.

use super::Result;
use super::layer::{Linear, Observation, Scratch};
use super::source::{FeedForwardSource, LayerSource, LinearSource, MoeSource};
use crate::backend::{Backend, Batch, Mlp, Result as BackendResult};

pub(super) enum FeedForward<B: Backend> {
    Dense(Mlp<Linear<B>>),
    Moe(Moe<B>),
    None,
}

pub(super) struct Moe<B: Backend> {
    router: B::Router,
    experts: B::Experts,
    capacity: Option<usize>,
    shared: Option<Shared<B>>,
}

struct Shared<B: Backend> {
    mlp: Mlp<Linear<B>>,
    gate: Option<B::Weight>,
}

/// Why a layer's missing half is not asked for anything.
pub(super) const NOTHING: &str = "a layer leaves out the half that it does not have";

impl<B: Backend> FeedForward<B> {
    pub(super) fn prepare(backend: &B, source: &LayerSource) -> Result<Self> {
        let mlp = |mlp: &Mlp<LinearSource>| mlp.try_map(|m| Linear::prepare(backend, m));
        Ok(match &source.feed_forward {
            FeedForwardSource::Dense(source) => FeedForward::Dense(mlp(source)?),
            FeedForwardSource::Moe(moe) => {
                moe.check_choices(source.layer)?;
                FeedForward::Moe(Moe::prepare(backend, moe)?)
            }
            FeedForwardSource::None => FeedForward::None,
        })
    }

    /// Reads `scratch.normed`, writes `scratch.out`.
    pub(super) fn apply(
        &self,
        backend: &B,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        observe: Option<Observation<'_, B>>,
    ) -> Result<()> {
        match self {
            FeedForward::Dense(mlp) => {
                let Scratch { normed, gate, up, out, .. } = scratch;
                Ok(run(backend, mlp, normed, gate, up, out)?)
            }
            FeedForward::Moe(moe) => Ok(moe.apply(backend, batch, scratch, None, observe)?),
            FeedForward::None => unreachable!("{NOTHING}"),
        }
    }
}

impl<B: Backend> Moe<B> {
    fn prepare(backend: &B, source: &MoeSource) -> BackendResult<Self> {
        let shared = match &source.shared {
            None => None,
            Some((mlp, gate)) => Some(Shared {
                mlp: mlp.try_map(|m| Linear::prepare(backend, m))?,
                gate: gate.as_ref().map(|g| backend.weight(g)).transpose()?,
            }),
        };
        Ok(Moe {
            router: backend.router(&source.router, source.rule())?,
            experts: backend.experts(&source.experts, &source.base)?,
            capacity: source.capacity,
            shared,
        })
    }

    /// Routes `scratch.normed` with `router`, or the layer's own, whatever the capacity of experts.
    pub(super) fn route(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        router: Option<&B::Router>,
    ) -> BackendResult<()> {
        backend.route(&scratch.normed, router.unwrap_or(&self.router), &mut scratch.routing)
    }

    /// Runs the experts that were just chosen, and no shared one, into `scratch.out`.
    pub(super) fn run_routed(&self, backend: &B, scratch: &mut Scratch<B>) -> BackendResult<()> {
        let Scratch { normed, out, routing, .. } = scratch;
        backend.run_experts(normed, &self.experts, routing, out, None)
    }

    /// See [`Backend::output_grams`].
    pub(super) fn output_grams(
        &self,
        backend: &B,
        rows: &[usize],
        extra: Option<&[f32]>,
        scratch: &mut Scratch<B>,
    ) -> BackendResult<Vec<f32>> {
        let Scratch { normed, routing, .. } = scratch;
        backend.output_grams(normed, rows, extra, &self.experts, routing)
    }

    /// Reads `scratch.normed`, writes `scratch.out`; chooses with `router`, or the layer's own.
    pub(super) fn apply(
        &self,
        backend: &B,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        router: Option<&B::Router>,
        observe: Option<Observation<'_, B>>,
    ) -> BackendResult<()> {
        self.route(backend, scratch, router)?;
        let Scratch { normed, out, routing, .. } = scratch;
        if let Some(capacity) = self.capacity {
            backend.limit_tokens(routing, capacity, batch)?;
        }
        match observe {
            None => backend.run_experts(normed, &self.experts, routing, out, None)?,
            Some(Observation { observer, sample }) => {
                backend.run_experts(normed, &self.experts, routing, out, Some((observer, batch)))?;
                if !sample.is_empty() {
                    backend.observe_all(normed, sample, &self.experts, routing, observer)?;
                }
            }
        }
        if self.shared(backend, scratch)? {
            backend.add(&mut scratch.out, &scratch.shared)?;
        }
        Ok(())
    }

    /// The shared expert of `scratch.normed` into `scratch.shared`; whether there is one.
    pub(super) fn shared(&self, backend: &B, scratch: &mut Scratch<B>) -> BackendResult<bool> {
        let Some(Shared { mlp, gate: scalar_gate }) = &self.shared else { return Ok(false) };
        let Scratch { normed, shared, gate, up, scalar, .. } = scratch;
        run(backend, mlp, normed, gate, up, shared)?;
        if let Some(weight) = scalar_gate {
            backend.linear(normed, weight, None, scalar)?;
            backend.sigmoid_gate(shared, scalar)?;
        }
        Ok(true)
    }
}

/// out = down(activation(gate(x), up(x))), or without a gate down(activation(gate(x))).
fn run<B: Backend>(
    backend: &B,
    mlp: &Mlp<Linear<B>>,
    x: &B::Buffer,
    gate: &mut B::Buffer,
    up: &mut B::Buffer,
    out: &mut B::Buffer,
) -> BackendResult<()> {
    mlp.gate.apply(backend, x, gate)?;
    let up = match &mlp.up {
        None => None,
        Some(map) => {
            map.apply(backend, x, up)?;
            Some(&*up)
        }
    };
    backend.activate(gate, up, mlp.activation)?;
    mlp.down.apply(backend, gate, out)
}
