use rand::{RngExt as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::expert::{Trained, TrainedMlp};
use super::layer::{Data, Expansion, NONE, TrainedLayer};
use super::least_squares;
use super::map::{Map, Parameter, Part};
use super::sparse::{Schedule, split};
use super::train::{Training, train};
use crate::architecture::Activation;
use crate::checkpoint::Dtype;

const D: usize = 6;
const WIDTH: usize = 5;
const TOKENS: usize = 40;

fn values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn parameter(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Parameter {
    Parameter::new(values(rng, rows * cols), cols, Dtype::F32, 1.0)
}

/// A map of every kind of part.
fn map(rng: &mut ChaCha8Rng, outputs: usize, inputs: usize, kind: usize) -> Map {
    let product =
        |rng: &mut ChaCha8Rng| Part::Product { u: parameter(rng, outputs, 2), v: parameter(rng, 2, inputs) };
    let parts = match kind % 4 {
        0 => vec![Part::Dense(parameter(rng, outputs, inputs))],
        1 => vec![product(rng)],
        2 => vec![product(rng), Part::Rows { rows: vec![1, 3], s: parameter(rng, 2, inputs) }],
        _ => vec![Part::Fixed(values(rng, outputs * inputs).into()), product(rng)],
    };
    Map { inputs, outputs, parts, bias: kind.is_multiple_of(2).then(|| values(rng, outputs)) }
}

fn mlp(rng: &mut ChaCha8Rng, kind: usize, activation: Activation) -> Trained {
    Trained::Mlp(Box::new(TrainedMlp {
        gate: map(rng, WIDTH, D, kind),
        up: activation.is_gated().then(|| map(rng, WIDTH, D, kind + 1)),
        down: map(rng, D, WIDTH, kind + 2),
        activation,
    }))
}

/// Six experts: four kinds of MLP, a constant, and nothing.
fn layer(rng: &mut ChaCha8Rng, activation: Activation) -> TrainedLayer {
    let mut experts: Vec<Trained> = (0..4).map(|kind| mlp(rng, kind, activation)).collect();
    experts.push(Trained::Constant(parameter(rng, 1, D)));
    experts.push(Trained::Idle);
    TrainedLayer { experts }
}

fn data(rng: &mut ChaCha8Rng, weighs_input: bool) -> Data {
    let ids = (0..TOKENS as u32).flat_map(|t| [t % 5, if t % 7 == 0 { NONE } else { (t + 1 + t % 3) % 5 }]);
    Data {
        hidden_size: D,
        expansion: None,
        top_k: 2,
        weighs_input,
        x: values(rng, TOKENS * D),
        target: values(rng, TOKENS * D),
        ids: ids.collect(),
        weights: values(rng, TOKENS * 2).iter().map(|v| v.abs()).collect(),
        training: (0..TOKENS as u32).filter(|t| t % 5 != 4).collect(),
        held_out: (0..TOKENS as u32).filter(|t| t % 5 == 4).collect(),
    }
}

/// The same where `D` is the width of a latent, before a layer of width 9.
fn on_a_latent(rng: &mut ChaCha8Rng) -> Data {
    let expansion = Some(Expansion::new(values(rng, 9 * D), D).unwrap());
    Data { hidden_size: 9, expansion, target: values(rng, TOKENS * 9), ..data(rng, false) }
}

/// The layer's output in f64, written down from the definitions.
mod reference {
    use super::{Activation, D, Data, Map, NONE, Part, Trained, TrainedLayer};

    fn dense(map: &Map) -> Vec<Vec<f64>> {
        let mut w = vec![vec![0.0; map.inputs]; map.outputs];
        let at = |values: &[f32], cols: usize, r: usize, c: usize| f64::from(values[r * cols + c]);
        for part in &map.parts {
            for (r, row) in w.iter_mut().enumerate() {
                for (c, w) in row.iter_mut().enumerate() {
                    *w += match part {
                        Part::Dense(p) => at(&p.values, map.inputs, r, c),
                        Part::Fixed(values) => at(values, map.inputs, r, c),
                        Part::Product { u, v } => (0..u.cols)
                            .map(|k| at(&u.values, u.cols, r, k) * at(&v.values, map.inputs, k, c))
                            .sum(),
                        Part::Rows { rows, s } => match rows.iter().position(|row| *row as usize == r) {
                            Some(i) => at(&s.values, map.inputs, i, c),
                            None => 0.0,
                        },
                    };
                }
            }
        }
        w
    }

    fn apply(map: &Map, x: &[f64]) -> Vec<f64> {
        let bias = |r: usize| map.bias.as_ref().map_or(0.0, |b| f64::from(b[r]));
        let rows = dense(map).into_iter().enumerate();
        rows.map(|(r, row)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias(r)).collect()
    }

    fn gelu(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
    }

    fn activation(kind: Activation, g: f64, u: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match kind {
            Activation::SwiGlu => g * sigmoid(g) * u,
            Activation::ClampedSwiGlu { limit, slope } => {
                let (limit, slope) = (f64::from(limit), f64::from(slope));
                let g = g.min(limit);
                g * sigmoid(slope * g) * (u.clamp(-limit, limit) + 1.0)
            }
            Activation::Relu => g.max(0.0),
            Activation::SquaredRelu => g.max(0.0).powi(2),
            Activation::GeluTanh => gelu(g),
            Activation::GeGluTanh => gelu(g) * u,
        }
    }

    pub(super) fn output(layer: &TrainedLayer, data: &Data, t: u32) -> Vec<f64> {
        let x: Vec<f64> = data.input(t).iter().map(|v| f64::from(*v)).collect();
        let mut y = vec![0.0; D];
        for slot in 0..data.top_k {
            let (id, g) =
                (data.ids[t as usize * data.top_k + slot], data.weights[t as usize * data.top_k + slot]);
            if id == NONE {
                continue;
            }
            let (weight, scale) = if data.weighs_input { (1.0, f64::from(g)) } else { (f64::from(g), 1.0) };
            let x: Vec<f64> = x.iter().map(|v| v * scale).collect();
            let f = match &layer.experts[id as usize] {
                Trained::Mlp(mlp) => {
                    let gate = apply(&mlp.gate, &x);
                    let up = mlp.up.as_ref().map_or(vec![0.0; gate.len()], |up| apply(up, &x));
                    let z: Vec<f64> =
                        gate.iter().zip(&up).map(|(g, u)| activation(mlp.activation, *g, *u)).collect();
                    apply(&mlp.down, &z)
                }
                Trained::Constant(c) => c.values.iter().map(|v| f64::from(*v)).collect(),
                Trained::Idle => vec![0.0; D],
            };
            y.iter_mut().zip(f).for_each(|(y, f)| *y += weight * f);
        }
        let Some(expansion) = &data.expansion else { return y };
        let rows = expansion.matrix.chunks_exact(D);
        rows.map(|row| row.iter().zip(&y).map(|(f, y)| f64::from(*f) * y).sum()).collect()
    }

    pub(super) fn loss(layer: &TrainedLayer, data: &Data, tokens: &[u32]) -> f64 {
        let error = |t: u32| -> f64 {
            let target = data.wanted(t).iter().map(|v| f64::from(*v));
            output(layer, data, t).iter().zip(target).map(|(y, t)| (y - t).powi(2)).sum()
        };
        tokens.iter().map(|&t| error(t)).sum()
    }
}

const CLAMPED: Activation = Activation::ClampedSwiGlu { limit: 0.8, slope: 1.702 };

#[test]
fn gradients_are_the_finite_differences_of_the_loss_in_f64() {
    for (seed, activation, weighs_input, latent) in [
        (1, Activation::SwiGlu, false, false),
        (2, CLAMPED, false, false),
        (3, Activation::SwiGlu, true, false),
        (4, Activation::Relu, false, false),
        (5, Activation::GeluTanh, false, false),
        (6, Activation::GeGluTanh, false, false),
        (7, Activation::SquaredRelu, false, false),
        (8, Activation::SwiGlu, false, true),
    ] {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut layer = layer(&mut rng, activation);
        let data = if latent { on_a_latent(&mut rng) } else { data(&mut rng, weighs_input) };
        let batch: Vec<u32> = (0..TOKENS as u32).rev().collect();
        let loss = layer.gradients(&data, &batch, 1.0);
        let expected = reference::loss(&layer, &data, &batch);
        assert!((loss - expected).abs() < 1e-5 * expected, "{loss} {expected}");
        // A step that f32 holds exactly; the error of central differences is about its square.
        let step = 2f32.powi(-7);
        let count = layer.parameters().len();
        let (mut checked, mut kinks) = (0, 0);
        for p in 0..count {
            let gradient = layer.parameters()[p].gradient.clone();
            let largest = gradient.iter().fold(0.0f32, |m, g| m.max(g.abs()));
            for (i, &found) in gradient.iter().enumerate() {
                let value = layer.parameters()[p].values[i];
                let mut at = |value: f32| {
                    layer.parameters()[p].values[i] = value;
                    reference::loss(&layer, &data, &batch)
                };
                let [below, here, above] = [value - step, value, value + step].map(&mut at);
                at(value);
                let (left, right) = ((here - below) / f64::from(step), (above - here) / f64::from(step));
                let tolerance = 2e-3 * f64::from(largest.max(0.1));
                checked += 1;
                if matches!(activation, CLAMPED | Activation::Relu) && (right - left).abs() > 10.0 * tolerance
                {
                    // A kink lies between the points: there the difference is no derivative.
                    kinks += 1;
                    continue;
                }
                let error = (f64::from(found) - f64::midpoint(left, right)).abs();
                assert!(error < tolerance, "seed {seed} parameter {p} [{i}]: {found} {left} {right}");
            }
        }
        assert!(kinks * 3 < checked, "{kinks} of {checked}");
    }
}

#[test]
fn least_squares_solve_the_normal_equations() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let plain = data(&mut rng, false);
    for data in [plain, on_a_latent(&mut rng)] {
        one_sweep_is_the_optimum(&mut rng, data);
    }
}

fn one_sweep_is_the_optimum(rng: &mut ChaCha8Rng, mut data: Data) {
    // One expert that is linear in all that is solved.
    let mut layer = TrainedLayer { experts: vec![mlp(rng, 2, Activation::SwiGlu)] };
    data.ids = (0..2 * TOKENS).map(|i| if i % 2 == 0 { 0 } else { NONE }).collect();
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    let mut rest = layer.residual(&data, &tokens);
    let before = layer.loss(&data, &tokens);
    least_squares::sweep(&mut layer, &data, &tokens, &mut rest, 1e-9).unwrap();
    let after = layer.loss(&data, &tokens);
    assert!(after < 0.9 * before, "{after} {before}");
    // What is missing was kept up to date, and at an optimum the gradient of the solved factor vanishes.
    for (kept, computed) in rest.iter().zip(layer.residual(&data, &tokens)) {
        assert!((kept - computed).abs() < 1e-4);
    }
    layer.gradients(&data, &tokens, 1.0);
    let Trained::Mlp(mlp) = &layer.experts[0] else { unreachable!() };
    let Part::Dense(down) = &mlp.down.parts[0] else { unreachable!() };
    assert!(down.gradient.iter().all(|g| g.abs() < 1e-3), "{:?}", down.gradient);
}

#[test]
fn sweeps_never_raise_the_objective_and_the_ridge_holds_back() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let first = layer(&mut rng, Activation::SwiGlu);
    let plain = data(&mut rng, false);
    for data in [plain, on_a_latent(&mut rng)] {
        sweeps(&first, &data);
    }
}

fn sweeps(first: &TrainedLayer, data: &Data) {
    let mut moved = Vec::new();
    for ridge in [1e-6, 1e-1, 1e3] {
        let mut layer = first.clone();
        let mut rest = layer.residual(data, &data.training);
        let mut loss = layer.loss(data, &data.training);
        for _ in 0..3 {
            least_squares::sweep(&mut layer, data, &data.training, &mut rest, ridge).unwrap();
            let next = layer.loss(data, &data.training);
            assert!(next <= loss * (1.0 + 1e-6), "{next} {loss}");
            loss = next;
        }
        moved.push(loss);
    }
    assert!(moved.is_sorted(), "{moved:?}");
}

/// Targets are what another layer gives, so that there is something to learn.
fn lesson(rng: &mut ChaCha8Rng) -> (TrainedLayer, Data) {
    let teacher = layer(rng, Activation::SwiGlu);
    let mut data = data(rng, false);
    for t in 0..TOKENS as u32 {
        let y = reference::output(&teacher, &data, t);
        let start = t as usize * D;
        data.target[start..start + D].iter_mut().zip(y).for_each(|(to, y)| *to = y as f32);
    }
    let mut student = teacher;
    for parameter in student.parameters() {
        let noise = values(rng, parameter.values.len());
        parameter.values.iter_mut().zip(noise).for_each(|(v, n)| *v += 0.2 * n);
    }
    (student, data)
}

#[test]
fn training_gets_closer_on_tokens_held_out_and_is_deterministic() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (student, data) = lesson(&mut rng);
    let training = Training { steps: 200, batch: 16, rate: 0.01, ..Training::default() };
    let run = |threads: usize| {
        let mut layer = student.clone();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let loss = pool.install(|| train(&mut layer, &data, &training, None, 7)).unwrap();
        let values: Vec<u32> =
            layer.parameters().iter().flat_map(|p| p.values.iter().map(|v| v.to_bits())).collect();
        assert_eq!(layer.loss(&data, &data.held_out), loss.after);
        (loss, values)
    };
    let (loss, values) = run(1);
    assert!(loss.least_squares < loss.before && loss.after < 0.7 * loss.before, "{loss:?}");
    for threads in [2, 5] {
        assert_eq!(run(threads), (loss, values.clone()));
    }
}

#[test]
fn what_is_not_better_is_not_kept() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (student, mut data) = lesson(&mut rng);
    // Trained towards noise, judged by what it already gives.
    for &t in &data.held_out.clone() {
        let y = reference::output(&student, &data, t);
        let start = t as usize * D;
        data.target[start..start + D].iter_mut().zip(y).for_each(|(to, y)| *to = y as f32);
    }
    for &t in &data.training.clone() {
        let noise = values(&mut rng, D);
        data.target[t as usize * D..(t as usize + 1) * D].copy_from_slice(&noise);
    }
    let mut layer = student.clone();
    let training = Training { steps: 50, batch: 8, ..Training::default() };
    let loss = train(&mut layer, &data, &training, None, 0).unwrap();
    assert_eq!(loss.after, loss.before);
    let mut student = student;
    for (a, b) in layer.parameters().iter().zip(student.parameters()) {
        assert_eq!(a.values, b.values);
    }
}

#[test]
fn splitting_loses_nothing_and_the_schedule_leaves_its_share_of_rows() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let (student, data) = lesson(&mut rng);
    let mut layer = student.clone();
    split(&mut layer, 2).unwrap();
    let all: Vec<u32> = (0..TOKENS as u32).collect();
    let losses = [student.loss(&data, &all), layer.loss(&data, &all)];
    assert!((losses[0] - losses[1]).abs() < 1e-5 * losses[0], "{losses:?}");
    let rows = |layer: &mut TrainedLayer| -> usize {
        let mlps =
            layer.experts.iter_mut().filter_map(|e| if let Trained::Mlp(m) = e { Some(m) } else { None });
        let parts = mlps.flat_map(|m| m.maps()).flat_map(|m| &m.parts);
        parts.map(|p| if let Part::Rows { rows, .. } = p { rows.len() } else { 0 }).sum()
    };
    let total = rows(&mut layer);
    let schedule = Schedule { share: 0.25, warm_up: 5, cool_down: 20 };
    let training = Training { steps: 60, batch: 16, rate: 0.01, ..Training::default() };
    let loss = train(&mut layer, &data, &training, Some(&schedule), 3).unwrap();
    assert!(loss.after.is_finite() && loss.after <= loss.before * 2.0, "{loss:?}");
    assert_eq!(layer.loss(&data, &data.held_out), loss.after);
    let kept = rows(&mut layer);
    assert_eq!(kept, (0.25 * total as f64).round() as usize, "of {total}");
}
