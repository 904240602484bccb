//! Routing rules, as data.

use super::Skip;

/// From router logits z to chosen experts and combine weights: scores from the logits, then the `top_k` experts with
/// the largest choice values, then weights from the scores of the chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSpec {
    /// Experts per token.
    pub top_k: usize,
    /// Whether the logits have a bias.
    pub bias: bool,
    /// From logits to scores.
    pub scoring: Scoring,
    /// By what experts are chosen.
    pub choice: Choice,
    /// Group limit, if any.
    pub groups: Option<GroupLimit>,
    /// What is done to the scores of the chosen experts.
    pub weights: WeightRule,
    /// Whether each expert has a factor of its weights, behind all rules (Gemma 4).
    pub expert_scales: bool,
    /// What the weights multiply.
    pub target: WeightTarget,
    /// Which of the chosen experts are left out after all; no published model has such a rule.
    pub skip: Option<Skip>,
}

impl RouterSpec {
    /// The plain rule: softmax over all experts, the `top_k` largest, and weights by `weights`.
    pub fn softmax(top_k: usize, weights: WeightRule) -> Self {
        RouterSpec {
            top_k,
            bias: false,
            scoring: Scoring::Softmax,
            choice: Choice::Score,
            groups: None,
            weights,
            expert_scales: false,
            target: WeightTarget::Output,
            skip: None,
        }
    }

    /// Sigmoid scores, and a bias per expert that only choices see.
    pub fn biased_sigmoid(top_k: usize, weights: WeightRule) -> Self {
        RouterSpec {
            scoring: Scoring::Sigmoid,
            choice: Choice::BiasedScore,
            ..RouterSpec::softmax(top_k, weights)
        }
    }
}

/// From router logits to scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// The sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437, eq. 15).
    Sigmoid,
    /// SparseMixer-v2 at inference (GRIN, arXiv 2409.12136): for each choice in turn, the largest logit m among the
    /// experts not chosen yet, its weight the softmax over those of them with (m − z) / max(|z|, m) ≤ threshold.
    /// Makes its own choices and weights; scores, for statistics only, are the softmax over all.
    SparseMixer {
        /// Twice the jitter of training.
        threshold: f32,
    },
}

/// By what experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The score.
    Score,
    /// The score plus a bias per expert that the weights do not see (Wang et al., arXiv 2408.15664).
    BiasedScore,
    /// The logit: what the score would choose, but never tied by rounding.
    Logit,
}

/// Combine weights from the scores s of the chosen experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum WeightRule {
    /// s · scale.
    Scaled(f32),
    /// s / max(Σ s + added, least) · scale, the sum over the chosen.
    Renormalised {
        /// Added to the sum.
        added: f32,
        /// Least denominator.
        least: f32,
        /// Factor.
        scale: f32,
    },
}

impl WeightRule {
    /// s / Σ s.
    pub const RENORMALISED: WeightRule = WeightRule::Renormalised { added: 0.0, least: 0.0, scale: 1.0 };
}

/// What combine weights multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightTarget {
    /// The output of the expert.
    Output,
    /// Its input (Llama 4); outputs are then added as they are.
    Input,
}

/// Group-limited routing: experts are in `count` groups of consecutive original numbers; the `kept` groups with the
/// largest group scores stay, the others cannot be chosen (DeepSeek-V2, arXiv 2405.04434, §2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Number of groups.
    pub count: usize,
    /// Groups that a token may use.
    pub kept: usize,
    /// Score of a group.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest choice value in the group (DeepSeek-V2).
    Largest,
    /// The sum of the two largest (DeepSeek-V3); of a group that lost all experts but one, that one.
    TwoLargest,
}

impl GroupLimit {
    /// Most groups that a router may have.
    pub const MAX_GROUPS: usize = 64;
}
