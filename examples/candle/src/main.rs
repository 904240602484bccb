//! A MoE layer of moepress in candle: dense and low-rank experts as one `CustomOp3` on candle's CUDA stream, compared with
//! candle's own matrix products.
//!
//! `cargo run --release --features cuda`. Says why it does nothing where there is no GPU.

mod op;

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use half::bf16;
use moepress::architecture::{Activation, WeightTarget};
use moepress::backend::cuda::{self, Element, LayerSpec, availability};
use moepress::backend::{Expert, Linear, Matrix, Mlp};
use moepress::checkpoint::{self, Dtype, Weight};

const HIDDEN: usize = 256;
const WIDTH: usize = 384;
const RANK: usize = 48;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const TOKENS: usize = 100;

/// A matrix in candle, and as moepress takes it.
struct Map {
    dense: Tensor,
    stored: Matrix<Weight>,
}

fn noise(rows: usize, cols: usize) -> Result<Tensor> {
    let deviation = (cols as f32).sqrt().recip();
    Ok(Tensor::randn(0f32, deviation, (rows, cols), &Device::Cpu)?.to_dtype(DType::BF16)?)
}

fn weight(tensor: &Tensor) -> Result<Weight> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(Weight::plain(checkpoint::Tensor::from_f32("weight", Dtype::BF16, tensor.dims().to_vec(), &values))?)
}

impl Map {
    fn new(rows: usize, cols: usize, low_rank: bool) -> Result<Self> {
        if !low_rank {
            let dense = noise(rows, cols)?;
            let stored = Matrix::Dense(weight(&dense)?);
            return Ok(Map { dense: dense.to_dtype(DType::F32)?, stored });
        }
        let (u, v) = (noise(rows, RANK)?, noise(RANK, cols)?);
        let dense = u.to_dtype(DType::F32)?.matmul(&v.to_dtype(DType::F32)?)?;
        Ok(Map { dense, stored: Matrix::LowRank { u: weight(&u)?, v: weight(&v)? } })
    }
}

/// What the layer computes, in f32 on the CPU.
fn reference(experts: &[[Tensor; 3]], x: &Tensor, ids: &[Vec<u32>], weights: &[Vec<f32>]) -> Result<Tensor> {
    let mut rows = Vec::new();
    for (t, (ids, weights)) in ids.iter().zip(weights).enumerate() {
        let x = x.narrow(0, t, 1)?;
        let mut sum = x.zeros_like()?;
        for (&e, &weight) in ids.iter().zip(weights) {
            let [gate, up, down] = &experts[e as usize];
            let hidden = (x.matmul(&gate.t()?)?.silu()? * x.matmul(&up.t()?)?)?;
            sum = (sum + (hidden.matmul(&down.t()?)? * f64::from(weight))?)?;
        }
        rows.push(sum);
    }
    Ok(Tensor::cat(&rows, 0)?)
}

fn main() -> Result<()> {
    if let Err(why) = availability() {
        println!("no layer is run: {why}");
        return Ok(());
    }
    ensure!(cfg!(feature = "cuda"), "built without candle's CUDA: cargo run --release --features cuda");
    let (mut experts, mut dense) = (Vec::new(), Vec::new());
    for e in 0..EXPERTS {
        let map = |rows, cols| Map::new(rows, cols, e % 2 == 1);
        let [gate, up, down] = [map(WIDTH, HIDDEN)?, map(WIDTH, HIDDEN)?, map(HIDDEN, WIDTH)?];
        dense.push([gate.dense, up.dense, down.dense]);
        let linear = |weight| Linear { weight, bias: None };
        experts.push(Expert::Mlp(Mlp {
            gate: linear(gate.stored),
            up: Some(linear(up.stored)),
            down: linear(down.stored),
            activation: Activation::SwiGlu,
        }));
    }
    let spec = LayerSpec {
        hidden: HIDDEN,
        element: Element::Bf16,
        top_k: TOP_K,
        experts: &experts,
        base: &[None, None, None],
        expert_map: None,
        shared: None,
        router: None,
        target: WeightTarget::Output,
    };
    let layer = op::MoeOp::new(&cuda::Device::new(0)?, &spec, TOKENS)?;

    let gpu = Device::new_cuda(0)?;
    let x = noise(TOKENS, HIDDEN)?;
    let scores = Tensor::rand(0f32, 1f32, (TOKENS, EXPERTS), &Device::Cpu)?;
    let ids = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, TOP_K)?.contiguous()?;
    let weights = scores.gather(&ids, D::Minus1)?;
    let found =
        x.to_device(&gpu)?.apply_op3_no_bwd(&ids.to_device(&gpu)?, &weights.to_device(&gpu)?, &layer)?;

    let expected = reference(&dense, &x.to_dtype(DType::F32)?, &ids.to_vec2()?, &weights.to_vec2()?)?;
    let found = found.to_device(&Device::Cpu)?.to_vec2::<bf16>()?.concat();
    let expected = expected.to_vec2::<f32>()?.concat();
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    let difference = norm(&mut found.iter().zip(&expected).map(|(f, e)| f.to_f32() - e));
    let error = difference / norm(&mut expected.iter().copied());
    println!("{TOKENS} tokens: relative error {error:.1e}");
    ensure!(error < 2e-2, "the layer is not what candle computes");
    Ok(())
}
