//! Deferred validation: what kernels find wrong with device input, told without a sync.
//!
//! Each encode of device input holds a slot: a record in device memory, which keeps the first bad
//! value, and a flag in host memory, which the kernel sets after it. One more flag says that any
//! slot has something, so asking costs one load.
//!
//! A slot goes to another encode when the one before is done. To ask the driver about every slot
//! would cost as much as half a launch, so a thread holds a segment of slots at a time and uses
//! them in order: in each stream the last one's event then stands for all of them, and taking a
//! slot is a step in the thread's own memory. Threads beyond the number of segments share slots
//! and ask. Those of encodes that are being captured into a graph are kept apart and never reused
//! while there are enough, as a replay may report at any time. Encodes in graphs of our own hold theirs
//! from capture to drop; every replay has a number of its own, and the graph records the slot's event.

use super::{Context, DeviceBuffer, Event, MappedBuffer, Pool, RawStream, Stream};
use crate::encoding::Form;
use crate::encoding::product::{Factor, Product};
use crate::error::{Error, Result};
use crate::plan::EncodePlan;
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use thread_local::ThreadLocal;

/// Slots that a thread holds at a time.
const SEGMENT: usize = 64;
/// Slots held in segments, together more than a stream's launch queue is deep.
const SEGMENTED: usize = 64 * SEGMENT;
/// Slots of threads that found no segment.
const SHARED: usize = 1024;
/// Slots of captured encodes.
const CAPTURED: usize = 1024;
const FIRST_CAPTURED: usize = SEGMENTED + SHARED;
/// Slots of encodes in graphs of our own, each held for as long as its graph is there.
const LENT: usize = 4096;
const FIRST_LENT: usize = FIRST_CAPTURED + CAPTURED;
const SLOTS: usize = FIRST_LENT + LENT;
/// Word of the flag that any slot has something; the slots' flags follow.
const ANY: usize = 0;
/// Findings kept for states that may still ask.
const MAX_FINDINGS: usize = 4096;

/// Names one encode on the board.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    slot: usize,
    sequence: u64,
}

/// What is known of the encode that holds a slot. Written by its call alone.
#[derive(Default)]
struct Slot {
    sequence: AtomicU64,
    features: AtomicU64,
    num_qubits: AtomicU32,
    bits: AtomicBool,
    /// Recorded behind the encode, unless that was captured. Never recorded, it counts as reached.
    done: OnceLock<Event>,
    /// The sequence that was enqueued last, and the stream.
    enqueued: AtomicU64,
    stream: AtomicUsize,
    /// The sequence that was last waited for.
    waited: AtomicU64,
}

struct Finding {
    error: Error,
    raised: bool,
}

/// By the sequence of the encode.
type Findings = BTreeMap<u64, Finding>;

pub(super) struct Board {
    context: Arc<Context>,
    /// For reading records: waits for nobody else's work.
    stream: Arc<Stream>,
    records: DeviceBuffer,
    flags: MappedBuffer,
    slots: Vec<Slot>,
    findings: Mutex<Findings>,
    /// How many of the findings were not raised yet.
    unraised: AtomicUsize,
    /// The next slot of this thread's segment; at a multiple of [`SEGMENT`] it has none left.
    next: ThreadLocal<Cell<usize>>,
    /// The first slots of the segments that no thread holds, the one longest unused in front.
    segments: Mutex<VecDeque<usize>>,
    next_sequence: AtomicU64,
    next_shared: AtomicUsize,
    next_captured: AtomicUsize,
    /// Those of the slots for graphs that none holds.
    to_lend: Mutex<Vec<usize>>,
}

impl Board {
    pub(super) fn new(context: &Arc<Context>, pool: &Arc<Pool>) -> Result<Self> {
        let stream = Stream::new(context)?;
        let records = pool.alloc(SLOTS * size_of::<u64>(), &stream)?;
        records.memset(0..records.bytes(), 0xff, stream.raw())?;
        stream.synchronize()?;
        Ok(Self {
            context: Arc::clone(context),
            stream,
            records,
            flags: MappedBuffer::new(context, (SLOTS + 1) * size_of::<u32>())?,
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            findings: Mutex::default(),
            unraised: AtomicUsize::new(0),
            next: ThreadLocal::new(),
            segments: Mutex::new((0..SEGMENTED).step_by(SEGMENT).collect()),
            next_sequence: AtomicU64::new(1),
            next_shared: AtomicUsize::new(0),
            next_captured: AtomicUsize::new(0),
            to_lend: Mutex::new((FIRST_LENT..SLOTS).rev().collect()),
        })
    }

    /// Takes a slot for an encode.
    pub(super) fn issue(&self, plan: &EncodePlan, captured: bool) -> Result<Ticket> {
        let slot = if captured {
            FIRST_CAPTURED + self.next_captured.fetch_add(1, Ordering::Relaxed) % CAPTURED
        } else {
            self.take_slot()?
        };
        self.settle(slot)?;
        self.describe(slot, plan);
        Ok(self.renew(slot))
    }

    fn describe(&self, slot: usize, plan: &EncodePlan) {
        let state = &self.slots[slot];
        let bits = matches!(plan.form(), Form::Product(Product { factor: Factor::Bit, .. }));
        state.features.store(plan.features() as u64, Ordering::Relaxed);
        state.num_qubits.store(plan.spec().num_qubits(), Ordering::Relaxed);
        state.bits.store(bits, Ordering::Relaxed);
    }

    /// Gives a slot, whose last encode is done, to another.
    fn renew(&self, slot: usize) -> Ticket {
        let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        self.slots[slot].sequence.store(sequence, Ordering::Release);
        Ticket { slot, sequence }
    }

    /// Moves what the last encode of a slot, which is done, has reported to the findings.
    fn settle(&self, slot: usize) -> Result<()> {
        if self.flags.load_u32(1 + slot) == 0 {
            return Ok(());
        }
        self.resolve(slot, &mut self.findings.lock())
    }

    /// Takes a slot for an encode of a graph of our own, until [`Board::take_back`].
    pub(super) fn lend(&self, plan: &EncodePlan) -> Result<Ticket> {
        let Some(slot) = self.to_lend.lock().pop() else {
            let expected = format!("at most {LENT} results of graphs at a time");
            return Err(Error::invalid("graph", expected, "more"));
        };
        let ticket = Ticket { slot, sequence: 0 };
        if self.slots[slot].done.get().is_none() {
            match Event::new(&self.context) {
                // Nobody else has this slot now, so nobody else sets it.
                Ok(done) => drop(self.slots[slot].done.set(done)),
                Err(error) => {
                    self.take_back(ticket);
                    return Err(error);
                }
            }
        }
        self.describe(slot, plan);
        Ok(ticket)
    }

    /// The ticket of the next replay of the encode that holds a lent slot; the last one is done.
    pub(super) fn next_replay(&self, ticket: Ticket) -> Result<Ticket> {
        self.settle(ticket.slot)?;
        Ok(self.renew(ticket.slot))
    }

    /// The event behind the replays of the encode that holds a lent slot.
    pub(super) fn replayed(&self, ticket: Ticket) -> Option<&Event> {
        self.slots[ticket.slot].done.get()
    }

    /// Takes a lent slot back; no replay is in flight.
    pub(super) fn take_back(&self, ticket: Ticket) {
        if let Err(error) = self.settle(ticket.slot) {
            tracing::warn!(%error, "what a replay has reported could not be read");
        }
        self.to_lend.lock().push(ticket.slot);
    }

    /// A slot whose last encode is done.
    fn take_slot(&self) -> Result<usize> {
        let next = self.next.get_or(|| Cell::new(0));
        let mut slot = next.get();
        if slot.is_multiple_of(SEGMENT) {
            let segment = {
                let mut segments = self.segments.lock();
                if slot > 0 {
                    segments.push_back(slot - SEGMENT);
                }
                next.set(0);
                segments.pop_front()
            };
            let Some(segment) = segment else {
                let turn = self.next_shared.fetch_add(1, Ordering::Relaxed);
                let slot = SEGMENTED + turn % SHARED;
                self.wait(slot..slot + 1)?;
                return Ok(slot);
            };
            // Whole, it counts as used up, and goes back where waiting for it fails.
            next.set(segment + SEGMENT);
            self.wait(segment..segment + SEGMENT)?;
            slot = segment;
        }
        next.set(slot + 1);
        Ok(slot)
    }

    /// Waits for the encodes that hold these slots, used in order by one thread.
    fn wait(&self, slots: Range<usize>) -> Result<()> {
        // The streams that were waited for, as many as a thread changes between. With more, some
        // slots are waited for that need not be.
        let mut streams = [usize::MAX; 4];
        let mut count = 0;
        for slot in self.slots[slots].iter().rev() {
            let enqueued = slot.enqueued.load(Ordering::Acquire);
            if enqueued == slot.waited.load(Ordering::Relaxed) {
                continue;
            }
            let stream = slot.stream.load(Ordering::Relaxed);
            if !streams.contains(&stream) {
                slot.done.get().map_or(Ok(()), Event::synchronize)?;
                // What this name means differs between threads, which may take a segment over.
                if stream != RawStream::PER_THREAD.handle() {
                    streams[count % streams.len()] = stream;
                    count += 1;
                }
            }
            slot.waited.fetch_max(enqueued, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Device addresses of the ticket's record, its flag and the flag of all.
    pub(super) fn addresses(&self, ticket: Ticket) -> (u64, u64, u64) {
        let flags = self.flags.device_ptr();
        let word = size_of::<u32>() as u64;
        (
            self.records.ptr() + (ticket.slot * size_of::<u64>()) as u64,
            flags + (1 + ticket.slot) as u64 * word,
            flags + ANY as u64 * word,
        )
    }

    /// Notes that the encode lies in `stream` up to here.
    pub(super) fn enqueued(&self, ticket: Ticket, stream: RawStream) -> Result<()> {
        self.record(ticket, stream)?;
        self.hand_over(ticket, stream);
        Ok(())
    }

    /// Waits for an encode whose call raises what it reported: other calls never come to know it.
    pub(super) fn finish(&self, ticket: Ticket, stream: RawStream) -> Result<Option<Error>> {
        self.record(ticket, stream)?;
        let slot = &self.slots[ticket.slot];
        slot.done.get().map_or(Ok(()), Event::synchronize)?;
        let found = if self.flags.load_u32(1 + ticket.slot) == 0 {
            None
        } else {
            let _findings = self.findings.lock();
            let error = self.read(ticket.slot)?;
            self.clear(ticket.slot)?;
            Some(error)
        };
        // Last: until here, the slot counts as one that is being enqueued.
        self.hand_over(ticket, stream);
        Ok(found)
    }

    fn record(&self, ticket: Ticket, stream: RawStream) -> Result<()> {
        let slot = &self.slots[ticket.slot];
        if slot.done.get().is_none() {
            // Nobody else has this slot now, so nobody else sets it.
            let _ = slot.done.set(Event::new(&self.context)?);
        }
        slot.done.get().map_or(Ok(()), |done| done.record(stream))
    }

    fn hand_over(&self, ticket: Ticket, stream: RawStream) {
        let slot = &self.slots[ticket.slot];
        slot.stream.store(stream.handle(), Ordering::Relaxed);
        slot.enqueued.store(ticket.sequence, Ordering::Release);
    }

    /// Takes back an encode that failed on its way into `stream`. No event stands for what was
    /// enqueued of it, so the host waits for that; what it reported is nobody's.
    pub(super) fn abandon(&self, ticket: Ticket, stream: RawStream) {
        let cleared = stream.synchronize(&self.context).and_then(|()| {
            let _findings = self.findings.lock();
            if self.flags.load_u32(1 + ticket.slot) == 0 { Ok(()) } else { self.clear(ticket.slot) }
        });
        if let Err(error) = cleared {
            tracing::warn!(%error, "what a failed encode left could not be waited for");
        }
    }

    /// The event behind the ticket's encode; `None` where it was reached long ago.
    pub(super) fn event(&self, ticket: Ticket) -> Option<&Event> {
        let slot = &self.slots[ticket.slot];
        // A slot goes to another encode only once this one is done.
        let held = slot.sequence.load(Ordering::Acquire) == ticket.sequence;
        slot.done.get().filter(|_| held)
    }

    /// The first finding that was not raised yet. Two loads where there is none.
    pub(super) fn take(&self) -> Result<Option<Error>> {
        let found = self.flags.load_u32(ANY) != 0;
        if !found && self.unraised.load(Ordering::Acquire) == 0 {
            return Ok(None);
        }
        let mut findings = self.findings.lock();
        if found {
            self.collect(&mut findings)?;
        }
        let finding = findings.values_mut().find(|finding| !finding.raised);
        Ok(finding.map(|finding| self.raise(finding)))
    }

    /// Waits for every encode that holds a slot.
    pub(super) fn synchronize(&self) -> Result<()> {
        let segments = (0..SEGMENTED).step_by(SEGMENT).map(|first| first..first + SEGMENT);
        let shared = (SEGMENTED..FIRST_CAPTURED).map(|slot| slot..slot + 1);
        segments.chain(shared).try_for_each(|slots| self.wait(slots))?;
        let lent = self.slots[FIRST_LENT..].iter().filter_map(|slot| slot.done.get());
        lent.into_iter().try_for_each(Event::synchronize)
    }

    /// What was found about one encode, which is done; again at every call.
    pub(super) fn check(&self, ticket: Ticket) -> Result<()> {
        let mut findings = self.findings.lock();
        if self.flags.load_u32(1 + ticket.slot) != 0 {
            self.collect(&mut findings)?;
        }
        findings.get_mut(&ticket.sequence).map_or(Ok(()), |finding| Err(self.raise(finding)))
    }

    fn raise(&self, finding: &mut Finding) -> Error {
        if !std::mem::replace(&mut finding.raised, true) {
            self.unraised.fetch_sub(1, Ordering::Release);
        }
        finding.error.clone()
    }

    fn collect(&self, findings: &mut Findings) -> Result<()> {
        // Cleared first: what is found from here on sets it again.
        self.flags.store_u32(ANY, 0);
        for index in 0..self.slots.len() {
            if self.flags.load_u32(1 + index) == 0 {
                continue;
            }
            let slot = &self.slots[index];
            let sequence = slot.sequence.load(Ordering::Acquire);
            let enqueueing =
                index < FIRST_CAPTURED && sequence != slot.enqueued.load(Ordering::Acquire);
            if enqueueing {
                // Another thread is at it, and its event is not there yet to be waited for.
                self.flags.store_u32(ANY, 1);
                continue;
            }
            if let Err(error) = self.resolve(index, findings) {
                self.flags.store_u32(ANY, 1);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Moves what a slot's record says to the findings, whose lock keeps others from doing so too.
    fn resolve(&self, index: usize, findings: &mut Findings) -> Result<()> {
        let slot = &self.slots[index];
        if let Some(done) = slot.done.get() {
            done.synchronize()?; // all blocks have reported, so the record holds the first value
        }
        if self.flags.load_u32(1 + index) == 0 {
            return Ok(()); // another thread was faster
        }
        let error = self.read(index)?;
        let sequence = slot.sequence.load(Ordering::Acquire);
        self.clear(index)?;
        if findings.insert(sequence, Finding { error, raised: false }).is_none_or(|old| old.raised)
        {
            self.unraised.fetch_add(1, Ordering::Release);
        }
        while findings.len() > MAX_FINDINGS {
            if let Some((_, Finding { raised: false, .. })) = findings.pop_first() {
                self.unraised.fetch_sub(1, Ordering::Release);
            }
        }
        Ok(())
    }

    /// What a slot's record says.
    fn read(&self, index: usize) -> Result<Error> {
        let mut key = [0; 8];
        self.records.copy_to_host(index * size_of::<u64>(), &mut key, self.stream.raw())?;
        Ok(decode(u64::from_ne_bytes(key), &self.slots[index]))
    }

    /// Empties a slot's record and flag, under the lock of the findings.
    fn clear(&self, index: usize) -> Result<()> {
        self.records.copy_from_host(index * size_of::<u64>(), &[0xff; 8], self.stream.raw())?;
        // Last: from here on the slot may go to another encode.
        self.flags.store_u32(1 + index, 0);
        Ok(())
    }
}

/// The error that a record's key names (`report` in common.cuh).
fn decode(key: u64, slot: &Slot) -> Error {
    let (place, reason) = (key >> 3, key & 7);
    let per_sample = slot.features.load(Ordering::Relaxed) + 1;
    let num_qubits = slot.num_qubits.load(Ordering::Relaxed);
    let (sample, position) = ((place / per_sample) as usize, (place % per_sample) as usize);
    match reason {
        1 | 2 => Error::NonFinite { sample, position, nan: reason == 1 },
        3 => Error::ZeroNorm { sample },
        4 => Error::NormOverflow { sample },
        _ => Error::BasisValue {
            sample,
            position,
            num_qubits,
            expected: if slot.bits.load(Ordering::Relaxed) {
                "bits, 0 or 1".to_owned()
            } else {
                format!("an integer from 0 to {}", (1u64 << num_qubits) - 1)
            },
            value: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_sample_and_position() {
        let slot = Slot { features: 5.into(), num_qubits: 3.into(), ..Slot::default() };
        let key = |sample: u64, position: u64, reason| (sample * 6 + position) << 3 | reason;
        assert_eq!(
            decode(key(2, 4, 1), &slot),
            Error::NonFinite { sample: 2, position: 4, nan: true }
        );
        assert_eq!(
            decode(key(0, 0, 2), &slot),
            Error::NonFinite { sample: 0, position: 0, nan: false }
        );
        assert_eq!(decode(key(7, 5, 3), &slot), Error::ZeroNorm { sample: 7 });
        assert_eq!(decode(key(7, 5, 4), &slot), Error::NormOverflow { sample: 7 });
        assert!(matches!(
            decode(key(1, 0, 5), &slot),
            Error::BasisValue { sample: 1, position: 0, num_qubits: 3, .. }
        ));
    }
}
