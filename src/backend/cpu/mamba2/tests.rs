use super::*;

/// Inputs of one layer: `[tokens, …]` each.
#[derive(Clone)]
struct Inputs {
    x: CpuBuffer,
    steps: CpuBuffer,
    dt_bias: Vec<f32>,
    rates: Vec<f32>,
    skip: Vec<f32>,
}

fn shape(heads: usize, head_dim: usize, state_dim: usize, groups: usize) -> Mamba2 {
    Mamba2 {
        heads,
        head_dim,
        state_dim,
        groups,
        kernel: 4,
        convolution_bias: true,
        projection_bias: false,
        step_limits: [0.0, f32::INFINITY],
    }
}

fn inputs(shape: Mamba2, tokens: usize) -> Inputs {
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
        x: buffer(1, shape.channels(), 1.0),
        steps: buffer(2, shape.heads, 3.0),
        dt_bias: noise(3, shape.heads, 1.0),
        rates: noise(4, shape.heads, 2.0).into_iter().map(f32::exp).collect(),
        skip: noise(5, shape.heads, 1.0),
    }
}

fn run(inputs: &Inputs, shape: Mamba2, batch: &Batch, state: Option<&mut CpuBuffer>) -> Vec<f32> {
    let Inputs { x, mut steps, dt_bias, rates, skip } = inputs.clone();
    let mut out = CpuBuffer::default();
    out.reshape(x.rows, shape.width());
    let terms = ScanTerms { steps: &mut steps, dt_bias: &dt_bias, rates: &rates, skip: &skip };
    scan(&x, terms, shape, state, batch, &mut out);
    out.data
}

/// The definition in f64, for one window.
fn definition(inputs: &Inputs, shape: Mamba2) -> Vec<f64> {
    let Mamba2 { heads, head_dim, state_dim, groups, step_limits, .. } = shape;
    let [least, most] = step_limits.map(f64::from);
    let mut out = vec![0.0; inputs.x.rows * shape.width()];
    for head in 0..heads {
        let mut state = vec![0.0; state_dim * head_dim];
        let group = head / (heads / groups);
        for t in 0..inputs.x.rows {
            let row = inputs.x.row(t);
            let x = &row[head * head_dim..][..head_dim];
            let b = &row[shape.width() + group * state_dim..][..state_dim];
            let c = &row[shape.width() + (groups + group) * state_dim..][..state_dim];
            let step = f64::from(inputs.steps.row(t)[head]) + f64::from(inputs.dt_bias[head]);
            let step = step.exp().ln_1p().clamp(least, most);
            let decay = (-f64::from(inputs.rates[head]) * step).exp();
            for (p, x) in x.iter().map(|x| f64::from(*x)).enumerate() {
                let mut y = f64::from(inputs.skip[head]) * x;
                for n in 0..state_dim {
                    let s = &mut state[n * head_dim + p];
                    *s = decay * *s + f64::from(b[n]) * step * x;
                    y += f64::from(c[n]) * *s;
                }
                out[t * shape.width() + head * head_dim + p] = y;
            }
        }
    }
    out
}

#[test]
fn agrees_with_the_definition() {
    let limited = Mamba2 { step_limits: [0.3, 1.5], ..shape(2, 8, 12, 2) };
    for shape in [shape(1, 1, 1, 1), shape(4, 10, 12, 2), shape(3, 33, 16, 1), shape(6, 96, 40, 3), limited] {
        let inputs = inputs(shape, 70);
        let expected = definition(&inputs, shape);
        let largest = expected.iter().fold(1.0, |most: f64, v| most.max(v.abs()));
        let found = run(&inputs, shape, &Batch::piece(0, 70, 70), None);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6 * largest, "{shape:?}: {found} {expected}");
        }
    }
}

/// Windows beside each other, and a text in pieces, give the bits of each text as a whole.
#[test]
fn windows_and_pieces_change_nothing() {
    let (shape, length) = (shape(4, 37, 20, 2), 26);
    let inputs = inputs(shape, 2 * length);
    let both = run(&inputs, shape, &Batch { windows: 2, ..Batch::piece(0, length, length) }, None);
    let rows = |start: usize, count: usize| {
        let part = |x: &CpuBuffer| CpuBuffer {
            rows: count,
            cols: x.cols,
            data: x.data[start * x.cols..(start + count) * x.cols].to_vec(),
        };
        Inputs { x: part(&inputs.x), steps: part(&inputs.steps), ..inputs.clone() }
    };
    for window in 0..2 {
        let first = window * length;
        let expected = &both[first * shape.width()..][..length * shape.width()];
        for pieces in [&[26][..], &[1; 26], &[5, 1, 19, 1], &[3, 8, 15]] {
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
