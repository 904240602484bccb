//! Our side of `benches/peers/models.py`: opens a checkpoint, then runs it as asked on standard input.
//!
//! Arguments: model folder, threads, and optionally the CPU instructions. Each input line `prompt new runs` is answered by a JSON list of seconds: with `new`
//! 0 of the logits of a whole prompt, else of as many tokens one by one after it.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use moepress::backend::cpu::{Cpu, Isa};
use moepress::checkpoint::Checkpoint;
use moepress::model::{Decoder, Model};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [model, threads, isa @ ..] = &args[..] else {
        // Run by `cargo bench` with the others: nothing to do.
        return Ok(());
    };
    if let [isa] = isa {
        isa.parse::<Isa>()?.select()?;
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build_global()?;
    rayon::scope(|_| serve(model))
}

fn serve(model: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let model = Model::new(&checkpoint, &Cpu, 512)?;
    let decoder = Decoder::new(&model, &mut ())?;
    let vocabulary = model.architecture().vocabulary as u32;
    let ids: Vec<u32> = (0..512u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 12) % vocabulary).collect();
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let numbers: Vec<usize> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        let [prompt, new, runs] = numbers[..] else { return Err("a line: prompt new runs".into()) };
        let mut seconds = Vec::new();
        for _ in 0..runs {
            let mut sequence = decoder.sequence()?;
            if new > 0 {
                sequence.extend(&ids[..prompt])?;
            }
            let start = Instant::now();
            if new == 0 {
                sequence.extend_all(&ids[..prompt])?;
            }
            for id in &ids[prompt..prompt + new] {
                sequence.extend(&[*id])?;
            }
            seconds.push(start.elapsed().as_secs_f64());
        }
        writeln!(out, "{}", serde_json::to_string(&seconds)?)?;
        out.flush()?;
    }
    Ok(())
}
