//! Ranks by hand: matrices of 12 × 8, 96 values, 20 per rank, break-even 4.8.

use super::*;

/// The same spectrum for all matrices of an expert, by expert.
struct Spectra(Vec<Vec<f64>>);

impl SpectrumSource for Spectra {
    fn spectrum(&self, layer: usize, expert: usize, _: Projection) -> Result<Vec<f64>, String> {
        assert_eq!(layer, 1, "the decoder layer, not its position");
        self.0.get(expert).cloned().ok_or_else(|| "not computed".into())
    }
}

fn two_experts() -> Profile {
    profile(vec![layer(1, 2, 1)])
}

fn ranks(plan: &Plan) -> Vec<Vec<Option<usize>>> {
    let rank = |e: &ExpertPlan| match e.action {
        Action::LowRank { rank, .. } => {
            assert_eq!((rank.gate, rank.gate), (rank.up, rank.down));
            rank.gate
        }
        _ => None,
    };
    plan.layers.iter().map(|l| l.experts.iter().map(rank).collect()).collect()
}

fn make(budget: Option<Budget>, options: &[&str], spectra: &[&[f64]]) -> Result<Plan> {
    let spectra = Spectra(spectra.iter().map(|s| s.to_vec()).collect());
    plan_with("low-rank", &two_experts(), None, budget, options, Some(&spectra))
}

#[test]
fn fractions_round_the_rank_down() {
    // 0.75·4.8 = 3.6 and 0.25·4.8 = 1.2.
    for (fraction, rank) in [(0.25, 3), (0.75, 1), (1e-12, 4)] {
        let plan = make(Some(Budget::Remove(fraction)), &[], &[]).unwrap();
        assert_eq!(ranks(&plan), [[Some(rank); 2]], "{fraction}");
        assert_eq!(plan.expected.routed_parameters, 2 * 3 * 20 * rank as u64);
        assert_eq!(plan.expected.routed_bytes, 2 * 2 * 3 * 20 * rank as u64);
        assert_eq!(plan.expected.experts, 2);
    }
}

#[test]
fn sizes_count_factors_in_their_own_type() {
    let now = two_experts().bytes + two_experts().header_bytes;
    // A dense expert has 576 bytes and 3 tensors, factors of rank r 120·r bytes and 6 tensors of 100 bytes.
    let of_rank = |r: u64, width: u64| now - 2 * 576 + 2 * (60 * r * width + 300);
    for (size, options, rank) in [
        (of_rank(2, 2), &[][..], 2),
        (of_rank(2, 2) - 1, &[], 1),
        (of_rank(1, 2), &[], 1),
        (now - 1, &[], 2),
        (of_rank(1, 4), &["factor_dtype=f32"], 1),
        (of_rank(1, 2), &["factor_dtype=bf16"], 1),
        (of_rank(1, 2), &["factor_dtype=f16"], 1),
    ] {
        let plan = make(Some(Budget::Bytes(size)), options, &[]).unwrap();
        assert_eq!(ranks(&plan), [[Some(rank); 2]], "{size} {options:?}");
    }
}

#[test]
fn layers_of_different_widths_keep_the_same_share() {
    let wide = MoeProfile { width: 24, expert_parameters: 576, expert_bytes: 1152, ..layer(2, 2, 1) };
    let profile = profile(vec![layer(1, 2, 1), wide]);
    let make = |budget| plan("low-rank", &profile, None, Some(budget), &[]).unwrap();
    // Break-even 4.8 and 6.
    assert_eq!(ranks(&make(Budget::Remove(0.5))), [[Some(2); 2], [Some(3); 2]]);
    let now = profile.bytes + profile.header_bytes + 4 * 300;
    let size = now - 2 * (576 - 240) - 2 * (1152 - 576);
    assert_eq!(ranks(&make(Budget::Bytes(size))), [[Some(2); 2], [Some(3); 2]]);
    assert_eq!(ranks(&make(Budget::Bytes(size - 1))), [[Some(2); 2], [Some(2); 2]]);
}

#[test]
fn ranks_and_energies_replace_the_budget() {
    assert_eq!(ranks(&make(None, &["rank=4"], &[]).unwrap()), [[Some(4); 2]]);
    let spectra: [&[f64]; 2] = [&[6.0, 2.0, 1.0, 1.0], &[0.0, -1e-18]];
    for (energy, first) in [("energy=0.6", 1), ("energy=0.61", 2), ("energy=0.8", 2), ("energy=0.9", 3)] {
        // An expert without any energy keeps rank 1.
        assert_eq!(ranks(&make(None, &[energy], &spectra).unwrap()), [[Some(first), Some(1)]], "{energy}");
    }
}

#[test]
fn matrices_that_would_save_nothing_stay_dense() {
    let flat: &[f64] = &[1.0; 8];
    let plan = make(None, &["energy=0.6"], &[flat, &[1.0]]).unwrap();
    assert_eq!(ranks(&plan), [[None, Some(1)]]);
    assert_eq!(plan.layers[0].experts[0].action, Action::Keep);
    assert_eq!(plan.expected.routed_parameters, 288 + 60);
}

#[test]
fn spectra_share_the_ranks_of_a_layer() {
    let options = ["allocate=spectrum", "rank=2"];
    let allocated = |spectra: &[&[f64]]| ranks(&make(None, &options, spectra).unwrap());
    assert_eq!(allocated(&[&[9.0, 8.0, 7.0, 1.0], &[6.0, 5.0]]), [[Some(3), Some(1)]]);
    // Ties go to the lower expert, and the largest value of every expert stays.
    assert_eq!(allocated(&[&[5.0, 5.0, 5.0], &[5.0, 5.0, 5.0]]), [[Some(3), Some(1)]]);
    assert_eq!(allocated(&[&[0.0, 0.0, 0.0], &[5.0, 4.0, 3.0]]), [[Some(1), Some(3)]]);
    let budget = Some(Budget::Remove(0.4));
    let half = make(budget, &["allocate=spectrum"], &[&[9.0, 1.0, 1.0], &[3.0, 2.0, 2.0]]).unwrap();
    assert_eq!(ranks(&half), [[Some(1), Some(3)]]);
}

#[test]
fn options_are_recorded_with_their_defaults() {
    let plan = make(Some(Budget::Remove(0.5)), &["whiten=false"], &[]).unwrap();
    let options = serde_json::to_string(&plan.options).unwrap();
    let expected = r#"{"allocate":"uniform","energy":null,"factor_dtype":"auto","layer_ratio":"uniform","owl_lambda":0.08,"owl_m":5,"propagate":false,"rank":null,"whiten":false}"#;
    assert_eq!(options, expected);
}

#[test]
fn fused_experts_have_no_tensors_of_their_own() {
    // 5 tensors cannot be 3 for each of 2 experts; each factor is one more, at 1 byte of header.
    let fused = Profile { tensors: 5, header_bytes: 5, ..two_experts() };
    let of_rank = |r: u64| fused.bytes + 5 - 2 * 576 + 2 * (120 * r + 6);
    let make = |size| plan("low-rank", &fused, None, Some(Budget::Bytes(size)), &[]).unwrap();
    assert_eq!(ranks(&make(of_rank(2))), [[Some(2); 2]]);
    assert_eq!(ranks(&make(of_rank(2) - 1)), [[Some(1); 2]]);
}
