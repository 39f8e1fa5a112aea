//! Page-locked host memory: staging buffers, and words that host and device share.

use std::ops::Range;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cudarc::driver::sys::{self, CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUresult};

use super::driver::{Kind, Live, check, verify};
use super::gate::call;
use super::memory::check_range;
use super::{CaptureGuard, Context};
use crate::error::{Error, Result};

/// Page-locked memory of the driver's, zeroed when made.
#[derive(Debug)]
struct HostMemory {
    // Words, for their alignment: the memory starts on a page.
    start: NonNull<u64>,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: page-locked memory belongs to the process, not to a thread, and the driver frees it
// from any thread.
unsafe impl Send for HostMemory {}
// SAFETY: a shared `HostMemory` gives out its address and length only. Whoever reads or writes
// behind the address does so atomically (`MappedBuffer`) or by an `unsafe` call's contract
// (`PinnedBuffer`).
unsafe impl Sync for HostMemory {}

impl HostMemory {
    fn new(context: &Arc<Context>, bytes: usize, flags: u32) -> Result<Self> {
        let mut start = NonNull::dangling();
        if bytes > 0 {
            let _bound = context.bind()?;
            let _capture = CaptureGuard::relaxed();
            let mut raw = ptr::null_mut();
            // SAFETY: the context is current, and the driver writes one pointer.
            let result = call("cuMemHostAlloc", || unsafe {
                sys::cuMemHostAlloc(&raw mut raw, bytes, flags)
            });
            if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(out_of_memory(bytes));
            }
            verify("cuMemHostAlloc", result)?;
            start = NonNull::new(raw.cast()).ok_or_else(|| out_of_memory(bytes))?;
            // The driver reuses host memory as it is; slices need initialised bytes.
            // SAFETY: the allocation is `bytes` long, and nobody else knows of it yet.
            unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        }
        Ok(Self { start, bytes, context: Arc::clone(context) })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `new`, freed only here. That no copy is in flight is the
            // contract of the calls that enqueue one.
            self.context.in_drop("cuMemFreeHost", || unsafe {
                sys::cuMemFreeHost(self.start.as_ptr().cast())
            });
        }
    }
}

#[cold]
pub(super) fn out_of_memory(bytes: usize) -> Error {
    let (free, total) = host_memory();
    Error::OutOfMemory {
        device: "the host (page-locked memory)".to_owned(),
        needed: bytes as u64,
        free,
        total,
        hint: "use fewer or smaller staging buffers",
    }
}

/// Bytes of host memory available, and in all; zeros where the system does not say.
fn host_memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    };
    (bytes("MemAvailable:").unwrap_or(0), bytes("MemTotal:").unwrap_or(0))
}

/// Page-locked host memory, the source and target of asynchronous copies. Cached as all memory
/// is (not write-combined), so the host may read it at full speed.
#[must_use = "dropping the buffer frees its memory"]
#[derive(Debug)]
pub struct PinnedBuffer {
    memory: HostMemory,
    _live: Live,
}

impl PinnedBuffer {
    /// Allocates zeroed memory, page-locked for every context. Zero bytes are allowed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let memory = HostMemory::new(context, bytes, CU_MEMHOSTALLOC_PORTABLE)?;
        Ok(Self { memory, _live: Live::new(Kind::PinnedBuffer) })
    }

    /// The start of the memory. Aligned for every element type.
    pub fn as_ptr(&self) -> *mut u8 {
        self.memory.start.as_ptr().cast()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.memory.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.memory.bytes == 0
    }

    /// The start of `range`, once it is known to lie in the buffer.
    pub(super) fn as_ptr_range(&self, range: &Range<usize>) -> Result<*mut u8> {
        check_range(range.start, range.len(), self.len())?;
        // SAFETY: the range lies in the allocation. (An inverted one is empty, and its start is
        // checked all the same.)
        Ok(unsafe { self.as_ptr().add(range.start) })
    }

    /// A range of the memory, to be read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end.
    ///
    /// # Safety
    /// While the slice is there, nobody may write the range: no copy to it may be in flight, and
    /// no [`PinnedBuffer::slice_mut`] may overlap.
    pub unsafe fn slice(&self, range: Range<usize>) -> Result<&[u8]> {
        let start = self.as_ptr_range(&range)?;
        // SAFETY: the range lies in the allocation, which is initialised and lives as long as
        // `self`; that nobody writes it is the caller's promise.
        Ok(unsafe { slice::from_raw_parts(start, range.len()) })
    }

    /// A range of the memory, to be written. Threads may fill separate ranges at once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a range beyond the end.
    ///
    /// # Safety
    /// While the slice is there, nobody else may read or write the range: no copy from it or to
    /// it may be in flight, and no other slice may overlap.
    #[allow(clippy::mut_from_ref, reason = "exclusive use of the range is the caller's promise")]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> Result<&mut [u8]> {
        let start = self.as_ptr_range(&range)?;
        // SAFETY: the range lies in the allocation, which is initialised and lives as long as
        // `self`; that nobody else uses it is the caller's promise.
        Ok(unsafe { slice::from_raw_parts_mut(start, range.len()) })
    }
}

/// Page-locked host memory that kernels can write, as 32-bit and 64-bit words: the flag with
/// which the device reports bad input. The host sees what a kernel wrote (and made visible with
/// `__threadfence_system`) without a copy and without waiting for the stream.
///
/// Loads acquire and stores release. Read-modify-write of a word from both sides is not atomic
/// across the bus, so there is none here: let one side write a word at a time.
#[must_use = "dropping the buffer frees its memory"]
#[derive(Debug)]
pub struct MappedBuffer {
    memory: HostMemory,
    device_ptr: u64,
    _live: Live,
}

impl MappedBuffer {
    /// Allocates zeroed memory, rounded up to whole 64-bit words, at least one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(size_of::<u64>());
        let bytes = bytes.ok_or_else(|| out_of_memory(usize::MAX))?;
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        let memory = HostMemory::new(context, bytes, flags)?;
        let _bound = context.bind()?;
        let mut device_ptr = 0;
        // SAFETY: the memory was allocated for mapping, the context is current, and the driver
        // writes one address.
        check("cuMemHostGetDevicePointer", || unsafe {
            sys::cuMemHostGetDevicePointer_v2(&raw mut device_ptr, memory.start.as_ptr().cast(), 0)
        })?;
        Ok(Self { memory, device_ptr, _live: Live::new(Kind::MappedBuffer) })
    }

    /// The address under which kernels know the memory. It is valid while `self` is; kernels
    /// that were given it must be done before the buffer is dropped.
    pub fn device_ptr(&self) -> u64 {
        self.device_ptr
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }

    /// Reads the 32-bit word with this index.
    ///
    /// # Panics
    /// Where the index is beyond the end.
    pub fn load_u32(&self, index: usize) -> u32 {
        self.word32(index).load(Ordering::Acquire)
    }

    /// Writes the 32-bit word with this index.
    ///
    /// # Panics
    /// Where the index is beyond the end.
    pub fn store_u32(&self, index: usize, value: u32) {
        self.word32(index).store(value, Ordering::Release);
    }

    /// Reads the 64-bit word with this index.
    ///
    /// # Panics
    /// Where the index is beyond the end.
    pub fn load_u64(&self, index: usize) -> u64 {
        self.word64(index).load(Ordering::Acquire)
    }

    /// Writes the 64-bit word with this index.
    ///
    /// # Panics
    /// Where the index is beyond the end.
    pub fn store_u64(&self, index: usize, value: u64) {
        self.word64(index).store(value, Ordering::Release);
    }

    fn word32(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.bytes() / size_of::<u32>(), "word {index} is beyond the buffer");
        // SAFETY: in bounds as just checked, aligned as page-locked memory starts on a page, and
        // initialised. The host uses it by atomics only; the device's aligned word stores are
        // single-copy atomic to the host, so no load ever sees half a word.
        unsafe { AtomicU32::from_ptr(self.memory.start.as_ptr().cast::<u32>().add(index)) }
    }

    fn word64(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.bytes() / size_of::<u64>(), "word {index} is beyond the buffer");
        // SAFETY: as in `word32`.
        unsafe { AtomicU64::from_ptr(self.memory.start.as_ptr().add(index)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn host_out_of_memory_names_this_machines_memory() {
        let Error::OutOfMemory { needed, free, total, .. } = out_of_memory(4096) else {
            panic!("another error");
        };
        assert_eq!(needed, 4096);
        assert!(total > 0 && free <= total);
    }
}
