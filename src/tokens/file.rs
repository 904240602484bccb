//! Token files: safetensors with `ids`, int32 `[windows, length]`, and optionally `mask`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::{Error, Result, SourceFile, Windows};
use crate::checkpoint::{Dtype, Entry, Shard, Tensor, write_safetensors};

/// Reads a token file: `ids` and optionally `mask`, and for models with an encoder `decoder_ids` and optionally
/// `decoder_mask`. Integers of any width are accepted.
///
/// # Errors
/// Names the file and what is wrong: a missing tensor, another shape or type, a negative id, no tokens.
pub fn read_token_file(path: &Path) -> Result<Windows> {
    let shard = Arc::new(Shard::open(path)?);
    let mut windows = read(path, &shard, "")?;
    if shard.tensor("decoder_ids").is_ok() {
        let decoder = read(path, &shard, "decoder_")?;
        if decoder.count != windows.count {
            let what =
                format!("decoder_ids has {} windows, expected {} as ids", decoder.count, windows.count);
            return Err(Error::File { path: path.into(), what });
        }
        windows.decoder = Some(Box::new(decoder));
    }
    Ok(windows)
}

/// The tensors `{prefix}ids` and `{prefix}mask`.
fn read(path: &Path, shard: &Arc<Shard>, prefix: &str) -> Result<Windows> {
    let invalid = |what: String| Error::File { path: path.into(), what };
    let (ids_name, mask_name) = (format!("{prefix}ids"), format!("{prefix}mask"));
    let ids = shard.tensor(&ids_name).map_err(|_| {
        invalid("holds no tensor `ids`; expected int32 ids [windows, length] and optionally mask".into())
    })?;
    let &[count, length] = ids.shape() else {
        return Err(invalid(format!("{ids_name} has shape {:?}, expected [windows, length]", ids.shape())));
    };
    if count == 0 || length == 0 {
        return Err(invalid(format!("{ids_name} has shape [{count}, {length}]: there are no tokens")));
    }
    let ids_values = integers(&ids)
        .ok_or_else(|| invalid(format!("{ids_name} has dtype {:?}, expected I32", ids.dtype())))?;
    if let Some(i) = ids_values.iter().position(|&id| id < 0 || id > i64::from(u32::MAX)) {
        let (window, position) = (i / length, i % length);
        return Err(invalid(format!(
            "id {} in window {window} at position {position} is no token id",
            ids_values[i]
        )));
    }
    let mask = match shard.tensor(&mask_name) {
        Err(_) => None,
        Ok(mask) => {
            if mask.shape() != ids.shape() {
                return Err(invalid(format!(
                    "{mask_name} has shape {:?}, expected that of {ids_name}, {:?}",
                    mask.shape(),
                    ids.shape()
                )));
            }
            let values = integers(&mask).ok_or_else(|| {
                invalid(format!("{mask_name} has dtype {:?}, expected an integer type", mask.dtype()))
            })?;
            Some(values.into_iter().map(|v| v != 0).collect::<Vec<_>>())
        }
    };
    if mask.as_ref().is_some_and(|m| !m.contains(&true)) {
        return Err(invalid(format!("{mask_name} is 0 everywhere: all tokens are padding")));
    }
    let name =
        path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
    Ok(Windows {
        ids: ids_values.into_iter().map(|id| id as u32).collect(),
        mask: mask.filter(|m| m.contains(&false)),
        count,
        length,
        files: vec![SourceFile { name, windows: count }],
        decoder: None,
    })
}

/// Writes a token file.
///
/// # Errors
/// Names the file.
pub fn write_token_file(path: &Path, windows: &Windows) -> Result<()> {
    let parts = [("", Some(windows)), ("decoder_", windows.decoder.as_deref())];
    let parts = parts.into_iter().filter_map(|(prefix, windows)| Some((prefix, windows?)));
    let mut tensors: Vec<(String, Vec<usize>, Vec<i32>)> = Vec::new();
    for (prefix, windows) in parts {
        let shape = vec![windows.count, windows.length];
        let ids = windows.ids.iter().map(|&id| id as i32).collect();
        tensors.push((format!("{prefix}ids"), shape.clone(), ids));
        if let Some(mask) = &windows.mask {
            let mask = mask.iter().map(|&real| i32::from(real)).collect();
            tensors.push((format!("{prefix}mask"), shape, mask));
        }
    }
    let entries = tensors.iter().map(|(name, shape, values)| Entry::i32(name, shape.clone(), values));
    Ok(write_safetensors(path, &BTreeMap::new(), entries.collect())?)
}

fn integers(tensor: &Tensor) -> Option<Vec<i64>> {
    let bytes = tensor.bytes();
    Some(match tensor.dtype() {
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| i64::from(i32::from_le_bytes(b))).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect(),
        Dtype::U32 => bytes.as_chunks().0.iter().map(|&b| i64::from(u32::from_le_bytes(b))).collect(),
        Dtype::I16 => bytes.as_chunks().0.iter().map(|&b| i64::from(i16::from_le_bytes(b))).collect(),
        Dtype::U8 | Dtype::BOOL => bytes.iter().map(|&b| i64::from(b)).collect(),
        _ => return None,
    })
}
