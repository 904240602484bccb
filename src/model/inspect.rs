//! What a checkpoint is, without reading a weight: every tensor is found and its shape checked, none is loaded.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Error, LayerSource, MoeSource, Result, open_architecture};
use crate::architecture::{
    Architecture, AttentionSpec, FeedForwardSpec, GatedDelta, GroupLimit, LayerSpec, Mamba, Mamba2,
    OutputGate, RouterSpec, Scoring, ShortConvolution, Skip, Span, WeightRule,
};
use crate::backend::{Expert, StoredExpert};
use crate::checkpoint::{Checkpoint, Dtype, Tensor};

/// A checkpoint in numbers. Serialises to the JSON that `moepress inspect --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// Family, as in `model_type`.
    pub family: String,
    /// `hf` for a stock checkpoint, `moepress` where `moepress.json` describes the experts.
    pub layout: &'static str,
    /// Layers, dense ones included; those of an encoder first.
    pub layers: usize,
    /// How many of them form an encoder, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_layers: Option<usize>,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that the model's positions cover; `None` where no layer has positions.
    pub max_positions: Option<usize>,
    /// Self-attention; `None` where no layer has any.
    pub attention: Option<AttentionSummary>,
    /// What takes its place in other layers, where there are such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_place_of_attention: Option<StateSummary>,
    /// Layers that have one of the two halves alone, where there are such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_layers: Option<HalfLayers>,
    /// The routing rule; `None` where no layer has experts.
    pub router: Option<RouterSummary>,
    /// The layers that have a router, in order.
    pub moe_layers: Vec<MoeSummary>,
    /// Parameters by stored type.
    pub dtypes: BTreeMap<String, u64>,
    /// Numbers of parameters.
    pub parameters: ParameterCounts,
    /// Stored bytes.
    pub bytes: ByteCounts,
}

/// The kind and size of the attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AttentionSummary {
    /// Multi-head or grouped-query attention.
    Grouped {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Sliding window, where any layer has one.
        window: Option<usize>,
        /// Number of layers with a sliding window.
        sliding_layers: usize,
        /// Tokens of a chunk, where any layer attends within chunks.
        #[serde(skip_serializing_if = "Option::is_none")]
        chunk: Option<usize>,
        /// Of how many attentions the heads are, where these are mixed as experts are.
        #[serde(skip_serializing_if = "Option::is_none")]
        experts: Option<usize>,
    },
    /// Multi-head latent attention.
    Latent {
        /// Heads.
        heads: usize,
        /// Width of the latent that keys and values are expanded from.
        latent_dim: usize,
        /// Rank of the query projection; `None` for one full matrix.
        query_rank: Option<usize>,
        /// Width of a query head, rotated part included.
        query_dim: usize,
        /// Width of a value head.
        value_dim: usize,
    },
}

/// The kind and size of what takes the place of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StateSummary {
    /// A gated delta network.
    GatedDelta {
        /// Number of layers that have it.
        layers: usize,
        /// Query and key heads.
        key_heads: usize,
        /// Value heads.
        value_heads: usize,
        /// Width of a query or key head.
        key_dim: usize,
        /// Width of a value head.
        value_dim: usize,
        /// Tokens that the convolution sees.
        kernel: usize,
    },
    /// A short convolution between two gates.
    ShortConvolution {
        /// Number of layers that have it.
        layers: usize,
        /// Tokens that the convolution sees.
        kernel: usize,
    },
    /// A state space model with a decay for every element of its state.
    Mamba {
        /// Number of layers that have it.
        layers: usize,
        /// Channels.
        width: usize,
        /// Width of B and of C.
        state_dim: usize,
        /// Tokens that the convolution sees.
        kernel: usize,
    },
    /// A state space model with one decay per head.
    Mamba2 {
        /// Number of layers that have it.
        layers: usize,
        /// Heads.
        heads: usize,
        /// Width of a head.
        head_dim: usize,
        /// Width of B and of C.
        state_dim: usize,
        /// Groups of heads that share these.
        groups: usize,
        /// Tokens that the convolution sees.
        kernel: usize,
    },
}

/// Numbers of layers that have one of the two halves alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HalfLayers {
    /// Without a feed-forward part.
    pub attention: usize,
    /// Without attention or what takes its place.
    pub feed_forward: usize,
}

/// The routing rule that the MoE layers share.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouterSummary {
    /// How logits become scores.
    pub scores: &'static str,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub renormalised: bool,
    /// Factor of the combine weights.
    pub scale: f32,
    /// Number of groups and groups kept, where routing is group-limited.
    pub groups: Option<[usize; 2]>,
}

/// One MoE layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MoeSummary {
    /// 0-based decoder layer.
    pub layer: usize,
    /// Experts that the router can choose.
    pub experts: usize,
    /// Experts that `config.json` speaks of.
    pub original_experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// When some of those are left out, in layers that skip experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip: Option<Skip>,
    /// Most tokens of a window that an expert takes, where that is limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<usize>,
    /// Intermediate width of a routed expert, as `config.json` says it.
    pub width: usize,
    /// Intermediate width of the shared expert, if there is one.
    pub shared_width: Option<usize>,
    /// Number of experts of each form.
    pub forms: BTreeMap<&'static str, usize>,
    /// Smallest and largest width of the routed experts that have matrices.
    pub widths: Option<[usize; 2]>,
    /// Smallest and largest rank of a matrix stored as two factors.
    pub ranks: Option<[usize; 2]>,
    /// Parameters of the routed experts.
    pub parameters: u64,
    /// Stored bytes of the routed experts.
    pub bytes: u64,
    /// Parameters of those that a token does not choose, on average over equally likely experts.
    #[serde(skip)]
    pub idle_parameters: u64,
}

/// Numbers of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ParameterCounts {
    /// Of the whole checkpoint.
    pub total: u64,
    /// Of all routed experts.
    pub routed_experts: u64,
    /// Touched by one token: everything but the routed experts that it does not choose. Where the experts of a layer
    /// differ in size, a chosen one counts as their mean.
    pub active: u64,
}

/// Stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ByteCounts {
    /// Of all tensors.
    pub total: u64,
    /// Of all routed experts.
    pub routed_experts: u64,
    /// Of the safetensors headers, which `total` leaves out.
    pub headers: u64,
}

/// Describes a checkpoint. Finds every tensor and checks its shape and type, but reads no weights.
///
/// # Errors
/// Names what is wrong with the config, and the first layer and tensor that do not fit it.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Inspection> {
    let architecture = open_architecture(checkpoint)?;
    let table = [architecture.vocabulary, architecture.hidden_size];
    let check = |name: &str, shape: &[usize]| {
        let checked = checkpoint.tensor(name).and_then(|tensor| tensor.check_shape(shape));
        checked.map_err(|e| Error::from(e).of(checkpoint))
    };
    check(&architecture.names.embedding(), &table)?;
    check(&architecture.head_table(), &table)?;
    check(&format!("{}.weight", architecture.names.final_norm()), &[architecture.hidden_size])?;
    let mut moe_layers = Vec::new();
    for l in 0..architecture.layers.len() {
        let source = LayerSource::locate(checkpoint, &architecture, l)?;
        if let (Some(source), Some(spec)) = (source.moe(), architecture.moe(l)) {
            moe_layers.push(MoeSummary::new(l, spec.width, spec.shared.map(|s| s.width), source));
        }
    }
    let mut dtypes = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        match tensor.parameters() {
            0 => {}
            n => *dtypes.entry(dtype_name(tensor)).or_default() += n,
        }
    }
    let total = dtypes.values().sum();
    Ok(Inspection {
        family: architecture.family.into(),
        layout: if checkpoint.manifest().is_some() { "moepress" } else { "hf" },
        layers: architecture.layers.len(),
        encoder_layers: (architecture.encoder_layers > 0).then_some(architecture.encoder_layers),
        hidden_size: architecture.hidden_size,
        vocabulary: architecture.vocabulary,
        max_positions: Some(architecture.max_positions).filter(|most| *most < usize::MAX),
        attention: AttentionSummary::new(&architecture),
        in_place_of_attention: StateSummary::new(&architecture),
        half_layers: HalfLayers::new(&architecture),
        router: architecture.moe_layers().next().map(|(_, moe)| RouterSummary::new(&moe.router)),
        dtypes,
        parameters: ParameterCounts {
            total,
            routed_experts: moe_layers.iter().map(|l| l.parameters).sum(),
            active: total - moe_layers.iter().map(|l| l.idle_parameters).sum::<u64>(),
        },
        bytes: ByteCounts {
            total: checkpoint.bytes(),
            routed_experts: moe_layers.iter().map(|l| l.bytes).sum(),
            headers: checkpoint.header_bytes(),
        },
        moe_layers,
    })
}

impl AttentionSummary {
    fn new(architecture: &Architecture) -> Option<Self> {
        let spans = || {
            architecture.layers.iter().filter_map(|layer| match &layer.attention {
                AttentionSpec::Grouped(a) => Some(a.span),
                _ => None,
            })
        };
        let windows = || spans().filter_map(|s| if let Span::Window(w) = s { Some(w) } else { None });
        let mut chunks = spans().filter_map(|s| if let Span::Chunk(c) = s { Some(c) } else { None });
        architecture.layers.iter().find_map(|layer| match &layer.attention {
            AttentionSpec::Grouped(a) => Some(AttentionSummary::Grouped {
                heads: a.heads,
                kv_heads: a.kv_heads,
                head_dim: a.head_dim,
                window: windows().next(),
                sliding_layers: windows().count(),
                chunk: chunks.next(),
                experts: match a.output_gate {
                    OutputGate::Experts { count, .. } => Some(count),
                    _ => None,
                },
            }),
            AttentionSpec::Latent(a) => Some(AttentionSummary::Latent {
                heads: a.heads,
                latent_dim: a.latent_dim,
                query_rank: a.query_rank,
                query_dim: a.nope_dim + a.rope_dim,
                value_dim: a.value_dim,
            }),
            AttentionSpec::GatedDelta(_)
            | AttentionSpec::ShortConvolution(_)
            | AttentionSpec::Mamba(_)
            | AttentionSpec::Mamba2(_)
            | AttentionSpec::None => None,
        })
    }
}

impl StateSummary {
    fn new(architecture: &Architecture) -> Option<Self> {
        let specs = || architecture.layers.iter().map(|layer| &layer.attention);
        let mixes = |spec: &&AttentionSpec| !spec.is_attention() && !matches!(spec, AttentionSpec::None);
        let layers = specs().filter(mixes).count();
        specs().find_map(|spec| match *spec {
            AttentionSpec::GatedDelta(GatedDelta {
                key_heads,
                value_heads,
                key_dim,
                value_dim,
                kernel,
                ..
            }) => {
                Some(StateSummary::GatedDelta { layers, key_heads, value_heads, key_dim, value_dim, kernel })
            }
            AttentionSpec::ShortConvolution(ShortConvolution { kernel, .. }) => {
                Some(StateSummary::ShortConvolution { layers, kernel })
            }
            AttentionSpec::Mamba(Mamba { width, state_dim, kernel, .. }) => {
                Some(StateSummary::Mamba { layers, width, state_dim, kernel })
            }
            AttentionSpec::Mamba2(Mamba2 { heads, head_dim, state_dim, groups, kernel, .. }) => {
                Some(StateSummary::Mamba2 { layers, heads, head_dim, state_dim, groups, kernel })
            }
            AttentionSpec::Grouped(_) | AttentionSpec::Latent(_) | AttentionSpec::None => None,
        })
    }
}

impl HalfLayers {
    fn new(architecture: &Architecture) -> Option<Self> {
        let count = |is: fn(&&LayerSpec) -> bool| architecture.layers.iter().filter(is).count();
        let attention = count(|layer| matches!(layer.feed_forward, FeedForwardSpec::None));
        let feed_forward = count(|layer| matches!(layer.attention, AttentionSpec::None));
        (attention + feed_forward > 0).then_some(HalfLayers { attention, feed_forward })
    }
}

impl RouterSummary {
    fn new(spec: &RouterSpec) -> Self {
        let (renormalised, scale) = match spec.weights {
            WeightRule::Scaled(scale) => (false, scale),
            WeightRule::Renormalised { scale, .. } => (true, scale),
        };
        let scores = match spec.scoring {
            Scoring::Softmax => "softmax",
            Scoring::Sigmoid => "sigmoid",
            Scoring::SparseMixer { .. } => "sparsemixer",
        };
        let groups = spec.groups.map(|GroupLimit { count, kept, .. }| [count, kept]);
        RouterSummary { scores, renormalised, scale, groups }
    }
}

impl MoeSummary {
    fn new(layer: usize, width: usize, shared_width: Option<usize>, source: &MoeSource) -> Self {
        let mut forms = BTreeMap::new();
        for expert in &source.experts {
            *forms.entry(expert.form()).or_default() += 1;
        }
        let widths = source.experts.iter().filter(|e| matches!(e, Expert::Mlp(_))).map(StoredExpert::width);
        MoeSummary {
            layer,
            experts: source.experts.len(),
            original_experts: source.original_experts,
            top_k: source.spec.top_k,
            skip: source.spec.skip,
            capacity: source.capacity,
            width,
            shared_width,
            forms,
            widths: range(widths),
            ranks: range(source.experts.iter().flat_map(ranks)),
            parameters: source.routed_parameters(),
            bytes: source.routed_bytes(),
            idle_parameters: idle_parameters(source),
        }
    }
}

/// Parameters of routed experts that a token does not touch, on average over equally likely experts. An alias touches
/// what it stands for.
fn idle_parameters(source: &MoeSource) -> u64 {
    let touched = |expert: &StoredExpert| match expert {
        Expert::Alias(of) => source.experts[*of].parameters(),
        own => own.parameters(),
    };
    let all = source.experts.iter().map(touched).sum::<u64>();
    let base = source.base.iter().flatten().map(|w| w.len() as u64).sum::<u64>();
    let active = base + all * source.spec.top_k as u64 / source.experts.len() as u64;
    source.routed_parameters().saturating_sub(active)
}

/// Stored type of a tensor's numbers.
fn dtype_name(tensor: &Tensor) -> String {
    match tensor.dtype() {
        Dtype::U8 if tensor.name().ends_with("_blocks") => "MXFP4".into(),
        Dtype::I32 if tensor.name().ends_with(".weight_packed") => "INT4".into(),
        dtype => format!("{dtype:?}"),
    }
}

/// Smallest and largest.
fn range(values: impl Iterator<Item = usize>) -> Option<[usize; 2]> {
    values.fold(None, |range, value| match range {
        None => Some([value, value]),
        Some([least, most]) => Some([value.min(least), value.max(most)]),
    })
}

/// Ranks of the factored matrices of an expert.
fn ranks(expert: &StoredExpert) -> Vec<usize> {
    let Expert::Mlp(mlp) = expert else { return Vec::new() };
    mlp.maps().filter_map(|map| map.weight.factors()).map(|(_, v)| v.rows()).collect()
}
