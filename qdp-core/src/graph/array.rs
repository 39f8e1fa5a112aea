//! An input of a replay, where the device has it.

use crate::element::DType;
use crate::engine::Device;
use crate::error::Result;
use crate::state::Storage;
use crate::{cpu::memory::HostBuffer, cuda};
use std::sync::Arc;

/// Values of one or two dimensions, rows without gaps; cloning shares the memory.
///
/// On a CUDA device they may not be there yet: whoever reads them on a stream calls
/// [`Array::make_ready_on`] first, and [`Array::to_host`] waits.
#[derive(Debug, Clone)]
pub struct Array {
    storage: Arc<Storage>,
    /// In bytes, from where the storage begins.
    offset: usize,
    shape: Vec<usize>,
    dtype: DType,
}

impl Array {
    pub(super) fn new(
        storage: Arc<Storage>,
        offset: usize,
        shape: Vec<usize>,
        dtype: DType,
    ) -> Self {
        Self { storage, offset, shape, dtype }
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of its values.
    pub fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Host(_) => Device::Cpu,
            Storage::Device(memory) => memory.device(),
        }
    }

    /// Address of the first value, on [`Self::device`]. Clones have the same, and so do all replays'
    /// arrays of a constant: what writes there has to know that nobody reads.
    pub fn as_ptr(&self) -> *mut u8 {
        let base = match &*self.storage {
            Storage::Host(buffer) => buffer.as_ptr(),
            Storage::Device(memory) => memory.as_ptr(),
        };
        base.wrapping_add(self.offset)
    }

    /// Waits until the values are there.
    pub fn synchronize(&self) -> Result<()> {
        match &*self.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device(memory) => memory.synchronize(),
        }
    }

    /// Makes `stream` wait until the values are there, and keeps their memory until what the
    /// stream does with them after this call is done. Nothing to do on the host.
    pub fn make_ready_on(&self, stream: cuda::RawStream) -> Result<()> {
        match &*self.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device(memory) => memory.make_ready_on(stream),
        }
    }

    /// The values in host memory: shared where they already are, else copied, after waiting.
    pub fn to_host(&self) -> Result<Self> {
        match &*self.storage {
            Storage::Host(_) => Ok(self.clone()),
            Storage::Device(_) => self.copied_to_host(),
        }
    }

    /// The values in host memory that is nobody else's, after waiting.
    pub fn copied_to_host(&self) -> Result<Self> {
        let bytes = self.num_bytes();
        let buffer = HostBuffer::new(bytes as u128)?;
        match &*self.storage {
            // SAFETY: the storage holds so many bytes from there, as `as_bytes` says, and the
            // buffer, which is new, has room for them.
            Storage::Host(_) => unsafe {
                std::ptr::copy_nonoverlapping(self.as_ptr(), buffer.as_ptr(), bytes);
            },
            Storage::Device(memory) => {
                let rows = (1, bytes, bytes);
                memory.copy_to_host(self.as_ptr() as u64, buffer.as_ptr(), rows)?;
            }
        }
        let storage = Arc::new(Storage::Host(buffer));
        Ok(Self { storage, offset: 0, ..self.clone() })
    }

    /// The values' bytes, where they are on the host.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch) where they are not.
    pub fn as_bytes(&self) -> Result<&[u8]> {
        if self.device() != Device::Cpu {
            return Err(crate::Error::DeviceMismatch {
                argument: "self",
                expected: "the host".to_owned(),
                got: self.device().to_string(),
            });
        }
        // SAFETY: the storage holds so many bytes from there, initialised, for as long as `self`,
        // and no function of this crate writes them. Who writes through `as_ptr` knows that this
        // slice is not in use, as is said there.
        Ok(unsafe { std::slice::from_raw_parts(self.as_ptr(), self.num_bytes()) })
    }
}
