//! Options of a method: what there is, and what was asked for.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Error, Method, Result};

/// The options of a method with every default filled in; `null` where an option without default was not
/// given.
pub type Options = BTreeMap<String, Value>;

/// One option of a method.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptionSpec {
    /// Key in `--set KEY=VALUE` and in the plan.
    pub name: &'static str,
    /// Which values it takes.
    pub kind: OptionKind,
    /// Value where none is given; `None` means that the option is then absent (`null` in the plan).
    pub default: Option<&'static str>,
    /// What it does, for people.
    pub help: &'static str,
}

/// Which values an option takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptionKind {
    /// `true` or `false`.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A whole number, at least this.
    Integer(u64),
    /// A number above 0 and below 1.
    Fraction,
    /// 0, or a number above 0 and below 1.
    Share,
    /// Layer numbers and ranges of them, such as `0,3-5`.
    Layers,
    /// The name of a folder.
    Folder,
}

impl std::fmt::Display for OptionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OptionKind::Flag => write!(f, "true|false"),
            OptionKind::Choice(words) => write!(f, "{}", words.join("|")),
            OptionKind::Integer(_) => write!(f, "N"),
            OptionKind::Fraction | OptionKind::Share => write!(f, "0..1"),
            OptionKind::Layers => write!(f, "N,N-N"),
            OptionKind::Folder => write!(f, "DIR"),
        }
    }
}

impl OptionKind {
    /// The typed value of `text`, or what would be right.
    fn parse(self, text: &str) -> Result<Value, String> {
        match self {
            OptionKind::Flag => {
                text.parse::<bool>().map(Value::from).map_err(|_| "expected true or false".into())
            }
            OptionKind::Choice(words) => {
                let known = words.contains(&text);
                known.then(|| text.into()).ok_or_else(|| format!("expected one of {}", words.join(", ")))
            }
            OptionKind::Integer(least) => {
                let number = text.parse::<u64>().ok().filter(|n| *n >= least);
                number.map(Value::from).ok_or_else(|| format!("expected a whole number, at least {least}"))
            }
            OptionKind::Folder if text.is_empty() => Err("expected the name of a folder".into()),
            OptionKind::Folder => Ok(text.into()),
            OptionKind::Fraction => {
                let number = text.parse::<f64>().ok().filter(|x| *x > 0.0 && *x < 1.0);
                number.map(Value::from).ok_or_else(|| "expected a number above 0 and below 1".into())
            }
            OptionKind::Share => {
                let number = text.parse::<f64>().ok().filter(|x| *x >= 0.0 && *x < 1.0);
                number.map(Value::from).ok_or_else(|| "expected 0 or a number below 1".into())
            }
            OptionKind::Layers => {
                let known = parse_layers(text).is_some();
                known.then(|| text.into()).ok_or_else(|| "expected layer numbers such as 0,3-5".into())
            }
        }
    }
}

/// The layers that a text such as `0,3-5` lists; `None` where it is no such list.
fn parse_layers(text: &str) -> Option<BTreeSet<usize>> {
    let mut layers = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
        if first > last {
            return None;
        }
        layers.extend((first..=last).map(usize::from));
    }
    Some(layers)
}

/// Checks what was given against what `method` knows, and fills in the defaults.
pub(super) fn resolve(
    method: &str,
    specs: &[OptionSpec],
    given: &BTreeMap<String, String>,
) -> Result<Options> {
    if let Some(unknown) = given.keys().find(|key| specs.iter().all(|spec| spec.name != key.as_str())) {
        let known = specs.iter().map(|spec| spec.name).collect::<Vec<_>>().join(", ");
        return Err(Error::UnknownOption { method: method.into(), option: unknown.clone(), known });
    }
    let mut options = Options::new();
    for spec in specs {
        let text = given.get(spec.name).map(String::as_str).or(spec.default);
        let value = match text {
            None => Value::Null,
            Some(text) => spec.kind.parse(text).map_err(|expected| Error::Option {
                option: spec.name.into(),
                value: text.into(),
                expected,
            })?,
        };
        options.insert(spec.name.into(), value);
    }
    Ok(options)
}

/// Checks options of `method` as far as that can be done without a checkpoint.
///
/// # Errors
/// [`Error::UnknownOption`], and [`Error::Option`] for a value of the wrong kind.
pub fn check_options(method: &dyn Method, given: &BTreeMap<String, String>) -> Result<()> {
    resolve(method.name(), method.options(), given).map(drop)
}

/// The options of a plan as they would be given, so that [`resolve`] can check them once more.
pub(super) fn given(options: &Options) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    options.iter().filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect()
}

/// A resolved flag.
pub(super) fn flag(options: &Options, name: &str) -> bool {
    options.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// A resolved whole number.
pub(super) fn integer(options: &Options, name: &str) -> Option<u64> {
    options.get(name).and_then(Value::as_u64)
}

/// A resolved fraction or share.
pub(super) fn fraction(options: &Options, name: &str) -> Option<f64> {
    options.get(name).and_then(Value::as_f64)
}

/// The layers of a resolved list; none where it was not given.
pub(super) fn layers(options: &Options, name: &str) -> BTreeSet<usize> {
    options.get(name).and_then(Value::as_str).and_then(parse_layers).unwrap_or_default()
}

/// A resolved name.
pub(super) fn text<'o>(options: &'o Options, name: &str) -> Option<&'o str> {
    options.get(name).and_then(Value::as_str)
}

/// Whether the choice `name` was resolved to `word`.
pub(super) fn is(options: &Options, name: &str, word: &str) -> bool {
    options.get(name).and_then(Value::as_str) == Some(word)
}
