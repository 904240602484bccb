//! Dynamic expert skipping: thresholds from the weights that routers give.

use crate::architecture::{Profile, Skip, SkipThreshold};
use crate::plan::options::{self, Options};
use crate::plan::{Error, LossSource, OptionKind, OptionSpec, Result};

/// The options; the first one turns skipping on.
pub(super) const OPTIONS: [OptionSpec; 3] = [
    OptionSpec {
        name: "skip",
        kind: OptionKind::Flag,
        default: Some("false"),
        help: "at run time leave out the chosen experts of least weight: those behind the first i whose weights add up \
               to less than β of all, with β the median of that share on the (pruned) model; for top-2 routers, as \
               published, the second where its weight is below β times the first's. Needs no budget",
    },
    OptionSpec {
        name: "skip_after",
        kind: OptionKind::Integer(1),
        default: None,
        help: "the i whose tail gives β; where not given, one less than experts are chosen",
    },
    OptionSpec {
        name: "skip_weights",
        kind: OptionKind::Choice(&["rescaled", "raw"]),
        default: Some("rescaled"),
        help: "rescaled: the weights of the others are multiplied to keep their sum; raw: they stay",
    },
];

/// Refuses what no layer can do, before any work.
pub(super) fn check(profile: &Profile, options: &Options) -> Result<()> {
    if !options::flag(options, "skip") {
        return Ok(());
    }
    for layer in &profile.moe_layers {
        let (l, k) = (layer.layer, layer.top_k);
        let refuse = |option: &str, value: String, expected: String| {
            Err(Error::Option { option: option.into(), value, expected })
        };
        if k < 2 {
            let expected =
                format!("the router of layer {l} chooses {k} expert, so that there is none to skip");
            return refuse("skip", "true".into(), expected);
        }
        if let Some(after) = options::integer(options, "skip_after").filter(|after| *after >= k as u64) {
            return refuse("skip_after", after.to_string(), format!("expected 1 to {} for layer {l}", k - 1));
        }
    }
    Ok(())
}

/// The rule of every MoE layer of the model that has lost the experts `dropped`.
pub(super) fn rules(
    profile: &Profile,
    options: &Options,
    source: &dyn LossSource,
    dropped: &[Vec<usize>],
) -> Result<Vec<Option<Skip>>> {
    if !options::flag(options, "skip") {
        return Ok(vec![None; dropped.len()]);
    }
    let rescale = options::is(options, "skip_weights", "rescaled");
    let tails = source.tails(dropped).map_err(Error::Search)?;
    let pairs = profile.moe_layers.iter().zip(tails);
    let rule = pairs.map(|(layer, tails)| {
        let after = options::integer(options, "skip_after").map_or(layer.top_k - 1, |after| after as usize);
        let tail = || tails.after.get(after - 1).copied().map(SkipThreshold::Tail);
        let threshold = tails.ratio.map(SkipThreshold::Ratio).or_else(tail);
        threshold.map(|threshold| Skip { threshold, rescale })
    });
    Ok(rule.collect())
}
