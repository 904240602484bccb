//! The compressed models that the reference has numbers of and a method makes, on a window of every text. What takes long is
//! made at a quarter of one model and half of the other.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::collections::BTreeMap;

use common::read;
use common::reference::Reference;
use moepress::backend::Moment;
use moepress::backend::cpu::Cpu;
use moepress::checkpoint::Checkpoint;
use moepress::compare::{Candidate, Request, compare};
use moepress::model::Model;
use moepress::plan::method;
use moepress::tokens::{SourceFile, Windows};

/// How far the loss of a window may be off: where weights are copied; where factors of them are stored in f32; where weights
/// are fitted and rounded to bf16; and where the reference leaves an expert nothing, which here keeps something.
const COPIED: f64 = 2e-5;
const FACTORS: f64 = 1e-4;
const FITTED: f64 = 1e-2;
const OTHERWISE: f64 = 2e-2;

/// A router whose choice is within rounding of another one may make that one, which shows in the rest of the window.
const FLIPPED: f64 = 1e-3;

/// Evaluations of the reference without their percentage, and the candidate that makes them.
fn cases() -> Vec<(String, String, f64)> {
    let mut cases = Vec::new();
    let mut add = |key: String, candidate: String, bound: f64| cases.push((key, candidate, bound));
    for score in ["frequency", "soft", "seer_soft", "ean", "man", "msan", "reap", "wean", "wean2"] {
        let method = score.replace('_', "-");
        add(format!("prune.{score}"), method.clone(), COPIED);
        add(format!("prune_global.{score}"), format!("{method}:scope=global"), COPIED);
    }
    for score in ["frequency", "reap", "mone_frequency", "mone_soft"] {
        add(format!("novice.{score}"), format!("mone:score={}", score.replace('_', "-")), COPIED);
    }
    for (kind, options) in [
        ("plain", "whiten=false:factor_dtype=f32"),
        ("whitened", "factor_dtype=f32"),
        ("whitened_alloc", "factor_dtype=f32:allocate=spectrum"),
    ] {
        let bound = if kind == "whitened_alloc" { OTHERWISE } else { FACTORS };
        add(format!("low_rank.{kind}"), format!("low-rank:{options}"), bound);
    }
    for refit in ["plain", "refit", "anchored"] {
        let bound = if refit == "plain" { COPIED } else { FITTED };
        for criterion in ["camera", "energy"] {
            let method = format!("camera:criterion={criterion}:refit={refit}");
            add(format!("channels.{criterion}.{refit}"), format!("{method}:allocate=uniform"), bound);
            add(format!("channels.{criterion}_layer.{refit}"), method, OTHERWISE);
        }
        for criterion in ["unit", "relative"] {
            let method = format!("modegpt:criterion=leverage-{criterion}:refit={refit}");
            add(format!("channels.leverage_{criterion}.{refit}"), method, bound);
        }
    }
    for base in ["mean", "frequency", "gram"] {
        for (kind, align) in [("plain", false), ("aligned", true)] {
            let method = format!("d2-moe:base={base}:align={align}:factor_dtype=f32");
            add(format!("d2.{base}.{kind}"), method, FITTED);
        }
    }
    for (kind, progressive) in [("layerwise", false), ("progressive", true)] {
        add(format!("naee.{kind}"), format!("naee:progressive={progressive}"), COPIED);
    }
    add("moei2.prune_layerwise".into(), "moe-i2:stage=prune:candidates=1".into(), COPIED);
    add("moei2.prune_kt".into(), "moe-i2:stage=prune:block=2".into(), COPIED);
    cases
}

fn candidate(text: &str) -> Candidate {
    let mut parts = text.split(':');
    let method = method(parts.next().unwrap()).unwrap();
    let option = |part: &str| part.split_once('=').map(|(k, v)| (k.to_string(), v.to_string())).unwrap();
    Candidate { method, options: parts.map(option).collect() }
}

/// Name of an evaluation: subset searches go by the experts that are kept.
fn name(key: &str, remove: f64, experts: usize) -> String {
    if key.starts_with("naee") {
        format!("{key}.r{}", experts - (remove * experts as f64) as usize)
    } else {
        format!("{key}.{}", remove * 100.0)
    }
}

#[test]
fn windows_have_the_reference_loss() {
    let second = [Moment::InputGram, Moment::HiddenGram, Moment::GateHiddenGram];
    for (model, experts, stride) in [("mixtral", 8, 24), ("qwen2_moe", 16, 24)] {
        let Some(reference) = Reference::open(model, &second) else { return };
        let Windows { ids, count, length, .. } = &reference.evaluation;
        let chosen: Vec<usize> = (0..*count).step_by(stride).collect();
        let one = |w: &usize| SourceFile { name: w.to_string(), windows: 1 };
        let evaluation = Windows {
            ids: chosen.iter().flat_map(|w| &ids[w * length..(w + 1) * length]).copied().collect(),
            mask: None,
            count: chosen.len(),
            length: *length,
            files: chosen.iter().map(one).collect(),
            decoder: None,
        };
        let checkpoint = Checkpoint::open(&reference.model).unwrap();
        let opened = Model::new(&checkpoint, &Cpu, *length).unwrap();
        let mut compared = 0;
        for remove in [0.125, 0.25, 0.5, 0.75] {
            let there = |(i, (key, _, _)): &(usize, (String, String, f64))| {
                let name = name(key, remove, experts);
                let slow =
                    key.starts_with("channels") || key.starts_with("d2") || key.starts_with("low_rank");
                if slow && remove == [0.25, 0.5][(i + experts / 8) % 2] {
                    return false;
                }
                // Half of 16 experts: a search of its own each; every loss of every subset is looked at elsewhere.
                if ["naee.layerwise.r8", "moei2.prune_layerwise.50"].contains(&&name[..]) && experts == 16 {
                    return false;
                }
                !reference.evaluations[&name].is_null()
                    || !reference.evaluations["evaluations"][&name].is_null()
            };
            let cases: Vec<_> = cases().into_iter().enumerate().filter(there).map(|(_, case)| case).collect();
            if cases.is_empty() {
                continue;
            }
            let candidates: Vec<Candidate> = cases.iter().map(|(_, text, _)| candidate(text)).collect();
            let request = Request {
                candidates: &candidates,
                remove: &[remove],
                calibration: Some(&reference.calibration),
                statistics: Some(&reference.statistics),
                evaluation: &evaluation,
                work: &reference.work.path().join("search"),
            };
            let rows = compare(&opened, &request, &mut ()).unwrap().rows;
            let mut wrong = BTreeMap::new();
            for (row, (key, _, bound)) in rows.iter().zip(&cases) {
                let key = name(key, remove, experts);
                let Some(measured) = &row.measured else { panic!("{model}: {key}: {:?}", row.error) };
                let expected = read(&reference.dir.join("evaluations.safetensors"), &key);
                let off =
                    |(file, w): (&moepress::eval::FileScore, &usize)| (file.score.nll - expected[*w]).abs();

                let mut off: Vec<f64> = measured.files.iter().zip(&chosen).map(off).collect();
                off.sort_by(f64::total_cmp);
                let last = off.pop().unwrap();
                if off.iter().any(|off| off >= bound) || last >= bound.max(FLIPPED) {
                    off.push(last);
                    wrong.insert(key, off);
                }
                compared += 1;
            }
            assert!(wrong.is_empty(), "{model}: windows are off by {wrong:?}");
        }
        assert!(compared > 45, "{model}: {compared} evaluations");
    }
}
