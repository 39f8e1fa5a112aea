//! One CUDA device, open: what an encode on it does.
//!
//! Device input is encoded on the caller's stream and nothing waits. Host input goes through the
//! ring, encoded on the engine's own stream, or on the caller's where there is one to order with.
//! Everything a captured encode touches is kept until the process ends, as nobody says when the
//! last replay of somebody else's graph is over.

use super::board::Board;
use super::kernels::{Chunk as Part, CommonArgs, Held, Kernels, LaunchStream};
use super::lanes::Lanes;
use super::states::Ready;
use super::{
    Context, DeviceBuffer, DeviceStates, DeviceSummary, Event, Pool, RawStream, Stream, Ticket,
    probe,
};
use crate::encoding::Form;
use crate::engine::{Device, EncodeOptions, MemoryInfo};
use crate::error::{Error, Result, Unavailable};
use crate::input::Input;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::stats::Counters;
use crate::plan::EncodePlan;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the backend prepares for a plan.
#[derive(Debug)]
pub struct PreparedPlan {
    /// How often each pair is coupled, for a diagonal form.
    pub(super) multiplicity: Option<Arc<DeviceBuffer>>,
}

/// What captured encodes touch: never dropped.
struct Captured {
    _backend: Arc<CudaBackend>,
    _workspace: [Option<DeviceBuffer>; 2],
    _multiplicity: Option<Arc<DeviceBuffer>>,
}

static CAPTURED: Mutex<Vec<Captured>> = Mutex::new(Vec::new());

/// What is done behind the kernels of device input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Nothing: they are part of a graph.
    Captured,
    /// They are noted, and what they find is raised later.
    Noted,
    /// The call waits for them and raises what they find.
    Checked,
}

/// What an encode into the caller's memory leaves to be asked about.
#[derive(Debug, Clone, Copy, Default)]
#[must_use = "adopt the output with it, or drop it where nobody asks about this encode alone"]
pub struct Encoded {
    ticket: Option<Ticket>,
    captured: bool,
}

impl Encoded {
    pub(super) fn of(ticket: Ticket) -> Self {
        Self { ticket: Some(ticket), captured: false }
    }

    pub(super) fn ticket(self) -> Option<Ticket> {
        self.ticket
    }

    pub(super) fn ready(self) -> Ready {
        self.ticket.filter(|_| !self.captured).map_or(Ready::Now, Ready::Encoded)
    }
}

pub(crate) struct CudaBackend {
    // Dropped in this order: what may be in flight before what it uses.
    pub(super) lanes: Mutex<Lanes>,
    pub(super) config: PipelineConfig,
    pub(super) counters: Counters,
    kept: Mutex<Vec<(Event, Box<dyn Send>)>>,
    /// Whether anything is kept: asked at every call.
    keeps: AtomicBool,
    pub(super) board: Board,
    /// By their contents. They stay, as encodes in flight on any stream read them.
    multiplicities: Mutex<HashMap<Vec<u8>, Arc<DeviceBuffer>>>,
    pub(super) kernels: Kernels,
    pub(super) pool: Arc<Pool>,
    stream: Arc<Stream>,
    pub(super) context: Arc<Context>,
}

/// Asked before anything else: a driver would not help a build without kernels.
fn require_kernels() -> Result<(), Unavailable> {
    qdp_kernels::IMAGE.map(|_| ()).ok_or(Unavailable::KernelsNotBuilt)
}

/// The CUDA devices that the driver sees, without opening one.
pub fn devices() -> Result<Vec<DeviceSummary>, Unavailable> {
    require_kernels()?;
    let driver = probe()?;
    (0..driver.device_count)
        .map(|ordinal| {
            Ok(DeviceSummary {
                ordinal: ordinal as u32,
                name: driver.device_name(ordinal)?,
                compute_capability: driver.compute_capability(ordinal)?,
                total_memory: driver.total_memory(ordinal)?,
            })
        })
        .collect::<Result<_>>()
        .map_err(|error| Unavailable::Driver(error.to_string()))
}

impl CudaBackend {
    pub(crate) fn open(ordinal: u32, config: PipelineConfig) -> Result<Arc<Self>> {
        config.validate()?;
        let device = || Device::Cuda(ordinal).to_string();
        require_kernels()
            .map_err(|reason| Error::DeviceUnavailable { device: device(), reason })?;
        let context = Context::open(i32::try_from(ordinal).unwrap_or(i32::MAX))?;
        let kernels = Kernels::load(&context)?;
        let stream = Stream::new(&context)?;
        let pool = Pool::new(&context, None)?;
        let board = Board::new(&context, &pool)?;
        Ok(Arc::new(Self {
            lanes: Mutex::new(Lanes::new(&context, &config)?),
            config,
            counters: Counters::default(),
            kept: Mutex::default(),
            keeps: AtomicBool::new(false),
            board,
            multiplicities: Mutex::default(),
            kernels,
            pool,
            stream,
            context,
        }))
    }

    pub(crate) fn device(&self) -> Device {
        Device::Cuda(self.context.ordinal() as u32)
    }

    pub(crate) fn stream(&self) -> RawStream {
        self.stream.raw()
    }

    pub(super) fn event_on(&self, stream: RawStream) -> Result<Event> {
        let event = Event::new(&self.context)?;
        event.record(stream)?;
        Ok(event)
    }

    /// Memory in the order of the engine's own stream.
    pub(super) fn allocate(&self, bytes: usize) -> Result<DeviceBuffer> {
        self.pool.alloc(bytes, &self.stream)
    }

    /// Memory that `stream` may use at once.
    fn allocate_for(&self, bytes: usize, stream: RawStream) -> Result<DeviceBuffer> {
        let buffer = self.allocate(bytes)?;
        if stream != self.stream() {
            stream.wait(&self.event_on(self.stream())?)?;
            buffer.used_on(stream);
        }
        Ok(buffer)
    }

    /// Encodes into new memory.
    pub(crate) fn encode(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        options: &EncodeOptions,
    ) -> Result<DeviceStates> {
        let stream = options.stream.unwrap_or(self.stream());
        if stream.is_capturing(&self.context)? {
            return Err(Error::Capturing {
                call: "allocating a result",
                hint: "encode a torch tensor, or pass out=",
            });
        }
        self.start_call(options.leave_overdue)?;
        let bytes = self.result_bytes(plan, input.batch())?;
        let buffer = self.allocate_for(bytes, stream)?;
        let dim = plan.spec().dim();
        let encoded = self.encode_to(plan, input, (buffer.ptr(), dim as u64), stream, options)?;
        Ok(DeviceStates::new(Arc::clone(self), buffer, encoded.ready(), encoded.ticket))
    }

    /// Encodes into the caller's memory.
    pub(crate) fn encode_into(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        output: &mut Output<'_>,
        options: &EncodeOptions,
    ) -> Result<Encoded> {
        let align = output.precision().size();
        if !output.as_mut_ptr().addr().is_multiple_of(align) {
            let expected = format!("memory aligned to {align} bytes");
            let got = format!("address {:p}", output.as_mut_ptr());
            return Err(Error::invalid("out", expected, got));
        }
        self.start_call(options.leave_overdue)?;
        let stream = options.stream.unwrap_or(self.stream());
        let target = (output.as_mut_ptr() as u64, output.row_stride() as u64);
        self.encode_to(plan, input, target, stream, options)
    }

    /// Describes memory of the caller's, in use on `stream`, as the states of an encode.
    ///
    /// # Safety
    ///
    /// `bytes` from `ptr` stay valid until `owner` is dropped.
    pub(crate) unsafe fn adopt(
        self: &Arc<Self>,
        (ptr, bytes): (u64, usize),
        encoded: Encoded,
        stream: Option<RawStream>,
        owner: Box<dyn Send + Sync>,
    ) -> DeviceStates {
        let stream = stream.unwrap_or(self.stream());
        // SAFETY: the caller's promise; the owner frees its memory in the order of the stream it
        // was used on, as torch's allocator does.
        let buffer = unsafe { DeviceBuffer::external(&self.context, ptr, bytes, owner, stream) };
        DeviceStates::new(Arc::clone(self), buffer, encoded.ready(), encoded.ticket)
    }

    /// What every call does first: raise what is overdue, if it does not leave that, and let go of
    /// what is done with.
    pub(crate) fn start_call(&self, leave_overdue: bool) -> Result<()> {
        if let Some(error) = self.context.take_drop_failure() {
            return Err(error);
        }
        if !leave_overdue && let Some(error) = self.board.take()? {
            return Err(error);
        }
        self.release_done();
        Ok(())
    }

    pub(super) fn encode_to(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        (output, output_stride): (u64, u64),
        stream: RawStream,
        options: &EncodeOptions,
    ) -> Result<Encoded> {
        if input.batch() == 0 {
            return Ok(Encoded::default());
        }
        let captured = stream.is_capturing(&self.context)?;
        let target = (output, output_stride);
        match input.device() {
            Device::Cpu if captured => Err(Error::Capturing {
                call: "encoding host data",
                hint: "move the data to the device first",
            }),
            Device::Cpu => self.encode_host(plan, input, target, stream, Interrupt::new(options)),
            device @ Device::Cuda(_) if device == self.device() => {
                if captured && options.validate_now {
                    return Err(Error::Capturing {
                        call: "validate=\"now\"",
                        hint: "leave validation deferred and call engine.check() after a replay",
                    });
                }
                let ticket = self.board.issue(plan, captured)?;
                let args = self.args(plan, input, target, ticket);
                let end = if options.validate_now { End::Checked } else { End::Noted };
                self.launch(
                    plan,
                    args,
                    ticket,
                    if captured { End::Captured } else { end },
                    stream,
                )?;
                Ok(Encoded { ticket: Some(ticket), captured })
            }
            device @ Device::Cuda(_) => Err(Error::DeviceMismatch {
                argument: "data",
                expected: format!("{} or the host", self.device()),
                got: device.to_string(),
            }),
        }
    }

    /// The kernels' arguments.
    pub(super) fn args(
        &self,
        plan: &EncodePlan,
        input: &Input<'_>,
        output: (u64, u64),
        ticket: Ticket,
    ) -> CommonArgs {
        CommonArgs::new(input, output, self.board.addresses(ticket), plan.spec().num_qubits())
    }

    /// Enqueues the kernels for device input that need no caller's graph, behind whatever the
    /// stream waits for.
    ///
    /// # Safety
    ///
    /// `args` describe valid input and output in the order of `stream`.
    pub(super) unsafe fn enqueue(
        self: &Arc<Self>,
        plan: &EncodePlan,
        args: CommonArgs,
        stream: RawStream,
    ) -> Result<()> {
        // Without overlap: what these kernels wait for is an event, not a kernel.
        // SAFETY: the caller's promise.
        unsafe { self.enqueue_with(plan, args, stream, false, LaunchStream::after_event(stream)) }
    }

    /// Enqueues a part of a long sample, and with the last one what scales it.
    ///
    /// # Safety
    ///
    /// As for [`CudaBackend::enqueue`]; `sums` is workspace for the sample.
    pub(super) unsafe fn enqueue_part(
        &self,
        plan: &EncodePlan,
        args: CommonArgs,
        part: Part,
        sums: &DeviceBuffer,
        last: bool,
        stream: RawStream,
    ) -> Result<()> {
        let (precision, to) = (plan.precision(), LaunchStream::after_event(stream));
        // SAFETY: the caller's promise.
        unsafe {
            self.kernels.enqueue_spread(precision, args, part, sums.ptr(), to)?;
            if last {
                self.kernels.enqueue_scale(precision, args, part, sums.ptr(), to)?;
            }
        }
        Ok(())
    }

    fn launch(
        self: &Arc<Self>,
        plan: &EncodePlan,
        args: CommonArgs,
        ticket: Ticket,
        end: End,
        stream: RawStream,
    ) -> Result<()> {
        let captured = end == End::Captured;
        let to = self.kernels.on(stream, captured);
        // SAFETY: the caller describes valid input and output.
        let launched = unsafe { self.enqueue_with(plan, args, stream, captured, to) };
        let ended = match end {
            End::Captured => return launched,
            End::Noted => {
                launched.and_then(|()| self.board.enqueued(ticket, stream).map(|()| None))
            }
            End::Checked => launched.and_then(|()| self.board.finish(ticket, stream)),
        };
        let found = ended.inspect_err(|_| self.board.abandon(ticket, stream))?;
        found.map_or(Ok(()), Err)
    }

    /// # Safety
    ///
    /// `args` describe valid input and output in the order of `stream`.
    unsafe fn enqueue_with(
        self: &Arc<Self>,
        plan: &EncodePlan,
        args: CommonArgs,
        stream: RawStream,
        captured: bool,
        to: LaunchStream,
    ) -> Result<()> {
        let prepared = self.prepare(plan)?;
        let work = |bytes| self.working_memory(bytes, captured, stream);
        let workspace = work(Kernels::workspace_bytes(plan, &args))?;
        let rows = match work(Kernels::rows_bytes(plan, &args)) {
            Err(Error::OutOfMemory { .. }) => None, // slower without
            rows => rows?,
        };
        let ptr = |buffer: Option<&DeviceBuffer>| buffer.map_or(0, DeviceBuffer::ptr);
        let held = Held {
            workspace: ptr(workspace.as_ref()),
            rows: ptr(rows.as_ref()),
            multiplicity: ptr(prepared.multiplicity.as_deref()),
        };
        // SAFETY: the caller's promise; record, flags, multiplicity and workspace are the
        // backend's, which outlives its enqueued work: its drop waits for its own stream and the
        // board's slots, and captured encodes keep it for good.
        let launched = unsafe { self.kernels.enqueue(plan, args, held, to) };
        if captured {
            // Also where a later launch failed: the graph may hold an earlier one.
            self.keep_captured([workspace, rows], prepared);
        }
        launched
    }

    /// Keeps what a captured launch touches.
    pub(super) fn keep_captured(
        self: &Arc<Self>,
        workspace: [Option<DeviceBuffer>; 2],
        prepared: &PreparedPlan,
    ) {
        CAPTURED.lock().push(Captured {
            _backend: Arc::clone(self),
            _workspace: workspace,
            _multiplicity: prepared.multiplicity.clone(),
        });
    }

    /// Memory for an encode on `stream`, or for the replays of one that is captured.
    pub(super) fn working_memory(
        &self,
        bytes: usize,
        captured: bool,
        stream: RawStream,
    ) -> Result<Option<DeviceBuffer>> {
        if bytes == 0 {
            return Ok(None);
        }
        if !captured {
            return self.pool.alloc_on(bytes, stream).map(Some);
        }
        // Ordered before the graph by waiting here: only the allocation is waited for.
        let buffer = self.allocate(bytes)?;
        self.stream.synchronize()?;
        Ok(Some(buffer))
    }

    pub(super) fn prepare<'a>(&self, plan: &'a EncodePlan) -> Result<&'a PreparedPlan> {
        if let Some(prepared) = plan.cuda.get() {
            return Ok(prepared);
        }
        let multiplicity = match plan.form() {
            Form::Diagonal(diagonal) => {
                let bytes: Vec<u8> =
                    diagonal.multiplicity.iter().flat_map(|times| times.to_ne_bytes()).collect();
                Some(self.multiplicity(bytes)?)
            }
            _ => None,
        };
        Ok(plan.cuda.get_or_init(|| PreparedPlan { multiplicity }))
    }

    /// These multiplicities in device memory.
    fn multiplicity(&self, bytes: Vec<u8>) -> Result<Arc<DeviceBuffer>> {
        let mut known = self.multiplicities.lock();
        if let Some(buffer) = known.get(&bytes) {
            return Ok(Arc::clone(buffer));
        }
        let buffer = self.allocate(bytes.len())?;
        // Waits, so that the plan is ready for every stream.
        buffer.copy_from_host(0, &bytes, self.stream())?;
        let buffer = Arc::new(buffer);
        known.insert(bytes, Arc::clone(&buffer));
        Ok(buffer)
    }

    /// Values in device memory, there when this returns.
    pub(crate) fn upload(self: &Arc<Self>, values: &[u8]) -> Result<DeviceStates> {
        let buffer = self.allocate(values.len())?;
        buffer.copy_from_host(0, values, self.stream())?;
        Ok(DeviceStates::new(Arc::clone(self), buffer, Ready::Now, None))
    }

    /// Bytes of the result, refused before any work where they cannot fit.
    pub(super) fn result_bytes(&self, plan: &EncodePlan, batch: usize) -> Result<usize> {
        const LOOK_FIRST: u128 = 256 << 20;
        let needed = plan.output_bytes(batch);
        if needed > LOOK_FIRST {
            let info = self.memory_info()?;
            let free = info.free + info.reserved.saturating_sub(info.used);
            if needed > u128::from(free) {
                return Err(Error::OutOfMemory {
                    device: self.device().to_string(),
                    needed: u64::try_from(needed).unwrap_or(u64::MAX),
                    free,
                    total: info.total,
                    hint: "lower num_qubits or the batch size, or use precision=\"complex64\"",
                });
            }
        }
        Ok(needed as usize)
    }

    /// The event behind an encode; `None` where it was reached long ago.
    pub(super) fn event(&self, ticket: Ticket) -> Option<&Event> {
        self.board.event(ticket)
    }

    pub(super) fn check_ticket(&self, ticket: Ticket) -> Result<()> {
        self.board.check(ticket)
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.stream.synchronize()?;
        self.board.synchronize()?;
        self.board.take()?.map_or(Ok(()), Err)
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    pub(crate) fn memory_info(&self) -> Result<MemoryInfo> {
        let (free, total) = self.context.memory_info()?;
        Ok(MemoryInfo {
            free,
            total,
            reserved: self.pool.reserved_bytes()?,
            used: self.pool.used_bytes()?,
        })
    }

    pub(crate) fn keep_until_done(&self, stream: RawStream, owner: Box<dyn Send>) -> Result<()> {
        let done = self.event_on(stream).inspect_err(|_| self.settle(stream))?;
        let mut kept = self.kept.lock();
        kept.push((done, owner));
        self.keeps.store(true, Ordering::Release);
        Ok(())
    }

    /// Waits for the stream where a failed call would leave nothing else to say when the work is
    /// done that uses the caller's memory. Where this fails too, the device has stopped.
    pub(super) fn settle(&self, stream: RawStream) {
        if let Err(error) = stream.synchronize(&self.context) {
            tracing::warn!(%error, "work in flight after an error could not be waited for");
        }
    }

    /// Drops what was kept for work that is done.
    fn release_done(&self) {
        if !self.keeps.load(Ordering::Acquire) {
            return;
        }
        // Taken out first: dropping runs other libraries' destructors, which may come back here.
        let done: Vec<_> = {
            let mut kept = self.kept.lock();
            let done = kept.extract_if(.., |(event, _)| event.query().unwrap_or(false)).collect();
            self.keeps.store(!kept.is_empty(), Ordering::Release);
            done
        };
        drop(done);
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Kernels in flight write the board, and read what is kept for them.
        let wait = || self.stream.synchronize().and(self.board.synchronize());
        let waited = self.context.undeterred(wait);
        if let Err(error) = waited {
            self.context.record_drop_failure(error);
        }
    }
}
