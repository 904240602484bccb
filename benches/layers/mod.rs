//! One MoE layer with synthetic weights, in the shapes of published models.

use moepress::architecture::{Activation, RouterSpec, WeightRule};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Backend, Base, Expert, Linear, Matrix, Mlp, RouterRule, RouterWeights};
use moepress::checkpoint::{Dtype, Stride, Tensor, Weight as Stored};

type Buffer = <Cpu as Backend>::Buffer;
type Weight = <Cpu as Backend>::Weight;

/// Sizes of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) hidden: usize,
    pub(crate) width: usize,
    pub(crate) experts: usize,
    pub(crate) top_k: usize,
    pub(crate) shared_width: usize,
}

/// Qwen1.5-MoE-A2.7B; Mixtral-8x7B with half of its experts, to fit into memory; and a small one.
pub(crate) const SHAPES: [Shape; 3] = [
    Shape { name: "qwen", hidden: 2048, width: 1408, experts: 60, top_k: 4, shared_width: 5632 },
    Shape { name: "mixtral", hidden: 4096, width: 14336, experts: 4, top_k: 2, shared_width: 0 },
    Shape { name: "small", hidden: 512, width: 352, experts: 16, top_k: 4, shared_width: 1408 },
];

/// How the matrices of experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
    /// FP8 e4m3 with a scale per block of 128 × 128.
    Fp8,
    Mxfp4,
}

impl Format {
    #[allow(dead_code, reason = "one of the benches takes all")]
    pub(crate) fn named(name: &str) -> Option<Self> {
        let all = [Format::F32, Format::Bf16, Format::Fp8, Format::Mxfp4];
        all.into_iter().find(|format| format.name() == name)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Fp8 => "fp8",
            Format::Mxfp4 => "mxfp4",
        }
    }

    /// Of what is not packed: norms, routers.
    fn dtype(self) -> Dtype {
        if self == Format::F32 { Dtype::F32 } else { Dtype::BF16 }
    }
}

/// A prepared layer and its buffers.
pub(crate) struct Layer {
    shape: Shape,
    router: <Cpu as Backend>::Router,
    experts: <Cpu as Backend>::Experts,
    shared: Option<(Mlp<Weight>, Weight)>,
    routing: <Cpu as Backend>::Routing,
    out: Buffer,
    buffers: [Buffer; 4],
}

/// Values without structure, from −`scale` to `scale`, fast.
pub(crate) fn noise(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

fn stored(format: Format, rows: usize, cols: usize, seed: usize) -> Stored {
    let codes = |count: usize| -> Vec<u8> {
        let random = noise(count.div_ceil(2), seed as u64 + 1, 1.0);
        random.iter().flat_map(|v| v.to_bits().to_le_bytes()[1..3].to_vec()).take(count).collect()
    };
    let matrix = match format {
        Format::F32 | Format::Bf16 => Stored::plain(tensor(format.dtype(), rows, cols, seed)),
        Format::Fp8 => {
            // Without the codes of NaN.
            let codes: Vec<u8> = codes(rows * cols).into_iter().map(|code| code & 0xf7).collect();
            let values = Tensor::owned("w", Dtype::F8_E4M3, vec![rows, cols], codes);
            let blocks = vec![rows.div_ceil(128), cols.div_ceil(128)];
            let scales = vec![1e-4; blocks[0] * blocks[1]];
            Stored::fp8(values, Tensor::from_f32("s", Dtype::F32, blocks, &scales), [128, 128])
        }
        Format::Mxfp4 => {
            let blocks = Tensor::owned("b", Dtype::U8, vec![rows, cols / 32, 16], codes(rows * cols / 2));
            let scales = Tensor::owned("s", Dtype::U8, vec![rows, cols / 32], vec![120; rows * cols / 32]);
            Stored::mxfp4(blocks, scales, Stride::ALL, rows)
        }
    };
    matrix.expect("a matrix of numbers")
}

fn tensor(dtype: Dtype, rows: usize, cols: usize, seed: usize) -> Tensor {
    let scale = (3.0 / cols as f32).sqrt();
    Tensor::from_f32("w", dtype, vec![rows, cols], &noise(rows * cols, seed as u64 + 1, scale))
}

impl Layer {
    /// A layer whose experts are dense, or of rank `percent` of full rank.
    pub(crate) fn new(shape: Shape, format: Format, percent: Option<usize>) -> Self {
        let Shape { hidden, width, experts, top_k, shared_width, .. } = shape;
        let matrix = |rows: usize, cols: usize, seed: usize| match percent {
            None => Matrix::Dense(stored(format, rows, cols, seed)),
            Some(percent) => {
                let rank = rows.min(cols) * percent / 100;
                let (u, v) = (stored(format, rows, rank, seed), stored(format, rank, cols, seed + 1));
                Matrix::LowRank { u, v }
            }
        };
        let map = |rows, cols, seed| Linear { weight: matrix(rows, cols, seed), bias: None };
        let expert = |e: usize| {
            Expert::Mlp(Mlp {
                gate: map(width, hidden, 6 * e),
                up: Some(map(width, hidden, 6 * e + 2)),
                down: map(hidden, width, 6 * e + 4),
                activation: Activation::SwiGlu,
            })
        };
        let experts_stored: Vec<_> = (0..experts).map(expert).collect();
        let weight = |rows, cols, seed| Cpu.weight(&stored(format, rows, cols, seed)).expect("a known type");
        let shared = (shared_width > 0).then(|| {
            let (gate, up) = (weight(shared_width, hidden, 1001), weight(shared_width, hidden, 1002));
            let down = weight(hidden, shared_width, 1003);
            let scalar = Stored::plain(tensor(format.dtype(), 1, hidden, 1004)).expect("plain numbers");
            let scalar = Cpu.weight(&scalar).expect("a known type");
            (Mlp { gate, up: Some(up), down, activation: Activation::SwiGlu }, scalar)
        });
        let rule = RouterRule {
            spec: RouterSpec::softmax(top_k, WeightRule::Scaled(1.0)),
            group_of: vec![0; experts],
            live: vec![true; experts],
        };
        let router = RouterWeights {
            weight: tensor(format.dtype(), experts, hidden, 1000),
            bias: None,
            choice_bias: None,
            expert_scales: None,
        };
        Layer {
            shape,
            router: Cpu.router(&router, rule).expect("a known type"),
            experts: Cpu.experts(&experts_stored, &Base::default()).expect("weights of a known type"),
            shared,
            routing: Cpu.routing(),
            out: Cpu.buffer(),
            buffers: std::array::from_fn(|_| Cpu.buffer()),
        }
    }

    /// Inputs for `tokens` tokens.
    pub(crate) fn input(&self, tokens: usize) -> Buffer {
        let mut x = Cpu.buffer();
        let values = noise(tokens * self.shape.hidden, 77, 1.7);
        Cpu.upload(&values, tokens, self.shape.hidden, &mut x).expect("an upload on the host");
        x
    }

    /// Router, experts, shared expert and its gate.
    pub(crate) fn run(&mut self, x: &Buffer) -> moepress::backend::Result<()> {
        let Layer { router, experts, shared, routing, out, buffers: [gate, up, down, scalar], .. } = self;
        Cpu.route(x, router, routing)?;
        Cpu.run_experts(x, experts, routing, out, None)?;
        if let Some((mlp, scalar_gate)) = shared {
            Cpu.linear(x, &mlp.gate, None, gate)?;
            if let Some(map) = &mlp.up {
                Cpu.linear(x, map, None, up)?;
            }
            Cpu.activate(gate, Some(up), mlp.activation)?;
            Cpu.linear(gate, &mlp.down, None, down)?;
            Cpu.linear(x, scalar_gate, None, scalar)?;
            Cpu.sigmoid_gate(down, scalar)?;
            Cpu.add(out, down)?;
        }
        Ok(())
    }
}
