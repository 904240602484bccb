//! A forward pass as a CUDA graph: captured once, replayed with other tokens and other routing, bit for bit what a launch
//! gives. On a GPU where there is one, and on the stand-in for the driver.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod gpu;

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUstreamCaptureMode as CaptureMode};
use cudarc::driver::{CudaContext, CudaStream, result};
use gpu::Gpu;
use moepress::architecture::{Activation, RouterSpec, WeightRule, WeightTarget};
use moepress::backend::cuda::{
    Block, Device, DeviceBlock, Element, Forward, LayerRouter, LayerSpec, Memory, MoeLayer, Routing, Rows,
};
use moepress::backend::{Expert, Linear, Matrix, Mlp, RouterRule};
use moepress::checkpoint::{Dtype, Tensor, Weight, encode_f32};

const HIDDEN: usize = 128;
const WIDTH: usize = 96;
const EXPERTS: usize = 8;

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

fn weight(rows: usize, cols: usize, seed: u64) -> Weight {
    let values = noise(rows * cols, seed, (3.0 / cols as f32).sqrt());
    Weight::plain(Tensor::from_f32("w", Dtype::BF16, vec![rows, cols], &values)).unwrap()
}

/// Dense experts and low-rank ones, by turns.
fn layer(device: &Arc<Device>) -> MoeLayer<DeviceBlock> {
    let map = |rows: usize, cols: usize, seed: u64, e: usize| {
        let weight = match e % 2 {
            0 => Matrix::Dense(weight(rows, cols, seed)),
            _ => Matrix::LowRank { u: weight(rows, 24, seed), v: weight(24, cols, seed + 1) },
        };
        Linear { weight, bias: None }
    };
    let expert = |e: usize| {
        let seed = 10 * e as u64;
        Expert::<Weight, Tensor>::Mlp(Mlp {
            gate: map(WIDTH, HIDDEN, seed, e),
            up: Some(map(WIDTH, HIDDEN, seed + 2, e)),
            down: map(HIDDEN, WIDTH, seed + 4, e),
            activation: Activation::SwiGlu,
        })
    };
    let experts: Vec<_> = (0..EXPERTS).map(expert).collect();
    let rule = RouterRule {
        spec: RouterSpec::softmax(2, WeightRule::RENORMALISED),
        group_of: vec![0; EXPERTS],
        live: vec![true; EXPERTS],
    };
    let spec = LayerSpec {
        hidden: HIDDEN,
        element: Element::Bf16,
        top_k: 2,
        experts: &experts,
        base: &[None, None, None],
        expert_map: None,
        shared: None,
        router: Some(LayerRouter { rule: &rule, weight: None, bias: None, choice_bias: None }),
        target: WeightTarget::Output,
    };
    MoeLayer::new(device, &spec).unwrap()
}

/// The memory of a pass, and a stream of its own.
struct Pass {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    layer: MoeLayer<DeviceBlock>,
    tokens: usize,
    x: DeviceBlock,
    logits: DeviceBlock,
    out: DeviceBlock,
    workspace: DeviceBlock,
}

impl Pass {
    fn new(device: Arc<Device>, tokens: usize) -> Self {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let layer = layer(&device);
        let workspace = device.room(layer.workspace_bytes(tokens).unwrap());
        let [x, out] = [(); 2].map(|()| device.room(tokens * HIDDEN * 2));
        let logits = device.room(tokens * EXPERTS * 4);
        Pass { device, stream, layer, tokens, x, logits, out, workspace }
    }

    /// New tokens and logits in the same memory.
    fn fill(&self, seed: u64) {
        self.x.write(0, &encode_f32(Dtype::BF16, &noise(self.tokens * HIDDEN, seed, 1.5))).unwrap();
        let logits = noise(self.tokens * EXPERTS, seed + 1, 3.0);
        self.logits.write(0, &encode_f32(Dtype::F32, &logits)).unwrap();
        self.out.write(0, &vec![0xff; self.out.bytes()]).unwrap();
    }

    fn enqueue(&self) {
        let rows = |block: &DeviceBlock| Rows { address: block.address(), stride: HIDDEN };
        let args = Forward {
            tokens: self.tokens,
            x: rows(&self.x),
            out: rows(&self.out),
            routing: Routing::Logits { address: self.logits.address(), stride: EXPERTS },
            residual: None,
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace.bytes(),
        };
        // SAFETY: a living stream, and buffers of the sizes that the layer asks for.
        unsafe { self.layer.forward(&self.device.stream(self.stream.cu_stream().cast()), &args) }.unwrap();
    }

    fn result(&self) -> Vec<u8> {
        self.stream.synchronize().unwrap();
        self.device.read(&self.out)
    }
}

/// A capture in global mode breaks when another thread allocates: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The tests below, on the stand-in.
#[test]
fn through_a_driver() {
    gpu::through_a_driver("graph");
}

#[test]
fn through_a_driver_one_by_one() {
    gpu::through_a_driver_with("only_the_first_kernel", &[("MOEPRESS_CUDA_SERIAL", "1")]);
}

/// All kernels of a pass but the first may start while the one before them ends; none with `MOEPRESS_CUDA_SERIAL=1`.
#[test]
fn only_the_first_kernel_of_a_graph_waits_for_all_before_it() {
    if !gpu::is_stand_in() {
        return;
    }
    let Some(device) = gpu::device() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pass = Pass::new(device, 1);
    pass.fill(1);
    // SAFETY: the stand-in, which is loaded already, and its function of this type.
    let overlapping = || unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        library.get::<unsafe extern "C" fn() -> i32>("stand_in_overlapping").unwrap()()
    };
    let before = overlapping();
    pass.enqueue();
    // Routing with the sort, four GEMMs, combine.
    let serial = std::env::var("MOEPRESS_CUDA_SERIAL").is_ok_and(|v| v == "1");
    assert_eq!(pass.device.overlaps(), !serial);
    assert_eq!(overlapping() - before, if serial { 0 } else { 5 });
    pass.result();
}

#[test]
fn a_graph_is_replayed_with_other_routing() {
    let Some(device) = gpu::device() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (batches, seeds, replays) =
        if gpu::is_stand_in() { ([1, 13, 300, 2100], 2, 2) } else { ([1, 13, 700, 3000], 4, 50) };
    for tokens in batches {
        let pass = Pass::new(Arc::clone(&device), tokens);
        let expected: Vec<_> = (0..seeds)
            .map(|seed| {
                pass.fill(10 * seed);
                pass.enqueue();
                pass.result()
            })
            .collect();
        // In global mode whatever could wait or allocate, on any thread, fails.
        pass.stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
        pass.enqueue();
        // SAFETY: the stream is capturing.
        let graph = unsafe { result::stream::end_capture(pass.stream.cu_stream()) }.unwrap();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the graph comes from the capture.
        let runnable = unsafe { result::graph::instantiate(graph, flags) }.unwrap();
        for (seed, expected) in expected.iter().enumerate() {
            pass.fill(10 * seed as u64);
            for _ in 0..replays {
                // SAFETY: instantiated above; the memory it was captured with lives.
                unsafe { result::graph::launch(runnable, pass.stream.cu_stream()) }.unwrap();
            }
            assert!(
                pass.result() == *expected,
                "{tokens} tokens, seed {seed}: other bits than without a graph"
            );
        }
        // SAFETY: nothing runs any more.
        unsafe {
            result::graph::exec_destroy(runnable).unwrap();
            result::graph::destroy(graph).unwrap();
        }
    }
}

/// The stand-in can fail: like a driver, it refuses a capture in which something allocates.
#[test]
fn a_graph_that_allocates_is_refused() {
    if !gpu::is_stand_in() {
        return;
    }
    let Some(device) = gpu::device() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pass = Pass::new(device, 1);
    pass.stream.begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    let refused = pass.device.allocate(64).is_err();
    // SAFETY: the stream is capturing.
    let ended = unsafe { result::stream::end_capture(pass.stream.cu_stream()) };
    assert!(refused && ended.is_err());
}

/// Whatever was in the memory before, with a graph or without.
#[test]
fn runs_without_a_graph_are_equal_bit_for_bit() {
    let Some(device) = gpu::device() else { return };
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (tokens, runs) = if gpu::is_stand_in() { (100, 3) } else { (500, 50) };
    let pass = Pass::new(device, tokens);
    pass.fill(1);
    pass.enqueue();
    let expected = pass.result();
    for run in 0..runs {
        pass.out.write(0, &vec![run; pass.out.bytes()]).unwrap();
        pass.workspace.write(0, &vec![run; pass.workspace.bytes()]).unwrap();
        pass.enqueue();
        assert!(pass.result() == expected, "run {run}");
    }
}
