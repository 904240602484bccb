//! A test of the tests: kernels with one mistake each, every one of which has to be caught.
//!
//! A fault is a change of the text of one source, applied to a copy; it must apply exactly once, so that a kernel that
//! changes takes its faults along. Caught means: an error of the emulation, a result outside its bound, or bank conflicts,
//! in at least one of the modes.

use std::path::Path;

use crate::definition::{Form, Layer, Random, Routes};
use crate::device::Plan;
use crate::emulator::{self, Dtype, Emulator, Mode};
use crate::failure_tests::try_far_offsets;
use crate::gemm_tests::{live, mixed_layer, try_layer};
use crate::routing_tests::{try_many_logits, try_routing};

/// What has to notice.
#[derive(Clone, Copy, Debug)]
enum Probe {
    /// A layer of all forms, with this family's tiles.
    Layer(u32),
    /// A tile of the large family with one pair more than fits into half of it.
    ShortTile,
    /// Offsets beyond 32 bits.
    Far(u32),
    /// Logits of many tokens.
    Logits,
    /// Sorting many slots.
    Sort,
    Route,
}

struct Fault {
    what: &'static str,
    file: &'static str,
    /// The kernels' file where `file` is a header.
    compiled: &'static str,
    from: &'static str,
    to: &'static str,
    probe: Probe,
}

const fn fault(
    what: &'static str,
    file: &'static str,
    probe: Probe,
    from: &'static str,
    to: &'static str,
) -> Fault {
    Fault { what, file, compiled: file, from, to, probe }
}

/// In a header of the sort.
const fn sort_fault(what: &'static str, from: &'static str, to: &'static str) -> Fault {
    Fault { what, file: "sort.cuh", compiled: "sort.cu", from, to, probe: Probe::Sort }
}

const LARGE: &str = "gemm_large.cu";
const SMALL: &str = "gemm_small.cu";
const LOGITS: &str = "logits_many.cu";

const FAULTS: &[Fault] = &[
    fault(
        "missing wait",
        LARGE,
        Probe::Layer(128),
        "wait_copies<STAGES - 2>();",
        "wait_copies<STAGES - 1>();",
    ),
    fault("missing barrier", LARGE, Probe::Layer(128), "__syncthreads();  // the step", "// the step"),
    fault(
        "early stage release",
        LARGE,
        Probe::Layer(128),
        "__syncthreads();  // the step is there for all, and all are done with the stage that comes next\n                load_next();",
        "load_next();\n                __syncthreads();",
    ),
    fault("wrong swizzle", LARGE, Probe::Layer(128), "% 2) ^ (col & 7)) * 16;", "% 2) ^ (col & 3)) * 16;"),
    fault("no swizzle", LARGE, Probe::Layer(128), "(chunk ^ (row & 7)) * 16;", "chunk * 16;"),
    fault("dropped row predicate", LARGE, Probe::Layer(128), "if (first + row >= tile.rows || ", "if ("),
    fault(
        "dropped column predicate",
        LARGE,
        Probe::Layer(128),
        " || tile.col + col >= cols) continue;",
        ") continue;",
    ),
    fault(
        "dropped predicate of the gather",
        LARGE,
        Probe::Layer(128),
        "rows[i] = row >= tile.rows ? -1 : ",
        "rows[i] = ",
    ),
    fault(
        "sums overwritten",
        LARGE,
        Probe::Layer(128),
        "            __syncthreads();\n            if (COUNT == TILE_ROWS || ",
        "            if (COUNT == TILE_ROWS || ",
    ),
    fault(
        "short tiles of too many rows",
        LARGE,
        Probe::ShortTile,
        "if (tile.rows <= ROWS / 2) {",
        "if (tile.rows <= ROWS / 2 + 1) {",
    ),
    fault(
        "int32 offset",
        LARGE,
        Probe::Far(128),
        "static_cast<int64_t>(rows[i]) * o.ld_input",
        "static_cast<int>(static_cast<unsigned>(rows[i]) * o.ld_input)",
    ),
    fault("missing wait", SMALL, Probe::Layer(8), "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();"),
    fault("missing barrier", SMALL, Probe::Layer(8), "__syncthreads();  // the step", "// the step"),
    fault(
        "early stage release",
        SMALL,
        Probe::Layer(8),
        "__syncthreads();  // the step is there for all, and all are done with the stage filled next\n                        load_next();",
        "load_next();\n                        __syncthreads();",
    ),
    fault(
        "wrong swizzle",
        SMALL,
        Probe::Layer(8),
        "((chunk % 8) ^ (row & 7)) * 16;",
        "((chunk % 8) ^ (row & 6)) * 16;",
    ),
    fault(
        "partial sums read too early",
        SMALL,
        Probe::Layer(8),
        "                __syncthreads();\n                store(p, tile, first, partials);",
        "                store(p, tile, first, partials);",
    ),
    fault(
        "one warp's sum forgotten",
        SMALL,
        Probe::Layer(8),
        "int warp = 1; warp < WARPS_ALONG_K;",
        "int warp = 2; warp < WARPS_ALONG_K;",
    ),
    fault("dropped row predicate", SMALL, Probe::Layer(16), "if (first + row >= tile.rows || ", "if ("),
    fault(
        "int32 offset",
        SMALL,
        Probe::Far(64),
        "static_cast<int64_t>(weight) * o.ld_weight",
        "static_cast<int>(static_cast<unsigned>(weight) * o.ld_weight)",
    ),
    fault(
        "weights called ahead that are not there",
        SMALL,
        Probe::Layer(16),
        "if (row >= stage_cols(p, e, p.next_stage)) return;",
        "",
    ),
    fault(
        "columns called ahead that are not there",
        SMALL,
        Probe::Layer(8),
        "cols[product] = min(o.k, 2 * K) - col;",
        "cols[product] = 2 * K - col;",
    ),
    fault("missing wait", LOGITS, Probe::Logits, "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();"),
    fault("missing barrier", LOGITS, Probe::Logits, "__syncthreads();  // the step", "// the step"),
    fault(
        "wrong swizzle",
        LOGITS,
        Probe::Logits,
        "((chunk % 8) ^ (first & 7))",
        "((chunk % 8) ^ (first & 3))",
    ),
    fault("parts of equal worth", LOGITS, Probe::Logits, "1.0f / 2048;", "1.0f;"),
    fault(
        "rows beyond the router",
        LOGITS,
        Probe::Logits,
        "token < p.tokens && row < p.rows)",
        "token < p.tokens)",
    ),
    fault("sums overwritten", LOGITS, Probe::Logits, "+ own_row;\n    __syncthreads();", "+ own_row;"),
    Fault {
        what: "K tail not cut off",
        file: "gemm.cuh",
        compiled: LARGE,
        from: "return max(0, min(16, (k - col) * 2));",
        to: "return col < k ? 16 : 0;",
        probe: Probe::Layer(128),
    },
    Fault {
        what: "base of another token",
        file: "gemm.cuh",
        compiled: SMALL,
        from: "const int64_t token = p.pair_token ? p.pair_token[pair] : pair;",
        to: "const int64_t token = pair / 4;",
        probe: Probe::Layer(8),
    },
    Fault {
        what: "GEMMs do not wait for the previous kernel",
        file: "gemm.cuh",
        compiled: SMALL,
        from: "        follow_previous_kernel();                                                        \\\n",
        to: "",
        probe: Probe::Layer(8),
    },
    Fault {
        what: "GEMMs read the tiles before they wait for the previous kernel",
        file: "gemm.cuh",
        compiled: SMALL,
        from: "        follow_previous_kernel();                                                        \\\n        FAMILY::run(p);                                                                  \\\n",
        to: "        if (p.tile_first[p.experts_count] < 0) { return; } follow_previous_kernel(); FAMILY::run(p); \\\n",
        probe: Probe::Layer(8),
    },
    fault(
        "some warps do not wait for the previous kernel",
        "routing.cu",
        Probe::Route,
        "MOE_ROUTE_THREADS, 4) {\n    follow_previous_kernel();",
        "MOE_ROUTE_THREADS, 4) {\n    if (threadIdx.x < 96) follow_previous_kernel();",
    ),
    sort_fault("a lane reads the cursor late", ": NO_PAIR;\n        __syncwarp();", ": NO_PAIR;"),
    sort_fault(
        "counts not cleared in time",
        "expert_of(p, slot));\n    }\n    __syncthreads();",
        "expert_of(p, slot));\n    }",
    ),
    sort_fault(
        "carry of the scan overwritten",
        "put(i, before);\n        __syncthreads();",
        "put(i, before);",
    ),
    sort_fault("a duplicate runs twice", "if (is_duplicate) return result;", ""),
    fault("NaN first", "routing.cu", Probe::Route, "if (value != value) value = NEGATIVE_INFINITY;", ""),
    fault("NaN in, NaN out", "routing.cu", Probe::Route, "fminf(fmaxf(logit, -LARGEST), LARGEST)", "logit"),
    fault("sums of 0", "routing.cu", Probe::Route, "if (divisor != 0.0f) weight", "weight"),
    fault(
        "lanes end before a reduction",
        "routing.cu",
        Probe::Route,
        "if (token >= p.tokens) return;",
        "if (token >= p.tokens || threadIdx.x % 32 > 30) return;",
    ),
    fault(
        "ties to the higher expert",
        "routing.cu",
        Probe::Route,
        "if (keys[i] > key) {",
        "if (keys[i] >= key) {",
    ),
];

/// The kernels of a fault's file, of the one family and type that are probed.
fn build(fault: &Fault, folder: &Path) -> Option<emulator::Kernels> {
    for file in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")).unwrap() {
        let file = file.unwrap();
        let mut text = std::fs::read_to_string(file.path()).unwrap();
        if file.file_name() == fault.file {
            assert_eq!(text.matches(fault.from).count(), 1, "{} in {} applies once", fault.what, fault.file);
            text = text.replace(fault.from, fault.to);
        }
        let family = match fault.probe {
            Probe::Layer(tile_rows) | Probe::Far(tile_rows) => Some(tile_rows),
            Probe::ShortTile => Some(128),
            Probe::Logits | Probe::Sort | Probe::Route => None,
        };
        if let Some(tile_rows) = family {
            let wanted = format!("MOE_GEMM_KERNELS({tile_rows}, bf16");
            let keep = |line: &&str| !line.starts_with("MOE_GEMM_KERNELS(") || line.starts_with(&wanted);
            text = text.lines().filter(keep).collect::<Vec<_>>().join("\n") + "\n";
        }
        std::fs::write(folder.join(file.file_name()), text).unwrap();
    }
    emulator::build(folder, Some(fault.compiled), folder)
}

/// Runs the probe; what it notices.
fn probe(fault: &Fault, gpu: Emulator) -> Result<(), String> {
    let mut random = Random::new(41);
    match fault.probe {
        Probe::Layer(tile_rows) => {
            let layer = mixed_layer(&mut random, Dtype::Bf16, 200, 140);
            let routes = Routes::random(&mut random, 13, 4, &live(&layer));
            let x = random.values(Dtype::Bf16, 13 * layer.hidden, 1.0);
            try_layer(gpu, &layer, &x, &routes, Plan { tile_rows, large_sort: false })
        }
        Probe::ShortTile => {
            let mut layer = Layer::new(Dtype::Bf16, 24);
            layer.add(&mut random, 16, [Form::Dense; 3]);
            let routes = Routes::random(&mut random, 65, 1, &[0]);
            let x = random.values(Dtype::Bf16, 65 * layer.hidden, 1.0);
            try_layer(gpu, &layer, &x, &routes, Plan { tile_rows: 128, large_sort: false })
        }
        Probe::Far(tile_rows) => try_far_offsets(gpu, tile_rows),
        Probe::Logits => try_many_logits(gpu, &mut random, [40, 70, 200], Dtype::F16, 2),
        Probe::Sort => {
            let mut layer = Layer::new(Dtype::Bf16, 8);
            for _ in 0..300 {
                layer.add(&mut random, 8, [Form::Dense; 3]);
            }
            let mut routes = Routes::random(&mut random, 200, 2, &live(&layer));
            routes.ids[6] = routes.ids[7];
            let x = random.values(Dtype::Bf16, 200 * 8, 1.0);
            try_layer(gpu, &layer, &x, &routes, Plan { tile_rows: 8, large_sort: false })
        }
        Probe::Route => try_routing(gpu),
    }
}

fn all_are_caught(file: &str) {
    let Some(correct) = Emulator::new(Mode::Late) else { return };
    let mut missed = Vec::new();
    for fault in FAULTS.iter().filter(|fault| fault.file == file) {
        let folder = tempfile::tempdir().unwrap();
        let Some(kernels) = build(fault, folder.path()) else { return };
        let replaced: &'static emulator::Kernels = Box::leak(Box::new(kernels));
        let modes = [Mode::Late, Mode::Early, Mode::Random(1), Mode::Random(2), Mode::Random(3)];
        let noticed = modes.into_iter().find_map(|mode| {
            probe(fault, Emulator { mode, replaced: Some(replaced), ..correct })
                .err()
                .map(|error| (mode, error))
        });
        match noticed {
            Some((mode, error)) => eprintln!("{}: {mode:?}: {error}", fault.what),
            None => missed.push(fault.what),
        }
    }
    assert!(missed.is_empty(), "not caught in {file}: {missed:?}");
}

#[test]
fn faults_of_the_large_family() {
    all_are_caught(LARGE);
}

#[test]
fn faults_of_the_small_family() {
    all_are_caught(SMALL);
}

#[test]
fn faults_of_what_the_families_share() {
    all_are_caught("gemm.cuh");
}

#[test]
fn faults_of_the_logits() {
    all_are_caught(LOGITS);
}

#[test]
fn faults_of_the_sort() {
    all_are_caught("sort.cuh");
}

#[test]
fn faults_of_routing() {
    all_are_caught("routing.cu");
}
