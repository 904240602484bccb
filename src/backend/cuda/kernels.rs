//! The kernels by name.

/// Every kernel that is launched, loaded when a device is opened.
pub(super) const KERNELS: &[&str] = &[];
