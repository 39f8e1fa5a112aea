//! Host memory for states.

use crate::error::{Error, Result};
use std::alloc::Layout;
use std::fmt;
use std::ptr::NonNull;

/// Above this size memory comes straight from the operating system, in huge pages where it has
/// them: touching fresh 4 KiB pages costs more than computing what is written there.
const MAP_BYTES: usize = 4 << 20;
/// Above this size free memory is looked at first: an overcommitting system would grant anything
/// and end the process later.
const CHECK_BYTES: usize = 256 << 20;
const ALIGN: usize = 64;

/// A zeroed block of host memory, or memory that somebody else owns.
pub(crate) struct HostBuffer {
    ptr: NonNull<u8>,
    bytes: usize,
    owner: Owner,
}

enum Owner {
    Allocator,
    Mapping,
    /// Kept alive as long as this buffer.
    External(#[allow(dead_code)] Box<dyn Send + Sync>),
}

// SAFETY: the buffer owns its memory, or shares it with an owner that is itself Send and Sync.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; the memory is only written through `&mut` or before it is shared.
unsafe impl Sync for HostBuffer {}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl HostBuffer {
    /// `bytes` of zeroed memory, aligned to a cache line.
    pub(crate) fn zeroed(bytes: u128) -> Result<Self> {
        let Ok(bytes) = usize::try_from(bytes) else {
            return Err(out_of_memory(u64::MAX));
        };
        let too_large = bytes > CHECK_BYTES
            && system_memory().1.is_some_and(|available| bytes as u64 > available);
        if bytes > isize::MAX as usize || too_large {
            return Err(out_of_memory(bytes as u64));
        }
        if bytes >= MAP_BYTES {
            return Self::mapped(bytes);
        }
        let layout = Self::layout(bytes)?;
        // SAFETY: the layout's size is at least ALIGN, so not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr).ok_or_else(|| out_of_memory(bytes as u64))?;
        Ok(Self { ptr, bytes, owner: Owner::Allocator })
    }

    /// Memory of `owner`, which keeps it valid.
    ///
    /// # Safety
    ///
    /// `bytes` from `ptr` must stay readable, and written to by nobody in an unordered way, until
    /// `owner` is dropped.
    pub(crate) unsafe fn external(
        ptr: NonNull<u8>,
        bytes: usize,
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        Self { ptr, bytes, owner: Owner::External(owner) }
    }

    fn layout(bytes: usize) -> Result<Layout> {
        Layout::from_size_align(bytes.max(ALIGN), ALIGN).map_err(|_| out_of_memory(bytes as u64))
    }

    fn mapped(bytes: usize) -> Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the system's choice touches
        // nothing that exists.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(out_of_memory(bytes as u64));
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping made above. The advice may be refused; it is no error.
        unsafe {
            libc::madvise(ptr, bytes, libc::MADV_HUGEPAGE);
        }
        let ptr = NonNull::new(ptr.cast()).ok_or_else(|| out_of_memory(bytes as u64))?;
        Ok(Self { ptr, bytes, owner: Owner::Mapping })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        match self.owner {
            Owner::Allocator => {
                if let Ok(layout) = Self::layout(self.bytes) {
                    // SAFETY: allocated in `zeroed` with this very layout.
                    unsafe { std::alloc::dealloc(self.ptr.as_ptr(), layout) };
                }
            }
            Owner::Mapping => {
                // SAFETY: mapped in `mapped` with this size, and nothing borrows it any more.
                unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.bytes) };
            }
            Owner::External(_) => {}
        }
    }
}

/// (total, available) memory of the machine in bytes; available is `None` where it is unknown.
pub(crate) fn system_memory() -> (u64, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    (field("MemTotal:").unwrap_or(0), field("MemAvailable:"))
}

fn out_of_memory(needed: u64) -> Error {
    let (total, available) = system_memory();
    Error::OutOfMemory {
        device: "cpu".to_owned(),
        needed,
        free: available.unwrap_or(0),
        total,
        hint: "lower num_qubits or the batch size, or use precision=\"complex64\"",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_every_size_are_zeroed_and_aligned() {
        for bytes in [0, 1, 4096, MAP_BYTES - 1, MAP_BYTES, MAP_BYTES + 1] {
            let buffer = HostBuffer::zeroed(bytes as u128).unwrap();
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            // SAFETY: the buffer holds `bytes` initialised bytes.
            let slice = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), bytes) };
            assert!(slice.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn what_cannot_fit_is_refused_before_it_is_tried() {
        for needed in [1u128 << 54, 1 << 70] {
            let error = HostBuffer::zeroed(needed).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { total, .. } if total > 0), "{error}");
        }
    }
}
