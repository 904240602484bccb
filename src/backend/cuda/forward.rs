//! The forward pass of a layer: what is launched, in which order, with which parameters.

use std::cell::Cell;

use bytemuck::{NoUninit, bytes_of};

use super::arena::{ALIGNMENT, Arena};
use super::kernels::{self, F32_FAMILY, FAMILIES};
use super::layer::{BaseTable, MoeLayer, RouterTable, Tables};
use super::params::{
    self, COMBINE_COLS, GEMM_SHARED, HIDDEN, LOGITS_FEW, LOGITS_FEW_ROWS, LOGITS_FEW_SHARED,
    LOGITS_FEW_THREADS, LOGITS_FEW_TOKENS, LOGITS_MANY_ROWS, LOGITS_MANY_SHARED, LOGITS_MANY_THREADS,
    LOGITS_MANY_TOKENS, LOGITS_SHARED, LOGITS_THREADS, LOGITS_TILE, MoeBaseHiddenParams, MoeBasePlanParams,
    MoeCombineParams, MoeGemmParams, MoeLogitsParams, MoeRouteParams, MoeRouteSortParams,
    MoeScaleInputParams, MoeSortParams, OUTPUT, PROJECT_HIDDEN, PROJECT_IN, ROUTE_SORT_TOKENS, ROUTE_THREADS,
    ROUTE_TOKENS, ROW_THREADS, SORT_CHUNK, SORT_THREADS, STAGES, gemm_blocks, gemm_threads, gemm_tile_cols,
};
use super::weights::check_rows;
use super::workspace::{Workspace, chunks, stride};
use super::{Element, Error, Launch, Result};
use crate::architecture::{Activation, WeightTarget};

/// Rows of the layer's element type in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Address of the first row, a multiple of 16.
    pub address: u64,
    /// Elements from one row to the next: the layer's width at least, and a multiple of 16 bytes.
    pub stride: usize,
}

/// How tokens find their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// By the layer's router, from the tokens.
    Router,
    /// By the layer's rule, from logits.
    Logits {
        /// Address of f32 `[tokens, MoeLayer::logits]`, a multiple of 4.
        address: u64,
        /// Elements from one row to the next: [`MoeLayer::logits`] or more.
        stride: usize,
    },
    /// As the caller says.
    Given {
        /// Address of i32 `[tokens, MoeLayer::slots]`, a multiple of 4. A negative id, or one that is not below
        /// [`MoeLayer::experts`], stands for nothing; with a shared expert, that number is its id. The weights of an id
        /// that a token has more than once add up.
        ids: u64,
        /// Address of f32, of the same shape, a multiple of 4.
        weights: u64,
    },
}

/// The arguments of a forward pass; all memory is the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Number of tokens, 0 to 4 067 203.
    pub tokens: usize,
    /// The tokens, `[tokens, hidden]`, of the layer's element type as all [`Rows`] here.
    pub x: Rows,
    /// Receives Σ weight · expert(x), `[tokens, hidden]`. May be `residual`, not `x`.
    pub out: Rows,
    /// Their experts.
    pub routing: Routing,
    /// Added to the result, `[tokens, hidden]`: the residual stream, or a shared expert that was run elsewhere.
    pub residual: Option<Rows>,
    /// Address of the workspace, a multiple of 256 and not null. Its content before and after means nothing.
    pub workspace: u64,
    /// Its length: [`MoeLayer::workspace_bytes`] of `tokens` or more.
    pub workspace_bytes: usize,
}

impl<B> MoeLayer<B> {
    /// Enqueues the forward pass, and nothing else: no allocation, no waiting, no copy to the host, so that it can be
    /// captured into a CUDA graph and replayed with other tokens and other routing in the same memory. What is launched
    /// depends on the layer, the number of tokens, the kind of routing and the device, not on what is in memory; results
    /// depend on the arguments alone: repeated runs are equal bit for bit.
    ///
    /// Few tokens take fewer kernels and smaller tiles. Logits are made by blocks of 8 tokens and 2 rows up to 256 tokens, of
    /// 32 and 64 beyond, or 64 and 64 in f32 and for router weights that are beyond the element type. Up to 8 tokens, routing
    /// and sorting are one kernel; up to 2048 slots, sorting is one kernel, beyond three.
    ///
    /// The GEMM kernels come in families. With rows = ⌈tokens · slots / experts⌉, the expected tokens of an expert: tiles of 8
    /// tokens up to 8 tokens; else the smallest tile of 16, 32, 64 that holds 2 · rows; else tiles of 128. In f32 there is
    /// one family. Families differ in the order of their sums, so that the last bits of a token may differ between
    /// batches of very different sizes.
    ///
    /// # Errors
    /// Names the argument that the kernels cannot take, before anything is launched; a launch that the device refuses.
    ///
    /// # Safety
    /// All addresses must be valid on the device of `launch`, for the shapes above, until its stream has passed the last
    /// kernel. The workspace, and `out`, must not be used by anything else meanwhile.
    pub unsafe fn forward(&self, launch: &(impl Launch + ?Sized), args: &Forward) -> Result<()> {
        self.tables.check(args)?;
        if args.tokens == 0 {
            return Ok(());
        }
        let workspace = self.tables.workspace(args.tokens, &mut Arena::at(args.workspace))?;
        let pass = Pass { tables: &self.tables, args, workspace, launch, follows: Cell::new(false) };
        // SAFETY: the arguments are checked, the rest is the caller's promise.
        unsafe { pass.run() }
    }
}

impl Tables {
    fn check(&self, args: &Forward) -> Result<()> {
        let Forward { tokens, x, out, residual, routing, .. } = *args;
        let mut needed = Arena::counting();
        self.workspace(tokens, &mut needed)?;
        let needed = needed.used()?;
        if args.workspace_bytes < needed {
            let expected = format!("{needed} for {tokens} tokens");
            return Err(Error::argument("workspace_bytes", args.workspace_bytes.to_string(), expected));
        }
        if tokens == 0 {
            return Ok(());
        }
        if args.workspace == 0 || !args.workspace.is_multiple_of(ALIGNMENT) {
            let expected = format!("a multiple of {ALIGNMENT}, not null");
            return Err(Error::argument("workspace", format!("address {:#x}", args.workspace), expected));
        }
        let rows = |what, rows: Rows| check_rows(what, rows.address, rows.stride, self.hidden, self.element);
        rows("x", x)?;
        rows("out", out)?;
        residual.map_or(Ok(()), |residual| rows("residual", residual))?;
        if x.address == out.address {
            return Err(Error::argument("out", "x", "memory of its own"));
        }
        let words = |what: &str, address: u64| {
            if address == 0 || !address.is_multiple_of(4) {
                let found = format!("address {address:#x}");
                return Err(Error::argument(what, found, "a multiple of 4, not null"));
            }
            Ok(())
        };
        match (routing, self.router) {
            (Routing::Given { ids, weights }, _) => {
                words("ids", ids)?;
                words("weights", weights)
            }
            (_, None) => Err(Error::argument(
                "routing",
                format!("{routing:?}"),
                "ids and weights: no router in this layer",
            )),
            (Routing::Router, Some(RouterTable { has_weight: false, .. })) => {
                Err(Error::argument("routing", "Router", "logits: this layer's router has no weight"))
            }
            (Routing::Router, Some(_)) => Ok(()),
            (Routing::Logits { address, stride }, Some(router)) => {
                if stride < router.rows || i32::try_from(stride).is_err() {
                    let expected = format!("{} or more", router.rows);
                    return Err(Error::argument("logits", format!("stride {stride}"), expected));
                }
                words("logits", address)
            }
        }
    }
}

/// The tile of the family for `rows` expected rows of an expert.
fn family(element: Element, tokens: usize, rows: usize) -> u32 {
    if element == Element::F32 {
        return F32_FAMILY;
    }
    let [smallest, middle @ .., largest] = FAMILIES;
    if tokens <= smallest as usize {
        return smallest;
    }
    middle.into_iter().find(|&tile| tile as usize >= 2 * rows).unwrap_or(largest)
}

/// One forward pass.
struct Pass<'a, L: ?Sized> {
    tables: &'a Tables,
    args: &'a Forward,
    workspace: Workspace,
    launch: &'a L,
    /// Whether a kernel was enqueued before.
    follows: Cell<bool>,
}

/// A table of experts with its pairs, for the GEMM stages.
#[derive(Clone, Copy)]
struct Work {
    experts: u64,
    count: usize,
    order: u64,
    offsets: u64,
    tile_first: u64,
    tile_rows: u32,
}

impl<L: Launch + ?Sized> Pass<'_, L> {
    unsafe fn run(&self) -> Result<()> {
        let Pass { tables, args, workspace, .. } = *self;
        let tokens = args.tokens;
        // SAFETY: of this and every launch below, the parameters are made from checked arguments and the layer's own
        // tables; that the memory behind the arguments is valid is the promise of the caller of `forward`.
        unsafe {
            let rows = (tokens * tables.slots).div_ceil(tables.experts);
            let tile_rows = family(tables.element, tokens, rows);
            let ids = self.route_and_sort(tile_rows)?;
            let (input, pair_token) = self.input()?;
            let base = tables.base.map(|base| self.plan_base(base)).transpose()?;
            let work = Work {
                experts: tables.descriptors,
                count: tables.rows,
                order: tables.order,
                offsets: workspace.offsets,
                tile_first: workspace.tile_first,
                tile_rows,
            };
            let stages = self.stages();
            let base_in = base.filter(|_| tables.extent.base_in);
            if let Some((base, table)) = base_in {
                let to = (workspace.base_in, stride(table.columns));
                self.gemm(PROJECT_IN, None, base, MoeGemmParams { input: args.x.address, ..stages }, to)?;
            }
            if tables.extent.v_in_rows > 0 {
                let params = MoeGemmParams { pair_token, input, ..stages };
                let to = (workspace.z, stride(tables.extent.z()));
                self.gemm(PROJECT_IN, Some(HIDDEN), work, params, to)?;
            }
            let params = MoeGemmParams {
                pair_token,
                input,
                z: workspace.z,
                base: if base_in.is_some() { workspace.base_in } else { 0 },
                ld_base: base_in.map_or(0, |(_, table)| stride(table.columns) as i32),
                base_up: base_in.map_or(0, |(_, table)| table.up_first as i32),
                ..stages
            };
            let ldh = stride(tables.extent.width);
            let next = if tables.extent.v_down_rows > 0 { PROJECT_HIDDEN } else { OUTPUT };
            self.gemm(HIDDEN, Some(next), work, params, (workspace.h, ldh))?;
            let params = MoeGemmParams { input: workspace.h, ld_input: ldh as i32, ..stages };
            if tables.extent.v_down_rows > 0 {
                let to = (workspace.z, stride(tables.extent.z()));
                self.gemm(PROJECT_HIDDEN, Some(OUTPUT), work, params, to)?;
            }
            let ldy = stride(tables.hidden);
            self.gemm(OUTPUT, None, work, MoeGemmParams { z: workspace.z, ..params }, (workspace.y, ldy))?;
            let base_out = base.filter(|_| tables.extent.base_down);
            if let Some((base, _)) = base_out {
                self.base_hidden(ids)?;
                let params = MoeGemmParams { input: workspace.base_hidden, ..params };
                self.gemm(OUTPUT, None, base, params, (workspace.base_out, ldy))?;
            }
            self.combine(base_out.is_some())
        }
    }

    unsafe fn enqueue(
        &self,
        kernel: &'static str,
        grid: [usize; 2],
        threads: u32,
        shared: u32,
        params: &impl NoUninit,
    ) -> Result<()> {
        let [x, y] = grid.map(|blocks| blocks as u32);
        let follows = self.follows.replace(true);
        // SAFETY: the caller's promise.
        unsafe { self.launch.launch(kernel, [x, y, 1], [threads, 1, 1], shared, bytes_of(params), follows) }
    }

    /// The pairs of every token by expert. Returns the address of the ids.
    unsafe fn route_and_sort(&self, tile_rows: u32) -> Result<u64> {
        let Pass { tables, args, workspace, .. } = *self;
        let (ids, weights) = match args.routing {
            Routing::Given { ids, weights } => (ids, weights),
            Routing::Router | Routing::Logits { .. } => (workspace.ids, workspace.weights),
        };
        let sort = self.sort_params(ids, weights, tile_rows);
        // SAFETY: as in `run`.
        unsafe {
            match self.logits()? {
                Some(route) if args.tokens <= ROUTE_SORT_TOKENS => {
                    let shared = params::route_sort_shared(tables.experts, tables.rows);
                    let params = MoeRouteSortParams { route, sort };
                    self.enqueue(kernels::ROUTE_SORT, [1, 1], SORT_THREADS, shared, &params)?;
                }
                Some(route) => {
                    let shared = params::route_shared(tables.experts);
                    let grid = [args.tokens.div_ceil(ROUTE_TOKENS), 1];
                    self.enqueue(kernels::ROUTE, grid, ROUTE_THREADS, shared, &route)?;
                    self.sort(&sort)?;
                }
                None => self.sort(&sort)?,
            }
        }
        Ok(ids)
    }

    /// Logits of every token, and how they become ids and weights; nothing where the caller gives those.
    unsafe fn logits(&self) -> Result<Option<MoeRouteParams>> {
        let Pass { tables, args, workspace, .. } = *self;
        let tokens = args.tokens;
        let Some(router) = tables.router else { return Ok(None) };
        let (logits, stride) = match args.routing {
            Routing::Given { .. } => return Ok(None),
            Routing::Logits { address, stride } => (address, stride),
            Routing::Router => {
                let params = MoeLogitsParams {
                    x: args.x.address,
                    weight: router.weight,
                    parts: router.parts.address,
                    logits: workspace.logits,
                    tokens: tokens as i32,
                    rows: router.rows as i32,
                    hidden: tables.hidden as i32,
                    ldx: args.x.stride as i32,
                    ldw: router.weight_stride as i32,
                    ld_parts: stride(tables.hidden) as i32,
                    part_count: router.parts.count as i32,
                    ld_logits: router.rows as i32,
                };
                let (kernel, grid, threads, shared) = if tokens <= LOGITS_FEW {
                    let grid = [router.rows.div_ceil(LOGITS_FEW_ROWS), tokens.div_ceil(LOGITS_FEW_TOKENS)];
                    (kernels::LOGITS_FEW, grid, LOGITS_FEW_THREADS, LOGITS_FEW_SHARED)
                } else if router.parts.count > 0 {
                    let grid = [tokens.div_ceil(LOGITS_MANY_TOKENS), router.rows.div_ceil(LOGITS_MANY_ROWS)];
                    (kernels::LOGITS_MANY, grid, LOGITS_MANY_THREADS, LOGITS_MANY_SHARED)
                } else {
                    let grid = [tokens.div_ceil(LOGITS_TILE), router.rows.div_ceil(LOGITS_TILE)];
                    (kernels::LOGITS, grid, LOGITS_THREADS, LOGITS_SHARED)
                };
                // SAFETY: as in `run`.
                unsafe { self.enqueue(kernel.of(tables.element), grid, threads, shared, &params) }?;
                (workspace.logits, router.rows)
            }
        };
        Ok(Some(MoeRouteParams {
            logits,
            ld_logits: stride as i32,
            ids: workspace.ids,
            weights: workspace.weights,
            tokens: tokens as i32,
            ..router.params
        }))
    }

    fn sort_params(&self, ids: u64, weights: u64, tile_rows: u32) -> MoeSortParams {
        let Pass { tables, args, workspace, .. } = *self;
        MoeSortParams {
            ids,
            weights,
            canonical: tables.canonical,
            experts: tables.descriptors,
            order: tables.order,
            offsets: workspace.offsets,
            pair_token: workspace.pair_token,
            pair_weight: workspace.pair_weight,
            slot_source: workspace.slot_source,
            slot_weight: workspace.slot_weight,
            tile_first: workspace.tile_first,
            histogram: workspace.histogram,
            tokens: args.tokens as i32,
            slots: tables.slots as i32,
            experts_count: tables.rows as i32,
            hidden: tables.hidden as i32,
            merge_duplicates: i32::from(tables.target == WeightTarget::Output),
            tile_rows: tile_rows as i32,
            tile_cols: [gemm_tile_cols(tile_rows) as i32; STAGES],
        }
    }

    unsafe fn sort(&self, params: &MoeSortParams) -> Result<()> {
        let Pass { tables, args, .. } = *self;
        let pairs = args.tokens * tables.slots;
        let blocks = chunks(pairs);
        let kernels: &[_] = if pairs <= SORT_CHUNK {
            &[(kernels::SORT_SMALL, 1)]
        } else {
            &[(kernels::SORT_COUNT, blocks), (kernels::SORT_SCAN, 1), (kernels::SORT_SCATTER, blocks)]
        };
        let shared = params::sort_shared(tables.rows);
        for &(kernel, blocks) in kernels {
            // SAFETY: as in `run`.
            unsafe { self.enqueue(kernel, [blocks, 1], SORT_THREADS, shared, params) }?;
        }
        Ok(())
    }

    /// What the experts read, and which row of it a pair reads.
    unsafe fn input(&self) -> Result<(u64, u64)> {
        let Pass { tables, args, workspace, .. } = *self;
        if tables.target == WeightTarget::Output {
            return Ok((args.x.address, workspace.pair_token));
        }
        let params = MoeScaleInputParams {
            x: args.x.address,
            offsets: workspace.offsets,
            pair_token: workspace.pair_token,
            pair_weight: workspace.pair_weight,
            out: workspace.scaled,
            experts: tables.rows as i32,
            hidden: tables.hidden as i32,
            ldx: args.x.stride as i32,
            ld_out: stride(tables.hidden) as i32,
        };
        let kernel = kernels::SCALE_INPUT.of(tables.element);
        // SAFETY: as in `run`.
        unsafe { self.enqueue(kernel, [args.tokens * tables.slots, 1], ROW_THREADS, 0, &params) }?;
        Ok((workspace.scaled, 0))
    }

    /// All tokens as the pairs of the base's one expert.
    unsafe fn plan_base(&self, table: BaseTable) -> Result<(Work, BaseTable)> {
        let Pass { tables, args, workspace, .. } = *self;
        let tile_rows = family(tables.element, args.tokens, args.tokens);
        let params = MoeBasePlanParams {
            base: table.descriptors,
            offsets: workspace.base_offsets,
            tile_first: workspace.base_tile_first,
            tokens: args.tokens as i32,
            hidden: tables.hidden as i32,
            tile_rows: tile_rows as i32,
            tile_cols: [gemm_tile_cols(tile_rows) as i32; STAGES],
            reserved: 0,
        };
        // SAFETY: as in `run`.
        unsafe { self.enqueue(kernels::BASE_PLAN, [1, 1], 32, 0, &params) }?;
        let work = Work {
            experts: table.descriptors,
            count: 1,
            order: table.order,
            offsets: workspace.base_offsets,
            tile_first: workspace.base_tile_first,
            tile_rows,
        };
        Ok((work, table))
    }

    /// What all GEMM stages share.
    fn stages(&self) -> MoeGemmParams {
        let (activation, limit, slope) = match self.tables.activation {
            Activation::SwiGlu => (0, 0.0, 0.0),
            Activation::ClampedSwiGlu { limit, slope } => (1, limit, slope),
            // An up projection that is not there counts as 1.
            Activation::GeluTanh | Activation::GeGluTanh => (2, 0.0, 0.0),
            Activation::Relu => (3, 0.0, 0.0),
            Activation::SquaredRelu => (4, 0.0, 0.0),
        };
        let ld_input = match self.tables.target {
            WeightTarget::Output => self.args.x.stride,
            WeightTarget::Input => stride(self.tables.hidden),
        };
        MoeGemmParams {
            hidden: self.tables.hidden as i32,
            ld_input: ld_input as i32,
            ld_z: stride(self.tables.extent.z()) as i32,
            activation,
            limit,
            slope,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// One GEMM stage over all tiles of `work`, into rows of `to`. `next` is the stage that follows over the same tiles.
    unsafe fn gemm(
        &self,
        stage: usize,
        next: Option<usize>,
        work: Work,
        params: MoeGemmParams,
        (out, ld_out): (u64, usize),
    ) -> Result<()> {
        let tile_first = |stage| work.tile_first + (stage * (work.count + 1) * size_of::<i32>()) as u64;
        let params = MoeGemmParams {
            experts: work.experts,
            offsets: work.offsets,
            order: work.order,
            tile_first: tile_first(stage),
            next_tile_first: next.map_or(0, tile_first),
            next_stage: next.unwrap_or(0) as i32,
            experts_count: work.count as i32,
            out,
            ld_out: ld_out as i32,
            ..params
        };
        let room = self.launch.shared_per_multiprocessor() / (GEMM_SHARED + 1024);
        let resident = room.clamp(1, gemm_blocks(work.tile_rows, stage == HIDDEN));
        let grid = [(self.launch.multiprocessors() * resident) as usize, 1];
        let kernel = kernels::GEMMS[stage].of(self.tables.element, work.tile_rows);
        let threads = gemm_threads(work.tile_rows, stage == HIDDEN);
        // SAFETY: as in `run`.
        unsafe { self.enqueue(kernel, grid, threads, GEMM_SHARED, &params) }
    }

    /// Σ weight · h for the base of down.
    unsafe fn base_hidden(&self, ids: u64) -> Result<()> {
        let Pass { tables, args, workspace, .. } = *self;
        let ldh = stride(tables.extent.width) as i32;
        let params = MoeBaseHiddenParams {
            experts: tables.descriptors,
            canonical: tables.canonical,
            ids,
            slot_source: workspace.slot_source,
            slot_weight: workspace.slot_weight,
            h: workspace.h,
            out: workspace.base_hidden,
            tokens: args.tokens as i32,
            slots: tables.slots as i32,
            width: tables.extent.width as i32,
            ldh,
            ld_out: ldh,
            reserved: 0,
        };
        let kernel = kernels::BASE_HIDDEN.of(tables.element);
        // SAFETY: as in `run`.
        unsafe { self.enqueue(kernel, [args.tokens, 1], ROW_THREADS, 0, &params) }
    }

    unsafe fn combine(&self, base: bool) -> Result<()> {
        let Pass { tables, args, workspace, .. } = *self;
        let params = MoeCombineParams {
            experts: tables.descriptors,
            slot_source: workspace.slot_source,
            slot_weight: workspace.slot_weight,
            y: workspace.y,
            base: if base { workspace.base_out } else { 0 },
            residual: args.residual.map_or(0, |rows| rows.address),
            out: args.out.address,
            tokens: args.tokens as i32,
            slots: tables.slots as i32,
            hidden: tables.hidden as i32,
            ldy: stride(tables.hidden) as i32,
            ld_residual: args.residual.map_or(0, |rows| rows.stride as i32),
            ld_out: args.out.stride as i32,
        };
        let kernel = kernels::COMBINE.of(tables.element);
        let grid = [args.tokens, tables.hidden.div_ceil(COMBINE_COLS)];
        // SAFETY: as in `run`.
        unsafe { self.enqueue(kernel, grid, ROW_THREADS, 0, &params) }
    }
}
