//! One MoE checkpoint of several dense ones.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::command::moepress;
use common::{Mutant, data, golden_windows, max_difference, read, run};
use moepress::checkpoint::{Checkpoint, Dtype, Entry, Tensor, encode_f64, write_safetensors};
use moepress::model::inspect;
use moepress::upcycle::{Options, RouterStart, Target, upcycle};
use serde_json::json;

fn folders(names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(|name| data(name)).collect()
}

fn llamas() -> Vec<PathBuf> {
    folders(&["dense/llama_0", "dense/llama_1", "dense/llama_2"])
}

/// What upcycling makes of `folders`.
fn made(folders: &[PathBuf], options: &Options) -> (tempfile::TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("moe");
    upcycle(folders, options, &out, &mut ()).unwrap();
    (place, out)
}

/// The logits of `dir` for the tokens of the golden file of `reference`, as far as they are from its logits.
fn off(dir: &Path, reference: &str) -> f64 {
    let golden = data(reference).join("golden.safetensors");
    max_difference(&run(dir, &golden_windows(&golden)).logits, &read(&golden, "logits"))
}

/// The weights of the chosen add up to 1, so equal experts and means are the model itself.
#[test]
fn copies_of_a_dense_model_make_a_mixtral_that_computes_the_same() {
    for (top_k, router) in [(1, RouterStart::Random), (2, RouterStart::Random), (3, RouterStart::Zero)] {
        let options = Options { top_k, router, ..Options::new(Target::Mixtral) };
        let (_place, out) = made(&folders(&["dense/llama_0"; 3]), &options);
        let difference = off(&out, "dense/llama_0");
        assert!(difference < 1e-4, "top {top_k}: {difference:.1e}");
    }
}

#[test]
fn a_mixtral_has_the_mlps_as_experts_and_the_means_of_all_else() {
    let (_place, out) = made(&llamas(), &Options::new(Target::Mixtral));
    let checkpoint = Checkpoint::open(&out).unwrap();
    let dense: Vec<_> = llamas().iter().map(|dir| Checkpoint::open(dir).unwrap()).collect();
    let tensor = |name: &str| checkpoint.tensor(name).unwrap();
    for (l, e) in [(0, 0), (1, 2)] {
        for (theirs, ours) in [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")] {
            let expert = tensor(&format!("model.layers.{l}.block_sparse_moe.experts.{e}.{ours}.weight"));
            let mlp = dense[e].tensor(&format!("model.layers.{l}.mlp.{theirs}.weight")).unwrap();
            assert_eq!((expert.shape(), expert.bytes()), (mlp.shape(), mlp.bytes()));
        }
    }
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ] {
        let each: Vec<_> = dense.iter().map(|d| d.tensor(name).unwrap().to_f32().unwrap()).collect();
        let mean = |i: usize| each.iter().map(|values| f64::from(values[i])).sum::<f64>() / 3.0;
        let means: Vec<f64> = (0..each[0].len()).map(mean).collect();
        assert_eq!(tensor(name).bytes(), encode_f64(tensor(name).dtype(), &means), "{name}");
    }
    let router = tensor("model.layers.0.block_sparse_moe.gate.weight").to_f32().unwrap();
    let square = router.iter().map(|v| v * v).sum::<f32>() / router.len() as f32;
    assert!((square.sqrt() - 0.02).abs() < 0.006, "{}", square.sqrt());
    let config: serde_json::Value = serde_json::from_str(checkpoint.config()).unwrap();
    assert_eq!(config["architectures"], json!(["MixtralForCausalLM"]));
    assert_eq!((&config["rope_theta"], &config["head_dim"]), (&json!(50000.0), &json!(12)));
}

/// All tensors but the routers are those of the reference, and with its routers so are the logits.
#[test]
fn a_bam_is_what_the_paper_says() {
    for (names, reference, shared) in [
        (&["dense/llama_0", "dense/llama_1", "dense/llama_2"][..], "bam_llama", false),
        (&["dense/cohere_0", "dense/cohere_1"], "bam_cohere", true),
    ] {
        let options = Options { shared_key_values: shared, ..Options::new(Target::Bam) };
        let (_place, out) = made(&folders(names), &options);
        let expected = Checkpoint::open(data(reference)).unwrap();
        let found = Checkpoint::open(&out).unwrap();
        assert_eq!(found.tensor_count(), expected.tensor_count());
        let is_router = |t: &&Tensor| t.name().contains("router") || t.name().contains("mlp.gate.");
        for tensor in expected.tensors().filter(|t| !is_router(t)) {
            let made = found.tensor(tensor.name()).unwrap();
            assert_eq!((made.shape(), made.bytes()), (tensor.shape(), tensor.bytes()), "{}", tensor.name());
        }
        let trained = Mutant::copy(&out);
        trained.edit_tensors(|tensors| {
            let routers = expected.tensors().filter(is_router).cloned();
            tensors.extend(routers.map(|router| (router.name().to_owned(), router)));
        });
        let difference = off(trained.path(), reference);
        assert!(difference < 1e-4, "{reference}: {difference:.1e}");
    }
}

/// Attentions that are equal are that of the model, whatever their shares; of the MLP there is 1/N, as the paper's weights
/// are not renormalised.
#[test]
fn copies_and_routers_of_zeros_leave_attention_as_it_was() {
    let halved = Mutant::of("dense/llama_0");
    halved.edit_tensors(|tensors| {
        for l in 0..2 {
            let name = format!("model.layers.{l}.mlp.down_proj.weight");
            // Half of a bf16 number is one.
            let values: Vec<f32> = tensors[&name].to_f32().unwrap().iter().map(|v| v / 2.0).collect();
            let tensor = &tensors[&name];
            let half = Tensor::from_f32(&*name, tensor.dtype(), tensor.shape().to_vec(), &values);
            tensors.insert(name, half);
        }
    });
    let copies = |dir: PathBuf| [dir.clone(), dir];
    let (_plain, expected) = made(&copies(halved.path().into()), &Options::new(Target::Mixtral));
    let golden = data("dense/llama_0").join("golden.safetensors");
    let windows = golden_windows(&golden);
    let expected: Vec<f64> = run(&expected, &windows).logits.iter().map(|v| f64::from(*v)).collect();
    for shared in [false, true] {
        let options =
            Options { router: RouterStart::Zero, shared_key_values: shared, ..Options::new(Target::Bam) };
        let (_place, out) = made(&copies(data("dense/llama_0")), &options);
        let difference = max_difference(&run(&out, &windows).logits, &expected);
        assert!(difference < 1e-4, "shared {shared}: {difference:.1e}");
    }
}

/// Table 9 of the paper: totals of its small model with four experts.
#[test]
fn parameters_are_those_of_the_paper() {
    let place = tempfile::tempdir().unwrap();
    let (d, width, layers, vocabulary) = (16u64, 32u64, 2u64, 64u64);
    let dense = place.path().join("dense");
    std::fs::create_dir(&dense).unwrap();
    let config = json!({ "model_type": "cohere", "vocab_size": vocabulary, "hidden_size": d, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "rope_theta": 10000.0, "tie_word_embeddings": false });
    std::fs::write(dense.join("config.json"), config.to_string()).unwrap();
    let mut tensors =
        vec![("model.embed_tokens", vec![64, 16]), ("lm_head", vec![64, 16]), ("model.norm", vec![16])]
            .into_iter()
            .map(|(name, shape)| (name.to_owned(), shape))
            .collect::<Vec<_>>();
    for l in 0..layers {
        tensors.push((format!("model.layers.{l}.input_layernorm"), vec![16]));
        for map in ["q", "k", "v", "o"] {
            tensors.push((format!("model.layers.{l}.self_attn.{map}_proj"), vec![16, 16]));
        }
        for (map, shape) in [("gate", [32, 16]), ("up", [32, 16]), ("down", [16, 32])] {
            tensors.push((format!("model.layers.{l}.mlp.{map}_proj"), shape.into()));
        }
    }
    let tensors: Vec<Tensor> = tensors
        .into_iter()
        .map(|(name, shape)| {
            let values = vec![0.5; shape.iter().product()];
            Tensor::from_f32(format!("{name}.weight"), Dtype::BF16, shape, &values)
        })
        .collect();
    let entries = tensors.iter().map(Entry::tensor).collect();
    write_safetensors(&dense.join("model.safetensors"), &BTreeMap::default(), entries).unwrap();
    for shared in [false, true] {
        let options = Options { shared_key_values: shared, ..Options::new(Target::Bam) };
        let (_place, out) = made(&vec![dense.clone(); 4], &options);
        let attention = if shared { 4 * 2 + 2 } else { 4 * 4 } * d * d;
        let block = attention + 4 * 3 * d * width + 2 * 4 * d + d;
        let found = inspect(&Checkpoint::open(&out).unwrap()).unwrap().parameters.total;
        assert_eq!(found, 2 * vocabulary * d + layers * block + d, "shared {shared}");
    }
}

#[test]
fn the_same_work_is_done_once_and_other_work_needs_another_name() {
    let (_place, out) = made(&llamas(), &Options::new(Target::Bam));
    let file = out.join("model.safetensors");
    let written = std::fs::metadata(&file).unwrap().modified().unwrap();
    let first = upcycle(&llamas(), &Options::new(Target::Bam), &out, &mut ()).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), written);
    let (_other, again) = made(&llamas(), &Options::new(Target::Bam));
    assert!(std::fs::read(&file).unwrap() == std::fs::read(again.join("model.safetensors")).unwrap());
    assert_eq!(first.bytes, Checkpoint::open(&again).unwrap().bytes());
    let other = Options { seed: 1, ..Options::new(Target::Bam) };
    let error = upcycle(&llamas(), &other, &out, &mut ()).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
}

#[test]
fn the_command_makes_a_model_that_other_commands_take() {
    let place = tempfile::tempdir().unwrap();
    for (target, more) in [("mixtral", &[][..]), ("bam", &["--shared-kv", "--seed", "3"])] {
        let out = place.path().join(target);
        let mut arguments = vec!["upcycle".to_owned(), target.into()];
        arguments.extend(llamas().iter().map(|dir| dir.display().to_string()));
        arguments.extend(["--json", "--out"].map(String::from));
        arguments.push(out.display().to_string());
        arguments.extend(more.iter().map(|more| (*more).to_owned()));
        let done = moepress(&arguments).json();
        assert_eq!((&done["family"], &done["experts"]), (&json!(target), &json!(3)));
        let out = out.display().to_string();
        let inspection = moepress(["inspect", &out, "--json"]).json();
        assert_eq!(inspection["parameters"]["total"], done["parameters"]);
        let experts = if target == "bam" { json!(3) } else { json!(null) };
        assert_eq!(inspection["attention"]["experts"], experts);
        let plan = place.path().join("plan.json").display().to_string();
        moepress(["plan", "--method", "random", "--experts", "2", "--model", &out, "--out", &plan]).ok();
        let smaller = format!("{out}-2");
        moepress(["compress", &out, "--plan", &plan, "--out", &smaller]).ok();
        assert_eq!(moepress(["inspect", &smaller, "--json"]).json()["moe_layers"][0]["experts"], 2);
    }
}

#[test]
fn models_that_do_not_go_together_are_refused_in_one_line() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("moe");
    let refused = |dirs: &[&Path], more: &[&str], status: i32, word: &str| {
        let mut arguments = vec!["upcycle".to_owned(), "mixtral".into()];
        arguments.extend(dirs.iter().map(|dir| dir.display().to_string()));
        arguments.extend(["--out".into(), out.display().to_string()]);
        arguments.extend(more.iter().map(|more| (*more).to_owned()));
        let error = moepress(&arguments).error(status);
        assert!(error.contains(word), "{word}: {error}");
        assert!(!out.exists());
    };
    let (first, second) = (data("dense/llama_0"), data("dense/llama_1"));
    refused(&[&first], &[], 2, "2 values");
    refused(&[&first, &data("dense/cohere_0")], &[], 1, "expected one of llama, mistral");
    refused(&[&first, &data("mixtral")], &[], 1, "model_type is \"mixtral\"");
    refused(&[&first, &second], &["--top-k", "3"], 2, "expected 1 to 2");
    refused(&[&first, &second], &["--shared-kv"], 2, "only bam");
    let broken = Mutant::of("dense/llama_1");
    broken.set_config("rope_theta", json!(10_000.0));
    refused(&[&first, broken.path()], &[], 1, "rope_theta is 10000.0, but 50000.0");
    let broken = Mutant::of("dense/llama_1");
    broken.edit_tensors(|tensors| {
        let bias = Tensor::from_f32("b", Dtype::BF16, vec![32], &[0.0; 32]);
        tensors.insert("model.layers.1.self_attn.o_proj.bias".into(), bias);
    });
    refused(&[&first, broken.path()], &[], 1, "o_proj.bias");
    let broken = Mutant::of("dense/llama_1");
    broken.edit_tensors(|tensors| {
        tensors.remove("model.layers.1.mlp.up_proj.weight");
    });
    refused(&[&first, broken.path()], &[], 1, "model.layers.1.mlp.up_proj.weight");
    let broken = Mutant::of("dense/llama_1");
    broken.edit_tensors(|tensors| {
        let name = "model.norm.weight";
        let wide = Tensor::from_f32(name, Dtype::F32, vec![32], &[1.0; 32]);
        tensors.insert(name.into(), wide);
    });
    refused(&[&first, broken.path()], &[], 1, "model.norm.weight is F32, but BF16");
    let broken = Mutant::of("dense/llama_1");
    broken.truncate("model.safetensors", |bytes| bytes / 2);
    refused(&[&first, broken.path()], &[], 1, "model.safetensors");
    let [one, two] = [Mutant::of("dense/llama_0"), Mutant::of("dense/llama_1")];
    for (model, word) in [(&one, "a"), (&two, "b")] {
        let tokenizer = json!({ "model": { "vocab": { word: 0 } }, "added_tokens": [] });
        std::fs::write(model.file("tokenizer.json"), tokenizer.to_string()).unwrap();
    }
    refused(&[one.path(), two.path()], &[], 1, "another vocabulary");
}
