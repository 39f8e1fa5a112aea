//! `Engine`, and the process's own engines.

use crate::batcher;
use crate::call::Call;
use crate::coalesce::{self, Coalescer, Thresholds};
use crate::errors::Result;
use crate::future;
use crate::graph::{CaptureArgs, Graph};
use crate::options::{self, SpecArgs};
use crate::pipeline::PipelineConfig;
use crate::plan::Plan;
use crate::state::StateBatch;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use qdp_core::config::Config;
use qdp_core::{Device, EncodeSpec, Encoding, Error, Precision};
use std::sync::OnceLock;

/// More than a process can see.
const MAX_DEVICES: usize = 128;

/// The process's engines: the CPU's, then those of the CUDA devices by ordinal. Each is opened
/// once and stays, so finding it takes no lock.
static ENGINES: [OnceLock<qdp_core::Engine>; 1 + MAX_DEVICES] =
    [const { OnceLock::new() }; 1 + MAX_DEVICES];

/// The process's engines that are open.
pub(crate) fn all_shared() -> impl Iterator<Item = &'static qdp_core::Engine> {
    ENGINES.iter().filter_map(OnceLock::get)
}

/// The process's engine for a device: what tensors are encoded with where no engine is named.
pub(crate) fn shared(device: Device) -> Result<&'static qdp_core::Engine> {
    let place = match device {
        Device::Cpu => 0,
        Device::Cuda(ordinal) => 1 + ordinal as usize,
    };
    let Some(engine) = ENGINES.get(place) else {
        let expected = format!("one of the first {MAX_DEVICES}");
        return Err(Error::invalid("device", expected, device).into());
    };
    if let Some(engine) = engine.get() {
        return Ok(engine);
    }
    // Outside `get_or_init`: opening may fail, and takes a while, and whoever waits may hold the
    // GIL. Of two that open at once, one stays.
    let opened = qdp_core::Engine::open(device)?;
    Ok(engine.get_or_init(|| opened))
}

/// Encodes classical data into batches of quantum states on one device.
///
/// `device` is `"cpu"`, `"cuda"` (the first GPU), `"cuda:N"` or `None` (`"cuda:0"` where it is
/// usable, else `"cpu"`). `precision` is `"complex64"`, `"complex128"` or `None`, which follows
/// each input: float64, complex128 and 64-bit integers give complex128, everything else complex64.
/// `pipeline` says how host input is brought to the device. An engine may be shared by threads.
///
/// Raises `DeviceUnavailableError` when a device is named and cannot be opened, and
/// `InvalidArgumentError` for a variable of the environment that is not what it may be.
#[pyclass(frozen, module = "qdp", name = "Engine")]
pub(crate) struct Engine {
    pub(crate) engine: qdp_core::Engine,
    pub(crate) precision: Option<Precision>,
}

impl Engine {
    fn call<'a>(
        &'a self,
        spec: &'a EncodeSpec,
        validate: &str,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> Result<Call<'a>> {
        Ok(Call {
            engine: &self.engine,
            spec,
            precision: self.precision,
            stream: options::stream_for(&self.engine, stream)?,
            validate_now: options::validate_now(validate)?,
            leave_overdue: false,
        })
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (device=None, *, precision=None, pipeline=None))]
    fn new(
        py: Python<'_>,
        device: Option<&str>,
        precision: Option<&str>,
        pipeline: Option<&PipelineConfig>,
    ) -> Result<Self> {
        Config::get().check()?;
        let precision = precision.map(options::precision).transpose()?;
        let device: Option<Device> = device.map(str::parse).transpose()?;
        let pipeline = pipeline.map(PipelineConfig::get).unwrap_or_default();
        let engine = py.detach(|| match device {
            None => Ok(qdp_core::Engine::open_default_with(pipeline)),
            Some(device) => qdp_core::Engine::open_with(device, pipeline),
        })?;
        Ok(Self { engine, precision })
    }

    /// The device, `"cpu"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> String {
        self.engine.device().to_string()
    }

    /// The precision of every result, or `None` where it follows the input.
    #[getter]
    fn precision(&self) -> Option<&'static str> {
        self.precision.map(Precision::name)
    }

    fn __repr__(&self) -> String {
        let precision = self.precision().map_or("None".to_owned(), |name| format!("'{name}'"));
        format!("Engine('{}', precision={precision})", self.engine.device())
    }

    /// Encode a sample, shape `(features,)`, or a batch of samples, shape `(batch, features)`.
    ///
    /// `data` is a NumPy array, a torch tensor, any array with `__dlpack__`, any Arrow array or
    /// table, or nested lists; the result is a `StateBatch` of shape `(batch, 2**num_qubits)`, or
    /// a view of `out`.
    ///
    /// `validate="deferred"` reports bad values of data on a device when the states are read or
    /// checked, `"now"` at the call; data on the host is always checked at the call. `stream` is
    /// the CUDA stream to work on: an integer handle or a stream object; without one, that of the
    /// tensor's framework, or the engine's own. `out` is a writable complex64 or complex128 array
    /// of shape `(batch, 2**num_qubits)` on the engine's device.
    #[pyo3(signature = (
        data, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", validate="deferred", stream=None, out=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn encode<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
        stream: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> Result<StateBatch> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let call = self.call(&spec, validate, stream)?;
        call.encode(data, out)
    }

    /// Encode asynchronously: what encode takes, for an `EncodeFuture` of what it returns.
    ///
    /// Data on the host is encoded on the engine's own thread, in the order of the calls; several
    /// calls may be in flight at once. The data is kept until the future is done and must not
    /// change before. Data on a device is encoded at the call, on its stream, so the future that
    /// comes back is done.
    ///
    /// What is wrong with the arguments raises at the call. What is wrong with the values, and what
    /// keeps the encode from being done when its turn comes (memory, the driver), is the future's.
    #[pyo3(signature = (
        data, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", validate="deferred", stream=None, out=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn encode_async<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
        stream: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let call = self.call(&spec, validate, stream)?;
        future::encode_async(&call, data, out, stream)
    }

    /// Encode a source of any length batch by batch: an iterator of `StateBatch`.
    ///
    /// `source` is an array of shape `(samples, features)`, which is cut into batches of
    /// `batch_size` samples where it lies (a `numpy.memmap` may be far larger than memory), or an
    /// iterable of batches, each encoded as it comes, or of samples, of which `batch_size` are
    /// collected. `batch_size=None` takes as many as keep `prefetch + 2` results within a quarter
    /// of the free memory, and each within a gibibyte. At most `prefetch` batches (2) are taken from
    /// the source and encoded ahead of the one that is asked for.
    ///
    /// Batches are read while later ones are asked for, so a source must not write to one that it
    /// has handed out; single samples are copied as they come. A table's rows are the samples.
    ///
    /// The other arguments are those of encode. An exception of the source or of an encode is
    /// raised in the place of its batch and ends the stream.
    #[pyo3(signature = (
        source, num_qubits, encoding="amplitude", *, batch_size=None, prefetch=None, rotation=None,
        reps=None, entanglement=None, convention="qdp", validate="deferred", stream=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn stream<'py>(
        slf: &Bound<'py, Self>,
        source: &Bound<'py, PyAny>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        batch_size: Option<&Bound<'py, PyAny>>,
        prefetch: Option<&Bound<'py, PyAny>>,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = slf.py();
        // What is wrong with an argument is said here, and not when the first batch is asked for.
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        options::validate_now(validate)?;
        options::stream_for(&slf.get().engine, stream)?;
        let batch_size =
            batch_size.map(|size| options::positive("batch_size", size)).transpose()?;
        let prefetch = prefetch.map_or(Ok(2), |prefetch| options::count("prefetch", prefetch))?;
        let arguments = PyDict::new(py);
        arguments.set_item("num_qubits", num_qubits)?;
        arguments.set_item("encoding", encoding)?;
        arguments.set_item("rotation", rotation)?;
        arguments.set_item("reps", reps)?;
        arguments.set_item("entanglement", entanglement)?;
        arguments.set_item("convention", convention)?;
        arguments.set_item("validate", validate)?;
        arguments.set_item("stream", stream)?;
        let class = CLASS.import(py, "qdp._stream", "StateStream")?;
        Ok(class.call1((slf, source, spec.dim(), batch_size, prefetch, arguments))?)
    }

    /// Encode the elements of an iterable as one batch: samples, shape `(features,)`, or batches of
    /// them, of any kind that encode takes and, for amplitude, of any lengths.
    ///
    /// Returns a `StateBatch` with the states in their order. Samples of several element types are
    /// converted to the widest of them first. Raises what encode raises, with a note on the element.
    #[pyo3(signature = (
        data, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", validate="deferred", stream=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn encode_list<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> Result<StateBatch> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let call = self.call(&spec, validate, stream)?;
        coalesce::encode_list(&call, data)
    }

    /// Collect samples one by one and encode them together: a scope whose end encodes what was
    /// submitted in it.
    ///
    /// `with engine.coalesce(10) as batch:` and in it `handle = batch.submit(x)`; then
    /// `handle.result()` are the states of x and `batch.states` those of all. What was submitted
    /// is also encoded when `max_samples` samples or `max_bytes` bytes wait. The other arguments
    /// are those of encode. Samples of several element types are converted to the widest of them
    /// first, and without a precision of the engine's the states have that type's.
    #[pyo3(signature = (
        num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", validate="deferred", stream=None, max_samples=None, max_bytes=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn coalesce<'py>(
        &self,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
        stream: Option<&Bound<'py, PyAny>>,
        max_samples: Option<&Bound<'py, PyAny>>,
        max_bytes: Option<&Bound<'py, PyAny>>,
    ) -> Result<Coalescer> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let call = self.call(&spec, validate, stream)?;
        let size = |argument, value: Option<&Bound<'py, PyAny>>| {
            value.map(|value| options::size(argument, value)).transpose()
        };
        let thresholds = Thresholds {
            max_samples: size("max_samples", max_samples)?,
            max_bytes: size("max_bytes", max_bytes)?,
        };
        Coalescer::new(&call, &thresholds, stream)
    }

    /// Resolve an encoding once, to call it on one batch after another.
    #[pyo3(signature = (
        num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp",
    ))]
    fn plan(
        &self,
        num_qubits: &Bound<'_, PyAny>,
        encoding: &str,
        rotation: Option<&str>,
        reps: Option<&Bound<'_, PyAny>>,
        entanglement: Option<&Bound<'_, PyAny>>,
        convention: &str,
    ) -> Result<Plan> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        Ok(Plan { engine: self.engine.clone(), precision: self.precision, spec })
    }

    /// Capture an encoding of batches of `batch_size` samples, to replay it: one launch brings a
    /// batch to the device, encodes it and records the event behind the states.
    ///
    /// `encoding` is a name, or a sequence of several for the same samples, names or pairs of a name
    /// and its options: the samples are brought once and encoded side by side. `batch_size` is a size
    /// or several: a smaller batch is padded to the next size. `input` is the samples' element type,
    /// a name or NumPy's or torch's (float64), and `features` the number of their values, by default
    /// as many as the encoding takes.
    ///
    /// `inputs` names small arrays that come with each batch, with a shape of one or two dimensions
    /// and an element type: `{"labels": ((None,), "int64")}`, where `None` stands for the number of
    /// samples. They travel with the samples in one copy. `constants` are arrays by name that are
    /// copied now. `validate` is for samples on the device, as encode has it; the options before it
    /// are those of encode.
    ///
    /// Returns a `Graph`, whose `replay(data, **inputs)` returns a `StateBatch`, or a `Replay` where
    /// there are several encodings, `inputs` or `constants`. On the CPU a replay is an encode.
    #[pyo3(signature = (
        num_qubits, encoding, batch_size, *, input=None, features=None, inputs=None, constants=None,
        rotation=None, reps=None, entanglement=None, convention="qdp", validate="deferred",
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn capture<'py>(
        &self,
        py: Python<'py>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &Bound<'py, PyAny>,
        batch_size: &Bound<'py, PyAny>,
        input: Option<&Bound<'py, PyAny>>,
        features: Option<&Bound<'py, PyAny>>,
        inputs: Option<&Bound<'py, PyDict>>,
        constants: Option<&Bound<'py, PyDict>>,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
        validate: &str,
    ) -> Result<Graph> {
        let spec = SpecArgs { num_qubits, encoding: "", rotation, reps, entanglement, convention };
        let capture = CaptureArgs {
            encoding,
            spec,
            batch_size,
            input,
            features,
            inputs,
            constants,
            validate,
        };
        capture.run(py, &self.engine, self.precision)
    }

    /// A `Batcher`: encodes the requests of many threads and asyncio tasks together.
    ///
    /// `num_qubits`, `encoding` and the options after them are those of requests that do not name
    /// their own. Where nothing is in flight a request starts at once, or when the oldest has
    /// waited for `max_delay_us` microseconds. A batch has at most `max_batch_bytes` of input, and
    /// of states, and `max_batch_samples` samples. `queue` requests may wait for their batch to
    /// start; of others, `when_full="wait"` waits for room and `"raise"` raises `QueueFullError`.
    #[pyo3(signature = (
        num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
        convention="qdp", max_delay_us=0.0, max_batch_bytes=None, max_batch_samples=None,
        queue=None, when_full="wait",
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn batcher<'py>(
        slf: &Bound<'py, Self>,
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
    ) -> Result<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = slf.py();
        let options = PyDict::new(py);
        options.set_item("rotation", rotation)?;
        options.set_item("reps", reps)?;
        options.set_item("entanglement", entanglement)?;
        options.set_item("convention", convention)?;
        options.set_item("max_delay_us", max_delay_us)?;
        options.set_item("max_batch_bytes", max_batch_bytes)?;
        options.set_item("max_batch_samples", max_batch_samples)?;
        options.set_item("queue", queue)?;
        options.set_item("when_full", when_full)?;
        let class = CLASS.import(py, "qdp._batcher", "Batcher")?;
        Ok(class.call((slf, num_qubits, encoding), Some(&options))?)
    }

    /// Wait for what was enqueued and raise the first thing that validation on the device found.
    fn check(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.engine.check())?)
    }

    /// Wait until everything that the engine enqueued on its own stream is done.
    fn synchronize(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.engine.synchronize())?)
    }

    /// Memory of the device in bytes: `free`, `total`, and of the engine's pool `reserved`, `used`.
    fn memory_info<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>> {
        let memory = py.detach(|| self.engine.memory_info())?;
        let info = PyDict::new(py);
        info.set_item("free", memory.free)?;
        info.set_item("total", memory.total)?;
        info.set_item("reserved", memory.reserved)?;
        info.set_item("used", memory.used)?;
        Ok(info)
    }

    /// What the pipeline for host input has done since the engine was opened, by name; all zero on
    /// the CPU, which has none.
    ///
    /// `calls` with host input, and of these `direct_calls` that took the direct path; `rounds` and
    /// `chunks`; `staged_bytes` copied to page-locked memory and `copied_bytes` to the device;
    /// `host_waits` for a slot, and `host_wait_ns` how long; `occupied_slots`, the sum over all
    /// chunks of the slots in use when a chunk took one, and `max_occupied_slots`; `copy_ns`,
    /// `compute_ns` and `overlap_ns`, in which copies, kernels and both were under way. These three
    /// are measured only with `PipelineConfig(timing=True)`, where asking waits for what is in
    /// flight.
    fn stats<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.engine.stats())?;
        let info = PyDict::new(py);
        for (name, value) in stats.entries() {
            info.set_item(name, value)?;
        }
        Ok(info)
    }

    /// What encoding `batch_size` samples will need and do, by name, without running it: of
    /// `num_features` values each (by default, as many as the encoding takes) of type `dtype`, on
    /// the host in memory that is not page-locked, or with `on_device` on the engine's GPU.
    ///
    /// `input_bytes`, `output_bytes` of the states, and `copied_bytes` that travel; `fits`, whether
    /// the states fit the `free_bytes`: encode raises `OutOfMemoryError` where they do not.
    /// `workspace_bytes` beside them; `rounds` and `chunks`, `slots` in use at a time and
    /// `slot_bytes` of each; `direct`, whether it takes the direct path. These are zero where the
    /// states do not fit. Raises what encode raises about its arguments.
    #[pyo3(signature = (
        num_qubits, encoding="amplitude", batch_size=None, *, dtype="float64", num_features=None,
        on_device=false, rotation=None, reps=None, entanglement=None, convention="qdp",
    ))]
    #[allow(clippy::too_many_arguments)] // one per keyword of the public method
    fn estimate<'py>(
        &self,
        py: Python<'py>,
        num_qubits: &Bound<'py, PyAny>,
        encoding: &str,
        batch_size: Option<&Bound<'py, PyAny>>,
        dtype: &str,
        num_features: Option<&Bound<'py, PyAny>>,
        on_device: bool,
        rotation: Option<&str>,
        reps: Option<&Bound<'py, PyAny>>,
        entanglement: Option<&Bound<'py, PyAny>>,
        convention: &str,
    ) -> Result<Bound<'py, PyDict>> {
        let spec =
            SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
        let count = |argument, value: Option<&Bound<'py, PyAny>>| {
            value.map(|value| options::count(argument, value)).transpose()
        };
        let batch_size = count("batch_size", batch_size)?.unwrap_or(1);
        let features = count("num_features", num_features)?;
        let samples = (dtype.parse()?, features.unwrap_or_else(|| spec.num_features()));
        let device = if on_device { self.engine.device() } else { Device::Cpu };
        let estimate =
            py.detach(|| self.engine.estimate(&spec, samples, batch_size, self.precision, device))?;
        crate::pipeline::estimate(py, &estimate)
    }

    /// Values per sample that an encoding takes; for amplitude the most, for basis the bits.
    #[pyo3(signature = (num_qubits, encoding))]
    #[allow(clippy::unused_self)] // a question to an engine, whatever it is answered from
    fn num_features(&self, num_qubits: &Bound<'_, PyAny>, encoding: &str) -> Result<usize> {
        let encoding = Encoding::parse(encoding, None, None, None)?;
        Ok(EncodeSpec::new(encoding, options::num_qubits(num_qubits)?)?.num_features())
    }
}

/// Tells the core that the process is about to end.
#[pyfunction]
pub(crate) fn begin_shutdown(py: Python<'_>) {
    if !is_main_interpreter(py) {
        return;
    }
    batcher::close_all(py);
    future::finish_all(py);
    qdp_core::cuda::begin_shutdown();
}

/// Whether this is the process's first interpreter, whose end is the process's. Others cannot import
/// this module, but run what it has registered.
fn is_main_interpreter(_py: Python<'_>) -> bool {
    // SAFETY: the GIL is held, so there is an interpreter.
    unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) == 0 }
}
