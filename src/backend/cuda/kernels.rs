//! The kernels by name.

use super::Element;
use super::params::STAGES;

/// The most rows of a tile, for each family of GEMM kernels in f16 and bf16.
pub(super) const FAMILIES: [u32; 5] = [8, 16, 32, 64, 128];
/// The same of the one family in f32.
pub(super) const F32_FAMILY: u32 = 64;

pub(super) const ROUTE: &str = "moe_route";
pub(super) const ROUTE_SORT: &str = "moe_route_sort";
pub(super) const SORT_SMALL: &str = "moe_sort_small";
pub(super) const SORT_COUNT: &str = "moe_sort_count";
pub(super) const SORT_SCAN: &str = "moe_sort_scan";
pub(super) const SORT_SCATTER: &str = "moe_sort_scatter";
pub(super) const BASE_PLAN: &str = "moe_base_plan";

/// A kernel of which there is one per element type.
#[derive(Clone, Copy, Debug)]
pub(super) struct PerElement {
    f32: &'static str,
    f16: &'static str,
    bf16: &'static str,
}

impl PerElement {
    pub(super) fn of(self, element: Element) -> &'static str {
        match element {
            Element::F32 => self.f32,
            Element::F16 => self.f16,
            Element::Bf16 => self.bf16,
        }
    }
}

macro_rules! per_element {
    ($name:literal) => {
        PerElement { f32: concat!($name, "_f32"), f16: concat!($name, "_f16"), bf16: concat!($name, "_bf16") }
    };
}

pub(super) const LOGITS: PerElement = per_element!("moe_logits");
pub(super) const LOGITS_FEW: PerElement = per_element!("moe_logits_few");
/// Not in f32: there, those of [`LOGITS`].
pub(super) const LOGITS_MANY: PerElement =
    PerElement { f32: LOGITS.f32, f16: "moe_logits_many_f16", bf16: "moe_logits_many_bf16" };
pub(super) const SCALE_INPUT: PerElement = per_element!("moe_scale_input");
pub(super) const BASE_HIDDEN: PerElement = per_element!("moe_base_hidden");
pub(super) const COMBINE: PerElement = per_element!("moe_combine");

/// A GEMM stage: kernels of every family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gemm {
    f32: &'static str,
    f16: [&'static str; 5],
    bf16: [&'static str; 5],
}

macro_rules! gemm {
    ($name:literal) => {
        Gemm { f32: concat!($name, "_t64_f32"), f16: gemm!($name, "_f16"), bf16: gemm!($name, "_bf16") }
    };
    ($name:literal, $element:literal) => {
        [
            concat!($name, "_t8", $element),
            concat!($name, "_t16", $element),
            concat!($name, "_t32", $element),
            concat!($name, "_t64", $element),
            concat!($name, "_t128", $element),
        ]
    };
}

/// In the order of the stages.
pub(super) const GEMMS: [Gemm; STAGES] =
    [gemm!("moe_project_in"), gemm!("moe_hidden"), gemm!("moe_project_hidden"), gemm!("moe_output")];

impl Gemm {
    /// The kernel whose tiles have `tile_rows` rows, one of [`FAMILIES`].
    pub(super) fn of(self, element: Element, tile_rows: u32) -> &'static str {
        let family = FAMILIES.iter().position(|&rows| rows == tile_rows).unwrap_or_default();
        match element {
            Element::F32 => self.f32,
            Element::F16 => self.f16[family],
            Element::Bf16 => self.bf16[family],
        }
    }
}

/// All kernels that are launched, each behind the file of `cuda/` that it is in.
pub(super) fn by_source() -> impl Iterator<Item = (&'static str, &'static str)> {
    let of = |k: PerElement| [k.f32, k.f16, k.bf16];
    let rows = [SCALE_INPUT, BASE_HIDDEN, COMBINE];
    let mut found: Vec<(_, Vec<_>)> = vec![
        ("routing.cu", vec![ROUTE, ROUTE_SORT]),
        ("sort.cu", vec![SORT_SMALL, SORT_COUNT, SORT_SCAN, SORT_SCATTER, BASE_PLAN]),
        ("logits.cu", [LOGITS, LOGITS_FEW].into_iter().flat_map(of).collect()),
        ("logits_many.cu", vec![LOGITS_MANY.f16, LOGITS_MANY.bf16]),
        ("combine.cu", rows.into_iter().flat_map(of).collect()),
    ];
    for Gemm { f32, f16: [f16 @ .., f16_large], bf16: [bf16 @ .., bf16_large] } in GEMMS {
        found.push(("gemm_f32.cu", vec![f32]));
        found.push(("gemm_small.cu", [f16, bf16].concat()));
        found.push(("gemm_large.cu", vec![f16_large, bf16_large]));
    }
    found.into_iter().flat_map(|(source, kernels)| kernels.into_iter().map(move |kernel| (source, kernel)))
}

/// The names of all kernels that are launched, as they are in the fat binaries.
pub fn kernel_names() -> impl Iterator<Item = &'static str> {
    by_source().map(|(_, kernel)| kernel)
}
