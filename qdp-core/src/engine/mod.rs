//! The engine: one device, opened, and what there is to ask of it. The calls that encode are in
//! [`encode`].

mod device;
mod encode;

pub use device::{Device, MemoryInfo};
pub use encode::EncodeOptions;

use crate::config::Config;
use crate::cpu;
use crate::cuda::{CudaBackend, PinnedBuffer, RawStream};
use crate::element::{DType, Precision};
use crate::encoding::EncodeSpec;
use crate::error::Result;
use crate::graph::{Graph, GraphSpec, InputSpec};
use crate::input::Input;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::dispatch::{Dispatched, Dispatcher};
use crate::pipeline::estimate::Estimate;
use crate::pipeline::stats::PipelineStats;
use crate::plan::Plans;
use std::fmt;
use std::sync::Arc;

enum Backend {
    Cpu,
    Cuda(Arc<CudaBackend>),
}

struct Shared {
    backend: Backend,
    plans: Plans,
    dispatcher: Dispatcher,
}

impl Shared {
    fn new(backend: Backend) -> Self {
        Self { backend, plans: Plans::default(), dispatcher: Dispatcher::default() }
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

    /// Runs `work` on the engine's dispatch thread, after everything that was dispatched before.
    /// Work that needs the engine takes a clone of it along.
    pub fn dispatch<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Dispatched<T> {
        self.shared.dispatcher.dispatch(work)
    }

    /// Raises the first thing that validation on the device found in encodes that were not asked
    /// yet, and forgets it. Waits for what was enqueued.
    pub fn check(&self) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.check(),
        }
    }

    /// [`Engine::check`] without waiting: what was found by now.
    pub(crate) fn raise_overdue(&self) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.start_call(false),
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
                Device::Cpu.check_holds("data", device)?;
                let memory = self.memory_info()?;
                let estimate = Estimate::of_sizes(&plan, batch, memory.free + memory.reserved);
                Ok(Estimate { direct: estimate.rounds > 0, ..estimate })
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

    /// Keeps `owner` until everything that is enqueued on `stream` now is done: for device input
    /// whose memory its producer may reuse as soon as it is let go.
    pub fn keep_until_done(&self, stream: RawStream, owner: Box<dyn Send>) -> Result<()> {
        match &self.shared.backend {
            Backend::Cpu => Ok(()),
            Backend::Cuda(cuda) => cuda.keep_until_done(stream, owner),
        }
    }
}
