//! QDP core.
pub mod error;
