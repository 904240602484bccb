//! Token windows: what every pass over text consumes. From token files, or from text with the checkpoint's tokeniser.

mod error;
mod file;
mod text;

pub use error::Error;
pub use file::{read_token_file, write_token_file};
pub use text::{Bos, Tokenizer};

use sha2::{Digest, Sha256};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Windows of equal length, each a sequence of its own that begins at position 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Token ids, `[count, length]`.
    pub ids: Vec<u32>,
    /// `false` for padding, same shape; `None` where nothing is padding.
    pub mask: Option<Vec<bool>>,
    /// Number of windows.
    pub count: usize,
    /// Tokens per window.
    pub length: usize,
    /// The files that the windows came from, in order; their counts add up to `count`.
    pub files: Vec<SourceFile>,
}

/// An input file and how many windows it gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// File name as given.
    pub name: String,
    /// Windows from this file.
    pub windows: usize,
}

impl Windows {
    /// Number of tokens that are not padding.
    pub fn real_tokens(&self) -> usize {
        self.mask.as_ref().map_or(self.ids.len(), |m| m.iter().filter(|real| **real).count())
    }

    /// Keeps the first `count` windows of every file, or all where it has fewer.
    pub fn truncate_files(&mut self, count: usize) {
        let mut ids = Vec::new();
        let mut mask = self.mask.as_ref().map(|_| Vec::new());
        let mut start = 0;
        for file in &mut self.files {
            let end = (start + file.windows.min(count)) * self.length;
            ids.extend_from_slice(&self.ids[start * self.length..end]);
            if let (Some(to), Some(from)) = (&mut mask, &self.mask) {
                to.extend_from_slice(&from[start * self.length..end]);
            }
            start += file.windows;
            file.windows = file.windows.min(count);
        }
        self.count = self.files.iter().map(|f| f.windows).sum();
        (self.ids, self.mask) = (ids, mask);
    }

    /// Adds the windows of `other` behind these.
    ///
    /// # Panics
    /// Where the windows differ in length: callers compare first and can say which files are at fault.
    pub fn append(&mut self, other: &Windows) {
        assert_eq!(self.length, other.length, "tokens per window");
        if self.mask.is_some() || other.mask.is_some() {
            let real = |windows: &Windows| vec![true; windows.ids.len()];
            let mut mask = self.mask.take().unwrap_or_else(|| real(self));
            mask.extend(other.mask.clone().unwrap_or_else(|| real(other)));
            self.mask = Some(mask);
        }
        self.ids.extend_from_slice(&other.ids);
        self.files.extend_from_slice(&other.files);
        self.count += other.count;
    }

    /// Index of the file of each window.
    pub fn file_of_windows(&self) -> Vec<u32> {
        self.files
            .iter()
            .enumerate()
            .flat_map(|(f, file)| std::iter::repeat_n(f as u32, file.windows))
            .collect()
    }

    /// SHA-256, in hexadecimal, of the ids as a token file holds them (int32, little-endian, window after window), and
    /// of the mask behind them where something is padding.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for id in &self.ids {
            hash.update(id.to_le_bytes());
        }
        for real in self.mask.iter().flatten() {
            hash.update([u8::from(*real)]);
        }
        crate::checkpoint::hex(&hash.finalize())
    }

    /// Errors unless every id is below `vocabulary` and windows fit `max_positions`.
    pub fn check(&self, vocabulary: usize, max_positions: usize) -> Result<()> {
        if self.length > max_positions {
            return Err(Error::TooLong { length: self.length, max_positions });
        }
        match self.ids.iter().position(|&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(i) => {
                let (window, position) = (i / self.length, i % self.length);
                Err(Error::IdOutOfRange { id: i64::from(self.ids[i]), window, position, vocabulary })
            }
        }
    }
}
