//! How much the hidden channels of an expert matter.

use serde_json::Value;

use super::Options;
use crate::linalg::Refit;

/// A score of hidden channels: the larger, the more worth keeping. z is the hidden vector, g the combine weight and w
/// a column of the down matrix; sums and maxima run over the tokens routed to the expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Criterion {
    /// ‖w‖² Σ (g z)²: the energy of what the channel adds to the layer's output.
    #[default]
    Energy,
    /// ‖w‖² (0.1 Σ (g z)² + 0.9 max (g z)²) (CAMERA, arXiv 2508.02322).
    Camera,
    /// The diagonal of (C + I)⁻¹ C with C = Σ z zᵀ / N (MoDeGPT, arXiv 2408.09632).
    LeverageUnit,
    /// The same with (tr C / p) I in place of I, so that the scale of the hidden vectors does not matter.
    LeverageRelative,
}

impl Criterion {
    /// The share of the maximum in the score of CAMERA.
    pub const RHO: f64 = 0.9;

    /// The option `criterion` of a plan; energy where there is none.
    pub fn of(options: &Options) -> Result<Self, String> {
        match text(options, "criterion") {
            None | Some("energy") => Ok(Criterion::Energy),
            Some("camera") => Ok(Criterion::Camera),
            Some("leverage-unit") => Ok(Criterion::LeverageUnit),
            Some("leverage-relative") => Ok(Criterion::LeverageRelative),
            Some(_) => Err("energy, camera, leverage-unit or leverage-relative".into()),
        }
    }

    /// Whether it is one of the two that need no second moments.
    pub fn is_energy(self) -> bool {
        matches!(self, Criterion::Energy | Criterion::Camera)
    }

    /// The energies of an expert's channels, from Σ (g z)², max |g z| and ‖w‖²; for [`Criterion::is_energy`].
    pub fn energies(self, sums: &[f64], largest: &[f64], norms: &[f64]) -> Vec<f64> {
        let channels = sums.iter().zip(largest).zip(norms);
        let score = |((sum, largest), norm): ((&f64, &f64), &f64)| match self {
            Criterion::Camera => norm * ((1.0 - Self::RHO) * sum + Self::RHO * largest * largest),
            _ => norm * sum,
        };
        channels.map(score).collect()
    }
}

/// The option `refit` of a plan; plain where there is none.
pub(crate) fn refit(options: &Options) -> Result<Refit, String> {
    match text(options, "refit") {
        None | Some("plain") => Ok(Refit::Plain),
        Some("refit") => Ok(Refit::LeastSquares),
        Some("anchored") => Ok(Refit::Anchored),
        Some(_) => Err("plain, refit or anchored".into()),
    }
}

fn text<'o>(options: &'o Options, name: &str) -> Option<&'o str> {
    match options.get(name) {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_str().unwrap_or("")),
    }
}
