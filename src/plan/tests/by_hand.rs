//! Cases small enough to check on paper.

use super::*;

/// Two layers of four experts, two chosen per token.
fn small() -> (Profile, Vec<Moments>) {
    let profile = profile(vec![layer(0, 4, 2), layer(2, 4, 2)]);
    let arrays: [&[(Moment, &[f64])]; 2] = [
        &[
            (Moment::Count, &[10.0, 5.0, 0.0, 20.0]),
            (Moment::GateSum, &[6.0, 4.0, 0.0, 2.0]),
            (Moment::NormSum, &[10.0, 20.0, 0.0, 20.0]),
            (Moment::NormSqSum, &[10.0, 100.0, 0.0, 40.0]),
            (Moment::GateNormSum, &[6.0, 16.0, 0.0, 2.0]),
            (Moment::GateNormSqSum, &[5.0, 60.0, 0.0, 1.0]),
            (Moment::SoftCount, &[8.0, 9.0, 7.0, 9.5]),
            (Moment::MaxAbs, &[1.0, 1.0, 0.0, 100.0]),
        ],
        &[
            (Moment::Count, &[9.0, 9.0, 9.0, 9.0]),
            (Moment::GateSum, &[4.0, 4.0, 5.0, 4.0]),
            (Moment::NormSum, &[9.0, 18.0, 27.0, 36.0]),
            (Moment::NormSqSum, &[9.0, 36.0, 81.0, 144.0]),
            (Moment::GateNormSum, &[4.0, 8.0, 12.0, 16.0]),
            (Moment::GateNormSqSum, &[2.0, 7.0, 16.0, 28.0]),
            (Moment::SoftCount, &[8.0, 8.0, 8.0, 8.0]),
            (Moment::MaxAbs, &[1.0, 1.0, 1.0, 1.0]),
        ],
    ];
    (profile, arrays.map(|a| moments(4, a)).to_vec())
}

#[test]
fn every_score_drops_what_it_says() {
    let (profile, statistics) = small();
    for (name, sets) in [
        ("frequency", [[1, 2], [2, 3]]),
        ("seer-hard", [[1, 2], [2, 3]]),
        // Expert 2 saw no token, so its soft count does not help it.
        ("seer-soft", [[0, 2], [2, 3]]),
        ("soft", [[2, 3], [1, 3]]),
        ("ean", [[0, 2], [0, 1]]),
        ("man", [[2, 3], [0, 1]]),
        ("msan", [[0, 2], [0, 1]]),
        ("reap", [[2, 3], [0, 1]]),
        ("wean", [[2, 3], [0, 1]]),
        ("wean2", [[2, 3], [0, 1]]),
    ] {
        let plan = plan(name, &profile, Some(&statistics), Some(Budget::Experts(2)), &[]).unwrap();
        assert_eq!(dropped(&plan), sets, "{name}");
        assert_eq!(plan.warnings, ["layer 0: 1 of 4 experts saw no token: 2"], "{name}");
        assert_eq!(plan.experts_kept(), [2, 2], "{name}");
    }
}

/// In a checkpoint that was compressed before, a quarter of the experts is not a quarter of their parameters.
#[test]
fn a_share_of_unequal_experts_is_one_of_parameters() {
    let each = [288, 288, 36, 36].map(|p| ExpertSize { parameters: p, bytes: 2 * p, alias_of: None });
    let mixed = MoeProfile { expert_parameters: 162, expert_bytes: 324, each: each.into(), ..layer(0, 4, 1) };
    let profile = profile(vec![mixed, layer(2, 4, 1)]);
    let statistics = [counted(&[9.0, 8.0, 1.0, 2.0]), counted(&[7.0, 6.0, 5.0, 4.0])];
    let dropped_of = |share: f64, options: &[&str]| {
        plan("frequency", &profile, Some(&statistics), Some(Budget::Remove(share)), options)
            .map(|plan| (dropped(&plan), plan.expected.removed_fraction))
    };
    // 36, 72 and 360 of 648 parameters go with the first one, two, three; 324 are asked for.
    let (experts, fraction) = dropped_of(0.5, &[]).unwrap();
    assert_eq!(experts, [vec![1, 2, 3], vec![2, 3]]);
    assert_eq!(fraction, (360.0 + 576.0) / (648.0 + 1152.0));
    // 36, 72, 360, 648 and 936 of 1800 in order of the counts; 900 are asked for.
    let (experts, _) = dropped_of(0.5, &["scope=global"]).unwrap();
    assert_eq!(experts, [vec![2, 3], vec![1, 2, 3]]);
    // 360 is as near to the 389 of layer 0 as it gets.
    let (experts, _) = dropped_of(0.6, &[]).unwrap();
    assert_eq!(experts, [vec![1, 2, 3], vec![2, 3]]);
    let (experts, _) = dropped_of(0.04, &[]).unwrap();
    assert_eq!(experts, [vec![2], vec![]]);
    assert_eq!(
        dropped_of(0.8, &[]).unwrap_err().to_string(),
        "--remove 0.8: would drop 4 of the 4 experts of layer 0, which must keep 1; the largest possible is 0.5555"
    );
}

#[test]
fn sizes_after_dropping_count_experts_and_router_rows() {
    let (profile, statistics) = small();
    let plan = plan("reap", &profile, Some(&statistics), Some(Budget::Remove(0.25)), &[]).unwrap();
    assert_eq!(dropped(&plan), [[2], [0]]);
    let expected = Expected {
        parameters: profile.parameters - 2 * (288 + 9),
        routed_parameters: 6 * 288,
        bytes: profile.bytes - 2 * (576 + 20),
        routed_bytes: 6 * 576,
        removed_fraction: 0.25,
        experts: 6,
    };
    assert_eq!(plan.expected, expected);
}

#[test]
fn sizes_of_every_form() {
    let (profile, statistics) = small();
    let mut plan = plan("reap", &profile, Some(&statistics), Some(Budget::Experts(3)), &[]).unwrap();
    let ranks = Ranks { gate: Some(2), up: None, down: Some(3) };
    for (action, parameters, bytes) in [
        (Action::Keep, 288, 576),
        (Action::Drop, 0, 0),
        (Action::Merge { into: 3, weight: 0.5 }, 0, 0),
        (Action::Constant, 8, 32),
        (Action::low_rank(ranks), 96 + 5 * 20, 2 * (96 + 5 * 20)),
        (
            Action::LowRank { rank: ranks, rows: Ranks { gate: Some(4), up: None, down: Some(1) } },
            96 + 5 * 20 + 4 * 8 + 12,
            2 * (96 + 5 * 20 + 4 * 8 + 12) + 4 * 5,
        ),
        (Action::Channels { keep: Channels::Count(5) }, 3 * 8 * 5, 2 * 3 * 8 * 5),
        (Action::Channels { keep: Channels::List(vec![0, 7]) }, 3 * 8 * 2, 2 * 3 * 8 * 2),
        // The difference and, once per layer, the base.
        (Action::Delta { rank: 2 }, 3 * 2 * 20 + 288, 2 * (3 * 2 * 20 + 288)),
    ] {
        plan.layers[0].experts[0].action = action.clone();
        let expected = plan.expect(&profile).unwrap();
        // Expert 2 of the first and expert 0 of the second layer are dropped.
        assert_eq!(expected.routed_parameters, 5 * 288 + parameters, "{action:?}");
        assert_eq!(expected.routed_bytes, 5 * 576 + bytes, "{action:?}");
        assert_eq!(expected.experts, 5 + u64::from(action.is_stored()), "{action:?}");
    }
    // Several deltas of a layer share their base, and factors may be wider than the weights.
    plan.layers[0].experts[0].action = Action::Delta { rank: 1 };
    plan.layers[0].experts[1].action = Action::Delta { rank: 1 };
    plan.options.insert("factor_dtype".into(), "f32".into());
    let expected = plan.expect(&profile).unwrap();
    assert_eq!(expected.routed_parameters, 5 * 288 + 2 * 60);
    assert_eq!(expected.routed_bytes, 5 * 576 + 4 * 2 * 60);
}

#[test]
fn global_scope_compares_layers() {
    let (profile, statistics) = small();
    let budget = |f| Some(Budget::Remove(f));
    let sets = |f, options: &[&str]| {
        dropped(&plan("wean", &profile, Some(&statistics), budget(f), options).unwrap())
    };
    // Ascending: 0 (layer 0), 2 (layer 0), 4 (layer 2), 6 (layer 0, passed over), 8 (layer 2).
    assert_eq!(sets(0.25, &["scope=global"]), [vec![2, 3], vec![]]);
    assert_eq!(sets(0.375, &["scope=global"]), [vec![2, 3], vec![0]]);
    assert_eq!(sets(0.5, &["scope=global"]), [[2, 3], [0, 1]]);
    assert_eq!(sets(0.25, &["scope=global", "floor=3"]), [[2], [0]]);
}

#[test]
fn ties_go_to_the_lower_expert_in_a_layer_and_to_the_lower_layer_globally() {
    let profile = profile(vec![layer(0, 4, 1), layer(1, 4, 1)]);
    let statistics = [counted(&[5.0; 4]), counted(&[5.0; 4])];
    let sets = |options: &[&str]| {
        dropped(&plan("frequency", &profile, Some(&statistics), Some(Budget::Remove(0.5)), options).unwrap())
    };
    assert_eq!(sets(&["scope=layer"]), [[2, 3], [2, 3]]);
    assert_eq!(sets(&["scope=global"]), [vec![0, 1, 2], vec![0]]);
}

#[test]
fn layers_of_different_sizes_lose_the_same_share() {
    let profile = profile(vec![layer(0, 8, 2), layer(1, 4, 2), layer(2, 6, 2)]);
    let counts = [8, 4, 6].map(|n| counted(&(1..=n).map(f64::from).collect::<Vec<_>>()));
    let kept = |budget, options: &[&str]| {
        plan("frequency", &profile, Some(&counts), Some(budget), options).unwrap().experts_kept()
    };
    // 0.25·6 = 1.5 rounds to the even 2.
    assert_eq!(kept(Budget::Remove(0.25), &[]), [6, 3, 4]);
    assert_eq!(kept(Budget::Experts(3), &[]), [3, 3, 3]);
    assert_eq!(kept(Budget::Experts(4), &[]), [4, 4, 4]);
    let now = profile.bytes + profile.header_bytes;
    let one = 576 + 20 + 300;
    // The first expert of 8 is due at 1/16, that of 6 at 1/12, that of 4 at 1/8.
    assert_eq!(kept(Budget::Bytes(now - 1), &[]), [7, 4, 6]);
    assert_eq!(kept(Budget::Bytes(now - one), &[]), [7, 4, 6]);
    assert_eq!(kept(Budget::Bytes(now - one - 1), &[]), [7, 4, 5]);
    assert_eq!(kept(Budget::Bytes(now - 3 * one), &[]), [7, 3, 5]);
    assert_eq!(kept(Budget::Bytes(now - one - 1), &["scope=global"]), [7, 3, 6]);
}

#[test]
fn experts_of_different_sizes_are_weighed_not_counted() {
    let wide = MoeProfile { expert_parameters: 3 * 288, expert_bytes: 6 * 288, width: 36, ..layer(1, 4, 1) };
    let profile = profile(vec![layer(0, 4, 1), wide]);
    let statistics = [counted(&[1.0, 2.0, 30.0, 40.0]), counted(&[3.0, 4.0, 50.0, 60.0])];
    let kept = |f| {
        let budget = Some(Budget::Remove(f));
        plan("frequency", &profile, Some(&statistics), budget, &["scope=global"]).unwrap().experts_kept()
    };
    // In units of 288 parameters of all 16: 1, 2, 5, 8, 9, 12.
    assert_eq!(kept(1.0 / 16.0), [3, 4]);
    assert_eq!(kept(3.4 / 16.0), [2, 4]);
    assert_eq!(kept(3.6 / 16.0), [2, 3]);
    assert_eq!(kept(11.9 / 16.0), [1, 1]);
}

#[test]
fn random_is_reproducible_and_independent_of_other_layers() {
    let two = profile(vec![layer(0, 16, 2), layer(3, 16, 2)]);
    let one = profile(vec![layer(3, 16, 2)]);
    let sets = |profile, options: &[&str]| {
        dropped(&plan("random", profile, None, Some(Budget::Experts(8)), options).unwrap())
    };
    let first = sets(&two, &[]);
    // Computed by another implementation of ChaCha8 from the documented rule.
    assert_eq!(first, [[2, 3, 4, 5, 6, 7, 8, 13], [1, 2, 4, 6, 7, 10, 11, 12]]);
    assert_eq!(first, sets(&two, &["seed=0"]));
    assert_ne!(first, sets(&two, &["seed=1"]));
    assert_eq!(first[1..], sets(&one, &[]));
}

#[test]
fn protected_experts_stay() {
    let (profile, statistics) = small();
    let make = |options: &[&str]| {
        plan("soft", &profile, Some(&statistics), Some(Budget::Experts(2)), options).unwrap()
    };
    let guarded = make(&["protect=super"]);
    assert_eq!(dropped(&guarded), [[1, 2], [1, 3]]);
    assert_eq!(guarded.layers[0].protected, [3]);
    assert!(guarded.layers[1].protected.is_empty());
    let options = &guarded.options;
    let again = rescore_layer("soft", options, &profile.moe_layers[0], &statistics[0], 2, &[3]).unwrap();
    assert_eq!(again, [1, 2]);
    assert_eq!(dropped(&make(&[])), [[2, 3], [1, 3]]);
    let global = make_global(&profile, &statistics);
    assert!(!dropped(&global)[0].contains(&3));
}

fn make_global(profile: &Profile, statistics: &[Moments]) -> Plan {
    let options = ["protect=super", "scope=global"];
    plan("soft", profile, Some(statistics), Some(Budget::Remove(0.5)), &options).unwrap()
}

#[test]
fn groups_lose_evenly_where_that_is_possible() {
    let grouped = MoeProfile { groups: 4, top_groups: 2, ..layer(0, 12, 4) };
    let profile = profile(vec![grouped]);
    let statistics = [counted(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])];
    let sets = |kept| {
        dropped(&plan("frequency", &profile, Some(&statistics), Some(Budget::Experts(kept)), &[]).unwrap())
    };
    assert_eq!(sets(8), [[0, 3, 6, 9]]);
    // Two groups must hold 4: the first may lose 2 while all others keep 3.
    assert_eq!(sets(10), [[0, 1]]);
    // A second one of the first group would leave no room for a third one anywhere.
    assert_eq!(sets(9), [[0, 3, 6]]);
}

#[test]
fn layers_and_experts_in_any_order_are_sorted_on_reading() {
    let (profile, statistics) = small();
    let plan = plan("reap", &profile, Some(&statistics), Some(Budget::Experts(3)), &[]).unwrap();
    let mut shuffled = serde_json::to_value(&plan).unwrap();
    shuffled["layers"].as_array_mut().unwrap().reverse();
    shuffled["layers"][0]["experts"].as_array_mut().unwrap().reverse();
    let read = Plan::from_json(&shuffled.to_string()).unwrap();
    assert_eq!(read.layers, plan.layers);
}

#[test]
fn the_file_has_one_expert_per_line() {
    let profile = profile(vec![layer(0, 3, 1), layer(4, 2, 1)]);
    let statistics = [counted(&[3.0, 1.0, 2.0]), counted(&[1.0, 2.0])];
    let source = StatisticsRef { file: "s.safetensors".into(), sha256: "ab".into(), tokens: 640 };
    let options = BTreeMap::new();
    let request = Request {
        statistics: Some(&statistics),
        source: Some(&source),
        budget: Some(Budget::Experts(1)),
        options: &options,
        ..Request::new(&profile)
    };
    let mut plan = method("frequency").unwrap().plan(&request).unwrap();
    plan.layers[0].experts[0].action = Action::low_rank(Ranks { gate: Some(3), up: None, down: Some(2) });
    plan.layers[1].protected = vec![1];
    let text = r#"{
  "moepress": 1,
  "method": "frequency",
  "options": {"floor": null, "layer_ratio": "uniform", "owl_lambda": 0.08, "owl_m": 5, "propagate": false, "protect": "none", "protect_all_layers": false, "scope": "layer"},
  "model": {"family": "mixtral", "identity": "1d"},
  "statistics": {"file": "s.safetensors", "sha256": "ab", "tokens": 640},
  "layers": [
    {"layer": 0, "top_k": 1, "experts": [
      {"expert": 0, "action": "low_rank", "rank": {"gate": 3, "up": null, "down": 2}},
      {"expert": 1, "action": "drop"},
      {"expert": 2, "action": "drop"}
    ]},
    {"layer": 4, "top_k": 1, "experts": [
      {"expert": 0, "action": "drop"},
      {"expert": 1, "action": "keep"}
    ], "protected": [1]}
  ],
  "expected": {"parameters": 1594, "routed_parameters": 576, "bytes": 3192, "routed_bytes": 1152, "removed_fraction": 0.6, "experts": 2}
}
"#;
    assert_eq!(plan.to_json(), text);
    assert_eq!(Plan::from_json(text).unwrap(), plan);
}

#[test]
fn writing_replaces_the_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan.json");
    let (profile, statistics) = small();
    let mut plan = plan("reap", &profile, Some(&statistics), Some(Budget::Experts(3)), &[]).unwrap();
    std::fs::write(&path, "before").unwrap();
    plan.write(&path).unwrap();
    plan.warnings.clear();
    assert_eq!(Plan::read(&path).unwrap(), plan);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // Where the rename fails, the temporary file goes again.
    let blocked = folder.path().join("folder");
    std::fs::create_dir(&blocked).unwrap();
    assert!(matches!(plan.write(&blocked), Err(Error::Io { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// Two coordinates with variances 9/4 and 4 have the spread 5/2; the expert that saw nothing goes first.
#[test]
fn novices_are_the_experts_of_least_spread() {
    let (profile, _) = small();
    let arrays = |sums: [f64; 4], squares: [f64; 4]| {
        let wide = |values: [f64; 4], second: f64| {
            values.iter().flat_map(|v| [vec![*v, second], vec![0.0; 6]].concat()).collect::<Vec<_>>()
        };
        let (sums, squares) = (wide(sums, 0.0), wide(squares, 8.0));
        let of = [
            (Moment::Count, &[2.0, 2.0, 0.0, 2.0][..]),
            (Moment::GateSum, &[0.1, 2.0, 0.0, 0.3]),
            (Moment::OutputSum, &sums),
            (Moment::OutputSqSum, &squares),
        ];
        moments(4, &of)
    };
    let layer = || arrays([3.0, 0.0, 9.0, 2.0], [9.0, 0.0, 99.0, 20.0]);
    let statistics = [layer(), layer()];
    let novices = |score: &str| {
        let options = [score, "floor=2"];
        let plan = plan("mone", &profile, Some(&statistics), Some(Budget::Experts(2)), &options).unwrap();
        let constant = |e: &&ExpertPlan| e.action == Action::Constant;
        plan.layers[0].experts.iter().filter(constant).map(|e| e.expert).collect::<Vec<_>>()
    };
    // Spreads 2.5, 2 and √13.
    assert_eq!(novices("score=mone-frequency"), [1, 2]);
    assert_eq!(novices("score=mone-soft"), [0, 2]);
    assert_eq!(novices("score=frequency"), [2, 3]);
}

#[test]
fn every_method_explains_itself() {
    assert!(methods().len() > 12);
    for m in methods() {
        assert!(std::ptr::addr_eq(method(m.name()).unwrap(), *m), "{}", m.name());
        assert!(!m.description().is_empty() && !m.description().contains('\n'));
        assert!(m.options().iter().all(|o| !o.help.is_empty()));
        let measured = m.needs().statistics || m.needs().tokens;
        let unmeasured = ["random", "router-norm", "low-rank", "modegpt", "d2-moe"];
        assert_eq!(measured, !unmeasured.contains(&m.name()));
        assert_eq!(m.paper().is_none(), m.name() == "random");
    }
}
