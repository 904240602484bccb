//! Four lanes in plain Rust: what the compiler makes of it for the target it compiles for.

use half::f16;

use super::{Simd, Task};

/// No special instructions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Portable;

const LANES: usize = 4;

#[inline(always)]
fn lanes(f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F = [f32; LANES];
    type Block = [[f32; LANES]; LANES];
    const LANES: usize = LANES;
    const PANEL_TOKENS: usize = 4;
    const STREAM_TOKENS: usize = 4;

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        task.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::F {
        let from = &from[..LANES];
        lanes(|i| from[i])
    }

    #[inline(always)]
    fn store(self, value: Self::F, to: &mut [f32]) {
        to[..LANES].copy_from_slice(&value);
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            lanes(|i| a[i].mul_add(b[i], c[i]))
        } else {
            // Without the instruction `mul_add` is a slow library call.
            lanes(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(((n[i] as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn block(self, row: impl FnMut(usize) -> Self::F) -> Self::Block {
        std::array::from_fn(row)
    }

    #[inline(always)]
    fn transpose(self, block: Self::Block) -> Self::Block {
        std::array::from_fn(|i| lanes(|j| block[j][i]))
    }

    #[inline(always)]
    unsafe fn load_bits(self, from: *const u8) -> Self::F {
        // SAFETY: the caller vouches for 16 bytes, and bytes have no alignment.
        let bytes = unsafe { from.cast::<[[u8; 4]; LANES]>().read() };
        lanes(|i| f32::from_le_bytes(bytes[i]))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u8) -> Self::F {
        // SAFETY: the caller vouches for 8 bytes, and bytes have no alignment.
        let bytes = unsafe { from.cast::<[[u8; 2]; LANES]>().read() };
        lanes(|i| f16::from_le_bytes(bytes[i]).to_f32())
    }

    #[inline(always)]
    fn bf16_low(self, bits: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(bits[i].to_bits() << 16))
    }

    #[inline(always)]
    fn bf16_high(self, bits: Self::F) -> Self::F {
        lanes(|i| f32::from_bits(bits[i].to_bits() & 0xffff_0000))
    }

    #[inline(always)]
    fn prefetch(self, _at: *const u8) {}
}
