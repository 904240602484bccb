//! Files with random damage: every reader of the library says no or goes on, and never panics, hangs or fills the memory.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::{Mutant, data, generate};
use moepress::architecture::Architecture;
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::calibrate::{Options, Statistics, calibrate};
use moepress::checkpoint::{Checkpoint, Manifest, Shard};
use moepress::model::{Model, inspect, profile};
use moepress::plan::{Budget, Plan, Request, method};
use moepress::tokens::read_token_file;
use proptest::prelude::*;
use serde_json::json;

/// One place of damage; positions are shares of the length.
#[derive(Clone, Debug)]
enum Damage {
    /// A byte becomes another one.
    Byte(f64, u8),
    /// Bytes go.
    Cut(f64, usize),
    /// Bytes come twice.
    Repeat(f64, usize),
    /// The next number becomes something else.
    Number(f64, &'static str),
    /// The end is missing.
    Truncate(f64),
}

/// What may stand where a number was expected.
const ODD: [&str; 16] = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "4294967296",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e-308",
    "0.5",
    "null",
    "\"x\"",
    "[]",
    "{}",
];

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        2 => (0.0..1.0, any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        1 => (0.0..1.0, 1usize..40).prop_map(|(at, n)| Damage::Cut(at, n)),
        1 => (0.0..1.0, 1usize..40).prop_map(|(at, n)| Damage::Repeat(at, n)),
        6 => (0.0..1.0, prop::sample::select(&ODD[..])).prop_map(|(at, odd)| Damage::Number(at, odd)),
        1 => (0.0..1.0).prop_map(Damage::Truncate),
    ];
    prop::collection::vec(one, 1..4)
}

/// `text` with every damage done, one after the other.
fn damaged(text: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for damage in damages {
        let at = |share: f64| ((share * bytes.len() as f64) as usize).min(bytes.len());
        match *damage {
            Damage::Byte(share, value) => {
                if let Some(byte) = bytes.get_mut((share * text.len() as f64) as usize) {
                    *byte = value;
                }
            }
            Damage::Cut(share, n) => {
                let (start, end) = (at(share), (at(share) + n).min(bytes.len()));
                bytes.drain(start..end);
            }
            Damage::Repeat(share, n) => {
                let (start, end) = (at(share), (at(share) + n).min(bytes.len()));
                let again = bytes[start..end].to_vec();
                bytes.splice(start..start, again);
            }
            Damage::Number(share, odd) => {
                let start = at(share);
                let digits = bytes[start..].iter().position(u8::is_ascii_digit).map(|i| start + i);
                if let Some(first) = digits {
                    let length = bytes[first..].iter().take_while(|b| b.is_ascii_digit()).count();
                    bytes.splice(first..first + length, odd.bytes());
                }
            }
            Damage::Truncate(share) => bytes.truncate(at(share)),
        }
    }
    bytes
}

/// Damages the header of a safetensors file and, unless that is damaged too, sets its length right again.
fn damaged_header(file: &[u8], damages: &[Damage], honest: bool) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = damaged(&file[8..8 + length], damages);
    let told = if honest { header.len() } else { length } as u64;
    [&told.to_le_bytes()[..], &header, &file[8 + length..]].concat()
}

/// Runs `read`, which must not take a second; once more where the machine may have been busy with something else.
fn in_time(mut read: impl FnMut()) {
    for _ in 0..2 {
        let start = Instant::now();
        read();
        if start.elapsed() < Duration::from_secs(1) {
            return;
        }
    }
    panic!("took more than a second, twice");
}

/// Reads all that a mapped file offers.
fn read_shard(path: &Path) {
    let Ok(shard) = Shard::open(path) else { return };
    for tensor in Arc::new(shard).tensors() {
        assert_eq!(tensor.bytes().len() * 8, tensor.len() * tensor.dtype().bitsize());
        let _ = tensor.check_finite();
        let _ = tensor.to_f32();
    }
}

/// What the properties start from: a folder with `tokens`, `statistics` and `plan` of the mixtral fixture.
struct Originals {
    folder: tempfile::TempDir,
}

impl Originals {
    fn get() -> &'static Originals {
        static ORIGINALS: OnceLock<Originals> = OnceLock::new();
        ORIGINALS.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            generate::tokens(&path("tokens"), 4, 16, 64);
            let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
            let model = Model::new(&checkpoint, &Cpu, 16).unwrap();
            let windows = read_token_file(&path("tokens")).unwrap();
            let options = Options { second: Moment::SECOND.to_vec(), ..Options::default() };
            calibrate(&model, &windows, &options, &path("statistics"), &mut ()).unwrap();
            let plan = plan_of(&Statistics::open(&path("statistics")).unwrap()).unwrap();
            std::fs::write(path("plan"), plan.to_json()).unwrap();
            Originals { folder }
        })
    }

    fn read(name: &str) -> Vec<u8> {
        std::fs::read(Originals::get().folder.path().join(name)).unwrap()
    }

    /// A place for the damaged copy.
    fn write(name: &str, bytes: &[u8]) -> PathBuf {
        let path = Originals::get().folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// A plan from all that statistics hold.
fn plan_of(statistics: &Statistics) -> Option<Plan> {
    let moments = statistics.first_moments().ok()?;
    let request = Request {
        statistics: Some(&moments),
        budget: Some(Budget::Remove(0.4)),
        options: &[("protect".to_string(), "super".to_string())].into(),
        ..Request::new(statistics.profile())
    };
    method("reap").unwrap().plan(&request).ok()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shard_headers(damages in damage(), honest in any::<bool>()) {
        let original = std::fs::read(data("mixtral").join("model.safetensors")).unwrap();
        let path = Originals::write("header", &damaged_header(&original, &damages, honest));
        in_time(|| read_shard(&path));
    }

    #[test]
    fn token_files(damages in damage(), honest in any::<bool>()) {
        let path = Originals::write("bad tokens", &damaged_header(&Originals::read("tokens"), &damages, honest));
        in_time(|| {
            if let Ok(windows) = read_token_file(&path) {
                assert_eq!(windows.ids.len(), windows.count * windows.length);
                assert!(windows.mask.is_none_or(|m| m.len() == windows.ids.len()));
            }
        });
    }

    #[test]
    fn statistics(damages in damage(), honest in any::<bool>()) {
        let bytes = damaged_header(&Originals::read("statistics"), &damages, honest);
        let path = Originals::write("bad statistics", &bytes);
        in_time(|| {
            let Ok(statistics) = Statistics::open(&path) else { return };
            let _ = statistics.usage();
            for layer in statistics.profile().moe_layers.iter().map(|l| l.layer) {
                let _ = statistics.moments(layer, &Moment::ALL);
            }
            let _ = plan_of(&statistics);
        });
    }

    /// Values instead of names: any eight bytes are a number.
    #[test]
    fn statistics_values(values in prop::collection::vec((0.0..1.0, any::<u64>()), 1..20)) {
        let mut bytes = Originals::read("statistics");
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (share, value) in values {
            // First moments come last in a file that is ordered by name, but for the largest.
            let at = start + (share * ((bytes.len() - start) / 8) as f64) as usize * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let path = Originals::write("bad values", &bytes);
        in_time(|| drop(plan_of(&Statistics::open(&path).unwrap())));
    }

    #[test]
    fn plans(damages in damage()) {
        let text = damaged(&Originals::read("plan"), &damages);
        let text = String::from_utf8_lossy(&text);
        let checkpoint = Checkpoint::open(data("mixtral")).unwrap();
        let profile = profile(&checkpoint, &Architecture::from_config(checkpoint.config()).unwrap()).unwrap();
        in_time(|| {
            if let Ok(plan) = Plan::from_json(&text) {
                let _ = plan.expect(&profile);
                // What was read is written and read again as it was.
                assert_eq!(Plan::from_json(&plan.to_json()).unwrap(), plan);
            }
        });
    }

    #[test]
    fn configs(damages in damage(), family in 0usize..10) {
        let families = ["mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe", "olmoe_clip", "qwen3_moe_fused",
            "mixtral_sliding_window", "deepseek_v2_lite_sharded_bf16", "qwen3_5_moe", "lfm2_moe"];
        let text = damaged(&std::fs::read(data(families[family]).join("config.json")).unwrap(), &damages);
        in_time(|| drop(Architecture::from_config(&String::from_utf8_lossy(&text))));
    }
}

proptest! {
    // These open a whole checkpoint every time.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

    #[test]
    fn indexes(damages in damage()) {
        static MODEL: OnceLock<Mutant> = OnceLock::new();
        let model = MODEL.get_or_init(|| Mutant::of("deepseek_v2_lite_sharded_bf16"));
        let name = "model.safetensors.index.json";
        let original = std::fs::read(data("deepseek_v2_lite_sharded_bf16").join(name)).unwrap();
        std::fs::write(model.file(name), damaged(&original, &damages)).unwrap();
        in_time(|| {
            let _ = Checkpoint::open(model.path()).map(|c| inspect(&c).is_ok());
        });
    }

    /// A config that is wrong in whatever way, with all its tensors.
    #[test]
    fn checkpoints_with_another_config(damages in damage()) {
        static MODEL: OnceLock<Mutant> = OnceLock::new();
        let model = MODEL.get_or_init(|| Mutant::of("deepseek_v2"));
        let original = std::fs::read(data("deepseek_v2").join("config.json")).unwrap();
        std::fs::write(model.file("config.json"), damaged(&original, &damages)).unwrap();
        in_time(|| {
            let _ = Checkpoint::open(model.path()).map(|c| inspect(&c).is_ok());
        });
    }

    #[test]
    fn layout_files(damages in damage()) {
        static MODEL: OnceLock<Mutant> = OnceLock::new();
        let model = MODEL.get_or_init(|| Mutant::of("mixtral"));
        let ranks = json!({ "gate": 4, "up": 6, "down": null });
        let experts = json!([
            { "expert": 0, "form": "dense" },
            { "expert": 1, "form": "low_rank", "rank": ranks },
            { "expert": 3, "form": "alias", "of": 0 },
            { "expert": 4, "form": "constant" },
        ]);
        let whole: Vec<_> = (0..5).map(|e| json!({ "expert": e, "form": "dense" })).collect();
        let layers = [json!({ "layer": 0, "top_k": 2, "experts": experts }), json!({ "layer": 1, "top_k": 2, "experts": whole })];
        for layers in [&layers[..], &layers[1..]] {
            let original = json!({ "moepress": 1, "layers": layers }).to_string();
            let text = damaged(original.as_bytes(), &damages);
            let path = model.file("moepress.json");
            std::fs::write(&path, &text).unwrap();
            in_time(|| {
                let _ = Manifest::parse(&path, &String::from_utf8_lossy(&text));
                let _ = Checkpoint::open(model.path()).map(|c| inspect(&c).is_ok());
            });
        }
    }
}
