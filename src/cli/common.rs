//! Arguments that several commands share.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use moepress::architecture::Architecture;
use moepress::backend::cpu::{Cpu, Isa};
use moepress::checkpoint::AtomicFile;
use moepress::generate::start_token;
use moepress::tokens::{Bos, Error as TokensError, Tokenizer, Windows, read_token_file};

use super::failure::Failure;
use super::progress::Report;
use super::units::parse_at_least;

/// How results and progress are shown.
#[derive(Debug, clap::Args)]
pub(crate) struct OutputArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    /// Show no progress and no warnings
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

impl OutputArgs {
    /// Where progress goes.
    pub(crate) fn report(&self) -> Report {
        Report::new(self.quiet)
    }
}

/// Where to compute.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceArgs {
    /// cpu; cuda and cuda:N are for later, whole models do not run on a GPU yet [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceName>,
}

/// What `--device` may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceName {
    Cpu,
    Cuda(Option<usize>),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |n: &str| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok()).flatten();
        match text {
            "cpu" => Ok(DeviceName::Cpu),
            "cuda" => Ok(DeviceName::Cuda(None)),
            _ => match text.strip_prefix("cuda:").and_then(number) {
                Some(n) => Ok(DeviceName::Cuda(Some(n))),
                None => Err("expected cpu, cuda or cuda:N".into()),
            },
        }
    }
}

/// An opened device.
#[derive(Debug)]
pub(crate) enum Device {
    /// The CPU.
    Cpu(Cpu),
}

/// Errors where `RAYON_NUM_THREADS` is no number of threads that a machine starts.
fn check_threads() -> Result<(), Failure> {
    const MOST: usize = 4096;
    let Ok(text) = std::env::var("RAYON_NUM_THREADS") else { return Ok(()) };
    match text.parse::<usize>() {
        Ok(threads) if threads > MOST => {
            Err(Failure::Usage(format!("RAYON_NUM_THREADS is {threads}, expected at most {MOST}")))
        }
        Err(_) if !text.is_empty() => {
            Err(Failure::Usage(format!("RAYON_NUM_THREADS is {text}, expected a number of threads")))
        }
        _ => Ok(()),
    }
}

impl Device {
    /// Runs what a command computes: for the CPU on a thread of the pool that shares its work, as every product would
    /// put a thread outside it to sleep and wake it again.
    pub(crate) fn run(self, command: impl FnOnce(Self) -> Result<(), Failure> + Send) -> Result<(), Failure> {
        // As deep as the stack of a process's first thread usually is.
        const STACK: usize = 8 << 20;
        let pool = rayon::ThreadPoolBuilder::new().stack_size(STACK);
        pool.build_global().map_err(|e| Failure::Work(format!("the threads do not start: {e}")))?;
        rayon::scope(|_| command(self))
    }
}

impl DeviceArgs {
    /// Opens the device.
    pub(crate) fn open(&self) -> Result<Device, Failure> {
        check_threads()?;
        let device = match self.device {
            None | Some(DeviceName::Cpu) => {
                select_instructions()?;
                return Ok(Device::Cpu(Cpu));
            }
            Some(DeviceName::Cuda(None)) => "cuda".into(),
            Some(DeviceName::Cuda(Some(n))) => format!("cuda:{n}"),
        };
        let reason =
            "whole models do not run on a GPU yet, only MoE layers, through the library; use --device cpu";
        Err(moepress::backend::Error::Device { device, reason: reason.into() }.into())
    }
}

/// Restricts the CPU backend to the instructions that MOEPRESS_CPU_ISA names, where it is set.
fn select_instructions() -> Result<(), Failure> {
    let Some(name) = std::env::var_os("MOEPRESS_CPU_ISA") else { return Ok(()) };
    let selected = name.to_string_lossy().parse::<Isa>().and_then(Isa::select);
    selected.map_err(|e| Failure::Usage(format!("MOEPRESS_CPU_ISA: {e}")))
}

/// The text that a pass runs over. A command that takes it says with an argument group which of `tokens` and `text`
/// it needs.
#[derive(Debug, clap::Args)]
pub(crate) struct TextInput {
    /// Token windows: safetensors with ids, int32 [windows, length], and optionally mask; repeatable
    #[arg(long, value_name = "T.safetensors", conflicts_with = "text")]
    pub(crate) tokens: Vec<PathBuf>,
    /// UTF-8 text files; documents in a file are separated by NUL bytes
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) text: Vec<PathBuf>,
    /// Use the first N windows of every file [default: all]
    #[arg(long, value_name = "N", value_parser = parse_at_least::<1>, allow_negative_numbers = true)]
    windows: Option<usize>,
    /// Tokens per window [default: 2048, or the model's positions where they are fewer]
    #[arg(long, value_name = "L", value_parser = parse_at_least::<2>, allow_negative_numbers = true)]
    window_length: Option<usize>,
    /// Whether documents begin with the beginning-of-sequence token; auto does what the model's tokenizer does
    #[arg(long, value_enum, default_value_t, conflicts_with = "tokens")]
    bos: BosArg,
}

/// What `--bos` may say.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum BosArg {
    #[default]
    Auto,
    Always,
    Never,
}

impl BosArg {
    /// As the library says it.
    pub(crate) fn mode(self) -> Bos {
        match self {
            BosArg::Auto => Bos::Auto,
            BosArg::Always => Bos::Always,
            BosArg::Never => Bos::Never,
        }
    }
}

impl TextInput {
    /// Tokens per window where nothing is said and the model has the positions.
    const WINDOW_LENGTH: usize = 2048;

    /// Reads the token files, or tokenises the text with the tokenizer in `model_dir`; every id and the length fit the
    /// model afterwards.
    pub(crate) fn load(&self, model_dir: &Path, architecture: &Architecture) -> Result<Windows, Failure> {
        let mut windows = if self.text.is_empty() {
            self.load_tokens(architecture)?
        } else {
            self.load_text(model_dir, architecture)?
        };
        if let Some(count) = self.windows {
            windows.truncate_files(count);
        }
        if windows.real_tokens() == 0 {
            return Err(Failure::Work("--windows: all tokens of these windows are padding; use more".into()));
        }
        Ok(windows)
    }

    /// Other files, cut and tokenised like these; of each the first `windows`.
    pub(crate) fn with_files(&self, tokens: &[PathBuf], text: &[PathBuf], windows: Option<usize>) -> Self {
        let (tokens, text) = (tokens.to_vec(), text.to_vec());
        // Token files have a length already.
        let window_length = self.window_length.filter(|_| tokens.is_empty());
        TextInput { tokens, text, windows, window_length, bos: self.bos }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.tokens.iter().chain(&self.text).map(PathBuf::as_path)
    }

    /// Whether there are windows to load.
    pub(crate) fn is_given(&self) -> bool {
        !self.tokens.is_empty() || !self.text.is_empty()
    }

    /// The tokenizer in `model_dir`.
    pub(crate) fn tokenizer(&self, model_dir: &Path) -> Result<Tokenizer, Failure> {
        Ok(Tokenizer::open(model_dir, self.bos.mode())?)
    }

    fn load_tokens(&self, architecture: &Architecture) -> Result<Windows, Failure> {
        let mut joined: Option<Windows> = None;
        for path in &self.tokens {
            let windows = load_token_file(path, architecture)?;
            if let Some(length) = self.window_length
                && length != windows.length
            {
                return Err(Failure::Usage(format!(
                    "--window-length {length}: {} holds windows of {} tokens; leave the flag out",
                    path.display(),
                    windows.length
                )));
            }
            match &mut joined {
                None => joined = Some(windows),
                Some(joined) if joined.fits(&windows) => joined.append(&windows),
                Some(joined) => {
                    let lengths = |windows: &Windows| match &windows.decoder {
                        None => format!("{}", windows.length),
                        Some(decoder) => format!("{} and {}", windows.length, decoder.length),
                    };
                    return Err(Failure::Work(format!(
                        "{}: windows of {} tokens, expected {} as in {}",
                        path.display(),
                        lengths(&windows),
                        lengths(joined),
                        self.tokens[0].display()
                    )));
                }
            }
        }
        joined.ok_or_else(|| Failure::Usage("one of --tokens and --text is needed".into()))
    }

    fn load_text(&self, model_dir: &Path, architecture: &Architecture) -> Result<Windows, Failure> {
        let max_positions = architecture.max_positions;
        let length = self.window_length.unwrap_or(max_positions.min(TextInput::WINDOW_LENGTH));
        if length > max_positions {
            return Err(TokensError::TooLong { length, max_positions }.into());
        }
        let most = self.windows.unwrap_or(usize::MAX);
        let mut windows = self.tokenizer(model_dir)?.first_windows(&self.text, length, most)?;
        if architecture.encoder_layers > 0 {
            windows = windows.split(start_token(model_dir)?);
        }
        let fits = windows.check(architecture.vocabulary, max_positions);
        fits.map_err(|e| at(&model_dir.join("tokenizer.json"), &e))?;
        Ok(windows)
    }
}

/// Reads a token file for the model.
pub(crate) fn load_token_file(path: &Path, architecture: &Architecture) -> Result<Windows, Failure> {
    let windows = read_token_file(path)?;
    match windows.check(architecture.vocabulary, architecture.max_positions) {
        Ok(()) => Ok(windows),
        Err(TokensError::TooLong { length, max_positions }) => Err(Failure::Work(format!(
            "{}: windows of {length} tokens are longer than the model's {max_positions} positions",
            path.display()
        ))),
        Err(e) => Err(at(path, &e)),
    }
}

/// An error in something that `path` holds.
fn at(path: &Path, error: &TokensError) -> Failure {
    Failure::Work(format!("{}: {error}", path.display()))
}

/// Makes sure, before long work, that the file that `flag` names can be written and is none of `inputs`.
pub(crate) fn check_output_file<P: AsRef<Path>>(
    flag: &str,
    path: &Path,
    inputs: impl IntoIterator<Item = P>,
) -> Result<(), Failure> {
    let wrong = |what: &str| Err(Failure::Work(format!("{flag} {}: {what}", path.display())));
    if path.is_dir() {
        return wrong("is a folder; expected the name of a file");
    }
    if path.to_string_lossy().ends_with(std::path::is_separator) {
        return wrong("ends like a folder; expected the name of a file");
    }
    if path.file_name().is_none() {
        return wrong("is not the name of a file");
    }
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            return wrong(&format!("the folder {} does not exist; create it first", folder.display()));
        }
        _ => {}
    }
    if let Ok(out) = path.canonicalize() {
        let same = |input: &P| input.as_ref().canonicalize().is_ok_and(|input| input == out);
        if let Some(input) = inputs.into_iter().find(same) {
            let input = input.as_ref().display();
            return wrong(&format!("would overwrite {input}, which is read; choose another name"));
        }
    }
    match AtomicFile::create(path) {
        Ok(_) => Ok(()),
        Err(e) => wrong(&format!("cannot be written: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use moepress::checkpoint::Checkpoint;
    use moepress::model::open_architecture;
    use moepress::tokens::{SourceFile, write_token_file};

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        text: TextInput,
    }

    const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 3, "b": 4, "?": 5, "far": 64}, "unk_token": "?"}}"#;

    /// A folder with a tokenizer, token files and texts; the model has 64 tokens and 512 positions.
    fn folder() -> (tempfile::TempDir, Architecture) {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer.json", TOKENIZER);
        write("config.json", "{}");
        write("long.txt", "a b a b a b a");
        write("documents.txt", "a a\0b b");
        write("far.txt", "a far");
        let tokens = |name: &str, ids: &[u32], mask: Option<Vec<bool>>, length: usize| {
            let count = ids.len() / length;
            let files = vec![SourceFile { name: name.into(), windows: count }];
            let windows = Windows { ids: ids.to_vec(), mask, count, length, files, decoder: None };
            write_token_file(&folder.path().join(name), &windows).unwrap();
        };
        tokens("one", &[1, 2, 3, 4, 5, 6], None, 2);
        tokens("masked", &[7, 8], Some(vec![true, false]), 2);
        tokens("wide", &[1, 2, 3], None, 3);
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/mixtral");
        let architecture = open_architecture(&Checkpoint::open(data).unwrap()).unwrap();
        (folder, architecture)
    }

    fn load(arguments: &[&str]) -> Result<Windows, String> {
        let (folder, architecture) = folder();
        let is_file = |a: &str| !a.starts_with('-') && !a.bytes().all(|b| b.is_ascii_digit());
        let path = |a: &&str| if is_file(a) { folder.path().join(a) } else { PathBuf::from(a) };
        let arguments = std::iter::once(PathBuf::from("moepress")).chain(arguments.iter().map(path));
        let arguments = Arguments::try_parse_from(arguments).unwrap();
        arguments.text.load(folder.path(), &architecture).map_err(|e| match e {
            Failure::Usage(what) | Failure::Work(what) => {
                what.replace(&format!("{}/", folder.path().display()), "")
            }
            Failure::Closed => unreachable!(),
        })
    }

    #[test]
    fn token_files_are_joined_and_cut() {
        let windows = load(&["--tokens", "one", "--tokens", "masked", "--windows", "2"]).unwrap();
        assert_eq!(windows.ids, [1, 2, 3, 4, 7, 8]);
        assert_eq!(windows.mask, Some(vec![true, true, true, true, true, false]));
        assert_eq!((windows.count, windows.length), (3, 2));
        assert_eq!(windows.files.iter().map(|f| f.windows).collect::<Vec<_>>(), [2, 1]);
        assert!(load(&["--tokens", "one", "--window-length", "2"]).is_ok());
    }

    #[test]
    fn text_is_tokenised_and_cut() {
        let windows = load(&["--text", "long.txt", "documents.txt", "--window-length", "2"]).unwrap();
        assert_eq!(windows.ids, [3, 4, 3, 4, 3, 4, 3, 3, 4, 4]);
        assert_eq!(windows.files.iter().map(|f| f.windows).collect::<Vec<_>>(), [3, 2]);
        let windows = load(&["--text", "long.txt", "--window-length", "3", "--windows", "1"]).unwrap();
        assert_eq!(windows.ids, [3, 4, 3]);
        let windows = load(&["--text", "documents.txt", "--window-length", "2", "--windows", "9"]).unwrap();
        assert_eq!((windows.ids, windows.count), (vec![3, 3, 4, 4], 2));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let cases: [(&[&str], &str); 6] = [
            (&["--tokens", "one", "--tokens", "wide"], "wide: windows of 3 tokens, expected 2 as in one"),
            (
                &["--tokens", "one", "--window-length", "3"],
                "--window-length 3: one holds windows of 2 tokens; leave the flag out",
            ),
            (
                &["--text", "long.txt", "--window-length", "513"],
                "windows of 513 tokens are longer than the model's 512 positions; choose --window-length 512 or less",
            ),
            // Without a flag, windows are as long as the model's positions where those are few.
            (
                &["--text", "long.txt"],
                "long.txt: gives 7 tokens, too few for one window of 512; choose --window-length 7 or less",
            ),
            (
                &["--text", "far.txt", "--window-length", "2"],
                "tokenizer.json: token id 64 in window 0 at position 1 is outside the vocabulary of 64",
            ),
            (&[], "one of --tokens and --text is needed"),
        ];
        for (arguments, expected) in cases {
            assert_eq!(load(arguments).unwrap_err(), expected);
        }
    }

    #[test]
    fn devices_are_read() {
        assert_eq!("cpu".parse(), Ok(DeviceName::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(None)));
        assert_eq!("cuda:3".parse(), Ok(DeviceName::Cuda(Some(3))));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "CUDA", "cuda:99999999999999999999"] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
        }
    }
}
