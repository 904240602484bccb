//! Text to token windows, with the checkpoint's own tokeniser.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use super::guard::guarded;
use super::{Error, Result, SourceFile, Windows};
use crate::checkpoint::read_file;

/// Whether a document begins with the tokeniser's beginning-of-sequence token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bos {
    /// As transformers 4 decides: LLaMA tokenisers by `add_bos_token` (default yes), GPT-NeoX ones likewise (default no),
    /// all others by the post-processor of `tokenizer.json`.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The tokeniser of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Its file, for messages.
    path: PathBuf,
    bos: Option<u32>,
}

impl Tokenizer {
    /// Opens `tokenizer.json` (and `tokenizer_config.json`, where there is one) of a checkpoint folder.
    ///
    /// # Errors
    /// Names the file that is missing or malformed, and the BOS token that was asked for and does not exist.
    pub fn open(dir: &Path, mode: Bos) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let invalid = |path: &Path, what: String| Error::File { path: path.into(), what };
        if !path.exists() {
            let what = "missing; text needs the checkpoint's tokenizer (token ids do not)";
            return Err(invalid(&path, what.into()));
        }
        let bytes = read_file(&path).map_err(|e| invalid(&path, e.to_string()))?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
            .map_err(|e| invalid(&path, format!("cannot be read: {e}")))?;
        // What a training run left behind would cut documents off or fill them up; transformers ignores it as well.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| invalid(&path, format!("its truncation cannot be switched off: {e}")))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let mut tokenizer = Tokenizer { inner, path, bos: None };
        let wanted = match mode {
            Bos::Always => true,
            Bos::Never => false,
            Bos::Auto => tokenizer.automatic(&config)?,
        };
        if wanted {
            tokenizer.bos = tokenizer.bos_id(&config, &read_json(&dir.join("config.json"))?);
        }
        if mode == Bos::Always && tokenizer.bos.is_none() {
            return Err(invalid(
                &tokenizer.path,
                "names no beginning-of-sequence token, but --bos always asks for one".into(),
            ));
        }
        Ok(tokenizer)
    }

    /// The token that begins every document, if any.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Token ids of `text` without special tokens.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, false)
    }

    fn encode_as(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, special));
        let encoding = encoding.map_err(|e| self.error(format!("cannot encode the text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a document: BOS where the tokeniser has one, then the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// Token ids of `text` with the special tokens that the tokeniser puts around it: what an encoder reads.
    ///
    /// # Errors
    /// What the tokeniser says.
    pub fn encode_source(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, true)
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, true)).map_err(|e| self.error(format!("cannot decode: {e}")))
    }

    fn error(&self, what: String) -> Error {
        Error::File { path: self.path.clone(), what }
    }

    /// Whether documents begin with BOS where nobody says so.
    fn automatic(&self, config: &Value) -> Result<bool> {
        let class = config["tokenizer_class"].as_str().unwrap_or_default();
        let flag = config["add_bos_token"].as_bool();
        if class.starts_with("Llama") || class.starts_with("CodeLlama") {
            return Ok(flag.unwrap_or(true));
        }
        if class.starts_with("GPTNeoX") {
            return Ok(flag.unwrap_or(false));
        }
        // A tokeniser that cannot write the letter says nothing.
        let Ok(plain) = self.encode_as("a", false) else { return Ok(false) };
        Ok(self.encode_as("a", true)?.first() != plain.first())
    }

    fn bos_id(&self, config: &Value, model: &Value) -> Option<u32> {
        let token = &config["bos_token"];
        let content = token.as_str().or_else(|| token["content"].as_str());
        content
            .and_then(|content| self.inner.token_to_id(content))
            .or_else(|| model["bos_token_id"].as_u64().and_then(|id| id.try_into().ok()))
            .or_else(|| self.encode_as("a", true).ok()?.first().copied())
    }

    /// Reads UTF-8 files, tokenises their documents (separated by NUL bytes; without any, the file is one document),
    /// joins the documents of a file and cuts them into windows of `length`; a file's tail is dropped.
    ///
    /// # Errors
    /// Names the file that is unreadable, not UTF-8, or too short for one window.
    pub fn windows(&self, files: &[PathBuf], length: usize) -> Result<Windows> {
        self.first_windows(files, length, usize::MAX)
    }

    /// The first `most` of each file's [`Tokenizer::windows`]; what stands behind them is not tokenised. A document is cut
    /// off 256 tokens behind what is needed: the tokens before do not depend on what is so far away.
    ///
    /// # Errors
    /// Those of [`Tokenizer::windows`].
    pub fn first_windows(&self, files: &[PathBuf], length: usize, most: usize) -> Result<Windows> {
        let length = length.max(1);
        let mut windows =
            Windows { ids: Vec::new(), mask: None, count: 0, length, files: Vec::new(), decoder: None };
        for path in files {
            let invalid = |what: String| Error::File { path: path.clone(), what };
            let bytes = read_file(path).map_err(|e| invalid(e.to_string()))?;
            let text = String::from_utf8(bytes)
                .map_err(|e| invalid(format!("not UTF-8 text (byte {})", e.utf8_error().valid_up_to())))?;
            let documents: Vec<&str> = text.split('\0').filter(|d| !d.is_empty()).collect();
            let ids = self.encode_documents(&documents, most.saturating_mul(length))?;
            let count = (ids.len() / length).min(most);
            if count == 0 {
                return Err(Error::TooShort { path: path.clone(), tokens: ids.len(), length });
            }
            windows.ids.extend_from_slice(&ids[..count * length]);
            windows.count += count;
            windows.files.push(SourceFile { name: short_name(path, files), windows: count });
        }
        Ok(windows)
    }

    /// Token ids of the first documents, the last of them as far as needed: at least `enough` where all have as many.
    fn encode_documents(&self, documents: &[&str], enough: usize) -> Result<Vec<u32>> {
        let (mut ids, mut rest) = (Vec::new(), documents);
        while ids.len() < enough && !rest.is_empty() {
            let wanted = (enough - ids.len()).saturating_mul(BYTES_PER_TOKEN);
            let mut bytes = 0;
            let reaches = |document: &&str| {
                bytes += document.len();
                bytes >= wanted
            };
            let count = rest.iter().position(reaches).map_or(rest.len(), |last| last + 1);
            let (next, others) = rest.split_at(count);
            let missing = enough - ids.len();
            let encoded = next.par_iter().map(|document| self.encode_beginning(document, missing));
            ids.extend(encoded.collect::<Result<Vec<_>>>()?.concat());
            rest = others;
        }
        Ok(ids)
    }

    /// Token ids of a document, or the first of them: at least `enough` where it has as many.
    fn encode_beginning(&self, document: &str, enough: usize) -> Result<Vec<u32>> {
        /// Tokens before a cut that may be others than in the whole document.
        const UNSURE: usize = 256;
        let mut bytes = enough.saturating_add(UNSURE).saturating_mul(BYTES_PER_TOKEN);
        while bytes < document.len() {
            let cut = (0..=bytes).rev().find(|&at| document.is_char_boundary(at)).unwrap_or(0);
            let mut ids = self.encode_document(&document[..cut])?;
            ids.truncate(ids.len().saturating_sub(UNSURE));
            if ids.len() >= enough {
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(2);
        }
        self.encode_document(document)
    }
}

/// A guess that decides how much text is tokenised at a time.
const BYTES_PER_TOKEN: usize = 4;

/// The file's name, or its path as given where another file of the list has the same name.
fn short_name(path: &Path, files: &[PathBuf]) -> String {
    let unique = files.iter().filter(|other| other.file_name() == path.file_name()).count() == 1;
    match path.file_name() {
        Some(name) if unique => name.to_string_lossy().into(),
        _ => path.display().to_string(),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let invalid = |what: String| Error::File { path: path.into(), what };
    let text = read_file(path).map_err(|e| invalid(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| invalid(format!("not valid JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A tokeniser that knows two words and fails at any other.
    const TWO_WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "?"}}"#;

    #[test]
    fn documents_behind_the_windows_asked_for_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        file("tokenizer.json", TWO_WORDS);
        let documents: String = (0..50).map(|i| ["a", "b a", "b b a b"][i % 3].to_string() + "\0").collect();
        let all = file("all", &documents);
        let spoilt = file("spoilt", &format!("{documents}nonsense"));
        let tokenizer = Tokenizer::open(folder.path(), Bos::Auto).unwrap();
        let expected = tokenizer.windows(std::slice::from_ref(&all), 3).unwrap();
        assert_eq!(expected.count, 38);
        let first = |most: usize| {
            let mut first = expected.clone();
            first.truncate_files(most);
            first
        };
        for most in [1, 2, 7, 30] {
            assert_eq!(tokenizer.first_windows(std::slice::from_ref(&all), 3, most).unwrap(), first(most));
        }
        for most in [1, 2, 7] {
            let found = tokenizer.first_windows(std::slice::from_ref(&spoilt), 3, most).unwrap();
            assert_eq!(found.ids, first(most).ids);
        }
        assert_eq!(tokenizer.first_windows(&[all], 3, 39).unwrap(), expected);
        assert!(tokenizer.windows(&[spoilt], 3).is_err());
    }

    /// Word by word, and with the whole document as one word, as SentencePiece has it.
    #[test]
    fn a_long_document_is_read_as_far_as_needed() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
        let by_word = read_json(&examples.join("model/tokenizer.json")).unwrap();
        let marks = [(" ", "Ġ"), ("\n", "Ċ")];
        let replace =
            marks.map(|(from, to)| json!({"type": "Replace", "pattern": {"String": from}, "content": to}));
        let mut as_one = by_word.clone();
        as_one["pre_tokenizer"] = Value::Null;
        as_one["normalizer"] = json!({"type": "Sequence", "normalizers": replace});
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(examples.join("text")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let text: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
        let text = text.replace('\0', "\n");
        assert!(text.len() > 100_000);
        for tokenizer in [by_word, as_one] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
            let document = folder.path().join("document");
            std::fs::write(&document, &text).unwrap();
            let tokenizer = Tokenizer::open(folder.path(), Bos::Auto).unwrap();
            let files = std::slice::from_ref(&document);
            let all = tokenizer.windows(files, 32).unwrap();
            for most in [1, 2, 5, 30, 200, all.count - 1, all.count, all.count + 1] {
                let mut expected = all.clone();
                expected.truncate_files(most);
                assert_eq!(tokenizer.first_windows(files, 32, most).unwrap(), expected, "{most}");
            }
            assert!(tokenizer.encode_beginning(&text, 100).unwrap().len() < 1500);
        }
    }
}
