//! A file in memory, where there is one, that readers open by its path.

use std::path::PathBuf;

thread_local! {
    static FOLDER: tempfile::TempDir = {
        let memory = std::path::Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        folder.expect("a temporary folder")
    };
}

/// Writes `bytes` to the file `name` of this process and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.with(|folder| folder.path().join(name));
    std::fs::write(&path, bytes).expect("a temporary file");
    path
}
