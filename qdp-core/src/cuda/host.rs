//! Host input on a CUDA device: through the ring, round by round.

use super::kernels::{CommonArgs, Kernels};
use super::lanes::Call;
use super::{
    CudaBackend, DeviceStates, Encoded, Event, PageLocked, PinnedBuffer, RawStream, Ticket,
};
use crate::element::DType;
use crate::engine::{Device, EncodeOptions};
use crate::error::Result;
use crate::input::Input;
use crate::interrupt::Interrupt;
use crate::pipeline::drive::drive;
use crate::pipeline::estimate::Estimate;
use crate::pipeline::plan::{Cut, Samples};
use crate::pipeline::stage::{Staging, link_dtype};
use crate::pipeline::stats::{Counters, PipelineStats};
use crate::plan::EncodePlan;
use crate::trace;
use std::sync::Arc;

/// Host memory that an encode reads.
pub(crate) struct Reading {
    backend: Arc<CudaBackend>,
    encoded: Encoded,
}

impl Reading {
    /// Whether it was read. Where the device cannot say, it has stopped, and reads nothing any more.
    pub(crate) fn is_over(&self) -> bool {
        self.event().is_none_or(|event| event.query().unwrap_or(true))
    }

    /// Waits until it was read.
    pub(crate) fn wait(&self) {
        if let Some(Err(error)) = self.event().map(Event::synchronize) {
            tracing::warn!(%error, "host memory that was being read could not be waited for");
        }
    }

    fn event(&self) -> Option<&Event> {
        self.encoded.ticket().and_then(|ticket| self.backend.event(ticket))
    }
}

impl CudaBackend {
    /// Page-locked memory, for input that is collected where the device copies it from.
    pub(crate) fn pinned_buffer(&self, bytes: usize) -> Result<PinnedBuffer> {
        PinnedBuffer::new(&self.context, bytes)
    }

    /// What the pipeline has done; with timing, waits for what is in flight.
    pub(crate) fn stats(&self) -> Result<PipelineStats> {
        let mut stats = self.counters.snapshot();
        if let Some(timeline) = &self.lanes.lock().timeline {
            let busy = timeline.busy()?;
            stats.copy_ns = busy.copy.as_nanos() as u64;
            stats.compute_ns = busy.compute.as_nanos() as u64;
            stats.overlap_ns = busy.overlap.as_nanos() as u64;
        }
        Ok(stats)
    }

    /// What encoding `input` will need and do; its values are not looked at.
    pub(crate) fn estimate(&self, plan: &EncodePlan, input: &Input<'_>) -> Result<Estimate> {
        let memory = self.memory_info()?;
        let free = memory.free + memory.reserved.saturating_sub(memory.used);
        let mut estimate = Estimate::of_sizes(plan, input.batch(), free);
        let host = input.device() == Device::Cpu;
        let size = link_dtype(plan).size();
        if host {
            let values = input.batch() as u128 * input.features() as u128;
            estimate.copied_bytes = u64::try_from(values * size as u128).unwrap_or(u64::MAX);
        }
        if !estimate.fits {
            // It is refused before it is planned, and the plan might not fit, either.
            return Ok(estimate);
        }
        let workspace = |input: &Input<'_>| {
            let record = (0, 0, 0);
            let args = CommonArgs::new(input, (0, 0), record, plan.spec().num_qubits());
            Kernels::workspace_bytes(plan, &args) as u64
        };
        if !host {
            estimate.workspace_bytes = workspace(input);
            return Ok(estimate);
        }
        // Chunks are the same without the pieces, which nobody asks for here.
        let samples = Samples { features: input.features(), size, staged: false, growing: true };
        let per_round = samples.per_round(&self.config, self.round_bytes(input)?);
        estimate.rounds = input.batch().div_ceil(per_round) as u64;
        estimate.slot_bytes = self.config.max_chunk_bytes as u64;
        let (whole, last) = (input.batch() / per_round, input.batch() % per_round);
        for (rounds, samples_of_round) in [(whole, per_round), (1, last)] {
            if rounds * samples_of_round == 0 {
                continue;
            }
            let cut = Cut::new(0..samples_of_round, samples, &self.config);
            let chunks = cut.chunks.len();
            estimate.chunks += (rounds * chunks) as u64;
            estimate.slots = estimate.slots.max(chunks.min(self.config.slots) as u64);
            estimate.direct |= cut.direct && estimate.rounds == 1;
            let beside = if cut.split {
                Kernels::split_workspace_bytes(plan.features()) as u64
            } else {
                let largest = cut.chunks.iter().map(|chunk| chunk.rows.len()).max().unwrap_or(0);
                // SAFETY: a workspace depends on the shape; no value is looked at.
                let chunk = unsafe {
                    let (ptr, shape) = (std::ptr::null(), (largest, input.features()));
                    let strides = (input.features() as isize, 1);
                    Input::from_raw(ptr, link_dtype(plan), self.device(), shape, strides)
                };
                workspace(&chunk)
            };
            estimate.workspace_bytes = estimate.workspace_bytes.max(beside);
        }
        Ok(estimate)
    }

    /// Host input goes through the ring, round by round.
    pub(super) fn encode_host(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        output: (u64, u64),
        stream: RawStream,
        mut interrupt: Interrupt,
    ) -> Result<Encoded> {
        input.refuse_affine("samples in host memory on a CUDA engine")?;
        let _range = trace::range("qdp encode");
        let held = (input.has_no_gaps() && !self.must_stage(plan, input))
            .then(|| PageLocked::find(&self.context, input.as_ptr(), input.num_bytes()))
            .flatten();
        let page_locked = held.is_some();
        let dtype = if page_locked { input.dtype() } else { link_dtype(plan) };
        let samples = Samples {
            features: input.features(),
            size: dtype.size(),
            staged: !page_locked,
            growing: !page_locked,
        };
        let per_round = samples.per_round(&self.config, self.round_bytes(input)?);
        let mut staging = Staging::new(plan, input);
        let mut ticket = self.board.issue(plan, false)?;
        Counters::add(&self.counters.calls, 1);
        let mut first = 0;
        while first < input.batch() {
            interrupt.poll().inspect_err(|_| self.board.abandon(ticket, stream))?;
            let cut = Cut::new(first..input.batch().min(first + per_round), samples, &self.config);
            let source = (!page_locked).then_some(&staging);
            let sums = self
                .run_round(plan, input, source, &cut, dtype, output, ticket, stream, &mut interrupt)
                .inspect_err(|_| self.board.abandon(ticket, stream))
                .map_err(|error| staging.first_error(&cut, error))?;
            let settled = page_locked
                || staging
                    .settle(&cut, &sums)
                    .inspect_err(|_| self.board.abandon(ticket, stream))?;
            if settled {
                let whole = per_round >= input.batch();
                Counters::add(&self.counters.direct_calls, usize::from(whole && cut.direct));
                first += per_round;
            } else {
                // The kernels have seen values that are out of range for their type, and said so.
                self.board.abandon(ticket, stream);
                ticket = self.board.issue(plan, false)?;
            }
        }
        let ended = if page_locked {
            self.board.finish(ticket, stream)
        } else {
            self.board.enqueued(ticket, stream).map(|()| None)
        };
        if let Some(error) = ended.inspect_err(|_| self.board.abandon(ticket, stream))? {
            // The device knows chunks; what is wrong with which sample is seen here.
            return staging.scan(0..input.batch()).and(Err(error));
        }
        Ok(Encoded::of(ticket))
    }

    /// Encodes rows without gaps in page-locked memory, whose values were checked, on the engine's
    /// own stream, and waits for nothing.
    ///
    /// # Safety
    ///
    /// Nobody writes the rows before what comes back says that they were read, nor frees them.
    pub(crate) unsafe fn encode_checked(
        self: &Arc<Self>,
        plan: &EncodePlan,
        rows: &PinnedBuffer,
        batch: usize,
    ) -> Result<(DeviceStates, Reading)> {
        let (stream, features) = (self.stream(), plan.features());
        let bytes = batch * features * plan.dtype().size();
        self.start_call(true)?; // checked by others, for others
        let output = self.allocate(self.result_bytes(plan, batch)?)?;
        let values = self.allocate(bytes)?;
        let enqueue = || {
            // SAFETY: the caller's promise; the rest is told to wait where this fails.
            unsafe { values.copy_from_host_async(0, rows, 0..bytes, stream)? };
            let ptr = std::ptr::with_exposed_provenance::<u8>(values.ptr() as usize);
            let strides = (features as isize, 1);
            // SAFETY: the values are copied to that memory in the order of the stream.
            let input = unsafe {
                Input::from_raw(ptr, plan.dtype(), self.device(), (batch, features), strides)
            };
            let target = (output.ptr(), plan.spec().dim() as u64);
            self.encode_to(plan, &input, target, stream, &EncodeOptions::default())
        };
        let encoded = enqueue().inspect_err(|_| self.settle(stream))?;
        let reading = Reading { backend: Arc::clone(self), encoded };
        Ok((DeviceStates::new(Arc::clone(self), output, encoded.ready(), None), reading))
    }

    /// Whether page-locked input has to be staged all the same: a long sample is written to the
    /// result before it is scaled, where its values must not be out of range.
    fn must_stage(&self, plan: &EncodePlan, input: &Input<'_>) -> bool {
        let row_bytes = input.features() * input.dtype().size();
        row_bytes > self.config.max_chunk_bytes && link_dtype(plan) != input.dtype()
    }

    /// Most bytes of a round where the configuration names none: a quarter of what is free, so that
    /// what works beside a round has room.
    fn round_bytes(&self, input: &Input<'_>) -> Result<usize> {
        const LEAST: usize = 256 << 20;
        const MOST: usize = 1 << 30;
        // Asking takes longer than many a call.
        if input.num_bytes() <= LEAST || self.config.max_batch_bytes.is_some() {
            return Ok(LEAST);
        }
        let memory = self.memory_info()?;
        let free = memory.free + memory.reserved.saturating_sub(memory.used);
        Ok((free / 4).clamp(LEAST as u64, MOST as u64) as usize)
    }

    #[allow(clippy::too_many_arguments)] // what a round is
    fn run_round(
        self: &Arc<Self>,
        plan: &EncodePlan,
        input: &Input<'_>,
        staging: Option<&Staging<'_>>,
        cut: &Cut,
        dtype: DType,
        output: (u64, u64),
        ticket: Ticket,
        stream: RawStream,
        interrupt: &mut Interrupt,
    ) -> Result<Vec<f64>> {
        let _range = trace::range("qdp round");
        let sums = if cut.split {
            let bytes = Kernels::split_workspace_bytes(plan.features());
            Some(self.pool.alloc_on(bytes, stream)?)
        } else {
            None
        };
        let call = Call {
            backend: self,
            plan,
            input,
            staging,
            dtype,
            output,
            ticket,
            stream,
            direct: cut.direct,
            sums: sums.as_ref(),
        };
        let counters = &self.counters;
        Counters::add(&counters.rounds, 1);
        Counters::add(&counters.chunks, cut.chunks.len());
        Counters::add(&counters.copied_bytes, cut.bytes());
        Counters::add(&counters.staged_bytes, if staging.is_some() { cut.bytes() } else { 0 });
        self.run_chunks(&call, cut, interrupt).inspect_err(|_| {
            if staging.is_none() {
                // The caller's memory is read until here, also where something failed.
                let _ = self.lanes.lock().wait_all_copied();
            }
        })
    }

    /// Sends the chunks of a round. The ring is held only between two questions whether to go on,
    /// as whoever is asked may run any code, also such as needs the engine.
    fn run_chunks(
        &self,
        call: &Call<'_>,
        cut: &Cut,
        interrupt: &mut Interrupt,
    ) -> Result<Vec<f64>> {
        let (staged, threads) = (call.staging.is_some(), self.config.staging_threads);
        let (mut next, mut sums) = (0, Vec::with_capacity(cut.pieces.len()));
        loop {
            {
                let mut lanes = self.lanes.lock();
                lanes.prepare(self, cut.chunks.len() - next, staged)?;
                let (end, of_pieces) = lanes.with(call, |ring, lane| {
                    let mut pause = || interrupt.is_due();
                    drive(ring, lane, cut, next, threads, &self.counters, &mut pause)
                })?;
                next = end;
                sums.extend(of_pieces);
                if next == cut.chunks.len() {
                    return if staged { Ok(()) } else { lanes.wait_copied() }.map(|()| sums);
                }
            }
            interrupt.poll()?;
        }
    }
}
