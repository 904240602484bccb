//! One safetensors file, memory-mapped or held in memory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors, tensor::Metadata};

use super::fault::Watch;
use super::{Error, Result, Tensor};

/// One safetensors file, mapped or in memory; its header checked, its data untouched.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    /// Names the file should its map fail.
    _watch: Option<Watch>,
    map: Bytes,
    data_start: usize,
    header: Metadata,
    /// Size and time of the last change of the file when it was mapped.
    state: Option<(u64, Option<SystemTime>)>,
}

/// Where the bytes of a file lie.
#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl Shard {
    /// Maps `path` and checks its header: sizes, offsets and types must fit the file exactly.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    #[expect(unsafe_code, reason = "memory map")]
    pub fn open(path: &Path) -> Result<Self> {
        super::check_regular(path)?;
        let io = |source| Error::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?;
        let size = found.len();
        if size < 8 {
            let what = format!("{size} bytes are too few for a safetensors file");
            return Err(Error::Shard { path: path.into(), what });
        }
        // SAFETY: the map is read-only. Another process that truncates the file while it is mapped makes reads
        // fault, see `fault.rs`; that is the documented price of reading weights through a map.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let watch = Watch::new(&map, path);
        let shard = Shard::checked(path, Bytes::Mapped(map))?;
        Ok(Shard { state: Some((size, found.modified().ok())), _watch: Some(watch), ..shard })
    }

    /// A file's contents in memory, as [`super::safetensors_bytes`] gives them; messages call it `name`.
    ///
    /// # Errors
    /// Those of [`Shard::open`] about the contents.
    pub fn from_bytes(name: &Path, bytes: Vec<u8>) -> Result<Self> {
        Shard::checked(name, Bytes::Owned(bytes))
    }

    fn checked(path: &Path, map: Bytes) -> Result<Self> {
        let broken = |e: SafeTensorError| Error::Shard {
            path: path.into(),
            what: explain(&e, &map, map.len() as u64),
        };
        let (header_length, header) = SafeTensors::read_metadata(&map).map_err(broken)?;
        let data_start = 8 + header_length;
        Ok(Shard { path: path.into(), map, data_start, header, state: None, _watch: None })
    }

    /// Errors if the file is not as it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let Some(state) = self.state else { return Ok(()) };
        let found = std::fs::metadata(&self.path).map(|found| (found.len(), found.modified().ok()));
        if found.ok() == Some(state) { Ok(()) } else { Err(Error::Changed { path: self.path.clone() }) }
    }

    /// Size and time of the last change of the file when it was opened, for people and for comparison.
    pub(super) fn state(&self) -> String {
        let (size, changed) = self.state.unwrap_or((self.map.len() as u64, None));
        let since = changed.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let changed = since.map_or("unknown".into(), |d| format!("{}.{:09}", d.as_secs(), d.subsec_nanos()));
        format!("{size} bytes, changed at {changed}")
    }

    /// When the file was last changed, where that is known.
    pub(super) fn modified(&self) -> Option<SystemTime> {
        self.state?.1
    }

    /// Calls `see` with `count` evenly spaced blocks of the data, the first and the last one among them.
    pub(super) fn sample(&self, count: usize, mut see: impl FnMut(&[u8])) {
        const BLOCK: usize = 4096;
        let data = self.data();
        let last = data.len().saturating_sub(BLOCK);
        let count = count.clamp(2, data.len() / BLOCK + 2);
        for i in 0..count {
            let start = (last as u128 * i as u128 / (count as u128 - 1)) as usize;
            let end = data.len().min(start + BLOCK);
            see(&data[start..end]);
            self.release(start, end - start);
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the header, its length field included.
    pub fn header_bytes(&self) -> usize {
        self.data_start
    }

    /// Free-form metadata of the file.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Everything behind the header.
    pub fn data(&self) -> &[u8] {
        &self.map[self.data_start..]
    }

    /// The tensors of the file, in file order.
    pub fn tensors(self: &Arc<Self>) -> impl Iterator<Item = Tensor> {
        self.header.offset_keys().into_iter().filter_map(|name| {
            let info = self.header.info(&name)?;
            Some(Tensor::mapped(name, info.dtype, info.shape.clone(), self.clone(), info.data_offsets))
        })
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// Says that the file does not hold it.
    pub fn tensor(self: &Arc<Self>, name: &str) -> Result<Tensor> {
        let info = self.header.info(name).ok_or_else(|| Error::Shard {
            path: self.path.clone(),
            what: format!("holds no tensor `{name}`"),
        })?;
        Ok(Tensor::mapped(name.into(), info.dtype, info.shape.clone(), self.clone(), info.data_offsets))
    }

    /// Tells the operating system that `bytes` of the data will not be read again soon, so that streaming over
    /// a checkpoint keeps one layer resident and not the file.
    #[expect(unsafe_code, reason = "advice to the memory map")]
    pub(super) fn release(&self, start: usize, length: usize) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.map {
            // A fault also brings in its neighbourhood, up to a huge page, and with it tensors released before.
            const NEIGHBOURHOOD: usize = 2 << 20;
            let first = (self.data_start + start).saturating_sub(NEIGHBOURHOOD);
            let end = (self.data_start + start + length + NEIGHBOURHOOD).min(map.len());
            // SAFETY: the map is shared and never written, so dropped pages come back unchanged from the file.
            let _ =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, end - first) };
        }
        #[cfg(not(unix))]
        let _ = (start, length);
    }
}

fn explain(error: &SafeTensorError, map: &[u8], size: u64) -> String {
    let promised = || {
        let length = u64::from_le_bytes(map.get(..8)?.try_into().ok()?);
        let text = map.get(8..usize::try_from(length).ok()?.checked_add(8)?)?;
        let header: serde_json::Value = serde_json::from_slice(text).ok()?;
        let ends = header.as_object()?.values().filter_map(|t| t.get("data_offsets")?.get(1)?.as_u64());
        ends.max()?.checked_add(8)?.checked_add(length)
    };
    if map.starts_with(b"version https://git-lfs.github.com/spec/") {
        return "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`".into();
    }
    match error {
        SafeTensorError::MetadataIncompleteBuffer => match promised() {
            Some(end) if end > size => {
                format!("truncated: the header describes {end} bytes, the file has {size}")
            }
            Some(end) => format!("has {size} bytes, {} more than its header describes", size - end),
            None => "header and file size disagree".into(),
        },
        SafeTensorError::InvalidHeaderLength => {
            format!("truncated or not safetensors: the header is longer than the file ({size} bytes)")
        }
        other => format!("not a valid safetensors file: {other}"),
    }
}
