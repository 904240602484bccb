//! Typed reading of `config.json`. A key that is `null` counts as absent, as it does in transformers.

use serde_json::{Map, Value};

use super::{Error, Result};

/// Upper bound of every size in a config: far above any model, far below what overflows when multiplied.
const LARGEST: u64 = 1 << 24;
/// Upper bound of the number of layers, of which each has an entry in memory.
const MOST_LAYERS: u64 = 1 << 12;

#[derive(Clone)]
pub(super) struct Config(Map<String, Value>);

impl Config {
    pub(super) fn parse(text: &str) -> Result<Self> {
        match parse_json(text) {
            Ok(Value::Object(map)) => Ok(Config(map)),
            Ok(_) => Err(Error::Json("not a JSON object".into())),
            Err(e) => Err(Error::Json(format!("not valid JSON: {e}"))),
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// Whether there are no keys.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first key whose value is an object.
    pub(super) fn nested(&self) -> Option<&str> {
        self.0.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// All keys.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether `key` is written, if only as `null`.
    pub(super) fn mentions(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// The first of `keys` that is present.
    pub(super) fn first<'k>(&self, keys: &[&'k str]) -> Option<&'k str> {
        keys.iter().copied().find(|k| self.get(k).is_some())
    }

    pub(super) fn string(&self, key: &str) -> Result<String> {
        let value = self.get(key).ok_or_else(|| missing(key))?;
        let text =
            value.as_str().ok_or_else(|| Error::invalid(key, format!("is {value}, expected a string")))?;
        Ok(text.into())
    }

    pub(super) fn size_opt(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|value| size(key, value)).transpose()
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.size_opt(key)?.ok_or_else(|| missing(key))
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.size_opt(key)?.unwrap_or(default))
    }

    /// A size that must not be 0.
    pub(super) fn positive(&self, key: &str) -> Result<usize> {
        match self.size(key)? {
            0 => Err(Error::invalid(key, "is 0, expected at least 1")),
            size => Ok(size),
        }
    }

    /// The same with a default.
    pub(super) fn positive_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_none() { Ok(default) } else { self.positive(key) }
    }

    pub(super) fn float_opt(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|value| float(key, value)).transpose()
    }

    pub(super) fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.float_opt(key)?.unwrap_or(default))
    }

    /// A number that must be above 0.
    pub(super) fn above_zero(&self, key: &str) -> Result<Option<f64>> {
        match self.float_opt(key)? {
            Some(value) if value <= 0.0 => {
                Err(Error::invalid(key, format!("is {value}, expected more than 0")))
            }
            value => Ok(value),
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(Error::invalid(key, format!("is {value}, expected true or false"))),
        }
    }

    pub(super) fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list =
            value.as_array().ok_or_else(|| Error::invalid(key, format!("is {value}, expected a list")))?;
        list.iter().map(|v| size(key, v)).collect::<Result<_>>().map(Some)
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list =
            value.as_array().ok_or_else(|| Error::invalid(key, format!("is {value}, expected a list")))?;
        list.iter().map(|v| float(key, v)).collect::<Result<_>>().map(Some)
    }

    /// The least and the largest value that something may have, `default` where the key is absent.
    pub(super) fn limits(&self, key: &str, default: [f64; 2]) -> Result<[f64; 2]> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let bound = |value: &Value| match value.get("__float__").unwrap_or(value).as_str() {
            Some("Infinity") => Some(f64::INFINITY),
            _ => value.as_f64(),
        };
        let list = value.as_array().map_or(&[][..], Vec::as_slice);
        match list.iter().map(bound).collect::<Option<Vec<_>>>().as_deref() {
            Some(&[least, most]) if least <= most => Ok([least, most]),
            _ => Err(Error::invalid(key, format!("is {value}, expected two numbers, the smaller one first"))),
        }
    }

    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(String::from)).collect());
        list.map(Some).ok_or_else(|| Error::invalid(key, format!("is {value}, expected a list of strings")))
    }

    /// A nested object as a config of its own.
    pub(super) fn section(&self, key: &str) -> Result<Option<Config>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Config(map.clone()))),
            Some(value) => Err(Error::invalid(key, format!("is {value}, expected an object"))),
        }
    }

    /// The same without `key`.
    pub(super) fn without(&self, key: &str) -> Self {
        let mut map = self.0.clone();
        map.remove(key);
        Config(map)
    }

    /// The same with `value` for `key`.
    pub(super) fn with(&self, key: &str, value: impl Into<Value>) -> Self {
        let mut map = self.0.clone();
        map.insert(key.into(), value.into());
        Config(map)
    }

    /// Errors unless `key` is absent or `expected`.
    pub(super) fn require(&self, key: &str, expected: impl Into<Value>) -> Result<()> {
        let expected = expected.into();
        match self.get(key) {
            None => Ok(()),
            Some(value) if *value == expected => Ok(()),
            Some(value) if value.is_number() && value.as_f64() == expected.as_f64() => Ok(()),
            Some(value) => Err(Error::invalid(key, format!("is {value}, only {expected} is supported here"))),
        }
    }

    /// A size, or a list of as many equal ones as there are layers, of which a config may have one per layer.
    pub(super) fn uniform_size(&self, key: &str) -> Result<Option<usize>> {
        if !self.get(key).is_some_and(Value::is_array) {
            return self.size_opt(key);
        }
        let sizes = self.sizes(key)?.unwrap_or_default();
        match sizes.first() {
            Some(first) if sizes.iter().all(|size| size == first) => Ok(Some(*first)),
            _ => Err(Error::invalid(key, "differs between layers; only one number for all is supported")),
        }
    }
}

/// Parses the text of a config. Python writes a float that is infinite as the word `Infinity`, which JSON has not; here it
/// becomes a string.
pub(crate) fn parse_json(text: &str) -> serde_json::Result<Value> {
    const WORD: &str = "Infinity";
    if !text.contains(WORD) {
        return serde_json::from_str(text);
    }
    let (mut quoted, mut rest, mut in_string) = (String::with_capacity(text.len() + 16), text, false);
    while let Some(first) = rest.chars().next() {
        if !in_string && let Some(behind) = rest.strip_prefix(WORD) {
            quoted += "\"Infinity\"";
            rest = behind;
            continue;
        }
        let escaped = if in_string && first == '\\' { rest[1..].chars().next() } else { None };
        in_string ^= first == '"';
        let length = first.len_utf8() + escaped.map_or(0, char::len_utf8);
        quoted += &rest[..length];
        rest = &rest[length..];
    }
    serde_json::from_str(&quoted)
}

fn missing(key: &str) -> Error {
    Error::invalid(key, "is missing")
}

fn size(key: &str, value: &Value) -> Result<usize> {
    // Some exporters write whole numbers as floats.
    let layers = ["num_hidden_layers", "num_layers", "num_decoder_layers"];
    let largest = if layers.contains(&key) { MOST_LAYERS } else { LARGEST };
    let number =
        value.as_u64().or_else(|| value.as_f64().filter(|f| *f >= 0.0 && f.fract() == 0.0).map(|f| f as u64));
    match number {
        Some(n) if n <= largest => Ok(n as usize),
        _ => Err(Error::invalid(key, format!("is {value}, expected a whole number from 0 to {largest}"))),
    }
}

fn float(key: &str, value: &Value) -> Result<f64> {
    let number = value.as_f64().filter(|f| f.is_finite());
    number.ok_or_else(|| Error::invalid(key, format!("is {value}, expected a number")))
}
