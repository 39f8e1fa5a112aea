//! `Batcher`: the native half of it, which encodes.

use crate::call::Call;
use crate::engine::Engine;
use crate::errors::{Failure, Result};
use crate::event_loop::{EventLoop, EventLoops};
use crate::input::Data;
use crate::interrupt::{has_raised, interrupt, raising};
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use crate::turnstile;
use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qdp_core::coalesce::batcher::{Listener, Request, RequestOptions};
use qdp_core::{BatcherConfig, Device, EncodeSpec, Encoding, Error, Precision, WhenFull};
use std::borrow::Cow;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Those that are open: closed before the interpreter ends.
static BATCHERS: Mutex<Vec<Weak<qdp_core::Batcher>>> = Mutex::new(Vec::new());

/// Closes every batcher: no thread is left that needs the interpreter.
pub(crate) fn close_all(py: Python<'_>) {
    py.detach(|| {
        let open = std::mem::take(&mut *BATCHERS.lock());
        for batcher in open.iter().filter_map(Weak::upgrade) {
            batcher.close();
        }
    });
}

/// What `qdp.Batcher` is built on.
#[pyclass(frozen, subclass, module = "qdp", name = "BatcherCore")]
pub(crate) struct BatcherCore {
    batcher: Arc<qdp_core::Batcher>,
    spec: EncodeSpec,
    precision: Option<Precision>,
    /// The arguments that the spec was made of, for requests that name some anew.
    defaults: Py<PyDict>,
    loops: EventLoops,
}

/// What a request may name anew.
struct Overrides<'a, 'py> {
    num_qubits: Option<&'a Bound<'py, PyAny>>,
    encoding: Option<&'a str>,
    rotation: Option<&'a str>,
    reps: Option<&'a Bound<'py, PyAny>>,
    entanglement: Option<&'a Bound<'py, PyAny>>,
    convention: Option<&'a str>,
}

impl BatcherCore {
    /// What a request is to be encoded as.
    fn spec(&self, py: Python<'_>, named: &Overrides<'_, '_>) -> Result<Cow<'_, EncodeSpec>> {
        let none = named.num_qubits.is_none()
            && named.encoding.is_none()
            && named.rotation.is_none()
            && named.reps.is_none()
            && named.entanglement.is_none()
            && named.convention.is_none();
        if none {
            return Ok(Cow::Borrowed(&self.spec));
        }
        let defaults = self.defaults.bind(py);
        let default = |name: &str| -> PyResult<Option<Bound<'_, PyAny>>> {
            Ok(defaults.get_item(name)?.filter(|value| !value.is_none()))
        };
        let (num_qubits, encoding) = (default("num_qubits")?, default("encoding")?);
        let encoding = encoding.map(|name| name.extract::<String>()).transpose()?;
        let encoding = named.encoding.or(encoding.as_deref()).unwrap_or("amplitude");
        // Options of an encoding go with it: another one has its own.
        let same = named.encoding.is_none_or(|name| {
            Encoding::parse(name, None, None, None)
                .is_ok_and(|named| named.name() == self.spec.encoding().name())
        });
        let option = |name| if same { default(name) } else { Ok(None) };
        let (rotation, reps) = (option("rotation")?, option("reps")?);
        let entanglement = option("entanglement")?;
        let rotation = rotation.map(|name| name.extract::<String>()).transpose()?;
        let spec = SpecArgs {
            num_qubits: match (named.num_qubits, &num_qubits) {
                (Some(named), _) => named,
                (None, Some(own)) => own,
                (None, None) => return Ok(Cow::Borrowed(&self.spec)),
            },
            encoding,
            rotation: named.rotation.or(rotation.as_deref()),
            reps: named.reps.or(reps.as_ref()),
            entanglement: named.entanglement.or(entanglement.as_ref()),
            convention: named.convention.unwrap_or(self.spec.convention().name()),
        };
        spec.parse().map(Cow::Owned)
    }

    fn options(&self, deadline: Option<f64>, priority: i32) -> Result<RequestOptions> {
        let deadline = deadline.map(from_now).transpose()?.flatten();
        let interrupt = Some(interrupt as fn() -> qdp_core::Result<()>);
        Ok(RequestOptions { precision: self.precision, deadline, priority, interrupt })
    }

    /// Encodes data on a device: at once, as the engine does, but validated now, so that nobody
    /// else's request meets its errors.
    fn encode_device(
        &self,
        py: Python<'_>,
        data: Data<'_>,
        spec: &EncodeSpec,
        options: &RequestOptions,
    ) -> Result<StateBatch> {
        self.batcher.count_direct()?;
        if options.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::DeadlineExceeded.into());
        }
        let (engine, precision) = (self.batcher.engine(), self.precision);
        let (validate_now, leave_overdue) = (true, true);
        let call = Call { engine, spec, precision, stream: None, validate_now, leave_overdue };
        call.encode_to(py, data, None)
    }
}

/// The instant in so many seconds; `None` where that is never.
fn from_now(seconds: f64) -> Result<Option<Instant>> {
    if seconds.is_nan() {
        return Err(Error::invalid("deadline", "seconds from now", seconds).into());
    }
    let duration = Duration::try_from_secs_f64(seconds.max(0.0)).ok();
    Ok(duration.and_then(|duration| Instant::now().checked_add(duration)))
}

#[pymethods]
impl BatcherCore {
    #[new]
    #[pyo3(signature = (
        engine, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", max_delay_us=0.0, max_batch_bytes=None, max_batch_samples=None,
        queue=None, when_full="wait",
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn new<'py>(
        engine: &Bound<'py, Engine>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        max_delay_us: f64,
        max_batch_bytes: Option<&Bound<'py, PyAny>>,
        max_batch_samples: Option<&Bound<'py, PyAny>>,
        queue: Option<&Bound<'py, PyAny>>,
        when_full: &str,
    ) -> Result<Self> {
        let py = engine.py();
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let usual = BatcherConfig::default();
        let max_delay = Duration::try_from_secs_f64(max_delay_us / 1e6)
            .map_err(|_| Error::invalid("max_delay_us", "a non-negative number", max_delay_us))?;
        let sized = |argument, value: Option<&Bound<'py, PyAny>>, usual| {
            value.map_or(Ok(usual), |value| options::size(argument, value))
        };
        let config = BatcherConfig {
            max_delay,
            max_batch_bytes: sized("max_batch_bytes", max_batch_bytes, usual.max_batch_bytes)?,
            max_batch_samples: sized(
                "max_batch_samples",
                max_batch_samples,
                usual.max_batch_samples,
            )?,
            queue: sized("queue", queue, usual.queue)?,
            when_full: match when_full {
                "wait" => WhenFull::Wait,
                "raise" => WhenFull::Refuse,
                _ => return Err(options::unknown("when_full", "\"wait\" or \"raise\"", when_full)),
            },
        };
        let defaults = PyDict::new(py);
        defaults.set_item("num_qubits", num_qubits)?;
        defaults.set_item("encoding", encoding)?;
        defaults.set_item("rotation", rotation)?;
        defaults.set_item("reps", reps)?;
        defaults.set_item("entanglement", entanglement)?;
        let (engine, precision) = (&engine.get().engine, engine.get().precision);
        let batcher = Arc::new(qdp_core::Batcher::new(engine, config)?);
        let mut open = BATCHERS.lock();
        open.retain(|other| other.strong_count() > 0);
        open.push(Arc::downgrade(&batcher));
        drop(open);
        let (defaults, loops) = (defaults.unbind(), EventLoops::default());
        Ok(Self { batcher, spec, precision, defaults, loops })
    }

    /// Number of qubits of requests that name no other.
    #[getter]
    fn num_qubits(&self) -> u32 {
        self.spec.num_qubits()
    }

    /// Name of the encoding of requests that name no other.
    #[getter]
    fn encoding(&self) -> &'static str {
        self.spec.encoding().name()
    }

    /// The device, `"cpu"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> String {
        self.batcher.engine().device().to_string()
    }

    /// Whether it takes no more requests.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        py.detach(|| self.batcher.is_closed())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!(
            "Batcher(num_qubits={}, encoding='{}', device='{}'{})",
            self.num_qubits(),
            self.encoding(),
            self.device(),
            if self.closed(py) { ", closed" } else { "" },
        )
    }

    /// Encode a sample, shape `(features,)`, or several, shape `(rows, features)`, together with
    /// what others ask for meanwhile.
    ///
    /// What is named here takes the place of what the batcher was made with; options of another
    /// encoding have to be named with it. `deadline` is in seconds from now: a request that has not
    /// started by then raises `DeadlineExceededError`. Requests of higher `priority` start first.
    ///
    /// Raises what `Engine.encode` raises about this request, `QueueFullError` and
    /// `BatcherClosedError`. Data on a device, and requests larger than a batch, are encoded by
    /// themselves.
    #[pyo3(signature = (
        data, num_qubits=None, encoding=None, *, rotation=None, reps=None, entanglement=None,
        convention=None, deadline=None, priority=0,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn encode<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        num_qubits: Option<&Bound<'py, PyAny>>,
        encoding: Option<&str>,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: Option<&str>,
        deadline: Option<f64>,
        priority: i32,
    ) -> Result<StateBatch> {
        let py = data.py();
        let named = Overrides { num_qubits, encoding, rotation, reps, entanglement, convention };
        let (spec, options) = (self.spec(py, &named)?, self.options(deadline, priority)?);
        let data = Data::import(data, self.batcher.engine(), None)?;
        if data.layout.device != Device::Cpu {
            return self.encode_device(py, data, &spec, &options);
        }
        let input = data.input();
        let encode = || self.batcher.encode(&input, &spec, &options);
        let state = raising(|| turnstile::detach(py, encode))??;
        Ok(StateBatch::new(state, false))
    }

    /// Queue a request of a task of `event_loop`: its future, and the request, which is `None` where
    /// the future is done.
    #[pyo3(signature = (
        event_loop, data, num_qubits=None, encoding=None, rotation=None, reps=None,
        entanglement=None, convention=None, deadline=None, priority=0, /,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn submit<'py>(
        &self,
        event_loop: &Bound<'py, PyAny>,
        data: &Bound<'py, PyAny>,
        num_qubits: Option<&Bound<'py, PyAny>>,
        encoding: Option<&str>,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: Option<&str>,
        deadline: Option<f64>,
        priority: i32,
    ) -> Result<(Bound<'py, PyAny>, Option<BatcherRequest>)> {
        let py = data.py();
        let named = Overrides { num_qubits, encoding, rotation, reps, entanglement, convention };
        let (spec, options) = (self.spec(py, &named)?, self.options(deadline, priority)?);
        let data = Data::import(data, self.batcher.engine(), None)?;
        let future = event_loop.call_method0(intern!(py, "create_future"))?;
        if data.layout.device != Device::Cpu {
            let state = self.encode_device(py, data, &spec, &options)?;
            future.call_method1(intern!(py, "set_result"), (state,))?;
            return Ok((future, None));
        }
        let listener = self.loops.listener(event_loop, &self.batcher)?;
        let token = listener.expect(&future);
        let mut input = Some(data.into_owned());
        let told: Arc<dyn Listener> = Arc::clone(&listener) as _;
        let request = raising(|| {
            let submit = || self.batcher.submit_to(&mut input, &spec, &options, told, token);
            let request = py.detach(submit)?;
            if request.is_to_be_led() {
                listener.lead_later(py, &self.batcher);
            }
            if has_raised() {
                // Nobody will wait for it.
                py.detach(|| request.cancel());
            }
            Ok(request)
        });
        drop(input); // with the GIL, where it was read already
        match request.map_err(Failure::Python).flatten() {
            Ok(request) => Ok((future, Some(BatcherRequest { request, listener, token }))),
            Err(failure) => {
                listener.forget(token);
                Err(failure)
            }
        }
    }

    /// Take no more requests, and wait until those that wait are encoded.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        raising(|| py.detach(|| self.batcher.close()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.loops.traverse(&visit)
    }

    fn __clear__(&self) {
        self.loops.clear();
    }

    /// What the batcher has done, by name.
    ///
    /// `requests` encoded (those that were alone whatever came of it), in so many `batches`, and
    /// `batch_sizes`: by a power of two, how many batches had at least as many samples and less
    /// than twice as many. `started_idle`, `started_next`, `started_delay`, `started_full` and
    /// `started_close`: how many batches were started as nothing was in flight, as the one before
    /// was over, as the oldest request had waited for the longest delay, as there was no more room,
    /// and as the batcher was closed.
    /// `queue_wait_ns` from the arrival of requests until their batches started, in all, and
    /// `max_queue_wait_ns`. `direct` requests were encoded by themselves, as they were too large
    /// or on a device; `refused`, `expired`, `cancelled` and `invalid` ones not at all. `waiting` is
    /// how many wait now.
    fn stats<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>> {
        let (stats, waiting) = py.detach(|| (self.batcher.stats(), self.batcher.waiting()));
        let info = PyDict::new(py);
        for (name, value) in stats.entries() {
            info.set_item(name, value)?;
        }
        info.set_item("waiting", waiting)?;
        let sizes = PyDict::new(py);
        for (class, &count) in stats.batch_sizes.iter().enumerate().filter(|(_, count)| **count > 0)
        {
            sizes.set_item(1_u64 << class, count)?;
        }
        info.set_item("batch_sizes", sizes)?;
        Ok(info)
    }
}

impl Drop for BatcherCore {
    fn drop(&mut self) {
        // Without the GIL, which the worker may be waiting for. Where there is no interpreter any
        // more, it was closed before.
        let _ = Python::try_attach(|py| py.detach(|| self.batcher.close()));
    }
}

/// A request of a task's.
#[pyclass(frozen, module = "qdp")]
pub(crate) struct BatcherRequest {
    request: Request,
    listener: Arc<EventLoop>,
    token: u64,
}

#[pymethods]
impl BatcherRequest {
    /// Keep the request from being encoded. True only where it was this call that did.
    fn cancel(&self, py: Python<'_>) -> PyResult<bool> {
        raising(|| {
            let cancelled = py.detach(|| self.request.cancel());
            if cancelled {
                self.listener.forget(self.token);
            }
            cancelled
        })
    }
}
