//! The command line: output, exit statuses and error messages, as scripts see them.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod common;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::command::{Outcome, command, moepress, outcome};
use common::{Mutant, data, max_difference, read, shape, windows};
use moepress::backend::cpu::Isa;
use moepress::checkpoint::{Dtype, Entry, Tensor, write_safetensors};
use moepress::tokens::{Windows, write_token_file};
use serde_json::json;

/// Arguments of a quiet run, its standard error being the error alone.
fn run_command(model: &Path, tokens: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = command(["run", "--quiet", "--device", "cpu"]);
    command.arg(model).arg("--tokens").arg(tokens).arg("--out").arg(out).args(more);
    command
}

fn run(model: &Path, tokens: &Path, out: &Path, more: &[&str]) -> Outcome {
    outcome(run_command(model, tokens, out, more))
}

fn inspect(model: &Path) -> Outcome {
    moepress([OsStr::new("inspect"), model.as_os_str()])
}

/// The golden token ids of a fixture, `repeat` times.
fn golden_windows(name: &str, repeat: usize) -> Windows {
    let golden = data(name).join("golden.safetensors");
    let count = shape(&golden, "input_ids").unwrap()[0];
    windows(&read(&golden, "input_ids").repeat(repeat), count * repeat)
}

/// A folder for outputs, with a token file.
struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    fn new(windows: &Windows) -> Self {
        let desk = Desk { folder: tempfile::tempdir().unwrap() };
        write_token_file(&desk.tokens(), windows).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tokens(&self) -> PathBuf {
        self.path("tokens.safetensors")
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

#[test]
fn inspect_says_what_a_checkpoint_is() {
    let text = inspect(&data("mixtral")).ok();
    let expected = "\
mixtral: 26.1K parameters, 16.9K active per token

layout      Hugging Face, F32
attention   grouped-query, 4 heads of width 8 on 2 key heads
layers      2, all with experts
hidden      32
context     512 tokens
vocabulary  64 tokens
router      softmax over 5 experts, top 2, renormalised

layers  experts  top k  width  forms    parameters     bytes
0–1           5      2     16  5 dense       15.4K  60.0 KiB

                  parameters    share      bytes    share
routed experts         15.4K   58.9 %   60.0 KiB   58.9 %
everything else        10.7K   41.1 %   41.9 KiB   41.1 %
total                  26.1K  100.0 %  101.9 KiB  100.0 %
active per token       16.9K   64.7 %
";
    assert_eq!(text, expected);
    let text = inspect(&data("deepseek_v2")).ok();
    for part in [
        "multi-head latent, 2 heads of width 20/10, latent 16, query rank 20",
        "2, 1 with experts and 1 dense",
        "softmax over 6 experts, group-limited: 2 of 3 groups, top 3, not renormalised, times 4",
        "1             6      3     16      32  6 dense",
    ] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    let text = inspect(&data("qwen2_moe")).ok();
    assert!(text.contains("softmax over 6 experts, top 3, not renormalised\n"), "{text}");
}

#[test]
fn inspect_gives_json() {
    let model = moepress([OsStr::new("inspect"), data("mixtral").as_os_str(), OsStr::new("--json")]).json();
    assert_eq!(model["family"], "mixtral");
    assert_eq!(model["layers"], 2);
    assert_eq!(model["hidden_size"], 32);
    assert_eq!(model["vocabulary"], 64);
    assert_eq!(model["moe_layers"].as_array().unwrap().len(), 2);
    let layer = &model["moe_layers"][1];
    assert_eq!((&layer["layer"], &layer["experts"], &layer["top_k"]), (&json!(1), &json!(5), &json!(2)));
    assert_eq!(layer["forms"], json!({ "dense": 5 }));
    // Embedding and head 2·64·32; attention 2·(32·32 + 16·32); routers 5·32; norms; experts 2·5·3·16·32.
    let routed = 2 * 5 * 3 * 16 * 32;
    let total = 2 * 64 * 32 + 2 * (2 * (32 * 32 + 16 * 32) + 5 * 32 + 2 * 32) + 32 + routed;
    let active = total - routed * 3 / 5;
    let parameters = json!({ "total": total, "routed_experts": routed, "active": active });
    assert_eq!(model["parameters"], parameters);
    assert_eq!(model["bytes"]["total"], 4 * total);
    assert_eq!(model["bytes"]["routed_experts"], 4 * routed);

    let layers = |name: &str| {
        let model = moepress([OsStr::new("inspect"), data(name).as_os_str(), OsStr::new("--json")]).json();
        let numbers = model["moe_layers"].as_array().unwrap().iter().map(|l| l["layer"].clone());
        (model["family"].clone(), numbers.collect::<Vec<_>>())
    };
    assert_eq!(layers("deepseek_v2"), (json!("deepseek_v2"), vec![json!(1)]));
    assert_eq!(layers("deepseek_v2_lite_sharded_bf16"), (json!("deepseek_v2"), vec![json!(1)]));
    assert_eq!(layers("qwen2_moe"), (json!("qwen2_moe"), vec![json!(1)]));
    assert_eq!(layers("qwen3_moe_fused"), (json!("qwen3_moe"), vec![json!(0), json!(1)]));
}

/// A checkpoint in the moepress layout with every form in layer 0, and layer 1 as it was.
fn ragged() -> Mutant {
    let model = Mutant::of("mixtral");
    let experts = json!([
        { "expert": 0, "form": "dense" },
        { "expert": 1, "form": "low_rank", "rank": { "gate": 4, "up": 6, "down": null } },
        { "expert": 3, "form": "alias", "of": 0 },
        { "expert": 4, "form": "constant" },
    ]);
    let manifest = json!({ "moepress": 1, "layers": [{ "layer": 0, "top_k": 2, "experts": experts }] });
    std::fs::write(model.file("moepress.json"), manifest.to_string()).unwrap();
    model.edit_tensors(|tensors| {
        let name = |e: usize, what: &str| format!("model.layers.0.block_sparse_moe.experts.{e}.{what}");
        for e in [1, 2, 3, 4] {
            for matrix in ["w1", "w2", "w3"] {
                if (e, matrix) != (1, "w2") {
                    tensors.remove(&name(e, &format!("{matrix}.weight"))).unwrap();
                }
            }
        }
        let mut insert = |name: String, shape: [usize; 2]| {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i % 7) as f32 / 100.0).collect();
            let shape = shape.into_iter().filter(|&s| s > 0).collect();
            let values = if values.is_empty() { vec![0.5; 32] } else { values };
            tensors.insert(name.clone(), Tensor::from_f32(name, Dtype::F32, shape, &values));
        };
        for (matrix, rank) in [("w1", 4), ("w3", 6)] {
            insert(name(1, &format!("{matrix}.u")), [16, rank]);
            insert(name(1, &format!("{matrix}.v")), [rank, 32]);
        }
        insert(name(4, "constant"), [32, 0]);
        let router = "model.layers.0.block_sparse_moe.gate.weight";
        let pruned = tensors[router].select_rows(&[0, 1, 3, 4]);
        tensors.insert(router.into(), pruned);
    });
    model
}

#[test]
fn the_moepress_layout_is_inspected_and_run() {
    let model = ragged();
    let inspection = moepress([OsStr::new("inspect"), model.path().as_os_str(), OsStr::new("--json")]).json();
    let layer = &inspection["moe_layers"][0];
    assert_eq!(inspection["layout"], "moepress");
    assert_eq!((&layer["experts"], &layer["original_experts"]), (&json!(4), &json!(5)));
    assert_eq!(layer["forms"], json!({ "alias": 1, "constant": 1, "dense": 1, "low_rank": 1 }));
    assert_eq!(layer["ranks"], json!([4, 6]));
    let routed = 3 * 16 * 32 + 4 * 48 + 6 * 48 + 16 * 32 + 32;
    assert_eq!(layer["parameters"], routed);
    // Two of four slots are chosen; the alias costs what it stands for.
    let alias = 3 * 16 * 32;
    let chosen = routed / 2 + alias / 2;
    let total = inspection["parameters"]["total"].as_u64().unwrap();
    let active = total - (routed - chosen) - 5 * 3 * 16 * 32 * 3 / 5;
    assert_eq!(inspection["parameters"]["active"], active);
    let text = inspect(model.path()).ok();
    for part in
        ["moepress (experts as", "1 alias, 1 constant, 1 dense, 1 low rank", "4–6", "over 4–5 experts"]
    {
        assert!(text.contains(part), "{part}:\n{text}");
    }

    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("out.safetensors");
    run(model.path(), &desk.tokens(), &out, &["--trace"]).ok();
    assert_eq!(shape(&out, "layers.0.router_logits"), Some(vec![48, 4]));
    assert_eq!(shape(&out, "layers.1.router_logits"), Some(vec![48, 5]));
}

#[test]
fn output_may_be_cut_off() {
    let model = data("mixtral");
    let mut child = command([OsStr::new("inspect"), model.as_os_str(), OsStr::new("--json")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let model = data("mixtral");
    let mut command = command([OsStr::new("inspect"), model.as_os_str()]);
    let output = command.stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.starts_with("error: standard output: "), "{message}");
}

/// What the router must have decided, from its own logits: ids and weights of one token, largest first.
fn choose(
    logits: &[f64],
    k: usize,
    renormalise: bool,
    scale: f64,
    groups: Option<(usize, usize)>,
) -> Vec<(usize, f64)> {
    let max = logits.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    let mut scores: Vec<(usize, f64)> = logits.iter().map(|l| (l - max).exp() / sum).enumerate().collect();
    let (count, kept) = groups.unwrap_or((1, 1));
    let size = logits.len() / count;
    let mut best: Vec<(usize, f64)> = scores
        .chunks(size)
        .map(|group| group.iter().map(|(_, s)| *s).fold(0.0, f64::max))
        .enumerate()
        .collect();
    best.sort_by(|a, b| b.1.total_cmp(&a.1));
    scores.retain(|(e, _)| best[..kept].iter().any(|(g, _)| *g == e / size));
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    scores.truncate(k);
    let sum: f64 = scores.iter().map(|(_, s)| s).sum();
    let factor = if renormalise { 1.0 / sum } else { scale };
    scores.into_iter().map(|(e, s)| (e, s * factor)).collect()
}

/// Runs a fixture with a trace and compares with what transformers says; `chosen` is the family's router.
fn check_run(name: &str, moe_layers: &[usize], chosen: impl Fn(&[f64]) -> Vec<(usize, f64)>) {
    const REPEAT: usize = 60;
    let golden = data(name).join("golden.safetensors");
    // More than one chunk of windows.
    let desk = Desk::new(&golden_windows(name, REPEAT));
    let out = desk.path("out.safetensors");
    run(&data(name), &desk.tokens(), &out, &["--trace"]).ok();
    let (windows, length, tokens) = (2 * REPEAT, 24, 2 * REPEAT * 24);
    assert_eq!(shape(&out, "logits"), Some(vec![windows, length, 64]));
    let off = |actual: &str, expected: &str| {
        let actual: Vec<f32> = read(&out, actual).into_iter().map(|v| v as f32).collect();
        max_difference(&actual, &read(&golden, expected).repeat(REPEAT))
    };
    assert!(off("logits", "logits") < 1e-4);
    // The golden file's last hidden state is taken after the final norm.
    assert!(off("layers.0.hidden", "hidden.1") < 1e-4);
    assert_eq!(shape(&out, "layers.1.hidden"), Some(vec![windows, length, 32]));
    for l in 0..2 {
        let tensor = |what: &str| format!("layers.{l}.{what}");
        if !moe_layers.contains(&l) {
            assert_eq!(shape(&out, &tensor("router_logits")), None);
            continue;
        }
        let k = shape(&out, &tensor("top_k_ids")).unwrap()[1];
        assert_eq!(shape(&out, &tensor("top_k_weights")), Some(vec![tokens, k]));
        let logits = read(&out, &tensor("router_logits"));
        let ids = read(&out, &tensor("top_k_ids"));
        let weights = read(&out, &tensor("top_k_weights"));
        for (t, logits) in logits.chunks(logits.len() / tokens).enumerate() {
            for (slot, (id, weight)) in chosen(logits).into_iter().enumerate() {
                let i = t * k + slot;
                assert_eq!(ids[i] as usize, id, "layer {l}, token {t}");
                assert!((weights[i] - weight).abs() < 1e-5, "layer {l}, token {t}: {} {weight}", weights[i]);
            }
        }
    }
}

/// Also where a bias that the weights do not see decides who is chosen.
#[test]
fn routes_are_traced_with_the_largest_weight_first() {
    for name in ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "phimoe"] {
        let desk = Desk::new(&golden_windows(name, 3));
        let out = desk.path("out.safetensors");
        run(&data(name), &desk.tokens(), &out, &["--trace"]).ok();
        let k = shape(&out, "layers.1.top_k_ids").unwrap()[1];
        let weights = read(&out, "layers.1.top_k_weights");
        assert!(weights.chunks(k).all(|w| w.is_sorted_by(|a, b| a >= b)), "{name}");
        // Of these four, those that weigh by the score of each expert alone show which weight is whose.
        if name == "ernie4_5_moe" {
            let (ids, logits) = (read(&out, "layers.1.top_k_ids"), read(&out, "layers.1.router_logits"));
            let experts = logits.len() / (ids.len() / k);
            for (ids, logits) in ids.chunks(k).zip(logits.chunks(experts)) {
                assert!(ids.is_sorted_by(|a, b| logits[*a as usize] >= logits[*b as usize]));
            }
        }
    }
}

#[test]
fn run_matches_the_golden_outputs() {
    check_run("mixtral", &[0, 1], |logits| choose(logits, 2, true, 1.0, None));
    check_run("qwen2_moe", &[1], |logits| choose(logits, 3, false, 1.0, None));
    check_run("deepseek_v2", &[1], |logits| choose(logits, 3, false, 4.0, Some((3, 2))));
}

#[test]
fn run_without_trace_writes_logits_alone() {
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("out.safetensors");
    let summary = run(&data("mixtral"), &desk.tokens(), &out, &["--json"]).json();
    assert_eq!((&summary["windows"], &summary["length"]), (&json!(2), &json!(24)));
    assert_eq!((&summary["tokens"], &summary["device"]), (&json!(48), &json!("cpu")));
    assert_eq!(summary["bytes"], std::fs::metadata(&out).unwrap().len());
    assert!(summary["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(shape(&out, "layers.0.hidden"), None);
    assert_eq!(desk.files(), ["out.safetensors", "tokens.safetensors"]);
    let text = run(&data("mixtral"), &desk.tokens(), &out, &[]).ok();
    assert!(text.starts_with("2 windows, 48 tokens in "), "{text}");
}

#[test]
fn logits_that_are_not_finite_are_warned_of() {
    let model = Mutant::of("mixtral");
    model.edit_values("lm_head.weight", |values| values.fill(3e38));
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("out");
    let mut command = command(["run", "--device", "cpu"]);
    command.arg(model.path()).arg("--tokens").arg(desk.tokens()).arg("--out").arg(&out);
    let Outcome { status, stderr, .. } = outcome(command);
    let dir = model.path().display();
    let warning = format!("warning: {dir}: window 0, position 0: the logits are not finite");
    assert_eq!((status, stderr.lines().filter(|line| **line == warning).count()), (0, 1), "{stderr}");
    assert!(read(&out, "logits").iter().any(|logit| !logit.is_finite()));
    // A model that is well says nothing.
    let mut command = run_command(&data("mixtral"), &desk.tokens(), &out, &[]);
    command.args(["--json"]);
    assert_eq!(outcome(command).stderr, "");
}

#[test]
fn padding_is_not_counted() {
    let mut windows = golden_windows("mixtral", 1);
    let mask = (0..48).map(|t| t >= 5).collect();
    windows.mask = Some(mask);
    let desk = Desk::new(&windows);
    let summary = run(&data("mixtral"), &desk.tokens(), &desk.path("out"), &["--json"]).json();
    assert_eq!(summary["tokens"], 43);
}

#[test]
fn run_gives_the_same_bytes_on_any_number_of_threads() {
    for name in ["mixtral", "deepseek_v2", "qwen2_moe"] {
        let desk = Desk::new(&golden_windows(name, 60));
        let outputs = ["1", "2", "8"].map(|threads| {
            let out = desk.path(threads);
            let mut command = run_command(&data(name), &desk.tokens(), &out, &["--trace"]);
            command.env("RAYON_NUM_THREADS", threads);
            outcome(command).ok();
            std::fs::read(out).unwrap()
        });
        assert!(outputs[0] == outputs[1] && outputs[1] == outputs[2], "{name}");
    }
}

#[test]
fn progress_is_one_line_per_step() {
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let mut command = command(["run", "--tokens"]);
    command.arg(desk.tokens()).arg(data("mixtral")).arg("--out").arg(desk.path("out"));
    let lines = outcome(command).stderr;
    let lines: Vec<_> = lines.lines().collect();
    assert!(lines[0].starts_with("run: 2 windows of 24 tokens; "), "{lines:?}");
    assert!(lines[0].ends_with(" will take about 12.0 KiB"), "{lines:?}");
    assert_eq!(lines[1..], ["run: layer 1/2", "run: layer 2/2", "run: logits 1/1"]);
    let quiet = run(&data("mixtral"), &desk.tokens(), &desk.path("out"), &[]);
    assert_eq!(quiet.stderr, "");
}

#[test]
fn help_and_version_are_no_errors() {
    assert_eq!(moepress(["--version"]).ok(), format!("moepress {}\n", env!("CARGO_PKG_VERSION")));
    let help = moepress(["--help"]).ok();
    for command in ["inspect", "run", "calibrate", "plan", "compress", "eval", "merge", "methods", "upcycle"]
    {
        assert!(help.contains(command), "{help}");
        assert!(moepress([command, "--help"]).ok().contains("Usage: "));
    }
}

#[test]
fn wrong_usage_is_one_line_and_status_2() {
    let cases: &[(&str, &str)] = &[
        ("", "a command is needed: inspect, run, "),
        ("presss", "unrecognized subcommand 'presss'"),
        ("inspect", "not provided: <MODEL>; see `moepress inspect --help`"),
        ("inspect a b", "unexpected argument 'b'"),
        ("inspect a --jsn", "a similar argument exists: '--json'"),
        ("run m --tokens t", "not provided: --out <O.safetensors>"),
        (
            "run m --tokens t --out o --device gpu",
            "'gpu' for '--device <DEVICE>': expected cpu, cuda or cuda:N",
        ),
        ("run m --tokens t --out o --device cuda:x", "expected cpu, cuda or cuda:N"),
        ("calibrate m --out s", "--tokens <T.safetensors>|--text <FILE>..."),
        ("calibrate m --out s --tokens t --text f", "cannot be used with"),
        ("calibrate m --out s --text f --windows 0", "expected a whole number, 1 or more"),
        ("calibrate m --out s --text f --window-length 1", "expected a whole number, 2 or more"),
        ("calibrate m --out s --text f --moments gram", "[possible values: input, gate-input, hidden, "),
        ("calibrate m --out s --text f --sample some", "expected a number of tokens per window or `all`"),
        ("calibrate m --out s --text f --bos maybe", "[possible values: auto, always, never]"),
        ("eval m", "--tokens <T.safetensors>|--text <FILE>..."),
        ("eval m --tokens t --text f", "cannot be used with"),
        ("plan --method reap --out p", "one of --remove, --experts and --bytes is needed"),
        ("plan --method reap --out p --remove 0.5 --experts 4", "cannot be used with"),
        ("plan --method reap --out p --remove 1", "expected a number between 0 and 1"),
        ("plan --method reap --out p --experts 0", "expected a whole number, 1 or more"),
        ("plan --method reap --out p --bytes 3parsec", "unknown unit `parsec`"),
        ("plan --method reap --out p --remove 0.5 --set key", "expected KEY=VALUE"),
        (
            "plan --method reap --out p --remove 0.5",
            "--stats is needed: reap plans from what moepress calibrate wrote",
        ),
        ("plan --method best --out p --remove 0.5", "known methods: random, frequency"),
        ("plan --method reap --out p --remove 0.5 --tokens t", "--model <MODEL>"),
        ("compress m --out o", "--plan <P.json>"),
        ("compress m --plan p --out o --layout x", "[possible values: auto, hf, moepress]"),
    ];
    for (arguments, expected) in cases {
        let message = moepress(arguments.split_whitespace()).error(2);
        assert!(message.contains(expected), "{arguments}: {message}");
    }
}

/// Instructions change the speed and some the last bits; nothing else.
#[test]
fn instructions_can_be_named() {
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let run = |isa: &str| {
        let out = desk.path(&format!("out {isa}"));
        let mut command = command(["run", "--quiet"]);
        command.env("MOEPRESS_CPU_ISA", isa).arg(data("mixtral"));
        command.arg("--tokens").arg(desk.tokens()).arg("--out").arg(&out);
        (command.output().unwrap(), out)
    };
    let (plain, out) = run("scalar");
    assert!(plain.status.success());
    assert!(out.exists());
    // Some round the inputs of bf16 matrices; no processor is required to have them.
    for isa in [Isa::Avx512Bf16, Isa::Amx, Isa::AmxBf16] {
        let (named, out) = run(isa.name());
        assert_eq!(named.status.success(), isa.is_available(), "{isa}");
        assert_eq!(out.exists(), isa.is_available(), "{isa}");
    }
    let (wrong, out) = run("mmx");
    let message = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(message.starts_with("error: MOEPRESS_CPU_ISA") && message.lines().count() == 1, "{message}");
    assert!(!out.exists());
}

#[test]
fn a_missing_gpu_is_said() {
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("out");
    let mut command = command(["run", "--quiet", "--device", "cuda:7"]);
    command.arg(data("mixtral")).arg("--tokens").arg(desk.tokens()).arg("--out").arg(&out);
    let outcome = outcome(command);
    assert_eq!(
        outcome.error(1),
        "--device cuda:7: whole models do not run on a GPU yet, only MoE layers, through the library; use --device cpu"
    );
    assert!(!out.exists());
}

/// Says what `run` has against a checkpoint; nothing must be left behind, and what was there must stay.
#[track_caller]
fn run_error(model: &Path) -> String {
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("out.safetensors");
    let message = run(model, &desk.tokens(), &out, &["--trace"]).error(1);
    assert_eq!(desk.files(), ["tokens.safetensors"]);
    std::fs::write(&out, "before").unwrap();
    assert_eq!(run(model, &desk.tokens(), &out, &[]).error(1), message);
    assert_eq!(desk.files(), ["out.safetensors", "tokens.safetensors"]);
    assert_eq!(std::fs::read_to_string(&out).unwrap(), "before");
    message
}

/// Both commands must say the same about a checkpoint.
#[track_caller]
fn assert_rejected(model: &Path, expected: &str) {
    for message in [inspect(model).error(1), run_error(model)] {
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
}

#[test]
fn a_missing_folder_is_named() {
    let message = inspect(Path::new("no/such/folder")).error(1);
    assert_eq!(
        message,
        "no/such/folder: does not exist; expected a checkpoint folder with config.json and safetensors"
    );
    // A line break in a name does not break the line.
    assert!(inspect(Path::new("no\nsuch")).error(1).starts_with("no such: does not exist"));
}

#[test]
fn missing_files_are_named() {
    let model = Mutant::of("mixtral");
    std::fs::remove_file(model.file("config.json")).unwrap();
    assert_rejected(model.path(), "config.json: missing; expected a checkpoint folder with config.json");
    let model = Mutant::of("mixtral");
    std::fs::remove_file(model.file("model.safetensors")).unwrap();
    assert_rejected(model.path(), "holds neither model.safetensors nor model.safetensors.index.json");
    let model = Mutant::of("deepseek_v2_lite_sharded_bf16");
    std::fs::remove_file(model.file("model-00003-of-000006.safetensors")).unwrap();
    assert_rejected(model.path(), "model-00003-of-000006.safetensors: No such file");
}

#[test]
fn a_truncated_shard_is_named() {
    let model = Mutant::of("deepseek_v2_lite_sharded_bf16");
    model.truncate("model-00004-of-000006.safetensors", |length| length - 100);
    assert_rejected(
        model.path(),
        "model-00004-of-000006.safetensors: truncated: the header describes 9096 bytes",
    );
    let model = Mutant::of("mixtral");
    model.truncate("model.safetensors", |_| 100);
    assert_rejected(model.path(), "model.safetensors: truncated or not safetensors");
    model.truncate("model.safetensors", |_| 3);
    assert_rejected(model.path(), "3 bytes are too few");
}

#[test]
fn an_unknown_family_lists_the_known() {
    let model = Mutant::of("mixtral");
    model.set_config("model_type", json!("gpt2"));
    let known = moepress::architecture::families().join(", ");
    assert_rejected(
        model.path(),
        &format!("config.json: model_type `gpt2` is not supported; known: {known}"),
    );
}

#[test]
fn an_impossible_config_names_the_key() {
    let model = Mutant::of("mixtral");
    model.set_config("num_experts_per_tok", json!(6));
    assert_rejected(model.path(), "config.json: num_experts_per_tok is 6, expected 1 to 5");
    let model = Mutant::of("mixtral");
    model.edit_text("config.json", |text| text.replace('{', ""));
    assert_rejected(model.path(), "config.json: ");
}

#[test]
fn a_config_that_contradicts_its_tensors_is_seen() {
    let model = Mutant::of("mixtral");
    model.set_config("num_local_experts", json!(6));
    assert_rejected(model.path(), "tensor model.layers.0.block_sparse_moe.experts.5.w1.weight is missing");
    let model = Mutant::of("mixtral");
    model.set_config("vocab_size", json!(65));
    assert_rejected(model.path(), " has shape [64, 32], expected [65, 32]");
}

#[test]
fn a_missing_tensor_is_named() {
    for name in [
        "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ] {
        let model = Mutant::of("mixtral");
        model.edit_tensors(|tensors| assert!(tensors.remove(name).is_some()));
        assert_rejected(model.path(), &format!("tensor {name} is missing"));
    }
}

#[test]
fn a_misshapen_tensor_is_named() {
    let model = Mutant::of("mixtral");
    let name = "model.layers.1.block_sparse_moe.experts.3.w1.weight";
    model.edit_tensors(|tensors| {
        let short = tensors[name].rows(0, 15);
        tensors.insert(name.into(), short);
    });
    assert_rejected(model.path(), &format!("layer 1: {name} has shape [15, 32], expected [16, 32]"));
}

#[test]
fn a_tensor_of_another_type_is_named() {
    let model = Mutant::of("mixtral");
    let name = "model.layers.0.self_attn.q_proj.weight";
    model.edit_tensors(|tensors| {
        let whole = Tensor::owned(name, Dtype::I8, vec![32, 32], vec![1; 1024]);
        tensors.insert(name.into(), whole);
    });
    assert_rejected(model.path(), &format!("layer 0: {name} has dtype I8, expected F32, F16 or BF16"));
}

#[test]
fn a_weight_that_is_not_finite_is_named() {
    for (name, value, layer) in [
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", f32::NAN, "layer 1: "),
        ("model.layers.0.input_layernorm.weight", f32::INFINITY, "layer 0: "),
        ("model.embed_tokens.weight", f32::NEG_INFINITY, ""),
        ("lm_head.weight", f32::NAN, ""),
    ] {
        let model = Mutant::of("mixtral");
        model.edit_values(name, |values| values[17] = value);
        let dir = model.path().display();
        let expected = format!("{dir}: {layer}{name} holds {value} at flat index 17; weights must be finite");
        assert_eq!(run_error(model.path()), expected);
        // Sizes are told without reading the weights.
        inspect(model.path()).ok();
    }
}

/// What `run` says about a token file.
#[track_caller]
fn tokens_error(desk: &Desk) -> String {
    let out = desk.path("out.safetensors");
    let message = run(&data("mixtral"), &desk.tokens(), &out, &[]).error(1);
    assert_eq!(desk.files(), ["tokens.safetensors"]);
    let file = format!("{}: ", desk.tokens().display());
    let rest = message.strip_prefix(&file);
    rest.unwrap_or_else(|| panic!("{message}: does not name {file}")).into()
}

fn desk_with(tensors: Vec<Entry<'_>>) -> Desk {
    let desk = Desk { folder: tempfile::tempdir().unwrap() };
    write_safetensors(&desk.tokens(), &std::collections::BTreeMap::new(), tensors).unwrap();
    desk
}

#[test]
fn wrong_tokens_are_named() {
    let cases = [
        (vec![1, 2, 64, 3], "token id 64 in window 1 at position 0 is outside the vocabulary of 64"),
        (vec![1, -2, 4, 3], "id -2 in window 0 at position 1 is no token id"),
    ];
    for (ids, expected) in cases {
        let desk = desk_with(vec![Entry::i32("ids", vec![2, 2], &ids)]);
        assert_eq!(tokens_error(&desk), expected);
    }
    let ids = vec![1; 513];
    let desk = desk_with(vec![Entry::i32("ids", vec![1, 513], &ids)]);
    assert_eq!(tokens_error(&desk), "windows of 513 tokens are longer than the model's 512 positions");
    let desk = desk_with(vec![Entry::i32("ids", vec![513], &ids)]);
    assert_eq!(tokens_error(&desk), "ids has shape [513], expected [windows, length]");
    let desk = desk_with(vec![Entry::i32("ids", vec![0, 4], &[])]);
    assert_eq!(tokens_error(&desk), "ids has shape [0, 4]: there are no tokens");
    let desk = desk_with(vec![Entry::f32("ids", vec![1, 2], &[1.0, 2.0])]);
    assert_eq!(tokens_error(&desk), "ids has dtype F32, expected I32");
    let desk = desk_with(vec![Entry::i32("input_ids", vec![1, 2], &[1, 2])]);
    assert!(tokens_error(&desk).starts_with("holds no tensor `ids`; expected int32 ids [windows, length]"));
    let desk =
        desk_with(vec![Entry::i32("ids", vec![1, 2], &[1, 2]), Entry::i32("mask", vec![2, 1], &[1, 1])]);
    assert_eq!(tokens_error(&desk), "mask has shape [2, 1], expected that of ids, [1, 2]");
    let desk =
        desk_with(vec![Entry::i32("ids", vec![1, 2], &[1, 2]), Entry::i32("mask", vec![1, 2], &[0, 0])]);
    assert_eq!(tokens_error(&desk), "mask is 0 everywhere: all tokens are padding");

    let desk = Desk::new(&golden_windows("mixtral", 1));
    let missing = desk.path("nothing");
    let message = run(&data("mixtral"), &missing, &desk.path("out"), &[]).error(1);
    assert!(message.starts_with(&format!("{}: No such file", missing.display())), "{message}");
}

#[test]
fn the_output_is_checked_before_the_work() {
    // A checkpoint that fails only when its weights are read: the output is found wrong before that.
    let model = Mutant::of("mixtral");
    model.edit_values("model.embed_tokens.weight", |values| values[0] = f32::NAN);
    let desk = Desk::new(&golden_windows("mixtral", 1));
    let out = desk.path("no/such/folder/out.safetensors");
    let message = run(model.path(), &desk.tokens(), &out, &[]).error(1);
    let folder = out.parent().unwrap().display();
    assert_eq!(
        message,
        format!("--out {}: the folder {folder} does not exist; create it first", out.display())
    );
    let out = desk.folder.path();
    let message = run(model.path(), &desk.tokens(), out, &[]).error(1);
    assert_eq!(message, format!("--out {}: is a folder; expected the name of a file", out.display()));
    let under_a_file = desk.tokens().join("out.safetensors");
    let message = run(model.path(), &desk.tokens(), &under_a_file, &[]).error(1);
    assert!(message.contains("does not exist; create it first"), "{message}");
    assert_eq!(desk.files(), ["tokens.safetensors"]);
}

#[test]
fn text_needs_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "some words").unwrap();
    let mut command = command(["calibrate", "--quiet"]);
    command.arg(data("mixtral")).arg("--text").arg(&text).arg("--out").arg(folder.path().join("s"));
    let message = outcome(command).error(1);
    assert!(message.contains("tokenizer.json: missing; text needs the checkpoint's tokenizer"), "{message}");
    assert!(!folder.path().join("s").exists());
}
