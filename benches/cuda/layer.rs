//! Layers in the shapes of published models, with weights of noise that were made on the device's side of the bus.

use std::sync::Arc;

use moepress::architecture::{Activation, RouterSpec, WeightRule, WeightTarget};
use moepress::backend::cuda::{
    Block, Device, DeviceBlock, DeviceMatrix, DeviceVector, Element, Forward, Launch, LayerRouter, LayerSpec,
    Memory, MoeLayer, Result, Routing, Rows,
};
use moepress::backend::{Expert, Linear, Matrix, Mlp, RouterRule};
use moepress::checkpoint::{Dtype, Tensor, encode_f32};

/// Sizes of a layer, without shared experts.
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    hidden: usize,
    width: usize,
    experts: usize,
    top_k: usize,
}

/// Mixtral-8x7B, Qwen1.5-MoE-A2.7B, DeepSeek-V2-Lite, Qwen3-30B-A3B.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape { name: "mixtral", hidden: 4096, width: 14336, experts: 8, top_k: 2 },
    Shape { name: "qwen1.5", hidden: 2048, width: 1408, experts: 60, top_k: 4 },
    Shape { name: "deepseek-v2-lite", hidden: 2048, width: 1408, experts: 64, top_k: 6 },
    Shape { name: "qwen3", hidden: 2048, width: 768, experts: 128, top_k: 8 },
];

/// Ranks of the matrices, in percent of full rank.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    pub(crate) name: &'static str,
    /// Of expert number `e`; `None` is dense.
    percent: fn(e: usize) -> Option<usize>,
}

pub(crate) const FORMS: [Form; 5] = [
    Form { name: "dense", percent: |_| None },
    Form { name: "25 %", percent: |_| Some(25) },
    Form { name: "50 %", percent: |_| Some(50) },
    Form { name: "75 %", percent: |_| Some(75) },
    Form { name: "mixed", percent: |e| [None, Some(15), Some(30), Some(45)][e % 4] },
];

/// A prepared layer.
pub(crate) struct Layer {
    pub(crate) shape: &'static Shape,
    pub(crate) form: Form,
    prepared: MoeLayer<DeviceBlock>,
    _weights: DeviceBlock,
}

/// Values without structure from −`scale` to `scale`.
fn noise(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

/// Memory full of noise in bf16.
fn noisy(device: &Arc<Device>, bytes: usize, scale: f32) -> Result<DeviceBlock> {
    let block = device.allocate(bytes)?;
    let part = encode_f32(Dtype::BF16, &noise((8 << 20).min(bytes.div_ceil(2)), 1, scale));
    for start in (0..bytes).step_by(part.len()) {
        block.write(start, &part[..part.len().min(bytes - start)])?;
    }
    Ok(block)
}

/// Hands out bf16 matrices from a block.
struct Matrices {
    next: u64,
}

impl Matrices {
    fn take(&mut self, rows: usize, cols: usize) -> DeviceMatrix {
        let (address, stride) = (self.next, cols.next_multiple_of(8));
        self.next += (2 * rows * stride) as u64;
        DeviceMatrix { address, rows, cols, stride }
    }
}

impl Shape {
    /// Rank of its matrices at so many percent of full rank, in steps of 16.
    fn rank(&self, percent: usize) -> usize {
        (self.hidden.min(self.width) * percent / 100).next_multiple_of(16)
    }

    /// Weights of an expert.
    fn elements(&self, percent: Option<usize>) -> usize {
        let (hidden, width) = (self.hidden, self.width);
        3 * percent.map_or(hidden * width, |percent| self.rank(percent) * (hidden + width))
    }

    fn expert(&self, percent: Option<usize>, memory: &mut Matrices) -> Expert<DeviceMatrix, DeviceVector> {
        let (hidden, width) = (self.hidden, self.width);
        let linear = |weight| Linear { weight, bias: None };
        let [gate, up, down] = match percent.map(|percent| self.rank(percent)) {
            None => [(width, hidden), (width, hidden), (hidden, width)]
                .map(|(rows, cols)| linear(Matrix::Dense(memory.take(rows, cols)))),
            Some(rank) => {
                // V of up behind V of gate.
                let factors = [hidden, hidden, width].map(|cols| memory.take(rank, cols));
                let out = [width, width, hidden].map(|rows| memory.take(rows, rank));
                [0, 1, 2].map(|i| linear(Matrix::LowRank { u: out[i], v: factors[i] }))
            }
        };
        Expert::Mlp(Mlp { gate, up: Some(up), down, activation: Activation::SwiGlu })
    }
}

impl Layer {
    pub(crate) fn new(device: &Arc<Device>, shape: &'static Shape, form: Form) -> Result<Self> {
        let elements: usize = (0..shape.experts).map(|e| shape.elements((form.percent)(e))).sum();
        let weights = noisy(device, 2 * elements, 0.03)?;
        let mut memory = Matrices { next: weights.address() };
        let experts: Vec<_> =
            (0..shape.experts).map(|e| shape.expert((form.percent)(e), &mut memory)).collect();
        let rule = RouterRule {
            spec: RouterSpec::softmax(shape.top_k, WeightRule::RENORMALISED),
            group_of: vec![0; shape.experts],
            live: vec![true; shape.experts],
        };
        let router = noise(shape.experts * shape.hidden, 2, 0.03);
        let router = Tensor::from_f32("router", Dtype::BF16, vec![shape.experts, shape.hidden], &router);
        let router = LayerRouter { rule: &rule, weight: Some(&router), bias: None, choice_bias: None };
        let spec = LayerSpec {
            hidden: shape.hidden,
            element: Element::Bf16,
            top_k: shape.top_k,
            experts: &experts,
            base: &[None, None, None],
            expert_map: None,
            shared: None,
            router: Some(router),
            target: WeightTarget::Output,
        };
        Ok(Layer { shape, form, prepared: MoeLayer::new(device, &spec)?, _weights: weights })
    }
}

/// Inputs of a forward pass, with uniform routing given as ids.
pub(crate) struct Case {
    tokens: usize,
    hidden: usize,
    x: DeviceBlock,
    out: DeviceBlock,
    ids: DeviceBlock,
    weights: DeviceBlock,
    workspace: DeviceBlock,
    /// Multiplications and additions, and weights of the experts that are visited, each once.
    flops: f64,
    weight_bytes: f64,
}

impl Case {
    pub(crate) fn new(device: &Arc<Device>, layer: &Layer, tokens: usize, seed: u64) -> Result<Self> {
        let shape = layer.shape;
        let mut ids = Vec::with_capacity(tokens * shape.top_k);
        let mut visited = vec![false; shape.experts];
        let mut flops = 0.0;
        for scores in noise(tokens * shape.experts, seed, 1.0).chunks_exact(shape.experts) {
            let mut order: Vec<usize> = (0..shape.experts).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            for &e in &order[..shape.top_k] {
                ids.extend((e as i32).to_le_bytes());
                visited[e] = true;
                flops += 2.0 * shape.elements((layer.form.percent)(e)) as f64;
            }
        }
        let elements = |e: usize| shape.elements((layer.form.percent)(e)) as f64;
        let weight_bytes = (0..shape.experts).filter(|&e| visited[e]).map(|e| 2.0 * elements(e)).sum();
        let id_block = device.allocate(ids.len())?;
        id_block.write(0, &ids)?;
        let weights = device.allocate(ids.len())?;
        weights.write(0, &encode_f32(Dtype::F32, &vec![1.0 / shape.top_k as f32; ids.len() / 4]))?;
        Ok(Case {
            tokens,
            hidden: shape.hidden,
            x: noisy(device, 2 * tokens * shape.hidden, 1.7)?,
            out: device.allocate(2 * tokens * shape.hidden)?,
            ids: id_block,
            weights,
            workspace: device.allocate(layer.prepared.workspace_bytes(tokens)?)?,
            flops,
            weight_bytes,
        })
    }

    /// `routed`: by the layer's router, and not as given.
    pub(crate) fn enqueue(&self, layer: &Layer, routed: bool, launch: &impl Launch) -> Result<()> {
        let rows = |block: &DeviceBlock| Rows { address: block.address(), stride: self.hidden };
        let given = Routing::Given { ids: self.ids.address(), weights: self.weights.address() };
        let args = Forward {
            tokens: self.tokens,
            x: rows(&self.x),
            out: rows(&self.out),
            routing: if routed { Routing::Router } else { given },
            residual: None,
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace.bytes(),
        };
        // SAFETY: buffers of the sizes that the layer asks for, which live as long as `self`.
        unsafe { layer.prepared.forward(launch, &args) }
    }

    pub(crate) fn flops(&self) -> f64 {
        self.flops
    }

    /// Compulsory traffic: every visited expert once, tokens in and out.
    pub(crate) fn bytes(&self) -> f64 {
        self.weight_bytes + (2 * 2 * self.tokens * self.hidden) as f64
    }
}
