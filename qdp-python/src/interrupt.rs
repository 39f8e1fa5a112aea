//! Python's signals in long calls of the core, and what their handlers raise.

use pyo3::exceptions::{PyException, PyKeyboardInterrupt, PyMemoryError, PyRecursionError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qdp_core::Error;
use std::cell::Cell;

thread_local! {
    /// What a signal's handler raised: the core's error carries no Python object.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
    /// The call in progress raises that at its end.
    static RAISES: Cell<bool> = const { Cell::new(false) };
}

/// A part of a thread's work that raises what is its own: what is around it is put aside.
struct Part(bool, Option<PyErr>);

impl Part {
    fn begin(raises: bool) -> Self {
        Self(RAISES.replace(raises), RAISED.take())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        RAISES.set(self.0);
        RAISED.set(self.1.take());
    }
}

/// Runs any code of Python's in the middle of a call.
fn aside<T>(code: impl FnOnce() -> T) -> T {
    let _part = Part::begin(false);
    code()
}

/// Runs the handlers of pending signals, as [`qdp_core::EncodeOptions::interrupt`]. Python does so
/// on its main thread only; on others this does nothing.
pub(crate) fn interrupt() -> qdp_core::Result<()> {
    Python::attach(|py| {
        aside(|| py.check_signals()).map_err(|raised| {
            add(py, raised);
            Error::Interrupted
        })
    })
}

/// The exception behind an [`Error::Interrupted`] of this thread.
pub(crate) fn raised() -> PyErr {
    RAISED.take().unwrap_or_else(|| PyKeyboardInterrupt::new_err(()))
}

/// Keeps what a handler raised for the call in progress.
fn add(py: Python<'_>, raised: PyErr) {
    let raised = match RAISED.take() {
        Some(before) => after(py, raised, before),
        None => raised,
    };
    RAISED.set(Some(raised));
}

/// An exception as if raised while another was handled, which goes to the end of its contexts.
fn after(py: Python<'_>, raised: PyErr, before: PyErr) -> PyErr {
    /// Of somebody else's making, contexts may go in a circle.
    const MAX_CONTEXTS: usize = 1000;
    let contexts = |error: &PyErr| {
        let first = Some(error.clone_ref(py));
        std::iter::successors(first, |error| error.context(py)).take(MAX_CONTEXTS)
    };
    let known = |among: &PyErr, error: &PyErr| {
        contexts(among).any(|other| other.value(py).is(error.value(py)))
    };
    // Objects that are raised again may have each other already.
    if known(&before, &raised) {
        return before;
    }
    if !known(&raised, &before)
        && let Some(last) = contexts(&raised).last()
        && last.context(py).is_none()
    {
        last.set_context(py, Some(before));
    }
    raised
}

/// Runs what tells others of their results, which signals' handlers may interrupt ([`insist`]).
/// Fails with what those raised.
pub(crate) fn raising<T>(work: impl FnOnce() -> T) -> PyResult<T> {
    let part = Part::begin(true);
    let result = work();
    let raised = RAISED.take();
    drop(part);
    raised.map_or(Ok(result), Err)
}

/// Whether [`raising`] is to fail.
pub(crate) fn has_raised() -> bool {
    let raised = RAISED.take();
    let has = raised.is_some();
    RAISED.set(raised);
    has
}

/// Tries again where something is raised, as it may have been before anything was done. What a
/// signal's handler raised is for the call in progress ([`raising`]); what else did is reported, as
/// it is nobody's here.
pub(crate) fn insist<T>(py: Python<'_>, attempt: impl Fn() -> PyResult<T>) -> Option<T> {
    /// So many signals do not come one after the other.
    const ATTEMPTS: usize = 8;
    let mut other = None;
    let mut done = None;
    for _ in 0..ATTEMPTS {
        match aside(&attempt).map_err(|error| unless_handlers(py, error)) {
            Ok(result) => {
                done = Some(result);
                break;
            }
            Err(Err(raised)) if RAISES.get() => add(py, raised),
            Err(Ok(error) | Err(error)) => other = Some(error),
        }
    }
    if let Some(error) = other {
        error.write_unraisable(py, None);
    }
    done
}

/// An exception again; fails with one that a signal's handler raised.
pub(crate) fn unless_handlers(py: Python<'_>, error: PyErr) -> PyResult<PyErr> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let answer = aside(|| {
        let function = FUNCTION.import(py, "qdp._signals", "raised_by_handler")?;
        function.call1((error.value(py), error.traceback(py)))?.is_truthy()
    });
    match answer {
        Ok(false) => Ok(error),
        Ok(true) => Err(error),
        // There is too little left of something to tell.
        Err(raised)
            if raised.is_instance_of::<PyRecursionError>(py)
                || raised.is_instance_of::<PyMemoryError>(py) =>
        {
            Ok(error)
        }
        // Another handler, meanwhile.
        Err(raised) => Err(after(py, raised, error)),
    }
}

/// An exception by which somebody else's code refused a value; fails with one that says nothing of
/// the value: a signal's handler raised it meanwhile, or memory ran out.
pub(crate) fn refusal(py: Python<'_>, error: PyErr) -> PyResult<PyErr> {
    let is_error = error.is_instance_of::<PyException>(py);
    if !is_error || error.is_instance_of::<PyMemoryError>(py) {
        return Err(error);
    }
    unless_handlers(py, error)
}
