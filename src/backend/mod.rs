mod moments;
pub use moments::{Moment, MomentDims, Moments};
