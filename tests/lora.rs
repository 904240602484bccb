//! Adapters that PEFT wrote, merged into full matrices and into factors.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::command::{Outcome, command, outcome};
use common::{Mutant, data, max_difference, read, run, windows};
use moepress::checkpoint::{Checkpoint, Dtype, Entry, Tensor, write_safetensors};

struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        Desk(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let mut command = command(arguments.iter().chain(&["--quiet"]));
        command.current_dir(self.0.path());
        outcome(command)
    }

    fn merge(&self, model: &Path, adapter: &Path, out: &str, more: &[&str]) -> Outcome {
        let (model, adapter) = (model.to_str().unwrap(), adapter.to_str().unwrap());
        self.run(&[&["recover", model, "--lora", adapter, "--out", out, "--json"], more].concat())
    }

    /// Writes an adapter with the given matrices.
    fn adapter(
        &self,
        name: &str,
        config: &serde_json::Value,
        tensors: &[(&str, [usize; 2], f32)],
    ) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
        let tensors: Vec<Tensor> = tensors
            .iter()
            .map(|(name, shape, value)| {
                let values: Vec<f32> =
                    (0..shape[0] * shape[1]).map(|i| value * ((i % 7) as f32 - 3.0)).collect();
                let name = format!("base_model.model.{name}.weight");
                Tensor::from_f32(name, Dtype::F32, shape.to_vec(), &values)
            })
            .collect();
        let entries = tensors.iter().map(Entry::tensor).collect();
        write_safetensors(&dir.join("adapter_model.safetensors"), &BTreeMap::new(), entries).unwrap();
        dir
    }

    /// `model` compressed to low rank, in the folder `name`.
    fn low_rank(&self, model: &Path, name: &str) -> PathBuf {
        let plan = ["plan", "--method", "low-rank", "--remove", "0.5", "--set", "whiten=false"];
        let model = model.to_str().unwrap();
        self.run(&[&plan[..], &["--model", model, "--out", "plan"]].concat()).ok();
        self.run(&["compress", model, "--plan", "plan", "--out", name]).ok();
        self.path(name)
    }
}

fn config(r: usize, alpha: f64) -> serde_json::Value {
    serde_json::json!({ "peft_type": "LORA", "r": r, "lora_alpha": alpha })
}

#[test]
fn merged_checkpoints_give_the_logits_of_peft() {
    // Fused parameters of experts stored apart, interleaved and transposed, and transposed without PEFT knowing.
    for name in ["qwen3_moe", "gpt_oss", "llama4_text"] {
        let desk = Desk::new();
        let adapter = data("lora").join(name);
        // In f32, as PEFT adds to it: merged weights that are rounded to bf16 give something else.
        let model = Mutant::of(name);
        model.edit_tensors(|tensors| {
            for tensor in tensors.values_mut() {
                let values = tensor.to_f32().unwrap();
                *tensor = Tensor::from_f32(tensor.name(), Dtype::F32, tensor.shape().to_vec(), &values);
            }
        });
        let report = desk.merge(model.path(), &adapter, "out", &[]).json();
        assert_eq!((&report["layout"], &report["skipped"]), (&"hf".into(), &0.into()), "{name}");
        let golden = adapter.join("golden.safetensors");
        let trace = run(&desk.path("out"), &windows(&read(&golden, "input_ids"), 2));
        let difference = max_difference(&trace.logits, &read(&golden, "logits"));
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn modules_by_name_into_full_matrices_and_factors() {
    let desk = Desk::new();
    let model = data("mixtral");
    let matrix = |checkpoint: &Path, stem: &str| -> Vec<f64> {
        let checkpoint = Checkpoint::open(checkpoint).unwrap();
        let values = |suffix: &str| {
            let tensor = checkpoint.get(&format!("{stem}.{suffix}"))?;
            let wide = tensor.to_f32().unwrap().into_iter().map(f64::from).collect::<Vec<_>>();
            Some((wide, tensor.shape().to_vec()))
        };
        if let Some((values, _)) = values("weight") {
            return values;
        }
        let ((u, su), (v, sv)) = (values("u").unwrap(), values("v").unwrap());
        let at = |i: usize, j: usize| (0..su[1]).map(|k| u[i * su[1] + k] * v[k * sv[1] + j]).sum();
        (0..su[0]).flat_map(|i| (0..sv[1]).map(move |j| (i, j))).map(|(i, j)| at(i, j)).collect()
    };
    let stem = "model.layers.1.block_sparse_moe.experts.2.w1";
    let shape = Checkpoint::open(&model).unwrap().get(&format!("{stem}.weight")).unwrap().shape().to_vec();
    let (rows, cols) = (shape[0], shape[1]);
    let (a, b) = (format!("{stem}.lora_A"), format!("{stem}.lora_B"));
    let adapter =
        desk.adapter("adapter", &config(2, 6.0), &[(&a, [2, cols], 0.125), (&b, [rows, 2], 0.0625)]);
    let value = |scale: f64, i: usize| scale * ((i % 7) as f64 - 3.0);
    let delta = |i: usize, j: usize| -> f64 {
        (0..2).map(|k| 3.0 * value(0.0625, i * 2 + k) * value(0.125, k * cols + j)).sum()
    };
    let low_rank = desk.low_rank(&model, "small");
    for (i, (from, more)) in
        [(&model, &[][..]), (&low_rank, &[]), (&low_rank, &["--keep-rank"])].into_iter().enumerate()
    {
        let out = format!("out {i}");
        let report = desk.merge(from, &adapter, &out, more).json();
        assert_eq!(report["matrices"], 1);
        let (before, after) = (matrix(from, stem), matrix(&desk.path(&out), stem));
        let error = |after: &[f64]| -> f64 {
            let sum = (0..rows * cols).map(|i| (after[i] - before[i] - delta(i / cols, i % cols)).powi(2));
            sum.sum::<f64>().sqrt()
        };
        let whole = error(&before);
        // Factors that keep their rank are the best of that rank, which is not all.
        let limit = if more.is_empty() { 1e-5 } else { 0.9 };
        assert!(error(&after) < limit * whole, "{i}: {} of {whole}", error(&after));
        // Nothing else changed, and the result runs.
        let other = "model.layers.0.block_sparse_moe.experts.2.w1";
        assert_eq!(matrix(from, other), matrix(&desk.path(&out), other));
        let ids: Vec<f64> = (0..24).map(f64::from).collect();
        assert!(run(&desk.path(&out), &windows(&ids, 1)).logits.iter().all(|v| v.is_finite()));
        // Done already.
        desk.merge(from, &adapter, &out, more).ok();
    }
    let bytes =
        |name: &str| desk.run(&["inspect", name, "--json"]).json()["bytes"]["total"].as_u64().unwrap();
    assert_eq!(bytes("out 2"), bytes("small"));
    assert_eq!(bytes("out 1"), bytes("small") + 2 * (rows + cols) as u64 * 4);
}

#[test]
fn adapters_that_do_not_fit_are_refused_in_one_line() {
    let desk = Desk::new();
    let model = data("mixtral");
    let error = |adapter: &Path, status| {
        let message = desk.merge(&model, adapter, "out", &[]).error(status);
        assert!(!desk.path("out").exists() && !desk.path("out.partial").exists());
        message
    };
    let q = "model.layers.0.self_attn.q_proj";
    let (a, b) = (format!("{q}.lora_A"), format!("{q}.lora_B"));
    let shape = Checkpoint::open(&model).unwrap().get(&format!("{q}.weight")).unwrap().shape().to_vec();
    let fits = [(&a[..], [2, shape[1]], 0.1), (&b[..], [shape[0], 2], 0.1)];

    let message = error(&desk.path("nothing"), 1);
    assert!(message.contains("adapter_config.json") && message.contains("PEFT"), "{message}");
    let unknown: Vec<String> =
        (0..5).flat_map(|i| ["A", "B"].map(|h| format!("transformer.h.{i}.mlp.lora_{h}"))).collect();
    let unknown: Vec<_> = unknown.iter().map(|n| (n.as_str(), [2, 2], 0.1)).collect();
    let message = error(&desk.adapter("unknown", &config(2, 2.0), &unknown), 1);
    assert!(
        message.contains("transformer.h.0.mlp, transformer.h.1.mlp") && message.contains("and 2 more"),
        "{message}"
    );
    let message = error(&desk.adapter("half", &config(2, 2.0), &fits[..1]), 1);
    assert!(message.contains("one of lora_A and lora_B is missing"), "{message}");
    let message = error(&desk.adapter("rank", &config(3, 2.0), &fits), 1);
    assert!(message.contains("q_proj") && message.contains("[3, in]"), "{message}");
    let narrow = [(&a[..], [2, shape[1] - 1], 0.1), fits[1]];
    let message = error(&desk.adapter("narrow", &config(2, 2.0), &narrow), 1);
    assert!(message.contains("the checkpoint has"), "{message}");
    for (key, value) in
        [("peft_type", "IA3".into()), ("use_dora", true.into()), ("fan_in_fan_out", true.into())]
    {
        let mut config = config(2, 2.0);
        config[key] = value;
        let message = error(&desk.adapter(key, &config, &fits), 1);
        assert!(message.contains(key), "{message}");
    }
    let other = [fits[0], fits[1], ("model.embed_tokens.lora_embedding_A", [2, 4], 0.1)];
    let message = error(&desk.adapter("other", &config(2, 2.0), &other), 1);
    assert!(message.contains("lora_embedding_A"), "{message}");
    let broken = desk.adapter("broken", &config(2, 2.0), &[fits[0], (&b[..], [shape[0], 2], f32::INFINITY)]);
    let message = error(&broken, 1);
    assert!(message.contains("lora_B"), "{message}");

    // The number of models, and what goes with what.
    let adapter = desk.adapter("fits", &config(2, 2.0), &fits);
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let (model, adapter) = (text(&model), text(&adapter));
    let message = desk.run(&["recover", &model, &model, "--lora", &adapter, "--out", "out"]).error(2);
    assert!(message.contains("expected one checkpoint"), "{message}");
    let message = desk.run(&["recover", &model, "--tokens", "t", "--out", "out"]).error(2);
    assert!(message.contains("expected two checkpoints"), "{message}");
    let message = desk.run(&["recover", &model, "--out", "out"]).error(2);
    assert!(message.contains("--lora"), "{message}");
    let packed = Mutant::of("deepseek_v3_fp8");
    let stem = "model.layers.1.mlp.experts.0.up_proj";
    let tensors = Checkpoint::open(packed.path()).unwrap();
    if let Some(tensor) = tensors.get(&format!("{stem}.weight")) {
        let (a, b) = (format!("{stem}.lora_A"), format!("{stem}.lora_B"));
        let shape = tensor.shape();
        let both = [(&a[..], [2, shape[1]], 0.1), (&b[..], [shape[0], 2], 0.1)];
        let adapter = desk.adapter("packed", &config(2, 2.0), &both);
        let message = desk.merge(packed.path(), &adapter, "out", &[]).error(1);
        assert!(message.contains("packed") && message.contains(stem), "{message}");
    }
}
