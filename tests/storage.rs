//! Fused and packed experts through compression, layers behind the last one, and what contradicts itself.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::compress::{apply, bits, masked, plan, tokens};
use common::{Mutant, data, run};
use moepress::architecture::Projection;
use moepress::backend::cpu::Cpu;
use moepress::backend::{Expert, Matrix};
use moepress::checkpoint::{Checkpoint, Dtype, E4M3, Tensor};
use moepress::compress::{LayoutChoice, Options};
use moepress::model::{LayerSource, Model, inspect, open_architecture, profile};
use moepress::plan::{Action, Budget, Plan};
use serde_json::{Value, json};

const MOEPRESS: Options<'_> =
    Options { layout: LayoutChoice::Moepress, densify: false, tokens: None, statistics: None };
const STOCK: Options<'_> =
    Options { layout: LayoutChoice::HuggingFace, densify: false, tokens: None, statistics: None };

/// Experts that each layer of a plan keeps.
fn kept(plan: &Plan) -> Vec<(usize, Vec<usize>)> {
    let kept = |l: &moepress::plan::LayerPlan| {
        l.experts.iter().filter(|e| e.action != Action::Drop).map(|e| e.expert).collect()
    };
    plan.layers.iter().map(|l| (l.layer, kept(l))).collect()
}

fn tensor(dir: &Path, name: &str) -> Tensor {
    Checkpoint::open(dir).unwrap().tensor(name).unwrap()
}

/// Dropping copies codes and scales as they are, in both layouts.
#[test]
fn packed_experts_are_copied_not_packed_anew() {
    let out = tempfile::tempdir().unwrap();
    let model = data("gpt_oss_mxfp4");
    let plan = plan(&model, "reap", Some(Budget::Experts(3)), &[]);
    let (stock, own) = (out.path().join("stock"), out.path().join("own"));
    assert_eq!(apply(&model, &plan, &STOCK, &stock).unwrap().layout, "hf");
    apply(&model, &plan, &MOEPRESS, &own).unwrap();
    for (l, experts) in kept(&plan) {
        let prefix = format!("model.layers.{l}.mlp.experts.");
        for part in [
            "gate_up_proj_blocks",
            "gate_up_proj_scales",
            "gate_up_proj_bias",
            "down_proj_blocks",
            "down_proj_scales",
            "down_proj_bias",
        ] {
            let name = format!("{prefix}{part}");
            let expected = tensor(&model, &name).select_rows(&experts);
            let found = tensor(&stock, &name);
            assert_eq!((found.shape(), found.bytes()), (expected.shape(), expected.bytes()), "{name}");
        }
        // Up is every second row.
        for &e in &experts {
            for part in ["blocks", "scales"] {
                let all = tensor(&model, &format!("{prefix}gate_up_proj_{part}")).entry(e);
                let rows: Vec<usize> = (0..all.shape()[0] / 2).map(|r| 2 * r + 1).collect();
                let found = tensor(&own, &format!("{prefix}{e}.up_proj.weight_{part}"));
                assert_eq!(found.bytes(), all.select_rows(&rows).bytes());
            }
        }
    }
    let model = data("deepseek_v3_fp8");
    let plan = common::compress::plan(&model, "reap", Some(Budget::Experts(4)), &[]);
    let dir = out.path().join("fp8");
    assert_eq!(apply(&model, &plan, &STOCK, &dir).unwrap().layout, "hf");
    for (l, experts) in kept(&plan) {
        for (new, old) in experts.iter().enumerate() {
            for part in ["up_proj.weight", "down_proj.weight", "down_proj.weight_scale_inv"] {
                let name = |e: usize| format!("model.layers.{l}.mlp.experts.{e}.{part}");
                let (found, expected) = (tensor(&dir, &name(new)), tensor(&model, &name(*old)));
                assert_eq!((found.dtype(), found.bytes()), (expected.dtype(), expected.bytes()), "{part}");
            }
        }
    }
}

/// FP8 experts in the fused layout of transformers 5 are the separate ones: the same codes and scales, copied as they are.
#[test]
fn fused_fp8_is_separate_fp8() {
    let separate = data("deepseek_v3_fp8");
    let fused = Mutant::of("deepseek_v3_fp8");
    // Blocks of 4 rows in place of 12, so that one ends with the gate's rows.
    let repeated = |scales: &Tensor, rows: usize| {
        scales.select_rows(&(0..rows.div_ceil(4)).map(|block| block * 4 / 12).collect::<Vec<_>>())
    };
    fused.edit_tensors(|tensors| {
        let packed: Vec<String> =
            tensors.keys().filter(|name| name.ends_with("_scale_inv")).cloned().collect();
        for name in packed {
            let rows = tensors[name.trim_end_matches("_scale_inv")].shape()[0];
            let scales = repeated(&tensors[&name], rows);
            tensors.insert(name, scales);
        }
        for (l, part) in [(1, ""), (1, "_scale_inv")] {
            let prefix = format!("model.layers.{l}.mlp.experts.");
            for (fused, matrices) in
                [("gate_up_proj", &["gate_proj", "up_proj"][..]), ("down_proj", &["down_proj"])]
            {
                let mut bytes = Vec::new();
                let (mut shape, mut dtype) = (vec![6, 0], Dtype::F32);
                for e in 0..6 {
                    for matrix in matrices {
                        let tensor = tensors.remove(&format!("{prefix}{e}.{matrix}.weight{part}")).unwrap();
                        bytes.extend_from_slice(tensor.bytes());
                        shape[1] = matrices.len() * tensor.shape()[0];
                        shape.truncate(2);
                        shape.push(tensor.shape()[1]);
                        dtype = tensor.dtype();
                    }
                }
                let name = format!("{prefix}{fused}{part}");
                tensors.insert(name.clone(), Tensor::owned(name, dtype, shape, bytes));
            }
        }
    });
    let block = |rows: usize| json!({ "quant_method": "fp8", "weight_block_size": [rows, 20] });
    fused.set_config("quantization_config", block(4));
    let windows = common::windows(&common::read(&separate.join("golden.safetensors"), "input_ids"), 2);
    assert_eq!(bits(&run(fused.path(), &windows).logits), bits(&run(&separate, &windows).logits));
    let plan = plan(fused.path(), "reap", Some(Budget::Experts(4)), &[]);
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("fp8");
    apply(fused.path(), &plan, &STOCK, &dir).unwrap();
    for (l, experts) in kept(&plan) {
        for (new, old) in experts.iter().enumerate() {
            for matrix in ["gate_proj", "up_proj", "down_proj"] {
                let name = |e: usize| format!("model.layers.{l}.mlp.experts.{e}.{matrix}.weight");
                let (found, expected) = (tensor(&dir, &name(new)), tensor(&separate, &name(*old)));
                assert_eq!((found.dtype(), found.bytes()), (expected.dtype(), expected.bytes()), "{matrix}");
                let scales = |name: &str| format!("{name}_scale_inv");
                let stored = tensor(&separate, &scales(&name(*old)));
                let expected = repeated(&stored, expected.shape()[0]);
                assert_eq!(tensor(&dir, &scales(&name(new))).bytes(), expected.bytes(), "{matrix}");
            }
        }
    }
    fused.set_config("quantization_config", block(12));
    fused.edit_tensors(|tensors| {
        let others = |name: &&String| name.ends_with("_scale_inv") && !name.contains(".experts.");
        let others: Vec<String> = tensors.keys().filter(others).cloned().collect();
        tensors.extend(others.into_iter().map(|name| (name.clone(), tensor(&separate, &name))));
        for matrix in ["gate_up_proj", "down_proj"] {
            let name = format!("model.layers.1.mlp.experts.{matrix}");
            let &[experts, rows, cols] = tensors[&name].shape() else { unreachable!("experts together") };
            let shape = vec![experts, rows.div_ceil(12), cols.div_ceil(20)];
            let scales = Tensor::from_f32("", Dtype::F32, shape.clone(), &vec![1.0; shape.iter().product()]);
            let name = format!("{name}_scale_inv");
            tensors.insert(name.clone(), scales.renamed(name));
        }
    });
    let checkpoint = Checkpoint::open(fused.path()).unwrap();
    let message = Model::new(&checkpoint, &Cpu, 8).unwrap().layer(1).err().unwrap().to_string();
    assert!(
        message
            .contains("rows from 16 on share a block of scales with those before; expected a multiple of 12"),
        "{message}"
    );
}

/// FP8 with one scale for a matrix, under the names of static checkpoints: the product of code and scale, and experts
/// that keep their scales, those of their inputs included.
#[test]
fn fp8_with_one_scale_per_matrix() {
    let packed = Mutant::of("deepseek_v3_fp8");
    let widened = Mutant::of("deepseek_v3_fp8");
    let stems = |mutant: &Mutant| -> Vec<String> {
        let checkpoint = Checkpoint::open(mutant.path()).unwrap();
        let names = checkpoint.tensors().map(|t| t.name().to_string());
        names.filter_map(|name| name.strip_suffix(".weight_scale_inv").map(String::from)).collect()
    };
    let scale = |stem: &str| 0.001 * (1.0 + stem.len() as f32 + stem.matches('1').count() as f32);
    for stem in stems(&packed) {
        let (weight, scales) = (format!("{stem}.weight"), format!("{stem}.weight_scale_inv"));
        packed.edit_tensors(|tensors| {
            tensors.remove(&scales);
            for (name, value) in [("weight_scale", scale(&stem)), ("input_scale", 2.0)] {
                let name = format!("{stem}.{name}");
                tensors.insert(name.clone(), Tensor::from_f32(name, Dtype::F32, vec![], &[value]));
            }
        });
        widened.edit_tensors(|tensors| {
            tensors.remove(&scales);
            let codes = &tensors[&weight];
            let values: Vec<f32> =
                codes.bytes().iter().map(|&code| E4M3[usize::from(code)] * scale(&stem)).collect();
            let plain = Tensor::from_f32(weight.as_str(), Dtype::F32, codes.shape().to_vec(), &values);
            tensors.insert(weight, plain);
        });
    }
    widened.set_config("quantization_config", Value::Null);
    let expected = run(widened.path(), &tokens()).logits;
    let groups = json!({"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float"},
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true}}});
    for quantization in [
        json!({ "quant_method": "fp8", "activation_scheme": "static" }),
        json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups }),
    ] {
        packed.set_config("quantization_config", quantization);
        let logits = run(packed.path(), &tokens()).logits;
        let differences = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        assert!(differences.fold(0.0, f32::max) < 1e-5);
    }
    let plan = plan(packed.path(), "reap", Some(Budget::Experts(4)), &[]);
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("static");
    assert_eq!(apply(packed.path(), &plan, &STOCK, &dir).unwrap().layout, "hf");
    for (l, experts) in kept(&plan) {
        for (new, old) in experts.iter().enumerate() {
            for suffix in ["weight", "weight_scale", "input_scale"] {
                let name = |e: usize| format!("model.layers.{l}.mlp.experts.{e}.up_proj.{suffix}");
                let (found, expected) = (tensor(&dir, &name(new)), tensor(packed.path(), &name(*old)));
                assert_eq!((found.shape(), found.bytes()), (expected.shape(), expected.bytes()), "{suffix}");
            }
        }
    }
    assert!(bits(&run(&dir, &tokens()).logits) == bits(&masked(packed.path(), &plan, &tokens())));
}

/// Gate and up of a shared expert in one FP8 matrix with a scale for each row, as for `compressed-tensors` by channel.
#[test]
fn fp8_of_matrices_stored_together() {
    let (packed, widened) = (Mutant::of("granitemoeshared"), Mutant::of("granitemoeshared"));
    for l in 0..2 {
        let stem = format!("model.layers.{l}.shared_mlp.input_linear.weight");
        let (rows, cols) = (48, 32);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 251) as u8 & 0xb7).collect();
        let scales: Vec<f32> = (0..rows).map(|row| 0.01 + row as f32 / 1024.0).collect();
        let value = |(i, &code): (usize, &u8)| E4M3[usize::from(code)] * scales[i / cols];
        let values: Vec<f32> = codes.iter().enumerate().map(value).collect();
        packed.edit_tensors(|tensors| {
            let stored = Tensor::owned(stem.as_str(), Dtype::F8_E4M3, vec![rows, cols], codes.clone());
            tensors.insert(stem.clone(), stored);
            let name = format!("{stem}_scale");
            tensors.insert(name.clone(), Tensor::from_f32(name, Dtype::F32, vec![rows, 1], &scales));
        });
        widened.edit_tensors(|tensors| {
            let plain = Tensor::from_f32(stem.as_str(), Dtype::F32, vec![rows, cols], &values);
            tensors.insert(stem.clone(), plain);
        });
    }
    let groups = json!({"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "type": "float"},
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}}});
    let quantization =
        json!({ "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups });
    packed.set_config("quantization_config", quantization);
    let (found, expected) = (run(packed.path(), &tokens()).logits, run(widened.path(), &tokens()).logits);
    let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    assert!(differences.fold(0.0, f32::max) < 1e-5);
}

/// The same where all experts are stored together: one scale for each, and one for its inputs.
#[test]
fn fused_fp8_with_one_scale_per_expert() {
    let (packed, widened) = (Mutant::of("mistral4"), Mutant::of("mistral4"));
    for (name, rows) in [("gate_up_proj", 32), ("down_proj", 32)] {
        let name = format!("model.layers.1.mlp.experts.{name}");
        let codes = |tensors: &BTreeMap<String, Tensor>| -> (Vec<usize>, Vec<u8>) {
            let stored = &tensors[&name];
            let codes = stored.to_f32().unwrap().iter().map(|v| (v.to_bits() >> 16) as u8 & 0xb7).collect();
            (stored.shape().to_vec(), codes)
        };
        let scale = |e: usize| 0.01 * (1.0 + e as f32);
        packed.edit_tensors(|tensors| {
            let (shape, codes) = codes(tensors);
            assert_eq!(shape[1], rows);
            let one = |name: String, shape: Vec<usize>, values: Vec<f32>| {
                Tensor::from_f32(name, Dtype::F32, shape, &values)
            };
            let scales = one(format!("{name}_scale_inv"), vec![8, 1, 1], (0..8).map(scale).collect());
            let inputs = one(format!("{name}_activation_scale"), vec![8], (0..8).map(|e| e as f32).collect());
            for tensor in [Tensor::owned(name.as_str(), Dtype::F8_E4M3, shape, codes), scales, inputs] {
                tensors.insert(tensor.name().into(), tensor);
            }
        });
        widened.edit_tensors(|tensors| {
            let (shape, codes) = codes(tensors);
            let per_expert = codes.len() / 8;
            let value = |(i, &code): (usize, &u8)| E4M3[usize::from(code)] * scale(i / per_expert);
            let values: Vec<f32> = codes.iter().enumerate().map(value).collect();
            tensors.insert(name.clone(), Tensor::from_f32(name.as_str(), Dtype::F32, shape, &values));
        });
    }
    packed.set_config("quantization_config", json!({ "quant_method": "fp8", "activation_scheme": "static" }));
    let differences =
        run(packed.path(), &tokens()).logits.into_iter().zip(run(widened.path(), &tokens()).logits);
    assert!(differences.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5);
    for (part, shape) in [("scale_inv", vec![8, 2, 1]), ("scale_inv", vec![]), ("activation_scale", vec![])] {
        let broken = Mutant::copy(packed.path());
        let name = format!("model.layers.1.mlp.experts.down_proj_{part}");
        broken.edit_tensors(|tensors| {
            let values = vec![1.0; shape.iter().product()];
            tensors.insert(name.clone(), Tensor::from_f32(name.as_str(), Dtype::F32, shape, &values));
        });
        let checkpoint = Checkpoint::open(broken.path()).unwrap();
        let message = Model::new(&checkpoint, &Cpu, 24).unwrap().layer(1).err().unwrap().to_string();
        assert!(message.contains(&format!("{name} has shape")), "{message}");
    }
    // Whatever is dropped, a router without groups can say.
    packed.set_config("n_group", json!(1));
    let plan = plan(packed.path(), "random", Some(Budget::Experts(6)), &[("seed", "3")]);
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("static");
    assert_eq!(apply(packed.path(), &plan, &STOCK, &dir).unwrap().layout, "hf");
    for (l, experts) in kept(&plan) {
        let name = format!("model.layers.{l}.mlp.experts.down_proj_activation_scale");
        let expected: Vec<f32> = experts.iter().map(|e| *e as f32).collect();
        assert_eq!(tensor(&dir, &name).to_f32().unwrap(), expected);
    }
    assert!(bits(&run(&dir, &tokens()).logits) == bits(&masked(packed.path(), &plan, &tokens())));
}

/// Every parameter once, whatever the storage: biases count, scales do not.
#[test]
fn sizes_of_packed_experts() {
    let sizes = |name: &str| {
        let checkpoint = Checkpoint::open(data(name)).unwrap();
        profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap()
    };
    let packed = sizes("gpt_oss_mxfp4");
    let layer = &packed.moe_layers[0];
    // Three matrices of 32 × 32 in blocks of 17 bytes for 32 values, and 32 + 32 + 32 biases of 2 bytes.
    assert_eq!((layer.expert_parameters, layer.expert_bytes), (3 * 1024 + 96, 3 * 1024 / 32 * 17 + 192));
    assert_eq!((layer.matrix_bytes, layer.factor_bytes), ([1024 / 32 * 17; 3], 2));
    assert_eq!((layer.router_parameters, layer.router_bytes), (33, 66));
    // The other fixture has the same sizes, but one expert less in each of two layers.
    let plain = sizes("gpt_oss");
    assert_eq!(packed.parameters, plain.parameters + 2 * (layer.expert_parameters + layer.router_parameters));
    let plain = &plain.moe_layers[0];
    assert_eq!(
        (plain.matrix_bytes, plain.factor_bytes, plain.expert_bytes),
        ([2048; 3], 2, 2 * (3 * 1024 + 96))
    );

    let fp8 = &sizes("deepseek_v3_fp8").moe_layers[0];
    // 16 × 32 in blocks of 12 × 20 has four scales, 32 × 16 three.
    assert_eq!((fp8.expert_parameters, fp8.matrix_bytes), (1536, [528, 528, 524]));
    assert_eq!((fp8.expert_bytes, fp8.factor_bytes), (2 * 528 + 524, 2));
    // A row of 32 bf16 weights and an f32 bias.
    assert_eq!((fp8.router_parameters, fp8.router_bytes), (33, 68));

    let seen = inspect(&Checkpoint::open(data("gpt_oss_mxfp4")).unwrap()).unwrap();
    assert_eq!(seen.dtypes["MXFP4"], 2 * 5 * 3 * 1024);
    assert_eq!(seen.parameters.total, packed.parameters);
}

/// Factors of packed matrices are bf16; biases stay; the result is as large as planned.
#[test]
fn low_rank_keeps_biases_and_unpacks() {
    let out = tempfile::tempdir().unwrap();
    let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
    for name in ["gpt_oss", "gpt_oss_mxfp4", "deepseek_v3_fp8", "llama4_text"] {
        let model = data(name);
        let plan = plan(&model, "low-rank", Some(budget), &[("whiten", "false")]);
        let dir = out.path().join(name);
        let report = apply(&model, &plan, &Options::default(), &dir).unwrap();
        assert_eq!((report.layout, report.bytes_after), ("moepress", plan.expected.bytes), "{name}");
        assert_eq!(report.routed_parameters_after, plan.expected.routed_parameters, "{name}");
        let experts = |dir: &Path| {
            let checkpoint = Checkpoint::open(dir).unwrap();
            let architecture = open_architecture(&checkpoint).unwrap();
            let layer = LayerSource::open(&checkpoint, &architecture, 1).unwrap();
            layer.moe().unwrap().experts.clone()
        };
        for (before, after) in experts(&model).iter().zip(experts(&dir)) {
            let (Expert::Mlp(before), Expert::Mlp(after)) = (before, after) else { unreachable!() };
            assert_eq!(before.activation, after.activation);
            for (before, after) in before.maps().zip(after.maps()) {
                let bias = |b: &Option<Tensor>| b.as_ref().map(|b| b.bytes().to_vec());
                assert_eq!(bias(&before.bias), bias(&after.bias));
                let Matrix::LowRank { u, v } = &after.weight else { panic!("{name}: not low rank") };
                assert_eq!([u, v].map(|w| (w.is_packed(), w.replacement_dtype())), [(false, Dtype::BF16); 2]);
            }
        }
        assert!(run(&dir, &tokens()).logits.iter().all(|v| v.is_finite()));
    }
}

/// Factors multiplied back are the same numbers in the fused stock layout and one by one; packed checkpoints cannot
/// take them.
#[test]
fn multiplied_back_into_fused_tensors() {
    let out = tempfile::tempdir().unwrap();
    let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
    for name in ["gpt_oss", "llama4_text", "qwen3_5_moe", "gemma4", "dbrx"] {
        let model = data(name);
        let mut plan = plan(&model, "low-rank", Some(budget), &[("whiten", "false")]);
        plan.layers[0].experts[1].action = Action::Keep;
        let at = |kind: &str| out.path().join(format!("{name} {kind}"));
        apply(&model, &plan, &Options { densify: true, ..STOCK }, &at("stock")).unwrap();
        apply(&model, &plan, &Options { densify: true, ..MOEPRESS }, &at("own")).unwrap();
        let logits = bits(&run(&at("stock"), &tokens()).logits);
        assert!(logits == bits(&run(&at("own"), &tokens()).logits), "{name}");
        assert!(logits != bits(&run(&model, &tokens()).logits), "{name}");
        let shapes = |dir: &Path| -> Vec<_> {
            let checkpoint = Checkpoint::open(dir).unwrap();
            checkpoint.tensors().map(|t| (t.name().to_string(), t.shape().to_vec(), t.dtype())).collect()
        };
        assert_eq!(shapes(&at("stock")), shapes(&model));
    }
    for name in ["gpt_oss_mxfp4", "deepseek_v3_fp8"] {
        let plan = plan(&data(name), "low-rank", Some(budget), &[("whiten", "false")]);
        let options = Options { densify: true, ..STOCK };
        let error = apply(&data(name), &plan, &options, &out.path().join("no")).unwrap_err();
        assert!(error.contains("packed") && error.contains("--layout moepress"), "{error}");
        let dir = out.path().join(name);
        assert_eq!(
            apply(&data(name), &plan, &Options { densify: true, ..Options::default() }, &dir).unwrap().layout,
            "moepress"
        );
        assert!(run(&dir, &tokens()).logits.iter().all(|v| v.is_finite()));
    }
}

/// They stay where nothing contradicts them, and go where the config could not describe them.
#[test]
fn layers_for_multi_token_prediction() {
    let out = tempfile::tempdir().unwrap();
    let model = data("deepseek_v3");
    let behind = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let config: Value = serde_json::from_str(checkpoint.config()).unwrap();
        let count = checkpoint.tensors().filter(|t| t.name().starts_with("model.layers.2.")).count();
        (count, config["num_nextn_predict_layers"].as_u64().unwrap())
    };
    assert_eq!(behind(&model), (3, 1));
    let drop = plan(&model, "reap", Some(Budget::Experts(4)), &[]);
    let Ok(budget) = Budget::remove(0.5) else { unreachable!() };
    let factors = plan(&model, "low-rank", Some(budget), &[("whiten", "false")]);
    let at = |name: &str| out.path().join(name);
    apply(&model, &drop, &STOCK, &at("stock")).unwrap();
    apply(&model, &drop, &MOEPRESS, &at("own")).unwrap();
    apply(&model, &factors, &Options { densify: true, ..STOCK }, &at("dense")).unwrap();
    assert_eq!(behind(&at("stock")), (0, 0));
    assert_eq!(behind(&at("own")), (3, 1));
    assert_eq!(behind(&at("dense")), (3, 1));
}

/// A stock router scores groups by two experts each.
#[test]
fn groups_of_one_need_the_other_layout() {
    let out = tempfile::tempdir().unwrap();
    let mutant = Mutant::of("deepseek_v3");
    mutant.set_config("topk_group", json!(2));
    let mut plan = plan(mutant.path(), "reap", Some(Budget::Experts(4)), &[]);
    for expert in &mut plan.layers[0].experts {
        expert.action = if expert.expert % 3 == 0 { Action::Keep } else { Action::Drop };
    }
    let error = apply(mutant.path(), &plan, &STOCK, &out.path().join("stock")).unwrap_err();
    assert!(error.contains("1 expert in each group"), "{error}");
    let dir = out.path().join("own");
    apply(mutant.path(), &plan, &MOEPRESS, &dir).unwrap();
    assert!(bits(&run(&dir, &tokens()).logits) == bits(&masked(mutant.path(), &plan, &tokens())));
}

/// The language model inside a model of text and images: the same numbers under longer names, and its own section of
/// the config.
#[test]
fn llama4_as_published() {
    let out = tempfile::tempdir().unwrap();
    let mutant = Mutant::of("llama4_text");
    mutant.edit_text("config.json", |text| {
        let mut section: Value = serde_json::from_str(&text).unwrap();
        section["tie_word_embeddings"] = json!(false);
        json!({ "model_type": "llama4", "num_local_experts": 99, "text_config": section }).to_string()
    });
    mutant.edit_tensors(|tensors| {
        let all = std::mem::take(tensors);
        tensors.extend(all.into_iter().map(|(name, tensor)| (format!("language_model.{name}"), tensor)));
        let image = Tensor::from_f32("x", Dtype::F32, vec![2], &[1.0, 2.0]);
        tensors.insert("vision_model.patch_embedding.weight".into(), image);
    });
    let expected = bits(&run(&data("llama4_text"), &tokens()).logits);
    assert!(bits(&run(mutant.path(), &tokens()).logits) == expected);

    let plan = plan(mutant.path(), "reap", Some(Budget::Experts(2)), &[]);
    let dir = out.path().join("half");
    assert_eq!(apply(mutant.path(), &plan, &STOCK, &dir).unwrap().layout, "hf");
    assert!(bits(&run(&dir, &tokens()).logits) == bits(&masked(mutant.path(), &plan, &tokens())));
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let config: Value = serde_json::from_str(checkpoint.config()).unwrap();
    assert_eq!(config["text_config"]["num_local_experts"], 2);
    assert_eq!(config["num_local_experts"], 99);
    assert!(checkpoint.get("vision_model.patch_embedding.weight").is_some());
    let router = checkpoint.tensor("language_model.model.layers.0.feed_forward.router.weight").unwrap();
    assert_eq!(router.shape(), [2, 32]);
}

/// The names that transformers 5 has for the parts of a model of text and images.
#[test]
fn mistral_as_transformers_writes_it() {
    let mutant = Mutant::of("mistral3");
    mutant.edit_tensors(|tensors| {
        let all = std::mem::take(tensors);
        let renamed = |name: String| match name.strip_prefix("language_model.") {
            Some("lm_head.weight") => "lm_head.weight".into(),
            Some(rest) => rest.replacen("model.", "model.language_model.", 1),
            None => name,
        };
        tensors.extend(all.into_iter().map(|(name, tensor)| (renamed(name), tensor)));
    });
    assert!(bits(&run(mutant.path(), &tokens()).logits) == bits(&run(&data("mistral3"), &tokens()).logits));
}

/// Experts in four-bit integers within a model of text and images, as Kimi-K2.5 is published: the products of integers and
/// scales, and dropping copies what is stored.
#[test]
fn four_bit_experts_as_published() {
    const GROUP: usize = 12;
    let (packed, widened) = (Mutant::of("deepseek_v3"), Mutant::of("deepseek_v3"));
    let quantised = |weight: &Tensor| {
        let &[rows, cols] = weight.shape() else { unreachable!("a matrix") };
        let (mut codes, mut scales, mut values) =
            (vec![0u32; rows * cols.div_ceil(8)], Vec::new(), Vec::new());
        for (r, row) in weight.to_f32().unwrap().chunks(cols).enumerate() {
            for group in row.chunks(GROUP) {
                let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                scales.push(f32::from_bits((largest / 7.0).to_bits() & 0xffff_0000));
            }
            for (c, value) in row.iter().enumerate() {
                let scale = scales[r * cols.div_ceil(GROUP) + c / GROUP];
                let code = (value / scale).round().clamp(-8.0, 7.0);
                values.push(code * scale);
                codes[r * cols.div_ceil(8) + c / 8] |= ((code + 8.0) as u32) << (4 * (c % 8));
            }
        }
        let codes: Vec<u8> = codes.into_iter().flat_map(u32::to_le_bytes).collect();
        let shape: Vec<u8> = [rows as i64, cols as i64].into_iter().flat_map(i64::to_le_bytes).collect();
        let packed = [
            ("_packed", Tensor::owned("", Dtype::I32, vec![rows, cols.div_ceil(8)], codes)),
            ("_scale", Tensor::from_f32("", Dtype::BF16, vec![rows, cols.div_ceil(GROUP)], &scales)),
            ("_shape", Tensor::owned("", Dtype::I64, vec![2], shape)),
        ];
        (packed, Tensor::from_f32("", Dtype::F32, vec![rows, cols], &values))
    };
    let is_expert = |name: &str| name.contains(".mlp.experts.");
    widened.edit_tensors(|tensors| {
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| is_expert(name)) {
            *tensor = quantised(tensor).1;
        }
    });
    packed.edit_tensors(|tensors| {
        for (name, tensor) in std::mem::take(tensors) {
            let long = format!("language_model.{name}");
            if is_expert(&name) {
                tensors.extend(quantised(&tensor).0.map(|(what, part)| (format!("{long}{what}"), part)));
            } else {
                tensors.insert(long, tensor);
            }
        }
    });
    let group = json!({"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
        "group_size": GROUP, "symmetric": true, "actorder": null}});
    packed.edit_text("config.json", |text| {
        let mut section: Value = serde_json::from_str(&text).unwrap();
        section["model_type"] = json!("kimi_k2");
        section["quantization_config"] = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": group}, "ignore": ["re:.*self_attn.*", "re:.*mlp\\.(gate|up|down)_proj.*"]});
        json!({"model_type": "kimi_k25", "tie_word_embeddings": false, "text_config": section}).to_string()
    });
    let expected = run(widened.path(), &tokens()).logits;
    assert!(bits(&run(packed.path(), &tokens()).logits) == bits(&expected));
    let sizes = |mutant: &Mutant| {
        let checkpoint = Checkpoint::open(mutant.path()).unwrap();
        profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap()
    };
    assert_eq!(sizes(&packed).parameters, sizes(&widened).parameters);
    // Codes, scales and the shape: 16 × 32 and 32 × 16.
    let (input, output) = (16 * 16 + 16 * 3 * 2 + 16, 32 * 8 + 32 * 2 * 2 + 16);
    assert_eq!(sizes(&packed).moe_layers[0].matrix_bytes, [input, input, output]);

    let out = tempfile::tempdir().unwrap();
    let plan = plan(packed.path(), "reap", Some(Budget::Experts(4)), &[]);
    let (stock, own) = (out.path().join("stock"), out.path().join("own"));
    assert_eq!(apply(packed.path(), &plan, &STOCK, &stock).unwrap().layout, "hf");
    apply(packed.path(), &plan, &MOEPRESS, &own).unwrap();
    let expected = bits(&masked(packed.path(), &plan, &tokens()));
    assert!(bits(&run(&stock, &tokens()).logits) == expected);
    assert!(bits(&run(&own, &tokens()).logits) == expected);
    for (l, experts) in kept(&plan) {
        for (new, old) in experts.iter().enumerate() {
            for suffix in ["packed", "scale", "shape"] {
                let name = |e: usize| {
                    format!("language_model.model.layers.{l}.mlp.experts.{e}.up_proj.weight_{suffix}")
                };
                let (found, expected) = (tensor(&stock, &name(new)), tensor(packed.path(), &name(*old)));
                assert_eq!((found.dtype(), found.bytes()), (expected.dtype(), expected.bytes()), "{suffix}");
            }
        }
    }
}

/// A family within a model of text and images gives what it gives alone, and stays there when it loses experts.
#[test]
fn a_language_model_within_another() {
    let image = Tensor::from_f32("", Dtype::F32, vec![3], &[1.0, 2.0, 3.0]);
    for (inner, family, section, experts) in [
        ("qwen3_moe", "internvl_chat", "llm_config", 3),
        ("deepseek_v3", "kimi_vl", "text_config", 4),
        ("qwen3_moe_fused", "internvl", "text_config", 3),
    ] {
        let whole = Mutant::of(inner);
        whole.edit_tensors(|tensors| {
            let renamed = std::mem::take(tensors).into_iter();
            tensors.extend(renamed.map(|(name, tensor)| (format!("language_model.{name}"), tensor)));
            tensors.insert("vision_model.patches".into(), image.clone());
        });
        whole.edit_text("config.json", |text| {
            let text: Value = serde_json::from_str(&text).unwrap();
            json!({"model_type": family, section: text, "vision_config": {"hidden_size": 7}}).to_string()
        });
        let alone = run(&data(inner), &tokens()).logits;
        assert!(bits(&run(whole.path(), &tokens()).logits) == bits(&alone), "{family}");
        let plan = plan(whole.path(), "reap", Some(Budget::Experts(experts)), &[]);
        let out = tempfile::tempdir().unwrap();
        let dir = out.path().join("stock");
        assert_eq!(apply(whole.path(), &plan, &STOCK, &dir).unwrap().layout, "hf");
        assert!(
            bits(&run(&dir, &tokens()).logits) == bits(&masked(whole.path(), &plan, &tokens())),
            "{family}"
        );
        assert_eq!(tensor(&dir, "vision_model.patches").bytes(), image.bytes());
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["vision_config"]["hidden_size"], 7);
    }
}

/// Router and experts of images stay beside those of text, whichever way they are stored, and no stock checkpoint has fewer
/// of one kind.
#[test]
fn experts_of_images_stay() {
    let out = tempfile::tempdir().unwrap();
    for name in ["ernie4_5_vl_moe", "ernie4_5_vl_moe_fused"] {
        let plan = plan(&data(name), "reap", Some(Budget::Experts(3)), &[]);
        let dir = out.path().join(name);
        let error = apply(&data(name), &plan, &STOCK, &dir).unwrap_err();
        assert!(error.contains("as many experts of images as of text"), "{error}");
        assert_eq!(apply(&data(name), &plan, &Options::default(), &dir).unwrap().layout, "moepress");
        assert!(bits(&run(&dir, &tokens()).logits) == bits(&masked(&data(name), &plan, &tokens())), "{name}");
        let is_of_images = |tensor: &&Tensor| {
            let expert = tensor.name().split("mlp.experts.").nth(1).and_then(|rest| rest.split('.').next());
            let number = expert.map(|number| number.parse::<usize>().unwrap());
            tensor.name().contains("vision")
                || tensor.name().ends_with("_1")
                || number.is_some_and(|e| e >= 5)
        };
        let source = Checkpoint::open(data(name)).unwrap();
        let of_images: Vec<_> = source.tensors().filter(is_of_images).collect();
        assert!(of_images.len() > 10, "{name}");
        for stored in of_images {
            assert_eq!(tensor(&dir, stored.name()).bytes(), stored.bytes(), "{}", stored.name());
        }
    }
    let [bias, of_images] = ["moe_statics", "vision_moe.gate.moe_statics"]
        .map(|module| format!("model.layers.1.mlp.{module}.e_score_correction_bias"));
    let both = tensor(&data("ernie4_5_vl_moe"), &bias);
    assert_eq!(tensor(&out.path().join("ernie4_5_vl_moe"), &of_images).bytes(), both.entry(1).bytes());
}

/// A config as first published, with all keys side by side, says the same.
#[test]
fn keys_of_text_and_images_side_by_side() {
    let model = Mutant::of("ernie4_5_vl_moe");
    model.edit_text("config.json", |text| {
        let written: Value = serde_json::from_str(&text).unwrap();
        let mut config = written["text_config"].clone();
        let published = json!({"model_type": "ernie4_5_moe_vl", "moe_layer_end_index": [-1, 29],
            "moe_layer_interval": 1, "moe_layer_start_index": [1, 1], "moe_num_experts": [5, 5],
            "rope_theta": 500_000, "tie_word_embeddings": true});
        config.as_object_mut().unwrap().extend(published.as_object().unwrap().clone());
        config
            .as_object_mut()
            .unwrap()
            .retain(|key, _| !["mlp_layer_types", "rope_parameters"].contains(&key.as_str()));
        config.to_string()
    });
    let expected = run(&data("ernie4_5_vl_moe"), &tokens()).logits;
    assert!(bits(&run(model.path(), &tokens()).logits) == bits(&expected));
}

/// What is beside the weights comes along, other weights and other folders do not.
#[test]
fn companions_come_along() {
    let model = Mutant::of("mixtral");
    for folder in ["additional_chat_templates", "original"] {
        std::fs::create_dir(model.file(folder)).unwrap();
    }
    let files = ["generation_config.json", "LICENSE", "additional_chat_templates/rag.jinja"];
    let others = ["pytorch_model.bin", "original/params.json"];
    for name in files.iter().chain(&others) {
        std::fs::write(model.file(name), name).unwrap();
    }
    let out = tempfile::tempdir().unwrap();
    let plan = plan(model.path(), "reap", Some(Budget::Experts(3)), &[]);
    for (folder, options) in [("stock", STOCK), ("own", MOEPRESS)] {
        let dir = out.path().join(folder);
        apply(model.path(), &plan, &options, &dir).unwrap();
        for name in files {
            assert_eq!(std::fs::read_to_string(dir.join(name)).unwrap(), name);
        }
        assert!(others.iter().all(|name| !dir.join(name).exists()));
    }
}

/// What is wrong with packed weights, by name.
#[test]
fn packed_weights_that_contradict_their_config() {
    let error = |mutant: &Mutant| {
        let checkpoint = Checkpoint::open(mutant.path()).unwrap();
        match Model::new(&checkpoint, &Cpu, 24) {
            Err(error) => error.to_string(),
            Ok(model) => model.layer(1).err().unwrap().to_string(),
        }
    };
    let expert = "model.layers.1.mlp.experts.2.down_proj.weight";

    let mutant = Mutant::of("deepseek_v3_fp8");
    mutant.edit_tensors(|tensors| drop(tensors.remove(&format!("{expert}_scale_inv"))));
    assert!(error(&mutant).ends_with(&format!("tensor {expert}_scale_inv is missing")));

    let mutant = Mutant::of("deepseek_v3_fp8");
    let quantization = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
    mutant.set_config("quantization_config", quantization);
    assert!(error(&mutant).contains("_scale_inv has shape"), "{}", error(&mutant));

    let mutant = Mutant::of("deepseek_v3_fp8");
    mutant.edit_values(&format!("{expert}_scale_inv"), |values| values[1] = f32::INFINITY);
    assert!(error(&mutant).contains(&format!("layer 1: {expert}_scale_inv holds inf")), "{}", error(&mutant));

    let mutant = Mutant::of("gpt_oss_mxfp4");
    mutant.edit_tensors(|tensors| {
        let name = "model.layers.1.mlp.experts.down_proj_scales";
        let (shape, mut bytes) = (tensors[name].shape().to_vec(), tensors[name].bytes().to_vec());
        bytes[7] = 255;
        tensors.insert(name.into(), Tensor::owned(name, Dtype::U8, shape, bytes));
    });
    assert!(error(&mutant).contains("down_proj_scales holds inf at flat index 7"), "{}", error(&mutant));

    let mutant = Mutant::of("mixtral");
    mutant.set_config("quantization_config", json!({ "quant_method": "gptq" }));
    assert!(error(&mutant).contains("quantization_config.quant_method is `gptq`"), "{}", error(&mutant));
}

/// Names in both layouts are in the order gate, up, down.
#[test]
fn projections_are_indices() {
    assert_eq!(Projection::ALL.map(|p| p as usize), [0, 1, 2]);
}
