//! Text to token windows, with the checkpoint's own tokeniser.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

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
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| invalid(&path, format!("cannot be read: {e}")))?;
        // What a training run left behind would cut documents off or fill them up; transformers ignores it as well.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| invalid(&path, format!("its truncation cannot be switched off: {e}")))?;
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let wanted = match mode {
            Bos::Always => true,
            Bos::Never => false,
            Bos::Auto => automatic(&inner, &config),
        };
        let bos = if wanted { bos_id(&inner, &config, &read_json(&dir.join("config.json"))?) } else { None };
        if mode == Bos::Always && bos.is_none() {
            return Err(invalid(
                &path,
                "names no beginning-of-sequence token, but --bos always asks for one".into(),
            ));
        }
        Ok(Tokenizer { inner, bos })
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
        let encoding = self.inner.encode_fast(text, special).map_err(|e| Error::File {
            path: PathBuf::from("tokenizer.json"),
            what: format!("cannot encode the text: {e}"),
        })?;
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
        self.inner.decode(ids, true).map_err(|e| Error::File {
            path: PathBuf::from("tokenizer.json"),
            what: format!("cannot decode: {e}"),
        })
    }

    /// Reads UTF-8 files, tokenises their documents (separated by NUL bytes; without any, the file is one document),
    /// joins the documents of a file and cuts them into windows of `length`; a file's tail is dropped.
    ///
    /// # Errors
    /// Names the file that is unreadable, not UTF-8, or too short for one window.
    pub fn windows(&self, files: &[PathBuf], length: usize) -> Result<Windows> {
        let length = length.max(1);
        let mut windows =
            Windows { ids: Vec::new(), mask: None, count: 0, length, files: Vec::new(), decoder: None };
        for path in files {
            let invalid = |what: String| Error::File { path: path.clone(), what };
            let bytes = read_file(path).map_err(|e| invalid(e.to_string()))?;
            let text = String::from_utf8(bytes)
                .map_err(|e| invalid(format!("not UTF-8 text (byte {})", e.utf8_error().valid_up_to())))?;
            let documents: Vec<&str> = text.split('\0').filter(|d| !d.is_empty()).collect();
            let encoded = documents.par_iter().map(|document| self.encode_document(document));
            let ids = encoded.collect::<Result<Vec<_>>>()?.concat();
            let count = ids.len() / length;
            if count == 0 {
                return Err(invalid(format!(
                    "gives {} tokens, too few for one window of {length}",
                    ids.len()
                )));
            }
            windows.ids.extend_from_slice(&ids[..count * length]);
            windows.count += count;
            windows.files.push(SourceFile { name: short_name(path, files), windows: count });
        }
        Ok(windows)
    }
}

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

fn automatic(tokenizer: &tokenizers::Tokenizer, config: &Value) -> bool {
    let class = config["tokenizer_class"].as_str().unwrap_or_default();
    let flag = config["add_bos_token"].as_bool();
    if class.starts_with("Llama") || class.starts_with("CodeLlama") {
        return flag.unwrap_or(true);
    }
    if class.starts_with("GPTNeoX") {
        return flag.unwrap_or(false);
    }
    let leading =
        |special| tokenizer.encode("a", special).map(|e| e.get_ids().first().copied()).ok().flatten();
    leading(true) != leading(false)
}

fn bos_id(tokenizer: &tokenizers::Tokenizer, config: &Value, model: &Value) -> Option<u32> {
    let token = &config["bos_token"];
    let content = token.as_str().or_else(|| token["content"].as_str());
    content
        .and_then(|content| tokenizer.token_to_id(content))
        .or_else(|| model["bos_token_id"].as_u64().and_then(|id| id.try_into().ok()))
        .or_else(|| tokenizer.encode("a", true).ok()?.get_ids().first().copied())
}
