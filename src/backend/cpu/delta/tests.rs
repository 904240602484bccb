use super::*;
use crate::architecture::DeltaProjections;

/// Inputs of one layer: `[tokens, …]` each.
#[derive(Clone)]
struct Inputs {
    qkv: CpuBuffer,
    b: CpuBuffer,
    a: CpuBuffer,
    log_rates: Vec<f32>,
    dt_bias: Vec<f32>,
}

fn shape(key_heads: usize, value_heads: usize, key_dim: usize, value_dim: usize) -> GatedDelta {
    let projections = DeltaProjections::Separate;
    GatedDelta { key_heads, value_heads, key_dim, value_dim, kernel: 4, kimi: false, projections }
}

/// The same with an α for every row.
fn kimi(heads: usize, key_dim: usize, value_dim: usize) -> GatedDelta {
    GatedDelta { kimi: true, ..shape(heads, heads, key_dim, value_dim) }
}

fn inputs(shape: GatedDelta, tokens: usize) -> Inputs {
    let noise = |seed: usize, count: usize, scale: f32| -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0;
        (0..count).map(|i| value(i) * scale).collect()
    };
    let buffer = |seed: usize, cols: usize, scale: f32| CpuBuffer {
        rows: tokens,
        cols,
        data: noise(seed, tokens * cols, scale),
    };
    Inputs {
        qkv: buffer(1, shape.qkv_dim(), 2.0),
        b: buffer(2, shape.value_heads, 4.0),
        a: buffer(3, shape.decays(), 2.0),
        log_rates: noise(4, shape.value_heads, 2.0),
        dt_bias: noise(5, shape.decays(), 1.0),
    }
}

fn run(inputs: &Inputs, shape: GatedDelta, batch: &Batch, state: Option<&mut CpuBuffer>) -> Vec<f32> {
    let Inputs { mut qkv, mut b, mut a, log_rates, dt_bias } = inputs.clone();
    let mut out = CpuBuffer::default();
    out.reshape(qkv.rows, shape.all_values());
    let gates = DeltaGates { b: &mut b, a: &mut a, log_rates: &log_rates, dt_bias: &dt_bias };
    gated_delta_rule(&mut qkv, gates, shape, state, batch, &mut out);
    out.data
}

/// The definition in f64, for one window.
fn definition(inputs: &Inputs, shape: GatedDelta) -> Vec<f64> {
    let GatedDelta { key_heads, value_heads, key_dim, value_dim, .. } = shape;
    let unit = |x: &[f32]| -> Vec<f64> {
        let length = (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() + 1e-6).sqrt();
        x.iter().map(|v| f64::from(*v) / length).collect()
    };
    let mut out = vec![0.0; inputs.qkv.rows * shape.all_values()];
    for head in 0..value_heads {
        let mut state = vec![0.0; key_dim * value_dim];
        for t in 0..inputs.qkv.rows {
            let row = inputs.qkv.row(t);
            let key_head = head / (value_heads / key_heads);
            let q = unit(&row[key_head * key_dim..][..key_dim]);
            let k = unit(&row[(key_heads + key_head) * key_dim..][..key_dim]);
            let v = &row[2 * key_heads * key_dim + head * value_dim..][..value_dim];
            let beta = 1.0 / (1.0 + (-f64::from(inputs.b.row(t)[head])).exp());
            for (i, row) in state.chunks_exact_mut(value_dim).enumerate() {
                let decay = if shape.kimi { head * key_dim + i } else { head };
                let step = f64::from(inputs.a.row(t)[decay]) + f64::from(inputs.dt_bias[decay]);
                let rate = f64::from(inputs.log_rates[head]).exp();
                let alpha = (-rate * step.exp().ln_1p()).exp();
                for s in row {
                    *s *= alpha;
                }
            }
            for c in 0..value_dim {
                let known: f64 = (0..key_dim).map(|i| k[i] * state[i * value_dim + c]).sum();
                let delta = beta * (f64::from(v[c]) - known);
                (0..key_dim).for_each(|i| state[i * value_dim + c] += k[i] * delta);
                let read: f64 = (0..key_dim).map(|i| q[i] * state[i * value_dim + c]).sum();
                out[t * shape.all_values() + head * value_dim + c] = read / (key_dim as f64).sqrt();
            }
        }
    }
    out
}

#[test]
fn agrees_with_the_definition() {
    let shapes = [shape(1, 1, 1, 1), shape(2, 4, 12, 10), shape(3, 3, 16, 33), shape(2, 6, 40, 96)];
    for shape in shapes.into_iter().chain([kimi(1, 1, 1), kimi(3, 24, 40)]) {
        let inputs = inputs(shape, 70);
        let expected = definition(&inputs, shape);
        let found = run(&inputs, shape, &Batch::piece(0, 70, 70), None);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6, "{shape:?}: {found} {expected}");
        }
    }
}

/// Windows beside each other, and a text in pieces, give the bits of each text as a whole.
#[test]
fn windows_and_pieces_change_nothing() {
    [shape(2, 4, 20, 37), kimi(2, 18, 37)].into_iter().for_each(check_windows_and_pieces);
}

fn check_windows_and_pieces(shape: GatedDelta) {
    let length = 24;
    let inputs = inputs(shape, 2 * length);
    let both = run(&inputs, shape, &Batch { windows: 2, ..Batch::piece(0, length, length) }, None);
    let rows = |start: usize, count: usize| {
        let part = |x: &CpuBuffer| CpuBuffer {
            rows: count,
            cols: x.cols,
            data: x.data[start * x.cols..(start + count) * x.cols].to_vec(),
        };
        Inputs { qkv: part(&inputs.qkv), b: part(&inputs.b), a: part(&inputs.a), ..inputs.clone() }
    };
    for window in 0..2 {
        let first = window * length;
        let expected = &both[first * shape.all_values()..][..length * shape.all_values()];
        for pieces in [&[24][..], &[1; 24], &[5, 1, 17, 1]] {
            let (mut found, mut start, mut state) = (Vec::new(), 0, CpuBuffer::default());
            for &count in pieces {
                let batch = Batch::piece(start, count, length);
                found.extend(run(&rows(first + start, count), shape, &batch, Some(&mut state)));
                start += count;
            }
            assert_eq!(found, expected, "window {window} in {pieces:?}");
        }
    }
}

/// A gate that closes at once, and one that stays open: no overflow on the way.
#[test]
fn extreme_gates() {
    let shape = shape(1, 1, 4, 3);
    let mut inputs = inputs(shape, 6);
    for (a, expected) in [(1e4, 0.0), (100.0, 0.0), (-200.0, 1.0)] {
        inputs.a.data.fill(a);
        inputs.log_rates.fill(1.0);
        let Inputs { mut b, mut a, log_rates, dt_bias, .. } = inputs.clone();
        open_gates(&mut b, &mut a, &log_rates, &dt_bias);
        assert!(a.data.iter().all(|a| *a == expected), "{a:?}");
        assert!(run(&inputs, shape, &Batch::piece(0, 6, 6), None).iter().all(|v| v.is_finite()));
    }
}
