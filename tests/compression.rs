//! Carrying out plans: dropped experts against masked ones, factors against full matrices, both layouts, stopping and
//! resuming, and everything that has to be refused.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};

use common::compress::{apply, bits, files, masked, plan, tokens};
use common::{Trace, data, run};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as CalibrateOptions, calibrate};
use moepress::checkpoint::{Checkpoint, Dtype, Weight};
use moepress::compress::{FactorOptions, LayoutChoice, Options, Report, Whitening, compress, factorise};
use moepress::model::{Model, open_architecture, profile};
use moepress::plan::{Action, Budget};
use moepress::progress::Progress;

const MODELS: [&str; 52] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe_fused",
    "olmoe_clip",
    "deepseek",
    "bailing_moe",
    "bailing_moe_v2",
    "deepseek_v2",
    "deepseek_v2_lite_sharded_bf16",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "phimoe",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "ernie4_5_vl_moe_fused",
    "sarvam_mla",
    "sarvam_moe",
    "sarvam_moe_fused",
    "llama4_text",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "lfm2_moe_fused",
    "kimi_linear",
    "granitemoe",
    "granitemoeshared_fused",
    "granitemoehybrid_mamba",
    "granitemoe_swa",
    "jamba",
    "nemotron_h",
    "nemotron_h_latent",
    "nemotron_h_fused",
    "mistral3",
    "cohere2_moe",
    "cohere2_moe_fused",
    "aria",
    "dbrx",
    "flex_olmo",
    "gemma4",
    "gemma4_text",
    "afmoe",
    "hy_v3",
    "laguna",
    "laguna_fused",
    "mimo_v2_flash",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
    "qwen3_vl_moe_fused",
];

/// Bytes of the tensors of layers for multi-token prediction.
fn behind_the_layers(dir: &Path) -> u64 {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let architecture = open_architecture(&checkpoint).unwrap();
    let is_behind = |name: &str| architecture.names.is_multi_token(name, architecture.layers.len());
    let behind = checkpoint.tensors().filter(|t| is_behind(t.name()));
    behind.map(|t| t.bytes().len() as u64).sum()
}

#[test]
fn dropped_experts_equal_masked_ones_bit_for_bit() {
    let out = tempfile::tempdir().unwrap();
    for name in MODELS {
        let model = data(name);
        for (method, set) in
            [("reap", &[][..]), ("random", &[("seed", "7")][..]), ("frequency", &[("scope", "global")][..])]
        {
            // Its group limit lets the second DeepSeek model lose one expert of six.
            let remove = if name == "deepseek_v2" { 0.16 } else { 0.3 };
            let Ok(budget) = Budget::remove(remove) else { unreachable!() };
            let plan = plan(&model, method, Some(budget), set);
            let expected = masked(&model, &plan, &tokens());
            for (layout, choice) in [("auto", LayoutChoice::Auto), ("moepress", LayoutChoice::Moepress)] {
                let dir = out.path().join(format!("{name} {method} {layout}"));
                let report =
                    apply(&model, &plan, &Options { layout: choice, ..Options::default() }, &dir).unwrap();
                let Trace { logits, .. } = run(&dir, &tokens());
                assert!(bits(&logits) == bits(&expected), "{name}: {method}: {layout}");
                // A stock checkpoint with fewer experts goes without the layer for multi-token prediction.
                let left_out = if report.layout == "hf" { behind_the_layers(&model) } else { 0 };
                let found = report.bytes_after + left_out;
                assert_eq!(found, plan.expected.bytes, "{name}: {method}: {layout}");
                assert_eq!(report.routed_parameters_after, plan.expected.routed_parameters);
            }
        }
    }
}

#[test]
fn a_uniform_plan_gives_a_stock_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen3_moe_fused", "deepseek_v2_lite_sharded_bf16"] {
        let dir = out.path().join(name);
        let plan = plan(&data(name), "reap", Some(Budget::Experts(3)), &[]);
        let report = apply(&data(name), &plan, &Options::default(), &dir).unwrap();
        assert_eq!(report.layout, "hf");
        assert!(!dir.join("moepress.json").exists());
        let (before, after) = (Checkpoint::open(data(name)).unwrap(), Checkpoint::open(&dir).unwrap());
        // One number of the config changes, or the same number under two keys.
        let lines = before.config().lines().zip(after.config().lines()).filter(|(a, b)| a != b).count();
        assert_eq!(before.config().lines().count(), after.config().lines().count());
        assert!((1..=2).contains(&lines), "{name}: {lines} lines of config.json changed");
        let experts: Vec<&str> = after
            .tensors()
            .map(moepress::checkpoint::Tensor::name)
            .filter(|n| n.contains(".experts."))
            .collect();
        let layers = plan.layers.len();
        assert_eq!(experts.len(), layers * 3 * 3, "{name}");
        assert!(experts.iter().all(|n| !n.contains("gate_up_proj")));
        for e in 0..3 {
            assert_eq!(experts.iter().filter(|n| n.contains(&format!(".experts.{e}."))).count(), layers * 3);
        }
    }
}

/// The result of one compression can be compressed again.
#[test]
fn a_moepress_checkpoint_is_a_source_like_any_other() {
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let model = data("qwen2_moe");
    let first = plan(&model, "reap", Some(Budget::Experts(5)), &[]);
    let options = Options { layout: LayoutChoice::Moepress, ..Options::default() };
    apply(&model, &first, &options, &at("first")).unwrap();
    let second = plan(&at("first"), "reap", Some(Budget::Experts(4)), &[]);
    apply(&at("first"), &second, &options, &at("second")).unwrap();
    assert!(bits(&run(&at("second"), &tokens()).logits) == bits(&masked(&at("first"), &second, &tokens())));
    let manifest = Checkpoint::open(at("second")).unwrap().manifest().unwrap().clone();
    assert!(manifest.layers.iter().all(|l| l.experts.len() == 4));
}

#[test]
fn factors_run_as_their_product_does() {
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let model = data("mixtral");
    let Ok(budget) = Budget::remove(0.4) else { unreachable!() };
    let plan = plan(&model, "low-rank", Some(budget), &[("whiten", "false")]);
    let factors = apply(&model, &plan, &Options::default(), &at("factors")).unwrap();
    assert_eq!(factors.layout, "moepress");
    assert_eq!(factors.bytes_after, plan.expected.bytes);
    let dense = Options { densify: true, ..Options::default() };
    assert_eq!(apply(&model, &plan, &dense, &at("dense")).unwrap().layout, "hf");
    let (a, b) = (run(&at("factors"), &tokens()).logits, run(&at("dense"), &tokens()).logits);
    let difference = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(difference < 2e-5, "{difference}");
    // The config is the original's, untouched.
    let config = |dir: PathBuf| std::fs::read(dir.join("config.json")).unwrap();
    assert_eq!(config(at("factors")), config(model.clone()));
    assert_eq!(config(at("dense")), config(model));
}

#[test]
fn full_rank_changes_nothing() {
    let out = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let plan = plan(&model, "low-rank", None, &[("rank", "16"), ("whiten", "false")]);
    assert!(
        plan.layers.iter().all(|l| l.experts.iter().all(|e| e.action == Action::Keep)),
        "above break-even"
    );
    apply(&model, &plan, &Options::default(), &out.path().join("full")).unwrap();
    assert!(bits(&run(&out.path().join("full"), &tokens()).logits) == bits(&run(&model, &tokens()).logits));

    // And the factorisation itself, in every stored type and both orientations.
    let checkpoint = Checkpoint::open(&model).unwrap();
    for matrix in ["w1", "w2"] {
        let name = format!("model.layers.0.block_sparse_moe.experts.1.{matrix}.weight");
        let weight = checkpoint.tensor(&name).unwrap();
        let (rows, cols) = (weight.shape()[0], weight.shape()[1]);
        for (dtype, tolerance) in [(Dtype::F32, 1e-6), (Dtype::F16, 2e-3), (Dtype::BF16, 2e-2)] {
            let options = FactorOptions { dtype: Some(dtype), ..FactorOptions::default() };
            let stored = Weight::plain(weight.clone()).unwrap();
            let factors = factorise(&stored, rows.min(cols), Whitening::None, options).unwrap();
            let moepress::backend::Matrix::LowRank { u, v } = factors else { unreachable!() };
            assert_eq!(u.name(), name.replace("weight", "u"));
            assert_eq!(u.replacement_dtype(), dtype);
            let (u, v, w) = (u.to_f32(), v.to_f32(), weight.to_f32().unwrap());
            let r = rows.min(cols);
            for i in 0..rows {
                for j in 0..cols {
                    let product: f32 = (0..r).map(|k| u[i * r + k] * v[k * cols + j]).sum();
                    assert!((product - w[i * cols + j]).abs() < tolerance, "{matrix} {dtype:?} [{i}, {j}]");
                }
            }
        }
    }
}

/// Whitening with statistics from a file and with tokens given to compress is the same.
#[test]
fn second_moments_from_a_file_or_on_the_way() {
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    for name in ["qwen2_moe", "deepseek_v2"] {
        let model = data(name);
        let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
        let plan = plan(&model, "low-rank", Some(budget), &[("whiten", "true")]);
        let windows = tokens();
        let missing = apply(&model, &plan, &Options::default(), &at("none")).unwrap_err();
        assert!(missing.contains("--tokens") && missing.contains("--stats"), "{missing}");
        assert!(!at("none").exists());

        let checkpoint = Checkpoint::open(&model).unwrap();
        let opened = Model::new(&checkpoint, &Cpu, 24).unwrap();
        let second =
            CalibrateOptions { second: vec![Moment::InputGram, Moment::HiddenGram], ..Default::default() };
        let stats = at(&format!("{name} stats"));
        let statistics = calibrate(&opened, &windows, &second, &stats, &mut ()).unwrap();
        let by_file = Options { statistics: Some(&statistics), ..Options::default() };
        let by_tokens = Options { tokens: Some(&windows), ..Options::default() };
        apply(&model, &plan, &by_file, &at(&format!("{name} file"))).unwrap();
        apply(&model, &plan, &by_tokens, &at(&format!("{name} tokens"))).unwrap();
        let weights =
            |kind: &str| std::fs::read(at(&format!("{name} {kind}")).join("model.safetensors")).unwrap();
        assert!(weights("file") == weights("tokens"), "{name}");
    }
}

/// With propagation the first MoE layer is as without, later ones are measured on what the earlier ones became.
#[test]
fn propagation_measures_on_the_compressed_prefix() {
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let model = data("mixtral");
    let windows = tokens();
    let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
    let plain = plan(&model, "low-rank", Some(budget), &[]);
    let propagated = plan(&model, "low-rank", Some(budget), &[("propagate", "true")]);
    let options = Options { tokens: Some(&windows), ..Options::default() };
    apply(&model, &plain, &options, &at("plain")).unwrap();
    apply(&model, &propagated, &options, &at("propagated")).unwrap();
    let (a, b) = (Checkpoint::open(at("plain")).unwrap(), Checkpoint::open(at("propagated")).unwrap());
    let equal = |l: usize| {
        let name = format!("model.layers.{l}.block_sparse_moe.experts.0.w1.u");
        a.tensor(&name).unwrap().bytes() == b.tensor(&name).unwrap().bytes()
    };
    assert!(equal(0));
    assert!(!equal(1));

    // Dropping: as many experts as planned, whichever the new scores choose.
    let dropping = plan(&model, "reap", Some(Budget::Experts(3)), &[("propagate", "true")]);
    apply(&model, &dropping, &options, &at("dropped")).unwrap();
    let report = apply(&model, &dropping, &Options::default(), &at("no tokens")).unwrap_err();
    assert!(report.contains("propagate=true"), "{report}");
    let dropped = Checkpoint::open(at("dropped")).unwrap();
    let opened = moepress::model::open_architecture(&dropped).unwrap();
    assert!(profile(&dropped, &opened).unwrap().moe_layers.iter().all(|l| l.experts == 3));
}

/// Stops by panicking after some layers, as close to a kill as one process gets.
struct StopAfter(usize);

impl Progress for StopAfter {
    fn step(&mut self, _: &str) {
        assert!(self.0 > 0, "stopped");
        self.0 -= 1;
    }
}

#[test]
fn a_stopped_compression_resumes_to_the_same_bytes() {
    let out = tempfile::tempdir().unwrap();
    let model = data("qwen2_moe");
    let windows = tokens();
    let Ok(budget) = Budget::remove(0.4) else { unreachable!() };
    for (kind, method, set) in [
        ("plain", "low-rank", [("propagate", "false")]),
        ("propagated", "low-rank", [("propagate", "true")]),
        ("merged", "ream", [("propagate", "true")]),
    ] {
        let plan = plan(&model, method, Some(budget), &set);
        let options = Options { tokens: Some(&windows), ..Options::default() };
        let whole = out.path().join(format!("{kind} whole"));
        apply(&model, &plan, &options, &whole).unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let opened = Model::new(&checkpoint, &Cpu, 24).unwrap();
        for stop in 0..opened.architecture().layers.len() {
            let target = out.path().join(format!("{kind} stopped {stop}"));
            let stopped = || compress(&opened, &plan, &options, &target, &mut StopAfter(stop));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(stopped)).is_err());
            assert!(!target.exists());
            compress(&opened, &plan, &options, &target, &mut ()).unwrap();
            assert!(files(&target) == files(&whole), "{kind}: stopped after {stop} layers");
        }
    }
    let left: Vec<_> = std::fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().ends_with(".partial")), "{left:?}");
}

/// The same command again finds its work done; another one is refused.
#[test]
fn a_finished_compression_is_found_done() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("small");
    let model = data("mixtral");
    let three = plan(&model, "reap", Some(Budget::Experts(3)), &[]);
    let first = apply(&model, &three, &Options::default(), &target).unwrap();
    let before = files(&target);
    let second = apply(&model, &three, &Options::default(), &target).unwrap();
    assert_eq!(Report { seconds: 0.0, ..first }, Report { seconds: 0.0, ..second });
    assert!(files(&target) == before);
    let four = plan(&model, "reap", Some(Budget::Experts(4)), &[]);
    let error = apply(&model, &four, &Options::default(), &target).unwrap_err();
    assert!(error.contains("exists already"), "{error}");
    assert!(files(&target) == before);
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    let out = tempfile::tempdir().unwrap();
    let model = data("deepseek_v2");
    let windows = tokens();
    let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
    let plan = plan(&model, "low-rank", Some(budget), &[]);
    let compressed = |threads: usize| {
        let target = out.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = Options { tokens: Some(&windows), ..Options::default() };
        pool.install(|| apply(&model, &plan, &options, &target)).unwrap();
        files(&target)
    };
    let one = compressed(1);
    assert!(one == compressed(2));
    assert!(one == compressed(8));
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let out = tempfile::tempdir().unwrap();
    let at = |name: &str| out.path().join(name);
    let model = data("mixtral");
    let Ok(budget) = Budget::remove(0.4) else { unreachable!() };
    let low_rank = plan(&model, "low-rank", Some(budget), &[("whiten", "false")]);
    let stock = Options { layout: LayoutChoice::HuggingFace, ..Options::default() };
    let error = apply(&model, &low_rank, &stock, &at("a")).unwrap_err();
    assert!(error.contains("low_rank") && error.contains("--layout moepress"), "{error}");

    let error = apply(&data("qwen2_moe"), &low_rank, &Options::default(), &at("a")).unwrap_err();
    assert!(error.contains("mixtral"), "{error}");

    std::fs::create_dir(at("full")).unwrap();
    std::fs::write(at("full").join("precious"), "x").unwrap();
    let error = apply(&model, &low_rank, &Options::default(), &at("full")).unwrap_err();
    assert!(error.contains("full") && error.contains("exists already"), "{error}");
    assert_eq!(std::fs::read(at("full").join("precious")).unwrap(), b"x");

    let error = apply(&model, &low_rank, &Options::default(), &at("no/such/folder")).unwrap_err();
    assert!(error.contains("does not exist"), "{error}");

    let windows = tokens();
    let other = Checkpoint::open(data("qwen2_moe")).unwrap();
    let opened = Model::new(&other, &Cpu, 24).unwrap();
    let statistics =
        calibrate(&opened, &windows, &CalibrateOptions::default(), &at("stats"), &mut ()).unwrap();
    let whitened = plan(&model, "low-rank", Some(budget), &[]);
    let options = Options { statistics: Some(&statistics), tokens: Some(&windows), ..Options::default() };
    let error = apply(&model, &whitened, &options, &at("a")).unwrap_err();
    assert!(error.contains("another checkpoint"), "{error}");
}
