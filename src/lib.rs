//! placeholder
pub mod architecture;
pub mod backend;
pub mod calibrate;
pub mod checkpoint;
pub mod compress;
pub mod linalg;
pub mod model;
pub mod plan;
pub mod progress;
pub mod tokens;
