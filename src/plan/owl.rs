//! Layers with many outliers lose less: OWL (arXiv 2310.05175).

use super::error::Place;
use super::methods::Request;
use super::options::{self, OptionKind, Options};
use super::score;
use super::{Budget, Error, OptionSpec, Result};
use crate::architecture::MoeProfile;
use crate::backend::{Moment, Moments};

/// The options of every method that spends a budget layer by layer.
pub(super) const OPTIONS: [OptionSpec; 3] = [
    OptionSpec {
        name: "layer_ratio",
        kind: OptionKind::Choice(&["uniform", "owl"]),
        default: Some("uniform"),
        help: "uniform: the same share of every layer goes; owl: less of layers with more outliers among |W| ‖x‖ (arXiv \
               2310.05175), with --remove, --stats and --model",
    },
    OptionSpec {
        name: "owl_lambda",
        kind: OptionKind::Fraction,
        default: Some("0.08"),
        help: "owl: how far the share of a layer may be from the mean of all, at most twice this",
    },
    OptionSpec {
        name: "owl_m",
        kind: OptionKind::Integer(1),
        default: Some("5"),
        help: "owl: how many times the mean of its layer makes an outlier",
    },
];

/// Outliers among the weights of a layer's experts, from whoever owns the weights.
pub trait OutlierSource {
    /// The share of entries of A above `factor` times the mean of A, where A holds |W\[i, j\]| · ‖x\[j\]‖ for all matrices of
    /// all experts of the 0-based decoder layer. `input` `[E, d]` and `hidden` `[E, p]` are the sums of squares ‖x‖² of the
    /// inputs of gate and up, and of down.
    ///
    /// # Errors
    /// A message that says what failed.
    fn outliers(&self, layer: usize, input: &[f64], hidden: &[f64], factor: f64) -> Result<f64, String>;
}

/// The share of the routed-expert parameters to remove from each MoE layer, `fraction` of all.
pub(super) fn fractions(request: &Request<'_>, options: &Options, fraction: f64) -> Result<Vec<f64>> {
    let layers = &request.profile.moe_layers;
    if !is_owl(options) {
        return Ok(vec![fraction; layers.len()]);
    }
    let Some(statistics) = request.statistics.filter(|s| s.len() == layers.len()) else {
        let problem = "layer_ratio=owl needs those that calibrate wrote for this checkpoint";
        return Err(Place::top().statistics(problem));
    };
    let Some(source) = request.outliers else {
        let problem = "layer_ratio=owl looks at the weights; give the checkpoint with --model";
        return Err(Error::Missing(problem.into()));
    };
    let factor = options::integer(options, "owl_m").unwrap_or(5) as f64;
    let lambda = options::fraction(options, "owl_lambda").unwrap_or(0.08);
    let outliers = |(layer, moments): (&MoeProfile, &Moments)| {
        let input = score::finite(layer, moments, Moment::InputSqSum)?;
        let hidden = score::finite(layer, moments, Moment::HiddenSqSum)?;
        let share = source.outliers(layer.layer, input, hidden, factor);
        share.map_err(|problem| Place::layer(layer.layer).spectrum(problem))
    };
    let outliers = layers.iter().zip(statistics).map(outliers).collect::<Result<Vec<_>>>()?;
    let sizes: Vec<f64> = layers.iter().map(|l| l.experts as f64 * l.expert_parameters as f64).collect();
    let fractions = ratios(&outliers, &sizes, fraction, lambda);
    match layers.iter().zip(&fractions).find(|(_, f)| !(0.0..1.0).contains(*f)) {
        None => Ok(fractions),
        Some((layer, f)) => Err(Error::Option {
            option: "owl_lambda".into(),
            value: lambda.to_string(),
            expected: format!("takes {f:.3} of layer {}; choose a smaller one", layer.layer),
        }),
    }
}

/// What the budget means to `method`, which keeps every expert: `of_fraction` of a share and of those of the layers, or
/// `of_size` of a size.
///
/// # Errors
/// No budget or one of another kind; those of [`fractions`], `of_fraction` and `of_size`.
pub(super) fn of_budget<T>(
    method: &str,
    request: &Request<'_>,
    options: &Options,
    of_fraction: impl FnOnce(f64, &[f64]) -> Result<T>,
    of_size: impl FnOnce(u64) -> Result<T>,
) -> Result<T> {
    match request.budget {
        Some(budget @ Budget::Remove(fraction)) => {
            budget.check()?;
            of_fraction(fraction, &fractions(request, options, fraction)?)
        }
        Some(budget @ Budget::Bytes(_)) if is_owl(options) => Err(needs_fraction(budget)),
        Some(Budget::Bytes(size)) => of_size(size),
        Some(budget @ Budget::Experts(_)) => {
            Err(Error::Budget(format!("{budget}: {method} keeps every expert; use --remove or --bytes")))
        }
        None => Err(Error::Missing(format!("{method}: no budget; give --remove or --bytes"))),
    }
}

/// Whether the options ask for it.
pub(super) fn is_owl(options: &Options) -> bool {
    options::is(options, "layer_ratio", "owl")
}

/// The error for a budget other than a fraction.
pub(super) fn needs_fraction(budget: impl std::fmt::Display) -> Error {
    Error::Budget(format!("{budget}: layer_ratio=owl divides a share of the parameters; use --remove"))
}

/// The share of each layer that goes: 2λ from the layer with the most outliers to the one with the fewest, `fraction` on
/// average over layers of these sizes.
fn ratios(outliers: &[f64], sizes: &[f64], fraction: f64, lambda: f64) -> Vec<f64> {
    let (least, most) = outliers.iter().fold((f64::MAX, f64::MIN), |(l, m), d| (d.min(l), d.max(m)));
    let spread = if most > least { most - least } else { 1.0 };
    let kept: Vec<f64> = outliers.iter().map(|d| (d - least) / spread * 2.0 * lambda).collect();
    let total: f64 = sizes.iter().sum();
    let mean = kept.iter().zip(sizes).map(|(k, size)| k * size).sum::<f64>() / total;
    kept.iter().map(|k| fraction - (k - mean)).collect()
}

#[cfg(test)]
mod tests {
    use super::ratios;

    #[test]
    fn ratios_of_the_paper() {
        let close = |found: Vec<f64>, expected: [f64; 3]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?}");
        };
        close(ratios(&[2.0, 4.0, 6.0], &[1.0; 3], 0.7, 0.08), [0.78, 0.7, 0.62]);
        close(ratios(&[3.0; 3], &[1.0; 3], 0.25, 0.08), [0.25; 3]);
        // The mean is that of the parameters.
        let found = ratios(&[2.0, 4.0, 6.0], &[1.0, 1.0, 2.0], 0.5, 0.1);
        assert!((found[0] + found[1] + 2.0 * found[2] - 2.0).abs() < 1e-12, "{found:?}");
    }
}
