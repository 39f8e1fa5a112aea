//! `Engine.coalesce` and `Engine.encode_list`: many small requests as one batch.

use crate::call::Call;
use crate::errors::{Failure, Result, first_line};
use crate::input::{Data, plain_sample};
use crate::interrupt::{interrupt, refusal};
use crate::options::accepted;
use crate::state::StateBatch;
use parking_lot::{Mutex, MutexGuard};
use pyo3::exceptions::{PyBaseException, PyException, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit, intern};
use qdp_core::coalesce::{CoalesceOptions, FlushReason};
use qdp_core::{EncodeOptions, Error};
use std::collections::HashMap;
use std::thread::{self, ThreadId};

type Core = qdp_core::coalesce::Coalescer<Keep>;

/// What keeps a request's memory: held, never looked at.
pub(crate) enum Keep {
    Array(#[allow(dead_code)] Py<PyAny>),
    Other(#[allow(dead_code)] Box<dyn Send>),
}

/// What a coalescer is asked for.
pub(crate) struct Thresholds {
    pub(crate) max_samples: Option<usize>,
    pub(crate) max_bytes: Option<usize>,
}

fn options(call: &Call<'_>, thresholds: &Thresholds) -> CoalesceOptions {
    let usual = CoalesceOptions::default();
    CoalesceOptions {
        encode: EncodeOptions {
            precision: call.precision,
            stream: call.stream,
            validate_now: call.validate_now,
            interrupt: Some(interrupt),
            ..EncodeOptions::default()
        },
        max_samples: thresholds.max_samples.unwrap_or(usual.max_samples),
        max_bytes: thresholds.max_bytes.unwrap_or(usual.max_bytes),
    }
}

/// Encodes the elements of an iterable as one batch.
pub(crate) fn encode_list(call: &Call<'_>, data: &Bound<'_, PyAny>) -> Result<StateBatch> {
    let py = data.py();
    let thresholds = Thresholds { max_samples: None, max_bytes: Some(usize::MAX) };
    let mut core = Core::new(call.engine.clone(), call.spec.clone(), options(call, &thresholds))?;
    let items = accepted(py, data.try_iter())?.ok_or_else(|| {
        let got = data.get_type().name().map_or_else(|_| String::new(), |name| name.to_string());
        Error::invalid("data", "a sequence of arrays", got)
    })?;
    for (index, item) in items.enumerate() {
        let item = item?;
        if let Some(input) = plain_sample(&item) {
            let keep = Keep::Array(item.clone().unbind());
            // SAFETY: the array keeps its memory, and changing it meanwhile is the caller's doing.
            // The thresholds are out of reach.
            let _ = unsafe { core.submit(&input, keep) };
            continue;
        }
        let added = Data::import(&item, call.engine, call.stream)
            .and_then(|data| add(py, &mut core, call.engine, data));
        added.map(drop).map_err(|failure| about(py, failure, index))?;
    }
    let states = py.detach(|| core.states());
    // Here, where the GIL is held.
    drop(core.take_spent());
    match states {
        Ok(states) => Ok(StateBatch::new(states, false)),
        Err(error) => Err(match core.first_failure() {
            Some((index, first)) if first == error => about(py, error.into(), index),
            _ => error.into(),
        }),
    }
}

/// An exception that was kept, raised again.
fn raised(py: Python<'_>, error: &Py<PyBaseException>) -> Failure {
    PyErr::from_value(error.bind(py).clone().into_any()).into()
}

/// The failure with a note that says which element it is about.
fn about(py: Python<'_>, failure: Failure, index: usize) -> Failure {
    let error = PyErr::from(failure);
    let (value, note) = (error.value(py), format!("in element {index}"));
    let notes = value.getattr_opt(intern!(py, "__notes__")).ok().flatten();
    if !notes.is_some_and(|notes| notes.contains(&note).unwrap_or(false)) {
        // An exception without the note is better than one about the note.
        let _ = value.call_method1(intern!(py, "add_note"), (note,));
    }
    error.into()
}

/// Hands a request to the core; the answer is why a flush is due.
fn add(
    py: Python<'_>,
    core: &mut Core,
    engine: &qdp_core::Engine,
    data: Data<'_>,
) -> Result<Option<FlushReason>> {
    if !core.passes_through(&data.input()) {
        let layout = data.layout;
        let keep = Keep::Other(data.into_owned().into_owner());
        // SAFETY: the owner keeps the memory that the layout describes.
        return Ok(unsafe { core.submit(&layout.input(), keep) });
    }
    let usual = core.options().encode;
    let options = EncodeOptions { stream: usual.stream.or(data.stream), ..usual };
    let result = {
        let input = data.input();
        py.detach(|| core.pass_through(&input, &options))
    };
    let stream = options.stream.or_else(|| engine.stream());
    if let (Some(owner), Some(stream)) = (data.into_device_owner(), stream) {
        // Where this fails, the owner is dropped: the context is broken, and nothing runs in it.
        let _ = engine.keep_until_done(stream, owner);
    }
    result?;
    Ok(None)
}

/// Collects requests and encodes them together: made by :meth:`qdp.Engine.coalesce`.
///
/// A context manager: leaving it encodes what was submitted; where its body raises, what still
/// waits is not encoded, and its handles say that they are cancelled. Threads may share it.
#[pyclass(frozen, module = "qdp")]
pub(crate) struct Coalescer {
    engine: qdp_core::Engine,
    max_bytes: usize,
    state: Mutex<State>,
    /// Who has the state for long, without the GIL.
    worker: Mutex<Option<ThreadId>>,
    /// Keeps the stream that the options name.
    stream: Option<Py<PyAny>>,
}

struct State {
    core: Core,
    /// Exceptions of requests that Python could not make anything of, by their numbers.
    unreadable: HashMap<usize, Py<PyBaseException>>,
    ended: bool,
}

impl Coalescer {
    pub(crate) fn new(
        call: &Call<'_>,
        thresholds: &Thresholds,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> Result<Self> {
        let options = options(call, thresholds);
        let core = Core::new(call.engine.clone(), call.spec.clone(), options)?;
        let state = State { core, unreadable: HashMap::new(), ended: false };
        Ok(Self {
            engine: call.engine.clone(),
            max_bytes: options.max_bytes,
            state: Mutex::new(state),
            worker: Mutex::new(None),
            stream: stream.map(|stream| stream.clone().unbind()),
        })
    }

    /// The state. Whoever has it for long does not hold the GIL, and may want it: a signal's
    /// handler, say, which must not wait for the thread that it interrupts.
    fn lock(&self, py: Python<'_>) -> Result<MutexGuard<'_, State>> {
        loop {
            if let Some(state) = self.state.try_lock() {
                return Ok(state);
            }
            if *self.worker.lock() == Some(thread::current().id()) {
                let text = "this thread is encoding the batch: a signal's handler cannot use it";
                return Err(PyRuntimeError::new_err(text).into());
            }
            py.detach(|| drop(self.state.lock()));
        }
    }

    /// Works with the core without the GIL, and lets what was read go with it.
    fn work<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Core) -> T + Send) -> Result<T> {
        drop(self.lock(py)?);
        let (result, spent) = py.detach(|| {
            let mut state = self.state.lock();
            *self.worker.lock() = Some(thread::current().id());
            let result = work(&mut state.core);
            *self.worker.lock() = None;
            (result, state.core.take_spent())
        });
        drop(spent);
        Ok(result)
    }
}

#[pymethods]
impl Coalescer {
    /// Hand in one sample, shape `(features,)`, or several, shape `(samples, features)`, of any
    /// kind that encode takes. Returns a `CoalesceHandle` for the states.
    ///
    /// Nothing is copied: the data is kept, and must not change before it is encoded. What is
    /// wrong with it is raised by the handle. Data on a device and data larger than `max_bytes` is
    /// encoded at the call, behind what waits.
    fn submit<'py>(slf: &Bound<'py, Self>, data: &Bound<'py, PyAny>) -> Result<Handle> {
        let (py, this) = (slf.py(), slf.get());
        let due = match plain_sample(data).filter(|input| input.num_bytes() <= this.max_bytes) {
            Some(input) => {
                let mut state = this.open(py)?;
                let keep = Keep::Array(data.clone().unbind());
                // SAFETY: the array keeps its memory; changing it meanwhile is the caller's doing.
                let due = unsafe { state.core.submit(&input, keep) };
                Ok((state.core.len() - 1, due))
            }
            None => this.submit_any(data),
        };
        let (request, due) = due?;
        if let Some(reason) = due {
            this.flush_for(py, reason)?;
        }
        Ok(Handle { coalescer: slf.clone().unbind(), request })
    }

    /// Encode what waits.
    ///
    /// Raises what no request is to blame for, as `OutOfMemoryError`; their handles raise it, too.
    fn flush(&self, py: Python<'_>) -> Result<()> {
        self.flush_for(py, FlushReason::Demand)
    }

    /// All states, a `StateBatch` with the samples of all requests in the order in which they
    /// came. Encodes what waits first. Where requests were encoded in several batches, these are
    /// copied into one.
    ///
    /// Raises the first request's error where there is one.
    #[getter]
    fn states(&self, py: Python<'_>) -> Result<StateBatch> {
        match self.work(py, Core::states)? {
            Ok(states) => Ok(StateBatch::new(states, false)),
            Err(error) => {
                let state = self.lock(py)?;
                let first = state.core.first_failure().filter(|(_, first)| *first == error);
                let Some((request, _)) = first else { return Err(error.into()) };
                let failure = match state.unreadable.get(&request) {
                    Some(error) => raised(py, error),
                    None => Failure::Core(error),
                };
                drop(state);
                Err(about(py, failure, request))
            }
        }
    }

    /// Requests so far.
    fn __len__(&self, py: Python<'_>) -> Result<usize> {
        Ok(self.lock(py)?.core.len())
    }

    /// What was done so far, by name: `requests`, their `samples`, and how many requests `failed`,
    /// were `cancelled`, or `passed_through` without waiting; `flushes` by their reasons, which
    /// are `"demand"`, `"max_samples"`, `"max_bytes"` and `"order"` (a request that does not
    /// wait); `flushed_samples`, a dict from powers of two to the flushes of so many samples and
    /// less than twice as many; `waited_ns` and `longest_wait_ns`, of each flush's first request.
    fn stats<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>> {
        let stats = self.lock(py)?.core.stats().clone();
        let info = PyDict::new(py);
        info.set_item("requests", stats.requests)?;
        info.set_item("samples", stats.samples)?;
        info.set_item("failed", stats.failed)?;
        info.set_item("cancelled", stats.cancelled)?;
        info.set_item("passed_through", stats.passed_through)?;
        let flushes = PyDict::new(py);
        for (reason, count) in
            ["demand", "max_samples", "max_bytes", "order"].iter().zip(stats.flushes)
        {
            flushes.set_item(reason, count)?;
        }
        info.set_item("flushes", flushes)?;
        let sizes = PyDict::new(py);
        for (bucket, count) in stats.flushed_samples.iter().enumerate() {
            if *count > 0 {
                sizes.set_item(1_u64 << bucket, count)?;
            }
        }
        info.set_item("flushed_samples", sizes)?;
        info.set_item("waited_ns", stats.waited.as_nanos() as u64)?;
        info.set_item("longest_wait_ns", stats.longest_wait.as_nanos() as u64)?;
        Ok(info)
    }

    fn __repr__(&self, py: Python<'_>) -> Result<String> {
        let state = self.lock(py)?;
        let (requests, queued) = (state.core.len(), state.core.num_queued());
        Ok(format!("<qdp.Coalescer: {requests} requests, {queued} of them waiting>"))
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (exception, *_rest))]
    fn __exit__(&self, exception: &Bound<'_, PyAny>, _rest: &Bound<'_, PyAny>) -> Result<()> {
        let py = exception.py();
        self.lock(py)?.ended = true;
        if exception.is_none() {
            return self.flush(py);
        }
        self.work(py, Core::cancel)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.stream)?;
        // Somebody who has it at work is no garbage.
        let Some(state) = self.state.try_lock() else { return Ok(()) };
        for keep in state.core.kept() {
            if let Keep::Array(array) = keep {
                visit.call(array)?;
            }
        }
        state.unreadable.values().try_for_each(|error| visit.call(error))
    }
}

impl Coalescer {
    fn stream_handle(&self, py: Python<'_>) -> Result<Option<qdp_core::cuda::RawStream>> {
        let stream = self.stream.as_ref().map(|stream| stream.bind(py));
        crate::options::stream_for(&self.engine, stream)
    }

    fn flush_for(&self, py: Python<'_>, reason: FlushReason) -> Result<()> {
        Ok(self.work(py, |core| core.flush_for(reason))??)
    }

    /// The state of a scope that has not ended.
    fn open(&self, py: Python<'_>) -> Result<MutexGuard<'_, State>> {
        let state = self.lock(py)?;
        if state.ended {
            let expected = "a call before the end of the scope";
            return Err(Error::invalid("submit", expected, "one behind it").into());
        }
        Ok(state)
    }

    /// Hands in whatever may be data; returns the request's number.
    fn submit_any(&self, data: &Bound<'_, PyAny>) -> Result<(usize, Option<FlushReason>)> {
        let py = data.py();
        let imported =
            self.stream_handle(py).and_then(|stream| Data::import(data, &self.engine, stream));
        let imported = match imported {
            // Before the lock: to describe an exception may run any code.
            Err(Failure::Python(error)) => {
                let error = refusal(py, error)?;
                let got = first_line(py, &error);
                Err((Error::invalid("data", "an array", got), Some(error.into_value(py))))
            }
            Err(Failure::Core(error)) => Err((error, None)),
            Ok(data) => Ok(data),
        };
        let mut state = self.open(py)?;
        let request = state.core.len();
        match imported {
            Ok(data) => {
                let result = add(py, &mut state.core, &self.engine, data);
                let spent = state.core.take_spent();
                // Before what was read is let go, which may run any code.
                drop(state);
                drop(spent);
                return Ok((request, result?));
            }
            Err((error, exception)) => {
                state.core.fail(error);
                if let Some(exception) = exception {
                    state.unreadable.insert(request, exception);
                }
            }
        }
        Ok((request, None))
    }
}

/// The states of one request, once they are there.
#[pyclass(frozen, module = "qdp", name = "CoalesceHandle")]
pub(crate) struct Handle {
    coalescer: Py<Coalescer>,
    request: usize,
}

impl Handle {
    fn states(&self, py: Python<'_>) -> Result<StateBatch> {
        let coalescer = self.coalescer.get();
        if let Some(error) = coalescer.lock(py)?.unreadable.get(&self.request) {
            return Err(raised(py, error));
        }
        let states = coalescer.work(py, |core| core.result(self.request))??;
        Ok(StateBatch::new(states, false))
    }
}

#[pymethods]
impl Handle {
    /// The states, a `StateBatch` of shape `(samples, 2**num_qubits)`: a view of the batch that they
    /// were encoded in. Encodes what waits if this request does.
    ///
    /// Raises what is wrong with the data, as encode would;
    /// :class:`concurrent.futures.CancelledError` where it was cancelled.
    fn result(&self, py: Python<'_>) -> Result<StateBatch> {
        self.states(py)
    }

    /// What result raises, or None. What is no `Exception`, as `KeyboardInterrupt`, is raised.
    fn exception<'py>(&self, py: Python<'py>) -> Result<Option<Bound<'py, PyAny>>> {
        let Err(failure) = self.states(py) else { return Ok(None) };
        let error = PyErr::from(failure);
        if !error.is_instance_of::<PyException>(py) {
            return Err(error.into());
        }
        Ok(Some(error.into_value(py).into_bound(py).into_any()))
    }

    /// Whether the request waits no more.
    fn done(&self, py: Python<'_>) -> Result<bool> {
        Ok(self.coalescer.get().lock(py)?.core.is_done(self.request))
    }

    /// Whether the request was cancelled.
    fn cancelled(&self, py: Python<'_>) -> Result<bool> {
        Ok(self.coalescer.get().lock(py)?.core.is_cancelled(self.request))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)
    }

    fn __repr__(&self, py: Python<'_>) -> Result<String> {
        let state = if self.cancelled(py)? {
            "cancelled"
        } else if self.done(py)? {
            "done"
        } else {
            "waiting"
        };
        Ok(format!("<qdp.CoalesceHandle: request {}, {state}>", self.request))
    }
}
