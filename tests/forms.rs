//! Forms of experts through the whole chain: plan, compress, load, run, inspect; and damaged folders.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::compress::{apply, bits, files, options, plan, tokens};
use common::generate::{self, Sizes};
use common::{Mutant, data, run};
use moepress::backend::cpu::Cpu;
use moepress::backend::{Expert, Matrix as Form, Moment};
use moepress::calibrate::{Options as CalibrateOptions, Statistics, calibrate};
use moepress::checkpoint::{Checkpoint, Dtype, Tensor, Weight};
use moepress::compress::{
    ApplyOptions, FactorOptions, LayoutChoice, Options, Weights, Whitening, apply_layer, factorise,
    factorise_with_rows,
};
use moepress::linalg::{Matrix, Threads, data_loss};
use moepress::model::{
    FeedForwardSource, HeadScratch, LayerSource, Model, Stream, inspect, open_architecture, profile,
};
use moepress::plan::{Action, Budget, Channels, OutlierSource, Plan, Ranks, Request, RouterSource, method};

/// Statistics of the test tokens, in `dir`.
fn statistics(model: &Path, second: &[Moment], dir: &Path) -> Statistics {
    let checkpoint = Checkpoint::open(model).unwrap();
    let opened = Model::new(&checkpoint, &Cpu, 24).unwrap();
    let options = CalibrateOptions { second: second.to_vec(), ..Default::default() };
    calibrate(&opened, &tokens(), &options, &dir.join("statistics"), &mut ()).unwrap()
}

/// Logits of the model with the plan applied in memory, nothing written.
fn in_memory(model: &Path, plan: &Plan, statistics: &Statistics) -> Vec<f32> {
    let options = ApplyOptions::of(plan, false).unwrap();
    let checkpoint = Checkpoint::open(model).unwrap();
    let windows = tokens();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
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
    let expected = in_memory(&model, plan, &statistics);
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

/// A low-rank plan with dense rows beside the factors of gate and down.
fn with_rows(model: &str, whiten: &str) -> Plan {
    let mut plan = plan(&data(model), "low-rank", Some(remove(0.5)), &[("whiten", whiten)]);
    for entry in plan.layers.iter_mut().flat_map(|l| &mut l.experts) {
        let Action::LowRank { rows, .. } = &mut entry.action else { unreachable!() };
        *rows = Ranks { gate: Some(3), up: None, down: Some(5) };
    }
    let checkpoint = Checkpoint::open(data(model)).unwrap();
    let profile = profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap();
    plan.expected = plan.expect(&profile).unwrap();
    plan
}

#[test]
fn dense_rows_beside_factors() {
    for (name, whiten) in [("mixtral", "true"), ("gpt_oss", "false"), ("qwen2_moe", "true")] {
        let out = tempfile::tempdir().unwrap();
        let plan = with_rows(name, whiten);
        let dir = round_trip(name, &plan, &[Moment::InputGram, Moment::HiddenGram], out.path());
        let found = inspect(&Checkpoint::open(&dir).unwrap()).unwrap();
        let experts = plan.layers[0].experts.len();
        assert!(found.moe_layers.iter().all(|l| l.forms["low_rank_rows"] == experts), "{name}");
        let routed: u64 = found.moe_layers.iter().map(|l| l.parameters).sum();
        assert_eq!(routed, plan.expected.routed_parameters, "{name}");
        // Multiplied back the same function, up to rounding.
        let dense = out.path().join("dense");
        let windows = tokens();
        let options = Options { densify: true, tokens: Some(&windows), ..Options::default() };
        apply(&data(name), &plan, &options, &dense).unwrap();
        let (a, b) = (run(&dir, &windows).logits, run(&dense, &windows).logits);
        let difference = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(difference < rounding(name), "{name}: {difference}");
    }
}

/// How far logits may be from those of the matrices multiplied back, which are rounded to the type of the weights.
fn rounding(model: &str) -> f32 {
    if ["gpt_oss", "llama4_text"].contains(&model) { 0.1 } else { 3e-5 }
}

/// The rows are copies of the matrix, the factors leave them alone, and nothing is lost by them.
#[test]
fn dense_rows_are_exact_and_lower_the_loss() {
    let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
    let architecture = open_architecture(&checkpoint).unwrap();
    let source = LayerSource::open(&checkpoint, &architecture, 0).unwrap();
    let Expert::Mlp(mlp) = &source.moe().unwrap().experts[1] else { unreachable!() };
    let Form::Dense(weight) = &mlp.down.weight else { unreachable!() };
    let (out, input) = (weight.rows(), weight.cols());
    let w = Matrix::from_f32(out, input, &weight.to_f32()).unwrap();
    let x = |i: usize| ((i * 31 + i * i * 7) % 17) as f64 - 8.0;
    let x = Matrix::new(input + 3, input, (0..(input + 3) * input).map(x).collect()).unwrap();
    let gram = x.transpose().matmul(&x).unwrap();
    let options = FactorOptions { dtype: Some(Dtype::F32), ..FactorOptions::default() };
    for whitening in [Whitening::None, Whitening::Gram(gram.as_slice())] {
        let matrix = |m: &Weight| Matrix::from_f32(m.rows(), m.cols(), &m.to_f32()).unwrap();
        let loss = |a: &Matrix| match whitening {
            Whitening::None => data_loss(&w, a, &Matrix::identity(input)).unwrap(),
            Whitening::Gram(_) => data_loss(&w, a, &gram).unwrap(),
        };
        let Form::LowRank { u, v } = factorise(weight, 4, whitening, options).unwrap() else {
            unreachable!()
        };
        let without = loss(&matrix(&u).matmul(&matrix(&v)).unwrap());
        let mut last = without;
        for count in [1, 6, out - 2, out] {
            let form = factorise_with_rows(weight, 4, count, whitening, options, Threads::All).unwrap();
            let Form::LowRankRows { u, v, rows, s } = form else { unreachable!() };
            assert_eq!((u.rows(), u.cols(), v.rows(), rows.len()), (out, 4, 4, count));
            let mut product = matrix(&u).matmul(&matrix(&v)).unwrap();
            for (i, &row) in rows.iter().enumerate() {
                let row = row as usize;
                assert!(product.row(row).iter().all(|v| *v == 0.0));
                let copy = &s.to_f32()[i * input..(i + 1) * input];
                assert_eq!(copy, &weight.to_f32()[row * input..(row + 1) * input]);
                product.as_mut_slice()[row * input..(row + 1) * input].copy_from_slice(w.row(row));
            }
            let now = loss(&product);
            assert!(now <= last + 1e-9 * without, "{count} rows: {now} after {last}");
            last = now;
        }
        assert!(last <= 1e-9 * without, "{last}");
    }
}

#[test]
fn damaged_rows_are_named() {
    let windows = tokens();
    let options = Options { tokens: Some(&windows), ..Options::default() };
    let plan = with_rows("mixtral", "false");
    let name = "model.layers.1.block_sparse_moe.experts.2.w2.rows";
    let with = |values: &'static [i32]| {
        damaged(&plan, "mixtral", &options, |m| {
            m.edit_tensors(|tensors| {
                tensors.insert(name.into(), Tensor::from_i32(name, vec![values.len()], values));
            });
        })
    };
    for values in [&[0, 1, 2, 4, 3][..], &[0, 1, 2, 3, 3], &[-1, 0, 1, 2, 3], &[0, 1, 2, 3, 1000]] {
        let message = with(values);
        assert!(message.contains(name) && message.contains("ascending"), "{message}");
    }
    let short = with(&[1, 2]);
    assert!(short.contains(name) && short.contains("[2]") && short.contains("[5]"), "{short}");
    let kind = damaged(&plan, "mixtral", &options, |m| {
        m.edit_tensors(|tensors| {
            tensors.insert(name.into(), Tensor::from_f32(name, Dtype::F32, vec![5], &[0.0; 5]));
        });
    });
    assert!(kind.contains(name) && kind.contains("I32"), "{kind}");
    let rows = "model.layers.1.block_sparse_moe.experts.2.w2.s";
    let missing = damaged(&plan, "mixtral", &options, |m| {
        m.edit_tensors(|tensors| drop(tensors.remove(rows).unwrap()));
    });
    assert!(missing.contains(rows), "{missing}");
    let lonely = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replacen("\"gate\": 3", "\"up\": 1, \"gate\": 3", 1));
    });
    assert!(lonely.contains("moepress.json"), "{lonely}");
    let width = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replacen("\"form\"", "\"width\": 1000, \"form\"", 1));
    });
    assert!(width.contains("expert 0 has width 1000") && width.contains("expected at most"), "{width}");
    let empty = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replacen("\"form\"", "\"width\": 0, \"form\"", 1));
    });
    assert!(empty.contains("moepress.json") && empty.contains("expert 0 has width 0"), "{empty}");
}

const SECOND: [Moment; 3] = [Moment::InputGram, Moment::HiddenGram, Moment::GateHiddenGram];

#[test]
fn channels_go_and_widths_differ() {
    for (name, method, set) in [
        ("mixtral", "camera", &[("refit", "plain")][..]),
        ("mixtral", "modegpt", &[("refit", "anchored")]),
        ("gpt_oss", "camera", &[("criterion", "energy"), ("refit", "refit")]),
        ("qwen2_moe", "modegpt", &[("criterion", "leverage-unit")]),
        ("deepseek_v3_fp8", "camera", &[("allocate", "uniform")]),
        ("llama4_text", "camera", &[]),
    ] {
        let out = tempfile::tempdir().unwrap();
        let plan = plan(&data(name), method, Some(remove(0.4)), set);
        let dir = round_trip(name, &plan, &SECOND, out.path());
        let found = inspect(&Checkpoint::open(&dir).unwrap()).unwrap();
        let removed = 1.0
            - plan.expected.routed_parameters as f64
                / inspect(&Checkpoint::open(data(name)).unwrap()).unwrap().parameters.routed_experts as f64;
        assert!((removed - 0.4).abs() < 0.06, "{name}: {removed}");
        for (layer, planned) in found.moe_layers.iter().zip(&plan.layers) {
            assert_eq!(layer.forms.get("dense"), Some(&planned.experts.len()), "{name}");
            let [least, most] = layer.widths.unwrap();
            let uniform = method == "modegpt" || set.contains(&("allocate", "uniform"));
            assert!(most < layer.width || !uniform || found.layout == "hf", "{name}");
            assert_eq!(least == most, uniform, "{name}: {least} to {most}");
        }
    }
}

/// The same width everywhere is a number in `config.json`, unless other MLPs have the same one.
#[test]
fn a_uniform_width_gives_a_stock_checkpoint() {
    for (name, stock) in
        [("mixtral", true), ("qwen2_moe", true), ("olmoe_clip", true), ("deepseek_v2", false)]
    {
        let out = tempfile::tempdir().unwrap();
        let plan = plan(&data(name), "modegpt", Some(remove(0.5)), &[("refit", "plain")]);
        let windows = tokens();
        let with = |layout| Options { layout, tokens: Some(&windows), ..Options::default() };
        let (auto, own) = (out.path().join("auto"), out.path().join("own"));
        let report = apply(&data(name), &plan, &with(LayoutChoice::Auto), &auto).unwrap();
        assert_eq!(report.layout, if stock { "hf" } else { "moepress" }, "{name}");
        apply(&data(name), &plan, &with(LayoutChoice::Moepress), &own).unwrap();
        assert!(bits(&run(&auto, &windows).logits) == bits(&run(&own, &windows).logits), "{name}");
        let config = |dir: &Path| Checkpoint::open(dir).unwrap().config().to_string();
        let (before, after) = (config(&data(name)), config(&auto));
        let changed = before.lines().zip(after.lines()).filter(|(a, b)| a != b).count();
        assert_eq!(changed, usize::from(stock), "{name}");
        if !stock {
            let refused = apply(&data(name), &plan, &with(LayoutChoice::HuggingFace), &out.path().join("no"));
            assert!(refused.unwrap_err().contains("the same number for the width"), "{name}");
        }
    }
}

/// Channels that are listed: as if the columns of the down matrix had been set to 0.
#[test]
fn listed_channels_are_those_that_stay() {
    let out = tempfile::tempdir().unwrap();
    let mut plan = plan(&data("mixtral"), "random", Some(remove(0.3)), &[]);
    let width = inspect(&Checkpoint::open(data("mixtral")).unwrap()).unwrap().moe_layers[0].width;
    let gone = |e: usize, c: usize| (c * 7 + e).is_multiple_of(3);
    for entry in plan.layers.iter_mut().flat_map(|l| &mut l.experts) {
        let keep = (0..width).filter(|c| !gone(entry.expert, *c)).collect();
        entry.action = Action::Channels { keep: Channels::List(keep) };
    }
    let dir = out.path().join("narrow");
    apply(&data("mixtral"), &plan, &Options::default(), &dir).unwrap();
    let zeroed = Mutant::of("mixtral");
    for layer in &plan.layers {
        for entry in &layer.experts {
            let name =
                format!("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", layer.layer, entry.expert);
            zeroed.edit_values(&name, |values| {
                for (i, value) in values.iter_mut().enumerate() {
                    if gone(entry.expert, i % width) {
                        *value = 0.0;
                    }
                }
            });
        }
    }
    let (a, b) = (run(&dir, &tokens()).logits, run(zeroed.path(), &tokens()).logits);
    let difference = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-5, "{difference}");
}

/// Statistics without what the plan needs: one line that says which flag measures it.
#[test]
fn what_was_not_measured_is_named() {
    let out = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let bare = statistics(&model, &[], out.path());
    let message = |method: &str, set: &[(&str, &str)]| {
        let plan = plan(&model, method, Some(remove(0.4)), set);
        let options = Options { statistics: Some(&bare), ..Options::default() };
        let message = apply(&model, &plan, &options, &out.path().join("no")).unwrap_err();
        assert!(message.contains("give --tokens") && !message.contains('\n'), "{message}");
        message
    };
    for (method, set, flag) in [
        ("camera", &[("refit", "refit")][..], "--moments gate-hidden, or plan with --set refit=plain"),
        ("modegpt", &[("refit", "plain")], "--moments hidden"),
        ("d2-moe", &[], "--moments input,hidden, or plan with --set whiten=false"),
        (
            "d2-moe",
            &[("base", "gram"), ("whiten", "false")],
            "--moments input,hidden, or plan with --set base=",
        ),
    ] {
        let message = message(method, set);
        assert!(message.contains(flag), "{message}");
    }
}

/// The base once per token and the differences, against the same experts multiplied out; and what is measured of them.
#[test]
fn a_base_and_differences_run_as_their_sum() {
    for (name, set) in [
        ("mixtral", &[("base", "frequency")][..]),
        ("gpt_oss", &[("base", "mean"), ("whiten", "false")]),
        ("llama4_text", &[("base", "gram")]),
        ("deepseek_v2", &[("base", "mean")]),
    ] {
        let out = tempfile::tempdir().unwrap();
        let mut plan = plan(&data(name), "d2-moe", Some(remove(0.3)), set);
        if name == "mixtral" {
            // In any mixture with other forms.
            plan.layers[0].experts[1].action = Action::Keep;
            plan.layers[1].experts[0].action = Action::Constant;
            let checkpoint = Checkpoint::open(data(name)).unwrap();
            let sizes = profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap();
            plan.expected = plan.expect(&sizes).unwrap();
        }
        let dir = round_trip(name, &plan, &SECOND, out.path());
        let found = inspect(&Checkpoint::open(&dir).unwrap()).unwrap();
        assert!(found.moe_layers.iter().all(|l| l.forms["delta"] > 1), "{name}");
        assert_eq!(found.parameters.routed_experts, plan.expected.routed_parameters, "{name}");
        let dense = out.path().join("dense");
        let windows = tokens();
        let options = Options { densify: true, tokens: Some(&windows), ..Options::default() };
        apply(&data(name), &plan, &options, &dense).unwrap();
        let (a, b) = (run(&dir, &windows).logits, run(&dense, &windows).logits);
        let difference = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(difference < rounding(name), "{name}: {difference}");
        let [delta, whole] = [&dir, &dense].map(|model| {
            let out = tempfile::tempdir().unwrap();
            statistics(model, &[Moment::HiddenGram], out.path()).first_moments().unwrap()
        });
        for (delta, whole) in delta.iter().zip(&whole) {
            for moment in [Moment::NormSum, Moment::GateNormSum, Moment::OutputSum, Moment::SampleOutputSum] {
                let (a, b) = (delta.get(moment).unwrap(), whole.get(moment).unwrap());
                let scale = b.iter().map(|v| v.abs()).fold(1e-9, f64::max);
                let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                let bound = f64::from(rounding(name)) * 3.0;
                assert!(worst < bound * scale, "{name}: {moment:?} {worst} of {scale}");
            }
        }
    }
}

/// A plan that may look at the weights; `None` for statistics leaves them out.
fn weighed(
    model: &Path,
    method_name: &str,
    budget: Budget,
    set: &[(&str, &str)],
    statistics: Option<&Statistics>,
) -> Result<Plan, String> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let architecture = open_architecture(&checkpoint).unwrap();
    let sizes = profile(&checkpoint, &architecture).unwrap();
    let moments = statistics.map(|s| s.first_moments().unwrap());
    let (weights, options) = (Weights::new(&checkpoint, &architecture), options(set));
    let request = Request {
        statistics: moments.as_deref(),
        budget: Some(budget),
        options: &options,
        outliers: Some(&weights as &dyn OutlierSource),
        routers: Some(&weights as &dyn RouterSource),
        ..Request::new(&sizes)
    };
    method(method_name).unwrap().plan(&request).map_err(|e| e.to_string())
}

/// Layers with more outliers lose less, whatever the method spends, and all together what was asked for.
#[test]
fn layers_with_outliers_lose_less() {
    let out = tempfile::tempdir().unwrap();
    let model = &out.path().join("model");
    generate::mixtral(model, &Sizes { layers: 2, hidden: 64, width: 64, experts: 8 });
    let measured = statistics(model, &[], out.path());
    let owl = |method: &str, budget: Budget, set: &[(&str, &str)]| {
        let set = [&[("layer_ratio", "owl"), ("owl_lambda", "0.2"), ("owl_m", "2")], set].concat();
        weighed(model, method, budget, &set, Some(&measured))
    };
    let before = measured.profile().routed_parameters();
    let checkpoint = Checkpoint::open(model).unwrap();
    let architecture = open_architecture(&checkpoint).unwrap();
    let outliers: Vec<f64> = (0..2)
        .map(|l| {
            let moments = measured.moments(l, &[Moment::InputSqSum, Moment::HiddenSqSum]).unwrap();
            let of = |moment| moments.get(moment).unwrap();
            let weights = Weights::new(&checkpoint, &architecture);
            weights.outliers(l, of(Moment::InputSqSum), of(Moment::HiddenSqSum), 2.0).unwrap()
        })
        .collect();
    // Uniform numbers reach twice their mean and no further; norms of the inputs make the outliers.
    assert!(outliers.iter().all(|share| *share > 0.0 && *share < 0.5), "{outliers:?}");
    for method in ["random", "reap", "mone", "low-rank", "camera", "modegpt", "d2-moe"] {
        let plan = owl(method, remove(0.5), &[]).unwrap();
        let one = |l: usize| {
            let mut alone = plan.clone();
            for (i, layer) in alone.layers.iter_mut().enumerate() {
                if i != l {
                    layer.experts.iter_mut().for_each(|e| e.action = Action::Keep);
                }
            }
            alone.expect(measured.profile()).unwrap().removed_fraction
        };
        // Of two layers one loses the mean and λ, the other the mean without it; a half each of all parameters.
        let more = usize::from(outliers[0] > outliers[1]);
        let found = one(more) - one(1 - more);
        assert!((found - 0.2).abs() < 0.07, "{method}: {} and {}", one(0), one(1));
        let removed = 1.0 - plan.expected.routed_parameters as f64 / before as f64;
        assert!((removed - 0.5).abs() < 0.07, "{method}: {removed}");
    }
    let error = owl("reap", Budget::Experts(4), &[]).unwrap_err();
    assert_eq!(error, "--experts 4: layer_ratio=owl divides a share of the parameters; use --remove");
    let error = owl("reap", remove(0.3), &[("scope", "global")]).unwrap_err();
    assert!(error.contains("scope=global"), "{error}");
    let error = owl("low-rank", remove(0.9), &[]).unwrap_err();
    assert!(error.contains("owl_lambda") || error.contains("--remove"), "{error}");
    let error = weighed(model, "random", remove(0.5), &[("layer_ratio", "owl")], None).unwrap_err();
    assert!(error.contains("layer_ratio=owl needs"), "{error}");
}

#[test]
fn experts_whose_router_grew_least_go() {
    let tuned = Mutant::of("mixtral");
    let name = "model.layers.0.block_sparse_moe.gate.weight";
    let hidden = inspect(&Checkpoint::open(data("mixtral")).unwrap()).unwrap().hidden_size;
    tuned.edit_values(name, |values| {
        for (e, row) in values.chunks_exact_mut(hidden).enumerate() {
            let factor = [1.5, 0.7, 1.2, 1.01, 1.3, 1.4, 1.6, 1.7].get(e).copied().unwrap_or(2.0);
            for value in row {
                *value *= factor;
            }
        }
    });
    let pretrained = data("mixtral");
    let dir = |path: &Path| path.to_str().unwrap().to_string();
    let make = |pretrained: &str, set: &[(&str, &str)]| {
        let set = [&[("pretrained", pretrained)], set].concat();
        let experts = inspect(&Checkpoint::open(data("mixtral")).unwrap()).unwrap().moe_layers[0].experts;
        weighed(tuned.path(), "router-norm", Budget::Experts(experts - 1), &set, None)
    };
    let plan = make(&dir(&pretrained), &[]).unwrap();
    assert_eq!(plan.layers[0].dropped().collect::<Vec<_>>(), [1]);
    // Nothing changed in the other layer: the last of equals goes.
    assert_eq!(plan.layers[1].dropped().collect::<Vec<_>>(), [plan.layers[1].experts.len() - 1]);
    let other = make(&dir(&data("qwen2_moe")), &[]).unwrap_err();
    assert!(other.contains("qwen2_moe") && other.contains("another model"), "{other}");
    let nowhere = make("/no/such/folder", &[]).unwrap_err();
    assert!(nowhere.contains("/no/such/folder"), "{nowhere}");
    let unsaid = weighed(tuned.path(), "router-norm", remove(0.3), &[], None).unwrap_err();
    assert!(unsaid.contains("--set pretrained=DIR"), "{unsaid}");
}

/// Where combine weights multiply the input, they multiply the base's share of gate and up too.
#[test]
fn a_base_of_weighted_inputs() {
    let model = Mutant::of("llama4_text");
    model.edit_tensors(|tensors| {
        for tensor in tensors.values_mut() {
            let values = tensor.to_f32().unwrap();
            *tensor = Tensor::from_f32(tensor.name(), Dtype::F32, tensor.shape().to_vec(), &values);
        }
    });
    let plan = plan(model.path(), "d2-moe", Some(remove(0.3)), &[("whiten", "false"), ("base", "mean")]);
    let (delta, dense) = (model.path().join("delta"), model.path().join("dense"));
    apply(model.path(), &plan, &Options::default(), &delta).unwrap();
    apply(model.path(), &plan, &Options { densify: true, ..Options::default() }, &dense).unwrap();
    let (a, b) = (run(&delta, &tokens()).logits, run(&dense, &tokens()).logits);
    let difference = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(difference < 3e-5, "{difference}");
}

#[test]
fn damaged_bases_are_named() {
    let windows = tokens();
    let options = Options { tokens: Some(&windows), ..Options::default() };
    let plan = plan(&data("mixtral"), "d2-moe", Some(remove(0.3)), &[]);
    let name = "model.layers.1.block_sparse_moe.experts.base.w3.weight";
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
    assert!(shape.contains(name) && shape.contains("[7, "), "{shape}");
    let rank = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replacen("\"gate\": ", "\"gate\": 1", 1));
    });
    assert!(rank.contains("experts.0.w1.u"), "{rank}");
    let narrow = damaged(&plan, "mixtral", &options, |m| {
        m.edit_text("moepress.json", |text| text.replacen("\"form\"", "\"width\": 4, \"form\"", 1));
    });
    assert!(narrow.contains("expert 0 has a width"), "{narrow}");
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
