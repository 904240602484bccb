//! The output folder: built in another place, a shard per layer, renamed when complete.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::{Error, Layout, Result};
use crate::architecture::Architecture;
use crate::checkpoint::{
    Checkpoint, Entry, Error as FileError, INDEX_FILE, MANIFEST_FILE, SINGLE_FILE, Shard, Tensor,
    copy_atomic, write_atomic, write_safetensors,
};
use crate::model::LayerSource;

/// Checkpoints up to this size are one file, as people expect of small ones.
const SINGLE_FILE_BYTES: u64 = 2 << 30;

/// The plan that made the folder.
pub(crate) const PLAN_FILE: &str = "moepress-plan.json";

/// Folder of the chat templates beside the usual one, as transformers names it.
const TEMPLATES_FOLDER: &str = "additional_chat_templates";

/// What [`crate::recover`] did to the weights of a folder, beside them.
pub(crate) const RECOVERY_FILE: &str = "moepress-recover.json";
/// Names the work that the folder is the result of, so that the same command finds it done.
const ORIGIN_FILE: &str = "moepress-origin.json";

/// Weights in other formats, which would contradict the new ones.
const WEIGHT_EXTENSIONS: [&str; 9] =
    ["safetensors", "bin", "pt", "pth", "gguf", "onnx", "h5", "msgpack", "ot"];

/// The folder under construction.
#[derive(Debug)]
pub(crate) struct Output {
    partial: PathBuf,
    shards: usize,
}

impl Output {
    /// The folder, built as `partial`, whose weights come in `shards` pieces.
    pub(crate) fn create(partial: PathBuf, shards: usize) -> Result<Self> {
        let io = |source| FileError::Io { path: partial.clone(), source };
        fs::create_dir_all(&partial).map_err(io)?;
        // What a killed run was writing must not end up in the result.
        for entry in fs::read_dir(&partial).map_err(io)?.flatten() {
            if entry.path().extension().is_some_and(|e| e == "incomplete") {
                fs::remove_file(entry.path()).map_err(io)?;
            }
        }
        Ok(Output { partial, shards })
    }

    /// Whether `target` is the finished result of the work that `mark` names, and no file of weights that it was made
    /// from has been changed since.
    pub(crate) fn is_complete(target: &Path, mark: &str, sources: &[&Checkpoint]) -> bool {
        let origin = target.join(ORIGIN_FILE);
        let made = fs::metadata(&origin).and_then(|found| found.modified());
        fs::read(&origin).is_ok_and(|found| found == mark.as_bytes())
            && made.is_ok_and(|time| sources.iter().all(|source| source.is_older_than(time)))
    }

    /// Errors unless `target` can be the name of a folder.
    pub(crate) fn check_name(target: &Path) -> Result<()> {
        let refuse = |what: &str| Err(Error::Output { path: target.into(), what: what.into() });
        // `folder/.` is called `folder`, but cannot be replaced.
        let ends_in_dot = target.as_os_str().as_encoded_bytes().ends_with(b"/.");
        if target.file_name().is_none() || ends_in_dot {
            return refuse("not the name of a folder");
        }
        let parent = parent(target);
        if !parent.is_dir() {
            return refuse("the folder that should hold it does not exist; create it first");
        }
        if target.is_symlink() {
            return refuse("is a symbolic link; name the folder itself or choose another --out");
        }
        Ok(())
    }

    /// Errors unless `target` can become a new folder; its name has been checked.
    pub(crate) fn check(target: &Path) -> Result<()> {
        let refuse = |what: &str| Err(Error::Output { path: target.into(), what: what.into() });
        let taken =
            target.exists() && fs::read_dir(target).map_or(true, |mut entries| entries.next().is_some());
        if taken {
            return refuse("exists already; remove it or choose another --out");
        }
        if is_mount_point(target, parent(target)) {
            return refuse("is a mount point, which cannot be replaced; choose a folder inside it");
        }
        Ok(())
    }

    /// File name of piece `index`.
    fn shard_name(&self, index: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", index + 1, self.shards)
    }

    /// Whether piece `index` is complete.
    pub(crate) fn has_shard(&self, index: usize) -> bool {
        self.partial.join(self.shard_name(index)).exists()
    }

    /// Writes piece `index`.
    pub(crate) fn write_shard(&self, index: usize, tensors: &[Tensor]) -> Result<()> {
        let path = self.partial.join(self.shard_name(index));
        Ok(write_safetensors(&path, &metadata(), tensors.iter().map(Entry::tensor).collect())?)
    }

    /// The tensors of piece `index`, mapped.
    pub(crate) fn shard(&self, index: usize) -> Result<Vec<Tensor>> {
        let shard = Arc::new(Shard::open(&self.partial.join(self.shard_name(index)))?);
        Ok(shard.tensors().collect())
    }

    /// Writes config, plan, mark and layout file and copies what else the source folder holds. Returns the bytes of all
    /// tensors.
    pub(crate) fn finish(
        &self,
        source: &Checkpoint,
        config: &str,
        manifest: Option<&str>,
        plan: Option<&str>,
        mark: &str,
    ) -> Result<u64> {
        self.copy_companions(source)?;
        write_atomic(&self.partial.join("config.json"), config.as_bytes())?;
        if let Some(plan) = plan {
            write_atomic(&self.partial.join(PLAN_FILE), plan.as_bytes())?;
        }
        write_atomic(&self.partial.join(ORIGIN_FILE), mark.as_bytes())?;
        if let Some(manifest) = manifest {
            write_atomic(&self.partial.join(MANIFEST_FILE), manifest.as_bytes())?;
        }
        self.finish_weights()
    }

    /// Puts the finished folder in its place.
    pub(crate) fn place(target: &Path, partial: &Path) -> Result<()> {
        let io = |source| Error::from(FileError::Io { path: target.into(), source });
        // An empty folder may be in the way; anything else was refused before the work began.
        if target.exists() {
            fs::remove_dir(target).map_err(io)?;
        }
        fs::rename(partial, target).map_err(io)
    }

    /// One file where it is small, an index over the pieces where it is not.
    fn finish_weights(&self) -> Result<u64> {
        let mut tensors = Vec::new();
        let mut map = BTreeMap::new();
        let mut bytes = 0;
        for index in 0..self.shards {
            for tensor in self.shard(index)? {
                bytes += tensor.bytes().len() as u64;
                map.insert(tensor.name().to_string(), self.shard_name(index));
                tensors.push(tensor);
            }
        }
        if bytes > SINGLE_FILE_BYTES {
            let index = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
            let text = serde_json::to_string_pretty(&index).unwrap_or_default() + "\n";
            write_atomic(&self.partial.join(INDEX_FILE), text.as_bytes())?;
            return Ok(bytes);
        }
        let path = self.partial.join(SINGLE_FILE);
        write_safetensors(&path, &metadata(), tensors.iter().map(Entry::tensor).collect())?;
        drop(tensors);
        for index in 0..self.shards {
            let path = self.partial.join(self.shard_name(index));
            fs::remove_file(&path).map_err(|source| FileError::Io { path, source })?;
        }
        Ok(bytes)
    }

    /// Copies tokeniser, chat templates, generation config, licence and the like.
    fn copy_companions(&self, source: &Checkpoint) -> Result<()> {
        copy_files(source.dir(), &self.partial, |path, name| {
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
            let replaced =
                ["config.json", MANIFEST_FILE, PLAN_FILE, RECOVERY_FILE, ORIGIN_FILE].contains(&name);
            !replaced && !WEIGHT_EXTENSIONS.contains(&extension) && !name.ends_with(".index.json")
        })?;
        let templates = source.dir().join(TEMPLATES_FOLDER);
        if !templates.is_dir() {
            return Ok(());
        }
        let to = self.partial.join(TEMPLATES_FOLDER);
        fs::create_dir_all(&to).map_err(|source| FileError::Io { path: to.clone(), source })?;
        copy_files(&templates, &to, |_, _| true)
    }
}

/// Copies the files in folder `from` that are wanted, by path and name, to folder `to`.
fn copy_files(from: &Path, to: &Path, is_wanted: impl Fn(&Path, &str) -> bool) -> Result<()> {
    let io = |source| Error::from(FileError::Io { path: from.into(), source });
    for entry in fs::read_dir(from).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if path.is_file() && is_wanted(&path, name) {
            copy_atomic(&path, &to.join(name))?;
        }
    }
    Ok(())
}

/// The tensors of a layer that are neither router nor routed experts, as stored.
pub(crate) fn other_tensors(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    source: &LayerSource,
) -> Vec<Tensor> {
    let (l, names) = (source.layer, &architecture.names);
    let prefix = names.layer(l);
    let own = checkpoint.tensors().filter(|t| t.name().starts_with(&prefix));
    let Some(moe) = source.moe() else { return own.cloned().collect() };
    let experts = names.experts(l);
    let routed = |t: &Tensor| {
        let (name, expert) = (t.name(), experts.iter().any(|prefix| t.name().starts_with(prefix)));
        expert && !names.is_of_images(name, l, moe.original_experts)
            || moe.router.tensors().chain(&moe.fused).any(|stored| stored.name() == name)
    };
    let both = names.with_images(l);
    let other = |t: &Tensor| match &both {
        // The row of text is the router's.
        Some([_, both, of_images]) if t.name() == both && t.shape().first() == Some(&2) => {
            t.entry(1).as_row().renamed(of_images.as_str())
        }
        _ => t.clone(),
    };
    own.filter(|t| !routed(t)).map(other).collect()
}

/// The tensors outside all layers.
pub(crate) fn outside_layers(
    checkpoint: &Checkpoint,
    architecture: &Architecture,
    layout: &Layout,
) -> Vec<Tensor> {
    let (names, layers) = (&architecture.names, architecture.layers.len());
    let prefixes: Vec<String> = (0..layers).map(|l| names.layer(l)).collect();
    let outside = |t: &&Tensor| !prefixes.iter().any(|p| t.name().starts_with(p));
    let wanted = |t: &&Tensor| layout.keeps_multi_token() || !names.is_multi_token(t.name(), layers);
    checkpoint.tensors().filter(outside).filter(wanted).cloned().collect()
}

fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether another file system begins at `target`, an existing folder in `parent`.
#[cfg(unix)]
fn is_mount_point(target: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(target), fs::metadata(parent)) {
        (Ok(target), Ok(parent)) => target.dev() != parent.dev(),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_mount_point(_: &Path, _: &Path) -> bool {
    false
}

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}
