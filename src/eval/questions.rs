//! Multiple-choice questions, one JSON object per line.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Error, Result};
use crate::checkpoint::read_file;

/// A question with several choices, one of them right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Line of the file, from 1.
    pub line: usize,
    /// The text before the choice.
    pub context: String,
    /// Texts that may follow it, at least two, none empty.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// The questions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Questions {
    /// The file.
    pub path: PathBuf,
    /// Its questions, in order; at least one.
    pub questions: Vec<Question>,
}

impl Questions {
    /// Reads a JSONL file: on every line `{"context": "…", "choices": ["…", …], "answer": 0}`, where `answer` is the
    /// index of the right choice, from 0, or its text. Other keys and blank lines are passed over.
    ///
    /// # Errors
    /// Names the file and line, and what is wrong: not JSON, a key that is missing or of another type, fewer than two
    /// choices, an empty choice, an answer that is not among them.
    pub fn read(path: &Path) -> Result<Self> {
        let invalid = |what: String| Error::Questions { path: path.into(), what };
        let bytes = read_file(path).map_err(|e| invalid(e.to_string()))?;
        let mut questions = Vec::new();
        for (i, bytes) in bytes.split(|&b| b == b'\n').enumerate() {
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let line = i + 1;
            let question = parse(bytes, line);
            questions.push(question.map_err(|what| Error::Question { path: path.into(), line, what })?);
        }
        if questions.is_empty() {
            return Err(invalid(
                "holds no questions; expected lines of {\"context\", \"choices\", \"answer\"}".into(),
            ));
        }
        Ok(Questions { path: path.into(), questions })
    }
}

type Parsed<T> = std::result::Result<T, String>;

fn parse(bytes: &[u8], line: usize) -> Parsed<Question> {
    let value: Value = serde_json::from_slice(bytes).map_err(|e| format!("is not JSON: {e}"))?;
    let Value::Object(object) = value else {
        return Err("is not a JSON object; expected {\"context\", \"choices\", \"answer\"}".into());
    };
    let context = get(&object, "context")?.as_str().ok_or("`context` is not a string")?.to_string();
    let choices = choices(get(&object, "choices")?)?;
    let answer = answer(get(&object, "answer")?, &choices)?;
    Ok(Question { line, context, choices, answer })
}

fn get<'a>(object: &'a Map<String, Value>, key: &str) -> Parsed<&'a Value> {
    object.get(key).ok_or_else(|| format!("has no key `{key}`"))
}

fn choices(value: &Value) -> Parsed<Vec<String>> {
    let list = value.as_array().ok_or("`choices` is not a list")?;
    if list.len() < 2 {
        return Err(format!("`choices` has {} of them, expected at least 2", list.len()));
    }
    let text = |(i, choice): (usize, &Value)| match choice.as_str() {
        None => Err(format!("choice {i} is not a string")),
        Some("") => Err(format!("choice {i} is empty")),
        Some(text) => Ok(text.to_string()),
    };
    list.iter().enumerate().map(text).collect()
}

fn answer(value: &Value, choices: &[String]) -> Parsed<usize> {
    let last = choices.len() - 1;
    match value {
        Value::String(text) => choices
            .iter()
            .position(|choice| choice == text)
            .ok_or_else(|| format!("`answer` is {text:?}, which is none of the choices")),
        Value::Number(number) => number
            .as_u64()
            .and_then(|index| usize::try_from(index).ok())
            .filter(|index| *index <= last)
            .ok_or_else(|| format!("`answer` is {number}, expected an index from 0 to {last}")),
        _ => Err(format!("`answer` is {value}, expected an index from 0 to {last} or the text of a choice")),
    }
}
