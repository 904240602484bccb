mod profile;
pub use profile::{MoeProfile, Profile};
