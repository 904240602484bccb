use super::*;

/// Inputs of one layer: `[tokens, …]` each, but for the last two.
#[derive(Clone)]
struct Inputs {
    x: CpuBuffer,
    steps: CpuBuffer,
    b: CpuBuffer,
    c: CpuBuffer,
    rates: Vec<f32>,
    skip: Vec<f32>,
}

fn inputs(channels: usize, state_dim: usize, tokens: usize) -> Inputs {
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
        x: buffer(1, channels, 1.0),
        steps: buffer(2, channels, 3.0),
        b: buffer(3, state_dim, 1.0),
        c: buffer(4, state_dim, 1.0),
        rates: noise(5, state_dim * channels, 2.0).into_iter().map(f32::exp).collect(),
        skip: noise(6, channels, 1.0),
    }
}

fn run(inputs: &Inputs, batch: &Batch, state: Option<&mut CpuBuffer>) -> Vec<f32> {
    let Inputs { x, mut steps, b, c, rates, skip } = inputs.clone();
    let mut out = CpuBuffer::default();
    out.reshape(x.rows, x.cols);
    let terms = ChannelTerms { steps: &mut steps, b: &b, c: &c, rates: &rates, skip: &skip };
    scan(&x, terms, state, batch, &mut out);
    out.data
}

/// The definition in f64, for one window.
fn definition(inputs: &Inputs) -> Vec<f64> {
    let (channels, state_dim) = (inputs.x.cols, inputs.b.cols);
    let mut out = vec![0.0; inputs.x.rows * channels];
    for channel in 0..channels {
        let mut state = vec![0.0; state_dim];
        for t in 0..inputs.x.rows {
            let x = f64::from(inputs.x.row(t)[channel]);
            let step = f64::from(inputs.steps.row(t)[channel]).exp().ln_1p();
            let mut y = f64::from(inputs.skip[channel]) * x;
            for (n, s) in state.iter_mut().enumerate() {
                let rate = f64::from(inputs.rates[n * channels + channel]);
                *s = (-rate * step).exp() * *s + step * x * f64::from(inputs.b.row(t)[n]);
                y += f64::from(inputs.c.row(t)[n]) * *s;
            }
            out[t * channels + channel] = y;
        }
    }
    out
}

#[test]
fn agrees_with_the_definition() {
    for (channels, state_dim) in [(1, 1), (37, 5), (64, 16), (150, 12)] {
        let inputs = inputs(channels, state_dim, 70);
        let expected = definition(&inputs);
        let largest = expected.iter().fold(1.0, |most: f64, v| most.max(v.abs()));
        for (found, expected) in run(&inputs, &Batch::piece(0, 70, 70), None).iter().zip(&expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-6 * largest, "{channels}: {found} {expected}");
        }
    }
}

/// Windows beside each other, and a text in pieces, give the bits of each text as a whole.
#[test]
fn windows_and_pieces_change_nothing() {
    let (channels, length) = (77, 24);
    let inputs = inputs(channels, 6, 2 * length);
    let both = run(&inputs, &Batch { windows: 2, ..Batch::piece(0, length, length) }, None);
    let rows = |start: usize, count: usize| {
        let part = |x: &CpuBuffer| CpuBuffer {
            rows: count,
            cols: x.cols,
            data: x.data[start * x.cols..(start + count) * x.cols].to_vec(),
        };
        let [x, steps, b, c] = [&inputs.x, &inputs.steps, &inputs.b, &inputs.c].map(part);
        Inputs { x, steps, b, c, ..inputs.clone() }
    };
    for window in 0..2 {
        let first = window * length;
        let expected = &both[first * channels..][..length * channels];
        for pieces in [&[24][..], &[1; 24], &[5, 1, 17, 1]] {
            let (mut found, mut start, mut state) = (Vec::new(), 0, CpuBuffer::default());
            for &count in pieces {
                let batch = Batch::piece(start, count, length);
                found.extend(run(&rows(first + start, count), &batch, Some(&mut state)));
                start += count;
            }
            assert_eq!(found, expected, "window {window} in {pieces:?}");
        }
    }
}
