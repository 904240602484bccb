//! Experts merged into others: what is stored, what runs, and what is refused.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::Path;

use common::command::moepress;
use common::compress::{apply, bits, files, plan, tokens};
use common::{Mutant, Trace, data, run};
use moepress::architecture::Projection;
use moepress::backend::cpu::Cpu;
use moepress::backend::{Expert, Linear, Matrix, Mlp, StoredExpert};
use moepress::checkpoint::{Checkpoint, Dtype, Tensor, encode_f64};
use moepress::compress::{
    FactorOptions, LayoutChoice, Matching, Options, Whitening, align, apply_layer, factorise,
};
use moepress::model::{
    FeedForwardSource, HeadScratch, LayerSource, LinearSource, Model, MoeSource, Stream, inspect,
    open_architecture, profile,
};
use moepress::plan::{Action, Budget, MergedRows, Plan};

const MODELS: [&str; 9] = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe_fused",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "phimoe",
    "llama4_text",
];
const MOEPRESS: Options<'_> =
    Options { layout: LayoutChoice::Moepress, densify: false, tokens: None, statistics: None };
const STOCK: Options<'_> =
    Options { layout: LayoutChoice::HuggingFace, densify: false, tokens: None, statistics: None };

/// A plan that keeps every expert but those listed, which go `(expert, into, weight)` in every layer.
fn merging(model: &Path, merges: &[(usize, usize, f64)], router: MergedRows, aligned: bool) -> Plan {
    let checkpoint = Checkpoint::open(model).unwrap();
    let profile = profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap();
    let mut plan = plan(model, "random", Some(Budget::Experts(profile.moe_layers[0].experts - 1)), &[]);
    plan.options = [("align".into(), aligned.into())].into();
    for layer in &mut plan.layers {
        layer.router = router;
        layer.experts.iter_mut().for_each(|e| e.action = Action::Keep);
        for &(expert, into, weight) in merges {
            layer.experts[expert].action = Action::Merge { into, weight };
        }
    }
    plan.expected = plan.expect(&profile).unwrap();
    plan
}

/// The first MoE layer of a checkpoint.
fn moe(model: &Path) -> MoeSource {
    let checkpoint = Checkpoint::open(model).unwrap();
    let architecture = open_architecture(&checkpoint).unwrap();
    let (l, _) = architecture.moe_layers().next().unwrap();
    LayerSource::open(&checkpoint, &architecture, l).unwrap().moe().unwrap().clone()
}

fn dense(expert: &StoredExpert) -> Mlp<LinearSource> {
    let Expert::Mlp(mlp) = expert else { panic!("{}", expert.form()) };
    mlp.try_map(|m| {
        let Matrix::Dense(w) = &m.weight else { return Err("not dense") };
        Ok(Linear { weight: w.clone(), bias: m.bias.clone() })
    })
    .unwrap()
}

/// The weighted mean of the listed experts' matrices and biases as they are stored, computed on its own.
fn mean(moe: &MoeSource, shares: &[(usize, f64)]) -> Vec<(Dtype, Vec<u8>)> {
    let experts: Vec<_> = shares.iter().map(|(e, share)| (dense(&moe.experts[*e]), *share)).collect();
    let mut all = Vec::new();
    for p in Projection::ALL {
        let parts: Vec<(Vec<f32>, f64)> =
            experts.iter().map(|(m, share)| (m.map(p).unwrap().weight.to_f32(), *share)).collect();
        let first = experts[0].0.map(p).unwrap();
        all.push((first.weight.replacement_dtype(), parts));
        if let Some(bias) = &first.bias {
            let bias_of = |m: &Mlp<LinearSource>| m.map(p).unwrap().bias.as_ref().unwrap().to_f32().unwrap();
            all.push((bias.dtype(), experts.iter().map(|(m, share)| (bias_of(m), *share)).collect()));
        }
    }
    let sum = |(dtype, parts): (Dtype, Vec<(Vec<f32>, f64)>)| {
        let value = |i: usize| parts.iter().map(|(v, share)| share * f64::from(v[i])).sum::<f64>();
        let values: Vec<f64> = (0..parts[0].0.len()).map(value).collect();
        (dtype, encode_f64(dtype, &values))
    };
    all.into_iter().map(sum).collect()
}

/// What an expert holds, in the order of [`mean`].
fn stored(expert: &StoredExpert) -> Vec<(Dtype, Vec<u8>)> {
    let mlp = dense(expert);
    let mut all = Vec::new();
    for map in mlp.maps() {
        let weight = &map.weight.tensors("")[0];
        all.push((weight.dtype(), weight.bytes().to_vec()));
        all.extend(map.bias.iter().map(|b| (b.dtype(), b.bytes().to_vec())));
    }
    all
}

/// Logits of `model` with `change` applied to the experts of every layer.
fn run_changed(model: &Path, change: impl Fn(usize, &mut MoeSource)) -> Vec<f32> {
    let windows = tokens();
    let checkpoint = Checkpoint::open(model).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let mut stream = Stream::new(&model, &windows).unwrap();
    for l in 0..model.architecture().layers.len() {
        let mut source = LayerSource::open(&checkpoint, model.architecture(), l).unwrap();
        if let FeedForwardSource::Moe(moe) = &mut source.feed_forward {
            change(l, moe);
        }
        stream.advance(&model.prepare(&source).unwrap(), |_, _| Ok(())).unwrap();
    }
    let (head, mut work) = (model.head().unwrap(), HeadScratch::new(&Cpu));
    let logits =
        |c: &moepress::model::Chunk<Cpu>| head.logits(&Cpu, &c.x, 0, c.batch.tokens(), &mut work).unwrap();
    stream.chunks.iter().flat_map(logits).collect()
}

fn close(a: &[f32], b: &[f32], what: &str) {
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(a.len() == b.len() && off < 2e-4, "{what}: off by {off}");
}

/// Every kind of storage, biases included: the stored mean is the one computed apart, rounded once; the router sends
/// both experts there, where each could as well run on its own; sizes are those of the plan.
#[test]
fn merged_experts_are_the_rounded_mean_and_redirected() {
    let out = tempfile::tempdir().unwrap();
    for name in MODELS {
        let (model, dir) = (data(name), out.path().join(name));
        let plan = merging(&model, &[(0, 2, 0.3), (3, 2, 0.125)], MergedRows::Redirect, false);
        let report = apply(&model, &plan, &Options::default(), &dir).unwrap();
        assert_eq!((report.layout, report.bytes_after), ("moepress", plan.expected.bytes), "{name}");
        assert_eq!(report.routed_parameters_after, plan.expected.routed_parameters, "{name}");
        let (before, after) = (moe(&model), moe(&dir));
        let expected = mean(&before, &[(2, 1.0 - (0.3 + 0.125)), (0, 0.3), (3, 0.125)]);
        assert!(stored(&after.experts[2]) == expected, "{name}");
        for expert in [0, 3] {
            assert!(matches!(after.experts[expert], Expert::Alias(2)), "{name}");
        }
        let forms = &inspect(&Checkpoint::open(&dir).unwrap()).unwrap().moe_layers[0].forms;
        assert_eq!(forms["alias"], 2, "{name}");
        let Trace { logits, .. } = run(&dir, &tokens());
        let separate = run_changed(&dir, |_, moe| {
            for slot in 0..moe.experts.len() {
                if let Expert::Alias(of) = moe.experts[slot] {
                    moe.experts[slot] = moe.experts[of].clone();
                }
            }
        });
        close(&logits, &separate, name);
    }
}

/// With `router=fuse` the merged rows go, in both layouts to the same effect, and only then a stock checkpoint can hold it.
#[test]
fn fused_routers_make_a_stock_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    let merges = [(0, 2, 0.3)];
    for name in MODELS {
        let model = data(name);
        let fused = merging(&model, &merges, MergedRows::Fuse, true);
        let (own, stock) = (out.path().join(format!("{name} own")), out.path().join(format!("{name} stock")));
        let report = apply(&model, &fused, &MOEPRESS, &own).unwrap();
        assert_eq!(report.bytes_after, fused.expected.bytes, "{name}");
        let experts = fused.layers[0].experts.len();
        assert_eq!((moe(&own).experts.len(), moe(&own).router.weight.shape()[0]), (experts - 1, experts - 1));
        let checkpoint = Checkpoint::open(&model).unwrap();
        let architecture = open_architecture(&checkpoint).unwrap();
        if architecture.packing.is_some() || architecture.moe_layers().any(|(_, m)| m.router.groups.is_some())
        {
            let why = apply(&model, &fused, &STOCK, &stock).unwrap_err();
            assert!(why.contains("merged experts are not packed") || why.contains("groups"), "{name}: {why}");
        } else {
            assert_eq!(apply(&model, &fused, &STOCK, &stock).unwrap().layout, "hf");
            assert_eq!(bits(&run(&own, &tokens()).logits), bits(&run(&stock, &tokens()).logits), "{name}");
        }
        let redirected = merging(&model, &merges, MergedRows::Redirect, true);
        let why = apply(&model, &redirected, &STOCK, &stock).unwrap_err();
        assert!(why.contains("no stock checkpoint can hold `merge` without router=fuse"), "{name}: {why}");
        assert!(redirected.expected.bytes > fused.expected.bytes, "{name}");
    }
}

/// The order of the neurons of expert `to` of the first MoE layer becomes another, its function stays.
fn permute(moe: &MoeSource, from: usize, order: &[usize]) -> Vec<Tensor> {
    let mlp = dense(&moe.experts[from]);
    let [gate, up, down] = Projection::ALL.map(|p| mlp.map(p).unwrap().weight.tensors("").swap_remove(0));
    let columns = |t: &Tensor| {
        let (values, width) = (t.to_f32().unwrap(), order.len());
        let permuted: Vec<f32> =
            values.chunks_exact(width).flat_map(|row| order.iter().map(|&j| row[j])).collect();
        Tensor::from_f32("", t.dtype(), t.shape().to_vec(), &permuted)
    };
    vec![gate.select_rows(order), up.select_rows(order), columns(&down)]
}

/// An expert that is another one in disguise: its neurons are found again, and merging the two changes nothing.
#[test]
fn a_planted_permutation_is_recovered() {
    let mutant = Mutant::of("qwen2_moe");
    let original = moe(mutant.path());
    let width = dense(&original.experts[1]).gate.weight.rows();
    let order: Vec<usize> = (0..width).map(|i| (i * 5 + 3) % width).collect();
    assert!(!width.is_multiple_of(5), "else it is no permutation");
    let planted = permute(&original, 1, &order);
    let names = ["gate_proj", "up_proj", "down_proj"];
    mutant.edit_tensors(|tensors| {
        let prefix: String = tensors.keys().find(|n| n.contains(".experts.0.")).unwrap().clone();
        let prefix = prefix.split(".experts.").next().unwrap().to_string();
        for (name, tensor) in names.iter().zip(planted) {
            tensors.insert(format!("{prefix}.experts.3.{name}.weight"), tensor);
        }
    });
    let disguised = moe(mutant.path());
    let found =
        align(&dense(&disguised.experts[1]), &dense(&disguised.experts[3]), Matching::Weights).unwrap();
    let mut inverse = vec![0; width];
    order.iter().enumerate().for_each(|(new, &old)| inverse[old] = new);
    assert_eq!(found.permutation, inverse);
    assert_eq!(found.cost, 0.0);
    assert!(found.unaligned_cost > 0.0);

    let plan = merging(mutant.path(), &[(3, 1, 0.37)], MergedRows::Redirect, true);
    let compressed = |align| {
        let options = FactorOptions { align, ..FactorOptions::default() };
        apply_layer(&plan.layers[0], &disguised, None, options).unwrap()
    };
    let aligned = compressed(true);
    assert_eq!(aligned.alignments, [found]);
    assert_eq!(stored(&aligned.moe.experts[1]), stored(&original.experts[1]));
    let blended = compressed(false);
    assert!(blended.alignments.is_empty());
    assert_ne!(stored(&blended.moe.experts[1]), stored(&original.experts[1]));
}

/// Experts of gpt-oss have biases: they move with their neurons.
#[test]
fn biases_move_with_their_neurons() {
    let moe = moe(&data("gpt_oss"));
    let target = dense(&moe.experts[1]);
    let width = target.gate.weight.rows();
    let order: Vec<usize> = (0..width).rev().collect();
    let planted = permute(&moe, 1, &order);
    let [gate, up, down] = [0, 1, 2].map(|i| planted[i].clone().renamed(format!("{i}")));
    let map = |tensor: Tensor, bias: Option<Tensor>| LinearSource {
        weight: moepress::checkpoint::Weight::plain(tensor).unwrap(),
        bias,
    };
    let select = |bias: &Option<Tensor>| bias.as_ref().map(|b| b.select_rows(&order));
    let member = Mlp {
        gate: map(gate, select(&target.gate.bias)),
        up: target.up.as_ref().map(|own| map(up, select(&own.bias))),
        down: map(down, target.down.bias.clone()),
        activation: target.activation,
    };
    let found = align(&target, &member, Matching::Weights).unwrap();
    assert_eq!((found.cost, found.permutation), (0.0, order));
    let mut layer = moe.clone();
    let whole = member
        .try_map(|m| Ok::<_, ()>(Linear { weight: Matrix::Dense(m.weight.clone()), bias: m.bias.clone() }));
    layer.experts[0] = Expert::Mlp(whole.unwrap());
    let plan = merging(&data("gpt_oss"), &[(0, 1, 0.5)], MergedRows::Redirect, true);
    let options = FactorOptions { align: true, ..FactorOptions::default() };
    let merged = apply_layer(&plan.layers[0], &layer, None, options).unwrap();
    assert_eq!(stored(&merged.moe.experts[1]), stored(&moe.experts[1]));
}

/// A merged expert may be factorised: the mean is, and with second moments on the tokens of all that went into it.
#[test]
fn merged_then_factorised() {
    let out = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let merged = merging(&model, &[(0, 2, 0.4)], MergedRows::Redirect, true);
    let mut both = merged.clone();
    let width = dense(&moe(&model).experts[0]).gate.weight.rows();
    let rank = moepress::plan::Ranks::uniform(Some(width.min(8)));
    for layer in &mut both.layers {
        layer.experts[2].action = Action::low_rank(rank);
    }
    apply(&model, &merged, &MOEPRESS, &out.path().join("merged")).unwrap();
    apply(&model, &both, &MOEPRESS, &out.path().join("both")).unwrap();
    let (average, after) = (moe(&out.path().join("merged")), moe(&out.path().join("both")));
    let Expert::Mlp(factors) = &after.experts[2] else { panic!("{}", after.experts[2].form()) };
    for (map, found) in dense(&average.experts[2]).maps().zip(factors.maps()) {
        let expected = factorise(&map.weight, rank.gate.unwrap(), Whitening::None, FactorOptions::default());
        for (a, b) in expected.unwrap().parts().into_iter().zip(found.weight.parts()) {
            assert_eq!(bits(&a.to_f32()), bits(&b.to_f32()));
        }
    }
    let logits = |name: &str| run(&out.path().join(name), &tokens()).logits;
    both.options.insert("whiten".into(), true.into());
    let whitened = Options { tokens: Some(&tokens()), ..MOEPRESS };
    apply(&model, &both, &whitened, &out.path().join("whitened")).unwrap();
    assert_ne!(bits(&logits("whitened")), bits(&logits("both")));
}

/// The same bytes on any number of threads.
#[test]
fn threads_change_nothing() {
    let out = tempfile::tempdir().unwrap();
    for name in ["qwen2_moe", "gpt_oss_mxfp4"] {
        let plan = merging(&data(name), &[(0, 2, 0.3), (1, 3, 0.9)], MergedRows::Redirect, true);
        let with = |threads: usize| {
            let dir = out.path().join(format!("{name} {threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| apply(&data(name), &plan, &Options::default(), &dir).unwrap());
            files(&dir)
        };
        let one = with(1);
        assert!(one == with(2) && one == with(8), "{name}");
    }
}

/// What cannot be merged is named, and nothing is left behind.
#[test]
fn experts_without_own_matrices_are_refused() {
    let out = tempfile::tempdir().unwrap();
    let model = data("mixtral");
    let first = out.path().join("first");
    let mut plan = merging(&model, &[(0, 2, 0.4)], MergedRows::Redirect, true);
    for layer in &mut plan.layers {
        layer.experts[1].action = Action::low_rank(moepress::plan::Ranks::uniform(Some(4)));
    }
    apply(&model, &plan, &MOEPRESS, &first).unwrap();
    let second = out.path().join("second");
    let profile_of = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        profile(&checkpoint, &open_architecture(&checkpoint).unwrap()).unwrap()
    };
    let sizes = profile_of(&first);
    // One is an alias, the other has factors.
    for (merge, expert) in [((0, 3, 0.5), 0), ((3, 0, 0.5), 0), ((1, 3, 0.5), 1), ((3, 1, 0.5), 1)] {
        let mut plan = merging(&first, &[], MergedRows::Redirect, true);
        plan.layers[0].experts[merge.0].action = Action::Merge { into: merge.1, weight: merge.2 };
        let message = format!(
            "layer 0: expert {expert}: has no dense matrices of its own to average; start from the original checkpoint"
        );
        assert_eq!(plan.expect(&sizes).unwrap_err().to_string(), message);
        assert_eq!(apply(&first, &plan, &MOEPRESS, &second).unwrap_err(), message);
        assert!(!second.exists());
        // What statistics of earlier versions say of the checkpoint is enough.
        let mut sizes = sizes.clone();
        sizes.moe_layers.iter_mut().for_each(|layer| layer.dense_widths.clear());
        assert_eq!(plan.check(&sizes).unwrap_err().to_string(), message);
    }
    // Where groups are chosen again while compressing, any two experts may have to be averaged.
    let mut plan = merging(&first, &[(2, 3, 0.5)], MergedRows::Redirect, true);
    plan.check(&sizes).unwrap();
    plan.options.insert("propagate".into(), true.into());
    let error = plan.check(&sizes).unwrap_err().to_string();
    assert!(error.starts_with("layer 0: expert 0: has no dense matrices"), "{error}");
    // But an alias follows the expert it stands for into another.
    let plan = merging(&first, &[(2, 3, 0.5)], MergedRows::Redirect, true);
    apply(&first, &plan, &MOEPRESS, &second).unwrap();
    let after = moe(&second);
    assert!(matches!((&after.experts[0], &after.experts[2]), (Expert::Alias(3), Expert::Alias(3))));
    run(&second, &tokens());
}

/// From the command line: sizes come out as planned, and each layer can be grouped anew behind the merged ones before it.
#[test]
fn from_statistics_to_a_checkpoint() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name).display().to_string();
    let model = data("qwen2_moe").display().to_string();
    let (tokens_file, stats, json) = (path("t.safetensors"), path("s.safetensors"), "--json");
    common::generate::tokens(Path::new(&tokens_file), 4, 24, 64);
    let run = |arguments: &[&str]| moepress(arguments).json();
    run(&["calibrate", &model, "--tokens", &tokens_file, "--sample", "all", "--out", &stats, json]);
    let propagated = ["router=redirect", "group_size=2", "propagate=true"];
    for (method, set) in [
        ("m-smoe", &["grouping=uniform", "capacity=3"][..]),
        ("mc-smoe", &["rank=2", "dense_rows=0.2"]),
        ("hc-smoe", &["linkage=single"]),
        ("ream", &["group_size=2"]),
        ("ream", &propagated),
    ] {
        let (plan, out) =
            (path(&format!("{method}{}.json", set.len())), path(&format!("{method}{}", set.len())));
        let mut arguments =
            vec!["plan", "--method", method, "--experts", "3", "--stats", &stats, "--out", &plan, json];
        arguments.push("--set");
        arguments.extend(set);
        let planned = run(&arguments);
        let mut arguments = vec!["compress", &model, "--plan", &plan, "--out", &out, json];
        if set.len() == 3 {
            let refused = moepress(&arguments).error(1);
            assert_eq!(
                refused,
                "the plan has propagate=true, which measures while compressing: give --tokens"
            );
            arguments.extend(["--tokens", &tokens_file]);
        }
        let done = run(&arguments);
        assert_eq!(done["bytes_after"], planned["expected"]["bytes"], "{method}");
        assert_eq!(done["layout"] == "hf", method == "ream" && set.len() == 1, "{method}");
        let evaluated = run(&["eval", &out, "--tokens", &tokens_file, json]);
        assert!(evaluated["overall"]["nll"].as_f64().unwrap() > 0.0, "{method}");
    }
    let missing = moepress(["plan", "--method", "mc-smoe", "--stats", &stats, "--out", &path("p")]).error(2);
    assert!(missing.starts_with("one of --remove, --experts and --bytes is needed"), "{missing}");
}
