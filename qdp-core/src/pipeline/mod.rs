//! How work flows through an engine.

pub mod dispatch;
