//! Host input on its way to the device: copied once, in parallel, into page-locked slots, and
//! validated while it is read anyway.
//!
//! The slots live with the engine. A slot is filled again only after the event behind its last
//! copy; while one is on its way, the next is filled.

use super::{Context, DeviceBuffer, Event, PinnedBuffer, RawStream};
use crate::cpu;
use crate::cpu::parallel::STAGE;
use crate::element::{Element, with_element};
use crate::encoding::product::{Factor, Product};
use crate::encoding::{Form, amplitude, basis};
use crate::error::Result;
use crate::input::{Input, Row};
use crate::plan::EncodePlan;
use std::ops::Range;
use std::sync::Arc;

const SLOTS: usize = 4;
const SLOT_BYTES: usize = 8 << 20;
/// Chunks that a batch is cut into where they are not larger than a slot, or too small.
const CHUNKS: usize = 8;
const MIN_CHUNK_BYTES: usize = 1 << 20;
/// What one thread copies at a time: small enough for its cache, as validation reads it again.
const PIECE_BYTES: usize = 128 << 10;
/// Chunks below this are copied by the calling thread.
const PARALLEL_BYTES: usize = 512 << 10;

struct Slot {
    pinned: PinnedBuffer,
    copied: Event,
    in_flight: bool,
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
        let size = input.dtype().size();
        let pieces = pieces(input.batch(), input.features(), size);
        // Several chunks even of a small batch, so that the copy of one overlaps staging the next.
        let chunk = (input.num_bytes() / CHUNKS).clamp(MIN_CHUNK_BYTES, SLOT_BYTES);
        let mut sums = RowSums::default();
        let (mut start, mut offset) = (0, 0);
        while start < pieces.len() {
            let mut end = start;
            let mut bytes = 0;
            while end < pieces.len() && bytes + pieces[end].elements() * size <= chunk {
                bytes += pieces[end].elements() * size;
                end += 1;
            }
            let slot = self.free_slot(context)?;
            // SAFETY: the slot's last copy is done, and `&mut self` keeps everybody else away.
            let staged = unsafe { slot.pinned.slice_mut(0..bytes)? };
            let partial = with_element!(input.dtype(), T => {
                stage::<T>(plan, input, &pieces[start..end], staged)?
            });
            sums.add(plan, &pieces[start..end], &partial)?;
            slot.in_flight = true;
            // SAFETY: the slot lives with the engine, whose drop waits for the event recorded
            // next, and is written again only behind that event.
            unsafe { target.copy_from_host_async(offset, &slot.pinned, 0..bytes, stream)? };
            slot.copied.record(stream)?;
            offset += bytes;
            start = end;
        }
        Ok(())
    }

    fn free_slot(&mut self, context: &Arc<Context>) -> Result<&mut Slot> {
        if self.slots.len() < SLOTS && self.slots.len() == self.next {
            self.slots.push(Slot {
                pinned: PinnedBuffer::new(context, SLOT_BYTES)?,
                copied: Event::new(context)?,
                in_flight: false,
            });
        }
        let index = self.next;
        self.next = (self.next + 1) % SLOTS;
        let slot = &mut self.slots[index];
        if slot.in_flight {
            slot.copied.synchronize()?;
            slot.in_flight = false;
        }
        Ok(slot)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in self.slots.iter().filter(|slot| slot.in_flight) {
            if let Err(error) = slot.copied.synchronize() {
                slot.copied.context().record_drop_failure(error);
            }
        }
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

/// Copies pieces into `staged`, one behind the other, and validates them; returns for each its sum
/// of squares where the encoding needs one.
fn stage<T: Element>(
    plan: &EncodePlan,
    input: &Input<'_>,
    pieces: &[Piece],
    staged: &mut [u8],
) -> Result<Vec<f64>> {
    let parallel = staged.len() >= PARALLEL_BYTES;
    let mut rest = staged;
    let mut tasks = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (head, tail) = rest.split_at_mut(piece.elements() * size_of::<T>());
        tasks.push((piece, head));
        rest = tail;
    }
    let one = |piece: &Piece, target: &mut [u8]| -> Result<f64> {
        let mut sum = 0.0;
        let row_bytes = piece.columns.len() * size_of::<T>();
        for (sample, target) in piece.rows.clone().zip(target.chunks_exact_mut(row_bytes)) {
            let row = input.row::<T>(sample).range(piece.columns.clone());
            copy_row(row, target);
            sum = validate(plan, sample, row, piece.columns.start)?;
            if piece.columns.len() == plan.features() && matches!(plan.form(), Form::Amplitude) {
                amplitude::norm(sample, sum)?;
            }
        }
        Ok(sum)
    };
    // Looked at in order afterwards, so that the first bad sample is the one that is named.
    let mut results = vec![Ok(0.0); pieces.len()];
    STAGE.for_each(parallel, tasks.into_iter().zip(&mut results), |((piece, target), result)| {
        *result = one(piece, target);
    });
    results.into_iter().collect()
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

/// Sums of squares of rows that are longer than a piece.
#[derive(Default)]
struct RowSums {
    sum: f64,
}

impl RowSums {
    /// Adds the sums of consecutive pieces and checks each row that ends among them.
    fn add(&mut self, plan: &EncodePlan, pieces: &[Piece], partial: &[f64]) -> Result<()> {
        if !matches!(plan.form(), Form::Amplitude) {
            return Ok(());
        }
        for (piece, sum) in pieces.iter().zip(partial) {
            if piece.columns.len() == plan.features() {
                continue; // whole rows were checked one by one
            }
            self.sum += sum;
            if piece.columns.end == plan.features() {
                amplitude::norm(piece.rows.start, std::mem::take(&mut self.sum))?;
            }
        }
        Ok(())
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

    fn staged(values: &[f64], features: usize) -> Result<Vec<u8>> {
        let n = features.next_power_of_two().trailing_zeros().max(1);
        let spec = EncodeSpec::new(Encoding::Amplitude, n)?;
        let input = Input::rows(values, features)?;
        let plan = Engine::open(Device::Cpu)?.plan(&input, &spec, None)?;
        let pieces = pieces(input.batch(), features, 8);
        let mut bytes = vec![0; input.num_bytes()];
        let partial = stage::<f64>(&plan, &input, &pieces, &mut bytes)?;
        RowSums::default().add(&plan, &pieces, &partial)?;
        Ok(bytes)
    }

    #[test]
    fn staging_copies_every_byte() {
        for (batch, features) in [(3, 5), (2, 100_000)] {
            let values: Vec<f64> = (0..batch * features).map(|i| 1.0 + i as f64).collect();
            let bytes = staged(&values, features).unwrap();
            let copy: Vec<f64> =
                bytes.chunks_exact(8).map(|b| f64::from_ne_bytes(b.try_into().unwrap())).collect();
            assert_eq!(copy, values);
        }
    }

    #[test]
    fn staging_names_the_first_bad_value() {
        for features in [5, 100_000] {
            let mut values = vec![1.0; 3 * features];
            values[features + 3] = f64::NAN;
            values[2 * features] = f64::INFINITY;
            let expected = Error::NonFinite { sample: 1, position: 3, nan: true };
            assert_eq!(staged(&values, features), Err(expected));
            let mut values = vec![1.0; 3 * features];
            values[2 * features..].fill(0.0);
            assert_eq!(staged(&values, features), Err(Error::ZeroNorm { sample: 2 }));
            values[features] = 1e200;
            assert_eq!(staged(&values, features), Err(Error::NormOverflow { sample: 1 }));
        }
    }
}
