//! Searching on tokens: losses against running every candidate and against the reference, on every family; resuming.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::command::moepress;
use common::compress::{options, tokens};
use common::reference::{Reference, evaluate};
use common::{data, read};
use moepress::architecture::{MoeProfile, SkipThreshold};
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::Checkpoint;
use moepress::compress::WeightSpectra;
use moepress::model::{Model, open_architecture, profile};
use moepress::plan::{
    Action, Budget, Loss, LossSource, Pass, Plan, Projection, RankRule, Request, SpectrumSource, Subsets,
    method, ranks_by_importance,
};
use moepress::progress::Progress;
use moepress::search::Search;
use moepress::tokens::{Windows, write_token_file};
use serde_json::{Value, json};

const PASS: Pass<'static> = Pass { task: "test", batch: 8, progressive: false, exact: false };

fn on<T>(dir: &Path, windows: &Windows, ask: impl FnOnce(&Search<'_, '_, Cpu>) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let mut progress = ();
    let search = Search::new(&model, windows, &folder.path().join("out"), "test", &mut progress).unwrap();
    let result = ask(&search);
    search.finish().unwrap();
    result
}

fn plan_at(
    dir: &Path,
    windows: &Windows,
    name: &str,
    budget: Option<Budget>,
    set: &[(&str, &str)],
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Plan, String> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let model = Model::new(&checkpoint, &Cpu, windows.longest()).unwrap();
    let profile = profile(&checkpoint, model.architecture()).unwrap();
    let options = options(set);
    let search = Search::new(&model, windows, out, &format!("{options:?}"), progress).unwrap();
    let request = Request { budget, options: &options, losses: Some(&search), ..Request::new(&profile) };
    let plan = method(name).unwrap().plan(&request).map_err(|e| e.to_string())?;
    search.finish().unwrap();
    Ok(plan)
}

fn plan(
    dir: &Path,
    windows: &Windows,
    name: &str,
    budget: Option<Budget>,
    set: &[(&str, &str)],
) -> Result<Plan, String> {
    let folder = tempfile::tempdir().unwrap();
    plan_at(dir, windows, name, budget, set, &folder.path().join("out"), &mut ())
}

fn close(name: &str, found: &[Loss], expected: &[Loss]) {
    let scale = expected.iter().map(|l| l.single).fold(0.0, f64::max);
    for (a, b) in found.iter().zip(expected) {
        for (x, y) in [(a.batch_sum, b.batch_sum), (a.single, b.single)] {
            assert!((x - y).abs() <= 2e-5 * y + 2e-6 * scale, "{name}: {x} instead of {y}");
        }
    }
}

/// Some subsets that the layer's router can do without.
fn subsets(layer: &MoeProfile) -> Vec<Vec<usize>> {
    let experts = layer.experts;
    let mut sets: Vec<Vec<usize>> = vec![vec![]];
    sets.extend((0..experts).map(|e| vec![e]));
    sets.extend((0..experts).map(|e| {
        let mut pair = vec![e, (e + experts / 2) % experts];
        pair.sort_unstable();
        pair
    }));
    sets.retain(|set| set.len() + layer.top_k <= experts && Subsets::new(layer, set.len()).allows(set));
    sets
}

/// Inner products of expert outputs and stored logits say what running the layer without the experts says, for every
/// kind of router; also behind layers that have lost experts, and with triangles in a file.
#[test]
fn losses_are_those_of_running_the_layer() {
    let windows = tokens();
    for entry in std::fs::read_dir(data("")).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("config.json").is_file() {
            continue;
        }
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let Ok(model) = Model::new(&checkpoint, &Cpu, windows.longest()) else { continue };
        if model.architecture().encoder_layers > 0 {
            continue;
        }
        let layers = profile(&checkpoint, model.architecture()).unwrap().moe_layers;
        for progressive in [false, true] {
            let ask = |search: &Search<'_, '_, Cpu>, exact| {
                search.begin(&Pass { batch: 3, progressive, exact, ..PASS }).unwrap();
                let mut all = Vec::new();
                for layer in &layers {
                    search.enter(layer.layer).unwrap();
                    let sets = subsets(layer);
                    all.push(search.losses(&sets).unwrap());
                    search.leave(sets.last().unwrap(), "").unwrap();
                }
                all
            };
            let (grams, exact) = on(&dir, &windows, |s| (ask(s, false), ask(s, true)));
            for ((found, expected), layer) in grams.iter().zip(&exact).zip(&layers) {
                close(&format!("{name} layer {}", layer.layer), found, expected);
            }
            let folder = tempfile::tempdir().unwrap();
            let mut silent = ();
            let search = Search::new(&model, &windows, &folder.path().join("out"), "", &mut silent).unwrap();
            assert_eq!(ask(&search.with_memory(500), false), grams, "{name}");
        }
    }
}

fn outputs(reference: &Reference, file: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(reference.dir.join(file)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn dropped(layer: &Value) -> Vec<usize> {
    layer["chosen"].as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize).collect()
}

/// Every loss of every subset, and the chosen subsets, of the float64 reference.
#[test]
fn subsets_and_losses_are_those_of_the_reference() {
    for (name, kept) in [("mixtral", &[6, 4][..]), ("qwen2_moe", &[14, 12, 8])] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        let experts = if name == "mixtral" { 8 } else { 16 };
        let naee = outputs(&reference, "naee.json");
        let losses = reference.dir.join("naee.safetensors");
        on(&reference.model, &reference.calibration, |search| {
            search.begin(&PASS).unwrap();
            for l in 0..4 {
                search.enter(l).unwrap();
                for &r in kept {
                    let all = combinations(experts, experts - r);
                    let chosen = dropped(&naee["layerwise"][format!("r{r}")]["layers"][l]);
                    let chosen = all.iter().position(|set| *set == chosen).unwrap();
                    let found = search.losses(&all).unwrap();
                    let single = read(&losses, &format!("r{r}.layer{l}.single"));
                    let batch_sum = read(&losses, &format!("r{r}.layer{l}.batch_sum"));
                    assert_eq!(batch_sum.len(), all.len());
                    let pairs = batch_sum.iter().zip(&single);
                    let expected: Vec<Loss> =
                        pairs.map(|(b, s)| Loss { batch_sum: *b, single: *s }).collect();
                    assert!(found.iter().all(|f| f.batch_sum >= found[chosen].batch_sum));
                    close(&format!("{name} layer {l} r{r}"), &found, &expected);
                }
                search.leave(&[], "").unwrap();
            }
        });
        let statistics = outputs(&reference, "stats.json");
        for (kind, set) in [("layerwise", "false"), ("progressive", "true")] {
            let r = kept[1];
            let budget = Some(Budget::Experts(r));
            let plan =
                plan(&reference.model, &reference.calibration, "naee", budget, &[("progressive", set)])
                    .unwrap();
            let expected = naee[kind][format!("r{r}")]["layers"].as_array().unwrap();
            for (layer, expected) in plan.layers.iter().zip(expected) {
                let name = format!("{name} {kind} layer {}", layer.layer);
                let (found, loss) = (layer.loss.unwrap(), expected["loss"].as_f64().unwrap());
                // The reference's bound for f32: rounding moves what is subtracted, however small the difference.
                let routed_norm = statistics["layers"][layer.layer]["routed_norm"].as_f64().unwrap();
                let bound = 1e-5 * loss + 1e-6 * routed_norm;
                assert!((found - loss).abs() < bound, "{name}: loss {found} instead of {loss}");
                assert_eq!(layer.dropped().collect::<Vec<_>>(), dropped(expected), "{name}");
            }
        }
    }
}

fn combinations(n: usize, k: usize) -> Vec<Vec<usize>> {
    let sets = (0u32..1 << n).filter(|bits| bits.count_ones() as usize == k);
    let mut sets: Vec<Vec<usize>> =
        sets.map(|bits| (0..n).filter(|e| bits >> e & 1 == 1).collect()).collect();
    sets.sort();
    sets
}

/// Importance, budgets, the optima of every layer, the losses of blocks, what is chosen by them, and ranks.
#[test]
fn moe_i2_is_that_of_the_reference() {
    for name in ["mixtral", "qwen2_moe"] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        let expected = outputs(&reference, "moei2.json");
        let sets = |value: &Value| -> Vec<usize> {
            value.as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize).collect()
        };
        let budget = &expected["budgets"]["25"];
        on(&reference.model, &reference.calibration, |search| {
            search.begin(&PASS).unwrap();
            for (block, wanted) in budget["kt_blocks"].as_array().unwrap().iter().enumerate() {
                search.mark().unwrap();
                let mut candidates = Vec::new();
                for l in [2 * block, 2 * block + 1] {
                    search.enter(l).unwrap();
                    let [importance, single] =
                        ["importance_batch_sum", "importance_single"].map(|key| numbers(&expected[key][l]));
                    let alone: Vec<Vec<usize>> = (0..importance.len()).map(|e| vec![e]).collect();
                    for (e, found) in search.losses(&alone).unwrap().iter().enumerate() {
                        for (found, wanted) in [(found.batch_sum, importance[e]), (found.single, single[e])] {
                            assert!((found - wanted).abs() < 1e-5 * wanted + 1e-3, "{name} layer {l}");
                        }
                    }
                    let top = budget["layers"][l]["top"].as_array().unwrap();
                    candidates.push(top.iter().map(|t| sets(&t["dropped"])).collect::<Vec<_>>());
                    search.leave(&[], "").unwrap();
                }
                let found = search.block_losses(&candidates).unwrap();
                for (found, wanted) in found.iter().zip(wanted["candidates"].as_array().unwrap()) {
                    let wanted = wanted["loss"].as_f64().unwrap();
                    assert!(
                        (found.batch_sum / wanted - 1.0).abs() < 1e-5,
                        "{name} block {block}: {found:?} {wanted}"
                    );
                }
            }
        });
        let set = [("block", "2"), ("factor_dtype", "f32")];
        let found = plan(&reference.model, &reference.calibration, "moe-i2", Some(Budget::Remove(0.5)), &set)
            .unwrap();
        for (i, layer) in found.layers.iter().enumerate() {
            let name = format!("{name} layer {i}");
            assert_eq!(layer.dropped().count() as u64, budget["K"][i].as_u64().unwrap(), "{name}");
            assert_eq!(
                layer.dropped().collect::<Vec<_>>(),
                sets(&budget["chosen_by_kt"][i.to_string()]),
                "{name}"
            );
            let most = if reference.dir.ends_with("mixtral") { 85 } else { 54 };
            let ranks = layer.experts.iter().filter_map(|e| match e.action {
                Action::LowRank { rank, .. } => rank.gate,
                Action::Keep => Some(most + 1),
                _ => None,
            });
            let wanted = sets(&expected["ranks_after_pruning_25"][i.to_string()]["rank"]);
            assert_eq!(
                ranks.collect::<Vec<_>>(),
                wanted.iter().map(|r| *r.min(&(most + 1))).collect::<Vec<_>>(),
                "{name}"
            );
        }
        assert!(found.expected.removed_fraction >= 0.5);
        // The genetic search, which tries a quarter of the subsets or fewer, finds every optimum.
        let set = [
            ("stage", "prune"),
            ("enumerate", "0"),
            ("population", "40"),
            ("generations", "30"),
            ("block", "1"),
        ];
        let found =
            plan(&reference.model, &reference.calibration, "moe-i2", Some(Budget::Remove(0.25)), &set)
                .unwrap();
        for (layer, wanted) in found.layers.iter().zip(budget["layers"].as_array().unwrap()) {
            assert_eq!(
                layer.dropped().collect::<Vec<_>>(),
                sets(&wanted["optimum"]),
                "{name} layer {}",
                layer.layer
            );
        }
    }
}

/// Ranks of all experts by their importance, and what the plain SVD at the ranks of those that stay loses.
#[test]
fn ranks_and_truncation_errors_of_the_reference() {
    for (name, most) in [("mixtral", 128), ("qwen2_moe", 96)] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        let expected = outputs(&reference, "moei2.json");
        let number = |key: &str| expected[key].as_f64().unwrap();
        let rule = RankRule { alpha: number("alpha"), epsilon: number("epsilon") };
        let checkpoint = Checkpoint::open(&reference.model).unwrap();
        let architecture = open_architecture(&checkpoint).unwrap();
        let spectra = WeightSpectra::new(&checkpoint, &architecture, None);
        for l in 0..4 {
            let importance = numbers(&expected["importance_batch_sum"][l]);
            let ranks = ranks_by_importance(&importance, number("average_rank") as usize, most, rule);
            assert_eq!(json!(ranks), expected["ranks_without_pruning"][l], "{name} layer {l}");
            let kept = &expected["ranks_after_pruning_25"][l.to_string()];
            let errors = expected["truncation_errors"][l.to_string()].as_array().unwrap();
            for (i, (expert, rank)) in numbers(&kept["kept"]).iter().zip(numbers(&kept["rank"])).enumerate() {
                for (j, matrix) in
                    [Projection::Gate, Projection::Up, Projection::Down].into_iter().enumerate()
                {
                    let spectrum = spectra.spectrum(l, *expert as usize, matrix).unwrap();
                    let lost = spectrum[rank as usize..].iter().sum::<f64>();
                    let relative = (lost / spectrum.iter().sum::<f64>()).sqrt();
                    for (found, key) in [(lost.sqrt(), "abs"), (relative, "relative")] {
                        let wanted = errors[i][j][key].as_f64().unwrap();
                        assert!((found / wanted - 1.0).abs() < 1e-9, "{name} layer {l}: {found} {wanted}");
                    }
                }
            }
        }
    }
}

/// The thresholds of skipping are the medians of the reference, behind any number of experts.
#[test]
fn skipping_begins_at_the_medians_of_the_reference() {
    for (name, top_k) in [("mixtral", 2), ("qwen2_moe", 4)] {
        let Some(reference) = Reference::open(name, &[]) else { return };
        let expected = outputs(&reference, "naee.json")["skipping"].clone();
        for after in 1..top_k {
            let set = [("skip", "true"), ("skip_after", ["1", "2", "3"][after - 1])];
            let found = plan(&reference.model, &reference.calibration, "naee", None, &set).unwrap();
            for (layer, expected) in found.layers.iter().zip(expected.as_array().unwrap()) {
                let (found, wanted) = match layer.skip.unwrap().threshold {
                    SkipThreshold::Ratio(ratio) => (ratio, &expected["median_w2_over_w1"]),
                    SkipThreshold::Tail(tail) => (tail, &expected["median_tail_fraction"][after - 1]),
                };
                let wanted = wanted.as_f64().unwrap();
                let place = format!("{name} layer {} behind {after}", layer.layer);
                assert!((found - wanted).abs() < 2e-6, "{place}: {found}, expected {wanted}");
            }
        }
    }
}

/// Subsets found on the tokens, skipping, and both stages of MoE-I².
#[test]
fn searched_models_have_the_reference_perplexity() {
    for (name, naee) in [("mixtral", "r6"), ("qwen2_moe", "r12")] {
        let Some(reference) = Reference::open(name, &[Moment::InputGram, Moment::HiddenGram]) else { return };
        let quarter = Some(Budget::Remove(0.25));
        let both = [("block", "2"), ("factor_dtype", "f32")];
        let whitened = [("block", "2"), ("factor_dtype", "f32"), ("whiten", "true")];
        let even = [("block", "2"), ("factor_dtype", "f32"), ("alpha", "0")];
        let skipped = [("skip", "true")];
        let raw = [("skip", "true"), ("skip_weights", "raw")];
        for (key, method, budget, set, tolerance) in [
            (format!("naee.layerwise.{naee}"), "naee", quarter, &[][..], 5e-6),
            (format!("naee.progressive.{naee}"), "naee", quarter, &[("progressive", "true")], 5e-6),
            ("moei2.prune_kt.25".into(), "moe-i2", quarter, &[("block", "2"), ("stage", "prune")], 5e-6),
            ("moei2.prune25_plain_ranks".into(), "moe-i2", Some(Budget::Remove(0.5)), &both, 5e-6),
            ("moei2.prune25_whitened_ranks".into(), "moe-i2", Some(Budget::Remove(0.5)), &whitened, 5e-4),
            ("moei2.prune25_plain_uniform".into(), "moe-i2", Some(Budget::Remove(0.5)), &even, 5e-6),
            ("skip.last_rescaled".into(), "naee", None, &skipped, 2e-5),
            ("skip.last_raw".into(), "naee", None, &raw, 2e-5),
        ] {
            // The reference of a top-2 model has rescaled weights only.
            if reference.entry(&key).is_null() {
                continue;
            }
            let plan = plan(&reference.model, &reference.calibration, method, budget, set).unwrap();
            let difference = reference.difference(&plan, &key);
            assert!(difference.abs() < tolerance, "{name}: {key} is off by {difference:.1e}");
            let Some(active) = reference.entry(&key)["mean_active_experts"].as_object() else { continue };
            let found = evaluate(&reference.work.path().join(&key), &reference.evaluation).skipping.unwrap();
            for layer in found.layers {
                let expected = active[&layer.layer.to_string()].as_f64().unwrap();
                assert!(
                    (layer.mean_active - expected).abs() < 2e-4,
                    "{name}: {key} {layer:?}, expected {expected}"
                );
            }
        }
    }
}

/// Both stages of MoE-I², and either, meet a size in bytes as closely as a step of theirs allows.
#[test]
fn moe_i2_meets_bytes() {
    let (dir, windows) = (data("qwen2_moe"), tokens());
    let now = plan(&dir, &windows, "moe-i2", None, &[("stage", "low_rank"), ("rank", "1")]).unwrap();
    let (least, folder) = (now.expected.bytes, tempfile::tempdir().unwrap());
    let whole = Checkpoint::open(&dir).unwrap().bytes();
    for (stage, share) in [("both", 0.6), ("low_rank", 0.6), ("prune", 0.8), ("both", 0.95)] {
        let size = least + ((whole - least) as f64 * share) as u64;
        let name = format!("{stage} {share}");
        let found = plan(&dir, &windows, "moe-i2", Some(Budget::Bytes(size)), &[("stage", stage)]).unwrap();
        let out = folder.path().join(&name);
        let report =
            common::compress::apply(&dir, &found, &moepress::compress::Options::default(), &out).unwrap();
        assert_eq!(report.bytes_after, found.expected.bytes, "{name}");
        let files = std::fs::read_dir(&out).unwrap().map(|f| f.unwrap());
        let weights = files.filter(|f| f.file_name().to_string_lossy().ends_with(".safetensors"));
        let written: u64 = weights.map(|f| f.metadata().unwrap().len()).sum();
        assert!(written <= size, "{name}: {written} bytes of {size}");
        let step = (whole - least) / 10;
        assert!(written + 2 * step > size, "{name}: {written} bytes of {size} leave much over");
        let kept: usize = found.experts_kept().iter().sum();
        assert_eq!(kept < now.experts_kept().iter().sum(), stage != "low_rank", "{name}");
    }
    // Less than an expert is left to the second stage.
    let found = plan(&dir, &windows, "moe-i2", Some(Budget::Remove(0.01)), &[]).unwrap();
    assert_eq!(found.experts_kept(), now.experts_kept());
    assert!(found.expected.removed_fraction >= 0.01);
    let message = plan(&dir, &windows, "moe-i2", Some(Budget::Bytes(1)), &[]).unwrap_err();
    assert!(message.starts_with("--bytes 1") && message.contains("the smallest size"), "{message}");
    let message = plan(&dir, &windows, "moe-i2", Some(Budget::Bytes(1 << 40)), &[]).unwrap_err();
    assert!(message.contains("so nothing needs removing"), "{message}");
}

/// Where subsets are too many to try, the search ends where no swap helps.
#[test]
fn greedy_and_swap_ends_in_a_local_optimum() {
    let (dir, windows) = (data("mixtral"), tokens());
    let budget = Some(Budget::Remove(0.4));
    let greedy = plan(&dir, &windows, "naee", budget, &[("enumerate", "1")]).unwrap();
    let best = plan(&dir, &windows, "naee", budget, &[]).unwrap();
    for (a, b) in greedy.layers.iter().zip(&best.layers) {
        assert!(a.loss.unwrap() >= b.loss.unwrap());
        assert!(a.loss.unwrap() <= 1.2 * b.loss.unwrap(), "{:?} {:?}", a.loss, b.loss);
    }
}

/// Stops the search by panicking after some layers, as close to a kill as one process gets.
struct StopAfter(usize);

impl Progress for StopAfter {
    fn step(&mut self, _: &str) {
        assert!(self.0 > 0, "stopped");
        self.0 -= 1;
    }
}

#[test]
fn a_stopped_search_resumes_to_the_same_plan() {
    let folder = tempfile::tempdir().unwrap();
    let windows = tokens();
    let runs: [(&str, &[(&str, &str)]); 3] = [
        ("naee", &[("skip", "true")]),
        ("naee", &[("progressive", "true"), ("enumerate", "1")]),
        ("moe-i2", &[("block", "2")]),
    ];
    for (i, (name, set)) in runs.into_iter().enumerate() {
        let budget = Some(Budget::Remove(0.25));
        let expected = plan(&data("qwen2_moe"), &windows, name, budget, set).unwrap();
        for stop in 0..6 {
            let out = folder.path().join(format!("{i} {stop}"));
            let run = |progress: &mut dyn Progress| {
                plan_at(&data("qwen2_moe"), &windows, name, budget, set, &out, progress).unwrap()
            };
            let stopped = catch_unwind(AssertUnwindSafe(|| run(&mut StopAfter(stop)))).is_err();
            assert!(stopped || stop > 0, "{name}");
            assert_eq!(run(&mut ()), expected, "{name} stopped after {stop} layers");
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "notes are left over");
}

#[test]
fn plans_do_not_depend_on_the_number_of_threads() {
    let windows = tokens();
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| plan(&data("qwen2_moe"), &windows, "naee", Some(Budget::Remove(0.5)), &[]).unwrap())
    };
    let one = with(1).to_json();
    assert_eq!(one, with(2).to_json());
    assert_eq!(one, with(8).to_json());
}

/// A token that is not routed to what is dropped stays exactly as it was: padding and ties are told apart from noise.
#[test]
fn equal_losses_go_to_the_first_subset() {
    let windows = Windows { ids: vec![5; 24], count: 1, length: 24, mask: None, ..tokens() };
    let windows =
        Windows { files: vec![moepress::tokens::SourceFile { name: "one".into(), windows: 1 }], ..windows };
    on(&data("mixtral"), &windows, |search| {
        search.begin(&PASS).unwrap();
        search.enter(0).unwrap();
        // Twenty-four times the same token: two experts are used, all others cost exactly nothing.
        let sets: Vec<Vec<usize>> = [vec![]].into_iter().chain((0..5).map(|e| vec![e])).collect();
        let losses = search.losses(&sets).unwrap();
        assert_eq!(losses[0], Loss::default());
        assert_eq!(losses[1..].iter().filter(|l| **l == Loss::default()).count(), 3);
    });
}

#[test]
fn text_does_in_place_of_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
    let out = folder.path().join("plan.json");
    let text = examples.join("text/scripture.calibration.txt");
    let given = [
        "plan",
        "--quiet",
        "--method",
        "naee",
        "--remove",
        "0.25",
        "--windows",
        "2",
        "--window-length",
        "32",
    ];
    let mut arguments: Vec<&std::ffi::OsStr> = given.iter().map(std::ffi::OsStr::new).collect();
    let model = examples.join("model");
    arguments.extend(["--model".as_ref(), model.as_os_str(), "--text".as_ref(), text.as_os_str()]);
    arguments.extend(["--out".as_ref(), out.as_os_str()]);
    moepress(arguments).ok();
    let plan: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(plan["statistics"]["tokens"], 64);
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.safetensors");
    write_token_file(&file, &tokens()).unwrap();
    let (model, out) = (data("mixtral"), folder.path().join("plan.json"));
    let run = |arguments: &[&str]| {
        let fixed = ["plan", "--quiet", "--method", "naee", "--out", out.to_str().unwrap()];
        moepress(fixed.iter().chain(arguments))
    };
    let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
    // A wrong option and a missing budget are wrong usage.
    let usage = |message: &str| message.starts_with("option ") || message.contains(": no budget; ");
    let status = |message: &str| if usage(message) { 2 } else { 1 };
    let given = ["--model", model, "--tokens", file];
    assert_eq!(
        run(&["--remove", "0.25", "--model", model]).error(2),
        "--model and --tokens (or --text) are needed: naee searches on the tokens themselves"
    );
    let cases: [(&[&str], &str); 6] = [
        (
            &["--remove", "0.9"],
            "--remove 0.9: would drop 4 of the 5 experts of layer 0, which must keep 2; the largest",
        ),
        (&["--experts", "1"], "--experts 1: would drop 4 of the 5 experts of layer 0, which must keep 2"),
        (&[], "naee: no budget; give --remove, --experts or --bytes, or --set skip=true alone"),
        (&["--set", "skip=true", "skip_after=2"], "option skip_after=2: expected 1 to 1 for layer 0"),
        (&["--remove", "0.25", "--set", "batch=0"], "option batch=0: expected a whole number, at least 1"),
        (&["--remove", "0.25", "--set", "loss=l1"], "option loss=l1: expected one of batch_sum, single"),
    ];
    for (arguments, expected) in cases {
        let message = run(&[&given[..], arguments].concat()).error(status(expected));
        assert!(message.starts_with(expected), "{message}");
        assert!(!out.exists());
        assert!(!folder.path().join("plan.json.partial").exists(), "{expected}");
    }
    let cases: [(&[&str], &str); 7] = [
        (
            &["--experts", "3"],
            "--experts 3: keeps the same number in every layer, which moe-i2 does with stage=prune",
        ),
        (&["--remove", "0.5", "--set", "rank=4"], "option rank=4: cannot be combined with --remove 0.5"),
        (
            &["--set", "stage=low_rank", "ratio=0.2", "rank=4"],
            "option ratio=0.2: cannot be combined with stage=low_rank",
        ),
        (&["--set", "stage=prune"], "moe-i2: no budget; give --remove or --bytes, or the option ratio"),
        (&["--set", "rank=1000"], "option rank=1000: expected at most "),
        (
            &["--remove", "0.9", "--set", "stage=prune"],
            "moe-i2: would prune 9 of 10 experts, of which at most 6 can go; the largest possible is 0.6",
        ),
        (
            &["--remove", "0.999"],
            "moe-i2: the budget leaves no rank to the matrices of layer 0; the largest --remove",
        ),
    ];
    for (arguments, expected) in cases {
        let all = [&given[..], &["--method", "moe-i2", "--quiet", "--out", out.to_str().unwrap()], arguments]
            .concat();
        let message = moepress(["plan"].iter().chain(&all)).error(status(expected));
        assert!(message.starts_with(expected), "{message}");
        assert!(!out.exists());
    }
    // Statistics of another model beside the one that is searched.
    let other = folder.path().join("other.stats");
    let calibrate =
        ["calibrate", "-q", data("qwen2_moe").to_str().unwrap(), "--tokens", file].map(String::from);
    moepress(calibrate.into_iter().chain(["--out".into(), other.display().to_string()])).ok();
    let stats = ["--remove", "0.25", "--stats", other.to_str().unwrap()];
    let message = run(&[&given[..], &stats].concat()).error(1);
    let expected = format!("{}: measured on another checkpoint than {model}", other.display());
    assert_eq!(message, expected);
    let strange = Windows { ids: vec![64; 96], ..tokens() };
    let path = folder.path().join("strange.safetensors");
    write_token_file(&path, &strange).unwrap();
    let message = run(&["--remove", "0.25", "--model", model, "--tokens", path.to_str().unwrap()]).error(1);
    assert!(
        message.ends_with("token id 64 in window 0 at position 0 is outside the vocabulary of 64"),
        "{message}"
    );
}

/// The whole chain with skipping: the plan says when, the checkpoint does it, `eval` and `inspect` show it.
#[test]
fn skipping_from_plan_to_evaluation() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    write_token_file(Path::new(&at("tokens")), &tokens()).unwrap();
    for (name, key) in [("mixtral", "ratio"), ("qwen2_moe", "tail")] {
        let model = data(name);
        let model = model.to_str().unwrap();
        let (plan, out) = (at(&format!("{name}.json")), at(name));
        let arguments =
            ["plan", "-q", "--method", "naee", "--set", "skip=true", "--model", model, "--tokens"];
        moepress(arguments.iter().copied().chain([at("tokens").as_str(), "--out", &plan])).ok();
        let written: Value = serde_json::from_str(&std::fs::read_to_string(&plan).unwrap()).unwrap();
        assert!(written["layers"][0]["skip"][key].as_f64().unwrap() > 0.0);
        let report = moepress(["compress", "-q", "--json", model, "--plan", &plan, "--out", &out]).json();
        assert_eq!(report["layout"], "moepress");
        let result = moepress(["eval", "-q", "--json", &out, "--tokens", &at("tokens")]).json();
        // β is the median: half of the tokens skip their last expert.
        let layer = &result["skipping"]["layers"][0];
        let least = layer["top_k"].as_f64().unwrap() - layer["mean_active"].as_f64().unwrap();
        assert!((0.35..=0.65).contains(&least), "{result}");
        let text = moepress(["eval", "-q", &out, "--tokens", &at("tokens")]).ok();
        assert!(text.contains("% of the chosen experts skipped"), "{text}");
        assert!(moepress(["inspect", &out]).ok().contains("skipped below"));
        let shown = moepress(["inspect", "--json", &out]).json();
        assert_eq!(shown["moe_layers"][0]["skip"], written["layers"][0]["skip"]);
        let message =
            moepress(["compress", "-q", model, "--plan", &plan, "--layout", "hf", "--out", &at("hf")]);
        assert!(message.error(1).contains("skips experts, which no stock checkpoint can say"));
    }
}

#[test]
fn every_option_of_a_plan_is_read_again() {
    let plan = plan(&data("mixtral"), &tokens(), "naee", None, &[("skip", "true"), ("skip_weights", "raw")])
        .unwrap();
    assert_eq!(Plan::from_json(&plan.to_json()).unwrap(), plan);
    assert!(plan.layers.iter().all(|l| l.skip.is_some_and(|s| !s.rescale)));
    let _: BTreeMap<String, Value> = plan.options;
}
