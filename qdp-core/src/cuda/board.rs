//! Deferred validation: what kernels find wrong with device input, told without a sync.
//!
//! Each encode of device input holds a slot: a record in device memory, which keeps the first bad
//! value, and a flag in host memory, which the kernel sets after it. One more flag says that any
//! slot has something, so asking costs one load. Slots are used in turn. Those of encodes that
//! are being captured into a graph are kept apart and never reused while there are enough, as a
//! replay may report at any time.

use super::{Context, DeviceBuffer, Event, MappedBuffer, Pool, RawStream, Stream};
use crate::encoding::Form;
use crate::encoding::product::{Factor, Product};
use crate::error::{Error, Result};
use crate::plan::EncodePlan;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots of ordinary encodes: more than a stream's launch queue is deep.
const SLOTS: usize = 4096;
/// Slots of captured encodes.
const CAPTURE_SLOTS: usize = 1024;
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

#[derive(Default)]
struct Slot {
    sequence: u64,
    features: usize,
    num_qubits: u32,
    bits: bool,
    /// Recorded behind the encode, unless that was captured.
    done: Option<Event>,
    recorded: bool,
}

struct Finding {
    error: Error,
    raised: bool,
}

pub(super) struct Board {
    context: Arc<Context>,
    /// For reading records: waits for nobody else's work.
    stream: Arc<Stream>,
    records: DeviceBuffer,
    flags: MappedBuffer,
    slots: Vec<Mutex<Slot>>,
    findings: Mutex<BTreeMap<u64, Finding>>,
    next: AtomicU64,
    next_captured: AtomicU64,
}

impl Board {
    pub(super) fn new(context: &Arc<Context>, pool: &Arc<Pool>) -> Result<Self> {
        let stream = Stream::new(context)?;
        let total = SLOTS + CAPTURE_SLOTS;
        let records = pool.alloc(total * size_of::<u64>(), &stream)?;
        records.memset(0..records.bytes(), 0xff, stream.raw())?;
        stream.synchronize()?;
        Ok(Self {
            context: Arc::clone(context),
            stream,
            records,
            flags: MappedBuffer::new(context, (total + 1) * size_of::<u32>())?,
            slots: (0..total).map(|_| Mutex::default()).collect(),
            findings: Mutex::default(),
            next: AtomicU64::new(0),
            next_captured: AtomicU64::new(0),
        })
    }

    /// Takes a slot for an encode.
    pub(super) fn issue(&self, plan: &EncodePlan, captured: bool) -> Result<Ticket> {
        let (sequence, slot) = if captured {
            let turn = self.next_captured.fetch_add(1, Ordering::Relaxed);
            // Sequences of captured encodes lie behind all others.
            (u64::MAX / 2 + turn, SLOTS + turn as usize % CAPTURE_SLOTS)
        } else {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            (turn, turn as usize % SLOTS)
        };
        let mut state = self.slots[slot].lock();
        if self.flags.load_u32(1 + slot) != 0 {
            self.resolve(slot, &mut state)?;
        }
        state.sequence = sequence;
        state.features = plan.features();
        state.num_qubits = plan.spec().num_qubits();
        state.bits = matches!(plan.form(), Form::Product(Product { factor: Factor::Bit, .. }));
        state.recorded = false;
        Ok(Ticket { slot, sequence })
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
        let mut slot = self.slots[ticket.slot].lock();
        if slot.sequence != ticket.sequence {
            return Ok(()); // a whole turn of the board ago
        }
        if slot.done.is_none() {
            slot.done = Some(Event::new(&self.context)?);
        }
        if let Some(done) = &slot.done {
            done.record(stream)?;
        }
        slot.recorded = true;
        Ok(())
    }

    /// The first finding that was not raised yet. One load where there is none.
    pub(super) fn take(&self) -> Result<Option<Error>> {
        if self.flags.load_u32(ANY) != 0 {
            self.collect()?;
        } else if self.findings.lock().is_empty() {
            return Ok(None);
        }
        let mut findings = self.findings.lock();
        let finding = findings.values_mut().find(|finding| !finding.raised);
        Ok(finding.map(|finding| {
            finding.raised = true;
            finding.error.clone()
        }))
    }

    /// Waits for every encode that holds a slot.
    pub(super) fn synchronize(&self) -> Result<()> {
        for slot in &self.slots[..SLOTS] {
            let slot = slot.lock();
            if let Some(done) = slot.done.as_ref().filter(|_| slot.recorded) {
                done.synchronize()?;
            }
        }
        Ok(())
    }

    /// What was found about one encode, which is done; again at every call.
    pub(super) fn check(&self, ticket: Ticket) -> Result<()> {
        if self.flags.load_u32(1 + ticket.slot) != 0 {
            self.collect()?;
        }
        match self.findings.lock().get_mut(&ticket.sequence) {
            None => Ok(()),
            Some(finding) => {
                finding.raised = true;
                Err(finding.error.clone())
            }
        }
    }

    fn collect(&self) -> Result<()> {
        // Cleared first: what is found from here on sets it again.
        self.flags.store_u32(ANY, 0);
        for (index, slot) in self.slots.iter().enumerate() {
            if self.flags.load_u32(1 + index) != 0 {
                self.resolve(index, &mut slot.lock())?;
            }
        }
        Ok(())
    }

    /// Moves what a slot's record says to the findings.
    fn resolve(&self, index: usize, slot: &mut Slot) -> Result<()> {
        if let Some(done) = slot.done.as_ref().filter(|_| slot.recorded) {
            done.synchronize()?; // all blocks have reported, so the record holds the first value
        }
        if self.flags.load_u32(1 + index) == 0 {
            return Ok(()); // another thread was faster
        }
        let offset = index * size_of::<u64>();
        let mut key = [0; 8];
        self.records.copy_to_host(offset, &mut key, self.stream.raw())?;
        self.records.copy_from_host(offset, &[0xff; 8], self.stream.raw())?;
        self.flags.store_u32(1 + index, 0);
        let error = decode(u64::from_ne_bytes(key), slot);
        let mut findings = self.findings.lock();
        findings.insert(slot.sequence, Finding { error, raised: false });
        while findings.len() > MAX_FINDINGS {
            findings.pop_first();
        }
        Ok(())
    }
}

/// The error that a record's key names (`report` in common.cuh).
fn decode(key: u64, slot: &Slot) -> Error {
    let (place, reason) = (key >> 3, key & 7);
    let per_sample = slot.features as u64 + 1;
    let (sample, position) = ((place / per_sample) as usize, (place % per_sample) as usize);
    match reason {
        1 | 2 => Error::NonFinite { sample, position, nan: reason == 1 },
        3 => Error::ZeroNorm { sample },
        4 => Error::NormOverflow { sample },
        _ => Error::BasisValue {
            sample,
            position,
            num_qubits: slot.num_qubits,
            expected: if slot.bits {
                "bits, 0 or 1".to_owned()
            } else {
                format!("an integer from 0 to {}", (1u64 << slot.num_qubits) - 1)
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
        let slot = Slot { features: 5, num_qubits: 3, ..Slot::default() };
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
