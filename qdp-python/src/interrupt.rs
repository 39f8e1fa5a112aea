//! Python's signals in long calls of the core, and what their handlers raise.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use qdp_core::Error;
use std::cell::Cell;

thread_local! {
    /// What a signal's handler raised: the core's error carries no Python object.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
    /// A call of this thread's is to raise that.
    static RAISES: Cell<bool> = const { Cell::new(false) };
}

/// Runs the handlers of pending signals, as [`qdp_core::EncodeOptions::interrupt`]. Python does so
/// on its main thread only; on others this does nothing.
pub(crate) fn interrupt() -> qdp_core::Result<()> {
    Python::attach(|py| {
        py.check_signals().map_err(|raised| {
            add(py, raised);
            Error::Interrupted
        })
    })
}

/// The exception behind an [`Error::Interrupted`] of this thread.
pub(crate) fn raised() -> PyErr {
    RAISED.take().unwrap_or_else(|| PyKeyboardInterrupt::new_err(()))
}

/// As if raised while the one before it was handled.
fn add(py: Python<'_>, raised: PyErr) {
    if let Some(before) = RAISED.take()
        && !before.value(py).is(raised.value(py))
        && raised.context(py).is_none()
    {
        raised.set_context(py, Some(before));
    }
    RAISED.set(Some(raised));
}

/// Runs what tells others of their results, which signals' handlers may interrupt ([`insist`]).
/// Fails with what those raised.
pub(crate) fn raising<T>(work: impl FnOnce() -> T) -> PyResult<T> {
    struct Outer(bool, Option<PyErr>);
    impl Drop for Outer {
        fn drop(&mut self) {
            RAISES.set(self.0);
            RAISED.set(self.1.take());
        }
    }
    // A handler's own calls do not raise what another handler did.
    let outer = Outer(RAISES.replace(true), RAISED.take());
    let result = work();
    let raised = RAISED.take();
    drop(outer);
    raised.map_or(Ok(result), Err)
}

/// Tries again where a signal's handler raised, as it may have been before anything was done. What
/// it raised is for the call in progress ([`raising`]); a thread without one reports it.
pub(crate) fn insist<T>(py: Python<'_>, attempt: impl Fn() -> PyResult<T>) -> Option<T> {
    /// So many signals do not come one after the other: it is something else that raises.
    const ATTEMPTS: usize = 8;
    for _ in 0..ATTEMPTS {
        match attempt() {
            Ok(result) => return Some(result),
            Err(raised) if RAISES.get() => add(py, raised),
            Err(raised) => raised.write_unraisable(py, None),
        }
    }
    None
}
