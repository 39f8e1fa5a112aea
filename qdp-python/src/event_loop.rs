//! The asyncio loops that wait for a batcher.
//!
//! The tasks of a loop that are ready together submit their requests together. The loop then encodes
//! them itself, where nobody else does and it does not take long, so that they go over no other
//! thread; its [`Inbox`] is called for that once, behind those tasks. Where another thread led the
//! batch, it puts the results into the inbox, and has the loop call that where it was empty.

use crate::errors::Failure;
use crate::interrupt::{insist, raising, refusal, unless_handlers};
use crate::state::StateBatch;
use parking_lot::Mutex;
use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use qdp_core::coalesce::batcher::Listener;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// Loops whose inboxes are kept for their next requests.
const MAX_LOOPS: usize = 16;

/// The loops whose tasks submitted requests of late.
#[derive(Default)]
pub(crate) struct EventLoops(Mutex<Vec<Arc<EventLoop>>>);

impl EventLoops {
    /// A running loop as a listener to a batcher's requests.
    pub(crate) fn listener(
        &self,
        event_loop: &Bound<'_, PyAny>,
        batcher: &Arc<qdp_core::Batcher>,
    ) -> PyResult<Arc<EventLoop>> {
        let py = event_loop.py();
        let known = {
            let loops = self.0.lock();
            let own = loops.iter().find(|known| known.inbox().event_loop.is(event_loop));
            if let Some(known) = own {
                return Ok(Arc::clone(known));
            }
            loops.clone()
        };
        // Asked outside the lock, as the answer may be any code's.
        let mut open = Vec::with_capacity(known.len() + 1);
        for other in known {
            let other_loop = other.inbox().event_loop.bind(py);
            let closed = other_loop.call_method0(intern!(py, "is_closed"));
            match closed.and_then(|closed| closed.is_truthy()) {
                Ok(false) => open.push(other),
                Ok(true) => {}
                // Whatever it is, it is not open; and not about this loop.
                Err(error) => drop(refusal(py, error)?),
            }
        }
        let excess = (open.len() + 1).saturating_sub(MAX_LOOPS);
        open.drain(..excess);
        let inbox = Inbox {
            event_loop: event_loop.clone().unbind(),
            waiting: Mutex::default(),
            done: Mutex::default(),
            batcher: Arc::downgrade(batcher),
            leads: AtomicBool::new(false),
        };
        let listener = Arc::new(EventLoop(Py::new(py, inbox)?));
        open.push(Arc::clone(&listener));
        let before = std::mem::replace(&mut *self.0.lock(), open);
        drop(before);
        Ok(listener)
    }

    /// Shows the garbage collector what the loops hold.
    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Where a request has a loop's inbox, too, it is no garbage; nor is what somebody is at.
        let Some(loops) = self.0.try_lock() else { return Ok(()) };
        let own = loops.iter().filter(|known| Arc::strong_count(known) == 1);
        own.map(|known| &known.0).try_for_each(|inbox| visit.call(inbox))
    }

    pub(crate) fn clear(&self) {
        let loops = std::mem::take(&mut *self.0.lock());
        drop(loops); // not under the lock
    }
}

/// Futures of a loop's tasks, by token, and the results that are on their way to them. The loop
/// calls it to set those futures whose results are there.
#[pyclass(frozen, module = "qdp")]
struct Inbox {
    event_loop: Py<PyAny>,
    waiting: Mutex<Waiting>,
    done: Mutex<Done>,
    batcher: Weak<qdp_core::Batcher>,
    /// The loop is on its way to encode what waits.
    leads: AtomicBool,
}

#[derive(Default)]
struct Done {
    results: Vec<(u64, qdp_core::Result<qdp_core::StateBatch>)>,
    /// The loop is on its way to them.
    called: bool,
}

#[derive(Default)]
struct Waiting {
    futures: HashMap<u64, Py<PyAny>>,
    next: u64,
}

impl Inbox {
    fn expect(&self, future: &Bound<'_, PyAny>) -> u64 {
        let mut waiting = self.waiting.lock();
        let token = waiting.next;
        waiting.next += 1;
        waiting.futures.insert(token, future.clone().unbind());
        token
    }

    fn take(&self, token: u64) -> Option<Py<PyAny>> {
        self.waiting.lock().futures.remove(&token)
    }
}

#[pymethods]
impl Inbox {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(waiting) = self.waiting.try_lock() else { return Ok(()) };
        visit.call(&self.event_loop)?;
        waiting.futures.values().try_for_each(|future| visit.call(future))
    }

    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        raising(|| {
            if self.leads.swap(false, Ordering::Relaxed)
                && let Some(batcher) = self.batcher.upgrade()
            {
                self.done.lock().called = true;
                py.detach(|| {
                    batcher.lead();
                    drop(batcher); // it may be the last one to have it: without the GIL, too
                });
            }
            let done = std::mem::take(&mut *self.done.lock());
            for (token, result) in done.results {
                if let Some(future) = self.take(token) {
                    tell(future.bind(py), result);
                }
            }
        })
    }
}

/// Sets a future, unless it was cancelled.
fn tell(future: &Bound<'_, PyAny>, result: qdp_core::Result<qdp_core::StateBatch>) {
    let py = future.py();
    let state = result.map_err(Failure::Core).map(|state| StateBatch::new(state, false));
    let value = state.map_err(PyErr::from).and_then(|state| Bound::new(py, state));
    let (set, value) = match value {
        Ok(state) => (intern!(py, "set_result"), state.into_any()),
        Err(error) => {
            (intern!(py, "set_exception"), error.into_value(py).into_bound(py).into_any())
        }
    };
    insist(py, || {
        if !future.call_method0(intern!(py, "done"))?.is_truthy()? {
            future.call_method1(set, (&value,))?;
        }
        Ok(())
    });
}

/// A loop as the listener of its requests.
pub(crate) struct EventLoop(Py<Inbox>);

impl EventLoop {
    fn inbox(&self) -> &Inbox {
        self.0.get()
    }

    /// Waits for a request to set `future`: the token of that request.
    pub(crate) fn expect(&self, future: &Bound<'_, PyAny>) -> u64 {
        self.inbox().expect(future)
    }

    /// Waits no more.
    pub(crate) fn forget(&self, token: u64) {
        drop(self.inbox().take(token));
    }

    /// Has the running loop encode what waits, once the tasks that are ready have run.
    pub(crate) fn lead_later(&self, py: Python<'_>, batcher: &qdp_core::Batcher) {
        if !self.inbox().leads.swap(true, Ordering::Relaxed) {
            let event_loop = self.inbox().event_loop.bind(py);
            let call = || event_loop.call_method1(intern!(py, "call_soon"), (&self.0,));
            if insist(py, call).is_none() {
                // Nobody is on the way.
                self.inbox().leads.store(false, Ordering::Relaxed);
                py.detach(|| batcher.lead());
            }
        }
    }

    /// Has the loop set the futures whose results are there; false where it is closed.
    fn wake(&self, py: Python<'_>) -> Option<bool> {
        let event_loop = self.inbox().event_loop.bind(py);
        let call = || {
            let called = event_loop.call_method1(intern!(py, "call_soon_threadsafe"), (&self.0,));
            let Err(error) = called else { return Ok(true) };
            let error = unless_handlers(py, error)?;
            let closed = error.is_instance_of::<PyRuntimeError>(py)
                && event_loop.call_method0(intern!(py, "is_closed"))?.is_truthy()?;
            if closed { Ok(false) } else { Err(error) }
        };
        insist(py, call)
    }

    /// Nobody is left to wait for results.
    fn forget_all(&self) {
        let done = std::mem::take(&mut *self.inbox().done.lock());
        for (token, _) in done.results {
            self.forget(token);
        }
    }

    /// Has another thread try, as it may be this one's stack that there is too little of.
    fn wake_elsewhere(&self, py: Python<'_>) {
        let own = Self(self.0.clone_ref(py));
        let wake = move || {
            let woken = Python::try_attach(|py| own.wake(py));
            if woken.flatten() != Some(true) {
                own.forget_all();
            }
        };
        if std::thread::Builder::new().name("qdp-wake".to_owned()).spawn(wake).is_err() {
            self.forget_all();
        }
    }
}

impl Listener for EventLoop {
    fn deliver(&self, results: Vec<(u64, qdp_core::Result<qdp_core::StateBatch>)>) {
        let called = {
            let mut done = self.inbox().done.lock();
            done.results.extend(results);
            std::mem::replace(&mut done.called, true)
        };
        if !called {
            let _ = Python::try_attach(|py| match self.wake(py) {
                Some(true) => {}
                Some(false) => self.forget_all(),
                None => self.wake_elsewhere(py),
            });
        }
    }

    fn leads(&self) -> bool {
        true
    }
}
