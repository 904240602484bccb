//! The feed-forward half of a layer: a dense MLP, or router, experts and shared expert.

use super::Result;
use super::layer::{Linear, Norm, Observation, Scratch};
use super::source::{FeedForwardSource, LayerSource, LinearSource, MoeSource, NormSource, PartNorms};
use crate::backend::{Backend, Batch, Mlp, Result as BackendResult};
use crate::checkpoint::{Dtype, Tensor};

pub(super) enum FeedForward<B: Backend> {
    Dense(Mlp<Linear<B>>),
    Moe(Moe<B>),
    None,
}

pub(super) struct Moe<B: Backend> {
    /// Norms of the parts and their ε, where parts have their own.
    norms: Option<(PartNorms<Norm<B>>, f32)>,
    /// The maps into and out of the latent of routed experts, where they have one.
    latent: Option<[Linear<B>; 2]>,
    router: B::Router,
    experts: B::Experts,
    capacity: Option<usize>,
    shared: Option<Shared<B>>,
    /// Factor of the sum of routed and shared experts.
    pub(super) output_scale: f32,
}

struct Shared<B: Backend> {
    mlp: Mlp<Linear<B>>,
    gate: Option<B::Weight>,
}

/// Why a layer's missing half is not asked for anything.
pub(super) const NOTHING: &str = "a layer leaves out the half that it does not have";

impl<B: Backend> FeedForward<B> {
    /// Norms have this ε and are prepared by `norm`.
    pub(super) fn prepare(
        backend: &B,
        source: &LayerSource,
        eps: f32,
        norm: impl Fn(&NormSource) -> BackendResult<Norm<B>>,
    ) -> Result<Self> {
        let mlp = |mlp: &Mlp<LinearSource>| mlp.try_map(|m| Linear::prepare(backend, m));
        Ok(match &source.feed_forward {
            FeedForwardSource::Dense(source) => FeedForward::Dense(mlp(source)?),
            FeedForwardSource::Moe(moe) => {
                moe.check_choices(source.layer)?;
                let norms = moe.norms.as_ref().map(|norms| part_norms(norms, norm)).transpose()?;
                FeedForward::Moe(Moe::prepare(backend, moe, norms.map(|norms| (norms, eps)))?)
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

/// The one before the router is divided by √hidden.
fn part_norms<B: Backend>(
    source: &PartNorms<NormSource>,
    norm: impl Fn(&NormSource) -> BackendResult<Norm<B>>,
) -> BackendResult<PartNorms<Norm<B>>> {
    let stored = &source.router.weight;
    let factor = (stored.len() as f64).powf(-0.5) as f32;
    let scaled: Vec<f32> = stored.to_f32()?.into_iter().map(|w| w * factor).collect();
    let weight = Tensor::from_f32("", Dtype::F32, stored.shape().to_vec(), &scaled);
    Ok(PartNorms {
        router: norm(&NormSource { weight, bias: None })?,
        shared: norm(&source.shared)?,
        shared_output: norm(&source.shared_output)?,
        routed_output: norm(&source.routed_output)?,
    })
}

impl<B: Backend> Moe<B> {
    fn prepare(
        backend: &B,
        source: &MoeSource,
        norms: Option<(PartNorms<Norm<B>>, f32)>,
    ) -> BackendResult<Self> {
        let shared = match &source.shared {
            None => None,
            Some((mlp, gate)) => Some(Shared {
                mlp: mlp.try_map(|m| Linear::prepare(backend, m))?,
                gate: gate.as_ref().map(|g| backend.weight(g)).transpose()?,
            }),
        };
        let latent = source.latent.as_ref().map(|[into, back]| {
            BackendResult::Ok([Linear::prepare(backend, into)?, Linear::prepare(backend, back)?])
        });
        Ok(Moe {
            norms,
            latent: latent.transpose()?,
            router: backend.router(&source.router, source.rule())?,
            experts: backend.experts(&source.experts, &source.base)?,
            capacity: source.capacity,
            shared,
            output_scale: if source.averaged { 0.5 } else { 1.0 },
        })
    }

    /// The inputs of router and shared expert from the residual stream, where they are not `scratch.normed`.
    pub(super) fn enter(&self, backend: &B, x: &B::Buffer, scratch: &mut Scratch<B>) -> BackendResult<()> {
        let Some((norms, eps)) = &self.norms else { return Ok(()) };
        norms.router.apply(backend, x, *eps, &mut scratch.router_input)?;
        norms.shared.apply(backend, x, *eps, &mut scratch.shared_input)
    }

    /// Whether the shared expert's output is added to that of routed experts with no norm between.
    pub(super) fn adds_shared(&self) -> bool {
        self.norms.is_none()
    }

    /// Routes the tokens with `router`, or the layer's own, whatever the capacity of experts.
    pub(super) fn route(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        router: Option<&B::Router>,
    ) -> BackendResult<()> {
        let Scratch { normed, router_input, routing, .. } = scratch;
        let input = if self.norms.is_some() { router_input } else { normed };
        backend.route(input, router.unwrap_or(&self.router), routing)
    }

    /// What routed experts read, from `scratch.normed`.
    pub(super) fn expert_input<'s>(
        &self,
        backend: &B,
        scratch: &'s mut Scratch<B>,
    ) -> BackendResult<&'s B::Buffer> {
        let Some([into, _]) = &self.latent else { return Ok(&scratch.normed) };
        into.apply(backend, &scratch.normed, &mut scratch.latent[0])?;
        Ok(&scratch.latent[0])
    }

    /// Runs the experts that were just chosen, and no shared one, into `scratch.out`; measures what `observe` asks for.
    pub(super) fn run_routed(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        observe: Option<(Observation<'_, B>, &Batch)>,
    ) -> BackendResult<()> {
        self.expert_input(backend, scratch)?;
        let Scratch { normed, latent: [input, output], out, routing, .. } = scratch;
        let run = |input: &B::Buffer, out: &mut B::Buffer| match observe {
            None => backend.run_experts(input, &self.experts, routing, out, None),
            Some((Observation { observer, sample }, batch)) => {
                backend.run_experts(input, &self.experts, routing, out, Some((observer, batch)))?;
                if sample.is_empty() {
                    return Ok(());
                }
                backend.observe_all(input, sample, &self.experts, routing, observer)
            }
        };
        let Some([_, back]) = &self.latent else { return run(normed, out) };
        run(input, output)?;
        back.apply(backend, output, out)
    }

    /// See [`Backend::output_grams`].
    pub(super) fn output_grams(
        &self,
        backend: &B,
        rows: &[usize],
        extra: Option<&[f32]>,
        scratch: &mut Scratch<B>,
    ) -> BackendResult<Vec<f32>> {
        self.expert_input(backend, scratch)?;
        let Scratch { normed, latent: [input, _], routing, .. } = scratch;
        let (input, behind) = match &self.latent {
            Some([_, back]) => (input, Some(&back.weight)),
            None => (normed, None),
        };
        backend.output_grams(input, rows, behind, extra, &self.experts, routing)
    }

    /// Reads what [`Moe::enter`] left and `scratch.normed`, writes `scratch.out`; chooses with `router`, or the layer's own.
    pub(super) fn apply(
        &self,
        backend: &B,
        batch: &Batch,
        scratch: &mut Scratch<B>,
        router: Option<&B::Router>,
        observe: Option<Observation<'_, B>>,
    ) -> BackendResult<()> {
        self.route(backend, scratch, router)?;
        if let Some(capacity) = self.capacity {
            backend.limit_tokens(&mut scratch.routing, capacity, batch)?;
        }
        self.run_routed(backend, scratch, observe.map(|observe| (observe, batch)))?;
        if let Some((norms, eps)) = &self.norms {
            // Nothing reads the experts' input any more.
            norms.routed_output.apply(backend, &scratch.out, *eps, &mut scratch.normed)?;
            std::mem::swap(&mut scratch.out, &mut scratch.normed);
        }
        if self.shared(backend, scratch)? {
            backend.add(&mut scratch.out, &scratch.shared)?;
        }
        if self.output_scale != 1.0 {
            backend.scale(&mut scratch.out, self.output_scale)?;
        }
        Ok(())
    }

    /// The shared expert's output, with the norm behind it, into `scratch.shared`; whether there is one.
    pub(super) fn shared(&self, backend: &B, scratch: &mut Scratch<B>) -> BackendResult<bool> {
        let Some(Shared { mlp, gate: scalar_gate }) = &self.shared else { return Ok(false) };
        let Scratch { normed, shared_input, shared, gate, up, scalar, .. } = scratch;
        let input = if self.norms.is_some() { shared_input } else { normed };
        run(backend, mlp, input, gate, up, shared)?;
        if let Some(weight) = scalar_gate {
            backend.linear(input, weight, None, scalar)?;
            backend.sigmoid_gate(shared, scalar)?;
        }
        if let Some((norms, eps)) = &self.norms {
            norms.shared_output.apply(backend, shared, *eps, input)?;
            std::mem::swap(shared, input);
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
