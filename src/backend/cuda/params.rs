//! `cuda/params.cuh` in Rust: descriptors, parameters of kernels, limits, launch shapes. Pointers are addresses (u64).
//! The tests compile the header against this file.

use bytemuck::{Pod, Zeroable};

pub(super) const MAX_EXPERTS: usize = 1024;
pub(super) const MAX_TOP_K: usize = 32;
pub(super) const MAX_SLOTS: usize = MAX_TOP_K + 1;
pub(super) const SORT_CHUNK: usize = 2048;
pub(super) const ROUTE_TOKENS: usize = 4;
pub(super) const ROUTE_THREADS: u32 = 128;
pub(super) const SORT_THREADS: u32 = 256;
pub(super) const ROUTE_SORT_TOKENS: usize = 8;
pub(super) const ROW_THREADS: u32 = 128;
pub(super) const COMBINE_COLS: usize = 1024;
pub(super) const GEMM_SHARED: u32 = 96 * 1024;
pub(super) const LOGITS_TILE: usize = 64;
pub(super) const LOGITS_SHARED: u32 = 2 * 32 * (LOGITS_TILE as u32 + 4) * 4;
pub(super) const LOGITS_THREADS: u32 = 256;
pub(super) const LOGITS_FEW: usize = 256;
pub(super) const LOGITS_FEW_THREADS: u32 = 128;
pub(super) const LOGITS_FEW_TOKENS: usize = 8;
pub(super) const LOGITS_FEW_ROWS: usize = 2;
pub(super) const LOGITS_FEW_SHARED: u32 = 256;
pub(super) const LOGITS_MANY_THREADS: u32 = 128;
pub(super) const LOGITS_MANY_TOKENS: usize = 32;
pub(super) const LOGITS_MANY_ROWS: usize = 64;
pub(super) const LOGITS_MANY_SHARED: u32 = 72 * 1024;

/// Most groups of a router.
const MAX_GROUPS: usize = 64;

/// Shared memory in which a token is routed.
fn route_bytes(experts: usize) -> usize {
    4 * (2 * experts + MAX_GROUPS)
}

pub(super) fn route_shared(experts: usize) -> u32 {
    (ROUTE_TOKENS * route_bytes(experts)) as u32
}

pub(super) fn sort_shared(experts: usize) -> u32 {
    (4 * ((SORT_THREADS as usize / 32 + 1) * experts + 1 + 64) + 2 * SORT_CHUNK) as u32
}

pub(super) fn route_sort_shared(experts: usize, rows: usize) -> u32 {
    sort_shared(rows).max((ROUTE_SORT_TOKENS * route_bytes(experts)) as u32)
}

pub(super) fn gemm_threads(tile_rows: u32, is_hidden: bool) -> u32 {
    if tile_rows == 128 && !is_hidden { 128 } else { 256 }
}

pub(super) fn gemm_blocks(tile_rows: u32, is_hidden: bool) -> u32 {
    if tile_rows == 128 && is_hidden { 1 } else { 2 }
}

pub(super) fn gemm_tile_cols(tile_rows: u32) -> u32 {
    match tile_rows {
        8 => 16,
        16 => 32,
        _ => 128,
    }
}

pub(super) const FORM_NONE: i32 = 0;
pub(super) const FORM_MLP: i32 = 1;
pub(super) const FORM_CONSTANT: i32 = 2;

pub(super) const LOW_RANK: u32 = 1;
pub(super) const BASE: u32 = 2;
pub(super) const ABSENT: u32 = 4;

/// The four GEMM stages, as indices of tile lists.
pub(super) const PROJECT_IN: usize = 0;
pub(super) const HIDDEN: usize = 1;
pub(super) const PROJECT_HIDDEN: usize = 2;
pub(super) const OUTPUT: usize = 3;
pub(super) const STAGES: usize = 4;

/// A structure of the header, with the names and places of its fields for the test that compares them.
macro_rules! mirror {
    ($($name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Pod, Zeroable)]
            pub(super) struct $name { $(pub(super) $field: $type,)* }
        )*
        #[cfg(test)]
        const MIRRORED: &[(&str, usize, &[(&str, usize)])] = &[$((
            stringify!($name),
            size_of::<$name>(),
            &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
        ),)*];
    };
}

mirror! {
    MoeMatrix {
        weight: u64,
        row_slot: u64,
        bias: u64,
        ld: i32,
        k: i32,
        z_first: i32,
        flags: u32,
    }
    MoeExpert {
        gate: MoeMatrix,
        up: MoeMatrix,
        down: MoeMatrix,
        v_in: u64,
        v_down: u64,
        constant: u64,
        form: i32,
        width: i32,
        v_in_rows: i32,
        v_in_ld: i32,
        v_down_rows: i32,
        v_down_ld: i32,
        reserved: [i32; 22],
    }
    MoeLogitsParams {
        x: u64,
        weight: u64,
        parts: u64,
        logits: u64,
        tokens: i32,
        rows: i32,
        hidden: i32,
        ldx: i32,
        ldw: i32,
        ld_parts: i32,
        part_count: i32,
        ld_logits: i32,
    }
    MoeRouteParams {
        logits: u64,
        logit_bias: u64,
        choice_bias: u64,
        group_of: u64,
        live: u64,
        ids: u64,
        weights: u64,
        tokens: i32,
        experts: i32,
        ld_logits: i32,
        top_k: i32,
        slots: i32,
        scoring: i32,
        choice: i32,
        groups: i32,
        groups_kept: i32,
        group_score: i32,
        renormalise: i32,
        scale: f32,
        added: f32,
        least: f32,
        jitter: f32,
        skip_rule: i32,
        skip: f32,
        shared_expert: i32,
        shared_gate: i32,
        reserved: i32,
    }
    MoeSortParams {
        ids: u64,
        weights: u64,
        canonical: u64,
        experts: u64,
        order: u64,
        offsets: u64,
        pair_token: u64,
        pair_weight: u64,
        slot_source: u64,
        slot_weight: u64,
        tile_first: u64,
        histogram: u64,
        tokens: i32,
        slots: i32,
        experts_count: i32,
        hidden: i32,
        merge_duplicates: i32,
        tile_rows: i32,
        tile_cols: [i32; STAGES],
    }
    MoeRouteSortParams {
        route: MoeRouteParams,
        sort: MoeSortParams,
    }
    MoeBasePlanParams {
        base: u64,
        offsets: u64,
        tile_first: u64,
        tokens: i32,
        hidden: i32,
        tile_rows: i32,
        tile_cols: [i32; STAGES],
        reserved: i32,
    }
    MoeScaleInputParams {
        x: u64,
        offsets: u64,
        pair_token: u64,
        pair_weight: u64,
        out: u64,
        experts: i32,
        hidden: i32,
        ldx: i32,
        ld_out: i32,
    }
    MoeGemmParams {
        experts: u64,
        offsets: u64,
        order: u64,
        tile_first: u64,
        next_tile_first: u64,
        pair_token: u64,
        input: u64,
        z: u64,
        base: u64,
        out: u64,
        experts_count: i32,
        hidden: i32,
        ld_input: i32,
        ld_z: i32,
        ld_base: i32,
        ld_out: i32,
        base_up: i32,
        activation: i32,
        limit: f32,
        slope: f32,
        next_stage: i32,
        reserved: i32,
    }
    MoeBaseHiddenParams {
        experts: u64,
        canonical: u64,
        ids: u64,
        slot_source: u64,
        slot_weight: u64,
        h: u64,
        out: u64,
        tokens: i32,
        slots: i32,
        width: i32,
        ldh: i32,
        ld_out: i32,
        reserved: i32,
    }
    MoeCombineParams {
        experts: u64,
        slot_source: u64,
        slot_weight: u64,
        y: u64,
        base: u64,
        residual: u64,
        out: u64,
        tokens: i32,
        slots: i32,
        hidden: i32,
        ldy: i32,
        ld_residual: i32,
        ld_out: i32,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// A C++ compiler says that every structure, limit and launch shape is the header's.
    #[test]
    fn the_header_agrees() {
        let mut source = String::from("#include \"params.cuh\"\n");
        let mut claim = |what: String, value: usize| {
            source += &format!("static_assert({what} == {value}, \"{what}\");\n");
        };
        for (name, size, fields) in MIRRORED {
            claim(format!("sizeof({name})"), *size);
            for (field, offset) in *fields {
                claim(format!("offsetof({name}, {field})"), *offset);
            }
        }
        for (name, value) in [
            ("MOE_MAX_EXPERTS", MAX_EXPERTS),
            ("MOE_MAX_TOP_K", MAX_TOP_K),
            ("MOE_MAX_SLOTS", MAX_SLOTS),
            ("MOE_MAX_GROUPS", MAX_GROUPS),
            ("MOE_SORT_CHUNK", SORT_CHUNK),
            ("MOE_ROUTE_TOKENS", ROUTE_TOKENS),
            ("MOE_ROUTE_THREADS", ROUTE_THREADS as usize),
            ("MOE_SORT_THREADS", SORT_THREADS as usize),
            ("MOE_ROW_THREADS", ROW_THREADS as usize),
            ("MOE_GEMM_SHARED", GEMM_SHARED as usize),
            ("MOE_ROUTE_SORT_TOKENS", ROUTE_SORT_TOKENS),
            ("MOE_COMBINE_COLS", COMBINE_COLS),
            ("MOE_LOGITS_FEW", LOGITS_FEW),
            ("MOE_LOGITS_FEW_THREADS", LOGITS_FEW_THREADS as usize),
            ("MOE_LOGITS_FEW_TOKENS", LOGITS_FEW_TOKENS),
            ("MOE_LOGITS_FEW_ROWS", LOGITS_FEW_ROWS),
            ("MOE_LOGITS_FEW_SHARED", LOGITS_FEW_SHARED as usize),
            ("MOE_LOGITS_MANY_THREADS", LOGITS_MANY_THREADS as usize),
            ("MOE_LOGITS_MANY_TOKENS", LOGITS_MANY_TOKENS),
            ("MOE_LOGITS_MANY_ROWS", LOGITS_MANY_ROWS),
            ("MOE_LOGITS_MANY_SHARED", LOGITS_MANY_SHARED as usize),
            ("MOE_LOGITS_TILE", LOGITS_TILE),
            ("MOE_LOGITS_SHARED", LOGITS_SHARED as usize),
            ("MOE_NONE", FORM_NONE as usize),
            ("MOE_MLP", FORM_MLP as usize),
            ("MOE_CONSTANT", FORM_CONSTANT as usize),
            ("MOE_LOW_RANK", LOW_RANK as usize),
            ("MOE_BASE", BASE as usize),
            ("MOE_ABSENT", ABSENT as usize),
            ("MOE_PROJECT_IN", PROJECT_IN),
            ("MOE_HIDDEN", HIDDEN),
            ("MOE_PROJECT_HIDDEN", PROJECT_HIDDEN),
            ("MOE_OUTPUT", OUTPUT),
            ("MOE_STAGES", STAGES),
        ] {
            claim(format!("int({name})"), value);
        }
        for experts in [1, 60, MAX_EXPERTS] {
            claim(format!("moe_route_shared({experts})"), route_shared(experts) as usize);
            claim(format!("moe_sort_shared({experts})"), sort_shared(experts) as usize);
            let rows = experts.next_multiple_of(2);
            claim(
                format!("moe_route_sort_shared({experts}, {rows})"),
                route_sort_shared(experts, rows) as usize,
            );
        }
        for rows in [8, 16, 32, 64, 128] {
            claim(format!("moe_gemm_tile_cols({rows})"), gemm_tile_cols(rows) as usize);
            for hidden in [true, false] {
                claim(format!("moe_gemm_threads({rows}, {hidden})"), gemm_threads(rows, hidden) as usize);
                claim(format!("moe_gemm_blocks({rows}, {hidden})"), gemm_blocks(rows, hidden) as usize);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("claims.cpp");
        std::fs::write(&file, source).unwrap();
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", "-I"]).arg(include).arg(&file);
        let Ok(output) = compiler.output() else {
            eprintln!("skipped: no C++ compiler");
            return;
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
