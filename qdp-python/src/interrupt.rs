//! Python's signals in long calls of the core.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use qdp_core::Error;
use std::cell::Cell;

thread_local! {
    /// What a signal's handler raised: the core's error carries no Python object.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Runs the handlers of pending signals, as [`qdp_core::EncodeOptions::interrupt`]. Python does so
/// on its main thread only; on others this does nothing.
pub(crate) fn interrupt() -> qdp_core::Result<()> {
    Python::attach(|py| {
        py.check_signals().map_err(|raised| {
            RAISED.set(Some(raised));
            Error::Interrupted
        })
    })
}

/// The exception behind an [`Error::Interrupted`] of this thread.
pub(crate) fn raised() -> PyErr {
    RAISED.take().unwrap_or_else(|| PyKeyboardInterrupt::new_err(()))
}
