//! Replays: slots, each with the memory of one batch and the graphs that work on it.
//!
//! A slot has a stream of its own, and everything is ordered by that. Host input is copied to the
//! slot's page-locked memory and a graph is launched there, which copies, encodes and records the
//! events behind each state. Device input is copied on the caller's stream, which waits for the
//! slot's first, and the graph is launched behind the copy; then the slot's stream waits for it.
//!
//! Host memory is written again when the last replay's events are reached, so at most as many
//! replays are in flight as there are slots. Page-locked input takes the same way, though the graph
//! could copy from where it lies: a batch that a graph is for is copied in less time than the
//! driver takes for the node's new address, its values are looked at on the way, and the caller may
//! write to it when the call returns.

use super::board::Ticket;
use super::kernels::{CommonArgs, Held, Kernels};
use super::states::Ready;
use super::{
    CudaBackend, DeviceBuffer, DeviceStates, Event, Executable, Graph, PinnedBuffer, RawStream,
    Stream, graph,
};
use crate::element::DType;
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::graph::Layout;
use crate::input::Input;
use crate::plan::EncodePlan;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Slots that a graph keeps: one in use while the next is prepared.
const SLOTS: usize = 2;
/// Slots that a graph of small batches keeps. From the launch to the event such a replay takes
/// several times as long as enqueueing it does, and with two slots every call would wait.
const SMALL_SLOTS: usize = 4;
/// The most bytes of input and states of a batch that is small.
const SMALL_BYTES: u128 = 4 << 20;

/// Bytes that the graph copies by a kernel, at most. A node for the copy engine makes a launch cost
/// 5.1 us rather than 3.1, and two of them cannot follow each other in less than 6.8 us, rather than
/// 4.7 (H200, 4 KiB, four slots).
const FEW_BYTES: usize = 128 << 10;

/// What a replay has made, on its way.
pub(crate) struct Replayed {
    /// By encoding.
    pub(crate) states: Vec<DeviceStates>,
    /// The other inputs, where there are some.
    pub(crate) inputs: Option<DeviceStates>,
}

/// A graph's slots.
pub(crate) struct Replayer {
    /// The one longest unused in front.
    slots: Mutex<VecDeque<Slot>>,
    /// Slots that stay when memory is given back.
    kept: usize,
    layout: Arc<Layout>,
    backend: Arc<CudaBackend>,
}

impl Replayer {
    /// Takes memory and captures the graphs for host input.
    pub(crate) fn capture(backend: &Arc<CudaBackend>, layout: &Arc<Layout>) -> Result<Self> {
        let states = layout.plans.iter().map(|plan| plan.output_bytes(layout.largest()));
        let bytes = layout.bytes(layout.largest()) as u128 + states.sum::<u128>();
        let kept = if bytes <= SMALL_BYTES { SMALL_SLOTS } else { SLOTS };
        let mut slots = VecDeque::new();
        for _ in 0..kept {
            let mut slot = Slot::new(backend, layout);
            let stream = Arc::clone(&slot.memory()?.stream);
            for place in 0..layout.sizes.len() {
                slot.executable(place, Source::Host)?.upload(&stream)?;
            }
            slots.push_back(slot);
        }
        let (layout, backend) = (Arc::clone(layout), Arc::clone(backend));
        Ok(Self { slots: Mutex::new(slots), kept, layout, backend })
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots.lock().len()
    }

    pub(crate) fn trim(&self) -> Result<()> {
        // Outside the lock, as letting memory go runs other libraries' destructors.
        let mut slots = std::mem::take(&mut *self.slots.lock());
        let mut kept = 0;
        slots.retain_mut(|slot| {
            kept += 1;
            kept <= self.kept || !slot.is_free()
        });
        for slot in slots.iter_mut().filter_map(|slot| slot.is_free().then_some(slot)) {
            slot.memory = None;
        }
        self.slots.lock().extend(slots);
        // What was let go is free when its streams have come to it.
        self.backend.synchronize()?;
        self.backend.pool.trim_to(0)?;
        graph::trim(&self.backend.context)
    }

    /// The layout has checked what comes here.
    pub(crate) fn replay(
        &self,
        input: &Input<'_>,
        others: &[Input<'_>],
        stream: Option<RawStream>,
    ) -> Result<Replayed> {
        self.backend.start_call(false)?;
        let launch = self.launch(input, stream)?;
        let free = self.take_slot(Slot::is_free);
        // Where everything is held, it never changes for those who hold it.
        let slot = free.unwrap_or_else(|| Slot::new(&self.backend, &self.layout));
        self.run(slot, input, others, launch)
    }

    /// [`Replayer::replay`], unless that had to wait, or to take memory.
    pub(crate) fn try_replay(
        &self,
        input: &Input<'_>,
        others: &[Input<'_>],
        stream: Option<RawStream>,
    ) -> Result<Option<Replayed>> {
        self.backend.start_call(false)?;
        let launch = self.launch(input, stream)?;
        // Of those that are free, the one longest unused is the first to be done.
        let ready = |slot: &mut Slot| slot.memory.is_some() && slot.is_done().unwrap_or(false);
        match self.take_slot(|slot| slot.is_free() && ready(slot)) {
            Some(slot) => self.run(slot, input, others, launch).map(Some),
            None => Ok(None),
        }
    }

    /// A slot of which this is true, and which is nobody else's from here on.
    fn take_slot(&self, is_it: impl FnMut(&mut Slot) -> bool) -> Option<Slot> {
        let mut slots = self.slots.lock();
        let place = slots.iter_mut().position(is_it)?;
        slots.remove(place)
    }

    fn run(
        &self,
        mut slot: Slot,
        input: &Input<'_>,
        others: &[Input<'_>],
        launch: Launch,
    ) -> Result<Replayed> {
        let replayed = slot.replay(input, others, launch);
        self.slots.lock().push_back(slot);
        replayed
    }

    fn launch(&self, input: &Input<'_>, stream: Option<RawStream>) -> Result<Launch> {
        match input.device() {
            Device::Cpu => Ok(Launch::Own),
            device @ Device::Cuda(_) if device == self.backend.device() => {
                let stream = stream.unwrap_or(self.backend.stream());
                if stream.is_capturing(&self.backend.context)? {
                    let hint = "encode in the capture itself, with out= or a torch tensor";
                    return Err(Error::Capturing { call: "replaying a graph", hint });
                }
                if !input.has_no_gaps() {
                    let got = format!("strides {:?}", input.strides());
                    return Err(Error::invalid("data", "samples without gaps", got));
                }
                Ok(Launch::On(stream))
            }
            device @ Device::Cuda(_) => Err(Error::DeviceMismatch {
                argument: "data",
                expected: format!("{} or the host", self.backend.device()),
                got: device.to_string(),
            }),
        }
    }
}

/// Where a replay is launched.
#[derive(Clone, Copy)]
enum Launch {
    /// On the slot's stream.
    Own,
    /// On the caller's, where the samples are.
    On(RawStream),
}

/// What the samples are brought from by the graph: the host, or nowhere, as they are there.
#[derive(Clone, Copy)]
enum Source {
    Host,
    Device,
}

/// An executable, and the memory that it was captured for, by number.
struct Captured {
    executable: Executable,
    memory: u64,
}

/// Memory for one batch and the graphs that work on it, by size and [`Source`].
struct Slot {
    captured: Vec<[Option<Captured>; 2]>,
    /// `None` where it was given back. Others hold it who hold something of the last replay.
    memory: Option<Arc<Memory>>,
    /// Which memory this is, counted from 1.
    number: u64,
    /// Whether the last replay is known to be done.
    done: bool,
    layout: Arc<Layout>,
    backend: Arc<CudaBackend>,
}

impl Slot {
    fn new(backend: &Arc<CudaBackend>, layout: &Arc<Layout>) -> Self {
        Self {
            captured: layout.sizes.iter().map(|_| [None, None]).collect(),
            memory: None,
            number: 0,
            done: true,
            layout: Arc::clone(layout),
            backend: Arc::clone(backend),
        }
    }

    /// Whether nobody holds anything of the last replay.
    fn is_free(&mut self) -> bool {
        self.memory.as_mut().is_none_or(|memory| Arc::get_mut(memory).is_some())
    }

    /// Whether the last replay is done.
    fn is_done(&mut self) -> Result<bool> {
        if !self.done
            && let Some(memory) = &self.memory
        {
            for event in memory.events() {
                if !event.query()? {
                    return Ok(false);
                }
            }
            self.done = true;
        }
        Ok(true)
    }

    /// Waits until the last replay is done.
    fn wait(&mut self) -> Result<()> {
        if !self.is_done()? {
            self.memory.as_ref().map_or(Ok(()), |memory| memory.wait())?;
            self.done = true;
        }
        Ok(())
    }

    /// The memory of a slot that is free, for its one user.
    fn memory(&mut self) -> Result<&mut Memory> {
        if self.memory.is_none() {
            self.memory = Some(Arc::new(Memory::new(&self.backend, &self.layout)?));
            self.number += 1;
        }
        let memory = self.memory.as_mut().and_then(Arc::get_mut);
        memory.ok_or_else(|| Error::invalid("slot", "one that nobody holds", "another"))
    }

    /// The graph for a size, captured, or updated for memory that is not what it was.
    fn executable(&mut self, place: usize, source: Source) -> Result<&Executable> {
        self.memory()?;
        let number = self.number;
        let known = self.captured[place][source as usize].take();
        let captured = match known {
            Some(captured) if captured.memory == number => captured,
            known => {
                let (size, layout) = (self.layout.sizes[place], Arc::clone(&self.layout));
                let graph = self.memory()?.capture(&layout, size, source)?;
                let executable = match known {
                    None => graph.instantiate()?,
                    Some(Captured { mut executable, .. }) => {
                        executable.update(graph)?;
                        executable
                    }
                };
                Captured { executable, memory: number }
            }
        };
        Ok(&self.captured[place][source as usize].insert(captured).executable)
    }

    fn replay(
        &mut self,
        input: &Input<'_>,
        others: &[Input<'_>],
        launch: Launch,
    ) -> Result<Replayed> {
        self.wait()?;
        let layout = Arc::clone(&self.layout);
        let place = layout.place(input.batch());
        let source = if matches!(launch, Launch::Own) { Source::Host } else { Source::Device };
        let memory = self.memory()?;
        memory.renew()?;
        let end = layout.bytes(input.batch());
        // SAFETY: the last replay is done, so no copy from the memory is in flight, and nobody
        // else holds it.
        let block = unsafe { memory.pinned.slice_mut(0..end)? };
        let (header, samples) = block.split_at_mut(layout.header);
        layout.stage_inputs(others, header);
        if matches!(launch, Launch::Own) {
            layout.stage(input, samples)?;
        }
        // Captured before anything is enqueued, as that may fail.
        self.executable(place, source)?;
        let memory = self.memory()?;
        let stream = match launch {
            Launch::Own => memory.stream.raw(),
            Launch::On(stream) => stream,
        };
        let brought = match launch {
            Launch::Own => Ok(()),
            // SAFETY: the caller keeps the samples until its stream has passed the copy.
            Launch::On(_) => unsafe { memory.bring(&layout, input, layout.sizes[place], stream) },
        };
        self.done = false;
        // SAFETY: the graph works on the slot's memory, whose drop waits for it; the stream is in
        // order with the slot's, and that with everybody who has used the memory.
        let launched = brought
            .and_then(|()| self.executable(place, source))
            .and_then(|executable| unsafe { executable.launch(stream) })
            .and_then(|()| self.memory()?.follow(launch));
        if launched.is_err() {
            // No event stands for what was enqueued.
            self.backend.settle(stream);
        }
        launched?;
        Ok(self.replayed(input.batch()))
    }

    /// What the replay that was just launched makes.
    fn replayed(&self, batch: usize) -> Replayed {
        let Some(memory) = &self.memory else {
            return Replayed { states: Vec::new(), inputs: None };
        };
        let lease = |(ptr, bytes): (u64, usize), ticket: Ticket, checked: bool| {
            let (owner, join) = (Box::new(Arc::clone(memory)), Arc::clone(&memory.join));
            let (context, home) = (&self.backend.context, memory.stream.raw());
            // SAFETY: a part of the slot's memory, which the owner keeps, and which the slot is
            // not used with before the owner is gone, in the order of its stream.
            let buffer = unsafe { DeviceBuffer::part(context, (ptr, bytes), owner, join, home) };
            let ready = Ready::Encoded(ticket);
            DeviceStates::new(Arc::clone(&self.backend), buffer, ready, checked.then_some(ticket))
        };
        let plans = self.layout.plans.iter().zip(&memory.branches);
        let states = plans.map(|(plan, branch)| {
            let bytes = plan.output_bytes(batch) as usize;
            lease((branch.output.ptr(), bytes), branch.ticket, true)
        });
        let header = self.layout.header;
        let inputs = (header > 0)
            .then(|| lease((memory.input.ptr(), header), memory.branches[0].ticket, false));
        Replayed { states: states.collect(), inputs }
    }
}

/// What one encoding of a batch works on.
struct Branch {
    ticket: Ticket,
    output: DeviceBuffer,
    workspace: [Option<DeviceBuffer>; 2],
}

/// Memory of one batch.
struct Memory {
    // Taken back where making the rest fails.
    branches: Vec<Branch>,
    /// The other inputs and the samples, as they travel. The samples of the largest batch are
    /// values that name states at all times, whatever is copied of them.
    pinned: PinnedBuffer,
    input: DeviceBuffer,
    /// Orders the stream behind those that the states are used on.
    join: Arc<Mutex<Event>>,
    /// Orders a caller's stream behind it.
    tail: Event,
    stream: Arc<Stream>,
    backend: Arc<CudaBackend>,
}

impl Memory {
    fn new(backend: &Arc<CudaBackend>, layout: &Layout) -> Result<Self> {
        let context = &backend.context;
        let stream = Stream::new(context)?;
        let largest = layout.bytes(layout.largest());
        let pinned = PinnedBuffer::new(context, largest)?;
        // SAFETY: nobody else knows the memory yet.
        layout.fill(unsafe { pinned.slice_mut(layout.header..largest)? });
        let allocate = |bytes| {
            let buffer = backend.allocate(bytes)?;
            buffer.used_on(stream.raw());
            Ok::<_, Error>(buffer)
        };
        let mut memory = Self {
            branches: Vec::new(),
            pinned,
            input: allocate(largest)?,
            join: Arc::new(Mutex::new(Event::new(context)?)),
            tail: Event::new(context)?,
            stream: Arc::clone(&stream),
            backend: Arc::clone(backend),
        };
        for plan in &layout.plans {
            backend.prepare(plan)?;
            let bytes = usize::try_from(plan.output_bytes(layout.largest())).unwrap_or(usize::MAX);
            // Of each the most, as sizes differ in how they are encoded.
            let (mut work, mut rows) = (0, 0);
            for &size in &layout.sizes {
                let args = memory.args(layout, plan, size, 0, (0, 0, 0));
                work = work.max(Kernels::workspace_bytes(plan, &args));
                rows = rows.max(Kernels::rows_bytes(plan, &args));
            }
            let some = |bytes| if bytes == 0 { Ok(None) } else { allocate(bytes).map(Some) };
            let output = allocate(bytes)?;
            let workspace = [some(work)?, some(rows)?];
            // Last, as from then on it has to be taken back.
            let ticket = backend.board.lend(plan)?;
            memory.branches.push(Branch { ticket, output, workspace });
        }
        stream.wait(&backend.event_on(backend.stream())?)?;
        Ok(memory)
    }

    fn events(&self) -> impl Iterator<Item = &Event> {
        self.branches.iter().filter_map(|branch| self.backend.board.replayed(branch.ticket))
    }

    /// Waits for the last replay.
    fn wait(&self) -> Result<()> {
        self.events().try_for_each(Event::synchronize)
    }

    /// Numbers the next replay.
    fn renew(&mut self) -> Result<()> {
        for branch in &mut self.branches {
            branch.ticket = self.backend.board.next_replay(branch.ticket)?;
        }
        Ok(())
    }

    /// The kernels' arguments for a batch of this size.
    fn args(
        &self,
        layout: &Layout,
        plan: &EncodePlan,
        size: usize,
        output: u64,
        report: (u64, u64, u64),
    ) -> CommonArgs {
        let features = layout.features();
        let start = (self.input.ptr() + layout.header as u64) as *const u8;
        let (dtype, device): (DType, _) = (layout.dtype(), self.backend.device());
        // SAFETY: the block has so many samples, without gaps; what is in it is ordered before the
        // kernels, and valid at all times.
        let samples = unsafe {
            Input::from_raw(start, dtype, device, (size, features), (features as isize, 1))
        };
        let target = (output, plan.spec().dim() as u64);
        CommonArgs::new(&samples, target, report, plan.spec().num_qubits())
    }

    /// The graph for one size: a copy, the encodings side by side, and behind each its event.
    fn capture(&self, layout: &Layout, size: usize, source: Source) -> Result<Graph> {
        let backend = &self.backend;
        let others = self.branches.len().saturating_sub(1);
        let side =
            || Ok::<_, Error>((Stream::new(&backend.context)?, Event::new(&backend.context)?));
        let sides = (0..others).map(|_| side()).collect::<Result<Vec<_>>>()?;
        let fork = Event::new(&backend.context)?;
        let bytes = match source {
            Source::Host => layout.bytes(size),
            Source::Device => layout.header,
        };
        Graph::capture(&self.stream, |stream| {
            // SAFETY: whoever launches the graph keeps the memory until it is done, and writes its
            // host side only then. Page-locked memory has the same address on the device.
            unsafe {
                if (1..=FEW_BYTES).contains(&bytes) {
                    let (from, to) = (self.pinned.as_ptr().expose_provenance(), self.input.ptr());
                    let on = backend.kernels.on(stream, true);
                    backend.kernels.enqueue_copy(from as u64, to, bytes, on)?;
                } else {
                    self.input.copy_from_host_async(0, &self.pinned, 0..bytes, stream)?;
                }
            }
            if others > 0 {
                fork.record(stream)?;
            }
            for (i, (plan, branch)) in layout.plans.iter().zip(&self.branches).enumerate() {
                let to = match i.checked_sub(1) {
                    None => stream,
                    Some(side) => {
                        sides[side].0.wait(&fork)?;
                        sides[side].0.raw()
                    }
                };
                let report = backend.board.addresses(branch.ticket);
                let args = self.args(layout, plan, size, branch.output.ptr(), report);
                let ptr = |buffer: Option<&DeviceBuffer>| buffer.map_or(0, DeviceBuffer::ptr);
                let held = Held {
                    workspace: ptr(branch.workspace[0].as_ref()),
                    rows: ptr(branch.workspace[1].as_ref()),
                    multiplicity: ptr(backend.prepare(plan)?.multiplicity.as_deref()),
                };
                // SAFETY: as above; multiplicities stay with the backend.
                unsafe { backend.kernels.enqueue(plan, args, held, backend.kernels.on(to, true))? };
                if let Some(event) = backend.board.replayed(branch.ticket) {
                    event.record_in_graph(to)?;
                }
            }
            for (side, joined) in &sides {
                joined.record(side.raw())?;
                stream.wait(joined)?;
            }
            Ok(())
        })
    }

    /// Copies samples from the device, and behind them what fills the batch up to `size`, on the
    /// caller's stream.
    ///
    /// # Safety
    ///
    /// The samples stay valid until the stream has passed the copy.
    unsafe fn bring(
        &self,
        layout: &Layout,
        input: &Input<'_>,
        size: usize,
        stream: RawStream,
    ) -> Result<()> {
        self.tail.record(self.stream.raw())?;
        stream.wait(&self.tail)?;
        let (end, filled) = (layout.bytes(input.batch()), layout.bytes(size));
        // SAFETY: the caller's promise. The page-locked samples are written when this replay is
        // done.
        unsafe {
            let source = input.as_ptr() as u64;
            self.input.copy_from_address(layout.header, source, input.num_bytes(), stream)?;
            self.input.copy_from_host_async(end, &self.pinned, end..filled, stream)
        }
    }

    /// Makes the slot's stream wait for the replay where that is on another.
    fn follow(&self, launch: Launch) -> Result<()> {
        match launch {
            Launch::Own => Ok(()),
            Launch::On(_) => self.events().try_for_each(|event| self.stream.wait(event)),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Host memory is not freed in the order of any stream, and a lent slot goes to others.
        let context = &self.backend.context;
        if let Err(error) = context.undeterred(|| self.wait()) {
            context.record_drop_failure(error);
        }
        for branch in &self.branches {
            self.backend.board.take_back(branch.ticket);
        }
    }
}
