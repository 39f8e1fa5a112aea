//! The pipeline's lanes on a CUDA device: slots, the stream that copies to them, and what one call
//! does with them.
//!
//! Copies have a stream of their own, of high priority; what encodes a chunk goes to the stream
//! that the result is wanted on. Three kinds of order hold them together: a slot's kernel waits for
//! its copy (`copied`), its next copy for that kernel (`computed`), both on the device, and the
//! host writes its page-locked memory only when it knows that `copied` was reached.

use super::kernels::{Chunk as Part, CommonArgs};
use super::timeline::Timeline;
use super::{
    Context, CudaBackend, DeviceBuffer, Event, PinnedBuffer, Priority, RawStream, Stream, Ticket,
};
use crate::element::DType;
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::input::Input;
use crate::pipeline::config::PipelineConfig;
use crate::pipeline::plan::{Chunk, Piece};
use crate::pipeline::ring::{Lane, Ring};
use crate::pipeline::stage::Staging;
use crate::plan::EncodePlan;
use std::sync::Arc;

/// One slot of the ring.
struct Slot {
    /// Made when the slot first stages.
    pinned: Option<PinnedBuffer>,
    device: DeviceBuffer,
    /// Recorded behind the copy.
    copied: Event,
    /// Recorded behind what encodes the chunk.
    computed: Event,
}

/// The ring and its slots, of one engine.
pub(super) struct Lanes {
    pub(super) ring: Ring,
    slots: Vec<Option<Slot>>,
    slot_bytes: usize,
    stream: Arc<Stream>,
    pub(super) timeline: Option<Timeline>,
}

impl Lanes {
    pub(super) fn new(context: &Arc<Context>, config: &PipelineConfig) -> Result<Self> {
        Ok(Self {
            ring: Ring::new(config.slots),
            slots: (0..config.slots).map(|_| None).collect(),
            slot_bytes: config.max_chunk_bytes,
            stream: Stream::with_priority(context, Priority::High)?,
            timeline: config.timing.then(|| Timeline::new(context)),
        })
    }

    /// Makes the slots that the next so many chunks will have, where they are not there yet.
    pub(super) fn prepare(
        &mut self,
        backend: &CudaBackend,
        chunks: usize,
        stage: bool,
    ) -> Result<()> {
        for i in 0..chunks.min(self.slots.len()) {
            let at = (self.ring.next_slot() + i) % self.slots.len();
            let slot = if let Some(slot) = &mut self.slots[at] {
                slot
            } else {
                let computed = Event::new(&backend.context)?;
                let device = backend.allocate(self.slot_bytes)?;
                // The first copy waits until the memory is there.
                computed.record(backend.stream())?;
                let copied = Event::new(&backend.context)?;
                device.used_on(self.stream.raw());
                self.slots[at].insert(Slot { pinned: None, device, copied, computed })
            };
            if stage && slot.pinned.is_none() {
                slot.pinned = Some(PinnedBuffer::new(&backend.context, self.slot_bytes)?);
            }
        }
        Ok(())
    }

    /// Waits until nothing in flight uses any slot.
    fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()?;
        // Events that were never recorded count as reached.
        self.slots.iter().flatten().try_for_each(|slot| slot.computed.synchronize())
    }

    /// Runs `drive` with the ring and a lane for the call.
    pub(super) fn with<R>(
        &mut self,
        call: &Call<'_>,
        drive: impl FnOnce(&mut Ring, &CudaLane<'_>) -> R,
    ) -> R {
        let (slots, copies) = (&self.slots[..], self.stream.raw());
        let timeline = self.timeline.as_ref();
        drive(&mut self.ring, &CudaLane { call, slots, copies, timeline })
    }

    /// Waits until the last copy that was enqueued is done.
    pub(super) fn wait_copied(&self) -> Result<()> {
        let last = (self.ring.next_slot() + self.slots.len() - 1) % self.slots.len();
        self.slots[last].as_ref().map_or(Ok(()), |slot| slot.copied.synchronize())
    }

    /// Waits until every copy is done, whichever was the last: a run that ended early may have
    /// taken slots that it then had no copy for.
    pub(super) fn wait_all_copied(&self) -> Result<()> {
        self.slots.iter().flatten().try_for_each(|slot| slot.copied.synchronize())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let context = Arc::clone(self.stream.context());
        if let Err(error) = context.undeterred(|| self.synchronize()) {
            context.record_drop_failure(error);
        }
    }
}

/// One call's work: what the lane needs to know of it.
pub(super) struct Call<'a> {
    pub(super) backend: &'a Arc<CudaBackend>,
    pub(super) plan: &'a EncodePlan,
    pub(super) input: &'a Input<'a>,
    /// `None` where the input is copied from where it lies.
    pub(super) staging: Option<&'a Staging<'a>>,
    /// Element type on the link.
    pub(super) dtype: DType,
    /// Device address of the result, and its row stride in amplitudes.
    pub(super) output: (u64, u64),
    pub(super) ticket: Ticket,
    pub(super) stream: RawStream,
    /// All on one stream.
    pub(super) direct: bool,
    /// Workspace of split samples.
    pub(super) sums: Option<&'a DeviceBuffer>,
}

/// A slot is used for what [`Lanes::prepare`] was not asked for.
#[cold]
fn unprepared(slot: usize) -> Error {
    Error::invalid("slot", "one that the call has prepared", slot)
}

/// A call with the slots that it may use.
pub(super) struct CudaLane<'a> {
    call: &'a Call<'a>,
    slots: &'a [Option<Slot>],
    copies: RawStream,
    timeline: Option<&'a Timeline>,
}

impl CudaLane<'_> {
    fn slot(&self, slot: usize) -> Result<&Slot> {
        self.slots[slot].as_ref().ok_or_else(|| unprepared(slot))
    }

    /// The slot's host memory.
    fn pinned(&self, slot: usize) -> Result<&PinnedBuffer> {
        self.slot(slot)?.pinned.as_ref().ok_or_else(|| unprepared(slot))
    }

    fn copy_stream(&self) -> RawStream {
        if self.call.direct { self.call.stream } else { self.copies }
    }

    /// The kernels' arguments for a chunk in a slot.
    fn args(&self, slot: &Slot, chunk: &Chunk) -> CommonArgs {
        let call = self.call;
        // SAFETY: the copy has brought these elements to the slot, without gaps.
        let on_device = unsafe {
            Input::from_raw(
                slot.device.ptr() as *const u8,
                call.dtype,
                Device::Cuda(0),
                (chunk.rows.len(), chunk.columns.len()),
                (chunk.columns.len() as isize, 1),
            )
        };
        let (output, stride) = call.output;
        let row_bytes = stride * call.plan.precision().size() as u64;
        let target = (output + chunk.rows.start as u64 * row_bytes, stride);
        call.backend.args(call.plan, &on_device, target, call.ticket)
    }
}

impl Lane for CudaLane<'_> {
    fn stage(&self, slot: usize, piece: &Piece) -> Result<f64> {
        let staging = self.call.staging.ok_or_else(|| unprepared(slot))?;
        let bytes = piece.rows.len() * piece.columns.len() * self.call.dtype.size();
        let pinned = self.pinned(slot)?;
        // SAFETY: the host holds the slot's token, so no copy from it is in flight, and each piece
        // is staged by one thread, to a place of its own.
        let target = unsafe { pinned.slice_mut(piece.offset..piece.offset + bytes)? };
        staging.stage(piece, target)
    }

    fn copy(&self, index: usize, chunk: &Chunk) -> Result<()> {
        let slot = self.slot(index)?;
        let stream = self.copy_stream();
        // Asking is the host's work, waiting the copy engine's, which has none to spare.
        if !slot.computed.query()? {
            stream.wait(&slot.computed)?;
        }
        let timing = self.timeline.map(|timeline| timeline.begin(stream)).transpose()?;
        if self.call.staging.is_some() {
            let pinned = self.pinned(index)?;
            // SAFETY: the slots live with the engine, whose drop waits for the event recorded next,
            // and the memory is written again only behind that event.
            unsafe { slot.device.copy_from_host_async(0, pinned, 0..chunk.bytes, stream)? };
        } else {
            let input = self.call.input;
            let size = input.dtype().size();
            let first = chunk.rows.start * input.features() + chunk.columns.start;
            // SAFETY: page-locked input has no gaps, so the chunk lies in it; it is borrowed until
            // the call has waited for its copies.
            unsafe {
                let source = input.as_ptr().add(first * size);
                slot.device.host_to_device(0, source.cast(), chunk.bytes, stream)?;
            }
        }
        if let (Some(timeline), Some(began)) = (self.timeline, timing) {
            timeline.end_copy(began, stream)?;
        }
        slot.copied.record(stream)
    }

    fn compute(&self, slot: usize, chunk: &Chunk) -> Result<()> {
        let call = self.call;
        let slot = self.slot(slot)?;
        if !call.direct {
            call.stream.wait(&slot.copied)?;
        }
        let timing = self.timeline.map(|timeline| timeline.begin(call.stream)).transpose()?;
        let args = self.args(slot, chunk);
        if let Some(sums) = call.sums {
            let features = call.plan.features();
            let part = Part { sample: chunk.rows.start, features, first: chunk.columns.start };
            let last = chunk.columns.end == features;
            // SAFETY: the chunk is in the slot by then; the result has the whole row; `sums` was
            // allocated for a sample of this length in the order of the stream.
            unsafe { call.backend.enqueue_part(call.plan, args, part, sums, last, call.stream)? };
        } else {
            // SAFETY: the chunk is in the slot by then, and the result has its rows.
            unsafe { call.backend.enqueue(call.plan, args, call.stream)? };
        }
        if let (Some(timeline), Some(began)) = (self.timeline, timing) {
            timeline.end_compute(began, call.stream)?;
        }
        slot.computed.record(call.stream)
    }

    fn is_copied(&self, slot: usize) -> Result<bool> {
        self.slot(slot)?.copied.query()
    }

    fn wait_copied(&self, slot: usize) -> Result<()> {
        self.slot(slot)?.copied.synchronize()
    }

    fn drain(&self) -> Result<()> {
        let context = &self.call.backend.context;
        self.copies.synchronize(context)?;
        self.call.stream.synchronize(context)?;
        self.slots.iter().flatten().try_for_each(|slot| slot.computed.synchronize())
    }
}
