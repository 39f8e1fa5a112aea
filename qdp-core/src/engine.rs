//! The engine: one device, its plans, and the calls that encode.

use crate::config::Config;
use crate::cpu;
use crate::cpu::memory::HostBuffer;
use crate::cuda::{CudaBackend, Encoded, PinnedBuffer, RawStream, Reading};
use crate::element::{DType, Precision};
use crate::encoding::EncodeSpec;
use crate::error::{Error, Result};
use crate::gradient::Gradient;
use crate::graph::{Graph, GraphSpec, InputSpec};
use crate::input::{Input, Output, OwnedInput};
use crate::interrupt::Interrupt;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::dispatch::{Dispatched, Dispatcher, EncodeFuture};
use crate::pipeline::estimate::Estimate;
use crate::pipeline::stats::PipelineStats;
use crate::plan::{EncodePlan, PlanKey};
use crate::state::{StateBatch, Storage};
use arc_swap::ArcSwapOption;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Plans kept per engine. More than a program uses; a bound so that a service fed with ever new
/// shapes does not grow.
const MAX_PLANS: usize = 1024;

/// A power of two.
const RECENT_PLANS: usize = 16;

/// Where an engine computes or an array lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// The host.
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()),
        };
        ordinal.map(Self::Cuda).ok_or_else(|| {
            Error::invalid("device", "\"cpu\", \"cuda\" or \"cuda:N\"", format!("{text:?}"))
        })
    }
}

/// How one encode is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeOptions {
    /// Precision of the result; `None` follows the input.
    pub precision: Option<Precision>,
    /// The caller's stream, on which device input is ready and the result is wanted.
    pub stream: Option<RawStream>,
    /// Wait for the validation of device input and raise at the call.
    pub validate_now: bool,
    /// Asked by a long call now and then, on the thread that made it, whether to go on: an error
    /// ([`Error::Interrupted`]) ends the call.
    pub interrupt: Option<fn() -> Result<()>>,
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Not in use by anybody.
    pub free: u64,
    /// In all.
    pub total: u64,
    /// Held by the engine's pool, in use or ready to be.
    pub reserved: u64,
    /// In use in the engine's pool.
    pub used: u64,
}

enum Backend {
    Cpu,
    Cuda(Arc<CudaBackend>),
}

struct Shared {
    backend: Backend,
    plans: RwLock<HashMap<PlanKey, Arc<EncodePlan>>>,
    /// Plans of late, by a few bits of their key: found without a lock or a hash.
    recent: [ArcSwapOption<EncodePlan>; RECENT_PLANS],
    dispatcher: Dispatcher,
}

impl Shared {
    fn new(backend: Backend) -> Self {
        Self {
            backend,
            plans: RwLock::default(),
            recent: Default::default(),
            dispatcher: Dispatcher::default(),
        }
    }
}

/// Encodes classical data on one device. Cloning shares it; threads may share it.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("device", &self.device()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Opens a device.
    ///
    /// # Errors
    ///
    /// [`Error::DeviceUnavailable`] says what is missing.
    pub fn open(device: Device) -> Result<Self> {
        Self::open_with(device, PipelineConfig::default())
    }

    /// Opens a device, with settings for the pipeline that brings host input to it. The CPU needs
    /// none.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for settings that do not go together, and for a variable of the
    /// environment that is not what it may be; those of [`Engine::open`].
    pub fn open_with(device: Device, pipeline: PipelineConfig) -> Result<Self> {
        Config::get().check()?;
        Self::open_whatever_the_environment(device, pipeline)
    }

    fn open_whatever_the_environment(device: Device, pipeline: PipelineConfig) -> Result<Self> {
        pipeline.validate()?;
        let backend = match device {
            Device::Cpu => Backend::Cpu,
            Device::Cuda(ordinal) => Backend::Cuda(CudaBackend::open(ordinal, pipeline)?),
        };
        Ok(Self { shared: Arc::new(Shared::new(backend)) })
    }

    /// Opens the first CUDA device where it is usable, else the CPU. Variables of the environment
    /// that are not what they may be count as not set ([`Config::check`] says so).
    pub fn open_default() -> Self {
        Self::open_default_with(PipelineConfig::default())
    }

    /// [`Engine::open_default`] with settings for the pipeline.
    pub fn open_default_with(pipeline: PipelineConfig) -> Self {
        let engine = Self::open_whatever_the_environment(Device::Cuda(0), pipeline);
        engine.unwrap_or_else(|reason| {
            tracing::info!("using the CPU backend: {reason}");
            Self { shared: Arc::new(Shared::new(Backend::Cpu)) }
        })
    }

    /// The device.
    pub fn device(&self) -> Device {
        match &self.shared.backend {
            Backend::Cpu => Device::Cpu,
            Backend::Cuda(cuda) => cuda.device(),
        }
    }

    /// The plan for inputs like `input`, made now or found again.
    pub fn plan(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        precision: Option<Precision>,
    ) -> Result<Arc<EncodePlan>> {
        let (dtype, features) = (input.dtype(), input.features());
        let precision = precision.unwrap_or_else(|| input.natural_precision());
        if input.affine().is_some() && !spec.encoding().takes_affine() {
            input.refuse_affine(&format!("{} encoding", spec.encoding().name()))?;
        }
        let place = spec.num_qubits() as usize + 5 * dtype as usize + 3 * precision as usize;
        let recent = &self.shared.recent[place % RECENT_PLANS];
        if let Some(plan) = recent.load_full()
            && plan.is_for(spec, dtype, features, precision)
        {
            return Ok(plan);
        }
        let plan = self.find_plan(PlanKey { spec: spec.clone(), dtype, features, precision })?;
        recent.store(Some(Arc::clone(&plan)));
        Ok(plan)
    }

    /// The plan for [`Engine::encode_into`]; refuses an output that the states do not fit.
    pub fn plan_into(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        output: &Output<'_>,
    ) -> Result<Arc<EncodePlan>> {
        let plan = self.plan(input, spec, Some(output.precision()))?;
        if (output.batch(), output.dim()) != (input.batch(), spec.dim()) {
            return Err(Error::Shape {
                argument: "out",
                expected: format!("({}, {})", input.batch(), spec.dim()),
                got: format!("({}, {})", output.batch(), output.dim()),
            });
        }
        if output.device() != self.device() {
            return Err(Error::DeviceMismatch {
                argument: "out",
                expected: self.device().to_string(),
                got: output.device().to_string(),
            });
        }
        Ok(plan)
    }

    fn find_plan(&self, key: PlanKey) -> Result<Arc<EncodePlan>> {
        // Nobody waits for these locks: a process may have been forked while a thread that it does
        // not have held one, and a plan is soon made.
        if let Some(plan) = self.shared.plans.try_read().and_then(|plans| plans.get(&key).cloned())
        {
            return Ok(plan);
        }
        let amplitude = *key.spec.encoding() == crate::encoding::Encoding::Amplitude;
        if key.dtype.is_complex() && !amplitude {
            return Err(Error::DType {
                argument: "data",
                expected: format!("a real type for {} encoding", key.spec.encoding().name()),
                got: key.dtype.to_string(),
            });
        }
        let plan = Arc::new(EncodePlan::new(key.clone())?);
        if let Some(mut plans) = self.shared.plans.try_write() {
            if plans.len() >= MAX_PLANS {
                plans.clear();
            }
            plans.insert(key, Arc::clone(&plan));
        }
        Ok(plan)
    }

    /// Encodes into new memory on the engine's device.
    pub fn encode(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        precision: Option<Precision>,
    ) -> Result<StateBatch> {
        self.encode_with(input, spec, &EncodeOptions { precision, ..EncodeOptions::default() })
    }

    /// Encodes into new memory on the engine's device.
    ///
    /// Host input is validated before this returns. Device input is read on
    /// [`EncodeOptions::stream`] (the engine's own where it is `None`), nothing waits for it, and
    /// its validation is deferred unless [`EncodeOptions::validate_now`] is set. It must stay valid
    /// until the stream has passed the encode.
    pub fn encode_with(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        options: &EncodeOptions,
    ) -> Result<StateBatch> {
        let plan = self.plan(input, spec, options.precision)?;
        match &self.shared.backend {
            Backend::Cpu => {
                check_host(input)?;
                let buffer = HostBuffer::new(plan.output_bytes(input.batch()))?;
                // SAFETY: the buffer is new, large enough, initialised and aligned to 64 bytes.
                let mut output = unsafe {
                    Output::from_raw(
                        buffer.as_ptr(),
                        plan.precision(),
                        Device::Cpu,
                        (input.batch(), spec.dim()),
                        spec.dim(),
                    )
                };
                cpu::encode(spec, plan.form(), input, &mut output, Interrupt::new(options))?;
                Ok(StateBatch::new(
                    Storage::Host(buffer),
                    plan.precision(),
                    spec.num_qubits(),
                    input.batch(),
                ))
            }
            Backend::Cuda(cuda) => {
                let states = cuda.encode(&plan, input, options)?;
                Ok(StateBatch::new(
                    Storage::Device(states),
                    plan.precision(),
                    spec.num_qubits(),
                    input.batch(),
                ))
            }
        }
    }

    /// Encodes into memory of the caller's on the engine's device; allocates nothing of the
    /// result's size. `options.precision` is taken from `output`.
    ///
    /// On a CUDA device `output` must stay valid until `options.stream` has passed the encode. On
    /// an error its contents are unspecified.
    pub fn encode_into(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        output: &mut Output<'_>,
        options: &EncodeOptions,
    ) -> Result<Encoded> {
        let plan = self.plan_into(input, spec, output)?;
        match &self.shared.backend {
            Backend::Cpu => {
                check_host(input)?;
                cpu::encode(spec, plan.form(), input, output, Interrupt::new(options))?;
                Ok(Encoded::default())
            }
            Backend::Cuda(cuda) => cuda.encode_into(&plan, input, output, options),
        }
    }

    /// Writes the gradient of a loss by the features, given its gradient by the states.
    ///
    /// `input` has shape `(batch, features)` and a floating element type, complex for amplitude
    /// encoding only; `cotangent`, shape `(batch, 2^n)`, complex64 or complex128, any strides, is
    /// `dL/d(Re psi) + i dL/d(Im psi)` for the states psi that encoding `input` gives. `gradient`
    /// has the shape and element type of `input`: `dL/dx`, or `dL/d(Re x) + i dL/d(Im x)`. Both lie
    /// on the engine's device, and must stay valid until `options.stream` has passed the call.
    /// Computed in the precision of `cotangent`; no other option counts. Where the features are
    /// mapped ([`Input::with_affine`]), the gradient is that by the mapped ones.
    ///
    /// Nothing is validated: a sample that has no state (a value that is not finite, a norm of
    /// zero) gets a gradient of NaN.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for basis encoding, which has no gradient; [`Error::DType`],
    /// [`Error::Shape`], [`Error::FeatureCount`] and [`Error::DeviceMismatch`] for arrays other than
    /// described, in arguments `data`, `grad` and `out`; what the device fails with.
    pub fn backward(
        &self,
        input: &Input<'_>,
        spec: &EncodeSpec,
        cotangent: &Input<'_>,
        gradient: &mut Gradient<'_>,
        options: &EncodeOptions,
    ) -> Result<()> {
        let precision = gradient.check(self.device(), spec, input, cotangent)?;
        let plan = self.plan(input, spec, Some(precision))?;
        match &self.shared.backend {
            Backend::Cpu => {
                let interrupt = Interrupt::new(options);
                cpu::gradient::backward(spec, plan.form(), input, cotangent, gradient, interrupt)
            }
            Backend::Cuda(cuda) => cuda.backward(&plan, input, cotangent, gradient, options),
        }
    }

    /// Encodes into new memory on the engine's device, asynchronously.
    ///
    /// Host input is encoded on the engine's dispatch thread, after every asynchronous encode
    /// before it, and let go before the future is done. Device input is encoded at the call, as
    /// its stream orders the work already; the future that comes back is done, and the input is
    /// kept until the stream has passed the encode. Every error comes through the future.
    pub fn encode_async(
        &self,
        input: OwnedInput,
        spec: EncodeSpec,
        options: EncodeOptions,
    ) -> EncodeFuture {
        if input.input().device() == Device::Cpu {
            let engine = self.clone();
            let stream = options.stream.map(RawStream::for_any_thread);
            let options = EncodeOptions { stream, ..options };
            return self.dispatch(move || engine.encode_with(&input.input(), &spec, &options));
        }
        let result = self.encode_with(&input.input(), &spec, &options);
        if let Some(stream) = options.stream.or_else(|| self.stream()) {
            // Where this fails, the owner is dropped: the context is broken, and nothing runs in
            // it any more.
            let _ = self.keep_until_done(stream, input.into_owner());
        }
        Dispatched::done(result)
    }

    /// Runs `work` on the engine's dispatch thread, after everything that was dispatched before.
    /// Work that needs the engine takes a clone of it along.
    pub fn dispatch<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Dispatched<T> {
        self.shared.dispatcher.dispatch(work)
    }

    /// Describes memory of the caller's, in use on `stream`, as a batch of states: those that the
    /// [`Engine::encode_into`] that answered `encoded` wrote.
    ///
    /// # Safety
    ///
    /// `output` describes memory that stays valid until `owner` is dropped.
    pub unsafe fn adopt(
        &self,
        output: &mut Output<'_>,
        num_qubits: u32,
        encoded: Encoded,
        stream: Option<RawStream>,
        owner: Box<dyn Send + Sync>,
    ) -> StateBatch {
        let shape = (output.batch(), output.row_stride());
        let precision = output.precision();
        match &self.shared.backend {
            Backend::Cpu => {
                let ptr = std::ptr::NonNull::new(output.as_mut_ptr())
                    .unwrap_or(std::ptr::NonNull::<u64>::dangling().cast());
                // SAFETY: passed on to the caller.
                unsafe { StateBatch::from_host_owner(ptr, precision, num_qubits, shape, owner) }
            }
            Backend::Cuda(cuda) => {
                let bytes = shape.0 * shape.1 * precision.size();
                // SAFETY: passed on to the caller.
                let states = unsafe {
                    cuda.adopt((output.as_mut_ptr() as u64, bytes), encoded, stream, owner)
                };
                StateBatch::new(Storage::Device(states), precision, num_qubits, shape.0)
                    .with_row_stride(shape.1)
            }
        }
    }

    /// Raises the first thing that validation on the device found in encodes that were not asked
    /// yet, and forgets it. Waits for what was enqueued.
    pub fn check(&self) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.check(),
        }
    }

    /// Waits until everything that the engine enqueued on its own stream is done.
    pub fn synchronize(&self) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// Memory of the device.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        match &self.shared.backend {
            Backend::Cpu => {
                let (total, available) = cpu::memory::system_memory();
                let reserved = cpu::memory::cached_bytes() as u64;
                Ok(MemoryInfo { free: available.unwrap_or(0), total, reserved, used: 0 })
            }
            Backend::Cuda(cuda) => cuda.memory_info(),
        }
    }

    /// What the pipeline for host input has done so far; all zeros on the CPU, which has none. With
    /// [`PipelineConfig::timing`], waits for what is in flight.
    pub fn stats(&self) -> Result<PipelineStats> {
        match &self.shared.backend {
            Backend::Cpu => Ok(PipelineStats::default()),
            Backend::Cuda(cuda) => cuda.stats(),
        }
    }

    /// What encoding so many samples will need and do, without running it: host input that is not
    /// page-locked, or, where `device` says so, input on the engine's device.
    pub fn estimate(
        &self,
        spec: &EncodeSpec,
        (dtype, features): (DType, usize),
        batch: usize,
        precision: Option<Precision>,
        device: Device,
    ) -> Result<Estimate> {
        // SAFETY: a plan asks for the shape and looks at no value.
        let input = unsafe {
            let strides = (features as isize, 1);
            Input::from_raw(std::ptr::null(), dtype, device, (batch, features), strides)
        };
        let plan = self.plan(&input, spec, precision)?;
        match &self.shared.backend {
            Backend::Cuda(cuda) => cuda.estimate(&plan, &input),
            Backend::Cpu => {
                check_host(&input)?;
                let memory = self.memory_info()?;
                let free = memory.free + memory.reserved;
                let output = plan.output_bytes(batch);
                let values = batch as u128 * features as u128;
                let bytes = |count: u128| u64::try_from(count).unwrap_or(u64::MAX);
                let fits = output <= u128::from(free);
                Ok(Estimate {
                    input_bytes: bytes(values * dtype.size() as u128),
                    output_bytes: bytes(output),
                    copied_bytes: 0,
                    workspace_bytes: 0,
                    slot_bytes: 0,
                    slots: 0,
                    rounds: u64::from(batch > 0 && fits),
                    chunks: 0,
                    direct: batch > 0 && fits,
                    free_bytes: free,
                    fits,
                })
            }
        }
    }

    /// Threads that host work runs on.
    pub fn num_threads() -> usize {
        Config::get().num_threads
    }

    /// The engine's own stream, on a CUDA device.
    pub fn stream(&self) -> Option<RawStream> {
        match &self.shared.backend {
            Backend::Cpu => None,
            Backend::Cuda(cuda) => Some(cuda.stream()),
        }
    }

    /// Captures encodes for replay, with values that are copied to the device once.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for sizes, inputs and names that cannot be, those of
    /// [`Engine::plan`], [`Error::OutOfMemory`], [`Error::Driver`]. Nothing is left behind then.
    pub fn capture(&self, spec: GraphSpec, constants: &[(InputSpec, Input<'_>)]) -> Result<Graph> {
        Graph::capture(self, spec, constants)
    }

    pub(crate) fn cuda(&self) -> Option<&Arc<CudaBackend>> {
        match &self.shared.backend {
            Backend::Cpu => None,
            Backend::Cuda(cuda) => Some(cuda),
        }
    }

    /// Page-locked memory, on a CUDA device.
    pub(crate) fn pinned_buffer(&self, bytes: usize) -> Option<Result<PinnedBuffer>> {
        match &self.shared.backend {
            Backend::Cpu => None,
            Backend::Cuda(cuda) => Some(cuda.pinned_buffer(bytes)),
        }
    }

    /// Encodes the first `batch` rows of page-locked memory on a CUDA device, whose values were
    /// checked, and waits for nothing.
    ///
    /// # Safety
    ///
    /// Nobody writes the rows before what comes back says that they were read, nor frees them.
    pub(crate) unsafe fn encode_checked(
        &self,
        plan: &EncodePlan,
        rows: &PinnedBuffer,
        batch: usize,
    ) -> Option<Result<(StateBatch, Reading)>> {
        let Backend::Cuda(cuda) = &self.shared.backend else { return None };
        // SAFETY: passed on to the caller.
        let encoded = unsafe { cuda.encode_checked(plan, rows, batch) };
        let (precision, qubits) = (plan.precision(), plan.spec().num_qubits());
        Some(encoded.map(|(states, reading)| {
            (StateBatch::new(Storage::Device(states), precision, qubits, batch), reading)
        }))
    }

    /// Keeps `owner` until everything that is enqueued on `stream` now is done: for device input
    /// whose memory its producer may reuse as soon as it is let go.
    pub fn keep_until_done(&self, stream: RawStream, owner: Box<dyn Send>) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.keep_until_done(stream, owner),
        }
    }
}

fn check_host(input: &Input<'_>) -> Result<()> {
    if input.device() == Device::Cpu {
        return Ok(());
    }
    Err(Error::DeviceMismatch {
        argument: "data",
        expected: "cpu".to_owned(),
        got: input.device().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_in_torch() {
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
