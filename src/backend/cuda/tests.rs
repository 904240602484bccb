//! What a layer launches, and what it refuses, without running anything. The numbers are checked on the emulation of the
//! kernels, in `tests/cuda_layer.rs`.

use std::cell::{Cell, RefCell};

use super::params::MoeGemmParams;
use super::*;
use crate::architecture::{
    Activation, GroupLimit, GroupScore, RouterSpec, Skip, SkipThreshold, WeightRule, WeightTarget,
};
use crate::backend::{Expert, Linear, Matrix, Mlp, RouterRule};
use crate::checkpoint::{Dtype, Tensor, Weight};

/// Remembers names and grids.
#[derive(Default)]
struct Recorder {
    launched: RefCell<Vec<(&'static str, [u32; 3])>>,
    /// Tiles, stage and blocks of the next GEMM, as the last one says.
    announced: Cell<Option<(u64, i32, [u32; 3])>>,
}

impl Recorder {
    /// A GEMM calls ahead what the next one begins with: the same tiles, on as many blocks.
    fn check_announced(&self, kernel: &str, grid: [u32; 3], params: &[u8]) {
        let stages = ["moe_project_in_t", "moe_hidden_t", "moe_project_hidden_t", "moe_output_t"];
        let Some(stage) = stages.iter().position(|name| kernel.starts_with(name)) else {
            assert_eq!(self.announced.get(), None, "before {kernel}");
            return;
        };
        let params: MoeGemmParams = bytemuck::pod_read_unaligned(params);
        if let Some(announced) = self.announced.take() {
            assert_eq!((params.tile_first, stage as i32), (announced.0, announced.1), "{kernel}");
            // The large family, which calls nothing, has other grids in one stage.
            assert!(grid == announced.2 || kernel.contains("_t128"), "{kernel}");
        }
        if params.next_tile_first != 0 {
            self.announced.set(Some((params.next_tile_first, params.next_stage, grid)));
        }
    }
}

impl Launch for Recorder {
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        _: [u32; 3],
        _: u32,
        params: &[u8],
        follows: bool,
    ) -> Result<()> {
        let mut launched = self.launched.borrow_mut();
        assert_eq!(follows, !launched.is_empty(), "only the first kernel of a pass follows none");
        assert!(kernels::kernel_names().any(|name| name == kernel), "{kernel} is not loaded");
        self.check_announced(kernel, grid, params);
        launched.push((kernel, grid));
        Ok(())
    }

    fn multiprocessors(&self) -> u32 {
        10
    }

    fn shared_per_multiprocessor(&self) -> u32 {
        228 << 10
    }
}

/// Memory of the host.
struct Host;

#[derive(Debug)]
struct HostBlock(Vec<u8>);

impl Block for HostBlock {
    fn address(&self) -> u64 {
        1 << 20
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }

    fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        assert!(start + bytes.len() <= self.bytes());
        Ok(())
    }
}

impl Memory for Host {
    type Block = HostBlock;

    fn allocate(&self, bytes: usize) -> Result<HostBlock> {
        Ok(HostBlock(vec![0; bytes]))
    }
}

const HIDDEN: usize = 24;
const WIDTH: usize = 40;

type TestExpert = Expert<Weight, Tensor>;

fn weight(rows: usize, cols: usize) -> Weight {
    Weight::plain(Tensor::from_f32("w", Dtype::BF16, vec![rows, cols], &vec![0.5; rows * cols])).unwrap()
}

fn expert(rank: Option<usize>) -> TestExpert {
    let map = |rows, cols| {
        let weight = match rank {
            None => Matrix::Dense(weight(rows, cols)),
            Some(rank) => Matrix::LowRank { u: weight(rows, rank), v: weight(rank, cols) },
        };
        Linear { weight, bias: None }
    };
    Expert::Mlp(Mlp {
        gate: map(WIDTH, HIDDEN),
        up: Some(map(WIDTH, HIDDEN)),
        down: map(HIDDEN, WIDTH),
        activation: Activation::SwiGlu,
    })
}

fn spec(experts: &[TestExpert]) -> LayerSpec<'_, Weight, Tensor> {
    LayerSpec {
        hidden: HIDDEN,
        element: Element::Bf16,
        top_k: 2,
        experts,
        base: &[None, None, None],
        expert_map: None,
        shared: None,
        router: None,
        target: WeightTarget::Output,
    }
}

fn args(layer: &MoeLayer<HostBlock>, tokens: usize) -> Forward {
    Forward {
        tokens,
        x: Rows { address: 0x1000, stride: HIDDEN },
        out: Rows { address: 0x2000, stride: HIDDEN },
        routing: Routing::Given { ids: 0x3000, weights: 0x4000 },
        residual: None,
        workspace: 1 << 30,
        workspace_bytes: layer.workspace_bytes(tokens).unwrap(),
    }
}

fn launched(layer: &MoeLayer<HostBlock>, args: &Forward) -> Vec<(&'static str, [u32; 3])> {
    let recorder = Recorder::default();
    // SAFETY: nothing is run.
    unsafe { layer.forward(&recorder, args) }.unwrap();
    recorder.launched.into_inner()
}

fn names(layer: &MoeLayer<HostBlock>, args: &Forward) -> Vec<&'static str> {
    launched(layer, args).into_iter().map(|(name, _)| name).collect()
}

#[track_caller]
fn refused(layer: &MoeLayer<HostBlock>, args: &Forward, message: &str) {
    // SAFETY: nothing is run.
    let error = unsafe { layer.forward(&Recorder::default(), args) }.unwrap_err();
    assert_eq!(error.to_string(), message);
}

#[track_caller]
fn no_layer(spec: &LayerSpec<'_, Weight, Tensor>, message: &str) {
    assert_eq!(MoeLayer::new(&Host, spec).unwrap_err().to_string(), message);
}

fn rule(experts: usize) -> RouterRule {
    RouterRule {
        spec: RouterSpec::softmax(2, WeightRule::RENORMALISED),
        group_of: vec![0; experts],
        live: vec![true; experts],
    }
}

#[test]
fn dense_experts_need_no_projections() {
    let experts = vec![expert(None); 4];
    let layer = MoeLayer::new(&Host, &spec(&experts)).unwrap();
    let found = names(&layer, &args(&layer, 3));
    assert_eq!(found, ["moe_sort_small", "moe_hidden_t8_bf16", "moe_output_t8_bf16", "moe_combine_bf16"]);
    assert!(names(&layer, &args(&layer, 0)).is_empty());
}

#[test]
fn a_layer_with_everything() {
    let experts = [expert(Some(4)), expert(None), Expert::None, Expert::Alias(0)];
    let router = Tensor::from_f32("r", Dtype::F32, vec![4, HIDDEN], &[0.0; 4 * HIDDEN]);
    let gate = Tensor::from_f32("g", Dtype::F32, vec![1, HIDDEN], &[0.0; HIDDEN]);
    let shared = expert(None);
    let rule = rule(4);
    let spec = LayerSpec {
        router: Some(LayerRouter { rule: &rule, weight: Some(&router), bias: None, choice_bias: None }),
        shared: Some(SharedExpert { expert: &shared, gate: Some(&gate) }),
        ..spec(&experts)
    };
    let layer = MoeLayer::new(&Host, &spec).unwrap();
    assert_eq!((layer.experts(), layer.slots(), layer.logits()), (4, 3, Some(5)));
    let args = Forward { routing: Routing::Router, ..args(&layer, 2000) };
    let found = launched(&layer, &args);
    let expected = [
        ("moe_logits_many_bf16", [63, 1, 1]),
        ("moe_route", [500, 1, 1]),
        ("moe_sort_count", [3, 1, 1]),
        ("moe_sort_scan", [1, 1, 1]),
        ("moe_sort_scatter", [3, 1, 1]),
        ("moe_project_in_t128_bf16", [20, 1, 1]),
        ("moe_hidden_t128_bf16", [10, 1, 1]),
        ("moe_project_hidden_t128_bf16", [20, 1, 1]),
        ("moe_output_t128_bf16", [20, 1, 1]),
        ("moe_combine_bf16", [2000, 1, 1]),
    ];
    assert_eq!(found, expected);
    let few = launched(&layer, &Forward { tokens: 8, ..args });
    assert_eq!(few[..2], [("moe_logits_few_bf16", [3, 1, 1]), ("moe_route_sort", [1, 1, 1])]);
    assert_eq!(few.len(), 7);
    let logits = Forward { routing: Routing::Logits { address: 0x5000, stride: 5 }, ..args };
    assert_eq!(names(&layer, &logits), expected.map(|(name, _)| name)[1..]);
    let narrow = Forward { routing: Routing::Logits { address: 0x5000, stride: 4 }, ..args };
    refused(&layer, &narrow, "logits: stride 4, expected 5 or more");
}

#[test]
fn the_family_follows_the_batch() {
    let experts = vec![expert(None); 8];
    let layer = MoeLayer::new(&Host, &spec(&experts)).unwrap();
    // Expected tokens of an expert: tokens · 2 / 8.
    for (tokens, family) in [(1, 8), (8, 8), (9, 16), (32, 16), (33, 32), (64, 32), (128, 64), (129, 128)] {
        let found = names(&layer, &args(&layer, tokens));
        assert!(found.contains(&&*format!("moe_output_t{family}_bf16")), "{tokens}: {found:?}");
    }
    let layer = MoeLayer::new(&Host, &LayerSpec { element: Element::F32, ..spec(&experts) }).unwrap();
    assert!(names(&layer, &args(&layer, 1)).contains(&"moe_hidden_t64_f32"));
}

#[test]
fn inputs_are_scaled_where_weights_multiply_them() {
    let experts = vec![expert(None); 4];
    let layer = MoeLayer::new(&Host, &LayerSpec { target: WeightTarget::Input, ..spec(&experts) }).unwrap();
    let found = launched(&layer, &args(&layer, 5));
    assert_eq!(found[1], ("moe_scale_input_bf16", [10, 1, 1]));
}

#[test]
fn the_workspace_grows_with_the_tokens() {
    let experts = [expert(Some(4)), expert(None)];
    let layer = MoeLayer::new(&Host, &spec(&experts)).unwrap();
    let sizes: Vec<_> = (0..5000).map(|tokens| layer.workspace_bytes(tokens).unwrap()).collect();
    assert!(sizes.is_sorted());
    let error = layer.workspace_bytes(usize::MAX).unwrap_err();
    assert_eq!(error.to_string(), "tokens: 18446744073709551615, expected at most 4067203");
}

#[test]
fn arguments_that_kernels_cannot_take() {
    let experts = vec![expert(None); 4];
    let layer = MoeLayer::new(&Host, &spec(&experts)).unwrap();
    let good = args(&layer, 3);
    let needed = good.workspace_bytes;
    let rows = |address, stride| Rows { address, stride };
    let bad = |args, message: &str| refused(&layer, &args, message);
    bad(
        Forward { workspace_bytes: needed - 1, ..good },
        &format!("workspace_bytes: {}, expected {needed} for 3 tokens", needed - 1),
    );
    bad(Forward { workspace: 64, ..good }, "workspace: address 0x40, expected a multiple of 256, not null");
    bad(Forward { x: rows(0, 24), ..good }, "x: address 0x0, expected a multiple of 16, not null");
    bad(Forward { x: rows(0x1008, 24), ..good }, "x: address 0x1008, expected a multiple of 16, not null");
    bad(
        Forward { x: rows(0x1000, 28), ..good },
        "x: stride 28, expected a multiple of 8 elements, 24 or more",
    );
    bad(
        Forward { x: rows(0x1000, 16), ..good },
        "x: stride 16, expected a multiple of 8 elements, 24 or more",
    );
    bad(Forward { out: rows(0x1000, 24), ..good }, "out: x, expected memory of its own");
    bad(
        Forward { residual: Some(rows(2, 24)), ..good },
        "residual: address 0x2, expected a multiple of 16, not null",
    );
    let ids = Routing::Given { ids: 0x3002, weights: 0x4000 };
    bad(Forward { routing: ids, ..good }, "ids: address 0x3002, expected a multiple of 4, not null");
    bad(
        Forward { routing: Routing::Router, ..good },
        "routing: Router, expected ids and weights: no router in this layer",
    );
}

#[test]
fn layers_that_cannot_be() {
    let experts = [expert(None), expert(Some(4))];
    let good = || spec(&experts);
    no_layer(&LayerSpec { top_k: 3, ..good() }, "top_k: 3, expected 1 to 2");
    no_layer(&LayerSpec { hidden: 32, ..good() }, "expert 0, gate: [40, 24], expected [40, 32]");
    let widest = 67_107_840;
    no_layer(&LayerSpec { hidden: widest, ..good() }, "expert 0, gate: [40, 24], expected [40, 67107840]");
    no_layer(&LayerSpec { hidden: widest + 1, ..good() }, "hidden: 67107841, expected 1 to 67107840");
    no_layer(
        &LayerSpec { experts: &[], ..good() },
        "experts: 0, expected 1 to 1024, the shared expert included",
    );
    let aliases = [expert(None), Expert::Alias(2), Expert::Alias(0)];
    no_layer(
        &LayerSpec { experts: &aliases, ..good() },
        "expert 1, alias: 2, expected an expert that is here and no alias itself",
    );
    let constant = [expert(None), Expert::Constant(Tensor::from_f32("c", Dtype::F32, vec![2], &[0.0; 2]))];
    no_layer(&LayerSpec { experts: &constant, ..good() }, "expert 1, constant: 2 elements, expected 24");
    let mut other = expert(None);
    if let Expert::Mlp(mlp) = &mut other {
        mlp.activation = Activation::ClampedSwiGlu { limit: 7.0, slope: 1.0 };
    }
    no_layer(
        &LayerSpec { experts: &[expert(None), other], ..good() },
        "expert 1: ClampedSwiGlu { limit: 7.0, slope: 1.0 }, expected the same activation in all experts of a layer",
    );
    let mut half = expert(None);
    if let Expert::Mlp(mlp) = &mut half {
        mlp.up = None;
    }
    no_layer(&LayerSpec { experts: &[expert(None), half], ..good() }, "expert 1: SwiGlu, expected up");
    let mut relu = expert(None);
    if let Expert::Mlp(mlp) = &mut relu {
        mlp.activation = Activation::Relu;
    }
    no_layer(
        &LayerSpec { experts: &[relu, expert(None)], ..good() },
        "expert 0: Relu, expected a gated activation with up",
    );
    no_layer(
        &LayerSpec { expert_map: Some(&[Some(0), None, Some(5)]), ..good() },
        "expert_map of expert 2: 5, expected an index below 2",
    );
}

#[test]
fn routers_that_cannot_be() {
    let experts = vec![expert(None); 4];
    let refused = |rule: &RouterRule, message: &str| {
        let router = Some(LayerRouter { rule, weight: None, bias: None, choice_bias: None });
        no_layer(&LayerSpec { router, ..spec(&experts) }, message);
    };
    refused(&rule(3), "router, rows: live 3, group_of 3, expected 4");
    let mut few = rule(4);
    few.live = vec![true, false, false, false];
    refused(&few, "router, live rows: 1, expected 2 or more");
    let mut groups = rule(4);
    groups.spec.groups = Some(GroupLimit { count: 2, kept: 1, score: GroupScore::Largest });
    groups.group_of = vec![0, 0, 0, 1];
    refused(&groups, "router, live rows of the kept groups: 1, expected 2 or more in any 1 groups");
    let mut biased = rule(4);
    biased.spec.bias = true;
    refused(&biased, "router bias: none, expected one, by the rule");
    let mut skipping = rule(4);
    skipping.spec.skip = Some(Skip { threshold: SkipThreshold::Tail(1.5), rescale: true });
    refused(
        &skipping,
        "router, skip: Tail(1.5) with top_k 2, expected a tail of 0 to 1, or with top_k 2 a ratio; top_k 2 or more",
    );
}

/// Factors on the device have to be rows of one matrix where they multiply the same input.
#[test]
fn device_factors_are_stacked() {
    let at = |address, rows, cols| DeviceMatrix { address, rows, cols, stride: 48 };
    let spec_of = |v_up: u64| {
        let map = |u, v| Linear { weight: Matrix::LowRank { u, v }, bias: None };
        Expert::<_, DeviceVector>::Mlp(Mlp {
            gate: map(at(0x1000, WIDTH, 4), at(0x10000, 4, HIDDEN)),
            up: Some(map(at(0x1000, WIDTH, 4), at(v_up, 4, HIDDEN))),
            down: map(at(0x1000, HIDDEN, 4), at(0x20000, 4, WIDTH)),
            activation: Activation::SwiGlu,
        })
    };
    let new = |experts: &[Expert<DeviceMatrix, DeviceVector>]| {
        let base = [None, None, None];
        let LayerSpec { hidden, element, target, .. } = spec(&[]);
        let (top_k, expert_map, shared, router) = (1, None, None, None);
        let base = &base;
        let spec = LayerSpec { hidden, element, top_k, experts, base, expert_map, shared, router, target };
        MoeLayer::new(&Host, &spec)
    };
    new(&[spec_of(0x10000 + 8 * 96)]).unwrap();
    let error = new(&[spec_of(0x10000 + 4 * 96)]).unwrap_err().to_string();
    let expected = "expert 0, V of gate and up: address 0x10180, stride 48, expected address 0x10300, stride 48: row 8 of \
                    one matrix";
    assert_eq!(error, expected);
}

/// Whatever this machine has, asking is harmless, and the answer says what to do.
#[test]
fn asking_for_a_gpu_never_panics() {
    match availability() {
        Ok(count) => assert!(count > 0),
        Err(unavailable) => assert_eq!(unavailable.to_string().lines().count(), 1),
    }
    let error = Device::new(4096).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
}
