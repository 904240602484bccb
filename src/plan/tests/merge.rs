//! Methods that merge: groups against the reference, sizes against published ones, properties, and every message.

use std::fs;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

use super::reference::{MODELS, Reference};
use super::*;

/// The groups of a layer, each with the expert that takes in the others first, those in ascending order.
fn groups(plan: &LayerPlan) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for entry in plan.experts.iter().filter(|e| e.action.is_stored()) {
        groups.push(vec![entry.expert]);
    }
    for entry in &plan.experts {
        if let Action::Merge { into, .. } = entry.action {
            groups.iter_mut().find(|g| g[0] == into).unwrap().push(entry.expert);
        }
    }
    groups
}

/// The share of every expert in its group's mean.
fn shares(plan: &LayerPlan) -> Vec<f64> {
    let mut shares = vec![1.0; plan.experts.len()];
    for entry in &plan.experts {
        if let Action::Merge { into, weight } = entry.action {
            shares[entry.expert] = weight;
            shares[into] -= weight;
        }
    }
    shares
}

/// Moments with counts, router logits and outputs of `hidden` coordinates.
fn measured(count: &[f64], logits: &[f64], outputs: &[f64]) -> Moments {
    let experts = count.len();
    let dims = MomentDims { experts, hidden_size: outputs.len() / experts, width: 12, files: 1 };
    let arrays = BTreeMap::from([
        (Moment::Count, count.to_vec()),
        (Moment::GateNormSum, count.to_vec()),
        (Moment::RouterGram, logits.to_vec()),
        (Moment::SampleCount, vec![1.0]),
        (Moment::SampleOutputSum, outputs.to_vec()),
        (Moment::GateOutputSum, outputs.to_vec()),
        (
            Moment::OutputSum,
            outputs.iter().enumerate().map(|(i, v)| v * count[i / dims.hidden_size]).collect(),
        ),
    ]);
    Moments::from_arrays(dims, arrays).unwrap()
}

/// The reference with router logits and outputs.
fn reference(name: &'static str) -> Option<Reference> {
    let mut reference = Reference::open(name)?;
    let file = fs::read(reference.folder.join("stats.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let read = |name: &str, layer: usize| -> Vec<f64> {
        let tensor = tensors.tensor(name).unwrap();
        let values = tensor.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
        let size = tensor.shape()[1..].iter().product();
        values.skip(layer * size).take(size).collect()
    };
    for (l, moments) in reference.statistics.iter_mut().enumerate() {
        let count = moments.get(Moment::Count).unwrap().to_vec();
        let mean = read("mean_out", l);
        let mut all = measured(&count, &read("router_logit_cosine", l), &read("mean_out_all", l));
        let width = mean.len() / count.len();
        all.put(Moment::OutputSum, mean.iter().enumerate().map(|(i, v)| v * count[i / width]).collect());
        *moments = all;
    }
    Some(reference)
}

/// Groups of the reference, in the order of [`groups`].
fn expected(layer: &Value, first_leads: bool, count: &[f64]) -> Vec<Vec<usize>> {
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let list = |g: &Value| g.as_array().unwrap().iter().map(number).collect::<Vec<_>>();
    let mut groups: Vec<Vec<usize>> = layer["groups"].as_array().unwrap().iter().map(list).collect();
    for group in &mut groups {
        if !first_leads {
            let best = group.iter().copied().max_by(|a, b| count[*a].total_cmp(&count[*b]).then(b.cmp(a)));
            group.sort_by_key(|e| (Some(*e) != best, *e));
        }
        group[1..].sort_unstable();
    }
    groups.sort();
    groups
}

#[test]
fn groups_are_those_of_the_reference() {
    for reference in MODELS.into_iter().filter_map(reference) {
        for (file, first_leads) in [("mc_smoe.json", true), ("hc_smoe.json", false)] {
            if !reference.folder.join(file).exists() {
                continue;
            }
            let json = reference.json(file);
            for (key, variant) in json["variants"].as_object().unwrap() {
                let (kind, percent) = key.split_once('.').unwrap();
                let budget = Budget::Remove(percent.parse::<f64>().unwrap() / 100.0);
                let plan = match file {
                    "mc_smoe.json" => reference.plan("m-smoe", budget, &[&format!("grouping={kind}")]),
                    _ => reference.plan("hc-smoe", budget, &[&format!("basis={kind}")]),
                };
                for (i, layer) in plan.layers.iter().enumerate() {
                    let place = format!("{} {file} {key} layer {}", reference.name, layer.layer);
                    let count = reference.statistics[i].get(Moment::Count).unwrap();
                    let expected = expected(&variant["layers"][i], first_leads, count);
                    assert_eq!(groups(layer), expected, "{place}");
                    let shares = shares(layer);
                    for group in &expected {
                        let total: f64 = group.iter().map(|e| count[*e]).sum();
                        for e in group.iter().filter(|_| total > 0.0) {
                            assert!((shares[*e] - count[*e] / total).abs() < 1e-12, "{place}");
                        }
                    }
                    assert_eq!(layer.router, MergedRows::Redirect);
                }
            }
        }
    }
}

/// Switch-base-32 as published: 88 experts in 11 of 12 MoE layers, and 32 in the one that is left out.
#[test]
fn sizes_are_the_published_ones() {
    let (d, p, experts) = (768, 3072, 32);
    let expert = 2 * d * p;
    let switch = |layer: usize| MoeProfile {
        layer,
        experts,
        top_k: 1,
        width: p as usize,
        ungated: true,
        expert_parameters: expert,
        expert_bytes: 4 * expert,
        router_parameters: d,
        router_bytes: 4 * d,
        ..super::layer(layer, experts, 1)
    };
    let moe_layers: Vec<_> = (0..12).map(|l| switch(2 * l + 1)).collect();
    // Embedding of 32128 tokens; attention of 12 encoder and 12 decoder blocks with cross-attention; dense feed-forward
    // parts in every other block; norms and relative positions.
    let attention = 4 * d * 64 * 12;
    let rest = 32128 * d + 36 * attention + 12 * expert + (12 * 2 + 12 * 3 + 2) * d + 2 * 32 * 12;
    let routed = 12 * experts as u64 * expert;
    let routers = 12 * experts as u64 * d;
    let profile = Profile {
        family: "switch_transformers".into(),
        hidden_size: d as usize,
        parameters: rest + routed + routers,
        bytes: 4 * (rest + routed + routers),
        moe_layers,
        ..profile(Vec::new())
    };
    let millions = |parameters: u64| (parameters as f64 / 1e6).round();
    assert_eq!(millions(profile.parameters), 1979.0);
    let count: Vec<f64> = (0..experts).map(|e| (e + 1) as f64).collect();
    let statistics = vec![measured(&count, &[1.0; 1024], &vec![1.0; experts * 8]); 12];
    let plan = plan("m-smoe", &profile, Some(&statistics), Some(Budget::Experts(8)), &["exclude=1"]).unwrap();
    assert_eq!(plan.experts_kept(), [32, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8]);
    assert_eq!(plan.expected.experts, 88 + 32);
    assert_eq!(plan.expected.routed_parameters, 120 * expert);
    assert_eq!(millions(plan.expected.parameters), 733.0);
    let make = |experts: usize, options: &[&str]| {
        let options = [&["exclude=1"], options].concat();
        super::plan("mc-smoe", &profile, Some(&statistics), Some(Budget::Experts(experts)), &options).unwrap()
    };
    // Two matrices of rank 32 per merged expert, 245 760 values, and a tenth of their rows, 472 320.
    let factored = 245_760 + 307 * d + 77 * p;
    let both = make(8, &[]).expected;
    assert_eq!(both.routed_parameters, 88 * factored + 32 * expert);
    assert_eq!(millions(both.parameters), 381.0);
    // Without merging.
    let whole = make(32, &[]);
    assert_eq!(whole.experts_kept(), [32; 12]);
    assert_eq!(whole.expected.routed_parameters, 11 * 32 * factored + 32 * expert);
    assert_eq!(millions(whole.expected.parameters), 570.0);
    let factors = |options: &[&str]| make(8, options).expected.routed_parameters;
    assert_eq!(factors(&["dense_rows=0"]), 88 * 245_760 + 32 * expert);
    assert_eq!(factors(&["dense_rows=0", "rank=500"]), 88 * 500 * 2 * (d + p) + 32 * expert);
}

fn two_layers() -> (Profile, Vec<Moments>) {
    let profile = profile(vec![layer(1, 4, 2), layer(2, 4, 2)]);
    let logits = |a: f64| vec![1.0, a, 0.0, 0.5, a, 1.0, 0.1, 0.2, 0.0, 0.1, 1.0, 0.3, 0.5, 0.2, 0.3, 1.0];
    let outputs: Vec<f64> = (0..32).map(|i| f64::from(i * 7 % 11) - 5.0).collect();
    let statistics = [0.9, 0.1].map(|a| measured(&[5.0, 3.0, 2.0, 0.0], &logits(a), &outputs));
    (profile, statistics.to_vec())
}

/// With `router=fuse` every layer keeps as many groups as a token chooses.
#[test]
fn fused_routers_keep_enough_rows() {
    let (profile, _) = two_layers();
    let skewed = vec![measured(&[9.0, 1.0, 0.0, 0.0], &[1.0; 16], &[1.0; 32]); 1];
    let even = vec![measured(&[3.0, 3.0, 2.0, 2.0], &[1.0; 16], &[1.0; 32]); 1];
    let statistics = [skewed, even].concat();
    let kept = |options: &[&str]| {
        plan("m-smoe", &profile, Some(&statistics), Some(Budget::Experts(2)), options).unwrap().experts_kept()
    };
    assert_eq!(kept(&[]), [1, 3]);
    assert_eq!(kept(&["router=fuse"]), [2, 2]);
    assert_eq!(kept(&["grouping=uniform"]), [2, 2]);
}

/// A group of experts that no token chose is averaged evenly instead of becoming all zeros.
#[test]
fn groups_without_tokens_are_averaged_evenly() {
    let profile = profile(vec![layer(1, 4, 1)]);
    let mut logits = vec![0.0; 16];
    (0..4).for_each(|e| logits[e * 5] = 1.0);
    logits[2 * 4 + 1] = 0.9;
    logits[3 * 4 + 1] = 0.9;
    let statistics = [measured(&[5.0, 0.0, 0.0, 0.0], &logits, &[1.0; 32])];
    let options = ["grouping=uniform"];
    let plan = plan("m-smoe", &profile, Some(&statistics), Some(Budget::Experts(2)), &options).unwrap();
    assert_eq!(groups(&plan.layers[0]), [vec![0], vec![1, 2, 3]]);
    let third = 1.0 / 3.0;
    assert!(
        shares(&plan.layers[0]).iter().zip([1.0, third, third, third]).all(|(a, b)| (a - b).abs() < 1e-15)
    );
}

#[test]
fn mc_smoe_factorises_what_it_stores() {
    let (profile, statistics) = two_layers();
    let make = |options: &[&str]| {
        plan("mc-smoe", &profile, Some(&statistics), Some(Budget::Experts(3)), options).unwrap()
    };
    // 2·(8 + 12) values are fewer than 8·12, 32 is more than the matrices have rows.
    let small = make(&["rank=2", "exclude=2"]);
    for entry in &small.layers[0].experts {
        assert!(matches!(entry.action, Action::Merge { .. } | Action::LowRank { .. }), "{entry:?}");
    }
    assert!(small.layers[1].experts.iter().all(|e| e.action == Action::Keep));
    let large = make(&["rank=8"]);
    assert!(
        large.layers.iter().flat_map(|l| &l.experts).all(|e| !matches!(e.action, Action::LowRank { .. }))
    );
}

/// The default rank is for matrices of a real model: where it saves nothing the matrices stay, and the plan says so. A rank
/// that was asked for and cannot be is an error.
#[test]
fn ranks_that_save_nothing_leave_matrices_alone() {
    let (profile, statistics) = two_layers();
    let make = |method: &str, options: &[&str]| {
        plan(method, &profile, Some(&statistics), Some(Budget::Experts(3)), options).unwrap()
    };
    let (merged, both) = (make("m-smoe", &[]), make("mc-smoe", &[]));
    assert_eq!(both.layers, merged.layers);
    let warned = "layer 1 to 2: factors of rank 32 and dense rows would not be smaller than the matrices, which stay as they \
                  are; give a smaller rank";
    assert_eq!(both.warnings, [&merged.warnings[..], &[warned.into()]].concat());
    assert_eq!(make("mc-smoe", &["rank=2"]).warnings, merged.warnings);
}

/// Routers that choose among groups of experts first: REAM keeps the most salient of each group, methods whose groups are
/// what they are say what to do.
#[test]
fn rows_that_go_leave_group_limited_routers_enough() {
    let grouped = profile(vec![MoeProfile { groups: 3, top_groups: 2, ..layer(1, 6, 3) }]);
    let logits: Vec<f64> = (0..36).map(|i| if i % 7 == 0 { 1.0 } else { 0.1 }).collect();
    let outputs: Vec<f64> = (0..48).map(|i| f64::from(i * 7 % 11) - 5.0).collect();
    let statistics = [measured(&[9.0, 8.0, 7.0, 6.0, 2.0, 1.0], &logits, &outputs)];
    let make =
        |method: &str, n, options: &[&str]| plan(method, &grouped, Some(&statistics), Some(n), options);
    // Any two groups hold three experts: one group may lose one row, where the plan without groups would lose two of the last.
    let five = make("ream", Budget::Experts(5), &[]).unwrap();
    assert_eq!(groups(&five.layers[0]).iter().map(|g| g[0]).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let says = |method, n| make(method, n, &["router=fuse"]).unwrap_err().to_string();
    assert_eq!(
        says("ream", Budget::Experts(3)),
        "--experts 3: would drop 3 of the 6 experts of layer 1, which must keep 5; the smallest possible is 5; --set \
         router=redirect keeps all rows and can merge more"
    );
    assert_eq!(make("ream", Budget::Experts(3), &["router=redirect"]).unwrap().experts_kept(), [3]);
    let wide = profile(vec![MoeProfile { groups: 2, top_groups: 1, ..layer(1, 6, 2) }]);
    let make = |method: &str, options: &[&str]| {
        plan(method, &wide, Some(&statistics), Some(Budget::Experts(4)), options)
    };
    // The three most used are all of the first group, and so would be its rows.
    assert_eq!(
        make("m-smoe", &["router=fuse"]).unwrap_err().to_string(),
        "option router=fuse: layer 1 would keep [3, 1] rows in the groups of its router, of which any 1 must hold the 2 \
         that a token chooses; use redirect, which keeps all rows, or remove less"
    );
    let kept = make("ream", &[]).unwrap();
    assert_eq!(groups(&kept.layers[0]).iter().map(|g| g[0]).collect::<Vec<_>>(), [0, 1, 3, 4]);
}

#[test]
fn ream_groups_around_the_most_salient() {
    let profile = profile(vec![layer(1, 4, 1)]);
    let mut outputs = vec![0.0; 32];
    for (e, direction) in [0, 0, 1, 1].into_iter().enumerate() {
        outputs[e * 8 + direction] = 1.0;
    }
    let mut statistics = measured(&[1.0; 4], &[0.0; 16], &outputs);
    statistics.put(Moment::GateNormSum, vec![4.0, 2.0, 1.0, 3.0]);
    let make = |size: &str| {
        let statistics = [statistics.clone()];
        plan("ream", &profile, Some(&statistics), Some(Budget::Experts(2)), &[size]).unwrap()
    };
    // The first takes in all that fit into its group, the nearest first.
    let large = make("group_size=16");
    assert_eq!(groups(&large.layers[0]), [vec![0, 1, 2], vec![3]]);
    assert_eq!(large.layers[0].router, MergedRows::Fuse);
    let small = make("group_size=2");
    assert_eq!(groups(&small.layers[0]), [vec![0, 1], vec![3, 2]]);
    assert!((shares(&small.layers[0])[1] - 2.0 / 6.0).abs() < 1e-15);
    let again =
        regroup_layer("ream", &small.options, &profile.moe_layers[0], &statistics, &small.layers[0]).unwrap();
    assert_eq!(again, small.layers[0]);
}

fn message(method: &str, budget: Option<Budget>, options: &[&str]) -> String {
    let (profile, statistics) = two_layers();
    plan(method, &profile, Some(&statistics), budget, options).unwrap_err().to_string()
}

#[test]
fn messages() {
    let half = Some(Budget::Remove(0.5));
    for (method, budget, options, expected) in [
        ("m-smoe", None, &[][..], "m-smoe: no budget; give --remove, --experts or --bytes"),
        ("mc-smoe", None, &[], "mc-smoe: no budget; give --remove, --experts or --bytes"),
        (
            "m-smoe",
            Some(Budget::Remove(0.95)),
            &[],
            "--remove 0.95: would drop 4 of the 4 experts of layer 1, which must keep 1; the largest possible is 0.75",
        ),
        (
            "hc-smoe",
            Some(Budget::Experts(1)),
            &["router=fuse"],
            "--experts 1: would drop 3 of the 4 experts of layer 1, which must keep 2; the smallest possible is 2; \
             --set router=redirect keeps all rows and can merge more",
        ),
        ("ream", Some(Budget::Experts(5)), &[], "--experts 5: layer 1 has 4 experts; use fewer"),
        (
            "ream",
            Some(Budget::Experts(4)),
            &[],
            "--experts 4: every layer has 4 experts, so nothing would be removed",
        ),
        (
            "m-smoe",
            Some(Budget::Bytes(10)),
            &[],
            "--bytes 10: the smallest size this method can reach is 4912 bytes (4.91 kB)",
        ),
        ("m-smoe", half, &["grouping=best"], "option grouping=best: expected one of exact, strict, uniform"),
        ("m-smoe", half, &["exclude=3"], "option exclude=3: layer 3 is not a MoE layer of this checkpoint"),
        ("hc-smoe", half, &["exclude=1-2"], "option exclude=1-2: no layer is left to merge"),
        ("ream", half, &["exclude=2-1"], "option exclude=2-1: expected layer numbers such as 0,3-5"),
        ("ream", half, &["exclude=x"], "option exclude=x: expected layer numbers such as 0,3-5"),
        ("m-smoe", half, &["capacity=1"], "option capacity=1: expected a whole number, at least 2"),
        (
            "m-smoe",
            Some(Budget::Experts(1)),
            &["capacity=3"],
            "option capacity=3: 1 groups of layer 1 cannot hold its 4 experts; use at least 4",
        ),
        (
            "ream",
            Some(Budget::Experts(1)),
            &["group_size=3", "router=redirect"],
            "option group_size=3: 1 groups of layer 1 cannot hold its 4 experts; use at least 4",
        ),
        (
            "mc-smoe",
            half,
            &["rank=9"],
            "option rank=9: expected at most 8 for the matrices of layer 1, 12 × 8",
        ),
        ("mc-smoe", half, &["dense_rows=1"], "option dense_rows=1: expected 0 or a number below 1"),
    ] {
        assert_eq!(message(method, budget, options), expected);
    }
}

/// Groups that cannot take in more bound what is asked of a size, and do not refuse it.
#[test]
fn a_size_is_met_by_groups_of_a_largest_size() {
    let (profile, statistics) = two_layers();
    let now = Budget::Experts(3);
    for (method, option) in [("m-smoe", "capacity=2"), ("ream", "group_size=2"), ("ream", "group_size=3")] {
        let options = [option, "router=redirect"];
        let counted = plan(method, &profile, Some(&statistics), Some(now), &options).unwrap();
        let size = counted.bytes_on_disk(&profile).unwrap();
        let sized = plan(method, &profile, Some(&statistics), Some(Budget::Bytes(size)), &options).unwrap();
        assert!(sized.bytes_on_disk(&profile).unwrap() <= size, "{method} {option}");
        assert_eq!(sized.experts_kept().iter().sum::<usize>(), counted.experts_kept().iter().sum::<usize>());
    }
}

/// The rows of merged experts count until they go; a wider type of merged experts counts where something is merged.
#[test]
fn sizes_of_merged_layers() {
    let (profile, statistics) = two_layers();
    let make = |options: &[&str]| {
        let plan = plan("m-smoe", &profile, Some(&statistics), Some(Budget::Experts(3)), options).unwrap();
        assert_eq!(plan.expected.experts, 6);
        (plan.expected.parameters, plan.expected.bytes)
    };
    // An expert has 288 parameters in 576 bytes, a router row 9 in 20.
    let (parameters, bytes) = (profile.parameters - 2 * 288, profile.bytes - 2 * 576);
    assert_eq!(make(&["grouping=uniform"]), (parameters, bytes));
    assert_eq!(make(&["grouping=uniform", "router=fuse"]), (parameters - 2 * 9, bytes - 2 * 20));
    assert_eq!(make(&["grouping=uniform", "merge_dtype=f32"]), (parameters, bytes + 2 * 576));
    // Packed experts of 1 byte per number are unpacked where they take in others.
    let pack = |l: &MoeProfile| MoeProfile {
        expert_bytes: 288,
        matrix_bytes: [96; 3],
        factor_bytes: 2,
        ..l.clone()
    };
    let packed = Profile { moe_layers: profile.moe_layers.iter().map(pack).collect(), ..profile.clone() };
    let plan = plan("m-smoe", &packed, Some(&statistics), Some(Budget::Experts(3)), &[]).unwrap();
    let merged = plan.layers.iter().filter(|l| groups(l).iter().any(|g| g.len() > 1)).count() as u64;
    assert_eq!(plan.expected.routed_bytes, (6 + merged) * 288);
    let warned = "the weights are packed; merged experts are not, they take 2 bytes per number";
    assert!(plan.warnings.iter().any(|w| w == warned), "{:?}", plan.warnings);
}

#[test]
fn routers_in_the_file() {
    let (profile, statistics) = two_layers();
    let options = ["router=fuse", "grouping=uniform"];
    let made = plan("m-smoe", &profile, Some(&statistics), Some(Budget::Experts(2)), &options).unwrap();
    let read = |from: &str, to: &str| {
        assert!(made.to_json().contains(from), "{}", made.to_json());
        Plan::from_json(&made.to_json().replace(from, to)).map_err(|e| e.to_string())
    };
    let fuse = "\"router\": \"fuse\"}";
    assert_eq!(read(fuse, "\"router\": \"redirect\"}").unwrap().layers[0].router, MergedRows::Redirect);
    let wrong = read(fuse, "\"router\": \"both\"}").unwrap_err();
    assert_eq!(wrong, "layer 1: router: found \"both\", expected \"redirect\" or \"fuse\"");
    let wrong = read(fuse, "\"router\": 1}").unwrap_err();
    assert_eq!(wrong, "layer 1: router: found 1, expected \"redirect\" or \"fuse\"");
    // Redirected, three experts may be chosen though two are stored; with rows gone they may not.
    let three = |plan: &str| plan.replace("\"top_k\": 2", "\"top_k\": 3");
    let redirected = made.to_json().replace(fuse, "\"router\": \"redirect\"}");
    assert!(Plan::from_json(&three(&redirected)).is_ok());
    let wrong = Plan::from_json(&three(&made.to_json())).unwrap_err().to_string();
    assert_eq!(wrong, "layer 1: top_k: 3 with 2 experts left to choose from; use 1 to 2");
    let target = made.layers[0].experts.iter().find(|e| e.action.is_stored()).unwrap().expert;
    let keep = format!("{{\"expert\": {target}, \"action\": \"keep\"}}");
    let wrong = read(&keep, &keep.replace("keep", "constant")).unwrap_err();
    let expected =
        format!("into: expert {target} becomes a constant, which takes in no weights; name another one");
    assert!(wrong.ends_with(&expected), "{wrong}");
}

/// What has not been measured is named, with what measures it.
#[test]
fn missing_statistics() {
    let (profile, all) = two_layers();
    let without = |method: &str, options: &[&str], change: fn(&mut Moments)| {
        let mut statistics = all.clone();
        change(&mut statistics[1]);
        plan(method, &profile, Some(&statistics), Some(Budget::Experts(2)), options).unwrap_err().to_string()
    };
    for (method, options, change, expected) in [
        (
            "m-smoe",
            &[][..],
            (|m| drop(m.take(Moment::RouterGram))) as fn(&mut Moments),
            "statistics: layer 2: router_gram: not measured; calibrate again with this version",
        ),
        (
            "m-smoe",
            &[],
            |m| m.put(Moment::Count, vec![0.0; 4]),
            "statistics: layer 2: no token was routed to any expert; calibrate again, with more tokens",
        ),
        (
            "hc-smoe",
            &[],
            |m| drop(m.take(Moment::SampleOutputSum)),
            "statistics: layer 2: sample_output_sum: not measured; calibrate with --sample all, or plan with --set \
             basis=routed",
        ),
        (
            "hc-smoe",
            &[],
            |m| m.put(Moment::SampleCount, vec![0.0]),
            "statistics: layer 2: sample_count: no token was sampled; calibrate with --sample all, or plan with --set \
             basis=routed",
        ),
        (
            "hc-smoe",
            &["basis=routed"],
            |m| m.get_mut(Moment::OutputSum).unwrap()[9] = f64::NAN,
            "statistics: layer 2: expert 1: output_sum: found NaN, expected a finite number; calibrate again",
        ),
        (
            "ream",
            &[],
            |m| drop(m.take(Moment::GateOutputSum)),
            "statistics: layer 2: gate_output_sum: not measured; calibrate again with this version",
        ),
    ] {
        assert_eq!(without(method, options, change), expected);
    }
    let none = plan("ream", &profile, None, Some(Budget::Experts(2)), &[]).unwrap_err().to_string();
    assert_eq!(none, "statistics: this method needs them; give those that calibrate wrote");
}

/// Statistics of one to three layers of two to eight experts.
fn any_model() -> impl Strategy<Value = (Profile, Vec<Moments>)> {
    let layer = (2usize..9).prop_flat_map(|experts| {
        let values = |n: usize| prop::collection::vec(-1.0f64..1.0, n);
        (prop::collection::vec(0u32..9, experts), values(experts * 3), values(experts * 8))
    });
    prop::collection::vec(layer, 1..4).prop_map(|layers| {
        let (mut profiles, mut statistics) = (Vec::new(), Vec::new());
        for (l, (count, logits, outputs)) in layers.into_iter().enumerate() {
            let experts = count.len();
            let mut count: Vec<f64> = count.into_iter().map(f64::from).collect();
            count[0] += 1.0;
            let gram =
                |i: usize, j: usize| (0..3).map(|c| logits[i * 3 + c] * logits[j * 3 + c]).sum::<f64>();
            let gram: Vec<f64> = (0..experts * experts).map(|i| gram(i / experts, i % experts)).collect();
            profiles.push(super::layer(l, experts, 1 + experts / 4));
            statistics.push(measured(&count, &gram, &outputs));
        }
        (profile(profiles), statistics)
    })
}

proptest! {
    /// Every plan passes its own check, survives its file, has shares that add up to 1, and meets its budget.
    #[test]
    fn plans_are_sound(
        (profile, statistics) in any_model(), share in 0.2f64..0.9, fuse in any::<bool>(), part in 0.0f64..1.0,
    ) {
        let router = if fuse { "router=fuse" } else { "router=redirect" };
        for (method, options) in [
            ("m-smoe", &["grouping=exact"][..]),
            ("m-smoe", &["grouping=strict"]),
            ("m-smoe", &["grouping=uniform"]),
            ("hc-smoe", &["linkage=complete"]),
            ("ream", &[]),
        ] {
            let options: Vec<&str> = options.iter().copied().chain([router]).collect();
            let make = |budget| plan(method, &profile, Some(&statistics), Some(budget), &options);
            let Ok(plan) = make(Budget::Remove(share)) else { continue };
            prop_assert_eq!(&Plan::from_json(&plan.to_json()).unwrap().layers, &plan.layers);
            for layer in &plan.layers {
                let shares = shares(layer);
                for group in groups(layer) {
                    let sum: f64 = group.iter().map(|e| shares[*e]).sum();
                    prop_assert!((sum - 1.0).abs() < 1e-9 && group.iter().all(|e| shares[*e] > -1e-9));
                }
            }
            // Any size between the largest and the smallest is met, and the next larger plan would not fit.
            let largest = profile.bytes + profile.header_bytes;
            let smallest = match make(Budget::Bytes(1)) {
                Err(Error::Budget(text)) => text,
                other => panic!("{other:?}"),
            };
            prop_assert!(smallest.contains("the smallest size this method can reach"), "{}", smallest);
            let size = largest - 1 - (part * (largest as f64 * 0.1)) as u64;
            if let Ok(plan) = make(Budget::Bytes(size)) {
                prop_assert!(plan.expected.bytes <= size);
            }
        }
    }
}
