//! Sums over the tokens that a MoE layer processed: what one calibration pass measures.

use std::collections::BTreeMap;

/// One measured quantity of a MoE layer. `E` is the number of routed experts, `d` the hidden size, `p` the
/// expert width, `g` the combine weight of the expert for the token (the exact coefficient that the model
/// uses), `f` the expert's output without that weight, `z` its hidden vector (the input of the down
/// projection), `x` the expert's input. Where combine weights multiply the input (Llama 4), `x` is the layer input
/// times that weight, and `g` is 1. Sums run over the tokens *routed* to the expert unless said otherwise;
/// padding never counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Moment {
    /// Number of tokens, `[E]`.
    Count,
    /// Σ g, `[E]`.
    GateSum,
    /// Σ g², `[E]`.
    GateSqSum,
    /// Σ ‖f‖, `[E]`.
    NormSum,
    /// Σ ‖f‖², `[E]`.
    NormSqSum,
    /// Σ g‖f‖, `[E]`.
    GateNormSum,
    /// Σ (g‖f‖)², `[E]`.
    GateNormSqSum,
    /// Σ of the router's score over *all* tokens, `[E]`.
    SoftCount,
    /// max |coordinate of f|, `[E]`.
    MaxAbs,
    /// max ‖f‖, `[E]`.
    MaxNorm,
    /// Tokens that chose both experts, `[E, E]`; the diagonal is the count.
    CoActivation,
    /// Σ l lᵀ of the router logits l over all tokens, `[E, E]`.
    RouterGram,
    /// Tokens by input file that chose the expert, `[files, E]`.
    Coverage,
    /// Σ x∘x, `[E, d]`.
    InputSqSum,
    /// Σ z∘z, `[E, p]`.
    HiddenSqSum,
    /// Σ g² z∘z, `[E, p]`.
    GateHiddenSqSum,
    /// max |g z|, each channel of its own, `[E, p]`.
    GateHiddenMax,
    /// Squared norm of every column of the down matrix, `[E, p]`: of the weights, not of the tokens; kept here for
    /// planners, which see no weights.
    DownNormSq,
    /// Σ f, `[E, d]`.
    OutputSum,
    /// Σ f∘f, `[E, d]`.
    OutputSqSum,
    /// Σ g f, `[E, d]`.
    GateOutputSum,
    /// Σ ‖Σ_e g_e f_e‖² over all tokens, `[1]`.
    RoutedSqSum,
    /// Number of sampled tokens, on which every expert was run, `[1]`.
    SampleCount,
    /// Σ f over the sampled tokens, whether routed there or not, `[E, d]`.
    SampleOutputSum,
    /// Σ x xᵀ, `[E, d, d]`.
    InputGram,
    /// Σ g² x xᵀ, `[E, d, d]`.
    GateInputGram,
    /// Σ z zᵀ, `[E, p, p]`.
    HiddenGram,
    /// Σ g² z zᵀ, `[E, p, p]`.
    GateHiddenGram,
}

impl Moment {
    /// Every moment, in file order.
    pub const ALL: [Moment; 28] = [
        Moment::Count,
        Moment::GateSum,
        Moment::GateSqSum,
        Moment::NormSum,
        Moment::NormSqSum,
        Moment::GateNormSum,
        Moment::GateNormSqSum,
        Moment::SoftCount,
        Moment::MaxAbs,
        Moment::MaxNorm,
        Moment::CoActivation,
        Moment::RouterGram,
        Moment::Coverage,
        Moment::InputSqSum,
        Moment::HiddenSqSum,
        Moment::GateHiddenSqSum,
        Moment::GateHiddenMax,
        Moment::DownNormSq,
        Moment::OutputSum,
        Moment::OutputSqSum,
        Moment::GateOutputSum,
        Moment::RoutedSqSum,
        Moment::SampleCount,
        Moment::SampleOutputSum,
        Moment::InputGram,
        Moment::GateInputGram,
        Moment::HiddenGram,
        Moment::GateHiddenGram,
    ];

    /// The four second moments: large, and measured only when asked for.
    pub const SECOND: [Moment; 4] =
        [Moment::InputGram, Moment::GateInputGram, Moment::HiddenGram, Moment::GateHiddenGram];

    /// The word for a second moment in `calibrate --moments`; `None` for first moments, which are always measured.
    pub fn flag(self) -> Option<&'static str> {
        match self {
            Moment::InputGram => Some("input"),
            Moment::GateInputGram => Some("gate-input"),
            Moment::HiddenGram => Some("hidden"),
            Moment::GateHiddenGram => Some("gate-hidden"),
            _ => None,
        }
    }

    /// Name in the statistics file, after `layers.{l}.`.
    pub fn name(self) -> &'static str {
        match self {
            Moment::Count => "count",
            Moment::GateSum => "gate_sum",
            Moment::GateSqSum => "gate_sq_sum",
            Moment::NormSum => "norm_sum",
            Moment::NormSqSum => "norm_sq_sum",
            Moment::GateNormSum => "gate_norm_sum",
            Moment::GateNormSqSum => "gate_norm_sq_sum",
            Moment::SoftCount => "soft_count",
            Moment::MaxAbs => "max_abs",
            Moment::MaxNorm => "max_norm",
            Moment::CoActivation => "co_activation",
            Moment::RouterGram => "router_gram",
            Moment::Coverage => "coverage",
            Moment::InputSqSum => "input_sq_sum",
            Moment::HiddenSqSum => "hidden_sq_sum",
            Moment::GateHiddenSqSum => "gate_hidden_sq_sum",
            Moment::GateHiddenMax => "gate_hidden_max",
            Moment::DownNormSq => "down_norm_sq",
            Moment::OutputSum => "output_sum",
            Moment::OutputSqSum => "output_sq_sum",
            Moment::GateOutputSum => "gate_output_sum",
            Moment::RoutedSqSum => "routed_sq_sum",
            Moment::SampleCount => "sample_count",
            Moment::SampleOutputSum => "sample_output_sum",
            Moment::InputGram => "input_gram",
            Moment::GateInputGram => "gate_input_gram",
            Moment::HiddenGram => "hidden_gram",
            Moment::GateHiddenGram => "gate_hidden_gram",
        }
    }

    /// Shape for `dims`.
    pub fn shape(self, dims: MomentDims) -> Vec<usize> {
        let MomentDims { experts: e, hidden_size: d, width: p, files } = dims;
        match self {
            Moment::CoActivation | Moment::RouterGram => vec![e, e],
            Moment::Coverage => vec![files, e],
            Moment::InputSqSum
            | Moment::OutputSum
            | Moment::OutputSqSum
            | Moment::GateOutputSum
            | Moment::SampleOutputSum => vec![e, d],
            Moment::HiddenSqSum | Moment::GateHiddenSqSum | Moment::GateHiddenMax | Moment::DownNormSq => {
                vec![e, p]
            }
            Moment::RoutedSqSum | Moment::SampleCount => vec![1],
            Moment::InputGram | Moment::GateInputGram => vec![e, d, d],
            Moment::HiddenGram | Moment::GateHiddenGram => vec![e, p, p],
            _ => vec![e],
        }
    }

    /// Whether two measurements combine by their maximum; all others add up.
    pub fn is_maximum(self) -> bool {
        matches!(self, Moment::MaxAbs | Moment::MaxNorm | Moment::GateHiddenMax | Moment::DownNormSq)
    }
}

/// The sizes that decide the shapes of a layer's moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MomentDims {
    /// Routed experts, `E`.
    pub experts: usize,
    /// Width of what routed experts read and write, `d`: the hidden size, or that of their latent.
    pub hidden_size: usize,
    /// Largest expert width, `p`.
    pub width: usize,
    /// Input files.
    pub files: usize,
}

/// The moments of one MoE layer, in f64, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    dims: MomentDims,
    arrays: BTreeMap<Moment, Vec<f64>>,
}

impl Moments {
    /// Zeros for every first moment and for those second moments that are listed in `second`.
    pub fn zeros(dims: MomentDims, second: &[Moment]) -> Self {
        let zeros = |m: Moment| (m, vec![0.0; m.shape(dims).iter().product()]);
        Moments { dims, arrays: Moments::with(second).map(zeros).collect() }
    }

    /// The moments that are measured together with `second`: all that are no second ones, and these.
    pub fn with(second: &[Moment]) -> impl Iterator<Item = Moment> {
        let wanted = |m: &Moment| !Moment::SECOND.contains(m) || second.contains(m);
        Moment::ALL.into_iter().filter(wanted)
    }

    /// Moments from arrays read elsewhere; every array must have the size of [`Moment::shape`].
    pub fn from_arrays(dims: MomentDims, arrays: BTreeMap<Moment, Vec<f64>>) -> Option<Self> {
        let fits = arrays.iter().all(|(m, a)| a.len() == m.shape(dims).iter().product::<usize>());
        fits.then_some(Moments { dims, arrays })
    }

    /// The sizes.
    pub fn dims(&self) -> MomentDims {
        self.dims
    }

    /// The array of `moment`, or `None` where it was not measured.
    pub fn get(&self, moment: Moment) -> Option<&[f64]> {
        self.arrays.get(&moment).map(Vec::as_slice)
    }

    /// The array of `moment` for accumulation, or `None` where it is not measured.
    pub fn get_mut(&mut self, moment: Moment) -> Option<&mut [f64]> {
        self.arrays.get_mut(&moment).map(Vec::as_mut_slice)
    }

    /// Removes and returns the array of `moment`.
    pub fn take(&mut self, moment: Moment) -> Option<Vec<f64>> {
        self.arrays.remove(&moment)
    }

    /// Puts an array (back) in place.
    pub fn put(&mut self, moment: Moment, array: Vec<f64>) {
        self.arrays.insert(moment, array);
    }

    /// The measured moments in file order.
    pub fn iter(&self) -> impl Iterator<Item = (Moment, &[f64])> {
        self.arrays.iter().map(|(m, a)| (*m, a.as_slice()))
    }

    /// A per-expert vector that every measurement has.
    pub fn per_expert(&self, moment: Moment) -> &[f64] {
        self.get(moment).unwrap_or(&[])
    }
}
