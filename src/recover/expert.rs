//! One expert in training.

use rayon::prelude::*;

use super::map::{Cache, Map, Parameter, Part};
use crate::architecture::Activation;

/// An expert slot.
#[derive(Clone, Debug)]
pub(super) enum Trained {
    /// A gated MLP.
    Mlp(Box<TrainedMlp>),
    /// A constant output `[hidden]`.
    Constant(Parameter),
    /// Another slot's weights, or nothing.
    Idle,
}

/// gate, up and down.
#[derive(Clone, Debug)]
pub(super) struct TrainedMlp {
    pub(super) gate: Map,
    /// There where the activation is gated.
    pub(super) up: Option<Map>,
    pub(super) down: Map,
    pub(super) activation: Activation,
}

/// What the backward pass of an MLP needs of its forward pass.
#[derive(Debug, Default)]
pub(super) struct Trace {
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Input of the down projection, `[n, width]`.
    pub(super) hidden: Vec<f32>,
    caches: [Cache; 3],
}

impl TrainedMlp {
    /// `[n, hidden]` for `x [n, hidden]`.
    pub(super) fn forward(&self, x: &[f32]) -> (Vec<f32>, Trace) {
        let (gate, gate_cache) = self.gate.forward(x);
        let (up, up_cache) =
            self.up.as_ref().map_or_else(|| (vec![0.0; gate.len()], Cache::new()), |up| up.forward(x));
        let mut hidden = vec![0.0; gate.len()];
        let values = hidden.par_iter_mut().zip(&gate).zip(&up).with_min_len(1 << 12);
        values.for_each(|((z, g), u)| *z = value(self.activation, *g, *u));
        let (y, down_cache) = self.down.forward(&hidden);
        (y, Trace { gate, up, hidden, caches: [gate_cache, up_cache, down_cache] })
    }

    /// Sets the gradients of all maps for the gradient `dy` of the outputs.
    pub(super) fn backward(&mut self, x: &[f32], trace: &Trace, dy: &[f32]) {
        let Trace { gate, up, hidden, caches: [gate_cache, up_cache, down_cache] } = trace;
        let mut d_gate = self.down.backward(hidden, down_cache, dy, true);
        let mut d_up = vec![0.0; d_gate.len()];
        let rows = d_gate.par_iter_mut().zip(&mut d_up).zip(gate).zip(up).with_min_len(1 << 12);
        rows.for_each(|(((dg, du), g), u)| {
            let [by_gate, by_up] = slopes(self.activation, *g, *u);
            (*dg, *du) = (*dg * by_gate, *dg * by_up);
        });
        self.gate.backward(x, gate_cache, &d_gate, false);
        if let Some(map) = &mut self.up {
            map.backward(x, up_cache, &d_up, false);
        }
    }

    pub(super) fn maps(&mut self) -> impl Iterator<Item = &mut Map> {
        std::iter::once(&mut self.gate).chain(&mut self.up).chain([&mut self.down])
    }
}

impl Trained {
    /// Outputs for `n` inputs `x`.
    pub(super) fn forward(&self, x: &[f32], n: usize) -> (Vec<f32>, Trace) {
        match self {
            Trained::Mlp(mlp) => mlp.forward(x),
            Trained::Constant(c) => (c.values.repeat(n), Trace::default()),
            Trained::Idle => (Vec::new(), Trace::default()),
        }
    }

    /// Sets all gradients.
    pub(super) fn backward(&mut self, x: &[f32], trace: &Trace, dy: &[f32]) {
        match self {
            Trained::Mlp(mlp) => mlp.backward(x, trace, dy),
            Trained::Constant(c) => {
                c.gradient.clear();
                c.gradient.resize(c.values.len(), 0.0);
                for row in dy.chunks_exact(c.values.len()) {
                    c.gradient.iter_mut().zip(row).for_each(|(g, d)| *g += d);
                }
            }
            Trained::Idle => {}
        }
    }

    /// Everything that is trained, in a fixed order.
    pub(super) fn parameters(&mut self) -> Vec<&mut Parameter> {
        match self {
            Trained::Mlp(mlp) => mlp.maps().flat_map(Map::parameters).collect(),
            Trained::Constant(c) => vec![c],
            Trained::Idle => Vec::new(),
        }
    }

    /// Whether anything of it is trained.
    pub(super) fn is_trainable(&self) -> bool {
        match self {
            Trained::Mlp(mlp) => {
                let maps = std::iter::once(&mlp.gate).chain(&mlp.up).chain([&mlp.down]);
                maps.flat_map(|m| &m.parts).any(|p| !matches!(p, Part::Fixed(_)))
            }
            Trained::Constant(_) => true,
            Trained::Idle => false,
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Argument of the hyperbolic tangent in GELU's approximation.
fn gelu_inner(x: f32) -> f32 {
    (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)
}

/// GELU by its tanh approximation.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + gelu_inner(x).tanh())
}

/// Its derivative.
fn gelu_slope(x: f32) -> f32 {
    let t = gelu_inner(x).tanh();
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (1.0 + 3.0 * 0.044_715 * x * x);
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
}

/// The hidden value of one gate and up value.
fn value(activation: Activation, g: f32, u: f32) -> f32 {
    match activation {
        Activation::SwiGlu => g * sigmoid(g) * u,
        Activation::ClampedSwiGlu { limit, slope } => {
            let clamped = g.min(limit);
            clamped * sigmoid(slope * clamped) * (u.clamp(-limit, limit) + 1.0)
        }
        Activation::Relu => g.max(0.0),
        Activation::SquaredRelu => g.max(0.0) * g.max(0.0),
        Activation::GeluTanh => gelu(g),
        Activation::GeGluTanh => gelu(g) * u,
    }
}

/// Its derivatives by gate and up.
fn slopes(activation: Activation, g: f32, u: f32) -> [f32; 2] {
    match activation {
        Activation::SwiGlu => {
            let s = sigmoid(g);
            [s * (1.0 + g * (1.0 - s)) * u, g * s]
        }
        Activation::ClampedSwiGlu { limit, slope } => {
            let clamped = g.min(limit);
            let s = sigmoid(slope * clamped);
            let by_gate = s * (1.0 + slope * clamped * (1.0 - s)) * (u.clamp(-limit, limit) + 1.0);
            let inside = |free: bool, slope: f32| if free { slope } else { 0.0 };
            [inside(g < limit, by_gate), inside(u.abs() < limit, clamped * s)]
        }
        Activation::Relu => [if g > 0.0 { 1.0 } else { 0.0 }, 0.0],
        Activation::SquaredRelu => [2.0 * g.max(0.0), 0.0],
        Activation::GeluTanh => [gelu_slope(g), 0.0],
        Activation::GeGluTanh => [gelu_slope(g) * u, gelu(g)],
    }
}
