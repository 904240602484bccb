//! From the structures of the header to what a layer is made of.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::slice;

use super::types;
use crate::architecture::Activation;
use crate::backend::cuda::{DeviceMatrix, DeviceVector, Element, Error, Result};
use crate::backend::{Base, Expert, Linear, Matrix, Mlp};
use crate::checkpoint::{Dtype, Tensor, Weight};

pub(super) fn wrong(argument: impl Into<String>, found: impl Into<String>, expected: &str) -> Error {
    Error::Argument { argument: argument.into(), found: found.into(), expected: expected.into() }
}

/// Reads a structure that begins with its size; what the caller does not know of it is zero.
///
/// # Safety
/// `pointer` is null or points to as many bytes as its first field says; `T` is a structure of the header.
pub(super) unsafe fn sized<T: Copy>(pointer: *const T, what: &str) -> Result<T> {
    if pointer.is_null() {
        return Err(wrong(what, "null", "a structure"));
    }
    // SAFETY: the first field is the size.
    let size = unsafe { pointer.cast::<usize>().read() };
    if size < size_of::<usize>() || size > size_of::<T>() {
        let expected = format!("at most {} in this library", size_of::<T>());
        return Err(wrong(format!("{what}.struct_size"), size.to_string(), &expected));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `size` bytes are readable and fit; integers, floats and pointers may be zero.
    unsafe {
        value.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(pointer.cast(), size);
        Ok(value.assume_init())
    }
}

pub(super) fn count(value: impl Into<i64>, what: &str) -> Result<usize> {
    let value = value.into();
    usize::try_from(value).map_err(|_| wrong(what, value.to_string(), "0 or more"))
}

pub(super) fn element(dtype: i32) -> Result<Element> {
    match dtype {
        0 => Ok(Element::F32),
        1 => Ok(Element::F16),
        2 => Ok(Element::Bf16),
        other => Err(wrong("dtype", other.to_string(), "a moepress_dtype")),
    }
}

pub(super) fn activation(spec: &types::LayerSpec) -> Result<Activation> {
    let or = |value: f32, default: f32| if value == 0.0 { default } else { value };
    match spec.activation {
        0 => Ok(Activation::SwiGlu),
        1 => Ok(Activation::ClampedSwiGlu { limit: or(spec.limit, 7.0), slope: or(spec.slope, 1.702) }),
        2 => Ok(Activation::Relu),
        3 => Ok(Activation::GeluTanh),
        4 => Ok(Activation::GeGluTanh),
        5 => Ok(Activation::SquaredRelu),
        other => Err(wrong("activation", other.to_string(), "a moepress_activation")),
    }
}

/// A slice of `count` elements; empty where there are none.
///
/// # Safety
/// `pointer` is null or points to `count` elements.
pub(super) unsafe fn list<'a, T>(pointer: *const T, count: usize, what: &str) -> Result<&'a [T]> {
    match (pointer.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(wrong(what, "null", &format!("{count} elements"))),
        // SAFETY: the caller's promise.
        (false, _) => Ok(unsafe { slice::from_raw_parts(pointer, count) }),
    }
}

/// Host f32 values as a tensor; `None` for null.
///
/// # Safety
/// As for [`list`].
pub(super) unsafe fn tensor(pointer: *const f32, shape: &[usize], what: &str) -> Result<Option<Tensor>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let values = unsafe { list(pointer, shape.iter().product(), what) }?;
    Ok(Some(Tensor::from_f32(what, Dtype::F32, shape.to_vec(), values)))
}

/// Rows of `cols` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    data: *const c_void,
    shape: [usize; 2],
    stride: usize,
}

/// Where the pointers of experts point to.
pub(super) trait Source {
    type Matrix;
    type Vector;

    /// # Safety
    /// `rows` are readable in this source's memory.
    unsafe fn matrix(rows: Rows, element: Element, what: &str) -> Result<Self::Matrix>;

    /// # Safety
    /// `data` points to `len` values in this source's memory.
    unsafe fn vector(data: *const f32, len: usize, what: &str) -> Result<Self::Vector>;
}

/// Host memory.
pub(super) struct Host;

impl Source for Host {
    type Matrix = Weight;
    type Vector = Tensor;

    unsafe fn matrix(rows: Rows, element: Element, what: &str) -> Result<Weight> {
        let Rows { data, shape: [count, cols], stride } = rows;
        let dtype = match element {
            Element::F32 => Dtype::F32,
            Element::F16 => Dtype::F16,
            Element::Bf16 => Dtype::BF16,
        };
        let size = element.bytes();
        let mut bytes = Vec::with_capacity(count * cols * size);
        for row in 0..count {
            let start = data.cast::<u8>().wrapping_add(row * stride * size);
            // SAFETY: the caller's promise.
            bytes.extend_from_slice(unsafe { list(start, cols * size, what) }?);
        }
        Ok(Weight::plain(Tensor::owned(what, dtype, vec![count, cols], bytes))?)
    }

    unsafe fn vector(data: *const f32, len: usize, what: &str) -> Result<Tensor> {
        // SAFETY: the caller's promise.
        let found = unsafe { tensor(data, &[len], what) }?;
        found.ok_or_else(|| wrong(what, "null", &format!("{len} elements")))
    }
}

/// Device memory.
pub(super) struct Device;

impl Source for Device {
    type Matrix = DeviceMatrix;
    type Vector = DeviceVector;

    unsafe fn matrix(rows: Rows, _: Element, _: &str) -> Result<DeviceMatrix> {
        let Rows { data, shape: [rows, cols], stride } = rows;
        Ok(DeviceMatrix { address: data as u64, rows, cols, stride })
    }

    unsafe fn vector(data: *const f32, len: usize, _: &str) -> Result<DeviceVector> {
        Ok(DeviceVector { address: data as u64, len })
    }
}

/// What the experts of a layer share.
#[derive(Clone, Copy)]
pub(super) struct Common {
    pub(super) hidden: usize,
    pub(super) element: Element,
    pub(super) activation: Activation,
}

/// # Safety
/// The expert's pointers point to what the header says, in memory of `S`.
pub(super) unsafe fn expert<S: Source>(
    expert: &types::Expert,
    common: Common,
    what: &str,
) -> Result<Expert<S::Matrix, S::Vector>> {
    match expert.form {
        0 => Ok(Expert::None),
        1 => {
            let width = count(expert.width, &format!("{what}.width"))?;
            let Common { hidden, element, activation } = common;
            // SAFETY: the caller's promise.
            let map =
                |map, name, shape| unsafe { linear::<S>(map, shape, element, &format!("{what}.{name}")) };
            Ok(Expert::Mlp(Mlp {
                gate: map(&expert.gate, "gate", [width, hidden])?,
                up: activation.is_gated().then(|| map(&expert.up, "up", [width, hidden])).transpose()?,
                down: map(&expert.down, "down", [hidden, width])?,
                activation,
            }))
        }
        // SAFETY: the caller's promise.
        2 => Ok(Expert::Constant(unsafe {
            S::vector(expert.constant, common.hidden, &format!("{what}.constant"))
        }?)),
        3 => Ok(Expert::Alias(count(expert.alias_of, &format!("{what}.alias_of"))?)),
        other => Err(wrong(format!("{what}.form"), other.to_string(), "a moepress_expert_form")),
    }
}

/// # Safety
/// As for [`expert`].
unsafe fn linear<S: Source>(
    map: &types::Matrix,
    [out, input]: [usize; 2],
    element: Element,
    what: &str,
) -> Result<Linear<Matrix<S::Matrix>, S::Vector>> {
    let part = |data, shape, stride, name: &str| {
        // SAFETY: the caller's promise.
        unsafe { matrix::<S>(data, shape, stride, element, &format!("{what}.{name}")) }
    };
    let factors = || {
        let rank = count(map.rank, &format!("{what}.rank"))?;
        let u = part(map.weight, [out, rank], map.weight_stride, "weight")?;
        Ok::<_, Error>((u, part(map.v, [rank, input], map.v_stride, "v")?))
    };
    let sparse_count = count(map.sparse_count, &format!("{what}.sparse_count"))?;
    if sparse_count > 0 && map.form != 1 {
        return Err(wrong(format!("{what}.sparse_count"), sparse_count.to_string(), "0: not low rank"));
    }
    let weight = match map.form {
        0 => Matrix::Dense(part(map.weight, [out, input], map.weight_stride, "weight")?),
        1 => {
            let (u, v) = factors()?;
            if sparse_count == 0 {
                Matrix::LowRank { u, v }
            } else {
                // SAFETY: the caller's promise.
                let rows = unsafe { list(map.sparse_rows, sparse_count, &format!("{what}.sparse_rows")) }?;
                let rows = rows.iter().map(|&row| row as u32).collect();
                let s = part(map.sparse, [sparse_count, input], map.sparse_stride, "sparse")?;
                Matrix::LowRankRows { u, v, rows, s }
            }
        }
        2 => {
            let (u, v) = factors()?;
            Matrix::Delta { u, v }
        }
        other => return Err(wrong(format!("{what}.form"), other.to_string(), "a moepress_matrix_form")),
    };
    let bias = if map.bias.is_null() {
        None
    } else {
        // SAFETY: the caller's promise.
        Some(unsafe { S::vector(map.bias, out, &format!("{what}.bias")) }?)
    };
    Ok(Linear { weight, bias })
}

/// # Safety
/// As for [`expert`].
unsafe fn matrix<S: Source>(
    data: *const c_void,
    shape: [usize; 2],
    stride: i64,
    element: Element,
    what: &str,
) -> Result<S::Matrix> {
    let [rows, cols] = shape;
    if data.is_null() && rows * cols > 0 {
        return Err(wrong(what, "null", &format!("a matrix {shape:?}")));
    }
    let stride = match count(stride, &format!("{what}_stride"))? {
        0 => cols,
        stride if stride < cols => {
            return Err(wrong(format!("{what}_stride"), stride.to_string(), &format!("{cols} or more")));
        }
        stride => stride,
    };
    // SAFETY: the caller's promise.
    unsafe { S::matrix(Rows { data, shape, stride }, element, what) }
}

/// The bases of a layer.
///
/// # Safety
/// As for [`expert`].
pub(super) unsafe fn bases<S: Source>(
    spec: &types::LayerSpec,
    hidden: usize,
    element: Element,
) -> Result<Base<S::Matrix>> {
    if spec.bases.is_null() {
        return Ok([None, None, None]);
    }
    let width = count(spec.base_width, "base_width")?;
    let base = |i: usize, shape: [usize; 2]| {
        // SAFETY: three matrices, by the caller's promise.
        let found = unsafe { &*spec.bases.add(i) };
        if found.weight.is_null() {
            return Ok(None);
        }
        // SAFETY: as above.
        unsafe {
            matrix::<S>(found.weight, shape, found.weight_stride, element, &format!("bases[{i}].weight"))
        }
        .map(Some)
    };
    Ok([base(0, [width, hidden])?, base(1, [width, hidden])?, base(2, [hidden, width])?])
}
