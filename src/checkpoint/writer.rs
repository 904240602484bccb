//! Writes safetensors files whose bytes depend on nothing but their contents.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{AtomicFile, CACHE_LINE, Dtype, Result, Tensor};

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
    let header = sorted_header(metadata, &mut entries);
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
    let mut bytes = sorted_header(metadata, &mut entries);
    for entry in &entries {
        bytes.extend_from_slice(&entry.bytes);
    }
    bytes
}

/// A safetensors file whose tensors are written in pieces, in any order: for results that need not be in memory at one
/// time. The bytes are those that [`write_safetensors`] would write.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    /// Where the data of every tensor begins and ends in the file.
    places: BTreeMap<String, (u64, u64)>,
    /// Where the next byte goes.
    position: u64,
}

impl SafetensorsWriter {
    /// Begins `path` with the header of `metadata` and `tensors`: name, element type, shape.
    ///
    /// # Errors
    /// Names the file.
    pub fn create(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        mut tensors: Vec<(String, Dtype, Vec<usize>)>,
    ) -> Result<Self> {
        tensors.sort_by(|a, b| order((a.1, &a.0), (b.1, &b.0)));
        let bytes = |dtype: Dtype, shape: &[usize]| shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let described = tensors.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.as_slice()));
        let described: Vec<_> =
            described.map(|(n, dtype, shape)| (n, dtype, shape, bytes(dtype, shape))).collect();
        let header = header(metadata, &described);
        let mut file = AtomicFile::create(path)?;
        file.write_all(&header)?;
        let position = header.len() as u64;
        let mut end = position;
        let places = described.iter().map(|(name, _, _, bytes)| {
            let start = end;
            end += *bytes as u64;
            (name.to_string(), (start, end))
        });
        Ok(SafetensorsWriter { file, places: places.collect(), position })
    }

    /// Writes `bytes` to tensor `name`, from its byte `start` on.
    ///
    /// # Errors
    /// Names the file.
    ///
    /// # Panics
    /// Where the tensor has no such bytes: that is a mistake of the caller, not of any input.
    pub fn write(&mut self, name: &str, start: u64, bytes: &[u8]) -> Result<()> {
        let (first, end) = self.places[name];
        assert!(first + start + bytes.len() as u64 <= end, "bytes of {name}");
        if self.position != first + start {
            self.file.seek(first + start)?;
        }
        self.file.write_all(bytes)?;
        self.position = first + start + bytes.len() as u64;
        Ok(())
    }

    /// Flushes to disk and renames to the final name.
    ///
    /// # Errors
    /// Names the file; it is then as it was before.
    pub fn commit(self) -> Result<()> {
        self.file.commit()
    }
}

/// Tensors are ordered by alignment, then name.
fn order(a: (Dtype, &str), b: (Dtype, &str)) -> Ordering {
    b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1))
}

/// The entries in file order, and the header.
fn sorted_header(metadata: &BTreeMap<String, String>, entries: &mut [Entry<'_>]) -> Vec<u8> {
    entries.sort_by(|a, b| order((a.dtype, &a.name), (b.dtype, &b.name)));
    let described = entries.iter().map(|e| (e.name.as_str(), e.dtype, e.shape.as_slice(), e.bytes.len()));
    header(metadata, &described.collect::<Vec<_>>())
}

/// Bytes of the length field before the header.
const LENGTH: usize = size_of::<u64>();

/// The header with its length field, of tensors given by name, type, shape and bytes. Metadata is ordered by key (the
/// `safetensors` crate writes it in hash order).
fn header(metadata: &BTreeMap<String, String>, tensors: &[(&str, Dtype, &[usize], usize)]) -> Vec<u8> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut start = 0;
    for (name, dtype, shape, bytes) in tensors {
        let end = start + bytes;
        let described = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        header.insert((*name).into(), described);
        start = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data begins on a cache line: rows of mapped matrices then do not straddle two.
    let begin = (LENGTH + header.len()).next_multiple_of(CACHE_LINE);
    header.resize(begin - LENGTH, b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_begins_on_a_cache_line() {
        for length in 0..CACHE_LINE {
            let name = "n".repeat(length);
            let bytes = safetensors_bytes(&BTreeMap::new(), vec![Entry::u8(&name, vec![3], &[1, 2, 3])]);
            assert_eq!((bytes.len() - 3) % CACHE_LINE, 0);
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.tensor(&name).unwrap().data(), [1, 2, 3]);
        }
    }
}
