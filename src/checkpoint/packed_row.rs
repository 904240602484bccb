//! Rows of packed matrices as they are stored.

use super::packed::{MX_BLOCK, decode_int4, decode_mxfp4, e4m3, e8m0};
use super::{Dtype, Tensor, decode_f32};

/// A row of a packed matrix, or the end of one.
pub(crate) enum PackedRow<'a> {
    /// FP8 codes, `block` of which share a scale.
    Fp8 { codes: &'a [u8], scales: Scales<'a>, block: usize },
    /// Blocks of MXFP4 codes and their scales.
    Mxfp4 { blocks: &'a [[u8; MX_BLOCK / 2]], scales: &'a [u8] },
    /// Four-bit integers, two to a byte, `group` of which share a scale.
    Int4 { codes: &'a [u8], scales: Scales<'a>, group: usize },
}

/// The scales of a row of FP8 codes or integers.
pub(crate) struct Scales<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
}

impl<'a> Scales<'a> {
    /// All of a matrix.
    pub(super) fn new(scales: &'a Tensor) -> Self {
        Scales { bytes: scales.bytes(), dtype: scales.dtype() }
    }

    /// Those from number `count` on.
    #[inline]
    pub(super) fn skip(self, count: usize) -> Self {
        Scales { bytes: &self.bytes[count * self.dtype.bitsize() / 8..], ..self }
    }

    /// That of block `i`.
    #[inline]
    pub(crate) fn get(&self, i: usize) -> f32 {
        // By far the most frequent type.
        if self.dtype == Dtype::F32 {
            return f32::from_le_bytes(self.bytes.as_chunks().0[i]);
        }
        let width = self.dtype.bitsize() / 8;
        decode_scale(self.dtype, &self.bytes[i * width..][..width])
    }
}

impl<'a> PackedRow<'a> {
    /// The codes.
    #[inline]
    pub(crate) fn codes(&self) -> &'a [u8] {
        match *self {
            PackedRow::Fp8 { codes, .. } | PackedRow::Int4 { codes, .. } => codes,
            PackedRow::Mxfp4 { blocks, .. } => blocks.as_flattened(),
        }
    }

    /// What is from column `col` on, at which values that share a scale begin.
    #[inline]
    pub(crate) fn skip(self, col: usize) -> Self {
        match self {
            PackedRow::Fp8 { codes, scales, block } => {
                PackedRow::Fp8 { codes: &codes[col..], scales: scales.skip(col / block), block }
            }
            PackedRow::Mxfp4 { blocks, scales } => {
                PackedRow::Mxfp4 { blocks: &blocks[col / MX_BLOCK..], scales: &scales[col / MX_BLOCK..] }
            }
            PackedRow::Int4 { codes, scales, group } => {
                PackedRow::Int4 { codes: &codes[col / 2..], scales: scales.skip(col / group), group }
            }
        }
    }

    /// Decodes as many values as `out` holds. Inlined, so that it is compiled for the instructions of whoever calls it.
    #[inline(always)]
    pub(crate) fn decode(&self, out: &mut [f32]) {
        match self {
            PackedRow::Fp8 { codes, scales, block } => {
                for (i, (out, codes)) in out.chunks_mut(*block).zip(codes.chunks(*block)).enumerate() {
                    let factor = scales.get(i);
                    out.iter_mut().zip(codes).for_each(|(o, &code)| *o = e4m3(code) * factor);
                }
            }
            PackedRow::Mxfp4 { blocks, scales } => {
                let packed = blocks.iter().zip(*scales);
                for (out, (block, &scale)) in out.as_chunks_mut().0.iter_mut().zip(packed) {
                    decode_mxfp4(block, scale, out);
                }
            }
            PackedRow::Int4 { codes, scales, group } => {
                let groups = out.chunks_mut(*group).zip(codes.chunks(group.div_ceil(2)));
                for (i, (out, codes)) in groups.enumerate() {
                    decode_int4(codes, scales.get(i), out);
                }
            }
        }
    }
}

/// A scale as f32, whichever type it has.
#[inline(always)]
fn decode_scale(dtype: Dtype, bytes: &[u8]) -> f32 {
    let mut scale = [0.0];
    match dtype {
        Dtype::F8_E8M0 => scale[0] = e8m0(bytes[0]),
        _ => decode_f32(dtype, bytes, &mut scale),
    }
    scale[0]
}
