//! Our side of `benches/peers/compare.py`: prepares one MoE layer, then runs it as asked on standard input.
//!
//! Arguments: shape (with `-routed`, without the shared expert), format (`f32`, `bf16`, `fp8` or `mxfp4`), form (`dense` or a percentage
//! of full rank), threads, and optionally the CPU instructions. Each input line `tokens runs` is answered by a JSON list of seconds.

mod layers;

use std::io::{BufRead, Write};
use std::time::Instant;

use layers::{Format, Layer, SHAPES};
use moepress::backend::cpu::Isa;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [shape, format, form, threads, isa @ ..] = &args[..] else {
        // Run by `cargo bench` with the others: nothing to do.
        return Ok(());
    };
    let (name, routed) = shape.strip_suffix("-routed").map_or((&shape[..], false), |name| (name, true));
    let mut shape = SHAPES.into_iter().find(|s| s.name == name).ok_or("shape: small, qwen or mixtral")?;
    if routed {
        shape.shared_width = 0;
    }
    let format = Format::named(format).ok_or("format: f32, bf16, fp8 or mxfp4")?;
    if let [isa] = isa {
        isa.parse::<Isa>()?.select()?;
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build_global()?;
    let layer = Layer::new(shape, format, form.parse().ok());
    // Programs are told to compute on a thread of the pool.
    rayon::scope(|_| serve(layer))
}

/// Answers the lines of standard input.
fn serve(mut layer: Layer) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (tokens, runs) = line.split_once(' ').ok_or("a line: tokens runs")?;
        let x = layer.input(tokens.parse()?);
        let mut seconds = Vec::new();
        for _ in 0..runs.parse::<usize>()? {
            let start = Instant::now();
            layer.run(&x)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        writeln!(out, "{}", serde_json::to_string(&seconds)?)?;
        out.flush()?;
    }
    Ok(())
}
