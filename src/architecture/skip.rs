//! Dynamic expert skipping, as data.

use serde::{Deserialize, Serialize};

/// Leaves out the least of a token's chosen experts where they hardly count ("Not All Experts are Equal", arXiv
/// 2402.14800, §3.3 and appendix A.2): of the k combine weights w in descending order the first i are used, the
/// smallest i with Σ over m > i of w < β·Σ w. In plans and in `moepress.json` it is `{"ratio": 0.4}` or
/// `{"tail": 0.3}`, with `"rescale": false` where the weights stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Skip {
    /// When experts are left out.
    #[serde(flatten)]
    pub threshold: SkipThreshold,
    /// Whether the weights of the others are multiplied so that they keep the sum of all.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub rescale: bool,
}

/// When experts are left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipThreshold {
    /// The second of two, where its weight is below this multiple of the first's: the published β of top-2 routers.
    Ratio(f64),
    /// β itself, for any number of experts per token.
    Tail(f64),
}

impl Skip {
    /// β, the share of the whole weight below which a tail is left out: b / (1 + b) for a ratio b.
    pub fn tail(&self) -> f32 {
        match self.threshold {
            SkipThreshold::Ratio(ratio) => (ratio / (1.0 + ratio)) as f32,
            SkipThreshold::Tail(tail) => tail as f32,
        }
    }

    /// What is wrong with it for a router that chooses `top_k` experts.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn check(&self, top_k: usize) -> Result<(), String> {
        let (name, value, most) = match self.threshold {
            SkipThreshold::Ratio(_) if top_k != 2 => {
                return Err(format!(
                    "ratio is for routers that choose 2 experts, this one chooses {top_k}; use tail"
                ));
            }
            SkipThreshold::Ratio(ratio) => ("ratio", ratio, 1.0),
            SkipThreshold::Tail(_) if top_k < 2 => {
                return Err("the router chooses 1 expert, so that there is none to skip".into());
            }
            SkipThreshold::Tail(tail) => ("tail", tail, 1.0),
        };
        if (0.0..=most).contains(&value) {
            Ok(())
        } else {
            Err(format!("{name} is {value}, expected 0 to {most}"))
        }
    }
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_yes(value: &bool) -> bool {
    *value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_forms() {
        for (skip, json) in [
            (Skip { threshold: SkipThreshold::Ratio(0.5), rescale: true }, r#"{"ratio":0.5}"#),
            (
                Skip { threshold: SkipThreshold::Tail(0.25), rescale: false },
                r#"{"tail":0.25,"rescale":false}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&skip).unwrap(), json);
            assert_eq!(serde_json::from_str::<Skip>(json).unwrap(), skip);
        }
        assert!(serde_json::from_str::<Skip>("{}").is_err());
    }

    #[test]
    fn a_ratio_is_a_tail() {
        let skip = Skip { threshold: SkipThreshold::Ratio(0.5), rescale: true };
        assert!((skip.tail() - 1.0 / 3.0).abs() < 1e-7);
    }

    #[test]
    fn thresholds_that_are_none() {
        let ratio = Skip { threshold: SkipThreshold::Ratio(0.5), rescale: true };
        assert!(ratio.check(2).is_ok());
        assert_eq!(
            ratio.check(4).unwrap_err(),
            "ratio is for routers that choose 2 experts, this one chooses 4; use tail"
        );
        let tail = Skip { threshold: SkipThreshold::Tail(f64::NAN), rescale: true };
        assert_eq!(tail.check(4).unwrap_err(), "tail is NaN, expected 0 to 1");
        assert!(tail.check(1).unwrap_err().contains("none to skip"));
    }
}
