//! What a streamed pass leaves on disk after every layer, so that a stopped run goes on from there.

use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::{Error, Result};
use crate::backend::Backend;
use crate::checkpoint::{AtomicFile, write_atomic};
use crate::model::Stream;

/// A folder beside the final output that holds the residual stream after the last finished layer. Its key names
/// everything that the contents depend on; a folder with another key is not used.
#[derive(Debug)]
pub struct Residual {
    dir: PathBuf,
}

impl Residual {
    /// The folder for results that go to `out`: opened where it belongs to the same work, made anew otherwise.
    ///
    /// # Errors
    /// Names the folder that cannot be created or cleared.
    pub fn open(out: &Path, key: &str) -> Result<Self> {
        let mut name = out.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let dir = out.with_file_name(name);
        let io = |source| crate::checkpoint::Error::Io { path: dir.clone(), source };
        let marker = dir.join("key");
        if fs::read(&marker).is_ok_and(|found| found == key.as_bytes()) {
            return Ok(Residual { dir });
        }
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(io)?;
        }
        fs::create_dir_all(&dir).map_err(io)?;
        write_atomic(&marker, key.as_bytes())?;
        Ok(Residual { dir })
    }

    /// A file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Puts `stream` where the last run left it and returns the number of layers that are done.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn restore<B: Backend>(
        &self,
        backend: &B,
        stream: &mut Stream<'_, B>,
        hidden_size: usize,
    ) -> Result<usize> {
        let done = self.layers_done();
        if done == 0 {
            return Ok(0);
        }
        let path = self.file(done);
        let io = |source| Error::from(crate::checkpoint::Error::Io { path: path.clone(), source });
        let mut file = BufReader::with_capacity(1 << 20, fs::File::open(&path).map_err(io)?);
        for chunk in &mut stream.chunks {
            let rows = chunk.batch.tokens();
            let mut values = vec![0.0f32; rows * hidden_size];
            file.read_exact(bytemuck::must_cast_slice_mut(&mut values)).map_err(io)?;
            backend.upload(&values, rows, hidden_size, &mut chunk.x)?;
        }
        Ok(done)
    }

    /// Records that `done` layers are finished and `stream` stands behind them.
    ///
    /// # Errors
    /// Names the file that cannot be written; the previous state is then still there.
    pub fn save<B: Backend>(&self, backend: &B, stream: &Stream<'_, B>, done: usize) -> Result<()> {
        let mut file = AtomicFile::create(&self.file(done))?;
        for chunk in &stream.chunks {
            file.write_all(bytemuck::must_cast_slice(&backend.download(&chunk.x)?))?;
        }
        file.commit()?;
        let _ = fs::remove_file(self.file(done - 1));
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
    pub fn remove(self) -> Result<()> {
        let io = |source| crate::checkpoint::Error::Io { path: self.dir.clone(), source };
        // The key first: a folder without it is never taken for work that can go on.
        fs::remove_file(self.dir.join("key")).and_then(|()| fs::remove_dir_all(&self.dir)).map_err(io)?;
        Ok(())
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
