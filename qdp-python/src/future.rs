//! `Engine.encode_async`: encodes on the engine's dispatch thread, as `qdp.EncodeFuture`.
//!
//! A job owns the engine, the data and the memory for its result. It holds the GIL only when it is
//! over, to let the data go and set the result. What refers to each other in a circle, the future
//! and the job that is to set it, does so only until the job runs or is cancelled.
//!
//! Before the interpreter ends, no job may be left that needs it: [`finish_all`] lets the running
//! ones end and has the others cancelled.

use crate::call::Call;
use crate::errors::{Failure, Result};
use crate::input::Data;
use crate::output::{OwnedTarget, count_write};
use crate::state::StateBatch;
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use qdp_core::cuda::RawStream;
use qdp_core::pipeline::dispatch::{Dispatched, catch};
use qdp_core::{Device, EncodeOptions, EncodeSpec, Error, OwnedInput};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;

/// Encodes data on a device at once, anything else on the engine's dispatch thread.
pub(crate) fn encode_async<'py>(
    call: &Call<'_>,
    data: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
    stream: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let py = data.py();
    let in_flight = InFlight::enter()?;
    let target = out.map(|out| call.target(data, out)).transpose()?;
    let ready = call.stream.or(target.as_ref().and_then(|target| target.stream));
    let data = Data::import(data, call.engine, ready)?;
    let future = new_future(py)?;
    if data.layout.device != Device::Cpu {
        settle(&future, call.encode_to(py, data, target))?;
        return Ok(future);
    }
    let options = call.options(&data, ready);
    if let Some(target) = &target {
        call.check_target(&data, target)?;
    }
    let target = target.map(OwnedTarget::from);
    {
        let input = data.input();
        match &target {
            Some(target) => call.engine.plan_into(&input, call.spec, &target.output)?,
            None => call.engine.plan(&input, call.spec, call.precision)?,
        };
    }
    // From now on, and again when it was written to.
    count_write(py, target.as_ref().and_then(|target| target.tensor.as_ref()))?;
    let job = Job {
        engine: call.engine.clone(),
        spec: call.spec.clone(),
        options: EncodeOptions {
            stream: options.stream.map(RawStream::for_any_thread),
            interrupt: None,
            ..options
        },
        input: data.into_owned(),
        target,
        stream: stream.map(|stream| stream.clone().unbind()),
        future: future.clone().unbind(),
    };
    // Without the GIL, as in a forked process the job runs here.
    let run = move || {
        job.run(in_flight);
        Ok(())
    };
    let dispatched = py.detach(|| call.engine.dispatch(run));
    future.setattr(intern!(py, "_job"), Dispatch { dispatched })?;
    Ok(future)
}

fn new_future(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    CLASS.import(py, "qdp._future", "EncodeFuture")?.call0()
}

/// Sets a future's result, or the exception that belongs there. What is wrong with the call itself
/// is returned.
fn settle(future: &Bound<'_, PyAny>, result: Result<StateBatch>) -> Result<()> {
    let py = future.py();
    let settled = match result {
        Ok(state) => future.call_method1(intern!(py, "set_result"), (state,)),
        Err(Failure::Core(
            error @ (Error::ZeroNorm { .. }
            | Error::NormOverflow { .. }
            | Error::NonFinite { .. }
            | Error::BasisValue { .. }),
        )) => {
            let error = PyErr::from(Failure::Core(error)).into_value(py);
            future.call_method1(intern!(py, "set_exception"), (error,))
        }
        Err(other) => return Err(other),
    };
    settled.map(drop)?;
    Ok(())
}

/// An encode that waits for its turn, with everything it needs.
struct Job {
    engine: qdp_core::Engine,
    spec: EncodeSpec,
    options: EncodeOptions,
    input: OwnedInput,
    target: Option<OwnedTarget>,
    /// Keeps the stream that the options name.
    stream: Option<Py<PyAny>>,
    future: Py<PyAny>,
}

impl Job {
    /// Encodes and sets the future.
    fn run(self, in_flight: InFlight) {
        // Dropped last: nothing here needs the interpreter any more when it is gone.
        let _in_flight = in_flight;
        let Self { engine, spec, options, input, mut target, stream, future } = self;
        let tensor = target.as_mut().and_then(|target| target.tensor.take());
        let result = (!CLOSED.load(Ordering::SeqCst))
            .then(|| catch(|| encode(&engine, &spec, &options, &input, target)));
        // Before anybody learns of the end.
        drop(engine);
        let settle = |py: Python<'_>| {
            drop((input, stream));
            let future = future.into_bound(py);
            if let Err(error) = count_write(py, tensor.as_ref()) {
                error.write_unraisable(py, Some(&future));
            }
            let settled = match result {
                None => future.call_method0(intern!(py, "_cancel_unstarted")),
                Some(Ok(state)) => future.call_method1(intern!(py, "set_result"), (state,)),
                Some(Err(error)) => {
                    let error = PyErr::from(Failure::Core(error)).into_value(py);
                    future.call_method1(intern!(py, "set_exception"), (error,))
                }
            };
            // A callback raised what is no `Exception`, or somebody else set the future.
            if let Err(error) = settled {
                error.write_unraisable(py, Some(&future));
            }
        };
        // There is an interpreter for as long as this is in flight, but for one that ends without
        // running its exit functions.
        let _ = Python::try_attach(settle);
    }
}

fn encode(
    engine: &qdp_core::Engine,
    spec: &EncodeSpec,
    options: &EncodeOptions,
    input: &OwnedInput,
    target: Option<OwnedTarget>,
) -> qdp_core::Result<StateBatch> {
    let input = input.input();
    let Some(mut target) = target else {
        return Ok(StateBatch::new(engine.encode_with(&input, spec, options)?, false));
    };
    let encoded = engine.encode_into(&input, spec, &mut target.output, options)?;
    if target.wait {
        engine.synchronize()?;
    }
    let OwnedTarget { mut output, owner, single, .. } = target;
    let qubits = spec.num_qubits();
    // SAFETY: the memory that was just encoded into is the owner's, which goes along.
    let state = unsafe { engine.adopt(&mut output, qubits, encoded, options.stream, owner) };
    Ok(StateBatch::new(state, single))
}

/// A future's way to its job.
#[pyclass(frozen, module = "qdp")]
struct Dispatch {
    dispatched: Dispatched<()>,
}

#[pymethods]
impl Dispatch {
    /// Keep the job from starting. True only where it was this call that did.
    fn cancel(&self) -> bool {
        self.dispatched.cancel()
    }

    /// Whether the job has begun and is not done.
    fn is_running(&self) -> bool {
        self.dispatched.is_running()
    }
}

/// A process's number in the upper half, and how many of its jobs are in flight in the lower one:
/// those of the process that this one was forked from do not count here.
static IN_FLIGHT: AtomicU64 = AtomicU64::new(0);
/// No more jobs: the interpreter is about to end.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// Who waits until nothing is in flight.
static WAITING: OnceLock<Thread> = OnceLock::new();

/// Counts a job from its call until it needs Python no more.
struct InFlight {
    process: u32,
}

impl InFlight {
    fn enter() -> PyResult<Self> {
        let process = std::process::id();
        let own = u64::from(process) << 32;
        let _ = IN_FLIGHT.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |packed| {
            Some(own + count(packed, process) + 1)
        });
        let entered = Self { process };
        // Behind the counting, so that either this sees the end coming or the end waits for this.
        if CLOSED.load(Ordering::SeqCst) {
            let message = "cannot encode asynchronously when the interpreter is about to end";
            return Err(PyRuntimeError::new_err(message));
        }
        Ok(entered)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        IN_FLIGHT.fetch_sub(1, Ordering::SeqCst);
        if CLOSED.load(Ordering::SeqCst)
            && let Some(waiting) = WAITING.get()
        {
            waiting.unpark();
        }
    }
}

fn count(packed: u64, process: u32) -> u64 {
    if packed >> 32 == u64::from(process) { packed & u64::from(u32::MAX) } else { 0 }
}

/// Refuses further jobs, has those cancelled that have not begun, and waits for those that have.
pub(crate) fn finish_all(py: Python<'_>) {
    let _ = WAITING.set(std::thread::current());
    CLOSED.store(true, Ordering::SeqCst);
    let process = std::process::id();
    py.detach(|| {
        while count(IN_FLIGHT.load(Ordering::SeqCst), process) > 0 {
            std::thread::park();
        }
    });
}
