/// What can go wrong with a whole comparison. What goes wrong with one method is a row of its result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// Statistics or the calibration pass.
    #[error(transparent)]
    Calibrate(#[from] crate::calibrate::Error),
    /// Measurements that several methods share.
    #[error(transparent)]
    Compress(#[from] crate::compress::Error),
    /// The evaluation tokens, or the original's logits.
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
    /// What was asked for cannot be done at all.
    #[error("{0}")]
    Request(String),
}
