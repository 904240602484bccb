//! Token windows: what every pass over text consumes. From token files, or from text with the checkpoint's tokeniser.

mod error;
mod file;
mod guard;
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
    /// What the decoder of a model with an encoder gets, from its start token on: as many windows, of a length of their
    /// own. The others are the encoder's.
    pub decoder: Option<Box<Windows>>,
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
        if let Some(decoder) = &mut self.decoder {
            decoder.truncate_files(count);
        }
    }

    /// Windows `first .. first + count`. Keeps every file, so that their numbers stay the same.
    #[must_use]
    pub fn slice(&self, first: usize, count: usize) -> Windows {
        let (last, mut start) = (first + count, 0);
        let files = self.files.iter().map(|file| {
            let end = start + file.windows;
            let shared = end.min(last).saturating_sub(start.max(first));
            start = end;
            SourceFile { name: file.name.clone(), windows: shared }
        });
        let tokens = first * self.length..last * self.length;
        Windows {
            files: files.collect(),
            ids: self.ids[tokens.clone()].to_vec(),
            mask: self.mask.as_ref().map(|m| m[tokens].to_vec()),
            count,
            length: self.length,
            decoder: self.decoder.as_ref().map(|d| Box::new(d.slice(first, count))),
        }
    }

    /// For a model with an encoder: the first half of every window, the longer one where they differ, becomes the
    /// encoder's, and the second half the decoder's target, behind the decoder's start token. Windows need 2 tokens.
    #[must_use]
    pub fn split(&self, start: u32) -> Windows {
        let first = self.length.div_ceil(2);
        let mut halves = [first, self.length - first + 1].map(|length| Windows {
            ids: Vec::with_capacity(self.count * length),
            mask: self.mask.as_ref().map(|_| Vec::with_capacity(self.count * length)),
            count: self.count,
            length,
            files: self.files.clone(),
            decoder: None,
        });
        for w in 0..self.count {
            let [begin, middle, end] = [0, first, self.length].map(|offset| w * self.length + offset);
            halves[1].ids.push(start);
            halves[0].ids.extend_from_slice(&self.ids[begin..middle]);
            halves[1].ids.extend_from_slice(&self.ids[middle..end]);
            if let (Some(from), [Some(encoder), Some(decoder)]) =
                (&self.mask, halves.each_mut().map(|h| h.mask.as_mut()))
            {
                encoder.extend_from_slice(&from[begin..middle]);
                decoder.push(true);
                decoder.extend_from_slice(&from[middle..end]);
            }
        }
        let [encoder, decoder] = halves;
        Windows { decoder: Some(Box::new(decoder)), ..encoder }
    }

    /// The windows whose tokens the model predicts: the decoder's, where there are any.
    pub fn predicted(&self) -> &Windows {
        self.decoder.as_deref().unwrap_or(self)
    }

    /// The windows that pass a layer: of the encoder, or of what predicts.
    pub fn of_layer(&self, in_encoder: bool) -> &Windows {
        if in_encoder { self } else { self.predicted() }
    }

    /// Tokens of the longest window, the decoder's included.
    pub fn longest(&self) -> usize {
        self.length.max(self.predicted().length)
    }

    /// Whether `other` has windows of the same length, the decoder's included.
    pub fn fits(&self, other: &Windows) -> bool {
        let decoders = [&self.decoder, &other.decoder].map(|d| d.as_ref().map(|d| d.length));
        self.length == other.length && decoders[0] == decoders[1]
    }

    /// Adds the windows of `other` behind these.
    ///
    /// # Panics
    /// Where the windows differ in length, or only some have a decoder's: callers compare first and can say which files
    /// are at fault.
    pub fn append(&mut self, other: &Windows) {
        assert_eq!(self.length, other.length, "tokens per window");
        match (&mut self.decoder, &other.decoder) {
            (Some(own), Some(others)) => own.append(others),
            (None, None) => {}
            _ => panic!("windows with and without a decoder's"),
        }
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

    /// Errors unless there are windows for a decoder exactly where the model, of `family`, has an encoder.
    pub fn check_decoder(&self, family: &'static str, has_encoder: bool) -> Result<()> {
        match (has_encoder, &self.decoder) {
            (true, None) => Err(Error::NoDecoderIds { family }),
            (false, Some(_)) => Err(Error::NoEncoder { family }),
            _ => Ok(()),
        }
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
    /// of the mask behind them where something is padding; then the same of the decoder's windows, if there are any.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for id in &self.ids {
            hash.update(id.to_le_bytes());
        }
        for real in self.mask.iter().flatten() {
            hash.update([u8::from(*real)]);
        }
        if let Some(decoder) = &self.decoder {
            hash.update(decoder.sha256());
        }
        crate::checkpoint::hex(&hash.finalize())
    }

    /// Errors unless every id is below `vocabulary`, windows fit `max_positions`, and the fields agree.
    pub fn check(&self, vocabulary: usize, max_positions: usize) -> Result<()> {
        let holds = |found: usize| self.count.checked_mul(self.length) == Some(found);
        let of_files = self.files.iter().map(|file| file.windows).sum::<usize>();
        if self.length == 0
            || !holds(self.ids.len())
            || self.mask.as_ref().is_some_and(|mask| !holds(mask.len()))
            || self.decoder.as_ref().is_some_and(|decoder| decoder.count != self.count)
            || of_files != self.count
        {
            return Err(Error::Inconsistent { count: self.count, length: self.length });
        }
        if self.length > max_positions {
            return Err(Error::TooLong { length: self.length, max_positions });
        }
        if let Some(decoder) = &self.decoder {
            decoder.check(vocabulary, max_positions)?;
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
