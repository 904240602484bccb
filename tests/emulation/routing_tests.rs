//! The routing kernel against the CPU backend's router, which has oracles of its own.

use bytemuck::{Zeroable, bytes_of};
use moepress::architecture::{
    Choice, GroupLimit, GroupScore, RouterSpec, Scoring, Skip, SkipThreshold, WeightRule,
};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Backend, RouterRule, RouterWeights};
use moepress::checkpoint::{Dtype, Tensor};

use crate::definition::{Form, Layer, Random, Routes};
use crate::device::{Prepared, pitched};
use crate::emulator::{Dtype as Type, Emulator, MODES, Mode};
use crate::params::{
    LOGITS_FEW_ROWS, LOGITS_FEW_SHARED, LOGITS_FEW_THREADS, LOGITS_FEW_TOKENS, LOGITS_MANY_ROWS,
    LOGITS_MANY_SHARED, LOGITS_MANY_THREADS, LOGITS_MANY_TOKENS, LOGITS_SHARED, LOGITS_THREADS, LOGITS_TILE,
    MoeLogitsParams, MoeRouteParams, MoeRouteSortParams, ROUTE_SORT_TOKENS, ROUTE_THREADS, ROUTE_TOKENS,
    SORT_THREADS, route_shared, route_sort_shared,
};

fn rule(spec: RouterSpec, experts: usize) -> RouterRule {
    let count = spec.groups.map_or(1, |g| g.count);
    RouterRule {
        spec,
        group_of: (0..experts).map(|e| (e * count / experts) as u32).collect(),
        live: vec![true; experts],
    }
}

/// What the CPU backend chooses from one row of logits: they are the bias of a router of weight zero.
fn by_cpu(rule: &RouterRule, choice_bias: &[f32], logits: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let e = logits.len();
    let vector = |values: &[f32]| Some(Tensor::from_f32("v", Dtype::F32, vec![e], values));
    let weights = RouterWeights {
        weight: Tensor::from_f32("w", Dtype::F32, vec![e, 1], &vec![0.0; e]),
        bias: vector(logits),
        choice_bias: vector(choice_bias),
        expert_scales: None,
    };
    let mut x = Cpu.buffer();
    Cpu.upload(&[0.0], 1, 1, &mut x).unwrap();
    let mut routing = Cpu.routing();
    Cpu.route(&x, &Cpu.router(&weights, rule.clone()).unwrap(), &mut routing).unwrap();
    let routes = Cpu.routes(&routing).unwrap();
    (routes.ids.iter().map(|&id| id as i32).collect(), routes.weights)
}

/// What the kernel chooses from rows of `ld` logits; with a shared expert, its gate is the column behind the experts'.
fn by_kernel(
    gpu: &Emulator,
    rule: &RouterRule,
    bias: &[f32],
    logits: &[f32],
    shared: bool,
) -> Result<(Vec<i32>, Vec<f32>), String> {
    let (spec, e) = (&rule.spec, rule.live.len());
    let ld = e + usize::from(shared);
    let tokens = logits.len() / ld;
    let slots = spec.top_k + usize::from(shared);
    let (scale, added, least) = match spec.weights {
        WeightRule::Scaled(scale) => (scale, 0.0, 0.0),
        WeightRule::Renormalised { added, least, scale } => (scale, added, least),
    };
    let live: Vec<u8> = rule.live.iter().map(|&l| u8::from(l)).collect();
    let group_of: Vec<i32> = rule.group_of.iter().map(|&g| g as i32).collect();
    let inputs = (gpu.upload(logits), gpu.upload(bias), gpu.upload(&group_of), gpu.upload(&live));
    let (ids, weights) = (gpu.room(tokens * slots * 4), gpu.room(tokens * slots * 4));
    let params = MoeRouteParams {
        logits: inputs.0.address(),
        choice_bias: inputs.1.address(),
        group_of: inputs.2.address(),
        live: inputs.3.address(),
        ids: ids.address(),
        weights: weights.address(),
        tokens: tokens as i32,
        experts: e as i32,
        ld_logits: ld as i32,
        top_k: spec.top_k as i32,
        slots: slots as i32,
        scoring: match spec.scoring {
            Scoring::Softmax => 0,
            Scoring::Sigmoid => 1,
            Scoring::SparseMixer { .. } => 2,
        },
        jitter: if let Scoring::SparseMixer { threshold } = spec.scoring { threshold } else { 0.0 },
        choice: match spec.choice {
            Choice::Score => 0,
            Choice::BiasedScore => 1,
            Choice::Logit => 2,
        },
        groups: spec.groups.map_or(0, |g| g.count as i32),
        groups_kept: spec.groups.map_or(0, |g| g.kept as i32),
        group_score: spec.groups.map_or(0, |g| i32::from(g.score == GroupScore::TwoLargest)),
        renormalise: i32::from(matches!(spec.weights, WeightRule::Renormalised { .. })),
        scale,
        added,
        least,
        skip_rule: spec.skip.as_ref().map_or(0, |s| 1 + i32::from(s.rescale)),
        skip: spec.skip.as_ref().map_or(0.0, Skip::tail),
        shared_expert: if shared { e as i32 } else { -1 },
        shared_gate: if shared { e as i32 } else { -1 },
        ..MoeRouteParams::zeroed()
    };
    let grid = [tokens.div_ceil(ROUTE_TOKENS) as u32, 1, 1];
    gpu.run("moe_route", grid, [ROUTE_THREADS, 1, 1], route_shared(e), bytes_of(&params))?;
    Ok((ids.read(), weights.read()))
}

/// Ordinary rows, and those that break routers.
fn rows(random: &mut Random, experts: usize) -> Vec<f32> {
    let normal = |random: &mut Random| random.values(Type::F32, experts, 2.0);
    let mut all = Vec::new();
    for _ in 0..3 {
        all.extend(normal(random));
    }
    all.extend(vec![0.5; experts]);
    all.extend((0..experts).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }));
    all.extend(vec![f32::NAN; experts]);
    all.extend(vec![f32::NEG_INFINITY; experts]);
    for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-40] {
        let mut row = normal(random);
        row[random.below(experts)] = special;
        all.extend(row);
    }
    // More NaN than there are numbers to choose from.
    let mut row = vec![f32::NAN; experts];
    row[random.below(experts)] = 1.0;
    all.extend(row);
    all
}

/// Whether the choices are the same, and the weights as near as f32 sums in another order are.
fn compare(gpu: &Emulator, rule: &RouterRule, bias: &[f32], logits: &[f32]) -> Result<(), String> {
    let (e, k) = (rule.live.len(), rule.spec.top_k);
    let (ids, weights) = by_kernel(gpu, rule, bias, logits, false)?;
    for (token, logits) in logits.chunks_exact(e).enumerate() {
        let (expected_ids, expected) = by_cpu(rule, bias, logits);
        let found = token * k..(token + 1) * k;
        let ids = &ids[found.clone()];
        let near = |a: f32, b: f32| a.is_finite() && (a - b).abs() <= 1e-5 * b.abs() + 1e-30;
        let right =
            ids == expected_ids && weights[found.clone()].iter().zip(&expected).all(|(&a, &b)| near(a, b));
        if !right {
            let weights = &weights[found];
            return Err(format!(
                "token {token} of {e} experts, {:?}: {ids:?} {weights:?}, expected {expected_ids:?} {expected:?}",
                rule.spec
            ));
        }
    }
    Ok(())
}

/// Every rule, on a layer of 60 experts.
pub(crate) fn try_routing(gpu: Emulator) -> Result<(), String> {
    let mut random = Random::new(17);
    let logits = rows(&mut random, 60);
    let mut bias = [0.0; 60];
    bias[7] = f32::NAN;
    specs(4, 60).into_iter().try_for_each(|spec| compare(&gpu, &rule(spec, 60), &bias, &logits))
}

fn specs(top_k: usize, experts: usize) -> Vec<RouterSpec> {
    let softmax = RouterSpec::softmax(top_k, WeightRule::RENORMALISED);
    let sigmoid = RouterSpec { scoring: Scoring::Sigmoid, choice: Choice::BiasedScore, ..softmax.clone() };
    let scaled = WeightRule::Scaled(2.5);
    let deepseek = WeightRule::Renormalised { added: 1e-20, least: 0.0, scale: 2.5 };
    let ernie = WeightRule::Renormalised { added: 0.0, least: 0.5, scale: 1.0 };
    let mut all = vec![
        softmax.clone(),
        RouterSpec { weights: scaled, ..softmax.clone() },
        RouterSpec { choice: Choice::Logit, ..softmax.clone() },
        RouterSpec { choice: Choice::BiasedScore, weights: ernie, ..softmax.clone() },
        RouterSpec { weights: deepseek, ..sigmoid.clone() },
        RouterSpec { choice: Choice::Logit, weights: scaled, ..sigmoid.clone() },
        RouterSpec { choice: Choice::Logit, ..sigmoid.clone() },
        RouterSpec { scoring: Scoring::SparseMixer { threshold: 0.02 }, ..softmax.clone() },
    ];
    if top_k > 1 {
        for (threshold, rescale) in [(SkipThreshold::Tail(0.3), true), (SkipThreshold::Tail(0.6), false)] {
            all.push(RouterSpec { skip: Some(Skip { threshold, rescale }), ..softmax.clone() });
        }
    }
    let (count, kept) = (4, 3);
    if experts.is_multiple_of(count) && top_k <= kept * experts / count {
        for score in [GroupScore::Largest, GroupScore::TwoLargest] {
            let groups = Some(GroupLimit { count, kept, score });
            all.push(RouterSpec { groups, weights: deepseek, ..sigmoid.clone() });
        }
    }
    all
}

#[test]
fn every_rule_chooses_as_the_cpu_does() {
    let mut random = Random::new(11);
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    for (i, experts) in [1, 2, 3, 8, 60, 64, 72, 128, 160, 256, 384, 512, 1024].into_iter().enumerate() {
        let logits = rows(&mut random, experts);
        let bias = random.values(Type::F32, experts, 0.1);
        let top_k = [1, 2, 4, 8, 32][i % 5].min(experts);
        for spec in specs(top_k, experts) {
            compare(&Emulator { mode: MODES[i % 4], ..gpu }, &rule(spec, experts), &bias, &logits).unwrap();
        }
    }
}

#[test]
fn all_experts_may_be_chosen() {
    let mut random = Random::new(12);
    let Some(gpu) = Emulator::new(Mode::Random(5)) else { return };
    for experts in [1, 5, 32] {
        let logits = rows(&mut random, experts);
        for spec in specs(experts, experts) {
            compare(&gpu, &rule(spec, experts), &vec![0.0; experts], &logits).unwrap();
        }
    }
}

#[test]
fn dead_rows_are_never_chosen() {
    let mut random = Random::new(13);
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    let logits = rows(&mut random, 16);
    for spec in specs(4, 16) {
        let mut rule = rule(spec, 16);
        for dead in [0, 3, 4, 5, 6, 15] {
            rule.live[dead] = false;
        }
        compare(&gpu, &rule, &[0.0; 16], &logits).unwrap();
    }
}

/// As many groups as there may be, each of two experts.
#[test]
fn many_groups() {
    let mut random = Random::new(14);
    let Some(gpu) = Emulator::new(Mode::Early) else { return };
    let logits = rows(&mut random, 128);
    let spec = specs(8, 128).pop().unwrap();
    let groups = Some(GroupLimit { count: 64, kept: 5, score: GroupScore::TwoLargest });
    compare(&gpu, &rule(RouterSpec { groups, ..spec }, 128), &[0.0; 128], &logits).unwrap();
}

/// The shared expert is one more slot; its gate is a logit of its own.
#[test]
fn shared_expert_is_a_slot() {
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    let mut random = Random::new(15);
    let rule = rule(RouterSpec::softmax(2, WeightRule::RENORMALISED), 6);
    let logits = random.values(Type::F32, 5 * 7, 2.0);
    let (ids, weights) = by_kernel(&gpu, &rule, &[0.0; 6], &logits, true).unwrap();
    for (token, row) in logits.chunks_exact(7).enumerate() {
        let (expected, _) = by_cpu(&rule, &[0.0; 6], &row[..6]);
        assert_eq!(ids[3 * token..3 * token + 2], expected);
        assert_eq!(ids[3 * token + 2], 6);
        assert!((weights[3 * token + 2] - 1.0 / (1.0 + (-row[6]).exp())).abs() < 1e-6);
    }
}

#[test]
fn logits_are_f32_products() {
    let mut random = Random::new(16);
    let (tokens, rows, hidden) = (70, 65, 50);
    for (mode, dtype) in MODES.into_iter().zip([Type::Bf16, Type::F16, Type::F32]) {
        let Some(gpu) = Emulator::new(mode) else { return };
        let x = random.values(dtype, tokens * hidden, 1.0);
        let weight = random.values(Type::F32, rows * hidden, 1.0);
        let (ldx, ldw) = (56, 52);
        let x_rows = pitched(dtype, tokens, hidden, ldx, &x);
        let weight_rows = pitched(Type::F32, rows, hidden, ldw, &weight);
        let buffers = (gpu.upload(&x_rows), gpu.upload(&weight_rows), gpu.room(2 * tokens * rows * 4));
        let params = MoeLogitsParams {
            x: buffers.0.address(),
            weight: buffers.1.address(),
            logits: buffers.2.address(),
            tokens: tokens as i32,
            rows: rows as i32,
            hidden: hidden as i32,
            ldx: ldx as i32,
            ldw: ldw as i32,
            ld_logits: rows as i32,
            ..MoeLogitsParams::zeroed()
        };
        let grid = [tokens.div_ceil(LOGITS_TILE) as u32, rows.div_ceil(LOGITS_TILE) as u32, 1];
        let name = format!("moe_logits_{}", dtype.suffix());
        gpu.run(&name, grid, [LOGITS_THREADS, 1, 1], LOGITS_SHARED, bytes_of(&params)).unwrap();
        let few = MoeLogitsParams { logits: params.logits + (tokens * rows * 4) as u64, ..params };
        let grid = [rows.div_ceil(LOGITS_FEW_ROWS) as u32, tokens.div_ceil(LOGITS_FEW_TOKENS) as u32, 1];
        let name = format!("moe_logits_few_{}", dtype.suffix());
        gpu.run(&name, grid, [LOGITS_FEW_THREADS, 1, 1], LOGITS_FEW_SHARED, bytes_of(&few)).unwrap();
        for (i, found) in buffers.2.read::<f32>().into_iter().enumerate() {
            let i = i % (tokens * rows);
            let (x, w) = (&x[i / rows * hidden..][..hidden], &weight[i % rows * hidden..][..hidden]);
            let products = x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let magnitude: f64 = products.clone().map(f64::abs).sum();
            assert!((f64::from(found) - products.sum::<f64>()).abs() <= 1e-5 * magnitude, "{dtype:?} {i}");
        }
    }
}

/// The same on tensor cores, from weights in one to three parts, with and without whole steps of columns.
#[test]
fn logits_of_many_tokens_are_f32_products() {
    let mut random = Random::new(19);
    let (tokens, rows) = (70, 65);
    for (mode, (dtype, hidden, parts)) in MODES.into_iter().zip([
        (Type::Bf16, 50, 3),
        (Type::F16, 300, 3),
        (Type::Bf16, 300, 1),
        (Type::F16, 128, 2),
    ]) {
        let Some(gpu) = Emulator::new(mode) else { return };
        try_many_logits(gpu, &mut random, [tokens, rows, hidden], dtype, parts).unwrap();
    }
}

/// Says what is wrong with logits of a size and of so many parts.
pub(crate) fn try_many_logits(
    gpu: Emulator,
    random: &mut Random,
    [tokens, rows, hidden]: [usize; 3],
    dtype: Type,
    parts: usize,
) -> Result<(), String> {
    let (ldx, ld_parts) = (hidden.next_multiple_of(8) + 8, hidden.next_multiple_of(8));
    let x = random.values(dtype, tokens * hidden, 1.0);
    let scale: f64 = if dtype == Type::F16 { 2048.0 } else { 256.0 };
    let mut weight = vec![0.0; rows * hidden];
    let mut encoded = Vec::new();
    for part in 0..parts {
        // In bf16 the lesser parts are small themselves, in f16 by what they stand for.
        let unit = scale.powi(-(part as i32));
        let stored = random.values(dtype, rows * hidden, if dtype == Type::F16 { 1.0 } else { unit as f32 });
        for (weight, &stored) in weight.iter_mut().zip(&stored) {
            *weight += f64::from(stored) * if dtype == Type::F16 { unit } else { 1.0 };
        }
        encoded.resize(part * rows * ld_parts * dtype.bytes(), 0xff);
        encoded.extend(pitched(dtype, rows, hidden, ld_parts, &stored));
    }
    let x_rows = pitched(dtype, tokens, hidden, ldx, &x);
    let buffers = (gpu.upload(&x_rows), gpu.upload(&encoded), gpu.room(tokens * rows * 4));
    let params = MoeLogitsParams {
        x: buffers.0.address(),
        parts: buffers.1.address(),
        logits: buffers.2.address(),
        tokens: tokens as i32,
        rows: rows as i32,
        hidden: hidden as i32,
        ldx: ldx as i32,
        ld_parts: ld_parts as i32,
        part_count: parts as i32,
        ld_logits: rows as i32,
        ..MoeLogitsParams::zeroed()
    };
    let grid = [tokens.div_ceil(LOGITS_MANY_TOKENS) as u32, rows.div_ceil(LOGITS_MANY_ROWS) as u32, 1];
    let name = format!("moe_logits_many_{}", dtype.suffix());
    gpu.run(&name, grid, [LOGITS_MANY_THREADS, 1, 1], LOGITS_MANY_SHARED, bytes_of(&params))?;
    let conflicts = gpu.take_conflicts();
    if conflicts > 0 {
        return Err(format!("{conflicts} bank conflicts"));
    }
    for (i, found) in buffers.2.read::<f32>().into_iter().enumerate() {
        let (x, w) = (&x[i / rows * hidden..][..hidden], &weight[i % rows * hidden..][..hidden]);
        let products = x.iter().zip(w).map(|(&x, w)| f64::from(x) * w);
        let magnitude: f64 = products.clone().map(f64::abs).sum();
        let sum: f64 = products.sum();
        let near = (f64::from(found) - sum).abs() <= 1e-6 * magnitude;
        if !near {
            return Err(format!("{dtype:?}, {parts} parts, {i}: {found}, expected {sum}"));
        }
    }
    Ok(())
}

/// Routing and sorting in one kernel do what they do in two.
#[test]
fn routing_and_sorting_at_once() {
    let mut random = Random::new(18);
    let mut layer = Layer::new(Type::Bf16, 8);
    for _ in 0..300 {
        layer.add(&mut random, 8, [Form::Dense; 3]);
    }
    let rule = rule(RouterSpec::softmax(3, WeightRule::RENORMALISED), 300);
    for (tokens, mode) in [1, 5, ROUTE_SORT_TOKENS].into_iter().zip(MODES) {
        let Some(gpu) = Emulator::new(mode) else { return };
        let logits = random.values(Type::F32, tokens * 300, 2.0);
        let (ids, weights) = by_kernel(&gpu, &rule, &[0.0; 300], &logits, false).unwrap();
        let prepared = Prepared::new(gpu, &layer);
        let apart = prepared.sort(&Routes { ids, weights, slots: 3 }, 8, false, true).unwrap();
        let logits = gpu.upload(&logits);
        let (ids, weights) = (gpu.room(tokens * 3 * 4), gpu.room(tokens * 3 * 4));
        let route = MoeRouteParams {
            logits: logits.address(),
            ids: ids.address(),
            weights: weights.address(),
            tokens: tokens as i32,
            experts: 300,
            ld_logits: 300,
            top_k: 3,
            slots: 3,
            renormalise: 1,
            scale: 1.0,
            shared_expert: -1,
            shared_gate: -1,
            ..MoeRouteParams::zeroed()
        };
        let at_once = prepared.sort_by(ids, &weights, 3, 8, true, |&sort| {
            let params = MoeRouteSortParams { route, sort };
            let shared = route_sort_shared(300, 300);
            gpu.run("moe_route_sort", [1, 1, 1], [SORT_THREADS, 1, 1], shared, bytes_of(&params))
        });
        let at_once = at_once.unwrap();
        for (what, apart, at_once) in [
            ("ids", &apart.ids, &at_once.ids),
            ("offsets", &apart.offsets, &at_once.offsets),
            ("pair_token", &apart.pair_token, &at_once.pair_token),
            ("pair_weight", &apart.pair_weight, &at_once.pair_weight),
            ("slot_source", &apart.slot_source, &at_once.slot_source),
            ("slot_weight", &apart.slot_weight, &at_once.slot_weight),
            ("tile_first", &apart.tile_first, &at_once.tile_first),
        ] {
            assert_eq!(apart.contents(), at_once.contents(), "{what} of {tokens} tokens");
        }
    }
}
