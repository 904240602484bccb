//! Layers of experts of every form, from routes to output, in every family and mode.

use crate::definition::{Activation, Expert, Form, Layer, Random, Routes};
use crate::device::{Plan, Prepared, Run};
use crate::emulator::{Dtype, Emulator, MODES, Mode};
use crate::oracle;

/// Runs a layer, and compares its output with the oracle's. `None` where nothing can be run.
pub(crate) fn check(layer: &Layer, x: &[f32], routes: &Routes, plan: Plan, mode: Mode) -> Option<()> {
    let gpu = Emulator::new(mode)?;
    try_layer(gpu, layer, x, routes, plan).unwrap_or_else(|error| panic!("{plan:?} {mode:?}: {error}"));
    Some(())
}

/// The same; says what is wrong.
pub(crate) fn try_layer(
    gpu: Emulator,
    layer: &Layer,
    x: &[f32],
    routes: &Routes,
    plan: Plan,
) -> Result<(), String> {
    let run = Prepared::new(gpu, layer).run(x, routes, plan)?;
    let conflicts = gpu.take_conflicts();
    if conflicts > 0 {
        return Err(format!("{conflicts} bank conflicts"));
    }
    check_sort(layer, routes, &run)?;
    let expected = oracle::forward(layer, x, routes);
    for (i, (&found, expected)) in run.out.iter().zip(expected).enumerate() {
        let (token, col) = (i / layer.hidden, i % layer.hidden);
        if !expected.holds(found) {
            return Err(format!("token {token}, column {col}: {found}, {expected:?}"));
        }
    }
    Ok(())
}

/// Pairs in order, and nothing written behind the last of them.
fn check_sort(layer: &Layer, routes: &Routes, run: &Run) -> Result<(), String> {
    let sorted = oracle::sort(layer, routes, true);
    let pairs = sorted.pair_token.len();
    let checks = [
        ("offsets", run.offsets == sorted.offsets),
        ("tokens", run.pair_token[..pairs] == sorted.pair_token),
        ("weights", run.pair_weight[..pairs] == sorted.pair_weight),
        ("pairs of slots", run.slot_source == sorted.slot_source),
        ("weights of slots", run.slot_weight == sorted.slot_weight),
        ("tokens behind the last pair", run.pair_token[pairs..].iter().all(|&token| token == -1)),
    ];
    if let Some((what, _)) = checks.iter().find(|(_, right)| !right) {
        return Err(format!("sort: {what}"));
    }
    for (what, buffer) in [("z", &run.z), ("h", &run.h), ("y", &run.y)] {
        let row = buffer.len().checked_div(routes.ids.len()).unwrap_or(0);
        if buffer[pairs * row..].iter().any(|&byte| byte != 0xFF) {
            return Err(format!("{what} is written behind the last pair"));
        }
    }
    Ok(())
}

/// One of each form, with ranks and widths of no particular shape.
pub(crate) fn mixed_layer(random: &mut Random, dtype: Dtype, hidden: usize, width: usize) -> Layer {
    use Form::{Delta, Dense, LowRank, Rows};
    let mut layer = Layer::new(dtype, hidden);
    layer.add_base(random, width);
    layer.add(random, width, [Dense, Dense, Dense]);
    layer.add(random, width - 3, [LowRank(17), LowRank(40), LowRank(8)]);
    layer.experts.push(Expert::Constant(random.values(Dtype::F32, hidden, 1.0)));
    layer.add(random, width / 2 + 1, [Dense, LowRank(1), Dense]);
    layer.add(random, width, [Rows(24, 5), Rows(0, 3), Rows(9, 7)]);
    layer.add(random, width, [LowRank(0), LowRank(16), LowRank(0)]);
    layer.add(random, width, [Delta(8), Delta(15), Delta(16)]);
    layer.experts.push(Expert::Alias(1));
    layer.add(random, 8, [LowRank(63), Dense, Rows(65, 1)]);
    layer.add(random, width, [Delta(4), Dense, Delta(0)]);
    layer.experts.push(Expert::None);
    layer.add(random, width, [Dense, Dense, LowRank(33)]);
    layer
}

pub(crate) fn live(layer: &Layer) -> Vec<usize> {
    (0..layer.experts.len()).filter(|&e| !matches!(layer.experts[e], Expert::None)).collect()
}

pub(crate) const FAMILIES: [u32; 5] = [8, 16, 32, 64, 128];

#[test]
fn all_forms_in_one_layer() {
    let mut random = Random::new(1);
    let layer = mixed_layer(&mut random, Dtype::Bf16, 100, 75);
    let routes = Routes::random(&mut random, 21, 4, &live(&layer));
    let x = random.values(Dtype::Bf16, 21 * layer.hidden, 1.0);
    for tile_rows in FAMILIES {
        for mode in MODES {
            let plan = Plan { tile_rows, large_sort: mode == Mode::Early };
            if check(&layer, &x, &routes, plan, mode).is_none() {
                return;
            }
        }
    }
}

#[test]
fn element_types_and_activations() {
    let activations = [
        Activation::SwiGlu,
        Activation::Clamped { limit: 0.75, slope: 1.702 },
        Activation::GeluTanh,
        Activation::Relu,
        Activation::SquaredRelu,
    ];
    let mut random = Random::new(2);
    let two_matrices = [Activation::GeluTanh, Activation::Relu, Activation::SquaredRelu].map(|a| (a, true));
    let cases = activations.map(|a| (a, false)).into_iter().chain(two_matrices);
    for (i, (activation, without_up)) in cases.enumerate() {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][i % 3];
        let mut layer = mixed_layer(&mut random, dtype, 72, 40);
        layer.activation = activation;
        layer.without_up = without_up;
        layer.add_biases(&mut random);
        let routes = Routes::random(&mut random, 70, 3, &live(&layer));
        let x = random.values(dtype, 70 * layer.hidden, 1.0);
        for tile_rows in if dtype == Dtype::F32 { vec![64] } else { vec![8, 64, 128] } {
            if check(&layer, &x, &routes, Plan { tile_rows, large_sort: false }, Mode::Random(3)).is_none() {
                return;
            }
        }
    }
}
