//! MoE layers on a GPU: time of a forward pass, replayed as a CUDA graph, for four model shapes, dense and low rank, from
//! one token to 16384. Does nothing, saying so, where there is no GPU; `MOEPRESS_REQUIRE_GPU=1` makes that an error.
//!
//! `cargo bench --bench cuda -- [--shape NAME] [--form NAME] [--tokens N,N] [--runs N] [--peak TFLOP/s TB/s] [--kernels]`. One
//! line of JSON per measurement on standard output. With `--peak`, what the device reaches in a large GEMM and in a copy, also the fraction
//! of the floor: the time for the arithmetic, or for reading the visited experts and the tokens once and writing the
//! results, whichever is longer. With `--kernels`, the time of each kernel instead, those of the router among them. `overlap`
//! says whether kernels start while those before them end.

mod layer;
mod timing;

use std::error::Error;
use std::io::Write;

use layer::{Case, FORMS, Form, Layer, SHAPES, Shape};
use moepress::backend::cuda::{Device, availability};
use timing::{FEWEST, Gpu, Timed, warm_up};

/// What to measure.
#[derive(Default)]
struct Options {
    shape: Option<String>,
    form: Option<String>,
    tokens: Vec<usize>,
    /// TFLOP/s and TB/s of the device.
    peak: Option<[f64; 2]>,
    kernels: bool,
    /// Most replays of which the median is taken.
    runs: usize,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { runs: 60, ..Options::default() };
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let mut next = |what: &str| arguments.next().ok_or_else(|| format!("expected {what}"));
    while let Ok(name) = next("") {
        match name.as_str() {
            "--shape" => options.shape = Some(next("a shape")?),
            "--form" => options.form = Some(next("a form")?),
            "--runs" => options.runs = next("a number")?.parse::<usize>()?.max(1),
            "--tokens" => {
                options.tokens = next("numbers")?.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            "--peak" => options.peak = Some([next("TFLOP/s")?.parse()?, next("TB/s")?.parse()?]),
            "--kernels" => options.kernels = true,
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    if options.tokens.is_empty() {
        options.tokens = (0..15).map(|i| 1 << i).collect();
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    if let Err(why) = availability() {
        if std::env::var("MOEPRESS_REQUIRE_GPU").is_ok_and(|v| v == "1") {
            return Err(format!("MOEPRESS_REQUIRE_GPU=1: {why}").into());
        }
        eprintln!("skipped: {why}");
        return Ok(());
    }
    let gpu = Gpu::new(Device::new(0)?)?;
    let chosen = |shape: &&Shape| options.shape.as_ref().is_none_or(|name| name == shape.name);
    let wanted = |form: &Form| options.form.as_ref().is_none_or(|name| name == form.name);
    for shape in SHAPES.iter().filter(chosen) {
        for form in FORMS.into_iter().filter(wanted) {
            let layer = Layer::new(&gpu.device, shape, form)?;
            for &tokens in &options.tokens {
                measure(&gpu, &layer, tokens, &options)?;
            }
        }
    }
    Ok(())
}

/// Copies of the inputs, so that neither tokens nor experts of one run are in the cache for the next.
const COPIES: usize = 3;

fn measure(gpu: &Gpu, layer: &Layer, tokens: usize, options: &Options) -> Result<(), Box<dyn Error>> {
    let device = gpu.device.name();
    let (shape, form) = (layer.shape.name, layer.form.name);
    let cases = (0..COPIES).map(|copy| Case::new(&gpu.device, layer, tokens, copy as u64));
    let cases = cases.collect::<Result<Vec<_>, _>>()?;
    let mut line = serde_json::json!({ "device": device, "shape": shape, "form": form, "tokens": tokens });
    line["overlap"] = gpu.device.overlaps().into();
    if options.kernels {
        let timed = Timed::new(gpu)?;
        let pass = |number: usize| timed.pass(|timed| cases[number % COPIES].enqueue(layer, true, timed));
        warm_up(pass)?;
        timed.clear();
        while timed.passes() < FEWEST {
            pass(timed.passes())?;
        }
        line["kernels"] = serde_json::json!(timed.microseconds());
    } else {
        // A first run outside of a capture: whatever a driver does at a kernel's first launch is done.
        gpu.run(|stream| cases[0].enqueue(layer, false, stream))?;
        let graphs = cases.iter().map(|case| gpu.capture(|stream| case.enqueue(layer, false, stream)));
        let graphs = graphs.collect::<Result<Vec<_>, _>>()?;
        let microseconds = gpu.median(&graphs, options.runs)?;
        let flops = cases.iter().map(Case::flops).sum::<f64>() / COPIES as f64;
        let bytes = cases.iter().map(Case::bytes).sum::<f64>() / COPIES as f64;
        line["us"] = microseconds.into();
        line["tflops"] = (flops / microseconds / 1e6).into();
        line["gbs"] = (bytes / microseconds / 1e3).into();
        if let Some([peak_tflops, peak_tbs]) = options.peak {
            let floor = (flops / peak_tflops).max(bytes / peak_tbs) / 1e6;
            line["of_floor"] = (floor / microseconds).into();
        }
    }
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
