/// What can be wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not a JSON object.
    #[error("config.json: {0}")]
    Json(String),
    /// A key is missing or its value impossible.
    #[error("config.json: {key} {what}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        what: String,
    },
    /// A `model_type` that is not in the table.
    #[error("config.json: model_type `{family}` is not supported; known: {}", known.join(", "))]
    UnknownFamily {
        /// What the config says.
        family: String,
        /// The supported ones.
        known: Vec<&'static str>,
    },
}

impl Error {
    pub(super) fn invalid(key: &str, what: impl Into<String>) -> Self {
        Error::Invalid { key: key.into(), what: what.into() }
    }
}
