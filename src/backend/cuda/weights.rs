//! Where the weights of a layer come from: the host, to be copied, or the device, to be used where they lie.

use rayon::prelude::*;

use super::arena::Arena;
use super::{Element, Error, Result};
use crate::checkpoint::{Tensor, Weight, encode_f32};

/// A matrix `[rows, cols]` in device memory, of the layer's element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMatrix {
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Output width.
    pub rows: usize,
    /// Input width.
    pub cols: usize,
    /// Elements from one row to the next: at least `cols`, and a multiple of 16 bytes.
    pub stride: usize,
}

/// A vector of f32 in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceVector {
    /// Address of the first element, a multiple of 4.
    pub address: u64,
    /// Number of elements.
    pub len: usize,
}

/// A matrix that a layer can be made of.
#[derive(Clone, Copy, Debug)]
pub enum LayerMatrix<'a> {
    /// On the host: will be copied, in the layer's element type.
    Host(&'a Weight),
    /// On the device: will be used where it lies.
    Device(DeviceMatrix),
}

/// A vector that a layer can be made of.
#[derive(Clone, Copy, Debug)]
pub enum LayerVector<'a> {
    /// On the host: will be copied as f32.
    Host(&'a Tensor),
    /// On the device: will be used where it lies.
    Device(DeviceVector),
}

impl<'a> From<&'a Weight> for LayerMatrix<'a> {
    fn from(weight: &'a Weight) -> Self {
        LayerMatrix::Host(weight)
    }
}

impl From<&DeviceMatrix> for LayerMatrix<'_> {
    fn from(matrix: &DeviceMatrix) -> Self {
        LayerMatrix::Device(*matrix)
    }
}

impl<'a> From<&'a Tensor> for LayerVector<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        LayerVector::Host(tensor)
    }
}

impl From<&DeviceVector> for LayerVector<'_> {
    fn from(vector: &DeviceVector) -> Self {
        LayerVector::Device(*vector)
    }
}

/// Where a matrix lies on the device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Placed {
    pub(super) address: u64,
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

impl LayerMatrix<'_> {
    pub(super) fn rows(&self) -> usize {
        match self {
            LayerMatrix::Host(weight) => weight.rows(),
            LayerMatrix::Device(matrix) => matrix.rows,
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            LayerMatrix::Host(weight) => weight.cols(),
            LayerMatrix::Device(matrix) => matrix.cols,
        }
    }
}

/// Lays matrices of `cols` columns over each other, each from its row of the result on, with rows of zeros between them.
/// Those of the host are copied; those of the device must lie like that. `what` names them in errors.
pub(super) fn stack(
    parts: &[(usize, LayerMatrix<'_>)],
    cols: usize,
    element: Element,
    what: &str,
    arena: &mut Arena<'_>,
) -> Result<Placed> {
    let parts: Vec<_> =
        parts.iter().copied().filter(|(_, matrix)| matrix.rows() * matrix.cols() > 0).collect();
    let host: Vec<_> = parts
        .iter()
        .filter_map(|&(row, matrix)| match matrix {
            LayerMatrix::Host(weight) => Some((row, weight)),
            LayerMatrix::Device(_) => None,
        })
        .collect();
    if parts.is_empty() {
        Ok(Placed::default())
    } else if host.len() == parts.len() {
        copied(&host, cols, element, arena)
    } else if host.is_empty() {
        borrowed(&parts, element, what)
    } else {
        Err(Error::argument(what, "partly on the host, partly on the device", "all on one of them"))
    }
}

fn copied(
    parts: &[(usize, &Weight)],
    cols: usize,
    element: Element,
    arena: &mut Arena<'_>,
) -> Result<Placed> {
    let stride = cols.next_multiple_of(8);
    let rows = parts.iter().map(|(row, weight)| row + weight.rows()).max().unwrap_or(0);
    let row_bytes = stride * element.bytes();
    let fill = || {
        let mut bytes = vec![0; rows * row_bytes];
        for &(first, weight) in parts {
            let target = &mut bytes[first * row_bytes..][..weight.rows() * row_bytes];
            target.par_chunks_exact_mut(row_bytes).enumerate().for_each(|(r, target)| {
                let mut values = vec![0.0; cols];
                weight.decode_rows(r, &mut values);
                target[..cols * element.bytes()].copy_from_slice(&encode_f32(element.dtype(), &values));
            });
            weight.release();
        }
        Ok(bytes)
    };
    Ok(Placed { address: arena.put(rows, row_bytes, fill)?, stride })
}

fn borrowed(parts: &[(usize, LayerMatrix<'_>)], element: Element, what: &str) -> Result<Placed> {
    let mut found = parts.iter().filter_map(|&(row, matrix)| match matrix {
        LayerMatrix::Device(matrix) => Some((row, matrix)),
        LayerMatrix::Host(_) => None,
    });
    let Some((row, first)) = found.next() else { return Ok(Placed::default()) };
    check_rows(what, first.address, first.stride, first.cols, element)?;
    let row_bytes = (first.stride * element.bytes()) as u64;
    let start = first.address.wrapping_sub(row as u64 * row_bytes);
    for (row, matrix) in found {
        let expected = start.wrapping_add(row as u64 * row_bytes);
        if (matrix.address, matrix.stride) != (expected, first.stride) {
            return Err(Error::argument(
                what,
                format!("address {:#x}, stride {}", matrix.address, matrix.stride),
                format!("address {expected:#x}, stride {}: row {row} of one matrix", first.stride),
            ));
        }
    }
    Ok(Placed { address: start, stride: first.stride })
}

/// Errors unless rows of `cols` elements lie as the kernels read them.
pub(super) fn check_rows(
    what: &str,
    address: u64,
    stride: usize,
    cols: usize,
    element: Element,
) -> Result<()> {
    if address == 0 || !address.is_multiple_of(16) {
        return Err(Error::argument(what, format!("address {address:#x}"), "a multiple of 16, not null"));
    }
    let step = 16 / element.bytes();
    if stride < cols || !stride.is_multiple_of(step) || i32::try_from(stride).is_err() {
        let expected = format!("a multiple of {step} elements, {cols} or more");
        return Err(Error::argument(what, format!("stride {stride}"), expected));
    }
    Ok(())
}

/// The address of a vector of f32 of this length.
pub(super) fn place_vector(
    vector: LayerVector<'_>,
    length: usize,
    what: &str,
    arena: &mut Arena<'_>,
) -> Result<u64> {
    let found = match vector {
        LayerVector::Host(tensor) => tensor.len(),
        LayerVector::Device(vector) => vector.len,
    };
    if found != length {
        return Err(Error::argument(what, format!("{found} elements"), length.to_string()));
    }
    match vector {
        LayerVector::Host(tensor) => {
            arena.put(length, 4, || Ok(encode_f32(Element::F32.dtype(), &tensor.to_f32()?)))
        }
        LayerVector::Device(vector) if vector.address == 0 || !vector.address.is_multiple_of(4) => {
            Err(Error::argument(what, format!("address {:#x}", vector.address), "a multiple of 4, not null"))
        }
        LayerVector::Device(vector) => Ok(vector.address),
    }
}
