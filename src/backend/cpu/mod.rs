//! The CPU backend: f32 activations, weights mapped in their stored type, work shared among the threads of the
//! current rayon pool. Results do not depend on the number of threads: work is cut by fixed sizes, and nothing is
//! summed across pieces.

mod attention;
mod convolution;
mod delta;
mod experts;
mod gemm;
mod grams;
mod latent;
mod linear;
mod mamba;
mod mamba2;
mod math;
mod multiply;
mod observe;
mod pointwise;
mod route;
mod simd;
mod softmax;

use gemm::Columns;

use crate::architecture::{Activation, GatedDelta, Mamba2, Rope};
use crate::checkpoint::{Tensor, Weight};

use super::{
    AttentionShape, AttentionTerms, Backend, Base, Batch, ChannelTerms, DeltaGates, HeadLayout, Keys,
    LatentShape, Moment, MomentDims, Moments, Result, RouterRule, RouterWeights, Routes, ScanTerms,
    StoredExpert,
};
pub use attention::CpuRotation;
pub use experts::CpuExperts;
pub use linear::CpuWeight;
pub(crate) use multiply::{multiply, transpose};
pub(crate) use pointwise::{activate, add_bias};
pub use route::{CpuRouter, CpuRouting};
pub use simd::{Isa, UnknownIsa};

/// The CPU backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// A row-major matrix of f32.
#[derive(Clone, Debug, Default)]
pub struct CpuBuffer {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl CpuBuffer {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// The state `[rows, cols]` that tokens before `batch` left here; zeros where none came before.
    fn carried(&mut self, batch: &Batch, rows: usize, cols: usize) -> Columns<'_> {
        if batch.start == 0 {
            self.reshape(rows, cols);
            self.data.fill(0.0);
        }
        Columns::new(&mut self.data, rows, cols, cols)
    }

    fn reshape(&mut self, rows: usize, cols: usize) {
        self.rows = rows;
        self.cols = cols;
        self.data.resize(rows * cols, 0.0);
    }
}

impl Cpu {
    /// Runs every expert on the given rows of `x`; the outputs are left in the workspace of `routing`.
    fn run_all(x: &CpuBuffer, rows: &[usize], experts: &CpuExperts, routing: &mut CpuRouting) {
        let mut sample = CpuBuffer::default();
        sample.reshape(rows.len(), x.cols);
        for (to, &from) in sample.data.chunks_exact_mut(x.cols).zip(rows) {
            to.copy_from_slice(x.row(from));
        }
        routing.choose_all(rows, experts.len());
        experts.run(&sample, routing);
        experts.complete(routing, x.cols);
    }
}

impl Backend for Cpu {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Vector = Vec<f32>;
    type Rotation = CpuRotation;
    type Router = CpuRouter;
    type Experts = CpuExperts;
    type Routing = CpuRouting;
    type Observer = Moments;

    fn device(&self) -> String {
        "cpu".into()
    }

    fn arithmetic(&self) -> String {
        let isa = Isa::current();
        if isa.agrees() { self.device() } else { format!("cpu {isa}") }
    }

    fn buffer(&self) -> CpuBuffer {
        CpuBuffer::default()
    }

    fn resize(&self, buffer: &mut CpuBuffer, rows: usize, cols: usize) -> Result<()> {
        buffer.reshape(rows, cols);
        Ok(())
    }

    fn upload(&self, host: &[f32], rows: usize, cols: usize, buffer: &mut CpuBuffer) -> Result<()> {
        buffer.reshape(rows, cols);
        buffer.data.copy_from_slice(host);
        Ok(())
    }

    fn copy(&self, x: &CpuBuffer, out: &mut CpuBuffer) -> Result<()> {
        self.copy_rows(x, 0, x.rows, out)
    }

    fn copy_rows(&self, x: &CpuBuffer, start: usize, count: usize, out: &mut CpuBuffer) -> Result<()> {
        out.reshape(count, x.cols);
        out.data.copy_from_slice(&x.data[start * x.cols..(start + count) * x.cols]);
        Ok(())
    }

    fn write_rows(&self, x: &CpuBuffer, out: &mut CpuBuffer, row: usize) -> Result<()> {
        let rows = out.data.chunks_exact_mut(out.cols).skip(row);
        for (to, from) in rows.zip(x.data.chunks_exact(x.cols)) {
            to[..x.cols].copy_from_slice(from);
        }
        Ok(())
    }

    fn keep_rows(&self, buffer: &mut CpuBuffer, start: usize, count: usize, rows: usize) -> Result<()> {
        let cols = buffer.cols;
        if start > 0 {
            buffer.data.copy_within(start * cols..(start + count) * cols, 0);
        }
        buffer.reshape(rows, cols);
        Ok(())
    }

    fn copy_heads(
        &self,
        x: &CpuBuffer,
        heads: HeadLayout,
        width: usize,
        out: &mut CpuBuffer,
        column: usize,
    ) -> Result<()> {
        pointwise::copy_heads(x, heads, width, out, column);
        Ok(())
    }

    fn clear_padding(&self, x: &mut CpuBuffer, batch: &Batch) -> Result<()> {
        let rows = x.data.chunks_exact_mut(x.cols).enumerate();
        rows.filter(|(t, _)| !batch.is_real(*t)).for_each(|(_, row)| row.fill(0.0));
        Ok(())
    }

    fn download_to(&self, buffer: &CpuBuffer, host: &mut Vec<f32>) -> Result<()> {
        host.extend_from_slice(&buffer.data);
        Ok(())
    }

    fn weight(&self, weight: &Weight) -> Result<CpuWeight> {
        Ok(CpuWeight::new(weight))
    }

    fn vector(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        Ok(tensor.to_f32()?)
    }

    fn rotation(&self, rope: &Rope, length: usize) -> Result<CpuRotation> {
        Ok(CpuRotation::new(rope, length))
    }

    fn router(&self, weights: &RouterWeights, rule: RouterRule) -> Result<CpuRouter> {
        CpuRouter::new(weights, rule)
    }

    fn experts(&self, experts: &[StoredExpert], base: &Base<Weight>) -> Result<CpuExperts> {
        CpuExperts::new(experts, base)
    }

    fn routing(&self) -> CpuRouting {
        CpuRouting::default()
    }

    fn observer(&self, dims: MomentDims, second: &[Moment]) -> Result<Moments> {
        Ok(Moments::zeros(dims, second))
    }

    fn embed(&self, table: &CpuWeight, ids: &[u32], out: &mut CpuBuffer) -> Result<()> {
        out.reshape(ids.len(), table.cols());
        for (row, &id) in out.data.chunks_exact_mut(table.cols()).zip(ids) {
            table.decode_rows(id as usize, row);
        }
        Ok(())
    }

    fn norm(
        &self,
        x: &CpuBuffer,
        weight: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(x.rows, weight.len());
        pointwise::norm(x, weight, bias.map(Vec::as_slice), eps, out);
        Ok(())
    }

    fn rms_norm_heads(&self, x: &mut CpuBuffer, weight: &Vec<f32>, eps: f32) -> Result<()> {
        pointwise::rms_norm_heads(x, weight, eps);
        Ok(())
    }

    fn rms_norm_groups(&self, x: &mut CpuBuffer, weight: &Vec<f32>, groups: usize, eps: f32) -> Result<()> {
        pointwise::rms_norm_groups(x, weight, groups, eps);
        Ok(())
    }

    fn linear(
        &self,
        x: &CpuBuffer,
        weight: &CpuWeight,
        bias: Option<&Vec<f32>>,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(x.rows, weight.rows());
        linear::linear(&linear::Input::new(&x.data, x.cols), weight, &mut out.data);
        if let Some(bias) = bias {
            pointwise::add_bias(&mut out.data, bias);
        }
        Ok(())
    }

    fn clamp(&self, x: &mut CpuBuffer, limit: f32) -> Result<()> {
        pointwise::clamp(x, limit);
        Ok(())
    }

    fn rotate(
        &self,
        x: &mut CpuBuffer,
        rotation: &CpuRotation,
        heads: HeadLayout,
        batch: &Batch,
    ) -> Result<()> {
        attention::rotate(x, rotation, heads, batch);
        Ok(())
    }

    fn attend(
        &self,
        query: &CpuBuffer,
        keys: Keys<'_, CpuBuffer>,
        terms: AttentionTerms<'_, Vec<f32>>,
        shape: AttentionShape,
        batch: &Batch,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(query.rows, shape.heads * shape.value_dim);
        attention::attend(query, &keys, &terms, shape, batch, out);
        Ok(())
    }

    fn absorb_queries(
        &self,
        query: &CpuBuffer,
        expand: &CpuWeight,
        shape: LatentShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(query.rows, shape.heads * (shape.latent_dim + shape.rope_dim));
        latent::absorb_queries(query, expand, shape, out);
        Ok(())
    }

    fn expand_values(
        &self,
        sums: &CpuBuffer,
        expand: &CpuWeight,
        shape: LatentShape,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(sums.rows, shape.heads * shape.value_dim);
        latent::expand_values(sums, expand, shape, out);
        Ok(())
    }

    fn causal_convolution(
        &self,
        x: &CpuBuffer,
        kernel: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        silu: bool,
        tail: Option<&mut CpuBuffer>,
        batch: &Batch,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(x.rows, x.cols);
        convolution::causal_convolution(x, kernel, bias.map(Vec::as_slice), silu, tail, batch, out);
        Ok(())
    }

    fn gated_delta_rule(
        &self,
        qkv: &mut CpuBuffer,
        gates: DeltaGates<'_, CpuBuffer, Vec<f32>>,
        shape: GatedDelta,
        state: Option<&mut CpuBuffer>,
        batch: &Batch,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(qkv.rows, shape.all_values());
        delta::gated_delta_rule(qkv, gates, shape, state, batch, out);
        Ok(())
    }

    fn mamba2_scan(
        &self,
        x: &CpuBuffer,
        terms: ScanTerms<'_, CpuBuffer, Vec<f32>>,
        shape: Mamba2,
        state: Option<&mut CpuBuffer>,
        batch: &Batch,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(x.rows, shape.width());
        mamba2::scan(x, terms, shape, state, batch, out);
        Ok(())
    }

    fn mamba_scan(
        &self,
        x: &CpuBuffer,
        terms: ChannelTerms<'_, CpuBuffer, Vec<f32>>,
        state: Option<&mut CpuBuffer>,
        batch: &Batch,
        out: &mut CpuBuffer,
    ) -> Result<()> {
        out.reshape(x.rows, x.cols);
        mamba::scan(x, terms, state, batch, out);
        Ok(())
    }

    fn activate(&self, gate: &mut CpuBuffer, up: Option<&CpuBuffer>, activation: Activation) -> Result<()> {
        pointwise::activate(&mut gate.data, up.map_or(&[], |up| &up.data), activation);
        Ok(())
    }

    fn scale(&self, x: &mut CpuBuffer, factor: f32) -> Result<()> {
        pointwise::scale(&mut x.data, factor);
        Ok(())
    }

    fn add(&self, x: &mut CpuBuffer, y: &CpuBuffer) -> Result<()> {
        pointwise::add(&mut x.data, &y.data);
        Ok(())
    }

    fn multiply(&self, x: &mut CpuBuffer, y: &CpuBuffer) -> Result<()> {
        pointwise::multiply(&mut x.data, &y.data);
        Ok(())
    }

    fn sigmoid_gate(&self, x: &mut CpuBuffer, gate: &CpuBuffer) -> Result<()> {
        pointwise::sigmoid_gate(x, gate);
        Ok(())
    }

    fn softplus_gate(&self, x: &mut CpuBuffer, gate: &CpuBuffer) -> Result<()> {
        pointwise::softplus_gate(x, gate);
        Ok(())
    }

    fn mix_experts(&self, x: &mut CpuBuffer, gate: &mut CpuBuffer, turns: usize) -> Result<()> {
        pointwise::mix_experts(x, gate, turns);
        Ok(())
    }

    fn route(&self, x: &CpuBuffer, router: &CpuRouter, routing: &mut CpuRouting) -> Result<()> {
        router.route(x, routing);
        Ok(())
    }

    fn limit_tokens(&self, routing: &mut CpuRouting, capacity: usize, batch: &Batch) -> Result<()> {
        routing.limit_tokens(capacity, batch.length);
        Ok(())
    }

    fn run_experts(
        &self,
        x: &CpuBuffer,
        experts: &CpuExperts,
        routing: &mut CpuRouting,
        out: &mut CpuBuffer,
        observe: Option<(&mut Moments, &Batch)>,
    ) -> Result<()> {
        out.reshape(x.rows, x.cols);
        experts.run(x, routing);
        experts::combine(routing, &mut out.data, x.cols);
        experts.add_base(routing, &mut out.data);
        if let Some((moments, batch)) = observe {
            experts.complete(routing, x.cols);
            observe::routed(moments, x, experts, routing, out, batch);
        }
        Ok(())
    }

    fn observe_all(
        &self,
        x: &CpuBuffer,
        rows: &[usize],
        experts: &CpuExperts,
        routing: &mut CpuRouting,
        observer: &mut Moments,
    ) -> Result<()> {
        Cpu::run_all(x, rows, experts, routing);
        observe::sampled(observer, routing, experts, x.cols, rows.len());
        Ok(())
    }

    fn output_grams(
        &self,
        x: &CpuBuffer,
        rows: &[usize],
        behind: Option<&CpuWeight>,
        extra: Option<&[f32]>,
        experts: &CpuExperts,
        routing: &mut CpuRouting,
    ) -> Result<Vec<f32>> {
        Cpu::run_all(x, rows, experts, routing);
        let mut mapped = Vec::new();
        let outputs = match behind {
            None => (&routing.work.output[..], x.cols),
            Some(map) => {
                let outputs = &routing.work.output;
                mapped.resize(outputs.len() / x.cols * map.rows(), 0.0);
                linear::linear(&linear::Input::new(outputs, x.cols), map, &mut mapped);
                (&mapped[..], map.rows())
            }
        };
        Ok(grams::of_outputs(routing, experts, outputs, rows.len(), extra))
    }

    fn routes(&self, routing: &CpuRouting) -> Result<Routes> {
        Ok(routing.to_routes())
    }

    fn moments(&self, observer: Moments) -> Result<Moments> {
        Ok(observer)
    }
}
