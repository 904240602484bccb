//! A tensor as stored: mapped from a shard or held in memory.

use std::fmt;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};

use super::{CACHE_LINE, Dtype, Error, Result, Shard};

/// A stored tensor: name, element type, shape and row-major little-endian bytes. Cheap to clone; mapped tensors
/// are read from disk when their bytes are.
#[derive(Clone)]
pub struct Tensor {
    name: Arc<str>,
    dtype: Dtype,
    shape: Vec<usize>,
    storage: Storage,
    start: usize,
    length: usize,
}

#[derive(Clone)]
enum Storage {
    Mapped(Arc<Shard>),
    Owned(Arc<[Line]>),
}

/// A cache line.
#[derive(Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; CACHE_LINE]);

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

impl Tensor {
    pub(super) fn mapped(
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        shard: Arc<Shard>,
        (start, end): (usize, usize),
    ) -> Self {
        Tensor {
            name: name.into(),
            dtype,
            shape,
            storage: Storage::Mapped(shard),
            start,
            length: end - start,
        }
    }

    /// A tensor in memory; `bytes` must be as long as type and shape say.
    ///
    /// # Panics
    /// Where they are not: that is a mistake of the caller, not of any input.
    pub fn owned(
        name: impl Into<Arc<str>>,
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: impl AsRef<[u8]>,
    ) -> Self {
        let bytes = bytes.as_ref();
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        assert_eq!(bytes.len(), length, "bytes of an owned tensor");
        let (whole, rest) = bytes.as_chunks();
        let mut last = Line::zeroed();
        last.0[..rest.len()].copy_from_slice(rest);
        let lines = whole.iter().map(|bytes| Line(*bytes)).chain((!rest.is_empty()).then_some(last));
        Tensor { name: name.into(), dtype, shape, storage: Storage::Owned(lines.collect()), start: 0, length }
    }

    /// A tensor in memory from f32 values, rounded to `dtype` (f32, f16 or bf16).
    pub fn from_f32(name: impl Into<Arc<str>>, dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Self {
        Tensor::owned(name, dtype, shape, encode_f32(dtype, values))
    }

    /// A tensor in memory of whole numbers, type i32.
    pub fn from_i32(name: impl Into<Arc<str>>, shape: Vec<usize>, values: &[i32]) -> Self {
        Tensor::owned(name, Dtype::I32, shape, bytemuck::cast_slice(values))
    }

    /// Name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same tensor under another name.
    #[must_use]
    pub fn renamed(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Row-major little-endian bytes; may be unaligned.
    pub fn bytes(&self) -> &[u8] {
        let all = match &self.storage {
            Storage::Mapped(shard) => shard.data(),
            Storage::Owned(lines) => bytemuck::must_cast_slice(lines),
        };
        &all[self.start..self.start + self.length]
    }

    /// Rows `start .. start + count` along the first dimension, sharing the storage.
    ///
    /// # Panics
    /// Where the rows do not exist.
    #[must_use]
    pub fn rows(&self, start: usize, count: usize) -> Self {
        assert!(start + count <= self.shape[0], "rows of {self:?}");
        let row = self.length.checked_div(self.shape[0]).unwrap_or(0);
        let mut shape = self.shape.clone();
        shape[0] = count;
        Tensor { shape, start: self.start + start * row, length: count * row, ..self.clone() }
    }

    /// Entry `index` of the first dimension, that dimension removed.
    #[must_use]
    pub fn entry(&self, index: usize) -> Self {
        let mut entry = self.rows(index, 1);
        entry.shape.remove(0);
        entry
    }

    /// Whether the bytes are some of those of `whole`, not copies of them.
    pub fn is_part_of(&self, whole: &Tensor) -> bool {
        let shared = match (&self.storage, &whole.storage) {
            (Storage::Mapped(a), Storage::Mapped(b)) => Arc::ptr_eq(a, b),
            (Storage::Owned(a), Storage::Owned(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let end = |tensor: &Tensor| tensor.start + tensor.length;
        shared && whole.start <= self.start && end(self) <= end(whole)
    }

    /// The same with a first dimension of 1 before the others.
    #[must_use]
    pub fn as_row(mut self) -> Self {
        self.shape.insert(0, 1);
        self
    }

    /// The same with its rows in `count` entries of a new first dimension.
    ///
    /// # Panics
    /// Where that does not come out even.
    #[must_use]
    pub fn split_rows(mut self, count: usize) -> Self {
        assert!(self.shape[0].is_multiple_of(count), "{count} parts of {self:?}");
        self.shape[0] /= count;
        self.shape.insert(0, count);
        self
    }

    /// The same with the rows of all entries one below the other: undoes [`Tensor::split_rows`].
    ///
    /// # Panics
    /// Where there is one dimension alone.
    #[must_use]
    pub fn joined_rows(mut self) -> Self {
        let count = self.shape.remove(0);
        self.shape[0] *= count;
        self
    }

    /// The matrix with rows and columns exchanged, copied.
    ///
    /// # Panics
    /// Where it is no matrix.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let [rows, cols] = self.shape[..] else { panic!("the transpose of {self:?}") };
        let (all, size) = (self.bytes(), self.length.checked_div(rows * cols).unwrap_or(0));
        let at = |r: usize, c: usize| &all[(r * cols + c) * size..][..size];
        let bytes: Vec<u8> = (0..cols).flat_map(|c| (0..rows).flat_map(move |r| at(r, c))).copied().collect();
        Tensor::owned(self.name.clone(), self.dtype, vec![cols, rows], bytes)
    }

    /// The rows listed in `keep`, copied, in that order.
    #[must_use]
    pub fn select_rows(&self, keep: &[usize]) -> Self {
        let row = self.length.checked_div(self.shape[0]).unwrap_or(0);
        let all = self.bytes();
        let bytes: Vec<u8> = keep.iter().flat_map(|&r| &all[r * row..(r + 1) * row]).copied().collect();
        let mut shape = self.shape.clone();
        shape[0] = keep.len();
        Tensor::owned(self.name.clone(), self.dtype, shape, bytes)
    }

    /// All elements as f32 (exact for f32, f16 and bf16).
    ///
    /// # Errors
    /// Names the tensor where its type is not one of these.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.check_float()?;
        let mut out = vec![0.0; self.len()];
        decode_f32(self.dtype, self.bytes(), &mut out);
        Ok(out)
    }

    /// All elements of an i32 tensor.
    ///
    /// # Errors
    /// Names the tensor where it has another type.
    pub fn to_i32(&self) -> Result<Vec<i32>> {
        if self.dtype != Dtype::I32 {
            let found = format!("{:?}", self.dtype);
            return Err(Error::Dtype { name: self.name().into(), found, expected: "I32" });
        }
        Ok(self.bytes().as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect())
    }

    /// Errors unless the shape is `expected`.
    pub fn check_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape { name: self.name().into(), found: self.shape.clone(), expected: expected.into() })
    }

    /// Errors unless the elements are f32, f16 or bf16.
    pub fn check_float(&self) -> Result<()> {
        if matches!(self.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Ok(());
        }
        let found = format!("{:?}", self.dtype);
        Err(Error::Dtype { name: self.name().into(), found, expected: "F32, F16 or BF16" })
    }

    /// Errors where an element is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        let bytes = self.bytes();
        let found = match self.dtype {
            Dtype::BF16 => {
                first_u16(bytes, |b| b & 0x7f80 == 0x7f80).map(|(i, b)| (i, bf16::from_bits(b).to_f32()))
            }
            Dtype::F16 => {
                first_u16(bytes, |b| b & 0x7c00 == 0x7c00).map(|(i, b)| (i, f16::from_bits(b).to_f32()))
            }
            Dtype::F32 => {
                let values = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
                values.enumerate().find(|(_, v)| !v.is_finite())
            }
            _ => None,
        };
        match found {
            None => Ok(()),
            Some((index, value)) => Err(Error::NonFinite { name: self.name().into(), index, value }),
        }
    }

    /// Lets the operating system drop the pages of a mapped tensor; reading it again brings them back.
    pub fn release(&self) {
        if let Storage::Mapped(shard) = &self.storage {
            shard.release(self.start, self.length);
        }
    }
}

fn first_u16(bytes: &[u8], bad: impl Fn(u16) -> bool) -> Option<(usize, u16)> {
    const BLOCK: usize = 4096;
    let values = bytes.as_chunks().0;
    for (block, chunk) in values.chunks(BLOCK).enumerate() {
        // A whole block first, without early exit, so that the common case vectorises.
        if chunk.iter().fold(false, |any, &b| any | bad(u16::from_le_bytes(b))) {
            let (i, b) = chunk.iter().map(|&b| u16::from_le_bytes(b)).enumerate().find(|&(_, b)| bad(b))?;
            return Some((block * BLOCK + i, b));
        }
    }
    None
}

/// Widens little-endian `bytes` of `dtype` (f32, f16 or bf16) into `out`, exactly.
///
/// # Panics
/// Where the lengths disagree or the type is another: callers check with [`Tensor::check_float`].
pub fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len() * 8, out.len() * dtype.bitsize(), "bytes to decode");
    match dtype {
        Dtype::F32 => {
            for (o, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = f32::from_le_bytes(b);
            }
        }
        Dtype::BF16 => {
            for (o, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
            }
        }
        Dtype::F16 => {
            for (o, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *o = f16::from_bits(u16::from_le_bytes(b)).to_f32();
            }
        }
        other => panic!("{other:?} is not a floating-point weight type"),
    }
}

/// Rounds f64 `values` to `dtype` (f32, f16 or bf16) once, to nearest, ties to even; little-endian.
///
/// # Panics
/// For any other type.
pub fn encode_f64(dtype: Dtype, values: &[f64]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(to_odd(v)).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(to_odd(v)).to_le_bytes()).collect(),
        other => panic!("{other:?} is not a floating-point weight type"),
    }
}

/// `value` rounded to odd: of the two neighbours in f32 the one whose last bit is 1. Rounding that to a shorter type
/// gives what rounding `value` would (Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums", 2008).
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() {
        return nearest;
    }
    let away = u32::from(f64::from(nearest).abs() > value.abs());
    f32::from_bits((nearest.to_bits() - away) | 1)
}

/// Rounds `values` to `dtype` (f32, f16 or bf16; to nearest, ties to even), little-endian.
///
/// # Panics
/// For any other type.
pub fn encode_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        other => panic!("{other:?} is not a floating-point weight type"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers just beside the middle of two neighbours, where rounding to f32 on the way would lose the side.
    #[test]
    fn f64_is_rounded_once() {
        let tiny = 2f64.powi(-40);
        // 1 + 2⁻⁸ is half way between 1 and the next bf16, 1 + 2⁻¹¹ between 1 and the next f16.
        for (dtype, half, step) in [(Dtype::BF16, 8, 0x3f80u16), (Dtype::F16, 11, 0x3c00)] {
            let middle = 1.0 + 2f64.powi(-half);
            for (value, expected) in [
                (middle, step),
                (middle + tiny, step + 1),
                (middle - tiny, step),
                (1.0 + 3.0 * 2f64.powi(-half), step + 2),
                (1.0 + 3.0 * 2f64.powi(-half) - tiny, step + 1),
                (-middle - tiny, (step + 1) | 0x8000),
                (0.0, 0),
                (-0.0, 0x8000),
            ] {
                assert_eq!(encode_f64(dtype, &[value]), expected.to_le_bytes(), "{dtype:?} {value:e}");
            }
        }
        assert_eq!(encode_f64(Dtype::F32, &[0.1]), 0.1f32.to_le_bytes());
        assert_eq!(encode_f64(Dtype::BF16, &[1e-60, -1e-60]), [0, 0, 0, 0x80]);
    }

    #[test]
    fn tensors_in_memory_begin_on_a_cache_line() {
        for length in [0, 1, 63, 64, 65, 1000] {
            let bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let tensor = Tensor::owned("t", Dtype::U8, vec![length], &bytes);
            assert_eq!(tensor.bytes(), bytes);
            assert_eq!(tensor.bytes().as_ptr() as usize % CACHE_LINE, 0);
        }
    }
}
