//! What a streamed pass leaves on disk after every layer, so that a stopped run goes on from there.

use std::fs;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::{Error, Result};
use crate::backend::Backend;
use crate::checkpoint::{AtomicFile, Checkpoint, open_locked, write_atomic};
use crate::model::Stream;
use crate::progress::Progress;

/// A folder beside the final output that holds the residual stream after the last finished layer. Its key names
/// everything that the contents depend on; a folder with another key is not used, nor one that was begun with other
/// states of the files of weights ([`Checkpoint::file_states`]). Locked against other processes.
/// Dropped before any layer is finished, it disappears.
#[derive(Debug)]
pub struct Residual {
    dir: PathBuf,
    key: String,
    sources: String,
    finished: bool,
    /// Held as long as the folder is in use; `None` once it is removed.
    lock: Option<fs::File>,
}

impl Residual {
    const KEY: &'static str = "key";
    const SOURCES: &'static str = "sources";
    const LOCK: &'static str = "lock";
    /// Begins the key of everything that moepress puts into such a folder.
    const MARK: &'static [u8] = b"moepress ";
    /// Stands before the key once the result is complete.
    const FINISHED: &'static str = "moepress finished\n";

    /// The folder for results that go to `out`: opened where it belongs to the same work on the same files, made anew
    /// otherwise. `progress` hears where finished layers are thrown away. `key` begins with `moepress `.
    ///
    /// # Errors
    /// Names the folder that cannot be created or cleared, is in use by another process, or holds something that
    /// moepress did not put there.
    pub fn open(out: &Path, key: &str, sources: &[&Checkpoint], progress: &mut dyn Progress) -> Result<Self> {
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let dir = out.with_file_name(name);
        let lock = Residual::lock(&dir)?;
        let sources = sources.iter().map(|checkpoint| checkpoint.file_states()).collect();
        let mut work = Residual { dir, key: key.into(), sources, finished: false, lock: Some(lock) };
        let found = fs::read(work.path(Residual::KEY)).unwrap_or_default();
        work.finished = found == work.finished_key();
        let same_work = work.finished || found == key.as_bytes();
        let states = fs::read_to_string(work.path(Residual::SOURCES)).unwrap_or_default();
        if same_work && states == work.sources {
            return Ok(work);
        }
        if !work.is_disposable()? {
            let dir = work.dir.display();
            let changed = work.sources.lines().find(|line| !states.lines().any(|known| known == *line));
            progress.warn(&match changed.and_then(|line| line.rsplit_once(": ")) {
                Some((file, _)) if same_work => {
                    format!("{dir}: {file} is not as it was when this was begun; starting afresh")
                }
                _ => format!("{dir}: belongs to other work (another model, text or option); starting afresh"),
            });
        }
        work.begin()?;
        Ok(work)
    }

    /// Empties the folder, to begin with the first layer.
    ///
    /// # Errors
    /// Names the file that cannot be removed.
    pub fn begin(&mut self) -> Result<()> {
        self.finished = false;
        self.clear(b"moepress removes this\n")?;
        write_atomic(&self.path(Residual::SOURCES), self.sources.as_bytes())?;
        Ok(write_atomic(&self.path(Residual::KEY), self.key.as_bytes())?)
    }

    /// Records that the result is complete, before it is moved to its place: a run that is killed between that and
    /// [`Residual::remove`] is not to be done again.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        self.finished = true;
        Ok(write_atomic(&self.path(Residual::KEY), &self.finished_key())?)
    }

    /// Whether an earlier run came to [`Residual::finish`].
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn finished_key(&self) -> Vec<u8> {
        [Residual::FINISHED, &self.key].concat().into_bytes()
    }

    /// Creates `dir` where needed and locks it.
    fn lock(dir: &Path) -> Result<fs::File> {
        let io = |source| Error::from(crate::checkpoint::Error::Io { path: dir.into(), source });
        loop {
            match fs::create_dir(dir) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Residual::check_own(dir)?,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    let what = "is in the way: work in progress goes there; move it or choose another --out";
                    return Err(Error::File { path: dir.into(), what: what.into() });
                }
                Err(e) => return Err(io(e)),
            }
            match open_locked(&dir.join(Residual::LOCK)) {
                Ok(lock) => return Ok(lock),
                // Another process has just finished and removed the folder.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(io(e)),
            }
        }
    }

    /// Removes everything but the key and the lock. The key becomes `key` first: killed on the way, a run leaves a
    /// folder that is known for what it is, and from which nobody goes on.
    fn clear(&self, key: &[u8]) -> Result<()> {
        write_atomic(&self.path(Residual::KEY), key)?;
        for path in self.entries()?.into_iter().filter(|path| !is_named(path, Residual::KEY)) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|source| crate::checkpoint::Error::Io { path, source })?;
        }
        Ok(())
    }

    /// Removes the folder and what is in it, the lock last.
    fn remove_all(&self) -> Result<()> {
        self.clear(&self.finished_key())?;
        let removed = fs::remove_file(self.path(Residual::KEY))
            .and_then(|()| fs::remove_file(self.path(Residual::LOCK)))
            .and_then(|()| match fs::remove_dir(&self.dir) {
                // Somebody else has moved in.
                Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
                removed => removed,
            });
        Ok(removed.map_err(|source| crate::checkpoint::Error::Io { path: self.dir.clone(), source })?)
    }

    /// Errors where `dir` holds anything but what [`Residual::open`] leaves, so that nobody's files are removed.
    fn check_own(dir: &Path) -> Result<()> {
        let marker = dir.join(Residual::KEY);
        let marked = fs::read(&marker).is_ok_and(|key| key.starts_with(Residual::MARK));
        let unfinished = |name: &std::ffi::OsStr| name == Residual::LOCK || name == "key.incomplete";
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        if marked || entries.map(|e| e.file_name()).all(|name| unfinished(&name)) {
            return Ok(());
        }
        let what = "is in the way: work in progress goes there, but moepress did not make it; move it or choose \
                    another --out";
        Err(Error::File { path: dir.into(), what: what.into() })
    }

    /// Everything in the folder but the lock.
    fn entries(&self) -> Result<Vec<PathBuf>> {
        let io = |source| crate::checkpoint::Error::Io { path: self.dir.clone(), source };
        let entries = fs::read_dir(&self.dir).map_err(io)?;
        let paths = entries.map(|entry| Ok(entry.map_err(io)?.path())).collect::<Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter(|path| !is_named(path, Residual::LOCK)).collect())
    }

    /// Whether nothing would be lost with the folder: it holds what describes the work, and empty folders.
    fn is_disposable(&self) -> Result<bool> {
        let empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        let describes = |path: &Path| is_named(path, Residual::KEY) || is_named(path, Residual::SOURCES);
        Ok(self.entries()?.iter().all(|path| describes(path) || empty(path)))
    }

    /// A file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Puts `stream`, of a model with `encoder_layers` layers before its decoder's, where the last run left it and returns
    /// the number of layers that are done.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn restore<B: Backend>(
        &self,
        backend: &B,
        stream: &mut Stream<'_, B>,
        hidden_size: usize,
        encoder_layers: usize,
    ) -> Result<usize> {
        self.restore_all(backend, &mut [stream], hidden_size, encoder_layers)
    }

    /// [`Residual::restore`] for several streams, in the order in which they were saved.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn restore_all<B: Backend>(
        &self,
        backend: &B,
        streams: &mut [&mut Stream<'_, B>],
        hidden_size: usize,
        encoder_layers: usize,
    ) -> Result<usize> {
        let done = self.layers_done();
        if done == 0 {
            return Ok(0);
        }
        let path = self.file(done);
        let io = |source| Error::from(crate::checkpoint::Error::Io { path: path.clone(), source });
        let mut file = BufReader::with_capacity(1 << 20, fs::File::open(&path).map_err(io)?);
        let mut read = |buffer: &mut B::Buffer, rows: usize| -> Result<()> {
            let mut values = vec![0.0f32; rows * hidden_size];
            file.read_exact(bytemuck::must_cast_slice_mut(&mut values)).map_err(io)?;
            if values.iter().any(|v| !v.is_finite()) {
                let what = "holds numbers that are not finite; remove the folder that it is in".into();
                return Err(Error::File { path: path.clone(), what });
            }
            Ok(backend.upload(&values, rows, hidden_size, buffer)?)
        };
        for chunk in streams.iter_mut().flat_map(|s| &mut s.chunks) {
            if done > encoder_layers {
                chunk.begin_decoder(backend.buffer());
            }
            read(&mut chunk.x, chunk.batch.tokens())?;
            if let Some(memory) = &mut chunk.memory {
                read(&mut memory.x, memory.batch.tokens())?;
            }
        }
        Ok(done)
    }

    /// Records that `done` layers are finished and `stream` stands behind them.
    ///
    /// # Errors
    /// Names the file that cannot be written; the previous state is then still there.
    pub fn save<B: Backend>(&self, backend: &B, stream: &Stream<'_, B>, done: usize) -> Result<()> {
        self.save_all(backend, &[stream], done)
    }

    /// [`Residual::save`] for several streams.
    ///
    /// # Errors
    /// Names the file that cannot be written; the previous state is then still there.
    pub fn save_all<B: Backend>(&self, backend: &B, streams: &[&Stream<'_, B>], done: usize) -> Result<()> {
        let mut file = AtomicFile::create(&self.file(done))?;
        for chunk in streams.iter().flat_map(|s| &s.chunks) {
            for buffer in std::iter::once(&chunk.x).chain(chunk.memory.iter().map(|memory| &memory.x)) {
                file.write_all(bytemuck::must_cast_slice(&backend.download(buffer)?))?;
            }
        }
        file.commit()?;
        for earlier in 0..done {
            let _ = fs::remove_file(self.file(earlier));
        }
        Ok(())
    }

    /// Removes the residual stream, so that the next [`Residual::restore`] begins at the first layer.
    ///
    /// # Errors
    /// Names the file that cannot be removed.
    pub fn forget(&self) -> Result<()> {
        while let done @ 1.. = self.layers_done() {
            let path = self.file(done);
            fs::remove_file(&path).map_err(|source| crate::checkpoint::Error::Io { path, source })?;
        }
        Ok(())
    }

    /// Removes the folder, once the result is in its final place.
    ///
    /// # Errors
    /// Names the folder.
    pub fn remove(mut self) -> Result<()> {
        let removed = self.remove_all();
        // Let go last, and not again when `self` is dropped.
        self.lock = None;
        removed
    }

    fn file(&self, done: usize) -> PathBuf {
        self.path(&format!("residual-{done:05}.f32"))
    }

    /// The largest number of finished layers that a residual stream is there for.
    pub fn layers_done(&self) -> usize {
        let number = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix("residual-")?.strip_suffix(".f32")?.parse().ok()
        };
        let entries = fs::read_dir(&self.dir).into_iter().flatten();
        entries.filter_map(|e| number(e.ok()?)).max().unwrap_or(0)
    }
}

impl Drop for Residual {
    fn drop(&mut self) {
        let Some(lock) = self.lock.take() else { return };
        if self.is_disposable().is_ok_and(|disposable| disposable) {
            // A folder that stays is found again by the next run.
            let _ = self.remove_all();
        }
        // Not before the folder is gone.
        drop(lock);
    }
}

fn is_named(path: &Path, name: &str) -> bool {
    path.file_name().is_some_and(|n| n == name)
}
