//! What holds for every checkpoint, every set of statistics and every budget.

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// Layers of the same size with random counts, and their profile.
fn uniform() -> impl Strategy<Value = (Profile, Vec<Moments>)> {
    (1usize..5, 2usize..20, any::<Index>()).prop_flat_map(|(layers, experts, k)| {
        let top_k = 1 + k.index(experts - 1);
        let profile = profile((0..layers).map(|l| layer(2 * l, experts, top_k)).collect());
        (Just(profile), counts(vec![experts; layers]))
    })
}

/// Layers of different sizes, some with groups.
fn mixed() -> impl Strategy<Value = (Profile, Vec<Moments>)> {
    let one = (1usize..4, 1usize..6, any::<Index>(), any::<Index>());
    prop::collection::vec(one, 1..4).prop_flat_map(|layers| {
        let layer = |(l, (groups, size, t, k)): (usize, &(usize, usize, Index, Index))| {
            let top_groups = 1 + t.index(*groups);
            let top_k = 1 + k.index(top_groups * size);
            MoeProfile { groups: *groups, top_groups, ..layer(l, groups * size, top_k) }
        };
        let profile = profile(layers.iter().enumerate().map(layer).collect());
        let experts = profile.moe_layers.iter().map(|l| l.experts).collect();
        (Just(profile), counts(experts))
    })
}

/// Counts with many ties and zeros, but at least one token per layer.
fn counts(experts: Vec<usize>) -> impl Strategy<Value = Vec<Moments>> {
    let layer = |e| {
        prop::collection::vec(0u32..12, e).prop_map(|mut counts| {
            counts[0] += u32::from(counts.iter().all(|c| *c == 0));
            counted(&counts.into_iter().map(f64::from).collect::<Vec<_>>())
        })
    };
    experts.into_iter().map(layer).collect::<Vec<_>>()
}

fn frequency(profile: &Profile, statistics: &[Moments], budget: Budget, scope: &str) -> Result<Plan> {
    plan("frequency", profile, Some(statistics), Some(budget), &[scope])
}

/// Bytes on disk after a plan that drops experts, one tensor header taking 100 bytes.
fn on_disk(profile: &Profile, plan: &Plan) -> u64 {
    let dropped = plan.layers.iter().map(|l| l.dropped().count() as u64).sum::<u64>();
    plan.expected.bytes + 100 * (profile.tensors - 3 * dropped)
}

proptest! {
    #[test]
    fn the_number_asked_for_is_the_number_kept((profile, statistics) in uniform(), n in any::<Index>()) {
        let MoeProfile { experts, top_k, .. } = profile.moe_layers[0];
        let kept = top_k + n.index(experts - top_k);
        let plan = frequency(&profile, &statistics, Budget::Experts(kept), "scope=layer").unwrap();
        prop_assert_eq!(plan.experts_kept(), vec![kept; profile.moe_layers.len()]);
        // The same as a fraction.
        let fraction = (experts - kept) as f64 / experts as f64;
        let by_fraction = frequency(&profile, &statistics, Budget::Remove(fraction), "scope=layer").unwrap();
        prop_assert_eq!(&plan, &by_fraction);
        prop_assert!((plan.expected.removed_fraction - fraction).abs() < 1e-12);
        // No expert kept has a smaller count than one dropped.
        for (entry, moments) in plan.layers.iter().zip(&statistics) {
            let count = moments.per_expert(Moment::Count);
            let most = entry.dropped().map(|e| count[e]).fold(0.0, f64::max);
            prop_assert!(entry.experts.iter().all(|e| e.action == Action::Drop || count[e.expert] >= most));
        }
    }

    #[test]
    fn fractions_are_met_globally((profile, statistics) in uniform(), f in 0.01f64..0.99) {
        let all = profile.moe_layers.iter().map(|l| l.experts).sum::<usize>();
        let n = (f * all as f64).round_ties_even() as usize;
        let most = profile.moe_layers.iter().map(|l| l.experts - l.top_k).sum::<usize>();
        let plan = frequency(&profile, &statistics, Budget::Remove(f), "scope=global");
        prop_assert_eq!(plan.is_ok(), (1..=most).contains(&n));
        if let Ok(plan) = plan {
            prop_assert_eq!(plan.experts_kept().iter().sum::<usize>(), all - n);
        }
    }

    #[test]
    fn sizes_are_met_and_used_up((profile, statistics) in uniform(), part in 0.0f64..1.0) {
        let now = profile.bytes + profile.header_bytes;
        let size = 1 + ((now - 2) as f64 * part) as u64;
        let one = 576 + 20 + 300;
        let layers = profile.moe_layers.len() as u64;
        let floor = now - profile.moe_layers.iter().map(|l| (l.experts - l.top_k) as u64 * one).sum::<u64>();
        for (scope, back) in [("scope=layer", layers), ("scope=global", 1)] {
            let plan = frequency(&profile, &statistics, Budget::Bytes(size), scope);
            prop_assert_eq!(plan.is_ok(), size >= floor, "{}", scope);
            if let Ok(plan) = plan {
                prop_assert!(on_disk(&profile, &plan) <= size);
                prop_assert!(on_disk(&profile, &plan) + back * one > size);
            }
        }
    }

    #[test]
    fn low_rank_sizes_are_met_and_used_up(experts in 1usize..9, layers in 1usize..4, part in 0.0f64..1.0) {
        // Headers small enough that every rank below break-even is a smaller checkpoint.
        let mut profile = profile((0..layers).map(|l| layer(l, experts, 1)).collect());
        profile.header_bytes = profile.tensors;
        let now = profile.bytes + profile.header_bytes;
        let size = 1 + ((now - 2) as f64 * part) as u64;
        let of_rank = |r: u64| now - (experts * layers) as u64 * (576 - 120 * r - 3);
        match plan("low-rank", &profile, None, Some(Budget::Bytes(size)), &[]) {
            Ok(plan) => {
                let rank = plan.expected.routed_parameters / (60 * (experts * layers) as u64);
                prop_assert!(of_rank(rank) <= size);
                prop_assert!(rank == 4 || of_rank(rank + 1) > size);
            }
            Err(_) => prop_assert!(size < of_rank(1)),
        }
    }

    #[test]
    fn every_plan_is_sound_and_survives_its_file(
        (profile, statistics) in mixed(), f in 0.01f64..0.99, global in any::<bool>(),
    ) {
        let scope = if global { "scope=global" } else { "scope=layer" };
        let Ok(mut plan) = frequency(&profile, &statistics, Budget::Remove(f), scope) else { return Ok(()) };
        plan.warnings.clear();
        prop_assert!(plan.check(&profile).is_ok());
        let read = Plan::from_json(&plan.to_json()).unwrap();
        prop_assert_eq!(&read, &plan);
        prop_assert_eq!(read.to_json(), plan.to_json());
        let value = serde_json::from_str::<serde_json::Value>(&plan.to_json()).unwrap();
        prop_assert_eq!(value, serde_json::to_value(&plan).unwrap());
        prop_assert_eq!(plan.expect(&profile).unwrap(), plan.expected);
        for ((entry, layer), moments) in plan.layers.iter().zip(&profile.moe_layers).zip(&statistics) {
            let n = entry.dropped().count();
            // Where the layer lost a multiple of its groups, each group lost the same, unless layers compete.
            if !global && n % layer.groups == 0 {
                let size = layer.experts / layer.groups;
                for group in 0..layer.groups {
                    prop_assert_eq!(entry.dropped().filter(|e| e / size == group).count(), n / layer.groups);
                }
            }
            let again = rescore_layer("frequency", &plan.options, layer, moments, n, &entry.protected);
            if global {
                prop_assert_eq!(again.unwrap().len(), n);
            } else {
                prop_assert_eq!(again.unwrap(), entry.dropped().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn mutations_are_caught(
        (profile, statistics) in uniform(), at in any::<Index>(), which in any::<Index>(), kind in 0usize..12,
    ) {
        let kept = profile.moe_layers[0].top_k;
        let Ok(mut plan) = frequency(&profile, &statistics, Budget::Experts(kept), "scope=layer") else {
            return Ok(());
        };
        let l = at.index(plan.layers.len());
        let entry = &mut plan.layers[l];
        let e = which.index(entry.experts.len());
        match kind {
            0 => entry.layer += 1,
            1 => { entry.experts.remove(e); }
            2 => { let twin = entry.experts[e].clone(); entry.experts.insert(e, twin); }
            3 => entry.experts[e].expert += profile.moe_layers[l].experts,
            4 => entry.top_k = kept + 1,
            5 => entry.top_k = 0,
            6 => {
                let stays = entry.experts.iter().position(|e| e.action == Action::Keep).unwrap();
                entry.experts[stays].action = Action::Drop;
            }
            7 => { let twin = plan.layers[l].clone(); plan.layers.push(twin); }
            8 => { plan.layers.remove(l); }
            9 => plan.model.identity.push('0'),
            10 => plan.version += 1,
            _ => entry.experts[e].action = Action::low_rank(Ranks::uniform(Some(9))),
        }
        let message = plan.check(&profile).unwrap_err().to_string();
        prop_assert!(!message.contains('\n'));
    }

    #[test]
    fn reading_never_panics(text in r#"[\[\]{}",:a-z0-9. -]{0,60}"#) {
        let _ = Plan::from_json(&text);
    }

    #[test]
    fn damaged_files_are_refused_on_one_line((profile, statistics) in mixed(), cut in any::<Index>()) {
        let budget = Budget::Remove(0.5);
        let Ok(plan) = frequency(&profile, &statistics, budget, "scope=layer") else { return Ok(()) };
        let text = plan.to_json();
        let cut = cut.index(text.trim_end().len());
        let message = Plan::from_json(&text[..cut]).unwrap_err().to_string();
        prop_assert!(message.starts_with("a plan is JSON: ") && !message.contains('\n'), "{}", message);
    }
}
