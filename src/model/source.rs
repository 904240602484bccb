//! A layer's tensors, found and checked, still in their stored type.

use rayon::prelude::*;

use super::{Error, Result};
use crate::architecture::{
    Architecture, AttentionSpec, FeedForwardSpec, LatentAttention, MoeProfile, MoeSpec, Names, Profile,
    Projection, QkNorm, RouterSpec,
};
use crate::backend::{Expert, Matrix, Mlp, RouterRule};
use crate::checkpoint::{Checkpoint, Error as CheckpointError, ExpertForm, LayerEntry, Tensor};

/// The tensors of one decoder layer.
#[derive(Clone, Debug)]
pub struct LayerSource {
    /// 0-based layer.
    pub layer: usize,
    /// Norm before the attention.
    pub input_norm: Tensor,
    /// Norm before the feed-forward part.
    pub post_attention_norm: Tensor,
    /// The attention's parameters, in the order in which [`super::Layer`] takes them.
    pub attention: AttentionSource,
    /// The feed-forward part.
    pub feed_forward: FeedForwardSource,
}

/// A linear map with an optional bias.
#[derive(Clone, Debug)]
pub struct LinearSource {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

/// The attention's tensors.
#[derive(Clone, Debug)]
pub enum AttentionSource {
    /// Multi-head or grouped-query attention.
    Grouped {
        /// Query, key and value projections.
        qkv: [LinearSource; 3],
        /// Norms of queries and keys.
        norms: Option<[Tensor; 2]>,
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
}

/// The feed-forward part's tensors.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub enum FeedForwardSource {
    /// A dense MLP.
    Dense(Mlp<LinearSource>),
    /// Router and experts.
    Moe(MoeSource),
}

/// Router and experts of a layer.
#[derive(Clone, Debug)]
pub struct MoeSource {
    /// Router weight, `[experts, hidden]`, one row per entry of `experts`.
    pub router: Tensor,
    /// Routing rule.
    pub spec: RouterSpec,
    /// The experts.
    pub experts: Vec<Expert<Tensor>>,
    /// Number of each expert in the original model.
    pub numbers: Vec<usize>,
    /// Experts of the original model.
    pub original_experts: usize,
    /// The shared expert and its scalar gate.
    pub shared: Option<(Mlp<LinearSource>, Option<Tensor>)>,
}

impl MoeSource {
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
        let finite = source.tensors().into_par_iter().try_for_each(Tensor::check_finite);
        finite.map_err(|source| Error::Layer { layer: l, source })?;
        Ok(source)
    }

    /// Finds the tensors of layer `l` and checks shapes and types; reads no weights.
    ///
    /// # Errors
    /// Names the layer and the tensor.
    pub fn locate(checkpoint: &Checkpoint, architecture: &Architecture, l: usize) -> Result<Self> {
        let finder = Finder { checkpoint, architecture, l };
        let source = finder.layer()?;
        source.tensors().into_iter().try_for_each(Tensor::check_float).map_err(|e| finder.error(e))?;
        Ok(source)
    }

    /// Every tensor of the layer.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut all = vec![&self.input_norm, &self.post_attention_norm];
        match &self.attention {
            AttentionSource::Grouped { qkv, norms, output } => {
                all.extend(qkv.iter().chain([output]).flat_map(LinearSource::tensors));
                all.extend(norms.iter().flatten());
            }
            AttentionSource::Latent { query, query_latent, latent, latent_norm, expand, output } => {
                all.extend([query, latent, expand, output].into_iter().flat_map(LinearSource::tensors));
                all.push(latent_norm);
                if let Some((down, norm)) = query_latent {
                    all.extend(down.tensors());
                    all.push(norm);
                }
            }
        }
        match &self.feed_forward {
            FeedForwardSource::Dense(mlp) => {
                all.extend(mlp.matrices().into_iter().flat_map(LinearSource::tensors));
            }
            FeedForwardSource::Moe(moe) => {
                all.push(&moe.router);
                all.extend(moe.experts.iter().flat_map(Expert::parts));
                if let Some((mlp, gate)) = &moe.shared {
                    all.extend(mlp.matrices().into_iter().flat_map(LinearSource::tensors));
                    all.extend(gate);
                }
            }
        }
        all
    }

    /// Lets the operating system drop the layer's pages.
    pub fn release(&self) {
        self.tensors().into_iter().for_each(Tensor::release);
    }

    /// The MoE part, if the layer has one.
    pub fn moe(&self) -> Option<&MoeSource> {
        match &self.feed_forward {
            FeedForwardSource::Moe(moe) => Some(moe),
            FeedForwardSource::Dense(_) => None,
        }
    }
}

impl LinearSource {
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

/// Finds tensors of one layer.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    architecture: &'a Architecture,
    l: usize,
}

impl Finder<'_> {
    fn error(&self, source: CheckpointError) -> Error {
        Error::Layer { layer: self.l, source }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(name).map_err(|e| self.error(e))?;
        tensor.check_shape(shape).map_err(|e| self.error(e))?;
        Ok(tensor)
    }

    /// `{prefix}.weight` and, where there is one, `{prefix}.bias`.
    fn linear(&self, prefix: &str, out: usize, input: usize, bias: bool) -> Result<LinearSource> {
        Ok(LinearSource {
            weight: self.tensor(&format!("{prefix}.weight"), &[out, input])?,
            bias: bias.then(|| self.tensor(&format!("{prefix}.bias"), &[out])).transpose()?,
        })
    }

    fn attention_linear(&self, name: &str, out: usize, input: usize, bias: bool) -> Result<LinearSource> {
        self.linear(&Names::attention(self.l, name), out, input, bias)
    }

    fn layer(&self) -> Result<LayerSource> {
        let (l, d) = (self.l, self.architecture.hidden_size);
        let spec = &self.architecture.layers[l];
        Ok(LayerSource {
            layer: l,
            input_norm: self.tensor(&Names::input_norm(l), &[d])?,
            post_attention_norm: self.tensor(&Names::post_attention_norm(l), &[d])?,
            attention: self.attention(&spec.attention)?,
            feed_forward: match &spec.feed_forward {
                FeedForwardSpec::Dense { width } => {
                    FeedForwardSource::Dense(self.mlp(*width, |p| Names::dense(l, p))?)
                }
                FeedForwardSpec::Moe(moe) => FeedForwardSource::Moe(self.moe(moe)?),
            },
        })
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<AttentionSource> {
        let d = self.architecture.hidden_size;
        match spec {
            AttentionSpec::Grouped(a) => {
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                let norm = |name: &str, whole: usize| {
                    let width = if a.qk_norm == QkNorm::Whole { whole } else { a.head_dim };
                    self.tensor(&Names::attention(self.l, name), &[width])
                };
                Ok(AttentionSource::Grouped {
                    qkv: [
                        self.attention_linear("q_proj", q, d, a.qkv_bias)?,
                        self.attention_linear("k_proj", kv, d, a.qkv_bias)?,
                        self.attention_linear("v_proj", kv, d, a.qkv_bias)?,
                    ],
                    norms: match a.qk_norm {
                        QkNorm::None => None,
                        _ => Some([norm("q_norm.weight", q)?, norm("k_norm.weight", kv)?]),
                    },
                    output: self.attention_linear("o_proj", d, q, a.output_bias)?,
                })
            }
            AttentionSpec::Latent(a) => self.latent_attention(a, d),
        }
    }

    fn latent_attention(&self, a: &LatentAttention, d: usize) -> Result<AttentionSource> {
        let q = a.heads * (a.nope_dim + a.rope_dim);
        let (query, query_latent) = match a.query_rank {
            None => (self.attention_linear("q_proj", q, d, false)?, None),
            Some(rank) => {
                let down = self.attention_linear("q_a_proj", rank, d, a.bias)?;
                let norm = self.tensor(&Names::attention(self.l, "q_a_layernorm.weight"), &[rank])?;
                (self.attention_linear("q_b_proj", q, rank, false)?, Some((down, norm)))
            }
        };
        let expanded = a.heads * (a.nope_dim + a.value_dim);
        Ok(AttentionSource::Latent {
            query,
            query_latent,
            latent: self.attention_linear("kv_a_proj_with_mqa", a.latent_dim + a.rope_dim, d, a.bias)?,
            latent_norm: self.tensor(&Names::attention(self.l, "kv_a_layernorm.weight"), &[a.latent_dim])?,
            expand: self.attention_linear("kv_b_proj", expanded, a.latent_dim, false)?,
            output: self.attention_linear("o_proj", d, a.heads * a.value_dim, a.bias)?,
        })
    }

    fn mlp(&self, width: usize, name: impl Fn(Projection) -> String) -> Result<Mlp<LinearSource>> {
        let (d, bias) = (self.architecture.hidden_size, self.architecture.mlp_bias);
        Ok(Mlp {
            gate: self.linear(&name(Projection::Gate), width, d, bias)?,
            up: self.linear(&name(Projection::Up), width, d, bias)?,
            down: self.linear(&name(Projection::Down), d, width, bias)?,
        })
    }

    fn moe(&self, moe: &MoeSpec) -> Result<MoeSource> {
        let (l, d) = (self.l, self.architecture.hidden_size);
        let names = &self.architecture.names;
        let entry = self.checkpoint.manifest().and_then(|m| m.layers.iter().find(|entry| entry.layer == l));
        let mut spec = moe.router.clone();
        let (experts, numbers) = match entry {
            Some(entry) => {
                spec.top_k = entry.top_k;
                let numbers: Vec<usize> = entry.experts.iter().map(|e| e.expert).collect();
                (self.listed_experts(entry, moe, &numbers)?, numbers)
            }
            None => (self.all_experts(moe)?, (0..moe.experts).collect()),
        };
        let router = [names.router(l), Names::fused_router(l)];
        let router = router.iter().find(|name| self.checkpoint.get(name).is_some()).unwrap_or(&router[0]);
        let shared = match moe.shared {
            None => None,
            Some(shared) => {
                let gate = shared.gated.then(|| self.tensor(&names.shared_gate(l), &[1, d])).transpose()?;
                Some((self.mlp(shared.width, |p| names.shared(l, p))?, gate))
            }
        };
        let source = MoeSource {
            router: self.tensor(router, &[experts.len(), d])?,
            spec,
            experts,
            numbers,
            original_experts: moe.experts,
            shared,
        };
        source.check_choices(l)?;
        Ok(source)
    }

    /// The experts of a stock checkpoint: one tensor per matrix, or all experts of a layer fused into two.
    fn all_experts(&self, moe: &MoeSpec) -> Result<Vec<Expert<Tensor>>> {
        let (l, d, width) = (self.l, self.architecture.hidden_size, moe.width);
        if self.checkpoint.get(&Names::fused_gate_up(l)).is_none() {
            return (0..moe.experts).map(|e| self.dense_expert(e, width)).collect();
        }
        let gate_up = self.tensor(&Names::fused_gate_up(l), &[moe.experts, 2 * width, d])?;
        let down = self.tensor(&Names::fused_down(l), &[moe.experts, d, width])?;
        let named = |tensor: Tensor, e: usize, p: Projection| {
            Matrix::Dense(tensor.renamed(format!("{}.weight", self.architecture.names.expert(l, e, p))))
        };
        Ok((0..moe.experts)
            .map(|e| {
                Expert::Mlp(Mlp {
                    gate: named(gate_up.entry(e).rows(0, width), e, Projection::Gate),
                    up: named(gate_up.entry(e).rows(width, width), e, Projection::Up),
                    down: named(down.entry(e), e, Projection::Down),
                })
            })
            .collect())
    }

    fn dense_expert(&self, e: usize, width: usize) -> Result<Expert<Tensor>> {
        self.expert(e, width, [None; 3])
    }

    /// The experts of a checkpoint in the moepress layout.
    fn listed_experts(
        &self,
        entry: &LayerEntry,
        moe: &MoeSpec,
        numbers: &[usize],
    ) -> Result<Vec<Expert<Tensor>>> {
        let expert = |e: usize, form: &ExpertForm| match form {
            ExpertForm::Dense => self.dense_expert(e, moe.width),
            ExpertForm::LowRank { rank } => self.expert(e, moe.width, [rank.gate, rank.up, rank.down]),
            ExpertForm::Alias { of } => match numbers.iter().position(|n| n == of) {
                Some(slot) => Ok(Expert::Alias(slot)),
                None => Err(Error::Inconsistent {
                    layer: self.l,
                    what: format!("expert {e} is an alias of nothing"),
                }),
            },
            ExpertForm::Constant => {
                let name = format!("{}constant", self.architecture.names.expert_prefix(self.l, e));
                Ok(Expert::Constant(self.tensor(&name, &[self.architecture.hidden_size])?))
            }
        };
        entry.experts.iter().map(|e| expert(e.expert, &e.form)).collect()
    }

    /// Expert `e` of intermediate width `width`; matrices with a rank are stored as factors.
    fn expert(&self, e: usize, width: usize, ranks: [Option<usize>; 3]) -> Result<Expert<Tensor>> {
        let d = self.architecture.hidden_size;
        let matrix = |p: Projection| -> Result<_> {
            let name = self.architecture.names.expert(self.l, e, p);
            let (out, input) = if p == Projection::Down { (d, width) } else { (width, d) };
            Ok(match ranks[p as usize] {
                None => Matrix::Dense(self.tensor(&format!("{name}.weight"), &[out, input])?),
                Some(rank) => Matrix::LowRank {
                    u: self.tensor(&format!("{name}.u"), &[out, rank])?,
                    v: self.tensor(&format!("{name}.v"), &[rank, input])?,
                },
            })
        };
        Ok(Expert::Mlp(Mlp {
            gate: matrix(Projection::Gate)?,
            up: matrix(Projection::Up)?,
            down: matrix(Projection::Down)?,
        }))
    }
}

/// Sizes of a checkpoint, for planning.
///
/// # Errors
/// What is wrong with the first layer that does not fit its config.
pub fn profile(checkpoint: &Checkpoint, architecture: &Architecture) -> Result<Profile> {
    let mut moe_layers = Vec::new();
    for (l, moe) in architecture.moe_layers() {
        let source = Finder { checkpoint, architecture, l }.moe(moe)?;
        let sizes = |tensors: &[&Tensor]| {
            let parameters: u64 = tensors.iter().map(|t| t.len() as u64).sum();
            let bytes: u64 = tensors.iter().map(|t| t.bytes().len() as u64).sum();
            (parameters, bytes)
        };
        let stored: Vec<&Tensor> = source.experts.iter().flat_map(Expert::parts).collect();
        let n = source.experts.len() as u64;
        let (expert_parameters, expert_bytes) = sizes(&stored);
        let (router_parameters, router_bytes) = sizes(&[&source.router]);
        moe_layers.push(MoeProfile {
            layer: l,
            experts: source.experts.len(),
            top_k: source.spec.top_k,
            width: moe.width,
            groups: source.spec.groups.map_or(1, |g| g.count),
            top_groups: source.spec.groups.map_or(1, |g| g.kept),
            expert_parameters: expert_parameters / n,
            expert_bytes: expert_bytes / n,
            router_parameters: router_parameters / n,
            router_bytes: router_bytes / n,
        });
    }
    Ok(Profile {
        family: architecture.family.into(),
        identity: checkpoint.identity(),
        layers: architecture.layers.len(),
        hidden_size: architecture.hidden_size,
        parameters: checkpoint.tensors().map(|t| t.len() as u64).sum(),
        bytes: checkpoint.bytes(),
        header_bytes: checkpoint.header_bytes(),
        tensors: checkpoint.tensor_count() as u64,
        moe_layers,
    })
}
