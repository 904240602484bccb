//! Files that appear whole or not at all.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::interrupt::Unfinished;
use super::{Error, Result};

/// A file under construction beside its final place, locked against other processes. Dropped without
/// [`AtomicFile::commit`], it disappears.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    writer: Option<BufWriter<File>>,
    /// Removes the file should the process be interrupted.
    unfinished: Unfinished,
}

impl AtomicFile {
    /// Starts writing what will become `target`. A symbolic link stays one: what it points to is replaced.
    ///
    /// # Errors
    /// Names the file that could not be created, is being written by another process, or is no regular file (a device
    /// or a pipe would be replaced, not written to).
    pub fn create(target: &Path) -> Result<Self> {
        let refuse = |kind, what: &str| {
            let source = io::Error::new(kind, what);
            Err(Error::Io { path: target.into(), source })
        };
        match fs::metadata(target) {
            Ok(found) if found.is_dir() => return refuse(io::ErrorKind::IsADirectory, "is a folder"),
            Ok(found) if !found.is_file() => {
                return refuse(io::ErrorKind::InvalidInput, "is not a regular file");
            }
            _ => {}
        }
        let target = if target.is_symlink() {
            fs::canonicalize(target).unwrap_or_else(|_| target.into())
        } else {
            target.into()
        };
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".incomplete");
        let temporary = target.with_file_name(name);
        let io = |source| Error::Io { path: temporary.clone(), source };
        // Only what is left of a killed run can be here, once the lock is held.
        let file = open_locked(&temporary).and_then(|file| file.set_len(0).map(|()| file)).map_err(io)?;
        let writer = Some(BufWriter::with_capacity(1 << 20, file));
        let unfinished = Unfinished::new(&temporary);
        Ok(AtomicFile { target, temporary, writer, unfinished })
    }

    /// Appends `bytes`.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.write_all(bytes).map_err(|source| Error::Io { path: self.temporary.clone(), source })
    }

    /// What follows goes to byte `position` of the file.
    pub(super) fn seek(&mut self, position: u64) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let sought = writer.seek(SeekFrom::Start(position));
        sought.map(|_| ()).map_err(|source| Error::Io { path: self.temporary.clone(), source })
    }

    /// Flushes to disk and renames to the final name.
    ///
    /// # Errors
    /// Names the file; the target is then as it was before.
    pub fn commit(mut self) -> Result<()> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        // Once it is renamed, the temporary name may be another process's.
        self.unfinished = Unfinished::none();
        let written = writer.flush().and_then(|()| writer.get_ref().sync_all());
        let committed = written.and_then(|()| fs::rename(&self.temporary, &self.target));
        if committed.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        // The lock goes with the file, after that: nobody else may take the temporary name before. A buffer that could not be
        // written is not tried again.
        let (file, _) = writer.into_parts();
        drop(file);
        committed.map_err(|source| Error::Io { path: self.target.clone(), source })?;
        sync_folder(&self.target);
        Ok(())
    }
}

/// Makes the new name of `file` last through a loss of power, where the system can: whoever goes on may remove what it was
/// made from.
fn sync_folder(file: &Path) {
    #[cfg(unix)]
    if let Some(folder) = file.parent() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
    }
    #[cfg(not(unix))]
    let _ = file;
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Taken apart, for its buffer must not be flushed, and removed while the lock is held.
            let (file, _) = writer.into_parts();
            let _ = fs::remove_file(&self.temporary);
            drop(file);
        }
    }
}

/// Opens `path` for writing, creating it where needed, and locks it until it is closed. Its contents stay.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`], with a message for people, where another process holds the lock.
pub(crate) fn open_locked(path: &Path) -> io::Result<File> {
    // Some network file systems do not know a file again, so that trying on and on could last for ever.
    const ATTEMPTS: usize = 100;
    // A process that has just been killed, or a child between its fork and its exec, holds a lock a moment longer.
    const PATIENCE: Duration = Duration::from_millis(200);
    let begun = Instant::now();
    for attempt in 1.. {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(PATIENCE / 10);
                continue;
            }
            Err(TryLockError::WouldBlock) => {
                let what = "another process is writing it; wait for that one or choose another --out";
                return Err(io::Error::new(io::ErrorKind::WouldBlock, what));
            }
            // File systems without locks are used as if alone.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // Whoever held the lock before may have renamed or removed the file since it was opened here.
        if is_at(&file, path) || attempt >= ATTEMPTS {
            return Ok(file);
        }
    }
    unreachable!("the last attempt returns")
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(there)) => (opened.dev(), opened.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// Copies a file; the copy appears whole or not at all, and can be written whatever the rights of the original.
///
/// # Errors
/// Names the file that cannot be read or the one that cannot be written.
pub(crate) fn copy_atomic(from: &Path, to: &Path) -> Result<()> {
    let io = |source| Error::Io { path: from.into(), source };
    let mut source = File::open(from).map_err(io)?;
    let mut copy = AtomicFile::create(to)?;
    let mut block = vec![0; 1 << 20];
    loop {
        match source.read(&mut block).map_err(io)? {
            0 => return copy.commit(),
            count => copy.write_all(&block[..count])?,
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn two_writers_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut first = AtomicFile::create(&path).unwrap();
        first.write_all(b"first").unwrap();
        let message = AtomicFile::create(&path).unwrap_err().to_string();
        assert!(message.contains("out.incomplete: another process is writing it"), "{message}");
        first.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(folder.path()), ["out"]);
    }

    #[test]
    fn what_a_killed_run_left_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("out.incomplete"), "half of something long").unwrap();
        write_atomic(&folder.path().join("out"), b"whole").unwrap();
        assert_eq!(fs::read(folder.path().join("out")).unwrap(), b"whole");
        drop(AtomicFile::create(&folder.path().join("out")).unwrap());
        assert_eq!(names(folder.path()), ["out"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_links_and_devices_devices() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "before").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        write_atomic(&link, b"after").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"after");
        let message = AtomicFile::create(Path::new("/dev/null")).unwrap_err().to_string();
        assert_eq!(message, "/dev/null: is not a regular file");
        let message = AtomicFile::create(folder.path()).unwrap_err().to_string();
        assert!(message.ends_with(": is a folder"), "{message}");
    }
}
