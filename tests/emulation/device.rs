//! A layer on the emulated GPU: its descriptors, its workspace, and the launches of `cuda/params.cuh`.

use bytemuck::{Zeroable, bytes_of};

use crate::definition::{Activation, Expert, Layer, Map, Product, Routes, Weight};
use crate::emulator::{Buffer, Dtype, Emulator};
use crate::params::{
    ABSENT, BASE, COMBINE_COLS, FORM_CONSTANT, FORM_MLP, GEMM_SHARED, HIDDEN, LOW_RANK, MoeBaseHiddenParams,
    MoeBasePlanParams, MoeCombineParams, MoeExpert, MoeGemmParams, MoeMatrix, MoeSortParams, OUTPUT,
    PROJECT_HIDDEN, PROJECT_IN, ROW_THREADS, SORT_CHUNK, SORT_THREADS, STAGES, gemm_threads, gemm_tile_cols,
    sort_shared,
};

/// A prepared layer.
pub(crate) struct Prepared<'a> {
    emulator: Emulator,
    layer: &'a Layer,
    experts: Buffer,
    base: Option<Buffer>,
    canonical: Buffer,
    order: Buffer,
    /// Columns of z and h.
    ld_z: usize,
    ld_h: usize,
    base_width: usize,
    /// Weights live as long as the descriptors.
    _weights: Vec<Buffer>,
}

/// How a layer is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Tokens of a tile: the family.
    pub(crate) tile_rows: u32,
    /// Whether the sort is that of many slots.
    pub(crate) large_sort: bool,
}

/// The slots of a batch, sorted by expert.
pub(crate) struct SortedSlots {
    pub(crate) ids: Buffer,
    pub(crate) offsets: Buffer,
    pub(crate) pair_token: Buffer,
    pub(crate) pair_weight: Buffer,
    pub(crate) slot_source: Buffer,
    pub(crate) slot_weight: Buffer,
    pub(crate) tile_first: Buffer,
}

/// What a run leaves behind.
pub(crate) struct Run {
    pub(crate) out: Vec<f32>,
    pub(crate) offsets: Vec<i32>,
    pub(crate) pair_token: Vec<i32>,
    pub(crate) pair_weight: Vec<f32>,
    pub(crate) slot_source: Vec<i32>,
    pub(crate) slot_weight: Vec<f32>,
    /// Raw bytes of z, h and y.
    pub(crate) z: Vec<u8>,
    pub(crate) h: Vec<u8>,
    pub(crate) y: Vec<u8>,
}

fn round_up(n: usize) -> usize {
    n.div_ceil(8) * 8
}

/// Puts rows into memory with this leading dimension; what lies between them is NaN.
pub(crate) fn pitched(dtype: Dtype, rows: usize, cols: usize, ld: usize, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0xFF; rows * ld * dtype.bytes()];
    for (row, values) in values.chunks_exact(cols.max(1)).enumerate().take(rows) {
        let bytes = dtype.encode(values);
        let start = row * ld * dtype.bytes();
        out[start..start + bytes.len()].copy_from_slice(&bytes);
    }
    // Nothing may be read behind the last row's last column.
    let unused = (ld - cols) * dtype.bytes();
    out.truncate(out.len().saturating_sub(unused));
    out
}

struct Uploader<'a> {
    emulator: &'a Emulator,
    dtype: Dtype,
    without_up: bool,
    kept: Vec<Buffer>,
}

impl Uploader<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> u64 {
        self.kept.push(self.emulator.upload(bytes));
        self.kept[self.kept.len() - 1].address()
    }

    fn weight(&mut self, weight: &Weight) -> (u64, i32) {
        let ld = round_up(weight.cols);
        (self.bytes(&pitched(self.dtype, weight.rows, weight.cols, ld, &weight.values)), ld as i32)
    }

    /// One map of `out` rows, whose projection begins at row `first` of the stack `v`; the stack grows.
    fn map(&mut self, map: &Map, out: usize, v: &mut Vec<Vec<f32>>) -> MoeMatrix {
        let mut m = MoeMatrix::zeroed();
        while !v.len().is_multiple_of(8) {
            v.push(Vec::new());
        }
        m.z_first = v.len() as i32;
        match &map.product {
            Product::Dense(w) => {
                (m.weight, m.ld) = self.weight(w);
                m.k = w.cols as i32;
            }
            Product::LowRank(u, factor) => {
                (m.weight, m.ld) = self.weight(u);
                m.k = u.cols as i32;
                m.flags |= LOW_RANK;
                v.extend((0..factor.rows).map(|i| factor.row(i).to_vec()));
            }
        }
        if let Some((rows, s)) = &map.rows {
            let mut slots = vec![-1i32; out];
            for (i, &row) in rows.iter().enumerate() {
                slots[row] = v.len() as i32;
                v.push(s.row(i).to_vec());
            }
            m.row_slot = self.bytes(bytemuck::cast_slice(&slots));
        }
        if map.base {
            m.flags |= BASE;
        }
        if let Some(bias) = &map.bias {
            m.bias = self.bytes(bytemuck::cast_slice(bias));
        }
        m
    }

    /// A stack of projections [rows, cols]; rows that align are NaN.
    fn stack(&mut self, v: &[Vec<f32>], cols: usize) -> (u64, i32, i32) {
        let filled = v.iter().flat_map(|row| if row.is_empty() { vec![f32::NAN; cols] } else { row.clone() });
        let weight = Weight { rows: v.len(), cols, values: filled.collect() };
        let (address, ld) = self.weight(&weight);
        (address, weight.rows as i32, ld)
    }

    fn mlp(&mut self, width: usize, hidden: usize, maps: &[Map; 3]) -> MoeExpert {
        let mut e = MoeExpert::zeroed();
        e.form = FORM_MLP;
        e.width = width as i32;
        let mut v = Vec::new();
        e.gate = self.map(&maps[0], width, &mut v);
        if self.without_up {
            e.up.flags = ABSENT;
        } else {
            e.up = self.map(&maps[1], width, &mut v);
        }
        (e.v_in, e.v_in_rows, e.v_in_ld) = self.stack(&v, hidden);
        v.clear();
        e.down = self.map(&maps[2], hidden, &mut v);
        (e.v_down, e.v_down_rows, e.v_down_ld) = self.stack(&v, width);
        e
    }
}

impl<'a> Prepared<'a> {
    pub(crate) fn new(emulator: Emulator, layer: &'a Layer) -> Self {
        let Layer { dtype, without_up, .. } = *layer;
        let mut up = Uploader { emulator: &emulator, dtype, without_up, kept: Vec::new() };
        let mut table = Vec::new();
        for expert in &layer.experts {
            table.push(match expert {
                Expert::Mlp { width, maps } => up.mlp(*width, layer.hidden, maps),
                Expert::Constant(vector) => MoeExpert {
                    form: FORM_CONSTANT,
                    constant: up.bytes(bytemuck::cast_slice(vector)),
                    ..MoeExpert::zeroed()
                },
                Expert::Alias(_) | Expert::None => MoeExpert::zeroed(),
            });
        }
        let mut base_width = 0;
        let base = layer.base.as_ref().map(|[gate, up_base, down]| {
            base_width = down.cols;
            let rows = |w: &Weight| (0..w.rows).map(|i| w.row(i).to_vec()).collect::<Vec<_>>();
            let mut v = rows(gate);
            v.resize(v.len().div_ceil(8) * 8, Vec::new());
            v.extend(rows(up_base));
            let mut e = MoeExpert { form: FORM_MLP, width: base_width as i32, ..MoeExpert::zeroed() };
            (e.v_in, e.v_in_rows, e.v_in_ld) = up.stack(&v, layer.hidden);
            (e.down.weight, e.down.ld) = up.weight(down);
            e.down.k = base_width as i32;
            emulator.upload(&[e])
        });
        let most = |f: fn(&MoeExpert) -> i32| table.iter().map(f).max().unwrap_or(0) as usize;
        // Costly experts first is the host's business; any order has to do.
        let order: Vec<i32> = (0..table.len() as i32).rev().collect();
        let canonical: Vec<i32> = (0..table.len()).map(|e| layer.canonical(e) as i32).collect();
        Prepared {
            ld_z: round_up(most(|e| e.v_in_rows.max(e.v_down_rows))),
            ld_h: round_up(most(|e| e.width).max(base_width)),
            base_width,
            experts: emulator.upload(&table),
            canonical: emulator.upload(&canonical),
            order: emulator.upload(&order),
            base,
            _weights: up.kept,
            emulator,
            layer,
        }
    }

    fn gemm(&self, stage: usize, plan: Plan, params: &MoeGemmParams) -> Result<(), String> {
        let name = ["project_in", "hidden", "project_hidden", "output"][stage];
        let name = format!("moe_{name}_t{}_{}", plan.tile_rows, self.layer.dtype.suffix());
        let threads = gemm_threads(plan.tile_rows, stage == HIDDEN);
        let grid = [self.emulator.multiprocessors, 1, 1];
        self.emulator.run(&name, grid, [threads, 1, 1], GEMM_SHARED, bytes_of(params))
    }

    /// Sorts the slots by expert.
    pub(crate) fn sort(
        &self,
        routes: &Routes,
        tile_rows: u32,
        large: bool,
        merge: bool,
    ) -> Result<SortedSlots, String> {
        let gpu = &self.emulator;
        let chunks = routes.ids.len().div_ceil(SORT_CHUNK).max(1);
        let launches: &[(&str, usize)] = if large {
            &[("moe_sort_count", chunks), ("moe_sort_scan", 1), ("moe_sort_scatter", chunks)]
        } else {
            &[("moe_sort_small", 1)]
        };
        let (ids, weights) = (gpu.upload(&routes.ids), gpu.upload(&routes.weights));
        self.sort_by(ids, &weights, routes.slots, tile_rows, merge, |params| {
            launches.iter().try_for_each(|&(name, blocks)| {
                let shared = sort_shared(self.layer.experts.len());
                gpu.run(name, [blocks as u32, 1, 1], [SORT_THREADS, 1, 1], shared, bytes_of(params))
            })
        })
    }

    /// Sorts the slots of these ids by what `launch` does.
    pub(crate) fn sort_by(
        &self,
        ids: Buffer,
        weights: &Buffer,
        slots: usize,
        tile_rows: u32,
        merge: bool,
        launch: impl FnOnce(&MoeSortParams) -> Result<(), String>,
    ) -> Result<SortedSlots, String> {
        let gpu = &self.emulator;
        let (pairs, experts) = (ids.contents().len() / 4, self.layer.experts.len());
        let words = |count: usize| gpu.room(count * 4);
        let sorted = SortedSlots {
            ids,
            offsets: words(experts + 1),
            pair_token: words(pairs),
            pair_weight: words(pairs),
            slot_source: words(pairs),
            slot_weight: words(pairs),
            tile_first: words(STAGES * (experts + 1)),
        };
        let histogram = words(pairs.div_ceil(SORT_CHUNK).max(1) * experts);
        let params = MoeSortParams {
            ids: sorted.ids.address(),
            weights: weights.address(),
            canonical: self.canonical.address(),
            experts: self.experts.address(),
            order: self.order.address(),
            offsets: sorted.offsets.address(),
            pair_token: sorted.pair_token.address(),
            pair_weight: sorted.pair_weight.address(),
            slot_source: sorted.slot_source.address(),
            slot_weight: sorted.slot_weight.address(),
            tile_first: sorted.tile_first.address(),
            histogram: histogram.address(),
            tokens: (pairs / slots) as i32,
            slots: slots as i32,
            experts_count: experts as i32,
            hidden: self.layer.hidden as i32,
            merge_duplicates: i32::from(merge),
            tile_rows: tile_rows as i32,
            tile_cols: [gemm_tile_cols(tile_rows) as i32; STAGES],
        };
        launch(&params)?;
        Ok(sorted)
    }

    /// Runs the layer on `x` [tokens, hidden].
    pub(crate) fn run(&self, x: &[f32], routes: &Routes, plan: Plan) -> Result<Run, String> {
        let (layer, gpu, dtype) = (self.layer, &self.emulator, self.layer.dtype);
        let (tokens, slots, experts) = (routes.tokens(), routes.slots, layer.experts.len());
        let pairs = tokens * slots;
        let hidden = layer.hidden;
        let ldx = round_up(hidden);
        let x = gpu.upload(&pitched(dtype, tokens, hidden, ldx, x));
        let elements = |count: usize| gpu.room(count * dtype.bytes());
        let words = |count: usize| gpu.room(count * 4);
        let tile_cols = gemm_tile_cols(plan.tile_rows) as i32;
        let SortedSlots { ids, offsets, pair_token, pair_weight, slot_source, slot_weight, tile_first } =
            self.sort(routes, plan.tile_rows, plan.large_sort, true)?;

        let z = elements(pairs * self.ld_z);
        let h = elements(pairs * self.ld_h);
        let y = elements(pairs * ldx);
        let ld_base = 2 * round_up(self.base_width);
        let base_in = elements(tokens * ld_base);
        let base_hidden = elements(tokens * self.ld_h);
        let base_out = elements(tokens * ldx);
        let stage = |stage: usize| tile_first.address() + (stage * (experts + 1) * 4) as u64;
        let (activation, limit, slope) = match layer.activation {
            Activation::SwiGlu => (0, 0.0, 0.0),
            Activation::Clamped { limit, slope } => (1, limit, slope),
            Activation::GeluTanh => (2, 0.0, 0.0),
            Activation::Relu => (3, 0.0, 0.0),
            Activation::SquaredRelu => (4, 0.0, 0.0),
        };
        let common = MoeGemmParams {
            experts: self.experts.address(),
            offsets: offsets.address(),
            order: self.order.address(),
            experts_count: experts as i32,
            hidden: hidden as i32,
            z: z.address(),
            ld_z: self.ld_z as i32,
            activation,
            limit,
            slope,
            ..MoeGemmParams::zeroed()
        };
        let base_table =
            self.base.as_ref().map(|table| (table, words(2), words(2 * STAGES), gpu.upload(&[0i32])));
        let base_params = |which: usize| {
            let (table, offsets, tile_first, order) = base_table.as_ref()?;
            Some(MoeGemmParams {
                experts: table.address(),
                offsets: offsets.address(),
                order: order.address(),
                tile_first: tile_first.address() + (which * 8) as u64,
                experts_count: 1,
                hidden: hidden as i32,
                ..MoeGemmParams::zeroed()
            })
        };
        if let Some((table, offsets, tile_first, _)) = &base_table {
            let plan_params = MoeBasePlanParams {
                base: table.address(),
                offsets: offsets.address(),
                tile_first: tile_first.address(),
                tokens: tokens as i32,
                hidden: hidden as i32,
                tile_rows: plan.tile_rows as i32,
                tile_cols: [tile_cols; STAGES],
                reserved: 0,
            };
            gpu.run("moe_base_plan", [1, 1, 1], [32, 1, 1], 0, bytes_of(&plan_params))?;
        }
        if let Some(params) = base_params(PROJECT_IN) {
            let out = base_in.address();
            let params = MoeGemmParams {
                input: x.address(),
                ld_input: ldx as i32,
                out,
                ld_out: ld_base as i32,
                ..params
            };
            self.gemm(PROJECT_IN, plan, &params)?;
        }
        let from_x = MoeGemmParams {
            pair_token: pair_token.address(),
            input: x.address(),
            ld_input: ldx as i32,
            ..common
        };
        let from_h = MoeGemmParams { input: h.address(), ld_input: self.ld_h as i32, ..common };
        let to_z = |p: MoeGemmParams| MoeGemmParams { out: z.address(), ld_out: self.ld_z as i32, ..p };
        let followed = |p: MoeGemmParams, next: usize| MoeGemmParams {
            next_tile_first: stage(next),
            next_stage: next as i32,
            ..p
        };
        let project_in = MoeGemmParams { tile_first: stage(PROJECT_IN), ..to_z(from_x) };
        self.gemm(PROJECT_IN, plan, &followed(project_in, HIDDEN))?;
        let hidden_stage = MoeGemmParams {
            tile_first: stage(HIDDEN),
            base: if self.base.is_some() { base_in.address() } else { 0 },
            ld_base: ld_base as i32,
            base_up: round_up(self.base_width) as i32,
            out: h.address(),
            ld_out: self.ld_h as i32,
            ..from_x
        };
        self.gemm(HIDDEN, plan, &followed(hidden_stage, PROJECT_HIDDEN))?;
        let project_hidden = MoeGemmParams { tile_first: stage(PROJECT_HIDDEN), ..to_z(from_h) };
        self.gemm(PROJECT_HIDDEN, plan, &followed(project_hidden, OUTPUT))?;
        let output =
            MoeGemmParams { tile_first: stage(OUTPUT), out: y.address(), ld_out: ldx as i32, ..from_h };
        self.gemm(OUTPUT, plan, &output)?;
        let row_grid = [tokens as u32, 1, 1];
        if let Some(params) = base_params(OUTPUT).filter(|_| tokens > 0) {
            let sum = MoeBaseHiddenParams {
                experts: self.experts.address(),
                canonical: self.canonical.address(),
                ids: ids.address(),
                slot_source: slot_source.address(),
                slot_weight: slot_weight.address(),
                h: h.address(),
                out: base_hidden.address(),
                tokens: tokens as i32,
                slots: slots as i32,
                width: self.base_width as i32,
                ldh: self.ld_h as i32,
                ld_out: self.ld_h as i32,
                reserved: 0,
            };
            let name = format!("moe_base_hidden_{}", dtype.suffix());
            gpu.run(&name, row_grid, [ROW_THREADS, 1, 1], 0, bytes_of(&sum))?;
            let params = MoeGemmParams {
                input: base_hidden.address(),
                ld_input: self.ld_h as i32,
                out: base_out.address(),
                ld_out: ldx as i32,
                ..params
            };
            self.gemm(OUTPUT, plan, &params)?;
        }
        let out = elements(tokens * ldx);
        let combine = MoeCombineParams {
            experts: self.experts.address(),
            slot_source: slot_source.address(),
            slot_weight: slot_weight.address(),
            y: y.address(),
            base: if self.base.is_some() { base_out.address() } else { 0 },
            out: out.address(),
            tokens: tokens as i32,
            slots: slots as i32,
            hidden: hidden as i32,
            ldy: ldx as i32,
            ld_out: ldx as i32,
            ..MoeCombineParams::zeroed()
        };
        if tokens > 0 {
            let name = format!("moe_combine_{}", dtype.suffix());
            let row_grid = [tokens as u32, hidden.div_ceil(COMBINE_COLS) as u32, 1];
            gpu.run(&name, row_grid, [ROW_THREADS, 1, 1], 0, bytes_of(&combine))?;
        }
        Ok(Run {
            out: dtype.decode(out.contents()).chunks(ldx).flat_map(|row| &row[..hidden]).copied().collect(),
            offsets: offsets.read(),
            pair_token: pair_token.read(),
            pair_weight: pair_weight.read(),
            slot_source: slot_source.read(),
            slot_weight: slot_weight.read(),
            z: z.contents().to_vec(),
            h: h.contents().to_vec(),
            y: y.contents().to_vec(),
        })
    }
}
