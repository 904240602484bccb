//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{Error, Result};

/// A file under construction beside its final place. Dropped without [`AtomicFile::commit`], it disappears.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    writer: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts writing what will become `target`.
    ///
    /// # Errors
    /// Names the file that could not be created.
    pub fn create(target: &Path) -> Result<Self> {
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".incomplete");
        let temporary = target.with_file_name(name);
        let file =
            File::create(&temporary).map_err(|source| Error::Io { path: temporary.clone(), source })?;
        let writer = Some(BufWriter::with_capacity(1 << 20, file));
        Ok(AtomicFile { target: target.into(), temporary, writer })
    }

    /// Appends `bytes`.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.write_all(bytes).map_err(|source| Error::Io { path: self.temporary.clone(), source })
    }

    /// Flushes to disk and renames to the final name.
    ///
    /// # Errors
    /// Names the file; the target is then as it was before.
    pub fn commit(mut self) -> Result<()> {
        let finish = |writer: BufWriter<File>, temporary: &Path, target: &Path| -> std::io::Result<()> {
            writer.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(temporary, target)
        };
        let Some(writer) = self.writer.take() else { return Ok(()) };
        finish(writer, &self.temporary, &self.target).map_err(|source| {
            let _ = fs::remove_file(&self.temporary);
            Error::Io { path: self.target.clone(), source }
        })
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file atomically.
///
/// # Errors
/// Names the file; it is then as it was before.
pub fn write_atomic(path: &Path, contents: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(contents)?;
    file.commit()
}
