//! A batch of states and its views.

use crate::cpu::memory::HostBuffer;
use crate::cuda;
use crate::element::{Precision, Real};
use crate::engine::Device;
use crate::error::{Error, Result};
use num_complex::Complex;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// What a batch and its views share.
#[derive(Debug)]
pub(crate) enum Storage {
    Host(HostBuffer),
    Device(cuda::DeviceStates),
}

/// An owned batch of state vectors, shape `(batch, 2^n)`; cloning and slicing share the memory.
///
/// On a CUDA device the states may not be written yet: whoever reads them on a stream calls
/// [`StateBatch::make_ready_on`] first, and [`StateBatch::to_host`] waits.
#[derive(Debug, Clone)]
pub struct StateBatch {
    storage: Arc<Storage>,
    precision: Precision,
    num_qubits: u32,
    /// The rows of the storage that this view shows.
    rows: Range<usize>,
    /// Distance between rows, in amplitudes.
    row_stride: usize,
}

impl StateBatch {
    pub(crate) fn new(
        storage: Storage,
        precision: Precision,
        num_qubits: u32,
        batch: usize,
    ) -> Self {
        Self {
            storage: Arc::new(storage),
            precision,
            num_qubits,
            rows: 0..batch,
            row_stride: 1 << num_qubits,
        }
    }

    /// A batch in host memory that somebody else owns, such as an `out=` array.
    ///
    /// # Safety
    ///
    /// The rows described must stay readable until `owner` is dropped.
    pub unsafe fn from_host_owner(
        ptr: NonNull<u8>,
        precision: Precision,
        num_qubits: u32,
        (batch, row_stride): (usize, usize),
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        // SAFETY: passed on to the caller.
        let buffer = unsafe { HostBuffer::external(ptr, owner) };
        Self { row_stride, ..Self::new(Storage::Host(buffer), precision, num_qubits, batch) }
    }

    pub(crate) fn with_row_stride(self, row_stride: usize) -> Self {
        Self { row_stride, ..self }
    }

    /// Number of states.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Number of qubits.
    pub fn num_qubits(&self) -> u32 {
        self.num_qubits
    }

    /// Amplitudes per state.
    pub fn dim(&self) -> usize {
        1 << self.num_qubits
    }

    /// Element type.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Distance between rows, in amplitudes.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Bytes of the amplitudes.
    pub fn num_bytes(&self) -> usize {
        self.batch() * self.dim() * self.precision.size()
    }

    /// Where the states lie.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Host(_) => Device::Cpu,
            Storage::Device(states) => states.device(),
        }
    }

    /// Address of the first amplitude, on [`Self::device`].
    pub fn as_ptr(&self) -> *mut u8 {
        let base = match &*self.storage {
            Storage::Host(buffer) => buffer.as_ptr(),
            Storage::Device(states) => states.as_ptr(),
        };
        base.wrapping_add(self.rows.start * self.row_stride * self.precision.size())
    }

    /// A view of some of the states.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if the range is not inside the batch.
    pub fn slice(&self, rows: Range<usize>) -> Result<Self> {
        if rows.start > rows.end || rows.end > self.batch() {
            return Err(Error::invalid(
                "index",
                format!("a range inside 0..{}", self.batch()),
                format!("{rows:?}"),
            ));
        }
        let start = self.rows.start;
        Ok(Self { rows: start + rows.start..start + rows.end, ..self.clone() })
    }

    /// Raises what validation on the device found about the encode that made these states; waits
    /// for it. Host input was validated at the call.
    pub fn check(&self) -> Result<()> {
        match &*self.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device(states) => states.check(),
        }
    }

    /// Waits until the states are written.
    pub fn synchronize(&self) -> Result<()> {
        match &*self.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device(states) => states.synchronize(),
        }
    }

    /// Makes `stream` wait until the states are written, and keeps their memory until what the
    /// stream does with them after this call is done. Nothing to do for states on the host.
    pub fn make_ready_on(&self, stream: cuda::RawStream) -> Result<()> {
        match &*self.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device(states) => states.make_ready_on(stream),
        }
    }

    /// The states in host memory, rows without gaps: shared where they already are, else copied,
    /// after waiting for them and for validation.
    pub fn to_host(&self) -> Result<Self> {
        match &*self.storage {
            Storage::Host(_) if self.row_stride == self.dim() || self.batch() <= 1 => {
                Ok(self.clone())
            }
            _ => self.copy_to_host(),
        }
    }

    /// A copy of the states in host memory.
    pub fn copy_to_host(&self) -> Result<Self> {
        let buffer = HostBuffer::new(self.num_bytes() as u128)?;
        let row_bytes = self.dim() * self.precision.size();
        match &*self.storage {
            Storage::Host(_) => {
                // SAFETY: the buffer is new and has room for the states.
                unsafe { self.copy_rows_to(buffer.as_ptr()) };
            }
            Storage::Device(states) => {
                states.copy_to_host(
                    self.as_ptr() as u64,
                    buffer.as_ptr(),
                    (self.batch(), row_bytes, self.row_stride * self.precision.size()),
                )?;
            }
        }
        Ok(Self::new(Storage::Host(buffer), self.precision, self.num_qubits, self.batch()))
    }

    /// Copies states in host memory to `target`, rows without gaps.
    ///
    /// # Safety
    ///
    /// `target` has room for them, apart from them.
    unsafe fn copy_rows_to(&self, target: *mut u8) {
        let row_bytes = self.dim() * self.precision.size();
        for row in 0..self.batch() {
            let from = self.as_ptr().wrapping_add(row * self.row_stride * self.precision.size());
            // SAFETY: a row of `row_bytes` is at both addresses, and the two do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(from, target.add(row * row_bytes), row_bytes);
            }
        }
    }

    /// A copy of the states on the device where they lie.
    pub fn copy(&self) -> Result<Self> {
        match &*self.storage {
            Storage::Host(_) => self.copy_to_host(),
            Storage::Device(_) => Self::concatenate(std::slice::from_ref(self)),
        }
    }

    /// The states of several batches as one new batch, on the device where they lie.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] where there are none, or they differ in qubits, precision or
    /// device; what validation found about any of several batches on a device, for which this
    /// waits.
    pub fn concatenate(parts: &[Self]) -> Result<Self> {
        let kind = |part: &Self| (part.num_qubits, part.precision, part.device());
        let Some(first) = parts.first() else {
            return Err(Error::invalid("parts", "at least one batch", "none"));
        };
        if let Some(other) = parts.iter().find(|part| kind(part) != kind(first)) {
            let describe = |part: &Self| {
                let (qubits, precision, device) = kind(part);
                format!("{precision} states of {qubits} qubit(s) on {device}")
            };
            return Err(Error::invalid("parts", describe(first), describe(other)));
        }
        let (size, batch) = (first.precision.size(), parts.iter().map(Self::batch).sum());
        let mut on_device = Vec::with_capacity(parts.len());
        for part in parts {
            if let Storage::Device(states) = &*part.storage {
                let layout = (part.batch(), part.dim() * size, part.row_stride * size);
                on_device.push((states, part.as_ptr() as u64, layout));
            }
        }
        let storage = if let Some(copy) = cuda::DeviceStates::copy(&on_device)? {
            Storage::Device(copy)
        } else {
            let buffer = HostBuffer::new(batch as u128 * (first.dim() * size) as u128)?;
            let mut target = buffer.as_ptr();
            for part in parts {
                // SAFETY: the buffer is new and has room for the states of all parts.
                unsafe {
                    part.copy_rows_to(target);
                    target = target.add(part.num_bytes());
                }
            }
            Storage::Host(buffer)
        };
        Ok(Self::new(storage, first.precision, first.num_qubits, batch))
    }

    /// All amplitudes, one state after another.
    ///
    /// # Errors
    ///
    /// [`Error::DType`] if `R` is not the states' precision, [`Error::DeviceMismatch`] if they are
    /// not in host memory without gaps ([`Self::to_host`] gives that).
    pub fn as_slice<R: Real>(&self) -> Result<&[Complex<R>]> {
        if R::PRECISION != self.precision {
            return Err(Error::DType {
                argument: "R",
                expected: self.precision.to_string(),
                got: R::PRECISION.to_string(),
            });
        }
        let gaps = self.row_stride != self.dim() && self.batch() > 1;
        if gaps || self.device() != Device::Cpu {
            return Err(Error::DeviceMismatch {
                argument: "self",
                expected: "the host, rows without gaps".to_owned(),
                got: self.device().to_string(),
            });
        }
        // SAFETY: the storage holds the rows of this view, initialised, for as long as `self`;
        // Complex<R> is two R, which is what was written there; alignment was checked by whoever
        // gave the memory (HostBuffer aligns to 64 bytes, `out` arrays to their element).
        Ok(unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.batch() * self.dim()) })
    }
}
