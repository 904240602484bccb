//! What has broken MoE kernels for users: empty experts, tile edges, odd ranks, duplicate and missing ids, offsets beyond
//! 32 bits, NaN that spreads, results that depend on the launch.

use bytemuck::{Zeroable, bytes_of};

use crate::definition::{Expert, Form, Layer, Random, Routes};
use crate::device::{Plan, Prepared};
use crate::emulator::{Dtype, Emulator, MODES, Mode};
use crate::gemm_tests::{FAMILIES, check, live, mixed_layer};
use crate::oracle;
use crate::params::{
    COMBINE_COLS, FORM_MLP, GEMM_SHARED, LOW_RANK, MoeCombineParams, MoeExpert, MoeGemmParams,
    MoeScaleInputParams, MoeSortParams, ROW_THREADS, SORT_THREADS, gemm_threads, sort_shared,
};

const SMALL: Plan = Plan { tile_rows: 16, large_sort: false };

/// Tokens at and around the ends of a family's tiles, weight rows around theirs.
#[test]
fn tile_edges() {
    let mut random = Random::new(21);
    for (i, tile_rows) in FAMILIES.into_iter().enumerate() {
        let half = tile_rows / 2;
        let sizes = [
            (1, tile_rows - 1),
            (127, tile_rows),
            (129, tile_rows + 1),
            (16, 1),
            (40, half),
            (130, half + 1),
        ];
        for (width, rows) in sizes {
            let mut layer = Layer::new(Dtype::Bf16, 24);
            layer.add(&mut random, width, [Form::LowRank(9), Form::Dense, Form::LowRank(3)]);
            let tokens = rows as usize;
            let routes = Routes::random(&mut random, tokens, 1, &[0]);
            let x = random.values(layer.dtype, tokens * layer.hidden, 1.0);
            let plan = Plan { tile_rows, large_sort: false };
            if check(&layer, &x, &routes, plan, MODES[i % 4]).is_none() {
                return;
            }
        }
    }
}

#[test]
fn ranks_and_hidden_sizes() {
    let mut random = Random::new(22);
    for hidden in [8, 100, 2880] {
        let mut layer = Layer::new(Dtype::F16, hidden);
        for rank in [1, 8, 15, 16, 17, 40, 63, 64, 65, 520] {
            layer.add(&mut random, 24, [Form::LowRank(rank), Form::Rows(rank, 2), Form::LowRank(rank)]);
        }
        layer.add(&mut random, 24, [Form::LowRank(0); 3]);
        let routes = Routes::random(&mut random, 6, 5, &live(&layer));
        let x = random.values(layer.dtype, 6 * hidden, 1.0);
        for tile_rows in [8, 128] {
            if check(&layer, &x, &routes, Plan { tile_rows, large_sort: false }, Mode::Late).is_none() {
                return;
            }
        }
    }
}

/// Experts without tokens at the front, in the middle, at the end; all tokens at one expert; no tokens at all.
#[test]
fn experts_without_tokens() {
    let mut random = Random::new(23);
    let layer = mixed_layer(&mut random, Dtype::Bf16, 40, 24);
    for (live, tokens) in [(vec![3], 19), (vec![0], 5), (vec![11], 9), (vec![1, 6], 20), (vec![0, 11], 0)] {
        let routes = Routes::random(&mut random, tokens, live.len().min(2), &live);
        let x = random.values(layer.dtype, tokens * layer.hidden, 1.0);
        for tile_rows in [8, 64, 128] {
            let plan = Plan { tile_rows, large_sort: tokens == 19 };
            if check(&layer, &x, &routes, plan, Mode::Random(6)).is_none() {
                return;
            }
        }
    }
}

/// Ids that stand for nothing, the same id twice, an alias beside its original.
#[test]
fn ids_that_are_missing_or_twice() {
    let mut random = Random::new(24);
    let layer = mixed_layer(&mut random, Dtype::Bf16, 40, 24);
    let mut routes = Routes::random(&mut random, 12, 4, &live(&layer));
    let rows: [[i32; 4]; 8] = [
        [-1, -1, -1, -1],
        [3, 3, 3, 3],
        [1, 7, 1, 7],
        [7, -1, 1, 0],
        [2, 2, 0, 2],
        [6, 0, 6, 9],
        [10, 10, 0, -7],
        [12, i32::MAX, i32::MIN, 4],
    ];
    routes.ids[..32].copy_from_slice(rows.as_flattened());
    let x = random.values(layer.dtype, 12 * layer.hidden, 1.0);
    for (tile_rows, large_sort) in [(8, false), (32, true)] {
        check(&layer, &x, &routes, Plan { tile_rows, large_sort }, Mode::Random(7));
    }
}

/// 1024 experts, most of them without tokens; and as many slots as there may be.
#[test]
fn many_experts_and_slots() {
    let mut random = Random::new(25);
    let mut layer = Layer::new(Dtype::Bf16, 8);
    for _ in 0..1024 {
        layer.add(&mut random, 8, [Form::Dense, Form::LowRank(2), Form::Dense]);
    }
    let routes = Routes::random(&mut random, 9, 33, &live(&layer));
    let x = random.values(layer.dtype, 9 * 8, 1.0);
    for large_sort in [false, true] {
        check(&layer, &x, &routes, Plan { tile_rows: 8, large_sort }, Mode::Early);
    }
}

/// The sorts around the number of slots where the host goes from one to the other, and over several chunks.
#[test]
fn sorts_of_every_size() {
    let mut random = Random::new(26);
    let mut layer = Layer::new(Dtype::Bf16, 8);
    for e in 0..7 {
        layer.add(&mut random, 8, [Form::Dense; 3]);
        if e == 3 {
            layer.experts.push(Expert::Constant(vec![1.0; 8]));
        }
    }
    let Some(gpu) = Emulator::new(Mode::Random(8)) else { return };
    let prepared = Prepared::new(gpu, &layer);
    for (slots, large) in
        [(1, false), (31, false), (2047, false), (2048, false), (2048, true), (2049, true), (20_000, true)]
    {
        // Chunks begin and end within a token.
        let per_token = if slots % 5 == 0 { 5 } else { 1 };
        let routes = Routes::random(&mut random, slots / per_token, per_token, &live(&layer));
        let found = prepared.sort(&routes, SMALL.tile_rows, large, true).unwrap();
        let expected = oracle::sort(&layer, &routes, true);
        let pairs = expected.pair_token.len();
        assert_eq!(found.offsets.read::<i32>(), expected.offsets, "{slots}");
        assert_eq!(found.pair_token.read::<i32>()[..pairs], expected.pair_token, "{slots}");
        assert_eq!(found.slot_source.read::<i32>(), expected.slot_source, "{slots}");
        // Tiles of every stage, in the order in which they are dealt out.
        let tiles: Vec<i32> = found.tile_first.read();
        for stage in tiles.chunks_exact(layer.experts.len() + 1) {
            assert!(stage.is_sorted() && stage[0] == 0, "{stage:?}");
        }
    }
}

/// Bit for bit the same on any number of blocks, in any order of threads, and for a token on its own.
#[test]
fn results_do_not_depend_on_the_launch() {
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    let mut random = Random::new(27);
    let layer = mixed_layer(&mut random, Dtype::Bf16, 40, 24);
    let routes = Routes::random(&mut random, 14, 4, &live(&layer));
    let x = random.values(layer.dtype, 14 * layer.hidden, 1.0);
    for tile_rows in FAMILIES {
        let plan = Plan { tile_rows, large_sort: false };
        let run = |gpu, x: &[f32], routes| Prepared::new(gpu, &layer).run(x, routes, plan).unwrap().out;
        let expected = run(gpu, &x, &routes);
        for (multiprocessors, mode) in [(1, Mode::Early), (2, Mode::Random(9)), (132, Mode::Late)] {
            assert_eq!(
                run(Emulator { mode, multiprocessors, ..gpu }, &x, &routes),
                expected,
                "{plan:?} {mode:?}"
            );
        }
        let token = 5;
        let alone = Routes {
            slots: 4,
            ids: routes.ids[4 * token..4 * token + 4].to_vec(),
            weights: routes.weights[4 * token..4 * token + 4].to_vec(),
        };
        let out = run(gpu, &x[token * layer.hidden..(token + 1) * layer.hidden], &alone);
        assert_eq!(out, expected[token * layer.hidden..(token + 1) * layer.hidden], "{plan:?}");
    }
}

/// NaN and infinity stay in their token's row.
#[test]
fn nan_stays_where_it_is() {
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    let mut random = Random::new(28);
    let layer = mixed_layer(&mut random, Dtype::F16, 40, 24);
    let routes = Routes::random(&mut random, 9, 3, &[0, 1, 4, 6]);
    let mut x = random.values(layer.dtype, 9 * layer.hidden, 1.0);
    x[3 * layer.hidden + 7] = f32::NAN;
    // Beyond f16 after one product: as infinite as the model itself would be.
    x[6 * layer.hidden..7 * layer.hidden].fill(6.0e4);
    for tile_rows in FAMILIES {
        let run = Prepared::new(gpu, &layer).run(&x, &routes, Plan { tile_rows, large_sort: false }).unwrap();
        let expected = oracle::forward(&layer, &x, &routes);
        for (token, (found, expected)) in run.out.chunks_exact(40).zip(expected.chunks_exact(40)).enumerate()
        {
            match token {
                3 => assert!(found.iter().any(|v| v.is_nan())),
                6 => assert!(found.iter().any(|v| !v.is_finite())),
                _ => assert!(
                    found.iter().zip(expected).all(|(&f, e)| e.holds(f)),
                    "token {token}, {tile_rows}"
                ),
            }
        }
    }
}

/// Pairs, tokens and weight rows whose element offsets are beyond 32 bits. Addresses are made so that only what must be
/// touched is there.
#[test]
fn offsets_beyond_32_bits() {
    for tile_rows in FAMILIES {
        let Some(gpu) = Emulator::new(Mode::Late) else { return };
        try_far_offsets(gpu, tile_rows).unwrap();
    }
}

/// One tile of each stage of a family, with such offsets; says what is wrong.
pub(crate) fn try_far_offsets(gpu: Emulator, tile_rows: u32) -> Result<(), String> {
    let mut random = Random::new(29);
    let (first, rows, hidden, rank, ld) = (300_000usize, 5usize, 16usize, 8usize, 8192usize);
    let far = |buffer: &crate::emulator::Buffer, bytes: usize| {
        buffer.address().wrapping_sub((first * bytes) as u64)
    };
    // Rows `first` and up of a matrix whose rows are `ld` elements apart.
    let matrix = |values: &[f32], cols: usize| {
        let mut bytes = vec![0xFF; rows * ld * 2];
        for (row, values) in values.chunks_exact(cols).enumerate() {
            bytes[row * ld * 2..][..cols * 2].copy_from_slice(&Dtype::Bf16.encode(values));
        }
        gpu.upload(&bytes)
    };
    let x = random.values(Dtype::Bf16, rows * hidden, 1.0);
    let z = random.values(Dtype::Bf16, rows * rank, 1.0);
    let u = random.values(Dtype::Bf16, hidden * rank, 1.0);
    let weight_ld = 1 << 28;
    let span = (hidden - 1) * weight_ld + rank;
    let mut weight = memmap2::MmapOptions::new().len(span * 2).no_reserve_swap().map_anon().unwrap();
    for (row, values) in u.chunks_exact(rank).enumerate() {
        weight[row * weight_ld * 2..][..rank * 2].copy_from_slice(&Dtype::Bf16.encode(values));
    }
    let mut expert = MoeExpert { form: FORM_MLP, width: hidden as i32, ..MoeExpert::zeroed() };
    for map in [&mut expert.gate, &mut expert.up, &mut expert.down] {
        map.weight = weight.as_ptr() as u64;
        (map.ld, map.k, map.flags) = (weight_ld as i32, rank as i32, LOW_RANK);
    }
    (expert.v_in, expert.v_in_ld, expert.v_in_rows) =
        (weight.as_ptr() as u64, weight_ld as i32, hidden as i32);
    let (x_buffer, z_buffer) = (matrix(&x, hidden), matrix(&z, rank));
    let tokens: Vec<i32> = (0..rows).map(|i| (first + i) as i32).collect();
    let pair_token = gpu.upload(&tokens);
    let small =
        (gpu.upload(&[expert]), gpu.upload(&[first as i32, (first + rows) as i32]), gpu.upload(&[0i32, 1]));
    let cols = if tile_rows == 8 { 16 } else { 128 };
    assert!(hidden <= cols && rows <= tile_rows as usize, "one tile");
    for (name, hidden_stage) in [("project_in", false), ("hidden", true), ("output", false)] {
        let out = gpu.room(rows * ld * 2);
        let params = MoeGemmParams {
            experts: small.0.address(),
            offsets: small.1.address(),
            order: small.2.address(),
            tile_first: small.2.address(),
            pair_token: far(&pair_token, 4),
            input: far(&x_buffer, ld * 2),
            z: far(&z_buffer, ld * 2),
            out: far(&out, ld * 2),
            experts_count: 1,
            hidden: if name == "project_in" { rank } else { hidden } as i32,
            ld_input: ld as i32,
            ld_z: ld as i32,
            ld_out: ld as i32,
            ..MoeGemmParams::zeroed()
        };
        let kernel = format!("moe_{name}_t{tile_rows}_bf16");
        let block = [gemm_threads(tile_rows, hidden_stage), 1, 1];
        gpu.run(&kernel, [2, 1, 1], block, GEMM_SHARED, bytes_of(&params))?;
        let found = Dtype::Bf16.decode(out.contents());
        for row in 0..rows {
            let input =
                if name == "project_in" { &x[row * hidden..][..rank] } else { &z[row * rank..][..rank] };
            for col in 0..hidden {
                let products = input.iter().zip(&u[col * rank..]).map(|(&a, &b)| f64::from(a) * f64::from(b));
                let sum: f64 = products.sum();
                let expected = if hidden_stage { sum * sum / (1.0 + (-sum).exp()) } else { sum };
                let found = f64::from(found[row * ld + col]);
                let near = (found - expected).abs() <= 0.01 * (1.0 + expected.abs());
                if !near {
                    return Err(format!("{kernel}: {found}, expected {expected}"));
                }
            }
        }
    }
    Ok(())
}

/// Combine adds residual and base, also where a row is not whole vectors.
#[test]
fn combine_adds_what_it_is_given() {
    let mut random = Random::new(30);
    for (dtype, mode) in [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().zip(MODES) {
        let Some(gpu) = Emulator::new(mode) else { return };
        let (tokens, slots, hidden, pairs) = (4usize, 3usize, 37usize, 7usize);
        let ldy = 40;
        let y = random.values(dtype, pairs * ldy, 1.0);
        let base = random.values(dtype, tokens * ldy, 1.0);
        let residual = random.values(dtype, tokens * ldy, 1.0);
        let constant = random.values(Dtype::F32, hidden, 1.0);
        let expert = gpu.upload(&constant);
        let table = gpu.upload(&[MoeExpert { constant: expert.address(), ..MoeExpert::zeroed() }]);
        let sources = [3, -1, 0, 6, -2, 1, -1, -1, -1, 2, 4, -2];
        let weights = random.values(Dtype::F32, tokens * slots, 1.0);
        let kept = [&y, &base, &residual].map(|values| gpu.upload(&dtype.encode(values)));
        let floats = (gpu.upload(&sources), gpu.upload(&weights));
        let out = gpu.room(tokens * ldy * dtype.bytes());
        let params = MoeCombineParams {
            experts: table.address(),
            slot_source: floats.0.address(),
            slot_weight: floats.1.address(),
            y: kept[0].address(),
            base: kept[1].address(),
            residual: kept[2].address(),
            out: out.address(),
            tokens: tokens as i32,
            slots: slots as i32,
            hidden: hidden as i32,
            ldy: ldy as i32,
            ld_residual: ldy as i32,
            ld_out: ldy as i32,
        };
        let kernel = format!("moe_combine_{}", dtype.suffix());
        let grid = [tokens as u32, hidden.div_ceil(COMBINE_COLS) as u32, 1];
        gpu.run(&kernel, grid, [ROW_THREADS, 1, 1], 0, bytes_of(&params)).unwrap();
        for (i, found) in dtype.decode(out.contents()).into_iter().enumerate() {
            let (token, col) = (i / ldy, i % ldy);
            if col >= hidden {
                assert!(found.is_nan(), "{kernel} writes beyond row {token}");
                continue;
            }
            let mut sum = f64::from(base[i]) + f64::from(residual[i]);
            for slot in token * slots..(token + 1) * slots {
                let value = match sources[slot] {
                    -1 => continue,
                    -2 => constant[col],
                    pair => y[pair as usize * ldy + col],
                };
                sum += f64::from(weights[slot]) * f64::from(value);
            }
            let near = (f64::from(found) - sum).abs() <= dtype.unit() * sum.abs() + 1e-5;
            assert!(near, "{kernel} at {token}, {col}: {found}, expected {sum}");
        }
    }
}

/// Where weights multiply inputs every slot is a pair of its own, and the inputs are scaled before the GEMMs.
#[test]
fn weights_that_multiply_inputs() {
    let mut random = Random::new(31);
    for (dtype, mode) in [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().zip(MODES) {
        let Some(gpu) = Emulator::new(mode) else { return };
        let mut layer = Layer::new(dtype, 24);
        layer.add(&mut random, 8, [Form::Dense; 3]);
        layer.add(&mut random, 8, [Form::Dense; 3]);
        layer.experts.push(Expert::Alias(0));
        let mut routes = Routes::random(&mut random, 6, 2, &[0, 1, 2]);
        routes.ids[..4].copy_from_slice(&[0, 2, -1, 1]);
        let prepared = Prepared::new(gpu, &layer);
        let found = prepared.sort(&routes, 8, false, false).unwrap();
        let expected = oracle::sort(&layer, &routes, false);
        assert_eq!(found.slot_source.read::<i32>(), expected.slot_source);
        assert_eq!(found.slot_weight.read::<f32>(), expected.slot_weight);
        let x = random.values(dtype, 6 * 24, 1.0);
        let x_buffer = gpu.upload(&dtype.encode(&x));
        let out = gpu.room(12 * 24 * dtype.bytes());
        let params = MoeScaleInputParams {
            x: x_buffer.address(),
            offsets: found.offsets.address(),
            pair_token: found.pair_token.address(),
            pair_weight: found.pair_weight.address(),
            out: out.address(),
            experts: 3,
            hidden: 20,
            ldx: 24,
            ld_out: 24,
        };
        let kernel = format!("moe_scale_input_{}", dtype.suffix());
        gpu.run(&kernel, [12, 1, 1], [ROW_THREADS, 1, 1], 0, bytes_of(&params)).unwrap();
        let scaled = dtype.decode(out.contents());
        for (pair, (&token, &weight)) in expected.pair_token.iter().zip(&expected.pair_weight).enumerate() {
            for col in 0..20 {
                assert_eq!(scaled[pair * 24 + col], dtype.round(x[token as usize * 24 + col] * weight));
            }
        }
    }
}

/// A launch that no GPU would run is an error that names the kernel.
#[test]
fn launches_are_checked() {
    let Some(gpu) = Emulator::new(Mode::Late) else { return };
    let params = MoeSortParams::zeroed();
    let refuse = |name: &str, grid: u32, block: u32, shared: u32, bytes: &[u8]| {
        gpu.run(name, [grid, 1, 1], [block, 1, 1], shared, bytes).unwrap_err()
    };
    let bytes = bytes_of(&params);
    assert_eq!(refuse("moe_sort", 1, 256, 0, bytes), "moe_sort: no such kernel");
    assert_eq!(refuse("moe_sort_small", 0, 256, 0, bytes), "moe_sort_small: grid size");
    assert_eq!(refuse("moe_sort_small", 1, 2048, 0, bytes), "moe_sort_small: block size");
    assert_eq!(refuse("moe_sort_small", 1, 256, 1 << 20, bytes), "moe_sort_small: too much shared memory");
    assert_eq!(
        refuse("moe_sort_small", 1, 256, 0, &bytes[8..]),
        "moe_sort_small: parameters have another size"
    );
    let error =
        gpu.run("moe_sort_small", [1, 1, 1], [SORT_THREADS, 1, 1], sort_shared(0), bytes).unwrap_err();
    assert!(error.contains("access to address"), "{error}");
}
