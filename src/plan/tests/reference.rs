//! Against reference outputs that were computed independently, in `shared/reference` beside the repository.
//! Where that folder is missing the tests say so and pass.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use super::*;

pub(super) const MODELS: [&str; 3] = ["mixtral", "qwen2_moe", "deepseek_v2"];

/// One reference model.
pub(super) struct Reference {
    pub(super) folder: PathBuf,
    pub(super) name: &'static str,
    pub(super) profile: Profile,
    pub(super) statistics: Vec<Moments>,
}

impl Reference {
    pub(super) fn open(name: &'static str) -> Option<Reference> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference").join(name);
        if !folder.is_dir() {
            eprintln!("skipped: no reference outputs at {}", folder.display());
            return None;
        }
        let model = json(&folder.join("model.json"));
        let number = |key: &str| model[key].as_u64().unwrap();
        let (experts, hidden) = (number("experts") as usize, number("hidden"));
        let moe_layers = model["moe_layers"].as_array().unwrap().iter().map(|l| MoeProfile {
            layer: l.as_u64().unwrap() as usize,
            experts,
            top_k: number("top_k") as usize,
            width: number("expert_width") as usize,
            latent: None,
            ungated: false,
            groups: 1,
            top_groups: 1,
            expert_parameters: number("parameters_per_expert"),
            expert_bytes: 2 * number("parameters_per_expert"),
            each: Vec::new(),
            dense_widths: Vec::new(),
            base: ExpertSize::default(),
            matrix_bytes: [0; 3],
            factor_bytes: 0,
            router_parameters: hidden,
            router_bytes: 2 * hidden,
        });
        let tensors = model["weights"]["tensors"].as_u64().unwrap();
        let parameters = model["weights"]["parameters"].as_u64().unwrap();
        let profile = Profile {
            family: name.into(),
            identity: "reference".into(),
            layers: number("layers") as usize,
            hidden_size: hidden as usize,
            parameters,
            bytes: 2 * parameters,
            header_bytes: 100 * tensors,
            tensors,
            moe_layers: moe_layers.collect(),
        };
        let stats = json(&folder.join("stats.json"));
        let statistics =
            stats["layers"].as_array().unwrap().iter().map(|l| layer_moments(experts, l)).collect();
        Some(Reference { folder, name, profile, statistics })
    }

    pub(super) fn json(&self, file: &str) -> Value {
        json(&self.folder.join(file))
    }

    pub(super) fn plan(&self, method: &str, budget: Budget, options: &[&str]) -> Plan {
        plan(method, &self.profile, Some(&self.statistics), Some(budget), options).unwrap()
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn layer_moments(experts: usize, layer: &Value) -> Moments {
    let names = [
        (Moment::Count, "N"),
        (Moment::GateSum, "sum_g"),
        (Moment::GateSqSum, "sum_g2"),
        (Moment::NormSum, "sum_f"),
        (Moment::NormSqSum, "sum_f2"),
        (Moment::GateNormSum, "sum_gf"),
        (Moment::GateNormSqSum, "sum_g2f2"),
        (Moment::SoftCount, "soft_all"),
        (Moment::MaxAbs, "max_abs_out"),
    ];
    let array =
        |key: &str| layer[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    let arrays = names.map(|(moment, key)| (moment, array(key)));
    moments(experts, &arrays.iter().map(|(m, a)| (*m, a.as_slice())).collect::<Vec<_>>())
}

/// The sets of one entry of `pruning.json`, per layer.
fn sets(entry: &Value) -> Vec<Vec<usize>> {
    let set = |v: &Value| v.as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize).collect();
    let mut layers = entry.as_object().unwrap().iter().collect::<Vec<_>>();
    layers.sort_by_key(|(layer, _)| layer.parse::<usize>().unwrap());
    layers.into_iter().map(|(_, v)| set(v)).collect()
}

#[test]
fn dropped_sets_are_those_of_the_reference() {
    for reference in MODELS.into_iter().filter_map(Reference::open) {
        let pruning = reference.json("pruning.json");
        let mut compared = 0;
        for (key, entry) in pruning["dropped"].as_object().unwrap() {
            let [kind, score, percent] = key.split('.').collect::<Vec<_>>()[..] else { panic!("{key}") };
            let scope = match kind {
                "prune" if !score.starts_with("random") => "scope=layer",
                "prune_global" => "scope=global",
                _ => continue,
            };
            let budget = Budget::Remove(percent.parse::<f64>().unwrap() / 100.0);
            let plan = reference.plan(&score.replace('_', "-"), budget, &[scope]);
            assert_eq!(dropped(&plan), sets(entry), "{} {key}", reference.name);
            let share = percent.parse::<f64>().unwrap() / 100.0;
            assert!((plan.expected.removed_fraction - share).abs() < 1e-12, "{} {key}", reference.name);
            compared += 1;
        }
        assert_eq!(compared, 26, "{}", reference.name);
    }
}

#[test]
fn orders_are_those_of_the_reference() {
    for reference in MODELS.into_iter().filter_map(Reference::open) {
        let stats = reference.json("stats.json");
        let layers = reference.profile.moe_layers.iter().zip(&reference.statistics);
        for ((layer, moments), expected) in layers.zip(stats["layers"].as_array().unwrap()) {
            for (score, order) in expected["order"].as_object().unwrap() {
                let name = score.replace('_', "-");
                if method(&name).is_err() {
                    continue;
                }
                let order = order.as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize);
                let order = order.collect::<Vec<_>>();
                for n in 1..=layer.experts - layer.top_k {
                    let mut last = order[layer.experts - n..].to_vec();
                    last.sort_unstable();
                    let chosen = rescore_layer(&name, &Options::new(), layer, moments, n, &[]).unwrap();
                    assert_eq!(chosen, last, "{} layer {} {score} {n}", reference.name, layer.layer);
                }
            }
        }
    }
}

/// The whitened eigenvalues of a reference model.
struct Whitened<'a> {
    values: Vec<f64>,
    profile: &'a Profile,
}

impl<'a> Whitened<'a> {
    fn open(reference: &'a Reference) -> Self {
        let file = fs::read(reference.folder.join("low_rank.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let bytes = tensors.tensor("whitened_eigenvalues").unwrap().data().to_vec();
        let number = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap());
        Whitened { values: bytes.chunks_exact(8).map(number).collect(), profile: &reference.profile }
    }
}

impl SpectrumSource for Whitened<'_> {
    fn spectrum(&self, layer: usize, expert: usize, matrix: Projection) -> Result<Vec<f64>, String> {
        let layers = &self.profile.moe_layers;
        let position = layers.iter().position(|l| l.layer == layer).ok_or("no such layer")?;
        let n = self.profile.hidden_size.min(layers[position].width);
        let row = (position * layers[position].experts + expert) * 3 + matrix as usize;
        Ok(self.values[row * n..][..n].to_vec())
    }
}

#[test]
fn ranks_are_those_of_the_reference() {
    for reference in MODELS[..2].iter().filter_map(|name| Reference::open(name)) {
        let low_rank = reference.json("low_rank.json");
        let evaluations = reference.json("evaluations.json");
        let spectra = Whitened::open(&reference);
        for keep in [75u32, 50, 25] {
            let place = format!("{} keep{keep}", reference.name);
            let expected = &low_rank["ranks"][format!("keep{keep}")];
            let budget = Some(Budget::Remove(f64::from(100 - keep) / 100.0));
            let make = |allocate: &str| {
                plan_with("low-rank", &reference.profile, None, budget, &[allocate], Some(&spectra)).unwrap()
            };
            let stored = |kind: &str| {
                evaluations[format!("low_rank.{kind}.{}", 100 - keep)]["routed_params"].as_u64().unwrap()
            };

            let uniform = make("allocate=uniform");
            let rank = Ranks::uniform(expected["rank"].as_u64().map(|r| r as usize));
            for entry in uniform.layers.iter().flat_map(|l| &l.experts) {
                assert_eq!(entry.action, Action::low_rank(rank), "{place}");
            }
            assert_eq!(uniform.expected.routed_parameters, stored("whitened"), "{place}");

            let allocated = make("allocate=spectrum");
            let zeros = compare_ranks(&allocated, &expected["alloc_ranks"], &reference.profile, &place);
            if zeros == 0 {
                assert_eq!(allocated.expected.routed_parameters, stored("whitened_alloc"), "{place}");
            }
        }
    }
}

/// Compares ranks by layer, matrix and expert. The reference lets ranks become 0, here the largest eigenvalue
/// of every expert is kept: where the reference has n zeros, n eigenvalues of other experts are missing here.
/// Returns the number of zeros.
fn compare_ranks(plan: &Plan, expected: &Value, profile: &Profile, place: &str) -> u64 {
    let mut all_zeros = 0;
    for (i, layer) in plan.layers.iter().enumerate() {
        let step = profile.hidden_size + profile.moe_layers[i].width;
        let values = profile.hidden_size * profile.moe_layers[i].width;
        for (m, matrix) in Projection::ALL.into_iter().enumerate() {
            let ranks = expected[i][m].as_array().unwrap().iter().map(|r| r.as_u64().unwrap() as usize);
            let ranks = ranks.collect::<Vec<_>>();
            let zeros = ranks.iter().filter(|r| **r == 0).count();
            let mut missing = 0;
            for (entry, theirs) in layer.experts.iter().zip(&ranks) {
                let ours = match entry.action {
                    Action::LowRank { rank, .. } => rank.get(matrix),
                    _ => None,
                };
                match ours {
                    None => assert!(
                        theirs * step >= values,
                        "{place} layer {i} {matrix:?} expert {}",
                        entry.expert
                    ),
                    Some(1) if *theirs == 0 => {}
                    Some(ours) => missing += theirs - ours,
                }
            }
            assert!(missing <= zeros, "{place} layer {i} {matrix:?}: {missing} missing for {zeros}");
            all_zeros += zeros as u64;
        }
    }
    all_zeros
}
