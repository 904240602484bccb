//! Every error message, word for word.

use serde_json::{Value, json};

use super::*;

/// Three layers of eight experts, two chosen per token, and their statistics.
fn model() -> (Profile, Vec<Moments>) {
    let profile = profile(vec![layer(1, 8, 2), layer(2, 8, 2), layer(3, 8, 2)]);
    let count = [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0];
    (profile, vec![counted(&count); 3])
}

/// The message of planning with `frequency`.
fn frequency(budget: Budget, options: &[&str]) -> String {
    let (profile, statistics) = model();
    plan("frequency", &profile, Some(&statistics), Some(budget), options).unwrap_err().to_string()
}

/// The message of planning with `low-rank`.
fn low_rank(budget: Option<Budget>, options: &[&str]) -> String {
    plan("low-rank", &model().0, None, budget, options).unwrap_err().to_string()
}

#[test]
fn names_and_options() {
    let names: Vec<_> = methods().iter().map(|m| m.name()).collect();
    assert_eq!(
        method("reep").err().unwrap().to_string(),
        format!("unknown method `reep`; known methods: {}", names.join(", "))
    );
    let half = Budget::Remove(0.5);
    for (option, message) in [
        (
            "flor=3",
            "frequency has no option `flor`; known options: scope, floor, protect, protect_all_layers, propagate, \
             layer_ratio, owl_lambda, owl_m",
        ),
        (
            "seed=3",
            "frequency has no option `seed`; known options: scope, floor, protect, protect_all_layers, propagate, \
             layer_ratio, owl_lambda, owl_m",
        ),
        ("scope=model", "option scope=model: expected one of layer, global"),
        ("propagate=yes", "option propagate=yes: expected true or false"),
        ("floor=0", "option floor=0: expected a whole number, at least 1"),
        ("floor=1", "option floor=1: expected 2 to 8 for layer 1"),
        ("floor=9", "option floor=9: expected 2 to 8 for layer 1"),
    ] {
        assert_eq!(frequency(half, &[option]), message);
    }
    assert_eq!(low_rank(None, &["energy=1"]), "option energy=1: expected a number above 0 and below 1");
    assert_eq!(low_rank(None, &["energy=NaN"]), "option energy=NaN: expected a number above 0 and below 1");
}

#[test]
fn budgets_for_dropping() {
    for (budget, options, message) in [
        (Budget::Remove(0.0), &[][..], "--remove 0: expected a fraction above 0 and below 1"),
        (Budget::Remove(1.0), &["scope=global"], "--remove 1: expected a fraction above 0 and below 1"),
        (Budget::Remove(f64::NAN), &[], "--remove NaN: expected a fraction above 0 and below 1"),
        (Budget::Experts(0), &[], "--experts 0: expected at least 1 expert"),
        (Budget::Bytes(0), &[], "--bytes 0: expected at least 1 byte"),
        (
            Budget::Remove(0.9),
            &[],
            "--remove 0.9: would drop 7 of the 8 experts of layer 1, which must keep 2; the largest possible is 0.75",
        ),
        (
            Budget::Remove(0.75),
            &["floor=5"],
            "--remove 0.75: would drop 6 of the 8 experts of layer 1, which must keep 5; the largest possible is 0.375",
        ),
        (
            Budget::Remove(0.01),
            &[],
            "--remove 0.01: would drop no expert; the smallest possible is 0.125, 1 of 8",
        ),
        (
            Budget::Remove(0.01),
            &["scope=global"],
            "--remove 0.01: would drop no expert; the smallest possible is 0.0417, 1 of 24",
        ),
        (
            Budget::Remove(0.9),
            &["scope=global"],
            "--remove 0.9: would drop 22 of all 24 experts, of which at most 18 can go; the largest possible is 0.75",
        ),
        (
            Budget::Experts(1),
            &[],
            "--experts 1: would drop 7 of the 8 experts of layer 1, which must keep 2; the smallest possible is 2",
        ),
        (Budget::Experts(9), &[], "--experts 9: layer 1 has 8 experts; use fewer"),
        (Budget::Experts(8), &[], "--experts 8: every layer has 8 experts, so nothing would be removed"),
        (
            Budget::Experts(4),
            &["scope=global"],
            "--experts 4: keeps the same number in every layer, which scope=global does not; use --remove or --bytes",
        ),
        (
            Budget::Bytes(1_000_000),
            &[],
            "--bytes 1000000: the checkpoint has 24504 bytes (24.50 kB), so nothing needs removing",
        ),
        (
            Budget::Bytes(24504),
            &["scope=global"],
            "--bytes 24504: the checkpoint has 24504 bytes (24.50 kB), so nothing needs removing",
        ),
        (
            Budget::Bytes(8375),
            &[],
            "--bytes 8375: the smallest size this method can reach is 8376 bytes (8.38 kB)",
        ),
        (
            Budget::Bytes(8375),
            &["scope=global"],
            "--bytes 8375: the smallest size this method can reach is 8376 bytes (8.38 kB)",
        ),
    ] {
        assert_eq!(frequency(budget, options), message);
    }
    let (profile, statistics) = model();
    let message = plan("reap", &profile, Some(&statistics), None, &[]).unwrap_err().to_string();
    assert_eq!(message, "reap: no budget; give --remove, --experts or --bytes");
    assert_eq!(
        Budget::remove(2.0).unwrap_err().to_string(),
        "--remove 2: expected a fraction above 0 and below 1"
    );
    assert_eq!(Budget::bytes("2 MB").unwrap(), Budget::Bytes(2_000_000));
}

#[test]
fn budgets_for_low_rank() {
    let half = Some(Budget::Remove(0.5));
    for (budget, options, message) in [
        (None, &[][..], "low-rank: no budget; give --remove, --bytes, or the option rank or energy"),
        (
            Some(Budget::Experts(4)),
            &[],
            "--experts 4: low-rank keeps every expert; use --remove, --bytes, or the option rank or energy",
        ),
        (half, &["rank=2"], "option rank=2: cannot be combined with --remove 0.5; give one of them"),
        (half, &["energy=0.5"], "option energy=0.5: cannot be combined with --remove 0.5; give one of them"),
        (None, &["energy=0.5", "rank=2"], "option rank=2: cannot be combined with energy; give one of them"),
        (
            None,
            &["energy=0.5", "allocate=spectrum"],
            "option energy=0.5: cannot be combined with allocate=spectrum; give one of them",
        ),
        (None, &["rank=9"], "option rank=9: expected at most 8 for the matrices of layer 1, 12 × 8"),
        (Some(Budget::Remove(1.5)), &[], "--remove 1.5: expected a fraction above 0 and below 1"),
        (
            Some(Budget::Remove(0.8)),
            &[],
            "--remove 0.8: leaves no rank to the matrices of layer 1; the largest possible is 0.7916",
        ),
        (
            Some(Budget::Bytes(24504)),
            &[],
            "--bytes 24504: the checkpoint has 24504 bytes (24.50 kB), so nothing needs removing",
        ),
        (
            Some(Budget::Bytes(9999)),
            &[],
            "--bytes 9999: the smallest size this method can reach is 20760 bytes (20.76 kB)",
        ),
        (None, &["energy=0.5"], "energy needs the spectra of the weights; give the checkpoint with --model"),
        (
            half,
            &["allocate=spectrum"],
            "allocate=spectrum needs the spectra of the weights; give the checkpoint with --model",
        ),
    ] {
        assert_eq!(low_rank(budget, options), message);
    }
    let tiny = MoeProfile { width: 1, expert_parameters: 24, expert_bytes: 48, ..layer(0, 2, 1) };
    let tiny = profile(vec![tiny]);
    let message = |budget| plan("low-rank", &tiny, None, Some(budget), &[]).unwrap_err().to_string();
    assert_eq!(
        message(Budget::Remove(0.1)),
        "--remove 0.1: leaves no rank to the matrices of layer 0; its matrices, 1 × 8, are too small for low rank"
    );
    assert_eq!(
        message(Budget::Bytes(100)),
        "--bytes 100: the smallest size this method can reach is 3736 bytes (3.74 kB)"
    );
    let factors = MoeProfile { expert_parameters: 200, ..layer(0, 2, 1) };
    let message = plan("low-rank", &profile(vec![factors]), None, half, &[]).unwrap_err().to_string();
    assert_eq!(
        message,
        "profile: layer 0: expert_parameters: found 200, but a dense expert has 288; low-rank needs dense experts"
    );
}

#[test]
fn spectra() {
    struct Bad(Result<Vec<f64>, String>);
    impl SpectrumSource for Bad {
        fn spectrum(&self, _: usize, expert: usize, matrix: Projection) -> Result<Vec<f64>, String> {
            if expert == 3 && matrix == Projection::Up { self.0.clone() } else { Ok(vec![1.0; 8]) }
        }
    }
    for (values, message) in [
        (Err("no such tensor".into()), "layer 1: expert 3: up: no such tensor"),
        (Ok(vec![]), "layer 1: expert 3: up: the spectrum has 0 values, expected 1 to 8"),
        (Ok(vec![1.0; 9]), "layer 1: expert 3: up: the spectrum has 9 values, expected 1 to 8"),
        (Ok(vec![1.0, f64::NAN]), "layer 1: expert 3: up: the spectrum holds NaN, expected finite values"),
        (Ok(vec![1.0, 2.0]), "layer 1: expert 3: up: the spectrum is not in descending order"),
    ] {
        let source = Bad(values);
        for options in [&["energy=0.5"][..], &["rank=2", "allocate=spectrum"]] {
            let plan = plan_with("low-rank", &model().0, None, None, options, Some(&source));
            assert_eq!(plan.unwrap_err().to_string(), message);
        }
    }
    let flat = Bad(Ok(vec![1.0; 8]));
    let plan = plan_with("low-rank", &model().0, None, None, &["energy=0.99"], Some(&flat));
    let warning = "every matrix stays dense: factors save something up to rank 4 only";
    assert_eq!(plan.unwrap().warnings, [warning]);
    let plan = plan_with("low-rank", &model().0, None, None, &["rank=5"], None).unwrap();
    assert_eq!(plan.warnings, [warning]);
    assert!(plan.layers.iter().flat_map(|l| &l.experts).all(|e| e.action == Action::Keep));
}

#[test]
fn statistics() {
    let (profile, good) = model();
    let half = Some(Budget::Remove(0.5));
    let message = |name: &str, statistics: Option<&[Moments]>, options: &[&str]| {
        plan(name, &profile, statistics, half, options).unwrap_err().to_string()
    };
    let missing = "statistics: this method needs them; give those that calibrate wrote";
    assert_eq!(message("reap", None, &[]), missing);
    assert_eq!(message("random", None, &["protect=super"]), missing);
    assert_eq!(
        message("frequency", Some(&good[1..]), &[]),
        "statistics: of 2 MoE layers, the checkpoint has 3; calibrate this checkpoint"
    );
    let replaced = |moments: Moments| vec![good[0].clone(), moments, good[2].clone()];
    let with = |moment, values: &[f64]| replaced(moments(8, &[(moment, values)]));
    for (name, statistics, options, text) in [
        (
            "frequency",
            replaced(counted(&[1.0; 4])),
            &[][..],
            "layer 2: count: measured for 4 experts, the checkpoint has 8",
        ),
        ("reap", good.clone(), &[], "layer 1: gate_norm_sum: not measured; calibrate again"),
        ("frequency", good.clone(), &["protect=super"], "layer 1: max_abs: not measured; calibrate again"),
        (
            "frequency",
            replaced(counted(&[0.0; 8])),
            &[],
            "layer 2: no token was routed to any expert; calibrate again, with more tokens",
        ),
        (
            "frequency",
            with(Moment::Count, &[1.0, 1.0, 1.0, f64::NAN, 1.0, 1.0, 1.0, 1.0]),
            &[],
            "layer 2: expert 3: count: found NaN, expected a finite number; calibrate again",
        ),
    ] {
        assert_eq!(message(name, Some(&statistics), options), format!("statistics: {text}"));
    }
    let sums = |bad: f64, count: f64| {
        let sum = [1.0, 1.0, 1.0, 1.0, 1.0, bad, 1.0, 1.0];
        let n = [1.0, 1.0, 1.0, 1.0, 1.0, count, 1.0, 1.0];
        vec![moments(8, &[(Moment::NormSum, &sum), (Moment::Count, &n)]); 3]
    };
    assert_eq!(
        message("man", Some(&sums(f64::INFINITY, 1.0)), &[]),
        "statistics: layer 1: expert 5: norm_sum: found inf, expected a finite number; calibrate again"
    );
    assert_eq!(
        message("man", Some(&sums(1e300, 1e-300)), &[]),
        format!(
            "statistics: layer 1: expert 5: norm_sum: {} over {} tokens is no finite score",
            1e300, 1e-300
        )
    );
}

#[test]
fn choosing_again() {
    let (profile, good) = model();
    let message = |name: &str, options: &Options, n, protected: &[usize]| {
        rescore_layer(name, options, &profile.moe_layers[0], &good[0], n, protected).unwrap_err().to_string()
    };
    let none = Options::new();
    assert_eq!(
        message("low-rank", &none, 1, &[]),
        "unknown method `low-rank`; known methods: random, frequency, seer-hard, seer-soft, soft, ean, man, msan, \
         reap, wean, wean2, mone"
    );
    assert_eq!(message("frequency", &none, 7, &[]), "layer 1: cannot drop 7 of 8 experts, at most 6");
    assert_eq!(message("frequency", &none, 6, &[0, 1, 2]), "layer 1: cannot drop 6 of 8 experts, at most 5");
    assert_eq!(
        message("frequency", &none, 1, &[8]),
        "layer 1: expert 8: protected, but the layer has 8 experts"
    );
    let floor = Options::from([("floor".to_owned(), json!(2.5))]);
    assert_eq!(message("frequency", &floor, 1, &[]), "option floor=2.5: expected a whole number, at least 1");
    assert_eq!(
        message("reap", &none, 1, &[]),
        "statistics: layer 1: gate_norm_sum: not measured; calibrate again"
    );
}

#[test]
fn profiles() {
    let message = |change: fn(&mut Profile)| {
        let (mut profile, statistics) = model();
        change(&mut profile);
        let message = plan("frequency", &profile, Some(&statistics), Some(Budget::Experts(4)), &[]);
        message.unwrap_err().to_string()
    };
    for (change, text) in [
        ((|p| p.moe_layers.clear()) as fn(&mut Profile), "the checkpoint has no MoE layer"),
        (|p| p.moe_layers[1].experts = 0, "layer 2: experts: found 0, expected at least 1"),
        (|p| p.moe_layers[1].expert_bytes = 0, "layer 2: expert_bytes: found 0, expected at least 1"),
        (|p| p.moe_layers[1].groups = 3, "layer 2: groups: 1 of 3 groups does not fit 8 experts"),
        (|p| p.moe_layers[1].top_groups = 2, "layer 2: groups: 2 of 1 groups does not fit 8 experts"),
        (
            |p| p.moe_layers[1].top_k = 9,
            "layer 2: top_k: found 9, expected at most 8, the experts within reach",
        ),
        (
            |p| p.moe_layers[1].groups = 8,
            "layer 2: top_k: found 2, expected at most 1, the experts within reach",
        ),
        (|p| p.moe_layers.swap(0, 1), "moe_layers: layers must be in ascending order, each once"),
        (|p| p.parameters = 7, "parameters: found 7, but the routed experts alone have 7128"),
        (|p| p.bytes = 7, "bytes: found 7, but the routed experts alone have 14304"),
        (|p| p.bytes = u64::MAX, "bytes: found 18446744073709551615, expected less than 2^56"),
    ] {
        assert_eq!(message(change), format!("profile: {text}"));
    }
}

/// A plan for [`model`] as JSON, changed, and the message it is refused with.
fn changed(change: impl FnOnce(&mut Value)) -> String {
    let (profile, statistics) = model();
    let source = StatisticsRef { file: "s".into(), sha256: "ab".into(), tokens: 36 };
    let options = BTreeMap::new();
    let request = Request {
        statistics: Some(&statistics),
        source: Some(&source),
        budget: Some(Budget::Experts(4)),
        options: &options,
        ..Request::new(&profile)
    };
    let plan = method("frequency").unwrap().plan(&request).unwrap();
    let mut value = serde_json::to_value(&plan).unwrap();
    change(&mut value);
    let read = Plan::from_json(&value.to_string());
    read.and_then(|plan| plan.check(&profile)).unwrap_err().to_string()
}

/// The message for an expert entry of layer 2: experts 0 to 3 are kept, 4 to 7 dropped.
fn entry(expert: usize, entry: Value) -> String {
    changed(|plan| plan["layers"][1]["experts"][expert] = entry)
}

#[test]
fn files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let message = || Plan::read(&path).unwrap_err().to_string();
    let name = path.display();
    assert!(message().starts_with(&format!("{name}: ")), "{}", message());
    std::fs::write(&path, "{\"moepress\": ").unwrap();
    assert_eq!(message(), format!("{name}: a plan is JSON: EOF while parsing a value at line 1 column 13"));
    std::fs::write(&path, "{\"moepress\": 2}").unwrap();
    assert_eq!(message(), format!("{name}: moepress: version 2; this program reads version 1"));
    let plan = Plan::from_json(&changed_nothing()).unwrap();
    assert_eq!(plan.write("/").unwrap_err().to_string(), "/: is a folder");
}

fn changed_nothing() -> String {
    let (profile, statistics) = model();
    plan("frequency", &profile, Some(&statistics), Some(Budget::Experts(4)), &[]).unwrap().to_json()
}

#[test]
fn shapes_of_the_file() {
    assert_eq!(Plan::from_json("[1]").unwrap_err().to_string(), "found [1], expected an object");
    for (change, message) in [
        (
            (|p| p["moepress"] = json!("1")) as fn(&mut Value),
            "moepress: found \"1\", expected a whole number, 0 or more",
        ),
        (
            |p| p["layer"] = json!([]),
            "layer: unknown field; known here: moepress, method, options, model, statistics, layers, expected",
        ),
        (|p| drop(p.as_object_mut().unwrap().remove("method")), "method: this field is missing"),
        (|p| p["method"] = json!(3), "method: found 3, expected a string"),
        (|p| p["options"] = json!(null), "options: found null, expected an object"),
        (|p| p["model"]["sha"] = json!(0), "model.sha: unknown field; known here: family, identity"),
        (|p| p["statistics"] = json!("x"), "statistics: found \"x\", expected an object"),
        (
            |p| p["statistics"]["tokens"] = json!(-1),
            "statistics.tokens: found -1, expected a whole number, 0 or more",
        ),
        (|p| p["layers"] = json!({}), "layers: found {}, expected an array"),
        (|p| p["layers"][1] = json!(7), "layers: found 7, expected an object"),
        (|p| p["layers"][1] = json!({}), "layers.layer: this field is missing"),
        (
            |p| p["layers"][1]["top_p"] = json!(7),
            "layer 2: top_p: unknown field; known here: layer, top_k, skip, loss, experts, protected, router",
        ),
        (
            |p| p["layers"][1]["top_k"] = json!(2.5),
            "layer 2: top_k: found 2.5, expected a whole number, 0 or more",
        ),
        (
            |p| p["layers"][1]["protected"] = json!(["x"]),
            "layer 2: protected: found \"x\", expected whole numbers, 0 or more",
        ),
        (|p| p["layers"][1]["experts"] = json!("all"), "layer 2: experts: found \"all\", expected an array"),
        (
            |p| p["layers"][1]["experts"][0] = json!({"action": "keep"}),
            "layer 2: experts.expert: this field is missing",
        ),
        (
            |p| p["expected"]["bytes"] = json!("big"),
            "expected.bytes: found \"big\", expected a whole number, 0 or more",
        ),
        (
            |p| p["expected"]["removed_fraction"] = json!(null),
            "expected.removed_fraction: found null, expected a number",
        ),
        (
            |p| p["expected"] = json!("a long text that would make the message hard to read"),
            "expected: found \"a long text that would make the message…, expected an object",
        ),
    ] {
        assert_eq!(changed(change), message);
    }
}

#[test]
fn shapes_of_actions() {
    for (action, message) in [
        (
            json!({"expert": 1, "action": "kep"}),
            "action: unknown action `kep`; known actions: keep, drop, merge, constant, low_rank, channels, delta",
        ),
        (json!({"expert": 1}), "action: this field is missing"),
        (
            json!({"expert": 1, "action": "keep", "rank": 3}),
            "rank: unknown field; known here: expert, action",
        ),
        (json!({"expert": 1, "action": "merge", "weight": 0.5}), "into: this field is missing"),
        (
            json!({"expert": 1, "action": "merge", "into": 0, "weight": "x"}),
            "weight: found \"x\", expected a number",
        ),
        (json!({"expert": 1, "action": "low_rank", "rank": 3}), "rank: found 3, expected an object"),
        (
            json!({"expert": 1, "action": "low_rank", "rank": {"gat": 3}}),
            "rank.gat: unknown field; known here: gate, up, down",
        ),
        (
            json!({"expert": 1, "action": "low_rank", "rank": {"gate": "a"}}),
            "rank.gate: found \"a\", expected a whole number, 0 or more",
        ),
        (
            json!({"expert": 1, "action": "channels", "keep": -2}),
            "keep: found -2, expected a whole number, 0 or more",
        ),
        (
            json!({"expert": 1, "action": "channels", "keep": [0, "b"]}),
            "keep: found \"b\", expected whole numbers, 0 or more",
        ),
        (json!({"expert": 1, "action": "delta"}), "rank: this field is missing"),
    ] {
        assert_eq!(entry(1, action), format!("layer 2: expert 1: {message}"));
    }
}

#[test]
fn contradictions_of_a_plan() {
    for (change, message) in [
        (
            (|p| p["moepress"] = json!(3)) as fn(&mut Value),
            "moepress: version 3; this program reads version 1",
        ),
        (
            |p| p["model"]["family"] = json!("olmoe"),
            "model.family: the plan is for olmoe, the checkpoint is mixtral",
        ),
        (
            |p| p["model"]["identity"] = json!("2e"),
            "model.identity: the plan is for the checkpoint 2e, this one is 1d; make a new plan",
        ),
        (
            |p| p["layers"][1]["layer"] = json!(1),
            "layer 1: listed twice or out of order; list every layer once",
        ),
        (|p| p["layers"][1]["layer"] = json!(0), "layer 0: not a MoE layer; the MoE layers are 1 to 3"),
        (
            |p| drop(p["layers"].as_array_mut().unwrap().remove(1)),
            "layer 2: missing; a plan lists every MoE layer",
        ),
        (
            |p| drop(p["layers"].as_array_mut().unwrap().pop()),
            "layer 3: missing; a plan lists every MoE layer",
        ),
        (
            |p| p["layers"][1]["experts"][3]["expert"] = json!(2),
            "layer 2: expert 2: listed twice or out of order; list every expert once",
        ),
        (
            |p| p["layers"][1]["experts"][3]["expert"] = json!(8),
            "layer 2: expert 8: the layer has 8 experts, 0 to 7",
        ),
        (|p| p["layers"][1]["protected"] = json!([9]), "layer 2: expert 9: the layer has 8 experts, 0 to 7"),
        (
            |p| drop(p["layers"][1]["experts"].as_array_mut().unwrap().remove(5)),
            "layer 2: expert 5: missing; list all 8 experts",
        ),
        (
            |p| drop(p["layers"][1]["experts"].as_array_mut().unwrap().pop()),
            "layer 2: expert 7: missing; list all 8 experts",
        ),
        (
            |p| p["layers"][1]["top_k"] = json!(0),
            "layer 2: top_k: 0 with 4 experts left to choose from; use 1 to 4",
        ),
        (
            |p| p["layers"][1]["top_k"] = json!(5),
            "layer 2: top_k: 5 with 4 experts left to choose from; use 1 to 4",
        ),
        (
            |p| p["layers"][1]["skip"] = json!({ "ratio": 1.5 }),
            "layer 2: skip: ratio is 1.5, expected 0 to 1",
        ),
        (
            |p| {
                p["layers"][1]["top_k"] = json!(3);
                p["layers"][1]["skip"] = json!({ "ratio": 0.5 });
            },
            "layer 2: skip: ratio is for routers that choose 2 experts, this one chooses 3; use tail",
        ),
        (|p| p["layers"][1]["skip"] = json!({ "rescale": true }), "layer 2: skip: give either ratio or tail"),
    ] {
        assert_eq!(changed(change), message);
    }
}

#[test]
fn contradictions_of_an_action() {
    let merge =
        |into: usize, weight: f64| json!({"expert": 1, "action": "merge", "into": into, "weight": weight});
    let ranks = |gate: Value, down: Value| json!({"expert": 1, "action": "low_rank", "rank": {"gate": gate, "down": down}});
    let channels = |keep: Value| json!({"expert": 1, "action": "channels", "keep": keep});
    for (action, message) in [
        (merge(1, 0.5), "into: 1 is the expert itself; name another one"),
        (merge(8, 0.5), "into: the layer has no expert 8"),
        (merge(4, 0.5), "into: expert 4 has the action drop itself; name one that stays"),
        (merge(0, 1.5), "weight: found 1.5, expected a share from 0 to 1"),
        (
            ranks(json!(null), json!(null)),
            "rank: no matrix has a rank; give one of gate, up, down, or use keep",
        ),
        (ranks(json!(0), json!(3)), "rank.gate: found 0, expected at least 1, or null for a dense matrix"),
        (ranks(json!(2), json!(9)), "rank.down: found 9, expected 1 to 8 for matrices of 12 × 8"),
        (json!({"expert": 1, "action": "delta", "rank": 0}), "rank: found 0, expected at least 1"),
        (
            json!({"expert": 1, "action": "delta", "rank": 9}),
            "rank: found 9, expected 1 to 8 for matrices of 12 × 8",
        ),
        (channels(json!(0)), "keep: no channel is kept; keep at least 1, or use drop"),
        (channels(json!([])), "keep: no channel is kept; keep at least 1, or use drop"),
        (channels(json!([3, 3])), "keep: channels must be in ascending order, each once"),
        (channels(json!(13)), "keep: found 13, expected 1 to 12 channels"),
        (channels(json!([0, 12])), "keep: found channel 12, expected 0 to 11"),
    ] {
        assert_eq!(entry(1, action), format!("layer 2: expert 1: {message}"));
    }
    let twice = changed(|p| {
        p["layers"][1]["experts"][0] = json!({"expert": 0, "action": "merge", "into": 1, "weight": 0.2});
        p["layers"][1]["experts"][1] = merge(2, 0.3);
    });
    assert_eq!(twice, "layer 2: expert 0: into: expert 1 has the action merge itself; name one that stays");
    let shares = changed(|p| {
        p["layers"][1]["experts"][0] = json!({"expert": 0, "action": "merge", "into": 2, "weight": 0.75});
        p["layers"][1]["experts"][1] = merge(2, 0.5);
    });
    assert_eq!(shares, "layer 2: expert 2: the weights merged into it add up to 1.25, expected at most 1");
}

#[test]
fn group_routers_and_factored_experts() {
    let grouped = MoeProfile { groups: 4, top_groups: 2, ..layer(0, 8, 3) };
    let (profile, statistics) = (profile(vec![grouped]), [counted(&[1.0; 8])]);
    let mut made = plan("frequency", &profile, Some(&statistics), Some(Budget::Experts(7)), &[]).unwrap();
    assert_eq!(dropped(&made), [[7]]);
    made.layers[0].experts[0].action = Action::Drop;
    assert_eq!(
        made.check(&profile).unwrap_err().to_string(),
        "layer 0: top_k: 3 with [1, 2, 2, 1] experts left by group; any 2 groups must hold that many, keep more"
    );
    let message = plan("frequency", &profile, Some(&statistics), Some(Budget::Experts(6)), &[]).unwrap_err();
    assert_eq!(
        message.to_string(),
        "--experts 6: would drop 2 of the 8 experts of layer 0, which must keep 7; the smallest possible is 7"
    );

    let mut factored = profile.clone();
    factored.moe_layers[0].expert_parameters = 100;
    made.layers[0].experts[0].action = Action::Delta { rank: 2 };
    assert_eq!(
        made.check(&factored).unwrap_err().to_string(),
        "layer 0: expert 0: action: the experts of this layer are not all dense; low_rank, channels and delta do not apply"
    );
}
