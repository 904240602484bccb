use std::path::PathBuf;

/// What can be wrong with a checkpoint or any other file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// There is nothing at the model path.
    #[error("{}: does not exist; expected a checkpoint folder with config.json and safetensors", path.display())]
    NoFolder {
        /// The path.
        path: PathBuf,
    },
    /// The model path is no folder.
    #[error("{}: not a folder; expected a checkpoint folder with config.json and safetensors", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// A folder that is no checkpoint.
    #[error("{}: missing; expected a checkpoint folder with config.json and safetensors", path.display())]
    NoConfig {
        /// Where the config should be.
        path: PathBuf,
    },
    /// Something that is not a regular file.
    #[error("{}: is {found}, expected a file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// No weights in the folder.
    #[error(
        "{}: holds neither model.safetensors nor model.safetensors.index.json (other weight formats have to be \
         converted to safetensors first)", path.display()
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// A file of weights that was written to after it was opened.
    #[error("{}: changed while it was being read; start again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A text file is not UTF-8.
    #[error("{}: not UTF-8 text", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// A safetensors file that cannot be read.
    #[error("{}: {what}", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An inconsistent shard index.
    #[error("{}: {what}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A layout file that does not fit.
    #[error("{}: {what}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("{}: tensor {name} is missing", dir.display())]
    MissingTensor {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of another shape.
    #[error("{name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the config implies.
        expected: Vec<usize>,
    },
    /// A tensor of a type that cannot be used there.
    #[error("{name} has dtype {found}, expected {expected}")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
        /// The types that would do.
        expected: &'static str,
    },
    /// Matrices that are stored together and share scales.
    #[error(
        "{name}: rows from {first} on share a block of scales with those before; expected a multiple of {block}"
    )]
    SharedScale {
        /// The tensor.
        name: String,
        /// First row of one of the matrices.
        first: usize,
        /// Rows of a block.
        block: usize,
    },
    /// A weight that is NaN or infinite.
    #[error("{name} holds {value} at flat index {index}; weights must be finite")]
    NonFinite {
        /// The tensor.
        name: String,
        /// Position in row-major order.
        index: usize,
        /// NaN or an infinity.
        value: f32,
    },
}

impl Error {
    /// Whether the message says which file or folder is meant, not the tensor alone.
    pub(crate) fn names_path(&self) -> bool {
        !matches!(
            self,
            Error::Shape { .. } | Error::Dtype { .. } | Error::SharedScale { .. } | Error::NonFinite { .. }
        )
    }
}
