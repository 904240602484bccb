//! A weight matrix in whatever form the checkpoint holds it.

use std::ops::Range;
use std::sync::Arc;

use super::packed::{E4M3_LARGEST, E8M0_LARGEST, E8M0_LARGEST_OF_FP8, MX_BLOCK};
use super::packed_row::{PackedRow, Scales};
use super::{Dtype, Error, Result, Tensor, decode_f32};

/// A weight matrix W `[rows, cols]` = `[out, in]` as stored. Cheap to clone; nothing is read until it is decoded.
#[derive(Clone, Debug)]
pub struct Weight {
    name: Arc<str>,
    rows: usize,
    cols: usize,
    storage: Storage,
}

/// How the values of a [`Weight`] are stored.
#[derive(Clone, Debug)]
pub enum Storage {
    /// f32, f16 or bf16, `[rows, cols]`.
    Plain(Tensor),
    /// f32, f16 or bf16, transposed: W[r, c] is at row c of a tensor `[cols, width]`, in column [`Stride::at`] r.
    InputMajor(Tensor, Stride),
    /// FP8 e4m3 `[rows, cols]`, times a scale per block, `[⌈rows / block₀⌉, ⌈cols / block₁⌉]` (DeepSeek-V3, arXiv
    /// 2412.19437, §3.3.2); a block may be a row or the whole matrix.
    Fp8 {
        /// The FP8 codes.
        values: Tensor,
        /// The scales: f32, f16, bf16 or E8M0. A single one may have any shape, one for each row may be a vector.
        scales: Tensor,
        /// Rows and columns of a block.
        block: [usize; 2],
        /// The scale that the matrix's inputs were calibrated to, where one is stored; inputs are not rounded here.
        input_scale: Option<Tensor>,
    },
    /// MXFP4: row r of W is row [`Stride::at`] r of these tensors.
    Mxfp4 {
        /// Two codes a byte, `[stored rows, cols / 32, 16]`.
        blocks: Tensor,
        /// E8M0 scales, `[stored rows, cols / 32]`.
        scales: Tensor,
        /// Which stored rows are W's.
        rows: Stride,
    },
    /// Four-bit integers from −8 to 7, times a scale per group of columns (`pack-quantized` of compressed-tensors).
    Int4 {
        /// The integers plus 8, eight to a number and the first in its lowest bits, `[rows, ⌈cols / 8⌉]`.
        codes: Tensor,
        /// The scales: f32, f16 or bf16, `[rows, ⌈cols / group⌉]`.
        scales: Tensor,
        /// Columns that share a scale.
        group: usize,
        /// `[rows, cols]`, where they are stored.
        shape: Option<Tensor>,
    },
}

/// Evenly spaced indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stride {
    /// The first index.
    pub first: usize,
    /// Distance between indices.
    pub step: usize,
}

impl Stride {
    /// 0, 1, 2, …
    pub const ALL: Stride = Stride { first: 0, step: 1 };

    /// Index number `i`.
    pub fn at(self, i: usize) -> usize {
        self.first + i * self.step
    }

    /// The first `count` indices.
    pub fn indices(self, count: usize) -> Vec<usize> {
        (0..count).map(|i| self.at(i)).collect()
    }
}

impl Weight {
    /// A matrix of plain numbers.
    ///
    /// # Errors
    /// Names the tensor that has another type or is no matrix.
    pub fn plain(tensor: Tensor) -> Result<Self> {
        tensor.check_float()?;
        let &[rows, cols] = tensor.shape() else {
            let (name, found) = (tensor.name().into(), tensor.shape().to_vec());
            return Err(Error::Shape { name, found, expected: vec![0, 0] });
        };
        Ok(Weight { name: tensor.name().into(), rows, cols, storage: Storage::Plain(tensor) })
    }

    /// The matrix whose row r is column `columns.at(r)` of `tensor` `[cols, width]`.
    ///
    /// # Errors
    /// Names the tensor that has another type or too few columns.
    pub fn input_major(tensor: Tensor, columns: Stride, rows: usize) -> Result<Self> {
        tensor.check_float()?;
        let cols = tensor.shape().first().copied().unwrap_or(0);
        let least = if rows == 0 { 0 } else { columns.at(rows - 1) + 1 };
        match tensor.shape() {
            [_, width] if *width >= least => {}
            found => {
                let (name, found) = (tensor.name().into(), found.to_vec());
                return Err(Error::Shape { name, found, expected: vec![cols, least] });
            }
        }
        Ok(Weight { name: tensor.name().into(), rows, cols, storage: Storage::InputMajor(tensor, columns) })
    }

    /// A matrix of FP8 values with one scale per block.
    ///
    /// # Errors
    /// Names the tensor that has another type or shape.
    pub fn fp8(values: Tensor, scales: Tensor, block: [usize; 2]) -> Result<Self> {
        check_dtype(&values, Dtype::F8_E4M3, "F8_E4M3")?;
        if scales.dtype() != Dtype::F8_E8M0 {
            scales.check_float()?;
        }
        let &[rows, cols] = values.shape() else {
            let (name, found) = (values.name().into(), values.shape().to_vec());
            return Err(Error::Shape { name, found, expected: vec![0, 0] });
        };
        let block = block.map(|b| b.max(1));
        let blocks = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
        let is_short =
            blocks == [1, 1] && scales.len() == 1 || scales.shape() == [rows] && blocks == [rows, 1];
        if !is_short {
            scales.check_shape(&blocks)?;
        }
        let name = values.name().into();
        Ok(Weight { name, rows, cols, storage: Storage::Fp8 { values, scales, block, input_scale: None } })
    }

    /// The same FP8 matrix with the scale that its inputs were calibrated to; nothing changes in one of another type.
    #[must_use]
    pub fn with_input_scale(mut self, scale: Tensor) -> Self {
        if let Storage::Fp8 { input_scale, .. } = &mut self.storage {
            *input_scale = Some(scale);
        }
        self
    }

    /// The MXFP4 matrix of `count` rows whose row r is row `rows.at(r)` of `blocks` `[stored rows, cols / 32, 16]` and
    /// of `scales` `[stored rows, cols / 32]`.
    ///
    /// # Errors
    /// Names the tensor that has another type or shape.
    pub fn mxfp4(blocks: Tensor, scales: Tensor, rows: Stride, count: usize) -> Result<Self> {
        check_dtype(&blocks, Dtype::U8, "U8")?;
        check_dtype(&scales, Dtype::U8, "U8")?;
        let &[stored, per_row] = scales.shape() else {
            let (name, found) = (scales.name().into(), scales.shape().to_vec());
            return Err(Error::Shape { name, found, expected: vec![count, 0] });
        };
        blocks.check_shape(&[stored, per_row, MX_BLOCK / 2])?;
        if count > 0 && rows.at(count - 1) >= stored {
            let (name, found) = (scales.name().into(), scales.shape().to_vec());
            return Err(Error::Shape { name, found, expected: vec![rows.at(count - 1) + 1, per_row] });
        }
        let (name, cols) = (blocks.name().into(), per_row * MX_BLOCK);
        Ok(Weight { name, rows: count, cols, storage: Storage::Mxfp4 { blocks, scales, rows } })
    }

    /// The matrix `[rows, cols]` of four-bit `codes` `[rows, ⌈cols / 8⌉]` with a scale for each `group` columns, an even
    /// number or all; `shape` is what is stored with it.
    ///
    /// # Errors
    /// Names the tensor that has another type or shape.
    pub fn int4(
        codes: Tensor,
        scales: Tensor,
        [rows, cols]: [usize; 2],
        group: usize,
        shape: Option<Tensor>,
    ) -> Result<Self> {
        check_dtype(&codes, Dtype::I32, "I32")?;
        codes.check_shape(&[rows, cols.div_ceil(8)])?;
        scales.check_float()?;
        let group = group.clamp(1, cols.max(1));
        scales.check_shape(&[rows, cols.div_ceil(group)])?;
        let name = codes.name().into();
        Ok(Weight { name, rows, cols, storage: Storage::Int4 { codes, scales, group, shape } })
    }

    /// Rows `first .. first + count`, sharing the storage.
    ///
    /// # Errors
    /// Names the FP8 tensor in which they begin within a block that shares a scale, unless all rows share it.
    ///
    /// # Panics
    /// Where the rows do not exist.
    pub fn part(&self, first: usize, count: usize) -> Result<Self> {
        assert!(first + count <= self.rows, "rows of {self:?}");
        let shifted = |rows: &Stride| Stride { first: rows.at(first), ..*rows };
        let storage = match self.storage.clone() {
            Storage::Plain(tensor) => Storage::Plain(tensor.rows(first, count)),
            Storage::InputMajor(tensor, columns) => Storage::InputMajor(tensor, shifted(&columns)),
            Storage::Fp8 { values, scales, block, input_scale } if self.rows <= block[0] => {
                Storage::Fp8 { values: values.rows(first, count), scales, block, input_scale }
            }
            Storage::Fp8 { block: [block, _], .. } if !first.is_multiple_of(block) => {
                return Err(Error::SharedScale { name: self.name().into(), first, block });
            }
            Storage::Fp8 { values, scales, block, input_scale } => Storage::Fp8 {
                values: values.rows(first, count),
                scales: scales.rows(first / block[0], count.div_ceil(block[0])),
                block,
                input_scale,
            },
            Storage::Mxfp4 { blocks, scales, rows } => {
                Storage::Mxfp4 { blocks, scales, rows: shifted(&rows) }
            }
            Storage::Int4 { codes, scales, group, .. } => {
                let [codes, scales] = [codes, scales].map(|tensor| tensor.rows(first, count));
                Storage::Int4 { codes, scales, group, shape: None }
            }
        };
        Ok(Weight { rows: count, storage, ..self.clone() })
    }

    /// Name in messages: that of the tensor, unless [`Weight::renamed`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same matrix under another name.
    #[must_use]
    pub fn renamed(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the values are stored.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Stored bytes, scales included.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.storage {
            Storage::Plain(tensor) => tensor.bytes().len(),
            Storage::InputMajor(tensor, _) => self.len() * tensor.dtype().bitsize() / 8,
            Storage::Fp8 { values, scales, input_scale, .. } => {
                let input = input_scale.as_ref().map_or(0, |scale| scale.bytes().len());
                values.bytes().len() + scales.bytes().len() + input
            }
            Storage::Mxfp4 { .. } => self.len() / 2 + self.len() / MX_BLOCK,
            Storage::Int4 { codes, scales, shape, .. } => {
                let shape = shape.as_ref().map_or(0, |shape| shape.bytes().len());
                codes.bytes().len() + scales.bytes().len() + shape
            }
        };
        bytes as u64
    }

    /// Whether values are stored in fewer than 16 bits, with scales.
    pub fn is_packed(&self) -> bool {
        !matches!(self.storage, Storage::Plain(_) | Storage::InputMajor(..))
    }

    /// Whether the values lie in `stored`.
    pub fn is_part_of(&self, stored: &Tensor) -> bool {
        match &self.storage {
            Storage::Plain(tensor) | Storage::InputMajor(tensor, _) => tensor.is_part_of(stored),
            Storage::Fp8 { values, .. } => values.is_part_of(stored),
            Storage::Mxfp4 { blocks, .. } => blocks.is_part_of(stored),
            Storage::Int4 { codes, .. } => codes.is_part_of(stored),
        }
    }

    /// Type for numbers that replace this matrix, such as its factors: its own, or bf16 where it is packed.
    pub fn replacement_dtype(&self) -> Dtype {
        match &self.storage {
            Storage::Plain(tensor) | Storage::InputMajor(tensor, _) => tensor.dtype(),
            Storage::Fp8 { .. } | Storage::Mxfp4 { .. } | Storage::Int4 { .. } => Dtype::BF16,
        }
    }

    /// Errors unless the matrix is `[rows, cols]`.
    pub fn check_shape(&self, rows: usize, cols: usize) -> Result<()> {
        if (self.rows, self.cols) == (rows, cols) {
            return Ok(());
        }
        let (name, found) = (self.name().into(), vec![self.rows, self.cols]);
        Err(Error::Shape { name, found, expected: vec![rows, cols] })
    }

    /// Errors where a value is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        let first = |tensor: &Tensor, value: f32, bad: fn(u8) -> bool| {
            let name = tensor.name().into();
            match tensor.bytes().iter().position(|&b| bad(b)) {
                Some(index) => Err(Error::NonFinite { name, index, value }),
                None => Ok(()),
            }
        };
        match &self.storage {
            Storage::Plain(tensor) | Storage::InputMajor(tensor, _) => tensor.check_finite(),
            Storage::Fp8 { values, scales, .. } => {
                if scales.dtype() == Dtype::F8_E8M0 {
                    first(scales, f32::INFINITY, |code| code > E8M0_LARGEST_OF_FP8)?;
                } else {
                    scales.check_finite()?;
                    let is_too_large = |scale: &f32| !(scale * E4M3_LARGEST).is_finite();
                    if let Some(index) = scales.to_f32()?.iter().position(is_too_large) {
                        return Err(Error::NonFinite {
                            name: scales.name().into(),
                            index,
                            value: f32::INFINITY,
                        });
                    }
                }
                first(values, f32::NAN, |code| code & 0x7f == 0x7f)
            }
            Storage::Mxfp4 { scales, .. } => first(scales, f32::INFINITY, |code| code > E8M0_LARGEST),
            Storage::Int4 { scales, .. } => scales.check_finite(),
        }
    }

    /// Lets the operating system drop the pages.
    pub fn release(&self) {
        match &self.storage {
            Storage::Plain(tensor) | Storage::InputMajor(tensor, _) => tensor.release(),
            Storage::Fp8 { values: codes, scales, .. } | Storage::Int4 { codes, scales, .. } => {
                [codes, scales].into_iter().for_each(Tensor::release);
            }
            Storage::Mxfp4 { blocks, scales, .. } => [blocks, scales].into_iter().for_each(Tensor::release),
        }
    }

    /// Decodes the rows from `first` on into `out`, as many as it holds. Exact, but for FP8 values, where the product
    /// with the scale is rounded to f32.
    ///
    /// # Panics
    /// Where there are not so many rows.
    pub fn decode_rows(&self, first: usize, out: &mut [f32]) {
        if self.cols == 0 {
            return;
        }
        assert!(first + out.len().div_ceil(self.cols) <= self.rows, "rows of {}", self.name);
        match &self.storage {
            Storage::Plain(tensor) => {
                let start = first * self.cols * tensor.dtype().bitsize() / 8;
                let bytes = out.len() * tensor.dtype().bitsize() / 8;
                decode_f32(tensor.dtype(), &tensor.bytes()[start..start + bytes], out);
            }
            Storage::InputMajor(..) => self.decode_transposed(first, 0..self.cols, self.cols, out),
            Storage::Fp8 { .. } | Storage::Mxfp4 { .. } | Storage::Int4 { .. } => {
                for (r, out) in (first..).zip(out.chunks_mut(self.cols)) {
                    if let Some(row) = self.packed_row(r) {
                        row.decode(out);
                    }
                }
            }
        }
    }

    /// Some columns of a transposed matrix, rows that begin `stride` values apart; nothing of another. Inlined, so that
    /// it is compiled for the instructions of whoever calls it.
    #[inline(always)]
    pub(crate) fn decode_transposed(&self, first: usize, cols: Range<usize>, stride: usize, out: &mut [f32]) {
        let Storage::InputMajor(tensor, columns) = &self.storage else { return };
        let columns = Stride { first: columns.at(first), ..*columns };
        match tensor.dtype() {
            Dtype::F32 => gather(tensor, columns, cols, stride, out, f32::from_le_bytes),
            Dtype::F16 => {
                gather(tensor, columns, cols, stride, out, |b| half::f16::from_le_bytes(b).to_f32());
            }
            _ => gather(tensor, columns, cols, stride, out, |b| half::bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// Row `row` as it is stored, where there are such a row and codes.
    #[inline]
    pub(crate) fn packed_row(&self, row: usize) -> Option<PackedRow<'_>> {
        if row >= self.rows {
            return None;
        }
        match &self.storage {
            Storage::Plain(_) | Storage::InputMajor(..) => None,
            Storage::Fp8 { values, scales, block, .. } => {
                let codes = &values.bytes()[row * self.cols..(row + 1) * self.cols];
                let scales = Scales::new(scales).skip(row / block[0] * self.cols.div_ceil(block[1]));
                Some(PackedRow::Fp8 { codes, scales, block: block[1] })
            }
            Storage::Mxfp4 { blocks, scales, rows } => {
                let per_row = self.cols / MX_BLOCK;
                let range = rows.at(row) * per_row..(rows.at(row) + 1) * per_row;
                let blocks = &blocks.bytes().as_chunks().0[range.clone()];
                Some(PackedRow::Mxfp4 { blocks, scales: &scales.bytes()[range] })
            }
            Storage::Int4 { codes, scales, group, .. } => {
                let width = codes.bytes().len() / self.rows;
                let codes = &codes.bytes()[row * width..(row + 1) * width];
                let scales = Scales::new(scales).skip(row * self.cols.div_ceil(*group));
                Some(PackedRow::Int4 { codes, scales, group: *group })
            }
        }
    }

    /// All values, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        self.decode_rows(0, &mut values);
        values
    }

    /// The tensors that hold this matrix alone: `{stem}.weight` `[rows, cols]`, with `{stem}.weight_scale_inv` where it
    /// is FP8 (or `weight_scale`, as its scales were called, and the scale of its inputs, where there is one);
    /// `{stem}.weight_blocks` `[rows, cols / 32, 16]` and `{stem}.weight_scales` `[rows, cols / 32]` where it is MXFP4;
    /// `{stem}.weight_packed`, `{stem}.weight_scale` and `{stem}.weight_shape` where it is of four-bit integers. Values and
    /// scales are copied as they are.
    pub fn tensors(&self, stem: &str) -> Vec<Tensor> {
        let named = |tensor: Tensor, what: &str| tensor.renamed(format!("{stem}.{what}"));
        let select = |tensor: &Tensor, rows: Stride| {
            if rows == Stride::ALL && tensor.shape()[0] == self.rows {
                tensor.clone()
            } else {
                tensor.select_rows(&rows.indices(self.rows))
            }
        };
        match &self.storage {
            Storage::Plain(tensor) => vec![named(tensor.clone(), "weight")],
            Storage::InputMajor(tensor, columns) => {
                let bytes = match tensor.dtype() {
                    Dtype::F32 => transpose::<4>(tensor, *columns, self.rows),
                    _ => transpose::<2>(tensor, *columns, self.rows),
                };
                let shape = vec![self.rows, self.cols];
                vec![Tensor::owned(format!("{stem}.weight"), tensor.dtype(), shape, bytes)]
            }
            Storage::Fp8 { values, scales, input_scale, .. } => {
                let is_plain = scales.name().ends_with(".weight_scale");
                let scale_name = if is_plain { "weight_scale" } else { "weight_scale_inv" };
                let mut tensors = vec![named(values.clone(), "weight"), named(scales.clone(), scale_name)];
                if let Some(scale) = input_scale {
                    let name = scale.name().rsplit('.').next().unwrap_or_default().to_string();
                    tensors.push(named(scale.clone(), &name));
                }
                tensors
            }
            Storage::Mxfp4 { blocks, scales, rows } => vec![
                named(select(blocks, *rows), "weight_blocks"),
                named(select(scales, *rows), "weight_scales"),
            ],
            Storage::Int4 { codes, scales, shape, .. } => {
                let shape = shape.clone().map(|shape| named(shape, "weight_shape"));
                let own = [named(codes.clone(), "weight_packed"), named(scales.clone(), "weight_scale")];
                own.into_iter().chain(shape).collect()
            }
        }
    }
}

fn check_dtype(tensor: &Tensor, dtype: Dtype, expected: &'static str) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    let (name, found) = (tensor.name().into(), format!("{:?}", tensor.dtype()));
    Err(Error::Dtype { name, found, expected })
}

/// out[r, c] = tensor[cols.start + c, columns.at(r)], for a tensor of N-byte numbers and rows `stride` apart.
#[inline(always)]
fn gather<const N: usize>(
    tensor: &Tensor,
    columns: Stride,
    cols: Range<usize>,
    stride: usize,
    out: &mut [f32],
    value: impl Fn([u8; N]) -> f32,
) {
    let width = tensor.shape()[1];
    let (numbers, _) = tensor.bytes().as_chunks::<N>();
    let rows = out.len().div_ceil(stride);
    for (c, stored) in numbers[cols.start * width..].chunks_exact(width).enumerate().take(cols.len()) {
        for r in 0..rows {
            out[r * stride + c] = value(stored[columns.at(r)]);
        }
    }
}

/// The bytes of rows `columns.at(0)` … of the transposed tensor of N-byte numbers.
fn transpose<const N: usize>(tensor: &Tensor, columns: Stride, rows: usize) -> Vec<u8> {
    let width = tensor.shape()[1];
    let (numbers, _) = tensor.bytes().as_chunks::<N>();
    let row = |r: usize| numbers.chunks_exact(width).flat_map(move |stored| stored[columns.at(r)]);
    (0..rows).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::E4M3;

    fn decoded(weight: &Weight, first: usize, rows: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; rows * weight.cols()];
        weight.decode_rows(first, &mut out);
        out
    }

    /// Every second column of a transposed matrix, in every type, and the tensor that holds it alone.
    #[test]
    fn input_major_columns() {
        let values: Vec<f32> = (0..24).map(|i| i as f32 / 4.0).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let stored = Tensor::from_f32("w", dtype, vec![4, 6], &values);
            let weight = Weight::input_major(stored, Stride { first: 1, step: 2 }, 3).unwrap();
            assert_eq!((weight.rows(), weight.cols()), (3, 4));
            let expected: Vec<f32> =
                (0..3).flat_map(|r| (0..4).map(move |c| (c * 6 + 1 + 2 * r) as f32 / 4.0)).collect();
            assert_eq!(weight.to_f32(), expected);
            assert_eq!(decoded(&weight, 1, 2), expected[4..]);
            let alone = &weight.tensors("e")[0];
            assert_eq!((alone.name(), alone.to_f32().unwrap()), ("e.weight", expected));
            assert_eq!(weight.bytes(), alone.bytes().len() as u64);
        }
        let stored = Tensor::from_f32("w", Dtype::F32, vec![4, 6], &values);
        let error = Weight::input_major(stored, Stride { first: 1, step: 2 }, 4).unwrap_err().to_string();
        assert_eq!(error, "w has shape [4, 6], expected [4, 8]");
    }

    /// Some rows of a matrix are those rows, whichever way it is stored, unless they cut a block of scales in two.
    #[test]
    fn parts() {
        let (rows, cols) = (6, 32);
        let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 256) as u8 & 0xf7).collect();
        let values: Vec<f32> = codes.iter().map(|&code| f32::from(code)).collect();
        let fp8 = |scales: Vec<usize>, block: [usize; 2]| {
            let factors: Vec<f32> = (1..=scales.iter().product()).map(|i| i as f32).collect();
            let values = Tensor::owned("w.weight", Dtype::F8_E4M3, vec![rows, cols], codes.clone());
            Weight::fp8(values, Tensor::from_f32("w.scale", Dtype::F32, scales, &factors), block).unwrap()
        };
        let stored = |shape| Tensor::from_f32("w", Dtype::BF16, shape, &values);
        let two = |rows| Tensor::owned("b", Dtype::U8, vec![rows, 1, 16], &codes[..rows * 16]);
        let scales = Tensor::owned("s", Dtype::U8, vec![2 * rows, 1], (121..133).collect::<Vec<u8>>());
        let weights = [
            Weight::plain(stored(vec![rows, cols])).unwrap(),
            Weight::input_major(stored(vec![cols, rows]), Stride::ALL, rows).unwrap(),
            Weight::mxfp4(two(2 * rows), scales, Stride { first: 1, step: 2 }, rows).unwrap(),
            fp8(vec![3, 2], [2, 16]),
            fp8(vec![rows, 1], [1, cols]),
            fp8(vec![rows], [1, cols]),
            fp8(vec![], [rows, cols]),
            fp8(vec![1, 2], [128, 16]),
        ];
        for weight in &weights {
            let part = weight.part(2, 3).unwrap();
            assert_eq!((part.rows(), part.cols()), (3, cols));
            assert_eq!(part.to_f32(), weight.to_f32()[2 * cols..5 * cols], "{weight:?}");
        }
        // Unless all rows share a scale: then one of them has it too.
        assert_eq!(weights[7].part(3, 1).unwrap().to_f32(), weights[7].to_f32()[3 * cols..4 * cols]);
        let error = weights[3].part(3, 2).unwrap_err().to_string();
        let expected = "rows from 3 on share a block of scales with those before; expected a multiple of 2";
        assert_eq!(error, format!("w.weight: {expected}"));
    }

    /// Blocks that do not divide the matrix; the product with the scale is what f32 gives.
    #[test]
    fn fp8_blocks() {
        let codes: Vec<u8> = (0..5 * 7).map(|i| (i * 37 % 256) as u8).map(|c| c & !0x08).collect();
        let values = Tensor::owned("w.weight", Dtype::F8_E4M3, vec![5, 7], codes.clone());
        let factors = [0.1, 3.0e-5, 7.0, 1.0, 0.3, 12345.678];
        let scales = Tensor::from_f32("w.weight_scale_inv", Dtype::F32, vec![2, 3], &factors);
        let weight = Weight::fp8(values, scales, [3, 3]).unwrap();
        let value = |i: usize| E4M3[usize::from(codes[i])] * factors[i / 7 / 3 * 3 + i % 7 / 3];
        let expected: Vec<f32> = (0..35).map(value).collect();
        assert_eq!(weight.to_f32(), expected);
        assert_eq!(decoded(&weight, 3, 2), expected[21..]);
        assert_eq!((weight.bytes(), weight.replacement_dtype()), (35 + 24, Dtype::BF16));
        assert!(weight.check_finite().is_ok());
        let names: Vec<_> = weight.tensors("e").iter().map(|t| t.name().to_string()).collect();
        assert_eq!(names, ["e.weight", "e.weight_scale_inv"]);
        assert_eq!(weight.tensors("e").iter().map(Tensor::parameters).sum::<u64>(), 35);
    }

    /// One scale for the matrix or for each row, under the names and in the shapes that checkpoints have, and scales that
    /// are powers of two in one byte.
    #[test]
    fn fp8_scales_of_every_kind() {
        let codes: Vec<u8> = (0..6).map(|i| 0x31 + 9 * i).collect();
        let values = || Tensor::owned("w.weight", Dtype::F8_E4M3, vec![2, 3], codes.clone());
        let one = |shape: Vec<usize>| Tensor::from_f32("w.weight_scale", Dtype::BF16, shape, &[0.5]);
        let plain: Vec<f32> = codes.iter().map(|&c| E4M3[usize::from(c)]).collect();
        for shape in [vec![], vec![1], vec![1, 1]] {
            let weight = Weight::fp8(values(), one(shape.clone()), [2, 3]).unwrap();
            assert_eq!(weight.to_f32(), plain.iter().map(|v| v * 0.5).collect::<Vec<_>>());
            let input = Tensor::from_f32("w.input_scale", Dtype::F32, vec![], &[2.0]);
            let stored = weight.with_input_scale(input).tensors("e");
            let names: Vec<_> = stored.iter().map(Tensor::name).collect();
            assert_eq!(names, ["e.weight", "e.weight_scale", "e.input_scale"]);
            assert_eq!(stored[1].shape(), shape);
            assert_eq!(stored.iter().map(Tensor::parameters).sum::<u64>(), 6);
        }
        for shape in [vec![2], vec![2, 1]] {
            let rows = Tensor::from_f32("s", Dtype::F32, shape, &[3.0, 0.1]);
            let weight = Weight::fp8(values(), rows, [1, 3]).unwrap();
            let expected: Vec<f32> = (0..6).map(|i| plain[i] * [3.0, 0.1][i / 3]).collect();
            assert_eq!((weight.to_f32(), decoded(&weight, 1, 1)), (expected.clone(), expected[3..].to_vec()));
        }
        let powers = |codes: [u8; 4]| Tensor::owned("s", Dtype::F8_E8M0, vec![2, 2], codes);
        let weight = Weight::fp8(values(), powers([127, 130, 120, 0]), [1, 2]).unwrap();
        let factors = [1.0, 1.0, 8.0, 2f32.powi(-7), 2f32.powi(-7), 2f32.powi(-127)];
        assert_eq!(weight.to_f32(), plain.iter().zip(factors).map(|(v, f)| v * f).collect::<Vec<_>>());
        assert!(weight.check_finite().is_ok());
        let error =
            Weight::fp8(values(), powers([127, 255, 0, 0]), [1, 2]).unwrap().check_finite().unwrap_err();
        assert_eq!(error.to_string(), "s holds inf at flat index 1; weights must be finite");
    }

    #[test]
    fn fp8_that_is_not_finite_or_does_not_fit() {
        let values = |code: u8| Tensor::owned("w", Dtype::F8_E4M3, vec![1, 2], vec![0, code]);
        let scales = |shape: Vec<usize>| {
            let n: usize = shape.iter().product();
            Tensor::from_f32("s", Dtype::F32, shape, &vec![1.0; n])
        };
        let error = Weight::fp8(values(0xff), scales(vec![1, 1]), [128, 128]).unwrap().check_finite();
        assert_eq!(error.unwrap_err().to_string(), "w holds NaN at flat index 1; weights must be finite");
        let huge = Tensor::from_f32("s", Dtype::F32, vec![1, 1], &[1e37]);
        let error = Weight::fp8(values(0x7e), huge, [128, 128]).unwrap().check_finite();
        assert_eq!(error.unwrap_err().to_string(), "s holds inf at flat index 0; weights must be finite");
        let error = Weight::fp8(values(0), scales(vec![1, 2]), [128, 128]).unwrap_err().to_string();
        assert_eq!(error, "s has shape [1, 2], expected [1, 1]");
        let error = Weight::fp8(scales(vec![1, 1]), scales(vec![1, 1]), [128, 128]).unwrap_err().to_string();
        assert_eq!(error, "s has dtype F32, expected F8_E4M3");
    }

    /// Odd rows of a packed matrix, decoded and copied.
    #[test]
    fn mxfp4_rows() {
        let bytes: Vec<u8> = (0..4 * 2 * 16).map(|i| (i * 29 % 256) as u8).collect();
        let blocks = Tensor::owned("w_blocks", Dtype::U8, vec![4, 2, 16], bytes.clone());
        let scales = Tensor::owned("w_scales", Dtype::U8, vec![4, 2], (120..128).collect::<Vec<u8>>());
        let all = Weight::mxfp4(blocks.clone(), scales.clone(), Stride::ALL, 4).unwrap();
        let odd = Weight::mxfp4(blocks, scales, Stride { first: 1, step: 2 }, 2).unwrap();
        let everything = all.to_f32();
        assert_eq!(odd.to_f32(), [&everything[64..128], &everything[192..]].concat());
        assert_eq!(decoded(&odd, 1, 1), everything[192..]);
        // Value 3 of row 1: high half of byte 1 of block 2, scale 2^(122 − 127).
        let code = usize::from(bytes[2 * 16 + 1] >> 4);
        assert_eq!(everything[64 + 3], crate::checkpoint::E2M1[code] / 32.0);
        let alone = odd.tensors("e");
        assert_eq!(alone[0].name(), "e.weight_blocks");
        assert_eq!(alone[0].bytes(), [&bytes[32..64], &bytes[96..]].concat());
        assert_eq!(alone[1].bytes(), [122, 123, 126, 127]);
        assert_eq!(alone.iter().map(|t| t.bytes().len() as u64).sum::<u64>(), odd.bytes());
        assert_eq!(alone.iter().map(Tensor::parameters).sum::<u64>(), 128);
    }
}
