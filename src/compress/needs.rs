//! What has to be measured of every layer before a plan can be carried out.

use super::apply::ApplyOptions;
use super::delta::BaseKind;
use super::factorise::AlignBy;
use crate::backend::Moment;
use crate::calibrate::Statistics;
use crate::linalg::Refit;
use crate::plan::{Action, Channels, Plan};

/// One reason to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// What the plan does with it.
    why: &'static str,
    pub(super) moments: &'static [Moment],
    /// Whether it takes inputs of experts, which no statistics hold.
    pub(super) inputs: bool,
    /// What else would do.
    instead: &'static str,
}

const WHITEN: Need = Need {
    why: "whitens low-rank experts, which needs second moments",
    moments: &[Moment::InputGram, Moment::HiddenGram],
    inputs: false,
    instead: ", or plan with --set whiten=false",
};

const FREQUENCY: Need = Need {
    why: "weighs the base of a layer with the tokens of its experts, which have to be counted",
    moments: &[Moment::Count],
    inputs: false,
    instead: ", or plan with --set base=mean",
};

const ORDER: Need = Need {
    why: "aligns the experts of a layer to the most used one, for which their tokens have to be counted",
    moments: &[Moment::Count],
    inputs: false,
    instead: ", or plan with --set align=false",
};

const BASE: Need = Need {
    why: "fits the base of a layer to the inputs, which needs second moments",
    moments: &[Moment::InputGram, Moment::HiddenGram],
    inputs: false,
    instead: ", or plan with --set base=frequency",
};

const ENERGY: Need = Need {
    why: "chooses channels by their energy, which has to be measured",
    moments: &[Moment::GateHiddenSqSum, Moment::GateHiddenMax],
    inputs: false,
    instead: "",
};

const LEVERAGE: Need = Need {
    why: "chooses channels by their leverage, which needs second moments",
    moments: &[Moment::Count, Moment::HiddenGram],
    inputs: false,
    instead: "",
};

const REFIT: Need = Need {
    why: "refits down matrices, which needs second moments",
    moments: &[Moment::GateHiddenGram],
    inputs: false,
    instead: ", or plan with --set refit=plain",
};

const CONSTANT: Need = Need {
    why: "replaces experts by their mean output, which has to be measured",
    moments: &[Moment::Count, Moment::OutputSum],
    inputs: false,
    instead: "",
};

const MATCH: Need = Need {
    why: "aligns merged experts by their activations, which are computed while compressing",
    moments: &[],
    inputs: true,
    instead: ", or plan with --set align_by=weights",
};

impl Need {
    /// All that `plan` has reason for.
    pub(super) fn all(plan: &Plan, options: ApplyOptions) -> Vec<Need> {
        let any = |wanted: fn(&Action) -> bool| {
            plan.layers.iter().flat_map(|l| &l.experts).any(|entry| wanted(&entry.action))
        };
        let delta = any(|a| matches!(a, Action::Delta { .. }));
        let counted = any(|a| matches!(a, Action::Channels { keep: Channels::Count(_) }));
        let energy = options.channels.criterion.is_energy();
        let factors = options.factors;
        let reasons = [
            (
                MATCH,
                factors.align
                    && factors.align_by != AlignBy::Weights
                    && any(|a| matches!(a, Action::Merge { .. })),
            ),
            (WHITEN, options.factors.whiten && (delta || any(|a| matches!(a, Action::LowRank { .. })))),
            (FREQUENCY, delta && options.base.kind == BaseKind::Frequency),
            (ORDER, delta && options.base.align),
            (BASE, delta && options.base.kind == BaseKind::Gram),
            (ENERGY, counted && energy),
            (LEVERAGE, counted && !energy),
            (REFIT, options.channels.refit != Refit::Plain && any(|a| matches!(a, Action::Channels { .. }))),
            (CONSTANT, any(|a| *a == Action::Constant)),
        ];
        reasons.into_iter().filter_map(|(need, holds)| holds.then_some(need)).collect()
    }

    /// Whether `statistics` hold it.
    pub(super) fn is_met_by(&self, statistics: &Statistics) -> bool {
        !self.inputs && self.moments.iter().all(|m| statistics.has(*m))
    }

    /// What to give where it is missing.
    pub(super) fn missing(&self) -> String {
        let flags: Vec<&str> = self.moments.iter().filter_map(|m| m.flag()).collect();
        let moments =
            if flags.is_empty() { String::new() } else { format!(" --moments {}", flags.join(",")) };
        let Need { why, instead, inputs, .. } = self;
        let statistics =
            if *inputs { String::new() } else { format!(", or --stats from calibrate{moments}") };
        format!("the plan {why}: give --tokens{statistics}{instead}")
    }
}
