//! `moepress generate`: text from a prompt, token by token.

use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use moepress::backend::Backend;
use moepress::checkpoint::{Checkpoint, read_file};
use moepress::generate::{
    Detokeniser, Generation, Options, Sampler, Sampling, Stop, end_tokens, generate, positions, start_token,
};
use moepress::model::{Decoder, Model, open_architecture};
use moepress::tokens::Tokenizer;
use serde::Serialize;

use super::common::{BosArg, Device, DeviceArgs, OutputArgs};
use super::failure::Failure;
use super::output;
use super::units::{counted, parse_at_least, parse_seed, rate, seconds};

/// Bytes of the longest text that is taken for a prompt: far beyond the positions of any model.
const LARGEST_PROMPT: u64 = 64 << 20;

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
#[group(id = "input", required = true, multiple = false, args = ["prompt", "prompt_file"])]
pub(crate) struct Args {
    /// Checkpoint folder
    model: PathBuf,
    /// The text to continue; the encoder's, in models that have one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A UTF-8 file with the text to continue; - for standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(
        long,
        value_name = "N",
        default_value = "128",
        value_parser = parse_at_least::<1>,
        allow_negative_numbers = true
    )]
    max_tokens: usize,
    /// Logits are divided by T; 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value = "0", allow_negative_numbers = true)]
    temperature: f64,
    /// Choose among the fewest most probable tokens whose probabilities add up to P
    #[arg(long, value_name = "P", default_value = "1", allow_negative_numbers = true)]
    top_p: f64,
    /// Seed of the choices
    #[arg(long, value_name = "S", default_value = "0", value_parser = parse_seed, allow_negative_numbers = true)]
    seed: u64,
    /// Whether the prompt begins with the beginning-of-sequence token; auto does what the model's tokenizer does
    #[arg(long, value_enum, default_value_t)]
    bos: BosArg,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What was done.
#[derive(Debug, Serialize)]
struct Summary {
    text: String,
    ids: Vec<u32>,
    stop: &'static str,
    prompt_tokens: usize,
    tokens: usize,
    prefill_seconds: f64,
    prefill_tokens_per_second: f64,
    decode_seconds: f64,
    /// `None` where one pass was enough.
    decode_tokens_per_second: Option<f64>,
    device: String,
}

impl Args {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        self.device.open()?.run(|Device::Cpu(cpu)| self.compute(&cpu))
    }

    fn compute<B: Backend>(&self, backend: &B) -> Result<(), Failure> {
        let sampling = Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed };
        Sampler::new(sampling).map_err(|e| Failure::Usage(format!("--{e}")))?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let architecture = open_architecture(&checkpoint)?;
        let tokenizer = Tokenizer::open(&self.model, self.bos.mode())?;
        let start_token = match architecture.encoder_layers {
            0 => None,
            _ => Some(start_token(&self.model)?),
        };
        let text = self.text()?;
        let prompt = match start_token {
            None => tokenizer.encode_document(&text)?,
            Some(_) => tokenizer.encode_source(&text)?,
        };
        if prompt.is_empty() {
            let why = match (start_token, self.bos) {
                (None, BosArg::Never) => "--bos never leaves out the beginning-of-sequence token",
                _ => "the tokenizer adds none of its own",
            };
            let what = format!("gives no tokens, and {why}; write something");
            return Err(Failure::Work(format!("{}: {what}", self.input())));
        }
        let held = if start_token.is_some() { 1 } else { prompt.len() };
        let length = positions(held, self.max_tokens, architecture.max_positions)?;
        let model = Model::new(&checkpoint, backend, length)?;
        let mut report = self.output.report();
        let decoder = Decoder::new(&model, &mut report)?;
        let end_tokens = end_tokens(&self.model)?;
        let options = Options { max_tokens: self.max_tokens, sampling, end_tokens, start_token };
        let (generation, text) = self.stream(&decoder, &tokenizer, &prompt, &options)?;
        let summary = Summary::new(&generation, text, prompt.len(), backend.device());
        if !self.output.json {
            output::text("\n")?;
        }
        report.note(&summary.speed());
        if self.output.json { output::json(&summary) } else { Ok(()) }
    }

    /// Generates; unless JSON is asked for, prints the text as it comes.
    fn stream<B: Backend>(
        &self,
        decoder: &Decoder<'_, B>,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        options: &Options,
    ) -> Result<(Generation, String), Failure> {
        let mut text = String::new();
        let before = options.start_token.as_ref().map_or(prompt, std::slice::from_ref);
        let mut detokeniser = Detokeniser::new(tokenizer, before)?;
        let mut show = |piece: &str| {
            text.push_str(piece);
            if self.output.json || piece.is_empty() { Ok(()) } else { output::text(piece) }
        };
        let mut outcome = Ok(());
        let generation = generate(decoder, prompt, options, |id| {
            outcome = detokeniser.push(id).map_err(Failure::from).and_then(|piece| show(&piece));
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        outcome?;
        show(&detokeniser.finish()?)?;
        Ok((generation, text))
    }

    /// Where the prompt comes from, in words.
    fn input(&self) -> String {
        match &self.prompt_file {
            None => "--prompt".into(),
            Some(path) if path == Path::new("-") => "standard input".into(),
            Some(path) => path.display().to_string(),
        }
    }

    /// The prompt.
    fn text(&self) -> Result<String, Failure> {
        let Some(path) = &self.prompt_file else { return Ok(self.prompt.clone().unwrap_or_default()) };
        let bytes = if path == Path::new("-") {
            let mut bytes = Vec::new();
            std::io::stdin().lock().take(LARGEST_PROMPT + 1).read_to_end(&mut bytes).map(|_| bytes)
        } else {
            read_file(path)
        };
        let invalid = |what: String| Failure::Work(format!("{}: {what}", self.input()));
        let bytes = bytes.map_err(|e| invalid(e.to_string()))?;
        if bytes.len() as u64 > LARGEST_PROMPT {
            return Err(invalid(format!("more than {LARGEST_PROMPT} bytes are no prompt")));
        }
        String::from_utf8(bytes)
            .map_err(|e| invalid(format!("not UTF-8 text (byte {})", e.utf8_error().valid_up_to())))
    }
}

impl Summary {
    fn new(generation: &Generation, text: String, prompt_tokens: usize, device: String) -> Self {
        let [prefill_seconds, decode_seconds] =
            [generation.prefill, generation.decode].map(|time| time.as_secs_f64());
        let decoded = generation.decoded;
        Summary {
            text,
            ids: generation.ids.clone(),
            stop: match generation.stop {
                Stop::EndToken => "end_token",
                Stop::MaxTokens | Stop::Receiver => "max_tokens",
            },
            prompt_tokens,
            tokens: generation.ids.len(),
            prefill_seconds,
            prefill_tokens_per_second: prompt_tokens as f64 / prefill_seconds,
            decode_seconds,
            decode_tokens_per_second: (decoded > 0).then(|| decoded as f64 / decode_seconds),
            device,
        }
    }

    fn speed(&self) -> String {
        let prompt = counted(self.prompt_tokens, "token");
        let (time, speed) = (seconds(self.prefill_seconds), rate(self.prefill_tokens_per_second));
        let prefill = format!("{prompt} in {time}, {speed}");
        let decode = match self.decode_tokens_per_second {
            None => "one pass was enough".into(),
            Some(speed) => {
                let tokens = counted(self.tokens, "token");
                format!("{tokens} in {}, {}", seconds(self.decode_seconds), rate(speed))
            }
        };
        format!("prefill: {prefill}; decode: {decode} ({})", self.device)
    }
}
