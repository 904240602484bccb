//! Checkpoints on disk: memory-mapped safetensors, one file or shards with an index, read lazily; and the
//! atomic writer for everything that moepress puts out.

mod atomic;
mod error;
mod fault;
mod interrupt;
mod manifest;
mod packed;
mod packed_row;
mod shard;
mod tensor;
mod weight;
mod writer;

pub use atomic::{AtomicFile, write_atomic};
pub(crate) use atomic::{copy_atomic, open_locked};
pub use error::Error;
pub use fault::signals_become_messages;
pub use manifest::{ExpertEntry, ExpertForm, LayerEntry, Manifest, MatrixRanks};
pub use packed::{E2M1, E4M3, e8m0};
pub(crate) use packed::{E2M1_BF16, decode_mxfp4, e4m3};
pub(crate) use packed_row::PackedRow;
pub use safetensors::Dtype;
pub use shard::Shard;
pub use tensor::{Tensor, decode_f32, encode_f32, encode_f64};
pub use weight::{Storage, Stride, Weight};
pub use writer::{Entry, SafetensorsWriter, safetensors_bytes, write_safetensors};

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// Bytes of a cache line, which matrices that are written or held in memory begin on: kernels are faster on rows that do not
/// straddle two.
const CACHE_LINE: usize = 64;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Name of the shard index in a checkpoint folder.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the single weight file of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the file that marks the moepress layout.
pub const MANIFEST_FILE: &str = "moepress.json";

/// A checkpoint folder, opened: its config, and where every tensor lies. Weights stay on disk until asked for.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: String,
    manifest: Option<Manifest>,
    shards: Vec<Arc<Shard>>,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens the folder `dir`: reads `config.json`, the index and every shard's header, and maps the shards.
    ///
    /// # Errors
    /// Names the file that is missing, unreadable, truncated or inconsistent with the index.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        if !is_listed(&dir)? {
            return Err(Error::NoFolder { path: dir });
        }
        if !dir.is_dir() {
            return Err(Error::NotAFolder { path: dir });
        }
        let config = dir.join("config.json");
        if !is_listed(&config)? {
            return Err(Error::NoConfig { path: config });
        }
        let config = read_text(&config)?;
        let manifest = match dir.join(MANIFEST_FILE) {
            path if is_listed(&path)? => Some(Manifest::parse(&path, &read_text(&path)?)?),
            _ => None,
        };
        let index_path = dir.join(INDEX_FILE);
        let (shards, tensors) =
            if is_listed(&index_path)? { open_sharded(&dir, &index_path)? } else { open_single(&dir)? };
        Ok(Checkpoint { dir, config, manifest, shards, tensors })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The text of `config.json`, byte for byte.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// The contents of `moepress.json`, where the folder has the moepress layout.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The tensor called `name`, still on disk.
    ///
    /// # Errors
    /// Says which tensor is missing.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.get(name)
            .cloned()
            .ok_or_else(|| Error::MissingTensor { dir: self.dir.clone(), name: name.into() })
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.values()
    }

    /// Number of tensors.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes().len() as u64).sum()
    }

    /// Files that the checkpoint is read from.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let named = ["config.json", MANIFEST_FILE, INDEX_FILE, "tokenizer.json", "tokenizer_config.json"];
        let shards = self.shards.iter().map(|shard| shard.path().to_path_buf());
        named
            .into_iter()
            .map(|name| self.dir.join(name))
            .filter(|path| is_listed(path).unwrap_or(false))
            .chain(shards)
    }

    /// One line per file of weights with its size and the time of its last change, as they were when it was opened: what
    /// an interrupted run leaves is of use only as long as this stays the same.
    pub fn file_states(&self) -> String {
        let name = |path: &Path| path.strip_prefix(&self.dir).unwrap_or(path).display().to_string();
        let line = |shard: &Arc<Shard>| format!("{}: {}\n", name(shard.path()), shard.state());
        self.shards.iter().map(line).collect()
    }

    /// Whether no file of weights has been changed after `time`.
    pub fn is_older_than(&self, time: SystemTime) -> bool {
        self.shards.iter().filter_map(|shard| shard.modified()).all(|changed| changed <= time)
    }

    /// Errors if a file of weights is not the one that was opened any more: whatever was computed from it is then a mixture
    /// of two checkpoints. Size and time of the last change are compared.
    ///
    /// # Errors
    /// Names the file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.check_unchanged())
    }

    /// Bytes of all safetensors headers.
    pub fn header_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.header_bytes() as u64).sum()
    }

    /// SHA-256, in hexadecimal, of the config, the layout file, every tensor's name, type and shape, and of blocks that are
    /// spread over the data: over all shards, and over the tensors of each type and shape, so that routers and norms are
    /// among them. Equal for two copies of a checkpoint, different for two checkpoints of one architecture, unless they
    /// differ in few bytes only. Reads 18 MiB at most.
    pub fn identity(&self) -> String {
        const BLOCKS: usize = 512;
        const BLOCK: usize = 4096;
        /// Most tensors of one type and shape, and in all.
        const EACH: usize = 64;
        const MOST: usize = 4096;
        let mut hash = Sha256::new();
        hash.update(self.config.as_bytes());
        if let Some(manifest) = &self.manifest {
            hash.update(manifest.to_json().as_bytes());
        }
        for tensor in self.tensors.values() {
            hash.update(format!("\n{} {:?} {:?}", tensor.name(), tensor.dtype(), tensor.shape()));
        }
        for shard in &self.shards {
            shard.sample(BLOCKS / self.shards.len(), |block| hash.update(block));
        }
        let mut alike: BTreeMap<String, Vec<&Tensor>> = BTreeMap::new();
        for tensor in self.tensors.values() {
            alike.entry(format!("{:?} {:?}", tensor.dtype(), tensor.shape())).or_default().push(tensor);
        }
        // Large groups first: what is in every layer comes before odd ones.
        let mut groups: Vec<_> = alike.into_values().collect();
        groups.sort_by_key(|group| Reverse(group.len()));
        let spread = groups.iter().flat_map(|group| {
            let count = group.len().min(EACH);
            (0..count).map(move |i| group[i * group.len() / count])
        });
        for tensor in spread.take(MOST) {
            let middle = tensor.bytes().len().saturating_sub(BLOCK) / 2;
            hash.update(&tensor.bytes()[middle..tensor.bytes().len().min(middle + BLOCK)]);
            tensor.release();
        }
        hex(&hash.finalize())
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether the folder has an entry of this name, be it a link to nothing: that is a broken checkpoint, not one
/// without the file.
///
/// # Errors
/// What the operating system says where it does not tell.
fn is_listed(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(source) => Err(Error::Io { path: path.into(), source }),
    }
}

/// Errors unless `path` is a regular file: reading anything else may never end.
fn check_regular(path: &Path) -> Result<()> {
    let found = std::fs::metadata(path).map_err(|source| Error::Io { path: path.into(), source })?;
    match found.file_type() {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(Error::NotAFile { path: path.into(), found: "a folder" }),
        _ => Err(Error::NotAFile { path: path.into(), found: "a pipe or a device" }),
    }
}

/// The contents of a regular file.
///
/// # Errors
/// What the operating system says, and anything that is no regular file: reading a pipe or a device may never end.
pub fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    match check_regular(path) {
        Ok(()) => std::fs::read(path),
        Err(Error::Io { source, .. }) => Err(source),
        Err(Error::NotAFile { found, .. }) => {
            Err(std::io::Error::other(format!("is {found}, expected a file")))
        }
        Err(other) => Err(std::io::Error::other(other)),
    }
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = read_file(path).map_err(|source| Error::Io { path: path.into(), source })?;
    String::from_utf8(bytes).map_err(|_| Error::NotUtf8 { path: path.into() })
}

type Opened = (Vec<Arc<Shard>>, BTreeMap<String, Tensor>);

fn open_single(dir: &Path) -> Result<Opened> {
    let path = dir.join(SINGLE_FILE);
    if !is_listed(&path)? {
        return Err(Error::NoWeights { path: dir.into() });
    }
    let shard = Arc::new(Shard::open(&path)?);
    let tensors = shard.tensors().map(|t| (t.name().to_string(), t)).collect();
    Ok((vec![shard], tensors))
}

fn open_sharded(dir: &Path, index_path: &Path) -> Result<Opened> {
    let invalid = |what: String| Error::Index { path: index_path.into(), what };
    let index: serde_json::Value =
        serde_json::from_str(&read_text(index_path)?).map_err(|e| invalid(format!("is not JSON: {e}")))?;
    let map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| invalid("has no object `weight_map`".into()))?;
    let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| invalid(format!("maps `{tensor}` to something not a string")))?;
        let plain = Path::new(file).components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if file.is_empty() || file.contains('\0') {
            return Err(invalid(format!("maps `{tensor}` to {file:?}, which is not the name of a file")));
        }
        if !plain {
            return Err(invalid(format!("maps `{tensor}` to `{file}`, which lies outside the folder")));
        }
        by_file.entry(file).or_default().push(tensor);
    }
    if by_file.is_empty() {
        return Err(invalid("lists no tensors".into()));
    }
    let mut shards = Vec::with_capacity(by_file.len());
    let mut tensors = BTreeMap::new();
    for (file, names) in by_file {
        let path = dir.join(file);
        let shard = Arc::new(Shard::open(&path)?);
        let mut present: BTreeMap<String, Tensor> =
            shard.tensors().map(|t| (t.name().to_string(), t)).collect();
        for name in names {
            let tensor = present
                .remove(name)
                .ok_or_else(|| invalid(format!("places `{name}` in {file}, which does not hold it")))?;
            tensors.insert(name.to_string(), tensor);
        }
        shards.push(shard);
    }
    Ok((shards, tensors))
}
