//! The whole GPU layer against the CPU backend: on the emulated GPU, and on a real one where there is one.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod gpu;
#[path = "cuda_layer/shapes.rs"]
mod shapes;

use gpu::Gpu;
use gpu::emulator::{Emulator, Mode};
use half::{bf16, f16};
use moepress::architecture::{
    Activation, Choice, GroupLimit, GroupScore, RouterSpec, Scoring, Skip, SkipThreshold, WeightRule,
    WeightTarget,
};
use moepress::backend::cpu::Cpu;
use moepress::backend::cuda::{
    Block, DeviceMatrix, DeviceVector, Element, Forward, LayerMatrix, LayerRouter, LayerSpec, LayerVector,
    MoeLayer, Routing, Rows, SharedExpert,
};
use moepress::backend::{
    Backend, Base, Expert, Linear, Matrix, Mlp, RouterRule, RouterWeights, Routes, StoredExpert,
};
use moepress::checkpoint::{Dtype, Tensor, Weight, encode_f32};

const HIDDEN: usize = 48;
const WIDTH: usize = 40;
const EXPERTS: usize = 9;
const TOP_K: usize = 3;

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

fn dtype(element: Element) -> Dtype {
    match element {
        Element::F32 => Dtype::F32,
        Element::F16 => Dtype::F16,
        Element::Bf16 => Dtype::BF16,
    }
}

fn round(element: Element, values: Vec<f32>) -> Vec<f32> {
    match element {
        Element::F32 => values,
        Element::F16 => values.into_iter().map(|v| f16::from_f32(v).to_f32()).collect(),
        Element::Bf16 => values.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect(),
    }
}

fn decode(element: Element, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / element.bytes()];
    moepress::checkpoint::decode_f32(dtype(element), bytes, &mut out);
    out
}

fn weight(element: Element, rows: usize, cols: usize, seed: u64) -> Weight {
    let values = noise(rows * cols, seed, (3.0 / cols.max(1) as f32).sqrt());
    Weight::plain(Tensor::from_f32("w", dtype(element), vec![rows, cols], &values)).unwrap()
}

fn vector(len: usize, seed: u64) -> Tensor {
    Tensor::from_f32("v", Dtype::F32, vec![len], &noise(len, seed, 0.5))
}

/// What an expert of the tests is made of.
#[derive(Clone, Copy, Default)]
struct Made {
    width: usize,
    /// Of gate, up and down; dense without.
    ranks: [Option<usize>; 3],
    biases: bool,
    /// Sparse rows beside every low-rank matrix.
    sparse: usize,
    /// Whether low-rank matrices are added to the layer's base.
    delta: bool,
}

fn expert(element: Element, made: Made, activation: Activation, seed: u64) -> StoredExpert {
    let map = |i: usize, rows: usize, cols: usize| {
        let seed = 100 * seed + 10 * i as u64;
        let weight = match made.ranks[i] {
            None => Matrix::Dense(weight(element, rows, cols, seed)),
            Some(rank) => {
                let (u, v) = (weight(element, rows, rank, seed + 1), weight(element, rank, cols, seed + 2));
                if made.delta {
                    Matrix::Delta { u, v }
                } else if made.sparse == 0 {
                    Matrix::LowRank { u, v }
                } else {
                    let ids = (0..made.sparse).map(|i| 5 * i as u32 + 1).collect();
                    Matrix::LowRankRows { u, v, rows: ids, s: weight(element, made.sparse, cols, seed + 4) }
                }
            }
        };
        Linear { weight, bias: made.biases.then(|| vector(rows, seed + 3)) }
    };
    Expert::Mlp(Mlp {
        gate: map(0, made.width, HIDDEN),
        up: activation.is_gated().then(|| map(1, made.width, HIDDEN)),
        down: map(2, HIDDEN, made.width),
        activation,
    })
}

/// Every form of an expert in one layer, ranks from 0 up, widths that are no multiple of anything.
fn experts(element: Element, activation: Activation) -> Vec<StoredExpert> {
    let made = |width, ranks, biases| Made { width, ranks, biases, ..Made::default() };
    let mlp = |seed, made| expert(element, made, activation, seed);
    vec![
        mlp(0, made(WIDTH, [None; 3], false)),
        mlp(1, made(WIDTH, [Some(16), Some(8), Some(5)], false)),
        mlp(2, made(33, [None; 3], true)),
        Expert::Alias(1),
        Expert::Constant(vector(HIDDEN, 3)),
        mlp(5, made(WIDTH, [Some(0), None, Some(21)], true)),
        Expert::None,
        mlp(7, made(7, [None, Some(3), None], false)),
        mlp(8, Made { sparse: 3, ..made(WIDTH, [Some(1), Some(40), Some(0)], false) }),
    ]
}

/// A layer some of whose experts are a base plus a difference, in all matrices or in some.
fn deltas(element: Element) -> (Vec<StoredExpert>, Base<Weight>) {
    let made = |ranks, biases| Made { width: WIDTH, ranks, biases, delta: true, ..Made::default() };
    let delta = |seed, made| expert(element, made, Activation::SwiGlu, seed);
    let mut layer = experts(element, Activation::SwiGlu);
    layer[0] = delta(20, made([Some(4), Some(9), Some(6)], false));
    layer[2] = delta(22, made([Some(16), None, Some(0)], true));
    layer[7] = delta(27, made([None, Some(2), None], false));
    let base = |rows, cols, seed| Some(weight(element, rows, cols, seed));
    (layer, [base(WIDTH, HIDDEN, 9000), base(WIDTH, HIDDEN, 9001), base(HIDDEN, WIDTH, 9002)])
}

fn rule(spec: RouterSpec) -> RouterRule {
    let groups = spec.groups.map_or(1, |limit| limit.count);
    RouterRule {
        spec,
        group_of: (0..EXPERTS).map(|e| (e * groups / EXPERTS) as u32).collect(),
        live: (0..EXPERTS).map(|e| e != 6).collect(),
    }
}

fn router_weights(rule: &RouterRule) -> RouterWeights {
    let values = noise(EXPERTS * HIDDEN, 77, 0.6);
    RouterWeights {
        weight: Tensor::from_f32("router", Dtype::F32, vec![EXPERTS, HIDDEN], &values),
        bias: rule.spec.bias.then(|| vector(EXPERTS, 78)),
        choice_bias: (rule.spec.choice == Choice::BiasedScore).then(|| vector(EXPERTS, 79)),
        expert_scales: None,
    }
}

fn spec<W, V>(element: Element, experts: &[Expert<W, V>]) -> LayerSpec<'_, W, V> {
    LayerSpec {
        hidden: HIDDEN,
        element,
        top_k: TOP_K,
        experts,
        base: &[None, None, None],
        expert_map: None,
        shared: None,
        router: None,
        target: WeightTarget::Output,
    }
}

fn with_router<'a, W, V>(
    spec: LayerSpec<'a, W, V>,
    rule: &'a RouterRule,
    weights: &'a RouterWeights,
) -> LayerSpec<'a, W, V> {
    let router = LayerRouter {
        rule,
        weight: Some(&weights.weight),
        bias: weights.bias.as_ref(),
        choice_bias: weights.choice_bias.as_ref(),
    };
    LayerSpec { router: Some(router), target: rule.spec.target, ..spec }
}

/// A prepared layer and its GPU.
struct Bench<'g, G: Gpu> {
    gpu: &'g G,
    layer: MoeLayer<G::Block>,
}

/// The routing of a pass, on the host.
enum By<'a> {
    Router,
    Logits(&'a [f32]),
    Given(&'a [i32], &'a [f32]),
}

impl<'g, G: Gpu> Bench<'g, G> {
    fn new<'a, W, V>(gpu: &'g G, spec: &LayerSpec<'a, W, V>) -> Self
    where
        LayerMatrix<'a>: From<&'a W>,
        LayerVector<'a>: From<&'a V>,
    {
        Bench { gpu, layer: MoeLayer::new(gpu, spec).unwrap() }
    }

    fn run(&self, x: &[f32], by: &By<'_>, residual: Option<&[f32]>) -> Vec<f32> {
        let element = self.layer.element();
        let hidden = self.layer.hidden();
        let tokens = x.len() / hidden;
        let upload = |values: &[f32]| self.gpu.upload(&encode_f32(dtype(element), values));
        let (x, residual) = (upload(x), residual.map(upload));
        let out = self.gpu.room(tokens * hidden * element.bytes());
        let bytes = self.layer.workspace_bytes(tokens).unwrap();
        let workspace = self.gpu.room(bytes);
        let rows = |block: &G::Block| Rows { address: block.address(), stride: hidden };
        let words = |values: &[f32]| self.gpu.upload(&encode_f32(Dtype::F32, values));
        let (one, two);
        let routing = match by {
            By::Router => Routing::Router,
            By::Logits(logits) => {
                one = words(logits);
                Routing::Logits { address: one.address(), stride: logits.len() / tokens }
            }
            By::Given(ids, weights) => {
                let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
                (one, two) = (self.gpu.upload(&bytes), words(weights));
                Routing::Given { ids: one.address(), weights: two.address() }
            }
        };
        let args = Forward {
            tokens,
            x: rows(&x),
            out: rows(&out),
            routing,
            residual: residual.as_ref().map(rows),
            workspace: workspace.address(),
            workspace_bytes: bytes,
        };
        // SAFETY: buffers of the sizes that the layer asks for.
        self.gpu.enqueue(&mut |launch| unsafe { self.layer.forward(launch, &args) }).unwrap();
        decode(element, &self.gpu.read(&out))
    }
}

/// What the CPU backend makes of it, and how it routed.
fn reference(
    experts: &[StoredExpert],
    base: &Base<Weight>,
    rule: &RouterRule,
    weights: &RouterWeights,
    x: &[f32],
) -> (Vec<f32>, Routes) {
    let (mut input, mut out, mut routing) = (Cpu.buffer(), Cpu.buffer(), Cpu.routing());
    Cpu.upload(x, x.len() / HIDDEN, HIDDEN, &mut input).unwrap();
    let router = Cpu.router(weights, rule.clone()).unwrap();
    let experts = Cpu.experts(experts, base).unwrap();
    Cpu.route(&input, &router, &mut routing).unwrap();
    Cpu.run_experts(&input, &experts, &mut routing, &mut out, None).unwrap();
    (Cpu.download(&out).unwrap(), Cpu.routes(&routing).unwrap())
}

/// Each value within `tolerance` of the root mean square of all: the GPU rounds z, h, y and the result to the element
/// type, the CPU nothing.
#[track_caller]
fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len());
    let scale = (expected.iter().map(|v| v * v).sum::<f32>() / expected.len() as f32).sqrt();
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * scale, "{what}: [{i}] {f}, expected {e}, rms {scale}");
    }
}

fn tolerance(element: Element) -> f32 {
    match element {
        Element::F32 => 1e-5,
        Element::F16 => 1e-2,
        Element::Bf16 => 6e-2,
    }
}

/// All forms, all types. In 16 bits, batches for every family of GEMM kernels; in bf16 for every sort too.
fn every_form_against_the_cpu(gpu: &impl Gpu) {
    let cases: [(Element, &[usize]); 3] = [
        (Element::F32, &[1, 70]),
        (Element::F16, &[3, 12, 40, 70, 150]),
        (Element::Bf16, &[1, 8, 9, 40, 70, 150, 1400]),
    ];
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    for (element, batches) in cases {
        let experts = experts(element, Activation::SwiGlu);
        let spec = with_router(spec(element, &experts), &rule, &weights);
        let bench = Bench::new(gpu, &spec);
        for &tokens in batches {
            let x = round(element, noise(tokens * HIDDEN, 5, 1.7));
            let (expected, _) = reference(&experts, &[None, None, None], &rule, &weights, &x);
            let found = bench.run(&x, &By::Router, None);
            close(&found, &expected, tolerance(element), &format!("{element:?}, {tokens} tokens"));
        }
    }
}

/// A base plus differences, beside experts without.
fn deltas_against_the_cpu(gpu: &impl Gpu) {
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    for (element, batches) in [(Element::F32, &[33][..]), (Element::Bf16, &[1, 20, 150])] {
        let (experts, base) = deltas(element);
        let spec = LayerSpec { base: &base, ..spec(element, &experts) };
        let bench = Bench::new(gpu, &with_router(spec, &rule, &weights));
        for &tokens in batches {
            let x = round(element, noise(tokens * HIDDEN, 15, 1.7));
            let (expected, _) = reference(&experts, &base, &rule, &weights, &x);
            let found = bench.run(&x, &By::Router, None);
            close(&found, &expected, tolerance(element), &format!("{element:?}, {tokens} tokens"));
        }
    }
}

/// gpt-oss: biases, clamps, softmax over the chosen.
fn clamped_activation_against_the_cpu(gpu: &impl Gpu) {
    let activation = Activation::ClampedSwiGlu { limit: 1.0, slope: 1.702 };
    let experts = experts(Element::F32, activation);
    let softmax = RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED);
    let rule = rule(RouterSpec { choice: Choice::Logit, bias: true, ..softmax });
    let weights = router_weights(&rule);
    let spec = with_router(spec(Element::F32, &experts), &rule, &weights);
    let bench = Bench::new(gpu, &spec);
    let x = noise(20 * HIDDEN, 6, 2.0);
    let (expected, _) = reference(&experts, &[None, None, None], &rule, &weights, &x);
    close(&bench.run(&x, &By::Router, None), &expected, 1e-5, "clamped");
}

/// Switch Transformers' experts without up, and Gemma's, in every form.
fn other_activations_against_the_cpu(gpu: &impl Gpu) {
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    let cases = [
        (Element::F32, Activation::Relu, &[20][..]),
        (Element::Bf16, Activation::Relu, &[1, 20, 50, 150]),
        (Element::F16, Activation::GeluTanh, &[3, 150]),
        (Element::Bf16, Activation::GeGluTanh, &[3, 150]),
        (Element::F32, Activation::SquaredRelu, &[20]),
    ];
    for (element, activation, batches) in cases {
        let experts = experts(element, activation);
        let bench = Bench::new(gpu, &with_router(spec(element, &experts), &rule, &weights));
        for &tokens in batches {
            let x = round(element, noise(tokens * HIDDEN, 16, 1.7));
            let (expected, _) = reference(&experts, &[None, None, None], &rule, &weights, &x);
            let found = bench.run(&x, &By::Router, None);
            close(
                &found,
                &expected,
                tolerance(element),
                &format!("{element:?} {activation:?}, {tokens} tokens"),
            );
        }
    }
}

/// Every rule of a family routes as on the CPU; logits of the caller and ids of the caller give the same bits.
fn routers_against_the_cpu(gpu: &impl Gpu) {
    let softmax = RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED);
    let sum = WeightRule::Renormalised { added: 1e-20, least: 0.0, scale: 2.5 };
    let skip = |tail, rescale| Some(Skip { threshold: SkipThreshold::Tail(tail), rescale });
    let limit = |score| Some(GroupLimit { count: 3, kept: 2, score });
    let sigmoid = RouterSpec { scoring: Scoring::Sigmoid, weights: sum, ..softmax.clone() };
    let rules = [
        RouterSpec {
            weights: WeightRule::Scaled(16.0),
            groups: limit(GroupScore::Largest),
            ..softmax.clone()
        },
        RouterSpec { choice: Choice::BiasedScore, groups: limit(GroupScore::TwoLargest), ..sigmoid.clone() },
        RouterSpec { choice: Choice::BiasedScore, ..softmax.clone() },
        RouterSpec { choice: Choice::Logit, target: WeightTarget::Input, ..sigmoid },
        RouterSpec { skip: skip(0.35, true), ..softmax.clone() },
        RouterSpec { skip: skip(0.5, false), ..softmax.clone() },
        RouterSpec { scoring: Scoring::SparseMixer { threshold: 0.02 }, ..softmax },
    ];
    let experts = experts(Element::F32, Activation::SwiGlu);
    let x = noise(30 * HIDDEN, 8, 1.5);
    for spec_of_rule in rules {
        let rule = rule(spec_of_rule);
        let weights = router_weights(&rule);
        let spec = with_router(spec(Element::F32, &experts), &rule, &weights);
        let bench = Bench::new(gpu, &spec);
        let (expected, routes) = reference(&experts, &[None, None, None], &rule, &weights, &x);
        let what = format!("{:?}", rule.spec);
        assert_eq!(routes.ids.contains(&Routes::SKIPPED), rule.spec.skip.is_some(), "{what}");
        let found = bench.run(&x, &By::Router, None);
        close(&found, &expected, 1e-5, &what);
        let ids: Vec<i32> = routes.ids.iter().map(|&id| id as i32).collect();
        close(&bench.run(&x, &By::Given(&ids, &routes.weights), None), &expected, 1e-5, &what);
        // The CPU's logits hold the bias already, where there is one; none of these rules has one.
        close(&bench.run(&x, &By::Logits(&routes.logits), None), &expected, 1e-5, &what);
    }
}

/// More tokens than what few of them are routed with, at once and in parts that are not.
fn many_tokens_route_as_few_do(gpu: &impl Gpu) {
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    for element in [Element::Bf16, Element::F16] {
        let experts = experts(element, Activation::SwiGlu);
        let bench = Bench::new(gpu, &with_router(spec(element, &experts), &rule, &weights));
        let x = round(element, noise(300 * HIDDEN, 15, 1.5));
        let expected: Vec<f32> =
            x.chunks(100 * HIDDEN).flat_map(|x| bench.run(x, &By::Router, None)).collect();
        let what = format!("{element:?}");
        close(&bench.run(&x, &By::Router, None), &expected, tolerance(element), &what);
    }
}

/// Ids that stand for nothing, ids that repeat, and a residual stream that is added.
fn given_ids_and_a_residual(gpu: &impl Gpu) {
    let experts = experts(Element::F32, Activation::SwiGlu);
    let bench = Bench::new(gpu, &spec(Element::F32, &experts));
    let x = noise(3 * HIDDEN, 9, 1.5);
    let run = |ids: &[i32], weights: &[f32], residual| bench.run(&x, &By::Given(ids, weights), residual);
    let ids = [0, 2, -1, 1, 3, 1, 5, 99, 6];
    let weights = [0.5, 0.25, f32::NAN, 0.125, 0.25, 0.5, 1.0, f32::NAN, f32::NAN];
    let found = run(&ids, &weights, None);
    // 3 is an alias of 1; 6 is none.
    let merged =
        run(&[0, 2, -1, 1, -1, -1, 5, -1, -1], &[0.5, 0.25, 0.0, 0.875, 0.0, 0.0, 1.0, 0.0, 0.0], None);
    assert_eq!(found, merged);
    let residual = noise(3 * HIDDEN, 10, 1.0);
    let sum: Vec<f32> = found.iter().zip(&residual).map(|(a, b)| a + b).collect();
    close(&run(&ids, &weights, Some(&residual)), &sum, 1e-6, "residual");
    let nothing = run(&[-1; 9], &[1.0; 9], None);
    assert_eq!(nothing, vec![0.0; 3 * HIDDEN]);
}

/// The expert that all tokens pass runs with the others; its gate is one more logit.
fn a_shared_expert(gpu: &impl Gpu) {
    let element = Element::F32;
    let experts = experts(element, Activation::SwiGlu);
    let made = Made { width: 64, ranks: [None, Some(9), None], ..Made::default() };
    let shared = expert(element, made, Activation::SwiGlu, 50);
    let gate = vector(HIDDEN, 51);
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::Scaled(1.0)));
    let weights = router_weights(&rule);
    let x = noise(12 * HIDDEN, 11, 1.2);
    let (routed, _) = reference(&experts, &[None, None, None], &rule, &weights, &x);
    // The shared expert alone, as the only expert of a layer.
    let alone = [expert(element, made, Activation::SwiGlu, 50)];
    let bench = Bench::new(gpu, &LayerSpec { top_k: 1, ..spec(element, &alone) });
    let output = bench.run(&x, &By::Given(&[0; 12], &[1.0; 12]), None);
    let gate_values = gate.to_f32().unwrap();
    for gated in [false, true] {
        let shared = SharedExpert { expert: &shared, gate: gated.then_some(&gate) };
        let spec =
            with_router(LayerSpec { shared: Some(shared), ..spec(element, &experts) }, &rule, &weights);
        let bench = Bench::new(gpu, &spec);
        assert_eq!((bench.layer.slots(), bench.layer.experts()), (TOP_K + 1, EXPERTS));
        let expected: Vec<f32> = (0..x.len())
            .map(|i| {
                let token = &x[i / HIDDEN * HIDDEN..][..HIDDEN];
                let z: f32 = token.iter().zip(&gate_values).map(|(a, b)| a * b).sum();
                let factor = if gated { 1.0 / (1.0 + (-z).exp()) } else { 1.0 };
                routed[i] + factor * output[i]
            })
            .collect();
        close(&bench.run(&x, &By::Router, None), &expected, 1e-5, &format!("gated {gated}"));
    }
}

/// Experts on two ranks: the outputs of the ranks add up to that of all.
fn an_expert_map_splits_the_layer(gpu: &impl Gpu) {
    let element = Element::F32;
    let experts = experts(element, Activation::SwiGlu);
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    let x = noise(25 * HIDDEN, 12, 1.2);
    let (expected, _) = reference(&experts, &[None, None, None], &rule, &weights, &x);
    let mut sum = vec![0.0; x.len()];
    // Rank 1 holds the experts from 4 on, in reverse order.
    for rank in 0..2 {
        let mine: Vec<usize> = if rank == 0 { (0..4).collect() } else { (4..EXPERTS).rev().collect() };
        let local: Vec<_> = mine.iter().map(|&e| experts[e].clone()).collect();
        let map: Vec<_> = (0..EXPERTS).map(|e| mine.iter().position(|&m| m == e)).collect();
        let spec = LayerSpec { expert_map: Some(&map), ..spec(element, &local) };
        let spec = with_router(spec, &rule, &weights);
        let bench = Bench::new(gpu, &spec);
        let part = bench.run(&x, &By::Router, None);
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    close(&sum, &expected, 1e-5, "two ranks");
}

/// Neither the number of multiprocessors nor the order of threads and copies shows in any bit.
#[test]
fn schedules_do_not_show() {
    let experts = experts(Element::Bf16, Activation::SwiGlu);
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    let spec = with_router(spec(Element::Bf16, &experts), &rule, &weights);
    let x = round(Element::Bf16, noise(40 * HIDDEN, 13, 1.5));
    let mut first = None;
    for (mode, multiprocessors) in [(Mode::Late, 1), (Mode::Early, 3), (Mode::Random(9), 40)] {
        let Some(mut gpu) = Emulator::new(mode) else { return };
        gpu.multiprocessors = multiprocessors;
        let found = bits(&Bench::new(&gpu, &spec).run(&x, &By::Router, None));
        assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{mode:?}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Runs are equal bit for bit, whatever memory they run in.
fn repeats(gpu: &impl Gpu) {
    let experts = experts(Element::Bf16, Activation::SwiGlu);
    let rule = rule(RouterSpec::softmax(TOP_K, WeightRule::RENORMALISED));
    let weights = router_weights(&rule);
    let spec = with_router(spec(Element::Bf16, &experts), &rule, &weights);
    let x = round(Element::Bf16, noise(70 * HIDDEN, 13, 1.5));
    let bench = Bench::new(gpu, &spec);
    let first = bits(&bench.run(&x, &By::Router, None));
    for _ in 0..3 {
        assert_eq!(bits(&bench.run(&x, &By::Router, None)), first);
    }
}

/// The tests of a real GPU, through the real code for drivers, with a stand-in for the driver whose kernels are emulated.
#[test]
fn through_a_driver() {
    gpu::through_a_driver("device::");
}

/// Weights that lie on the device already are used where they lie.
fn borrowed_weights(gpu: &impl Gpu) {
    let element = Element::Bf16;
    let stored = expert(element, Made { width: WIDTH, ..Made::default() }, Activation::SwiGlu, 60);
    let Expert::Mlp(mlp) = &stored else { unreachable!() };
    let mut buffers = Vec::new();
    let borrowed = mlp.try_map(|map| {
        let Matrix::Dense(weight) = &map.weight else { unreachable!() };
        let buffer = gpu.upload(&encode_f32(Dtype::BF16, &weight.to_f32()));
        let (rows, cols) = (weight.rows(), weight.cols());
        let matrix = DeviceMatrix { address: buffer.address(), rows, cols, stride: cols };
        buffers.push(buffer);
        Ok::<_, ()>(Linear { weight: Matrix::Dense(matrix), bias: None::<DeviceVector> })
    });
    let borrowed = [Expert::Mlp(borrowed.unwrap())];
    let stored = [stored];
    let x = round(element, noise(10 * HIDDEN, 14, 1.0));
    let given = By::Given(&[0; 10], &[1.0; 10]);
    let mine = Bench::new(gpu, &LayerSpec { top_k: 1, ..spec(element, &borrowed) });
    let copied = Bench::new(gpu, &LayerSpec { top_k: 1, ..spec(element, &stored) });
    assert_eq!(mine.run(&x, &given, None), copied.run(&x, &given, None));
    assert!(mine.layer.bytes() < copied.layer.bytes());
}

use shapes::real_shapes_against_f64;

on_every_gpu! {
    every_form_against_the_cpu
    deltas_against_the_cpu
    clamped_activation_against_the_cpu
    other_activations_against_the_cpu
    routers_against_the_cpu
    many_tokens_route_as_few_do
    given_ids_and_a_residual
    a_shared_expert
    an_expert_map_splits_the_layer
    borrowed_weights
    repeats
    real_shapes_against_f64
}
