//! Forms of experts through the whole chain: plan, compress, load, run, inspect; and damaged folders.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::compress::{apply, bits, files, plan, tokens};
use common::{Mutant, data, run};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options as CalibrateOptions, Statistics, calibrate};
use moepress::checkpoint::Checkpoint;
use moepress::compress::{FactorOptions, LayoutChoice, Options, apply_layer};
use moepress::model::{FeedForwardSource, HeadScratch, LayerSource, Model, Stream, inspect};
use moepress::plan::{Action, Budget, Plan};

/// Statistics of the test tokens, in `dir`.
fn statistics(model: &Path, second: &[Moment], dir: &Path) -> Statistics {
    let checkpoint = Checkpoint::open(model).unwrap();
    let opened = Model::new(&checkpoint, &Cpu, 24).unwrap();
    let options = CalibrateOptions { second: second.to_vec(), ..Default::default() };
    calibrate(&opened, &tokens(), &options, &dir.join("statistics"), &mut ()).unwrap()
}

/// Logits of the model with the plan applied in memory, nothing written.
fn in_memory(model: &Path, plan: &Plan, statistics: &Statistics, options: FactorOptions) -> Vec<f32> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let windows = tokens();
    let model = Model::new(&checkpoint, &Cpu, windows.length).unwrap();
    let mut stream = Stream::new(&model, &windows).unwrap();
    for l in 0..model.architecture().layers.len() {
        let mut source = LayerSource::open(&checkpoint, model.architecture(), l).unwrap();
        if let (FeedForwardSource::Moe(moe), Some(plan)) =
            (&mut source.feed_forward, plan.layers.iter().find(|p| p.layer == l))
        {
            let moments = statistics.moments(l, &Moment::ALL).unwrap();
            *moe = apply_layer(plan, moe, Some(&moments), options).unwrap().moe;
        }
        stream.advance(&model.prepare(&source).unwrap(), |_, _| Ok(())).unwrap();
    }
    let head = model.head().unwrap();
    let mut work = HeadScratch::new(&Cpu);
    let mut logits = Vec::new();
    for chunk in &stream.chunks {
        logits.extend(head.logits(&Cpu, &chunk.x, 0, chunk.batch.tokens(), &mut work).unwrap());
    }
    logits
}

fn remove(fraction: f64) -> Budget {
    Budget::remove(fraction).unwrap()
}

/// The first error of opening every layer of a checkpoint.
fn refused(dir: &Path) -> String {
    let open = || -> Result<(), String> {
        let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
        let architecture = moepress::model::open_architecture(&checkpoint).map_err(|e| e.to_string())?;
        for l in 0..architecture.layers.len() {
            LayerSource::open(&checkpoint, &architecture, l).map_err(|e| e.to_string())?;
        }
        Ok(())
    };
    open().unwrap_err()
}

/// Writes, loads and runs the plan's result; returns its folder.
fn round_trip(name: &str, plan: &Plan, second: &[Moment], out: &Path) -> std::path::PathBuf {
    let model = data(name);
    let statistics = statistics(&model, second, out);
    let dir = out.join("result");
    let options = Options { statistics: Some(&statistics), ..Options::default() };
    let report = apply(&model, plan, &options, &dir).unwrap();
    let whiten = plan.options.get("whiten").and_then(serde_json::Value::as_bool).unwrap_or(false);
    let factors = FactorOptions { whiten, ..FactorOptions::default() };
    let expected = in_memory(&model, plan, &statistics, factors);
    assert!(bits(&run(&dir, &tokens()).logits) == bits(&expected), "{name}: {}", plan.method);
    assert_eq!(report.bytes_after, plan.expected.bytes, "{name}: {}", plan.method);
    assert_eq!(report.routed_parameters_after, plan.expected.routed_parameters, "{name}: {}", plan.method);

    // The moments may as well be measured on the way.
    let again = out.join("again");
    let windows = tokens();
    apply(&model, plan, &Options { tokens: Some(&windows), ..Options::default() }, &again).unwrap();
    let (first, second) = (files(&dir), files(&again));
    for (file, bytes) in first.iter().filter(|(file, _)| file.ends_with(".safetensors")) {
        assert!(second[file] == *bytes, "{name}: {}: {file} differs", plan.method);
    }
    dir
}

#[test]
fn novices_take_the_place_of_experts() {
    for name in ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v2", "llama4_text"] {
        let out = tempfile::tempdir().unwrap();
        let plan = plan(&data(name), "mone", Some(remove(0.3)), &[]);
        let dir = round_trip(name, &plan, &[], out.path());
        let found = inspect(&Checkpoint::open(&dir).unwrap()).unwrap();
        for (layer, planned) in found.moe_layers.iter().zip(&plan.layers) {
            let novices = planned.experts.iter().filter(|e| e.action == Action::Constant).count();
            assert!(novices > 0);
            assert_eq!(layer.experts, planned.experts.len(), "{name}: the router keeps its rows");
            assert_eq!(layer.forms.get("constant"), Some(&novices), "{name}");
        }
        assert_eq!(found.layout, "moepress");
    }
}

/// An expert that no token chose has the mean 0, and on the compressed prefix the choice is made again.
#[test]
fn novices_of_nothing_and_on_a_compressed_prefix() {
    let out = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let mut unused = plan(&model, "mone", Some(Budget::Experts(2)), &[("propagate", "true")]);
    let windows = tokens();
    let tokens_only = Options { tokens: Some(&windows), ..Options::default() };
    apply(&model, &unused, &tokens_only, &out.path().join("propagated")).unwrap();
    let manifest = Checkpoint::open(out.path().join("propagated")).unwrap().manifest().unwrap().clone();
    for layer in &manifest.layers {
        let constant =
            |e: &&moepress::checkpoint::ExpertEntry| e.form == moepress::checkpoint::ExpertForm::Constant;
        assert_eq!(layer.experts.iter().filter(constant).count(), unused.layers[0].experts.len() - 2);
    }
    // Without tokens there is nothing to measure with.
    let message = apply(&model, &unused, &Options::default(), &out.path().join("none")).unwrap_err();
    assert_eq!(message, "the plan has propagate=true, which measures while compressing: give --tokens");
    unused.options.remove("propagate");
    let message = apply(&model, &unused, &Options::default(), &out.path().join("none")).unwrap_err();
    assert_eq!(
        message,
        "the plan replaces experts by their mean output, which has to be measured: give --tokens, or --stats from \
         calibrate"
    );
    let message = apply(
        &model,
        &unused,
        &Options { layout: LayoutChoice::HuggingFace, tokens: Some(&windows), ..Options::default() },
        &out.path().join("none"),
    );
    assert!(message.unwrap_err().contains("no stock checkpoint can hold `constant`"));
    assert!(!out.path().join("none").exists());
}

/// A folder in the moepress layout, to be broken in one place.
fn damaged(plan: &Plan, model: &str, options: &Options<'_>, edit: impl FnOnce(&Mutant)) -> String {
    let mutant = Mutant::of(model);
    let dir = mutant.path().join("result");
    let options = Options {
        layout: LayoutChoice::Moepress,
        ..Options { tokens: options.tokens, ..Options::default() }
    };
    apply(mutant.path(), plan, &options, &dir).unwrap();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        std::fs::rename(&path, mutant.file(path.file_name().unwrap().to_str().unwrap())).unwrap();
    }
    edit(&mutant);
    let message = refused(mutant.path());
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn damaged_constants_are_named() {
    let windows = tokens();
    let options = Options { tokens: Some(&windows), ..Options::default() };
    let mut plan = plan(&data("mixtral"), "mone", Some(Budget::Experts(3)), &[]);
    for (e, entry) in plan.layers[0].experts.iter_mut().enumerate() {
        entry.action = if e == 1 { Action::Constant } else { Action::Keep };
    }
    let name = "model.layers.0.block_sparse_moe.experts.1.constant";
    let missing = damaged(&plan, "mixtral", &options, |m| {
        m.edit_tensors(|tensors| drop(tensors.remove(name).unwrap()));
    });
    assert!(missing.contains(name), "{missing}");
    let shape = damaged(&plan, "mixtral", &options, |m| {
        m.edit_tensors(|tensors| {
            let short = tensors[name].rows(0, 7);
            tensors.insert(name.into(), short);
        });
    });
    assert!(shape.contains(name) && shape.contains("[7]"), "{shape}");
    let form = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replace("\"constant\"", "\"novice\""));
    });
    assert!(form.contains("moepress.json") && form.contains("novice"), "{form}");
}
