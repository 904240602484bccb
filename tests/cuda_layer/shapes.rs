//! Layers as large as real ones on a real GPU: pipelines go round many times, and in every family blocks have several tiles.
//! A few tokens against f64, all of them against each other from batch to batch.

use moepress::architecture::{Activation, RouterSpec, WeightRule};
use moepress::backend::cuda::{Block, DeviceMatrix, DeviceVector, Element, LayerRouter, LayerSpec};
use moepress::backend::{Expert, Linear, Matrix, Mlp, RouterRule};
use moepress::checkpoint::{Dtype, Tensor, encode_f32};
use rayon::prelude::*;

use super::gpu::Gpu;
use super::{Bench, By, close, dtype, noise, round, spec, tolerance};

struct Shape {
    hidden: usize,
    width: usize,
    experts: usize,
    top_k: usize,
    /// The largest last.
    batches: &'static [usize],
}

/// Qwen1.5-MoE-A2.7B. In 16 bits the batches take tiles of 8, 8, 16, 16, 32, 64, 128 and 128 tokens.
const REAL: Shape = Shape {
    hidden: 2048,
    width: 1408,
    experts: 60,
    top_k: 4,
    batches: &[1, 8, 12, 100, 200, 400, 512, 4096],
};

/// What an emulation does in a second: tiles of 8, 8, 16, 64 and 128 tokens.
const SMALL: Shape = Shape { hidden: 640, width: 72, experts: 6, top_k: 2, batches: &[1, 8, 12, 80, 110] };

/// Rank of an expert's matrices in percent of full rank; `None` is dense.
type Form = fn(expert: usize) -> Option<usize>;

/// A matrix whose values lie in the stock from `first` on.
#[derive(Clone, Copy)]
struct Cut {
    rows: usize,
    cols: usize,
    first: usize,
    /// A power of two: what it multiplies stays a number of the element type.
    scale: f32,
}

/// Numbers of the element type, from which weights are cut.
struct Stock {
    element: Element,
    values: Vec<f32>,
}

impl Stock {
    fn cut(&self, number: usize, rows: usize, cols: usize) -> Cut {
        let first = number * 7919 % (self.values.len() - rows * cols);
        Cut { rows, cols, first, scale: (3.0 / cols as f32).sqrt().log2().round().exp2() }
    }

    fn values(&self, cut: Cut) -> &[f32] {
        &self.values[cut.first..][..cut.rows * cut.cols]
    }

    fn bytes(&self, cut: Cut) -> Vec<u8> {
        let scaled: Vec<f32> = self.values(cut).iter().map(|value| value * cut.scale).collect();
        encode_f32(dtype(self.element), &scaled)
    }

    /// The product of these matrices and `x`.
    fn product(&self, factors: &[Cut], x: &[f64]) -> Vec<f64> {
        factors.iter().rev().fold(x.to_vec(), |x, &cut| {
            let rows = self.values(cut).par_chunks(cut.cols);
            rows.map(|row| f64::from(cut.scale) * dot(row, &x)).collect()
        })
    }

    fn expert(&self, [gate, up, down]: &[Vec<Cut>; 3], x: &[f64]) -> Vec<f64> {
        let (gate, up) = (self.product(gate, x), self.product(up, x));
        let h: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        self.product(down, &h)
    }
}

fn dot(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
}

impl Shape {
    /// Factors of gate, up and down of every expert.
    fn cuts(&self, stock: &Stock, form: Form) -> Vec<[Vec<Cut>; 3]> {
        let mut number = 0;
        let mut cut = |rows, cols| {
            number += 1;
            stock.cut(number, rows, cols)
        };
        let maps = [[self.width, self.hidden], [self.width, self.hidden], [self.hidden, self.width]];
        let expert = |e| {
            let rank =
                form(e).map(|percent| (self.hidden.min(self.width) * percent / 100).next_multiple_of(8));
            maps.map(|[rows, cols]| match rank {
                None => vec![cut(rows, cols)],
                Some(rank) => vec![cut(rows, rank), cut(rank, cols)],
            })
        };
        (0..self.experts).map(expert).collect()
    }
}

/// The experts with their weights in `block`.
fn place(
    stock: &Stock,
    cuts: &[[Vec<Cut>; 3]],
    block: &impl Block,
) -> Vec<Expert<DeviceMatrix, DeviceVector>> {
    let mut end = 0;
    let mut put = |cut: Cut| {
        let bytes = stock.bytes(cut);
        block.write(end, &bytes).unwrap();
        let address = block.address() + end as u64;
        end += bytes.len();
        DeviceMatrix { address, rows: cut.rows, cols: cut.cols, stride: cut.cols }
    };
    let linear = |weight| Linear { weight, bias: None };
    let expert = |maps: &[Vec<Cut>; 3]| {
        // V of up behind V of gate.
        let inner = maps.each_ref().map(|factors| put(factors[factors.len() - 1]));
        let outer = maps.each_ref().map(|factors| (factors.len() > 1).then(|| put(factors[0])));
        let [gate, up, down] = [0, 1, 2].map(|i| match outer[i] {
            None => linear(Matrix::Dense(inner[i])),
            Some(u) => linear(Matrix::LowRank { u, v: inner[i] }),
        });
        Expert::Mlp(Mlp { gate, up: Some(up), down, activation: Activation::SwiGlu })
    };
    cuts.iter().map(expert).collect()
}

/// Which experts a token's logits choose, and their weights; `None` where rounding could choose others.
fn chosen(logits: &[f64], top_k: usize) -> Option<Vec<(usize, f64)>> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let is_clear = logits[order[top_k - 1]] - logits[order[top_k]] > 1e-4;
    let sum: f64 = order[..top_k].iter().map(|&e| logits[e].exp()).sum();
    is_clear.then(|| order[..top_k].iter().map(|&e| (e, logits[e].exp() / sum)).collect())
}

pub(crate) fn real_shapes_against_f64(gpu: &impl Gpu) {
    let shape = if gpu.is_emulated() { SMALL } else { REAL };
    let mixed: Form = |e| [None, Some(15), Some(30), Some(45)][e % 4];
    let layers: [(Element, Form); 5] = [
        (Element::Bf16, |_| None),
        (Element::Bf16, |_| Some(50)),
        (Element::Bf16, mixed),
        (Element::F16, mixed),
        (Element::F32, mixed),
    ];
    for (element, form) in layers {
        check(gpu, &shape, element, form);
    }
}

fn check(gpu: &impl Gpu, shape: &Shape, element: Element, form: Form) {
    let &Shape { hidden, width, experts, top_k, batches } = shape;
    let stock = Stock { element, values: round(element, noise(2 * hidden * width, 21, 1.0)) };
    let cuts = shape.cuts(&stock, form);
    let elements: usize = cuts.iter().flatten().flatten().map(|cut| cut.rows * cut.cols).sum();
    let block = gpu.allocate(elements * element.bytes()).unwrap();
    let placed = place(&stock, &cuts, &block);
    let rule = RouterRule {
        spec: RouterSpec::softmax(top_k, WeightRule::RENORMALISED),
        group_of: vec![0; experts],
        live: vec![true; experts],
    };
    let router = noise(experts * hidden, 22, 2.0 * (3.0 / hidden as f32).sqrt());
    let weight = Tensor::from_f32("router", Dtype::F32, vec![experts, hidden], &router);
    let router_of_layer = LayerRouter { rule: &rule, weight: Some(&weight), bias: None, choice_bias: None };
    let spec = LayerSpec { hidden, top_k, router: Some(router_of_layer), ..spec(element, &placed) };
    let bench = Bench::new(gpu, &spec);

    let most = batches[batches.len() - 1];
    let x = round(element, noise(most * hidden, 23, 1.7));
    let wide = |token: usize| -> Vec<f64> {
        x[token * hidden..][..hidden].iter().map(|&value| value.into()).collect()
    };
    let routes: Vec<_> = (0..most)
        .into_par_iter()
        .map(|token| {
            let x = wide(token);
            chosen(&router.chunks(hidden).map(|row| dot(row, &x)).collect::<Vec<_>>(), top_k)
        })
        .collect();
    let tolerance = tolerance(element).max(1e-4);
    let all = bench.run(&x, &By::Router, None);
    for &tokens in batches {
        let found =
            if tokens == most { all.clone() } else { bench.run(&x[..tokens * hidden], &By::Router, None) };
        let mut compared = 0;
        for token in 0..tokens {
            let Some(route) = &routes[token] else { continue };
            let what = format!("{element:?}, ranks {:?}, token {token} of {tokens}", form(1));
            let found = &found[token * hidden..][..hidden];
            close(found, &all[token * hidden..][..hidden], tolerance, &what);
            // The first, the last and some between.
            if token * 5 % (tokens - 1).max(1) < 5 {
                let mut expected = vec![0.0; hidden];
                for &(e, weight) in route {
                    let y = stock.expert(&cuts[e], &wide(token));
                    expected.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
                }
                let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
                close(found, &expected, tolerance, &what);
                compared += 1;
            }
        }
        assert!(compared > 0, "no token of {tokens} is routed clearly");
    }
}
