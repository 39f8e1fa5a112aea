//! The memory of a batch's rows.

use crate::cpu::memory::HostBuffer;
use crate::cuda::{PinnedBuffer, Reading};
use crate::element::DType;
use crate::encoding::Form;
use crate::encoding::amplitude::MIN_NORM_SQUARED;
use crate::engine::{Device, Engine};
use crate::error::Result;
use crate::input::Input;
use crate::pipeline::plan::Piece;
use crate::pipeline::stage::{Staging, link_dtype};
use crate::plan::EncodePlan;
use crate::state::StateBatch;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sums of squares that are a norm's however they are rounded.
const SURE: Range<f64> = 2.0 * MIN_NORM_SQUARED..f64::MAX / 2.0;

/// Memory that threads fill side by side, each its own rows, and that one reads when all are done.
pub(super) struct Rows {
    memory: Memory,
    bytes: usize,
    /// What was wanted, whatever was to be had.
    pinned: bool,
    /// Whether the device might refuse a value that was checked, as it is so near to a bound that
    /// how it is rounded decides.
    doubtful: AtomicBool,
    /// The encode that reads the memory, after its batch is over.
    reading: Mutex<Option<Reading>>,
}

enum Memory {
    Host(HostBuffer),
    Pinned(PinnedBuffer),
}

impl Rows {
    /// Whether a batch of this plan may lie in page-locked memory. Values that travel in a narrower
    /// type are narrowed by the engine while it stages them, and from page-locked memory nothing is
    /// staged: the states would not be, bit for bit, those of a sample alone.
    pub(super) fn may_be_pinned(engine: &Engine, plan: &EncodePlan) -> bool {
        engine.device() != Device::Cpu && link_dtype(plan) == plan.dtype()
    }

    /// So many bytes, page-locked if that is wanted and to be had.
    pub(super) fn new(engine: &Engine, bytes: usize, pinned: bool) -> Result<Self> {
        let locked = if pinned { engine.pinned_buffer(bytes).and_then(Result::ok) } else { None };
        let memory = match locked {
            Some(buffer) => Memory::Pinned(buffer),
            None => Memory::Host(HostBuffer::new(bytes as u128)?),
        };
        Ok(Self {
            memory,
            bytes,
            pinned,
            doubtful: AtomicBool::new(false),
            reading: Mutex::default(),
        })
    }

    /// Whether [`Self::new`] would give one like this.
    pub(super) fn is_for(&self, bytes: usize, pinned: bool) -> bool {
        self.bytes == bytes && self.pinned == pinned
    }

    /// Whether nobody reads the memory any more.
    pub(super) fn is_free(&self) -> bool {
        self.reading.lock().as_ref().is_none_or(Reading::is_over)
    }

    /// Waits until nobody reads the memory.
    pub(super) fn wait(&self) {
        if let Some(reading) = self.reading.lock().take() {
            reading.wait();
        }
    }

    /// Makes it free for another batch.
    pub(super) fn reuse(&self) {
        self.wait();
        self.doubtful.store(false, Ordering::Relaxed);
    }

    /// Encodes the first `batch` rows where they lie, without waiting; `None` where they have to be
    /// encoded as any host input is.
    ///
    /// # Safety
    ///
    /// Nobody writes the rows before the memory is free.
    pub(super) unsafe fn encode(
        &self,
        engine: &Engine,
        plan: &EncodePlan,
        batch: usize,
    ) -> Option<Result<StateBatch>> {
        let Memory::Pinned(memory) = &self.memory else { return None };
        if self.doubtful.load(Ordering::Relaxed) {
            return None;
        }
        // SAFETY: the caller does not write them, and they are not freed while they are read.
        let encoded = unsafe { engine.encode_checked(plan, memory, batch)? };
        Some(encoded.map(|(states, reading)| {
            *self.reading.lock() = Some(reading);
            states
        }))
    }

    fn is_pinned(&self) -> bool {
        matches!(self.memory, Memory::Pinned(_))
    }

    fn as_ptr(&self) -> *mut u8 {
        match &self.memory {
            Memory::Host(buffer) => buffer.as_ptr(),
            Memory::Pinned(buffer) => buffer.as_ptr(),
        }
    }

    /// The bytes of some rows.
    ///
    /// # Safety
    ///
    /// While the slice is there, nobody else may read or write these rows.
    #[allow(clippy::mut_from_ref, reason = "exclusive use of the rows is the caller's promise")]
    unsafe fn slice_mut(&self, plan: &EncodePlan, rows: &Range<usize>) -> &mut [u8] {
        let row_bytes = plan.features() * plan.dtype().size();
        let (start, end) = (rows.start * row_bytes, rows.end * row_bytes);
        assert!(start <= end && end <= self.bytes, "rows {rows:?} are beyond the buffer");
        // SAFETY: the range lies in the memory, which is initialised and lives as long as `self`;
        // that nobody else uses it is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().add(start), end - start) }
    }

    /// Copies the samples of `input` to `rows` and checks their values; where one names no state,
    /// all of the rows are given values that do.
    ///
    /// # Safety
    ///
    /// Nobody else reads or writes these rows meanwhile.
    pub(super) unsafe fn write(
        &self,
        plan: &EncodePlan,
        rows: &Range<usize>,
        input: &Input<'_>,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        let target = unsafe { self.slice_mut(plan, rows) };
        let staging = Staging::unchanged(plan, input, self.is_pinned());
        let row_bytes = target.len().checked_div(input.batch()).unwrap_or(0);
        let write = |row: usize, target: &mut [u8]| {
            let columns = 0..input.features();
            let piece = Piece { rows: row..row + 1, columns, chunk: 0, offset: 0 };
            let sum = staging.stage(&piece, target)?;
            if matches!(plan.form(), Form::Amplitude) && !SURE.contains(&sum) {
                self.doubtful.store(true, Ordering::Relaxed);
            }
            Ok(())
        };
        let mut rows = target.chunks_exact_mut(row_bytes.max(1)).enumerate();
        let written = rows.try_for_each(|(row, target)| write(row, target));
        if written.is_err() {
            fill(plan, target);
        }
        written
    }

    /// Gives `rows` values that name a state.
    ///
    /// # Safety
    ///
    /// As for [`Self::write`].
    pub(super) unsafe fn fill(&self, plan: &EncodePlan, rows: &Range<usize>) {
        // SAFETY: the caller's promise.
        fill(plan, unsafe { self.slice_mut(plan, rows) });
    }

    /// The first `rows` rows.
    ///
    /// # Safety
    ///
    /// While the input is there, nobody writes these rows.
    pub(super) unsafe fn input(&self, plan: &EncodePlan, rows: usize) -> Input<'_> {
        let features = plan.features();
        assert!(rows * features * plan.dtype().size() <= self.bytes);
        let (shape, strides) = ((rows, features), (features as isize, 1));
        // SAFETY: the rows lie in the memory, which is initialised, aligned for every element type
        // and lives as long as `self`; every bit pattern is a value of every element type; that
        // nobody writes them is the caller's promise.
        unsafe { Input::from_raw(self.as_ptr(), plan.dtype(), Device::Cpu, shape, strides) }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        self.reuse();
    }
}

/// Values that name a state, whatever the encoding: zeros, but a one where a norm is wanted.
pub(crate) fn fill(plan: &EncodePlan, target: &mut [u8]) {
    target.fill(0);
    if matches!(plan.form(), Form::Amplitude) {
        let row_bytes = plan.features() * plan.dtype().size();
        for row in target.chunks_exact_mut(row_bytes) {
            one(plan.dtype(), row);
        }
    }
}

/// Writes a one of type `dtype` where the row begins.
fn one(dtype: DType, row: &mut [u8]) {
    let (one, size): (u128, usize) = match dtype {
        DType::F16 => (u128::from(half::f16::ONE.to_bits()), 2),
        DType::BF16 => (u128::from(half::bf16::ONE.to_bits()), 2),
        DType::F32 | DType::C64 => (u128::from(1.0_f32.to_bits()), 4),
        DType::F64 | DType::C128 => (u128::from(1.0_f64.to_bits()), 8),
        integer => (1, integer.size()),
    };
    let bytes = one.to_ne_bytes();
    let bytes = if cfg!(target_endian = "little") { &bytes[..size] } else { &bytes[16 - size..] };
    row[..size].copy_from_slice(bytes);
}
