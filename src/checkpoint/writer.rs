//! Writes safetensors files whose bytes depend on nothing but their contents.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AtomicFile, Dtype, Result, Tensor};

/// One tensor to be written.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
    /// The stored tensor that the bytes come from, if they do.
    source: Option<&'a Tensor>,
}

impl<'a> Entry<'a> {
    /// A tensor under its own name, its bytes unchanged.
    pub fn tensor(tensor: &'a Tensor) -> Self {
        Entry {
            name: tensor.name().into(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            bytes: Cow::Borrowed(tensor.bytes()),
            source: Some(tensor),
        }
    }

    /// f64 values.
    pub fn f64(name: impl Into<String>, shape: Vec<usize>, values: &'a [f64]) -> Self {
        Entry {
            name: name.into(),
            dtype: Dtype::F64,
            shape,
            bytes: Cow::Borrowed(bytemuck::must_cast_slice(values)),
            source: None,
        }
    }

    /// f32 values.
    pub fn f32(name: impl Into<String>, shape: Vec<usize>, values: &'a [f32]) -> Self {
        Entry {
            name: name.into(),
            dtype: Dtype::F32,
            shape,
            bytes: Cow::Borrowed(bytemuck::must_cast_slice(values)),
            source: None,
        }
    }

    /// i32 values.
    pub fn i32(name: impl Into<String>, shape: Vec<usize>, values: &'a [i32]) -> Self {
        Entry {
            name: name.into(),
            dtype: Dtype::I32,
            shape,
            bytes: Cow::Borrowed(bytemuck::must_cast_slice(values)),
            source: None,
        }
    }

    /// u8 values.
    pub fn u8(name: impl Into<String>, shape: Vec<usize>, values: &'a [u8]) -> Self {
        Entry { name: name.into(), dtype: Dtype::U8, shape, bytes: Cow::Borrowed(values), source: None }
    }
}

/// Writes `entries` to `path`, atomically. Tensors are ordered by alignment, then name, so equal contents give equal files.
///
/// # Errors
/// Names the file; it is then as it was before.
pub fn write_safetensors(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    mut entries: Vec<Entry<'_>>,
) -> Result<()> {
    let header = header(metadata, &mut entries);
    let mut file = AtomicFile::create(path)?;
    file.write_all(&header)?;
    for entry in &entries {
        file.write_all(&entry.bytes)?;
        // What was copied from a mapped file need not stay in memory.
        entry.source.iter().for_each(|tensor| tensor.release());
    }
    file.commit()
}

/// What [`write_safetensors`] would write, in memory.
pub fn safetensors_bytes(metadata: &BTreeMap<String, String>, mut entries: Vec<Entry<'_>>) -> Vec<u8> {
    let mut bytes = header(metadata, &mut entries);
    for entry in &entries {
        bytes.extend_from_slice(&entry.bytes);
    }
    bytes
}

/// The header with its length field. Orders the entries by alignment, then name, and metadata by key (the
/// `safetensors` crate writes metadata in hash order).
fn header(metadata: &BTreeMap<String, String>, entries: &mut [Entry<'_>]) -> Vec<u8> {
    entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0;
    for entry in entries {
        let end = start + entry.bytes.len();
        header.insert(
            entry.name.clone(),
            json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end] }),
        );
        start = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data begins on a multiple of eight bytes, as readers that cast in place expect.
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header].concat()
}
