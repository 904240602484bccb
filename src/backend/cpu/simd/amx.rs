//! Tiles of bf16 (AMX), for products of matrices.

use std::arch::asm;
#[allow(clippy::wildcard_imports, reason = "every name in it says where it comes from")]
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::Isa;

/// Rows of a tile, and its columns of f32 or of pairs of bf16.
pub(in super::super) const SIDE: usize = 16;

/// Most columns of x that [`Amx::multiply`] takes: three tiles.
pub(in super::super) const COLUMNS: usize = 3 * SIDE;

/// Rows of W that [`Amx::multiply`] takes: two tiles.
pub(in super::super) const ROWS: usize = 2 * SIDE;

/// Columns of W in a step of [`Amx::multiply`]: a tile of pairs of bf16.
pub(in super::super) const STEP: usize = 2 * SIDE;

/// Proof that the processor has tiles and their product of bf16, that the system lets this process use them, and that
/// there is AVX-512 beside them.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Amx(());

impl Amx {
    /// Asks the system, once: on Linux a process has to request the registers.
    pub(in super::super) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found = *FOUND.get_or_init(|| Isa::Avx512.is_available() && has_tiles() && request());
        found.then_some(Amx(()))
    }

    /// sums `[ROWS, columns]` = or, where `accumulate`, += W · x, for x as `[steps, tiles, SIDE, width]` pairs of bf16
    /// (columns of W, then columns of x) with the sizes of `shape`.
    ///
    /// `ahead` is fetched meanwhile.
    #[inline]
    pub(in super::super) fn multiply(
        self,
        shape: &Shape,
        w: Rows<'_>,
        ahead: Option<Ahead>,
        x: &[f32],
        accumulate: bool,
        sums: &mut [f32],
    ) {
        assert!(w.steps * SIDE * shape.columns() <= x.len(), "tiles of x");
        assert!(ROWS * shape.columns() <= sums.len(), "tiles of sums");
        if w.steps == 0 {
            if !accumulate {
                sums[..ROWS * shape.columns()].fill(0.0);
            }
            return;
        }
        let kernel = match (shape.tiles, ahead) {
            (1, None) => one,
            (1, Some(_)) => one_ahead,
            (2, None) => two,
            (2, Some(_)) => two_ahead,
            (_, None) => three,
            (_, Some(_)) => three_ahead,
        };
        let ahead = ahead.unwrap_or(Ahead { start: w.bytes.as_ptr(), stride: 0 });
        let Amx(()) = self;
        // SAFETY: all operands are as large as said, there is a step, and `self` proves that the instructions are there.
        unsafe { kernel(&shape.registers, w, ahead, x.as_ptr(), accumulate, sums.as_mut_ptr()) }
    }
}

/// [`ROWS`] rows of W in steps of [`STEP`] bf16 values.
#[derive(Clone, Copy)]
pub(in super::super) struct Rows<'a> {
    bytes: &'a [u8],
    /// Bytes from a row to the next, and from a step to the next.
    stride: [usize; 2],
    steps: usize,
}

impl<'a> Rows<'a> {
    /// Bytes of a row in a step.
    const WIDTH: usize = 2 * STEP;

    /// Rows that begin `stride` bytes apart, as far as they have whole steps.
    pub(in super::super) fn stored(bytes: &'a [u8], stride: usize, steps: usize) -> Self {
        Rows::new(bytes, [stride, Rows::WIDTH], steps)
    }

    /// `[steps, ROWS, STEP]` values.
    pub(in super::super) fn packed(bytes: &'a [u8]) -> Self {
        let stride = [Rows::WIDTH, ROWS * Rows::WIDTH];
        Rows::new(bytes, stride, bytes.len() / stride[1])
    }

    pub(in super::super) fn steps(&self) -> usize {
        self.steps
    }

    fn new(bytes: &'a [u8], stride: [usize; 2], steps: usize) -> Self {
        let end = (ROWS - 1) * stride[0] + steps.saturating_sub(1) * stride[1] + Rows::WIDTH;
        assert!(steps == 0 || end <= bytes.len(), "rows of W");
        Rows { bytes, stride, steps }
    }
}

/// Rows of W that are read soon, in steps of [`STEP`] bf16 values; they need not be there. Three tiles fetch [`SIDE`] of
/// them, fewer tiles [`ROWS`].
#[derive(Clone, Copy)]
pub(in super::super) struct Ahead {
    pub(in super::super) start: *const u8,
    /// Bytes from one row to the next.
    pub(in super::super) stride: usize,
}

/// Whether the processor has AMX-TILE and AMX-BF16 (CPUID leaf 7).
fn has_tiles() -> bool {
    const BOTH: u32 = 1 << 22 | 1 << 24;
    __get_cpuid_max(0).0 >= 7 && __cpuid_count(7, 0).edx & BOTH == BOTH
}

/// Asks for the tile registers (ARCH_REQ_XCOMP_PERM of XTILEDATA). The system refuses where it does not save them.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// Other systems have other ways, none of them tried.
#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

/// Sizes of the tiles of a product, as the processor wants them (LDTILECFG).
#[repr(C, align(64))]
struct Registers {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// How many columns of x a product has, and how they are cut into tiles.
pub(in super::super) struct Shape {
    registers: Registers,
    tiles: usize,
    width: usize,
}

impl Shape {
    /// One tile as wide as it has to be, or several of [`SIDE`].
    pub(in super::super) fn new(columns: usize) -> Self {
        assert!((1..=COLUMNS).contains(&columns), "columns of tiles");
        let (tiles, width) = (columns.div_ceil(SIDE), columns.min(SIDE));
        let mut registers =
            Registers { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        // Registers 0 to 5 hold sums, 6 a tile of W and 7 one of x.
        registers.rows[..8].fill(SIDE as u8);
        registers.row_bytes[..8].fill(4 * width as u16);
        registers.row_bytes[6] = 4 * SIDE as u16;
        Shape { registers, tiles, width }
    }

    /// Columns of x in memory, those that fill the last tile among them.
    pub(in super::super) fn columns(&self) -> usize {
        self.tiles * self.width
    }

    /// Columns of one tile of x.
    pub(in super::super) fn width(&self) -> usize {
        self.width
    }
}

/// A product with so many tiles of x. Everything between configuring the registers and releasing them is one block, so
/// that the compiler never meets a state of the processor that it does not know of.
macro_rules! product {
    ($name:ident, $tiles:literal, $load:expr, $step:expr, $store:expr) => {
        /// # Safety
        /// As [`Amx::multiply`] checks, for at least one step.
        unsafe fn $name(
            registers: &Registers,
            w: Rows<'_>,
            ahead: Ahead,
            x: *const f32,
            accumulate: bool,
            sums: *mut f32,
        ) {
            let Rows { bytes, stride: [stride, step], steps } = w;
            let row = usize::from(registers.row_bytes[7]);
            let line = $tiles * row;
            // SAFETY: reads and writes what the caller vouches for, and names all registers that it uses.
            unsafe {
                asm!(
                    "ldtilecfg [{scratch}] /* zeros all tiles; {ahead} {apart} are not used by all kernels */",
                    "lea {scratch}, [{upper} + 8 * {line}]",
                    "lea {scratch}, [{scratch} + 8 * {line}]",
                    "test {accumulate:e}, {accumulate:e}",
                    "jz 2f",
                    $load,
                    "2:",
                    $step,
                    "add {first}, {step}",
                    "lea {x}, [{x} + 8 * {line}]",
                    "lea {x}, [{x} + 8 * {line}]",
                    "dec {steps}",
                    "jnz 2b",
                    "lea {scratch}, [{upper} + 8 * {line}]",
                    "lea {scratch}, [{scratch} + 8 * {line}]",
                    $store,
                    "tilerelease",
                    scratch = inout(reg) &raw const *registers => _,
                    first = inout(reg) bytes.as_ptr() => _,
                    ahead = inout(reg) ahead.start => _,
                    apart = in(reg) ahead.stride,
                    stride = in(reg) stride,
                    step = in(reg) step,
                    x = inout(reg) x => _,
                    row = in(reg) row,
                    steps = inout(reg) steps => _,
                    upper = in(reg) sums,
                    accumulate = in(reg) u32::from(accumulate),
                    line = in(reg) line,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// Four rows of W into the second-level cache.
macro_rules! fetch {
    () => {
        "prefetcht1 [{ahead}]
        prefetcht1 [{ahead} + {apart}]
        lea {ahead}, [{ahead} + 2 * {apart}]
        prefetcht1 [{ahead}]
        prefetcht1 [{ahead} + {apart}]
        lea {ahead}, [{ahead} + 2 * {apart}]
        "
    };
}

/// Back to the first row, a step further, after so many times eight rows.
macro_rules! rewind {
    ($times:literal) => {
        concat!(
            "lea {scratch}, [8 * {apart}]
            lea {scratch}, [",
            $times,
            " * {scratch} - 64]
            sub {ahead}, {scratch}
            "
        )
    };
}

/// A step of one tile, with something between its products.
macro_rules! step_of_one {
    ($between:expr) => {
        concat!(
            "tileloadd tmm7, [{x} + {row}]
            tileloadd tmm6, [{first} + {stride}]
            tdpbf16ps tmm0, tmm6, tmm7
            ",
            $between,
            "lea {scratch}, [{first} + 8 * {stride}]
            lea {scratch}, [{scratch} + 8 * {stride}]
            tileloadd tmm6, [{scratch} + {stride}]
            tdpbf16ps tmm3, tmm6, tmm7
            ",
            $between
        )
    };
}

macro_rules! product_of_one {
    ($name:ident, $step:expr) => {
        product!(
            $name,
            1,
            "tileloadd tmm0, [{upper} + {line}]
            tileloadd tmm3, [{scratch} + {line}]",
            $step,
            "tilestored [{upper} + {line}], tmm0
            tilestored [{scratch} + {line}], tmm3"
        );
    };
}

/// A step of two tiles, with something between its products.
macro_rules! step_of_two {
    ($between:expr) => {
        concat!(
            "tileloadd tmm6, [{first} + {stride}]
            tileloadd tmm7, [{x} + {row}]
            tdpbf16ps tmm0, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row} + 1024]
            tdpbf16ps tmm1, tmm6, tmm7
            ",
            $between,
            "lea {scratch}, [{first} + 8 * {stride}]
            lea {scratch}, [{scratch} + 8 * {stride}]
            tileloadd tmm6, [{scratch} + {stride}]
            tdpbf16ps tmm4, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row}]
            tdpbf16ps tmm3, tmm6, tmm7
            ",
            $between
        )
    };
}

macro_rules! product_of_two {
    ($name:ident, $step:expr) => {
        product!(
            $name,
            2,
            "tileloadd tmm0, [{upper} + {line}]
            tileloadd tmm1, [{upper} + {line} + 64]
            tileloadd tmm3, [{scratch} + {line}]
            tileloadd tmm4, [{scratch} + {line} + 64]",
            $step,
            "tilestored [{upper} + {line}], tmm0
            tilestored [{upper} + {line} + 64], tmm1
            tilestored [{scratch} + {line}], tmm3
            tilestored [{scratch} + {line} + 64], tmm4"
        );
    };
}

/// A step of three tiles, with something between its products.
macro_rules! step_of_three {
    ($between:expr) => {
        concat!(
            "tileloadd tmm6, [{first} + {stride}]
            tileloadd tmm7, [{x} + {row}]
            tdpbf16ps tmm0, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row} + 1024]
            tdpbf16ps tmm1, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row} + 2048]
            tdpbf16ps tmm2, tmm6, tmm7
            lea {scratch}, [{first} + 8 * {stride}]
            lea {scratch}, [{scratch} + 8 * {stride}]
            tileloadd tmm6, [{scratch} + {stride}]
            tdpbf16ps tmm5, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row} + 1024]
            tdpbf16ps tmm4, tmm6, tmm7
            ",
            $between,
            "tileloadd tmm7, [{x} + {row}]
            tdpbf16ps tmm3, tmm6, tmm7
            "
        )
    };
}

macro_rules! product_of_three {
    ($name:ident, $step:expr) => {
        product!(
            $name,
            3,
            "tileloadd tmm0, [{upper} + {line}]
            tileloadd tmm1, [{upper} + {line} + 64]
            tileloadd tmm2, [{upper} + {line} + 128]
            tileloadd tmm3, [{scratch} + {line}]
            tileloadd tmm4, [{scratch} + {line} + 64]
            tileloadd tmm5, [{scratch} + {line} + 128]",
            $step,
            "tilestored [{upper} + {line}], tmm0
            tilestored [{upper} + {line} + 64], tmm1
            tilestored [{upper} + {line} + 128], tmm2
            tilestored [{scratch} + {line}], tmm3
            tilestored [{scratch} + {line} + 64], tmm4
            tilestored [{scratch} + {line} + 128], tmm5"
        );
    };
}

product_of_one!(one, step_of_one!(""));
product_of_one!(
    one_ahead,
    concat!(step_of_one!(concat!(fetch!(), fetch!(), fetch!(), fetch!())), rewind!("4"))
);
product_of_two!(two, step_of_two!(""));
product_of_two!(two_ahead, concat!(step_of_two!(concat!(fetch!(), fetch!())), rewind!("4")));
product_of_three!(three, step_of_three!(""));
product_of_three!(three_ahead, concat!(step_of_three!(fetch!()), rewind!("2")));
