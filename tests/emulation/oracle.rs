//! A layer in f64, with how far a correct kernel may be from it, component by component.
//!
//! Errors are carried along: a stored intermediate is rounded to the element type, a sum of K products in f32 is off by
//! (K + 8) · 2⁻²³ · Σ|a||b| at most (truncating tensor cores included), and what is off at the input of a sum or an
//! activation is off at its output by the sum's weights or the derivative's bound.

use crate::definition::{Activation, Expert, Layer, Map, Product, Routes, Weight};
use crate::emulator::Dtype;

/// A value and the most that a kernel's may differ from it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounded {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

const F32_STEP: f64 = 1.0 / (1 << 23) as f64;

impl Bounded {
    fn exact(value: f32) -> Self {
        Bounded { value: f64::from(value), error: 0.0 }
    }

    fn plus(self, other: Bounded) -> Self {
        let value = self.value + other.value;
        let rounding = F32_STEP * (self.value.abs() + other.value.abs());
        Bounded { value, error: self.error + other.error + rounding }
    }

    /// Stored in the element type.
    fn stored(self, dtype: Dtype) -> Self {
        let tiny = if dtype == Dtype::F16 { 2f64.powi(-24) } else { 1e-38 };
        let rounding = dtype.unit() * 1.01 * (self.value.abs() + self.error);
        Bounded { value: self.value, error: self.error + rounding + tiny }
    }

    /// Whether a kernel's value is within the bound.
    pub(crate) fn holds(self, found: f32) -> bool {
        (f64::from(found) - self.value).abs() <= self.error
    }
}

fn dot(weights: &[f32], x: &[Bounded]) -> Bounded {
    let (mut value, mut magnitude, mut error) = (0.0, 0.0, 0.0);
    for (&w, x) in weights.iter().zip(x) {
        let w = f64::from(w);
        value += w * x.value;
        magnitude += (w * x.value).abs();
        error += w.abs() * x.error;
    }
    let steps = (weights.len() + 8) as f64;
    Bounded { value, error: error + steps * F32_STEP * (magnitude + error) + 1e-38 }
}

fn product(weight: &Weight, x: &[Bounded]) -> Vec<Bounded> {
    (0..weight.rows).map(|i| dot(weight.row(i), x)).collect()
}

fn stored(values: Vec<Bounded>, dtype: Dtype) -> Vec<Bounded> {
    values.into_iter().map(|v| v.stored(dtype)).collect()
}

/// A map without the layer's base; `base` is what it adds.
fn apply(map: &Map, x: &[Bounded], base: Option<&[Bounded]>, dtype: Dtype) -> Vec<Bounded> {
    let mut out = match &map.product {
        Product::Dense(w) => product(w, x),
        Product::LowRank(u, v) => product(u, &stored(product(v, x), dtype)),
    };
    let mut add = |i: usize, more: Bounded| out[i] = out[i].plus(more);
    if let Some(base) = base {
        base.iter().enumerate().for_each(|(i, b)| add(i, *b));
    }
    if let Some((rows, s)) = &map.rows {
        let sparse = stored(product(s, x), dtype);
        rows.iter().zip(sparse).for_each(|(&i, v)| add(i, v));
    }
    if let Some(bias) = &map.bias {
        bias.iter().enumerate().for_each(|(i, &b)| add(i, Bounded::exact(b)));
    }
    out
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// f(g) · (u + c): every activation has this form, with a derivative of f below 1.13; that of the squared one is 2g.
fn activate(activation: Activation, g: Bounded, u: Bounded) -> Bounded {
    let x = g.value;
    let (f, factor) = match activation {
        Activation::SwiGlu => (x * sigmoid(x), u.value),
        Activation::Clamped { limit, slope } => {
            let limit = f64::from(limit);
            let x = x.min(limit);
            (x * sigmoid(f64::from(slope) * x), u.value.clamp(-limit, limit) + 1.0)
        }
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            (0.5 * x * (1.0 + inner.tanh()), u.value)
        }
        Activation::Relu => (x.max(0.0), u.value),
        Activation::SquaredRelu => (x.max(0.0).powi(2), u.value),
    };
    let steepest = match activation {
        Activation::SquaredRelu => 2.0 * (x.max(0.0) + g.error),
        _ => 1.13,
    };
    let slope = steepest * g.error;
    let arithmetic = 16.0 * F32_STEP * x.abs().max(f) * factor.abs();
    Bounded {
        value: f * factor,
        error: slope * factor.abs() + f.abs() * u.error + slope * u.error + arithmetic,
    }
}

/// The layer's output for `x` [tokens, hidden], as stored in the element type.
pub(crate) fn forward(layer: &Layer, x: &[f32], routes: &Routes) -> Vec<Bounded> {
    let dtype = layer.dtype;
    let mut out = Vec::new();
    for (token, x) in x.chunks_exact(layer.hidden).enumerate() {
        let x: Vec<Bounded> = x.iter().map(|&v| Bounded::exact(v)).collect();
        let base = layer.base.as_ref().map(|b| [&b[0], &b[1]].map(|w| stored(product(w, &x), dtype)));
        let mut sum = vec![Bounded::default(); layer.hidden];
        let mut base_hidden = vec![Bounded::default(); layer.base.as_ref().map_or(0, |b| b[2].cols)];
        // Duplicates of a token count once, with the sum of their weights.
        let mut weights: Vec<(usize, f32)> = Vec::new();
        for slot in token * routes.slots..(token + 1) * routes.slots {
            let id = usize::try_from(routes.ids[slot]).ok().filter(|&id| id < layer.experts.len());
            let Some(id) = id else { continue };
            let expert = layer.canonical(id);
            match weights.iter_mut().find(|(e, _)| *e == expert) {
                Some((_, weight)) => *weight += routes.weights[slot],
                None => weights.push((expert, routes.weights[slot])),
            }
        }
        for (e, weight) in weights {
            let scaled = |v: Bounded| {
                let w = f64::from(weight);
                let value = v.value * w;
                Bounded { value, error: w.abs() * v.error + 2.0 * F32_STEP * value.abs() }
            };
            match &layer.experts[e] {
                Expert::Mlp { maps, .. } => {
                    let base_of = |i: usize| base.as_ref().filter(|_| maps[i].base).map(|b| &b[i][..]);
                    let gate = apply(&maps[0], &x, base_of(0), dtype);
                    let up = if layer.without_up {
                        vec![Bounded::exact(1.0); gate.len()]
                    } else {
                        apply(&maps[1], &x, base_of(1), dtype)
                    };
                    let hidden: Vec<_> =
                        gate.into_iter().zip(up).map(|(g, u)| activate(layer.activation, g, u)).collect();
                    let hidden = stored(hidden, dtype);
                    let y = stored(apply(&maps[2], &hidden, None, dtype), dtype);
                    sum.iter_mut().zip(y).for_each(|(s, y)| *s = s.plus(scaled(y)));
                    if maps[2].base {
                        base_hidden.iter_mut().zip(hidden).for_each(|(s, h)| *s = s.plus(scaled(h)));
                    }
                }
                Expert::Constant(vector) => {
                    sum.iter_mut().zip(vector).for_each(|(s, &v)| *s = s.plus(scaled(Bounded::exact(v))));
                }
                Expert::Alias(_) | Expert::None => {}
            }
        }
        if let Some([_, _, down]) = &layer.base {
            let y = stored(product(down, &stored(base_hidden, dtype)), dtype);
            sum.iter_mut().zip(y).for_each(|(s, y)| *s = s.plus(y));
        }
        out.extend(stored(sum, dtype));
    }
    out
}

/// What sorting the slots by expert has to give.
pub(crate) struct Sorted {
    pub(crate) offsets: Vec<i32>,
    pub(crate) pair_token: Vec<i32>,
    pub(crate) pair_weight: Vec<f32>,
    pub(crate) slot_source: Vec<i32>,
    pub(crate) slot_weight: Vec<f32>,
}

/// A stable sort; with `merge`, duplicates of a token are added to its first one.
pub(crate) fn sort(layer: &Layer, routes: &Routes, merge: bool) -> Sorted {
    let mut pairs = Vec::new();
    let mut slot_source = vec![-1; routes.ids.len()];
    let mut slot_weight = vec![0.0; routes.ids.len()];
    let expert_of = |slot: usize| {
        let id = usize::try_from(routes.ids[slot]).ok().filter(|&id| id < layer.experts.len())?;
        let expert = layer.canonical(id);
        (!matches!(layer.experts[expert], Expert::None)).then_some(expert)
    };
    for (slot, weight) in slot_weight.iter_mut().enumerate() {
        let Some(expert) = expert_of(slot) else { continue };
        let token = slot / routes.slots;
        let mut own = routes.weights[slot];
        if merge {
            if (token * routes.slots..slot).any(|s| expert_of(s) == Some(expert)) {
                continue;
            }
            let later = (slot + 1..(token + 1) * routes.slots).filter(|&s| expert_of(s) == Some(expert));
            later.for_each(|s| own += routes.weights[s]);
        }
        *weight = if merge { own } else { 1.0 };
        if let Expert::Constant(_) = layer.experts[expert] {
            slot_source[slot] = -2 - expert as i32;
        } else {
            pairs.push((expert, slot, own));
        }
    }
    pairs.sort_by_key(|&(expert, slot, _)| (expert, slot));
    for (pair, &(_, slot, _)) in pairs.iter().enumerate() {
        slot_source[slot] = pair as i32;
    }
    let before = |e: usize| pairs.iter().filter(|pair| pair.0 < e).count() as i32;
    Sorted {
        offsets: (0..=layer.experts.len()).map(before).collect(),
        pair_token: pairs.iter().map(|&(_, slot, _)| (slot / routes.slots) as i32).collect(),
        pair_weight: pairs.iter().map(|&(_, _, weight)| weight).collect(),
        slot_source,
        slot_weight,
    }
}
