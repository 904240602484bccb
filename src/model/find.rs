//! Finding the tensors of a layer, whichever way the checkpoint stores them.

use super::source::{AttentionSource, DeltaInput, FeedForwardSource, LayerSource, LinearSource, NormSource};
use super::{Error, Result};
use crate::architecture::{
    Architecture, AttentionSpec, DeltaProjections, FeedForwardSpec, GatedDelta, GroupedAttention,
    LatentAttention, NormKind, OutputGate, Packing, Projection, QkNorm, ShortConvolution,
};
use crate::backend::Mlp;
use crate::checkpoint::{
    Checkpoint, Dtype, Error as CheckpointError, Result as CheckpointResult, Stride, Tensor, Weight,
};

/// Finds tensors of one layer.
pub(super) struct Finder<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) architecture: &'a Architecture,
    pub(super) l: usize,
}

impl Finder<'_> {
    pub(super) fn error(&self, source: CheckpointError) -> Error {
        Error::Layer { layer: self.l, source }
    }

    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(name).map_err(|e| self.error(e))?;
        tensor.check_shape(shape).map_err(|e| self.error(e))?;
        Ok(tensor)
    }

    /// A tensor of plain numbers.
    pub(super) fn numbers(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.tensor(name, shape)?;
        tensor.check_float().map_err(|e| self.error(e))?;
        Ok(tensor)
    }

    /// The first of two names that the checkpoint has, with what is behind the names of packed weights too; the first of all
    /// where it has neither.
    pub(super) fn either<'n>(&self, names: &'n [String; 2], suffix: &str) -> &'n str {
        let present = |name: &&String| {
            ["", "_packed"].iter().any(|kind| self.checkpoint.get(&format!("{name}{suffix}{kind}")).is_some())
        };
        names.iter().find(present).unwrap_or(&names[0])
    }

    /// The matrix `[out, input]` stored as `{stem}.weight`, with `{stem}.weight_scale_inv` or `weight_scale` where it is FP8,
    /// as `{stem}.weight_blocks` and `{stem}.weight_scales` where it is MXFP4, or as `{stem}.weight_packed` and
    /// `{stem}.weight_scale` where it is of four-bit integers.
    pub(super) fn weight(&self, stem: &str, out: usize, input: usize) -> Result<Weight> {
        let named = |what: &str| format!("{stem}.weight{what}");
        let weight = if let Some(blocks) = self.checkpoint.get(&named("_blocks")) {
            let scales = self.checkpoint.tensor(&named("_scales")).map_err(|e| self.error(e))?;
            Weight::mxfp4(blocks.clone(), scales, Stride::ALL, out)
        } else if let Some(codes) = self.checkpoint.get(&named("_packed")) {
            let scales = self.checkpoint.tensor(&named("_scale")).map_err(|e| self.error(e))?;
            let group = match self.architecture.packing {
                Some(Packing::Int4 { group: Some(group) }) => group,
                _ => input,
            };
            let shape = self.checkpoint.get(&named("_shape")).cloned();
            Weight::int4(codes.clone(), scales, [out, input], group, shape)
        } else {
            let tensor = self.tensor(&named(""), &[out, input])?;
            if tensor.dtype() == Dtype::F8_E4M3 {
                self.fp8(stem, tensor, [out, input])
            } else {
                Weight::plain(tensor)
            }
        };
        let weight = weight.map_err(|e| self.error(e))?;
        weight.check_shape(out, input).map_err(|e| self.error(e))?;
        Ok(weight)
    }

    /// The matrix of FP8 `values` with its scales, and that of its inputs, where there is one.
    fn fp8(&self, stem: &str, values: Tensor, [out, input]: [usize; 2]) -> CheckpointResult<Weight> {
        let names = ["_scale_inv", "_scale"].map(|what| format!("{stem}.weight{what}"));
        let scales = self.checkpoint.tensor(self.either(&names, ""))?;
        let block = match (self.declared_fp8_block(), scales.len()) {
            (Some(block), _) => block,
            (None, 1) => [out, input],
            (None, count) if count == out && [&[out][..], &[out, 1]].contains(&scales.shape()) => [1, input],
            (None, _) => Packing::USUAL_FP8_BLOCK,
        };
        let weight = Weight::fp8(values, scales, block)?;
        let inputs = ["input_scale", "activation_scale"].map(|what| format!("{stem}.{what}"));
        Ok(match self.checkpoint.get(self.either(&inputs, "")) {
            None => weight,
            Some(scale) => weight.with_input_scale(scale.clone()),
        })
    }

    pub(super) fn declared_fp8_block(&self) -> Option<[usize; 2]> {
        match self.architecture.packing {
            Some(Packing::Fp8 { block }) => block,
            _ => None,
        }
    }

    /// Rows and columns that share a scale in FP8 matrices that are stored together.
    pub(super) fn fp8_block(&self) -> [usize; 2] {
        self.declared_fp8_block().unwrap_or(Packing::USUAL_FP8_BLOCK)
    }

    /// `{prefix}.weight` and, where there is one, `{prefix}.bias`.
    pub(super) fn linear(&self, prefix: &str, out: usize, input: usize, bias: bool) -> Result<LinearSource> {
        let weight = self.weight(prefix, out, input)?;
        Ok(LinearSource { weight, bias: self.bias(prefix, out, bias)? })
    }

    /// `{prefix}.bias`, where there is one.
    pub(super) fn bias(&self, prefix: &str, out: usize, bias: bool) -> Result<Option<Tensor>> {
        bias.then(|| self.numbers(&format!("{prefix}.bias"), &[out])).transpose()
    }

    fn attention_linear(&self, name: &str, out: usize, input: usize, bias: bool) -> Result<LinearSource> {
        self.linear(&self.architecture.names.attention(self.l, name), out, input, bias)
    }

    fn attention_vector(&self, name: &str, length: usize) -> Result<Tensor> {
        self.numbers(&self.architecture.names.attention(self.l, name), &[length])
    }

    pub(super) fn norm(&self, prefix: &str) -> Result<NormSource> {
        let Architecture { hidden_size, norm, .. } = *self.architecture;
        Ok(NormSource {
            weight: self.numbers(&format!("{prefix}.weight"), &[hidden_size])?,
            bias: match norm {
                NormKind::Rms => None,
                NormKind::Layer { bias: true } => self.bias(prefix, hidden_size, true)?,
                NormKind::Layer { bias: false } => Some(no_bias(hidden_size)),
            },
        })
    }

    fn norm_where(&self, is_there: bool, prefix: &str) -> Result<Option<NormSource>> {
        is_there.then(|| self.norm(prefix)).transpose()
    }

    pub(super) fn layer(&self) -> Result<LayerSource> {
        let (l, names) = (self.l, &self.architecture.names);
        let spec = &self.architecture.layers[l];
        let placement = self.architecture.norm_placement;
        let has_experts = matches!(spec.feed_forward, FeedForwardSpec::Moe(_));
        let attends = !matches!(spec.attention, AttentionSpec::None);
        let feeds = !matches!(spec.feed_forward, FeedForwardSpec::None);
        let output_norms = names.feed_forward_output_norms(l);
        let output_norm = self.either(&output_norms, ".weight");
        let scale = || self.numbers(&names.layer_scale(l), &[1]);
        Ok(LayerSource {
            layer: l,
            input_norm: self.norm_where(attends && placement.is_before(), &names.input_norm(l))?,
            attention_output_norm: self
                .norm_where(attends && placement.is_behind_attention(), &names.attention_output_norm(l))?,
            post_attention_norm: self
                .norm_where(feeds && placement.is_before_feed_forward(), &names.post_attention_norm(l))?,
            feed_forward_output_norm: self
                .norm_where(feeds && placement.is_behind_feed_forward(has_experts), output_norm)?,
            scale: self.architecture.layer_scales.then(scale).transpose()?,
            attention: self.attention(&spec.attention)?,
            cross: match &spec.attention {
                AttentionSpec::Grouped(a) if a.cross => Some(self.cross_attention(a)?),
                _ => None,
            },
            encoder_norm: (l > 0 && l == self.architecture.encoder_layers)
                .then(|| self.norm(names.encoder_norm()))
                .transpose()?,
            feed_forward: match &spec.feed_forward {
                FeedForwardSpec::Dense { width } => {
                    let name = |p| self.either(&names.dense(l, p), ".weight").to_string();
                    FeedForwardSource::Dense(self.mlp(*width, name)?)
                }
                FeedForwardSpec::Moe(moe) => FeedForwardSource::Moe(self.moe(moe)?),
                FeedForwardSpec::None => FeedForwardSource::None,
            },
        })
    }

    fn attention(&self, spec: &AttentionSpec) -> Result<AttentionSource> {
        let d = self.architecture.hidden_size;
        match spec {
            AttentionSpec::Grouped(a) => {
                let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                let (values, names) = (a.value_dim, &self.architecture.names);
                let norm = |which: usize, whole: usize| {
                    let width = if a.qk_norm == QkNorm::Whole { whole } else { a.head_dim };
                    let name = self.architecture.names.qk_norms[which];
                    self.attention_vector(&format!("{name}.weight"), width)
                };
                let sinks = || {
                    let stored = names.sinks.map(|sinks| names.attention(self.l, sinks));
                    self.numbers(self.either(&stored, ""), &[a.heads])
                };
                let gate = match a.output_gate {
                    OutputGate::None | OutputGate::BehindQuery => None,
                    OutputGate::Separate => Some(("gate_proj", a.heads * values)),
                    OutputGate::Softplus { per_head: true } => Some(("g_proj", a.heads)),
                    OutputGate::Softplus { per_head: false } => Some(("g_proj", a.heads * values)),
                    OutputGate::Experts { count, .. } => Some(("router", count)),
                };
                let gated_q = if a.output_gate == OutputGate::BehindQuery { 2 * q } else { q };
                let (query, key, value) = self.qkv(a, [gated_q, kv, a.kv_heads * values])?;
                Ok(AttentionSource::Grouped {
                    query,
                    key,
                    value,
                    norms: match a.qk_norm {
                        QkNorm::None | QkNorm::Unweighted => None,
                        QkNorm::PerHead | QkNorm::PerHeadRotated | QkNorm::Whole => {
                            Some([norm(0, q)?, norm(1, kv)?])
                        }
                    },
                    sinks: a.sinks.then(sinks).transpose()?,
                    bias: match a.bias {
                        None => None,
                        Some(bias) => {
                            let name = self.architecture.names.relative_bias(self.l);
                            Some(self.numbers(&name, &[bias.buckets, a.heads])?)
                        }
                    },
                    gate: gate.map(|(name, out)| self.attention_linear(name, out, d, false)).transpose()?,
                    output: self.attention_linear(
                        names.attention_output,
                        d,
                        a.heads * values,
                        a.output_bias,
                    )?,
                })
            }
            AttentionSpec::Latent(a) => self.latent_attention(a, d),
            AttentionSpec::GatedDelta(delta) => self.gated_delta(*delta, d),
            AttentionSpec::ShortConvolution(convolution) => self.short_convolution(*convolution, d),
            AttentionSpec::Mamba(mamba) => self.mamba(*mamba, d),
            AttentionSpec::Mamba2(mamba) => self.mamba2(*mamba, d),
            AttentionSpec::None => Ok(AttentionSource::None),
        }
    }

    /// Projections to queries, keys and values of these widths, whichever way they are stored.
    fn qkv(
        &self,
        a: &GroupedAttention,
        [query, key, value]: [usize; 3],
    ) -> Result<(LinearSource, LinearSource, Option<LinearSource>)> {
        let (names, d) = (&self.architecture.names, self.architecture.hidden_size);
        let Some(fused) = names.fused_qkv else {
            let own = || self.attention_linear("v_proj", value, d, a.qkv_bias);
            return Ok((
                self.attention_linear("q_proj", query, d, a.qkv_bias)?,
                self.attention_linear("k_proj", key, d, a.qkv_bias)?,
                (!a.keys_as_values).then(own).transpose()?,
            ));
        };
        let fused = self.attention_linear(fused, query + key + value, d, a.qkv_bias)?;
        let rows = |first: usize, count: usize| {
            let weight = fused.weight.part(first, count).map_err(|e| self.error(e))?;
            let numbers: Vec<usize> = (first..first + count).collect();
            let bias = fused.bias.as_ref().map(|bias| bias.select_rows(&numbers));
            Ok::<_, Error>(LinearSource { weight, bias })
        };
        Ok((rows(0, query)?, rows(query, key)?, Some(rows(query + key, value)?)))
    }

    /// The attention to the encoder's output and the norm before it.
    fn cross_attention(&self, a: &GroupedAttention) -> Result<(NormSource, AttentionSource)> {
        let (l, names, d) = (self.l, &self.architecture.names, self.architecture.hidden_size);
        let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
        let linear = |name: &str, out: usize, input: usize| {
            self.linear(&names.cross_attention(l, name), out, input, false)
        };
        let attention = AttentionSource::Grouped {
            query: linear("q_proj", q, d)?,
            key: linear("k_proj", kv, d)?,
            value: Some(linear("v_proj", kv, d)?),
            norms: None,
            sinks: None,
            bias: None,
            gate: None,
            output: linear("o_proj", d, q)?,
        };
        Ok((self.norm(&names.cross_norm(l))?, attention))
    }

    fn latent_attention(&self, a: &LatentAttention, d: usize) -> Result<AttentionSource> {
        let q = a.heads * (a.nope_dim + a.rope_dim);
        let (query, query_latent) = match a.query_rank {
            None => (self.attention_linear("q_proj", q, d, false)?, None),
            Some(rank) => {
                let down = self.attention_linear("q_a_proj", rank, d, a.bias)?;
                let norm = self.attention_vector("q_a_layernorm.weight", rank)?;
                (self.attention_linear("q_b_proj", q, rank, false)?, Some((down, norm)))
            }
        };
        let expanded = a.heads * (a.nope_dim + a.value_dim);
        Ok(AttentionSource::Latent {
            query,
            query_latent,
            latent: self.attention_linear("kv_a_proj_with_mqa", a.latent_dim + a.rope_dim, d, a.bias)?,
            latent_norm: self.attention_vector("kv_a_layernorm.weight", a.latent_dim)?,
            expand: self.attention_linear("kv_b_proj", expanded, a.latent_dim, false)?,
            output: self.attention_linear("o_proj", d, a.heads * a.value_dim, a.bias)?,
        })
    }

    fn gated_delta(&self, delta: GatedDelta, d: usize) -> Result<AttentionSource> {
        let name = |parameter: &str| self.architecture.names.gated_delta(self.l, parameter);
        if delta.projections == DeltaProjections::LowRankGates {
            return self.kimi_delta(delta, d);
        }
        let (keys, values) = (delta.key_heads * delta.key_dim, delta.all_values());
        let linear = |parameter: &str, out: usize| self.linear(&name(parameter), out, d, false);
        let per_head = |parameter: &str| self.numbers(&name(parameter), &[delta.value_heads]);
        let input = if delta.projections == DeltaProjections::ByKeyHead {
            DeltaInput::ByKeyHead {
                qkvz: linear("in_proj_qkvz", 2 * (keys + values))?,
                ba: linear("in_proj_ba", 2 * delta.value_heads)?,
            }
        } else {
            let z = linear("in_proj_z", values)?;
            let [b, a] = ["in_proj_b", "in_proj_a"].map(|name| linear(name, delta.value_heads));
            DeltaInput::Separate { qkv: linear("in_proj_qkv", delta.qkv_dim())?, zba: [z, b?, a?] }
        };
        Ok(AttentionSource::GatedDelta {
            input,
            kernels: vec![self.numbers(&name("conv1d.weight"), &[delta.qkv_dim(), 1, delta.kernel])?],
            log_rates: per_head("A_log")?,
            dt_bias: per_head("dt_bias")?,
            norm: self.numbers(&name("norm.weight"), &[delta.value_dim])?,
            output: self.linear(&name("out_proj"), d, values, false)?,
        })
    }

    /// Under the published names, or those of transformers.
    fn kimi_delta(&self, delta: GatedDelta, d: usize) -> Result<AttentionSource> {
        let (width, heads, dim) = (delta.all_values(), delta.value_heads, delta.value_dim);
        let name = |parameter: &str| self.architecture.names.gated_delta(self.l, parameter);
        let either = |parameter: &str, suffix: &str| {
            let names = [name(parameter), name(&format!("forget_gate.{parameter}"))];
            self.either(&names, suffix).to_string()
        };
        let linear = |parameter: &str, out: usize| self.linear(&name(parameter), out, d, false);
        let low_rank = |first: String, second: String| -> Result<_> {
            Ok([self.linear(&first, dim, d, false)?, self.linear(&second, width, dim, false)?])
        };
        let whole = name("conv1d.weight");
        let kernels = if self.checkpoint.get(&whole).is_some() {
            vec![self.numbers(&whole, &[delta.qkv_dim(), 1, delta.kernel])?]
        } else {
            let parts = ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"];
            let parts = parts.map(|part| self.numbers(&name(part), &[width, 1, delta.kernel]));
            parts.into_iter().collect::<Result<_>>()?
        };
        Ok(AttentionSource::GatedDelta {
            input: DeltaInput::LowRankGates {
                qkv: [linear("q_proj", width)?, linear("k_proj", width)?, linear("v_proj", width)?],
                b: linear("b_proj", heads)?,
                z: low_rank(name("g_a_proj"), name("g_b_proj"))?,
                a: low_rank(either("f_a_proj", ".weight"), either("f_b_proj", ".weight"))?,
            },
            kernels,
            log_rates: self.numbers(&either("A_log", ""), &[1, 1, heads, 1])?,
            dt_bias: self.numbers(&either("dt_bias", ""), &[delta.decays()])?,
            norm: self.numbers(&name("o_norm.weight"), &[dim])?,
            output: self.linear(&name("o_proj"), d, width, false)?,
        })
    }

    fn short_convolution(&self, spec: ShortConvolution, d: usize) -> Result<AttentionSource> {
        let name = |parameter: &str| self.architecture.names.short_convolution(self.l, parameter);
        Ok(AttentionSource::ShortConvolution {
            input: self.linear(&name("in_proj"), 3 * d, d, spec.bias)?,
            kernel: self.numbers(&name("conv.weight"), &[d, 1, spec.kernel])?,
            bias: self.bias(&name("conv"), d, spec.bias)?,
            output: self.linear(&name("out_proj"), d, d, spec.bias)?,
        })
    }

    pub(super) fn mlp(&self, width: usize, name: impl Fn(Projection) -> String) -> Result<Mlp<LinearSource>> {
        let (d, bias) = (self.architecture.hidden_size, self.architecture.mlp_bias);
        let activation = self.architecture.dense_activation;
        let up = || self.linear(&name(Projection::Up), width, d, bias);
        Ok(Mlp {
            gate: self.linear(&name(Projection::Gate), width, d, bias)?,
            up: activation.is_gated().then(up).transpose()?,
            down: self.linear(&name(Projection::Down), d, width, bias)?,
            activation,
        })
    }
}

/// The bias of a layer norm that has none.
pub(super) fn no_bias(length: usize) -> Tensor {
    Tensor::from_f32("", Dtype::F32, vec![length], &vec![0.0; length])
}
