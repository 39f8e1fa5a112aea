//! Host input on its way to the device: copied once, in parallel, into page-locked slots, and
//! validated while it is read anyway.
//!
//! The slots live with the engine. The input is cut into chunks of up to a slot, and those into
//! pieces that threads stage in order. The calling thread leads: it enqueues the copy of each
//! chunk that is filled, opens the next slot when its last copy is done, and stages pieces
//! meanwhile. Waking threads is slow, so they are woken once for the whole input.

use super::{Context, DeviceBuffer, Event, PinnedBuffer, RawStream};
use crate::cpu;
use crate::cpu::parallel::STAGE;
use crate::element::{Element, with_element};
use crate::encoding::product::{Factor, Product};
use crate::encoding::{Form, amplitude, basis};
use crate::error::Result;
use crate::input::{Input, Row};
use crate::plan::EncodePlan;
use parking_lot::{Condvar, Mutex};
use std::ops::Range;
use std::sync::Arc;

/// Many small slots rather than few large ones: threads run further ahead of the copies, and the
/// link waits less for the first slot to be filled.
const SLOTS: usize = 16;
const SLOT_BYTES: usize = 2 << 20;
/// Chunks that a small batch is cut into, where they are not too small to be worth a copy each.
const CHUNKS: usize = 8;
const MIN_CHUNK_BYTES: usize = 256 << 10;
/// What one thread copies at a time: small enough for its cache, as validation reads it again.
const PIECE_BYTES: usize = 128 << 10;
/// One thread more is woken for each so many bytes: waking takes as long as staging them.
const BYTES_PER_THREAD: usize = 2 << 20;

struct Slot {
    pinned: PinnedBuffer,
    /// Recorded behind the last copy from it.
    copied: Event,
}

/// The page-locked slots of one engine.
pub(super) struct Staging {
    slots: Vec<Slot>,
    next: usize,
}

/// Some whole rows, or a part of one.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Piece {
    fn elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }
}

impl Staging {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), next: 0 }
    }

    /// Copies `input` without gaps to `target`, enqueued on `stream`, and validates it.
    ///
    /// When this returns the input has been read, but the copies may be in flight. On an error
    /// some copies may be, too; `target` is to be dropped in the order of `stream`.
    pub(super) fn upload(
        &mut self,
        context: &Arc<Context>,
        plan: &EncodePlan,
        input: &Input<'_>,
        target: &DeviceBuffer,
        stream: RawStream,
    ) -> Result<()> {
        let work = Work::new(plan, input);
        let slots = self.slots(context, work.chunks.len())?;
        let helpers = input.num_bytes() / BYTES_PER_THREAD;
        let queue = Queue::new(&work);
        let help = || {
            let _guard = CloseOnPanic(&queue);
            while let Some(piece) = queue.take(true) {
                queue.done(piece, work.stage(piece, &slots));
            }
        };
        let lead = || {
            let _guard = CloseOnPanic(&queue);
            let result = Self::lead(
                &work,
                &queue,
                &mut |chunk| {
                    let slot = slots[chunk % slots.len()];
                    let bytes = work.chunks[chunk].bytes;
                    let offset = work.chunks[chunk].offset;
                    // SAFETY: the slot lives with the engine, whose drop waits for the event recorded
                    // next, and is opened again only behind that event.
                    unsafe { target.copy_from_host_async(offset, &slot.pinned, 0..bytes, stream)? };
                    slot.copied.record(stream)
                },
                &slots,
            );
            queue.close();
            result
        };
        let led = STAGE.lead(helpers, help, lead);
        // What the data says comes first, and of that the first bad sample.
        work.check(queue.results())?;
        led
    }

    /// Enqueues each chunk's copy when it is filled, and works along until all are.
    fn lead(
        work: &Work<'_>,
        queue: &Queue<'_>,
        copy: &mut dyn FnMut(usize) -> Result<()>,
        slots: &[&Slot],
    ) -> Result<()> {
        let (mut copied, mut open) = (0, 0);
        while copied < work.chunks.len() {
            if copied < open && queue.is_filled(copied) {
                copy(copied)?;
                copied += 1;
                continue;
            }
            // A slot is open when the copy that last read it is done. It is waited for only where
            // there is nothing else to do.
            if open < work.chunks.len() && open < copied + slots.len() {
                let last_copy = &slots[open % slots.len()].copied;
                let free = last_copy.query()?;
                if free || !queue.has_work() {
                    if !free {
                        last_copy.synchronize()?;
                    }
                    open += 1;
                    queue.open(open);
                    continue;
                }
            }
            if let Some(piece) = queue.take(false) {
                queue.done(piece, work.stage(piece, slots));
            } else if !queue.wait_filled(copied) {
                return Ok(()); // a piece is bad: what is left need not be copied
            }
        }
        Ok(())
    }

    /// Slots for so many chunks, in the order in which they come free.
    fn slots(&mut self, context: &Arc<Context>, chunks: usize) -> Result<Vec<&Slot>> {
        while self.slots.len() < SLOTS.min(chunks) {
            self.slots.push(Slot {
                pinned: PinnedBuffer::new(context, SLOT_BYTES)?,
                copied: Event::new(context)?,
            });
        }
        let start = self.next;
        self.next = (self.next + chunks) % self.slots.len();
        Ok((0..self.slots.len()).map(|i| &self.slots[(start + i) % self.slots.len()]).collect())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in &self.slots {
            // An event that was never recorded counts as done.
            if let Err(error) = slot.copied.synchronize() {
                slot.copied.context().record_drop_failure(error);
            }
        }
    }
}

/// A part of the input that fits a slot.
struct Chunk {
    pieces: Range<usize>,
    /// Where it goes in the target.
    offset: usize,
    bytes: usize,
}

/// One input, cut up.
struct Work<'a> {
    plan: &'a EncodePlan,
    input: &'a Input<'a>,
    pieces: Vec<Piece>,
    chunks: Vec<Chunk>,
    /// For each piece its chunk, and its offset in the chunk's slot.
    places: Vec<(usize, usize)>,
}

impl<'a> Work<'a> {
    fn new(plan: &'a EncodePlan, input: &'a Input<'a>) -> Self {
        let size = input.dtype().size();
        let pieces = pieces(input.batch(), input.features(), size);
        // Several chunks even of a small batch, so that the copy of one overlaps staging the next.
        let most = (input.num_bytes() / CHUNKS).clamp(MIN_CHUNK_BYTES, SLOT_BYTES);
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut places = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            let bytes = piece.elements() * size;
            let end = chunks.last().map_or(0, |chunk| chunk.offset + chunk.bytes);
            if chunks.last().is_none_or(|chunk| chunk.bytes + bytes > most) {
                chunks.push(Chunk { pieces: index..index, offset: end, bytes: 0 });
            }
            let number = chunks.len() - 1;
            let chunk = &mut chunks[number];
            places.push((number, chunk.bytes));
            chunk.bytes += bytes;
            chunk.pieces.end = index + 1;
        }
        Self { plan, input, pieces, chunks, places }
    }

    /// Copies a piece to its place and validates it; returns its sum of squares.
    fn stage(&self, piece: usize, slots: &[&Slot]) -> Result<f64> {
        let (chunk, offset) = self.places[piece];
        let bytes = self.pieces[piece].elements() * self.input.dtype().size();
        let slot = slots[chunk % slots.len()];
        // SAFETY: the queue gives each piece to one thread, and only while its slot is open: no
        // copy from it is in flight. Places do not overlap.
        let target = unsafe { slot.pinned.slice_mut(offset..offset + bytes)? };
        with_element!(self.input.dtype(), T => self.stage_as::<T>(&self.pieces[piece], target))
    }

    fn stage_as<T: Element>(&self, piece: &Piece, target: &mut [u8]) -> Result<f64> {
        let mut sum = 0.0;
        let row_bytes = piece.columns.len() * size_of::<T>();
        for (sample, target) in piece.rows.clone().zip(target.chunks_exact_mut(row_bytes)) {
            let row = self.input.row::<T>(sample).range(piece.columns.clone());
            copy_row(row, target);
            sum = validate(self.plan, sample, row, piece.columns.start)?;
            if piece.columns.len() == self.plan.features() && self.is_amplitude() {
                amplitude::norm(sample, sum)?;
            }
        }
        Ok(sum)
    }

    fn is_amplitude(&self) -> bool {
        matches!(self.plan.form(), Form::Amplitude)
    }

    /// Raises the first error, and checks the norms of rows that are longer than a piece.
    fn check(&self, results: Vec<Option<Result<f64>>>) -> Result<()> {
        let mut row_sum = 0.0;
        for (piece, result) in self.pieces.iter().zip(results) {
            let Some(result) = result else { break };
            let sum = result?;
            if !self.is_amplitude() || piece.columns.len() == self.plan.features() {
                continue; // whole rows were checked one by one
            }
            row_sum += sum;
            if piece.columns.end == self.plan.features() {
                amplitude::norm(piece.rows.start, std::mem::take(&mut row_sum))?;
            }
        }
        Ok(())
    }
}

/// Hands pieces out in order, and knows which chunks are filled.
struct Queue<'a> {
    work: &'a Work<'a>,
    state: Mutex<QueueState>,
    changed: Condvar,
}

struct QueueState {
    next: usize,
    /// Chunks whose slot may be filled.
    open: usize,
    /// Pieces that each chunk still lacks.
    missing: Vec<usize>,
    results: Vec<Option<Result<f64>>>,
    /// Nothing is to be handed out any more.
    closed: bool,
}

impl<'a> Queue<'a> {
    fn new(work: &'a Work<'a>) -> Self {
        let state = QueueState {
            next: 0,
            open: 0,
            missing: work.chunks.iter().map(|chunk| chunk.pieces.len()).collect(),
            results: vec![None; work.pieces.len()],
            closed: false,
        };
        Self { work, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The next piece whose slot is open; `wait` says whether to wait for one.
    fn take(&self, wait: bool) -> Option<usize> {
        let mut state = self.state.lock();
        loop {
            if state.closed || state.next == self.work.pieces.len() {
                return None;
            }
            if self.work.places[state.next].0 < state.open {
                state.next += 1;
                return Some(state.next - 1);
            }
            if !wait {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    fn done(&self, piece: usize, result: Result<f64>) {
        let mut state = self.state.lock();
        // Pieces before a bad one have all been handed out, so the first error will be found.
        state.closed |= result.is_err();
        state.results[piece] = Some(result);
        let chunk = self.work.places[piece].0;
        state.missing[chunk] -= 1;
        if state.missing[chunk] == 0 || state.closed {
            self.changed.notify_all();
        }
    }

    fn open(&self, chunks: usize) {
        self.state.lock().open = chunks;
        self.changed.notify_all();
    }

    fn has_work(&self) -> bool {
        let state = self.state.lock();
        !state.closed && (state.missing[..state.open].iter().any(|&missing| missing > 0))
    }

    fn is_filled(&self, chunk: usize) -> bool {
        let state = self.state.lock();
        !state.closed && state.missing[chunk] == 0
    }

    /// Waits until a chunk is filled; false where it never will be.
    fn wait_filled(&self, chunk: usize) -> bool {
        let mut state = self.state.lock();
        while !state.closed && state.missing[chunk] > 0 {
            self.changed.wait(&mut state);
        }
        !state.closed
    }

    fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }

    fn results(self) -> Vec<Option<Result<f64>>> {
        self.state.into_inner().results
    }
}

/// Cuts a batch into pieces of about [`PIECE_BYTES`], in order.
fn pieces(batch: usize, features: usize, size: usize) -> Vec<Piece> {
    let most = PIECE_BYTES / size;
    if features <= most {
        let rows = most / features;
        return (0..batch)
            .step_by(rows)
            .map(|row| Piece { rows: row..(row + rows).min(batch), columns: 0..features })
            .collect();
    }
    (0..batch)
        .flat_map(|row| {
            (0..features).step_by(most).map(move |column| Piece {
                rows: row..row + 1,
                columns: column..(column + most).min(features),
            })
        })
        .collect()
}

fn copy_row<T: Element>(row: Row<'_, T>, target: &mut [u8]) {
    if let Some(slice) = row.as_slice() {
        // SAFETY: `target` has room for the row; page-locked memory of ours overlaps nobody's.
        unsafe {
            std::ptr::copy_nonoverlapping(
                slice.as_ptr().cast::<u8>(),
                target.as_mut_ptr(),
                size_of_val(slice),
            );
        }
        return;
    }
    for (i, bytes) in target.chunks_exact_mut(size_of::<T>()).enumerate() {
        let value = row.get(i);
        // SAFETY: `bytes` has the size of T; the write asks for no alignment.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
    }
}

/// Checks the values of a row, or of its part from `first` on; returns the sum of squares for
/// amplitude encoding.
fn validate<T: Element>(
    plan: &EncodePlan,
    sample: usize,
    row: Row<'_, T>,
    first: usize,
) -> Result<f64> {
    let num_qubits = plan.spec().num_qubits();
    match plan.form() {
        Form::Amplitude => {
            let sum = cpu::partial_sum(row);
            if !sum.is_finite() {
                cpu::check_finite(sample, row, first)?;
            }
            Ok(sum)
        }
        Form::Basis => basis::index(sample, row.get(0).to_f64(), num_qubits).map(|_| 0.0),
        Form::Product(Product { factor: Factor::Bit, .. }) => {
            for position in 0..row.len() {
                basis::check_bit(sample, first + position, row.get(position).to_f64(), num_qubits)?;
            }
            Ok(0.0)
        }
        Form::Product(_) | Form::Diagonal(_) => cpu::check_finite(sample, row, first).map(|()| 0.0),
    }
}

/// Lets the other threads go where one panics, instead of leaving them to wait for it.
struct CloseOnPanic<'a>(&'a Queue<'a>);

impl Drop for CloseOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding};
    use crate::engine::{Device, Engine};
    use crate::error::Error;

    #[test]
    fn pieces_cover_the_batch_in_order() {
        for (batch, features) in [(1, 1), (5, 3), (100_000, 2), (3, 40_000), (1, 1 << 20)] {
            let pieces = pieces(batch, features, 8);
            let mut at = (0, 0);
            for piece in &pieces {
                assert!(piece.elements() * 8 <= PIECE_BYTES.max(8));
                assert_eq!((piece.rows.start, piece.columns.start), at);
                at = if piece.columns.end == features {
                    (piece.rows.end, 0)
                } else {
                    (piece.rows.start, piece.columns.end)
                };
            }
            assert_eq!(at, (batch, 0));
        }
    }

    /// What staging finds in a batch, piece by piece, without a device.
    fn checked(values: &[f64], features: usize) -> Result<()> {
        let n = features.next_power_of_two().trailing_zeros().max(1);
        let spec = EncodeSpec::new(Encoding::Amplitude, n)?;
        let input = Input::rows(values, features)?;
        let plan = Engine::open(Device::Cpu)?.plan(&input, &spec, None)?;
        let work = Work::new(&plan, &input);
        let queue = Queue::new(&work);
        queue.open(work.chunks.len());
        let mut bytes = Vec::new();
        while let Some(piece) = queue.take(false) {
            let mut target = vec![0; work.pieces[piece].elements() * 8];
            queue.done(piece, work.stage_as::<f64>(&work.pieces[piece], &mut target));
            bytes.extend(target);
        }
        work.check(queue.results())?;
        let copy: Vec<f64> =
            bytes.chunks_exact(8).map(|b| f64::from_ne_bytes(b.try_into().unwrap())).collect();
        assert_eq!(copy, values);
        Ok(())
    }

    #[test]
    fn staging_copies_every_byte() {
        for (batch, features) in [(3, 5), (2, 100_000)] {
            let values: Vec<f64> = (0..batch * features).map(|i| 1.0 + i as f64).collect();
            assert_eq!(checked(&values, features), Ok(()));
        }
    }

    #[test]
    fn staging_names_the_first_bad_value() {
        for features in [5, 100_000] {
            let mut values = vec![1.0; 3 * features];
            values[features + 3] = f64::NAN;
            values[2 * features] = f64::INFINITY;
            let expected = Error::NonFinite { sample: 1, position: 3, nan: true };
            assert_eq!(checked(&values, features), Err(expected));
            let mut values = vec![1.0; 3 * features];
            values[2 * features..].fill(0.0);
            assert_eq!(checked(&values, features), Err(Error::ZeroNorm { sample: 2 }));
            values[features] = 1e200;
            assert_eq!(checked(&values, features), Err(Error::NormOverflow { sample: 1 }));
        }
    }

    #[test]
    fn chunks_cover_the_pieces_and_fit_a_slot() {
        let values = vec![1.0; 3 << 20];
        let input = Input::rows(&values, 1 << 20).unwrap();
        let spec = EncodeSpec::new(Encoding::Amplitude, 20).unwrap();
        let plan = Engine::open(Device::Cpu).unwrap().plan(&input, &spec, None).unwrap();
        let work = Work::new(&plan, &input);
        let (mut piece, mut offset) = (0, 0);
        for (index, chunk) in work.chunks.iter().enumerate() {
            assert_eq!((chunk.pieces.start, chunk.offset), (piece, offset));
            assert!(chunk.bytes <= SLOT_BYTES);
            let mut at = 0;
            for piece in chunk.pieces.clone() {
                assert_eq!(work.places[piece], (index, at));
                at += work.pieces[piece].elements() * 8;
            }
            assert_eq!(at, chunk.bytes);
            (piece, offset) = (chunk.pieces.end, offset + chunk.bytes);
        }
        assert_eq!((piece, offset), (work.pieces.len(), input.num_bytes()));
    }
}
