//! placeholder
pub mod architecture;
pub mod backend;
pub mod checkpoint;
pub mod eval;
pub mod linalg;
pub mod model;
pub mod progress;
pub mod tokens;
