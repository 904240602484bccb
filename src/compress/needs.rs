//! What has to be measured of every layer before a plan can be carried out.

use serde_json::Value;

use crate::backend::Moment;
use crate::calibrate::Statistics;
use crate::plan::{Action, Plan};

/// One reason to measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// What the plan does with it.
    why: &'static str,
    pub(super) moments: &'static [Moment],
    /// What else would do.
    instead: &'static str,
}

const WHITEN: Need = Need {
    why: "whitens low-rank experts, which needs second moments",
    moments: &[Moment::InputGram, Moment::HiddenGram],
    instead: ", or plan with --set whiten=false",
};

const CONSTANT: Need = Need {
    why: "replaces experts by their mean output, which has to be measured",
    moments: &[Moment::Count, Moment::OutputSum],
    instead: "",
};

impl Need {
    /// All that `plan` has reason for.
    pub(super) fn all(plan: &Plan) -> Vec<Need> {
        let any = |wanted: fn(&Action) -> bool| {
            plan.layers.iter().flat_map(|l| &l.experts).any(|entry| wanted(&entry.action))
        };
        let flag = |name: &str| plan.options.get(name) == Some(&Value::Bool(true));
        let mut needs = Vec::new();
        if flag("whiten") && any(|a| matches!(a, Action::LowRank { .. })) {
            needs.push(WHITEN);
        }
        if any(|a| *a == Action::Constant) {
            needs.push(CONSTANT);
        }
        needs
    }

    /// Whether `statistics` hold it.
    pub(super) fn is_met_by(&self, statistics: &Statistics) -> bool {
        self.moments.iter().all(|m| statistics.has(*m))
    }

    /// What to give where it is missing.
    pub(super) fn missing(&self) -> String {
        let flags: Vec<&str> = self.moments.iter().filter_map(|m| m.flag()).collect();
        let moments =
            if flags.is_empty() { String::new() } else { format!(" --moments {}", flags.join(",")) };
        let Need { why, instead, .. } = self;
        format!("the plan {why}: give --tokens, or --stats from calibrate{moments}{instead}")
    }
}
