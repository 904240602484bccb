//! A layer's tensors, found and checked, still in their stored type.

use rayon::prelude::*;

use super::find::Finder;
use super::{Error, Result};
use crate::architecture::{Architecture, RouterSpec};
use crate::backend::{Base, Expert, Linear, Mlp, RouterRule, RouterWeights, StoredExpert};
use crate::checkpoint::{Checkpoint, Tensor, Weight};

/// The tensors of one layer.
#[derive(Clone, Debug)]
pub struct LayerSource {
    /// 0-based layer.
    pub layer: usize,
    /// Norm before the attention.
    pub input_norm: Option<NormSource>,
    /// Norm behind the attention, before its output is added.
    pub attention_output_norm: Option<NormSource>,
    /// Norm before the feed-forward part.
    pub post_attention_norm: Option<NormSource>,
    /// Norm behind the feed-forward part.
    pub feed_forward_output_norm: Option<NormSource>,
    /// What the layer multiplies the residual stream by in the end, `[1]`.
    pub scale: Option<Tensor>,
    /// The attention's parameters, in the order in which [`super::Layer`] takes them.
    pub attention: AttentionSource,
    /// Norm before, and parameters of, the attention to the encoder's output.
    pub cross: Option<(NormSource, AttentionSource)>,
    /// In the first layer of a decoder: the norm behind the encoder.
    pub encoder_norm: Option<NormSource>,
    /// The feed-forward part.
    pub feed_forward: FeedForwardSource,
}

/// A linear map with an optional bias.
pub type LinearSource = Linear<Weight, Tensor>;

/// A norm: RMS, or with a bias a layer norm; the bias of one that has none is all zeros.
#[derive(Clone, Debug)]
pub struct NormSource {
    /// `[hidden]`.
    pub weight: Tensor,
    /// `[hidden]`.
    pub bias: Option<Tensor>,
}

/// The attention's tensors.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum AttentionSource {
    /// Multi-head or grouped-query attention.
    Grouped {
        /// Query projection.
        query: LinearSource,
        /// Key projection.
        key: LinearSource,
        /// Value projection; `None` where keys are values.
        value: Option<LinearSource>,
        /// Norms of queries and keys.
        norms: Option<[Tensor; 2]>,
        /// Attention sinks, `[heads]`.
        sinks: Option<Tensor>,
        /// Biases by relative position, `[buckets, heads]`.
        bias: Option<Tensor>,
        /// Projection to the gate of what the heads give.
        gate: Option<LinearSource>,
        /// Output projection.
        output: LinearSource,
    },
    /// Multi-head latent attention.
    Latent {
        /// Query projection, or its up-projection where there is a query latent.
        query: LinearSource,
        /// Down-projection and norm of the query latent.
        query_latent: Option<(LinearSource, Tensor)>,
        /// Projection to the latent and the shared rotated key.
        latent: LinearSource,
        /// Norm of the latent.
        latent_norm: Tensor,
        /// Expansion of the latent to keys and values.
        expand: LinearSource,
        /// Output projection.
        output: LinearSource,
    },
    /// A gated delta network.
    GatedDelta {
        /// Projections of the layer's input.
        input: DeltaInput,
        /// The convolution, `[channels, 1, kernel]`, or those of q, k and v.
        kernels: Vec<Tensor>,
        /// A_log of every value head.
        log_rates: Tensor,
        /// As many as there are decays of a token.
        dt_bias: Tensor,
        /// Norm of a value head, `[value_dim]`.
        norm: Tensor,
        /// Output projection.
        output: LinearSource,
    },
    /// A short convolution between two gates.
    ShortConvolution {
        /// Projection to B, C and x.
        input: LinearSource,
        /// The convolution, `[hidden, 1, kernel]`.
        kernel: Tensor,
        /// Its bias, `[hidden]`.
        bias: Option<Tensor>,
        /// Output projection.
        output: LinearSource,
    },
    /// Mamba.
    Mamba {
        /// Projection to x and z.
        input: LinearSource,
        /// The convolution of x, `[width, 1, kernel]`.
        kernel: Tensor,
        /// Its bias, `[width]`.
        kernel_bias: Option<Tensor>,
        /// Projection to the step of low rank, B and C.
        parameters: LinearSource,
        /// Norms of these three.
        norms: [Tensor; 3],
        /// Projection of the step.
        step: LinearSource,
        /// A_log, `[width, state_dim]`.
        log_rates: Tensor,
        /// D of every channel.
        skip: Tensor,
        /// Output projection.
        output: LinearSource,
    },
    /// Mamba-2.
    Mamba2 {
        /// Projection to z, to x, B and C, and to a.
        input: LinearSource,
        /// The convolution of x, B and C, `[channels, 1, kernel]`.
        kernel: Tensor,
        /// Its bias, `[channels]`.
        kernel_bias: Option<Tensor>,
        /// A_log of every head.
        log_rates: Tensor,
        /// dt_bias of every head.
        dt_bias: Tensor,
        /// D of every head.
        skip: Tensor,
        /// Norm of what the heads give, `[heads · head_dim]`.
        norm: Tensor,
        /// Output projection.
        output: LinearSource,
    },
    /// Nothing, in a layer that is a feed-forward part alone.
    None,
}

/// Projections of the input of a gated delta network, as
/// [`DeltaProjections`](crate::architecture::DeltaProjections) tells them apart.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum DeltaInput {
    /// To q, k, v and z, and to b and a, of one key head after the other.
    ByKeyHead {
        /// q, k, v and z.
        qkvz: LinearSource,
        /// b and a.
        ba: LinearSource,
    },
    /// To q, k and v together, and to z, b and a.
    Separate {
        /// q, k and v.
        qkv: LinearSource,
        /// z, b and a.
        zba: [LinearSource; 3],
    },
    /// To q, k and v, to b, and in two steps to z and a.
    LowRankGates {
        /// q, k and v.
        qkv: [LinearSource; 3],
        /// b.
        b: LinearSource,
        /// z.
        z: [LinearSource; 2],
        /// a.
        a: [LinearSource; 2],
    },
}

impl DeltaInput {
    fn linears(&self) -> Vec<&LinearSource> {
        match self {
            DeltaInput::ByKeyHead { qkvz, ba } => vec![qkvz, ba],
            DeltaInput::Separate { qkv, zba } => [qkv].into_iter().chain(zba).collect(),
            DeltaInput::LowRankGates { qkv, b, z, a } => qkv.iter().chain([b]).chain(z).chain(a).collect(),
        }
    }
}

/// The feed-forward part's tensors.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum FeedForwardSource {
    /// A dense MLP.
    Dense(Mlp<LinearSource>),
    /// Router and experts.
    Moe(MoeSource),
    /// Nothing, in a layer without a feed-forward part.
    None,
}

/// Norms of the parts of a layer with experts, `[hidden]` each, see
/// [`NormPlacement::AroundParts`](crate::architecture::NormPlacement::AroundParts). The one before routed experts is
/// [`LayerSource::post_attention_norm`].
#[derive(Clone, Debug)]
pub struct PartNorms<N> {
    /// Before the router.
    pub router: N,
    /// Before the shared expert.
    pub shared: N,
    /// Behind the shared expert.
    pub shared_output: N,
    /// Behind routed experts.
    pub routed_output: N,
}

impl<N> PartNorms<N> {
    /// All, in the order of [`Names::part_norms`](crate::architecture::Names::part_norms).
    pub fn all(&self) -> [&N; 4] {
        [&self.router, &self.shared, &self.shared_output, &self.routed_output]
    }
}

/// Router and experts of a layer.
#[derive(Clone, Debug)]
pub struct MoeSource {
    /// Norms of its parts, where these have their own.
    pub norms: Option<PartNorms<NormSource>>,
    /// The maps from the residual stream to what routed experts read, and back from what they write, where that is not
    /// the stream itself.
    pub latent: Option<[LinearSource; 2]>,
    /// The router, with one row per entry of `experts`.
    pub router: RouterWeights,
    /// Routing rule.
    pub spec: RouterSpec,
    /// Most tokens of a window that an expert takes, see [`MoeSpec::capacity`](crate::architecture::MoeSpec::capacity).
    pub capacity: Option<usize>,
    /// The experts.
    pub experts: Vec<StoredExpert>,
    /// What those of them share that are differences from a base.
    pub base: Base<Weight>,
    /// Hidden width of an expert that has lost no channel.
    pub width: usize,
    /// Number of each expert in the original model.
    pub numbers: Vec<usize>,
    /// Experts of the original model.
    pub original_experts: usize,
    /// The shared expert and its scalar gate.
    pub shared: Option<(Mlp<LinearSource>, Option<Weight>)>,
    /// Whether the mean of its output and that of routed experts is taken, not their sum.
    pub averaged: bool,
    /// Where the family's stock layout holds all experts of a layer together: the tensors that it does so in, one entry
    /// of the first dimension per expert of the original model. Else empty.
    pub fused: Vec<Tensor>,
    /// Whether those hold `[experts, out, in]` instead of `[experts, in, out]`; packed ones always do, and of
    /// [stacked](crate::architecture::ExpertStorage::Stacked) ones gate and up.
    pub fused_output_major: bool,
}

impl MoeSource {
    /// Parameters of the routed experts and their base.
    pub fn routed_parameters(&self) -> u64 {
        let base: u64 = self.base.iter().flatten().map(|w| w.len() as u64).sum();
        self.experts.iter().map(StoredExpert::parameters).sum::<u64>() + base
    }

    /// Stored bytes of the routed experts and their base.
    pub fn routed_bytes(&self) -> u64 {
        let base: u64 = self.base.iter().flatten().map(Weight::bytes).sum();
        self.experts.iter().map(StoredExpert::bytes).sum::<u64>() + base
    }

    /// The routing rule for the experts at hand.
    pub fn rule(&self) -> RouterRule {
        let group_size = self.spec.groups.map_or(usize::MAX, |g| self.original_experts / g.count);
        RouterRule {
            spec: self.spec.clone(),
            group_of: self.numbers.iter().map(|n| (n / group_size) as u32).collect(),
            live: self.experts.iter().map(|e| !matches!(e, Expert::None)).collect(),
        }
    }

    /// Errors unless every token finds `top_k` experts.
    pub(super) fn check_choices(&self, layer: usize) -> Result<()> {
        let rule = self.rule();
        let live = rule.live.iter().filter(|l| **l).count();
        let choices = match self.spec.groups {
            None => live,
            Some(limit) => {
                let mut sizes = vec![0; limit.count];
                for (group, _) in rule.group_of.iter().zip(&rule.live).filter(|(_, live)| **live) {
                    sizes[*group as usize] += 1;
                }
                sizes.sort_unstable();
                sizes[..limit.kept].iter().sum()
            }
        };
        if choices >= self.spec.top_k {
            return Ok(());
        }
        let k = self.spec.top_k;
        let what = format!("a token may find only {choices} experts, but top_k is {k}; keep at least {k}");
        Err(Error::Inconsistent { layer, what })
    }
}

impl LayerSource {
    /// Finds the tensors of layer `l` and checks shapes, types and that every value is finite.
    ///
    /// # Errors
    /// Names the layer and the tensor.
    pub fn open(checkpoint: &Checkpoint, architecture: &Architecture, l: usize) -> Result<Self> {
        let source = LayerSource::locate(checkpoint, architecture, l)?;
        let finite = source.weights().into_par_iter().try_for_each(Weight::check_finite);
        finite.map_err(|source| Error::Layer { layer: l, source }.of(checkpoint))?;
        source.check_vectors(checkpoint)?;
        Ok(source)
    }

    /// Errors where a number in a vector or the router, found in `checkpoint`, is not finite. A router chooses without a
    /// word whatever it holds, and all of them are soon read.
    pub(super) fn check_vectors(&self, checkpoint: &Checkpoint) -> Result<()> {
        let finite = self.vectors().into_iter().try_for_each(Tensor::check_finite);
        finite.map_err(|source| Error::Layer { layer: self.layer, source }.of(checkpoint))
    }

    /// Finds the tensors of layer `l` and checks shapes and types; reads no weights.
    ///
    /// # Errors
    /// Names the layer and the tensor.
    pub fn locate(checkpoint: &Checkpoint, architecture: &Architecture, l: usize) -> Result<Self> {
        checkpoint.check_unchanged()?;
        Finder { checkpoint, architecture, l }.layer().map_err(|e| e.of(checkpoint))
    }

    /// Every matrix of the layer but the router's.
    pub fn weights(&self) -> Vec<&Weight> {
        let mut all: Vec<&Weight> = self.linears().into_iter().map(|linear| &linear.weight).collect();
        if let Some(moe) = self.moe() {
            all.extend(moe.experts.iter().flat_map(Expert::weights));
            all.extend(moe.base.iter().flatten());
            all.extend(moe.shared.iter().flat_map(|(_, gate)| gate));
        }
        all
    }

    /// Every vector of the layer, and the router.
    pub fn vectors(&self) -> Vec<&Tensor> {
        let [before, behind] = [&self.input_norm, &self.attention_output_norm];
        let norms = before.iter().chain(behind).chain(&self.post_attention_norm);
        let norms = norms.chain(&self.feed_forward_output_norm).chain(&self.encoder_norm);
        let norms = norms.chain(self.cross.iter().map(|(norm, _)| norm));
        let parts = self.moe().and_then(|moe| moe.norms.as_ref());
        let norms = norms.chain(parts.into_iter().flat_map(PartNorms::all));
        let mut all: Vec<&Tensor> = norms.flat_map(NormSource::tensors).chain(&self.scale).collect();
        all.extend(self.linears().into_iter().filter_map(|linear| linear.bias.as_ref()));
        all.extend(self.attentions().flat_map(AttentionSource::vectors));
        if let Some(moe) = self.moe() {
            all.extend(moe.router.tensors());
            all.extend(moe.experts.iter().flat_map(Expert::vectors));
        }
        all
    }

    fn attentions(&self) -> impl Iterator<Item = &AttentionSource> {
        std::iter::once(&self.attention).chain(self.cross.iter().map(|(_, attention)| attention))
    }

    /// The linear maps outside routed experts.
    fn linears(&self) -> Vec<&LinearSource> {
        let mut all: Vec<_> = self.attentions().flat_map(AttentionSource::linears).collect();
        match &self.feed_forward {
            FeedForwardSource::Dense(mlp) => all.extend(mlp.maps()),
            FeedForwardSource::Moe(moe) => all.extend(moe.shared.iter().flat_map(|(mlp, _)| mlp.maps())),
            FeedForwardSource::None => {}
        }
        all
    }

    /// Lets the operating system drop the layer's pages.
    pub fn release(&self) {
        self.weights().into_iter().for_each(Weight::release);
        self.vectors().into_iter().for_each(Tensor::release);
    }

    /// The MoE part, if the layer has one.
    pub fn moe(&self) -> Option<&MoeSource> {
        match &self.feed_forward {
            FeedForwardSource::Moe(moe) => Some(moe),
            FeedForwardSource::Dense(_) | FeedForwardSource::None => None,
        }
    }
}

impl AttentionSource {
    fn vectors(&self) -> Vec<&Tensor> {
        match self {
            AttentionSource::Grouped { norms, sinks, bias, .. } => {
                norms.iter().flatten().chain(sinks).chain(bias).collect()
            }
            AttentionSource::Latent { query_latent, latent_norm, .. } => {
                query_latent.iter().map(|(_, norm)| norm).chain([latent_norm]).collect()
            }
            AttentionSource::GatedDelta { kernels, log_rates, dt_bias, norm, .. } => {
                kernels.iter().chain([log_rates, dt_bias, norm]).collect()
            }
            AttentionSource::ShortConvolution { kernel, bias, .. } => {
                [kernel].into_iter().chain(bias).collect()
            }
            AttentionSource::Mamba2 { kernel, kernel_bias, log_rates, dt_bias, skip, norm, .. } => {
                [kernel, log_rates, dt_bias, skip, norm].into_iter().chain(kernel_bias).collect()
            }
            AttentionSource::Mamba { kernel, kernel_bias, norms, log_rates, skip, .. } => {
                [kernel, log_rates, skip].into_iter().chain(norms).chain(kernel_bias).collect()
            }
            AttentionSource::None => Vec::new(),
        }
    }

    fn linears(&self) -> Vec<&LinearSource> {
        match self {
            AttentionSource::Grouped { query, key, value, gate, output, .. } => {
                [query, key].into_iter().chain(value).chain(gate).chain([output]).collect()
            }
            AttentionSource::Latent { query, query_latent, latent, expand, output, .. } => {
                let down = query_latent.iter().map(|(down, _)| down);
                [query, latent, expand, output].into_iter().chain(down).collect()
            }
            AttentionSource::GatedDelta { input, output, .. } => {
                input.linears().into_iter().chain([output]).collect()
            }
            AttentionSource::ShortConvolution { input, output, .. }
            | AttentionSource::Mamba2 { input, output, .. } => vec![input, output],
            AttentionSource::Mamba { input, parameters, step, output, .. } => {
                vec![input, parameters, step, output]
            }
            AttentionSource::None => Vec::new(),
        }
    }
}

impl NormSource {
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}
