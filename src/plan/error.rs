//! What can go wrong between statistics and plan.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error of this module; its message is one line that names what is at fault and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plan file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A plan file was read, but what it says is wrong.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<Error>,
    },
    /// The text is not JSON at all.
    #[error("a plan is JSON: {0}")]
    Json(serde_json::Error),
    /// A plan contradicts itself or the checkpoint.
    #[error("{place}{problem}")]
    Plan {
        /// Where in the plan.
        place: Place,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The sizes of the checkpoint contradict each other.
    #[error("profile: {place}{problem}")]
    Profile {
        /// Which layer.
        place: Place,
        /// What is wrong.
        problem: String,
    },
    /// No method has this name.
    #[error("unknown method `{name}`; known methods: {known}")]
    Method {
        /// The name asked for.
        name: String,
        /// All names, separated by commas.
        known: String,
    },
    /// The method has no such option.
    #[error("{method} has no option `{option}`; known options: {known}")]
    UnknownOption {
        /// The method.
        method: String,
        /// The option asked for.
        option: String,
        /// The options of this method, separated by commas.
        known: String,
    },
    /// The value of an option cannot be used.
    #[error("option {option}={value}: {expected}")]
    Option {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// What the plan cannot do without was not given: a budget, or the checkpoint.
    #[error("{0}")]
    Missing(String),
    /// The budget cannot be met, or is not one.
    #[error("{0}")]
    Budget(String),
    /// The statistics are missing, of another checkpoint, or damaged.
    #[error("statistics: {place}{problem}")]
    Statistics {
        /// Layer, expert and moment.
        place: Place,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A search on tokens failed, or was given none.
    #[error("{0}")]
    Search(String),
    /// Weights, or what was found from them, are damaged.
    #[error("{place}{problem}")]
    Spectrum {
        /// Layer, expert and matrix.
        place: Place,
        /// What is wrong.
        problem: String,
    },
}

/// A place in a plan or in statistics. Displays as a prefix: `layer 3: expert 5: rank.up: `.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// 0-based decoder layer.
    pub layer: Option<usize>,
    /// Routed expert of that layer.
    pub expert: Option<usize>,
    /// Field of the plan, moment of the statistics, or matrix of the expert.
    pub field: Option<String>,
}

impl Place {
    /// The whole plan.
    pub(super) fn top() -> Self {
        Place::default()
    }

    /// A decoder layer.
    pub(super) fn layer(layer: usize) -> Self {
        Place { layer: Some(layer), ..Place::default() }
    }

    /// An expert of this layer.
    pub(super) fn expert(&self, expert: usize) -> Self {
        Place { expert: Some(expert), ..self.clone() }
    }

    /// A field of this place.
    pub(super) fn field(&self, field: &str) -> Self {
        let field = match &self.field {
            Some(outer) => format!("{outer}.{field}"),
            None => field.to_owned(),
        };
        Place { field: Some(field), ..self.clone() }
    }

    /// An error of the plan at this place.
    pub(super) fn plan(self, problem: impl Into<String>) -> Error {
        Error::Plan { place: self, problem: problem.into() }
    }

    /// An error of the statistics at this place.
    pub(super) fn statistics(self, problem: impl Into<String>) -> Error {
        Error::Statistics { place: self, problem: problem.into() }
    }

    /// An error of the profile at this place.
    pub(super) fn profile(self, problem: impl Into<String>) -> Error {
        Error::Profile { place: self, problem: problem.into() }
    }

    /// An error of a spectrum at this place.
    pub(super) fn spectrum(self, problem: impl Into<String>) -> Error {
        Error::Spectrum { place: self, problem: problem.into() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}: ")?;
        }
        if let Some(expert) = self.expert {
            write!(f, "expert {expert}: ")?;
        }
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        Ok(())
    }
}
