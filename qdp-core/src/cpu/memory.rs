//! Host memory for states.

use crate::error::{Error, Result};
use parking_lot::{Mutex, MutexGuard};
use std::alloc::Layout;
use std::fmt;
use std::ptr::NonNull;
use std::sync::OnceLock;

/// Above this size memory comes straight from the operating system, in huge pages where it has
/// them: touching fresh 4 KiB pages costs more than computing what is written there.
const MAP_BYTES: usize = 4 << 20;
/// Above this size free memory is looked at first: an overcommitting system would grant anything
/// and end the process later.
const CHECK_BYTES: usize = 256 << 20;
const ALIGN: usize = 64;

/// Freed blocks from this size on are kept for the next call, up to [`cache_limit`] in all: a
/// result is written once, so asking the system for fresh pages every time would cost more than
/// writing.
const CACHE_FROM: usize = 64 << 10;

/// Host memory for states, or memory that somebody else owns. Initialised, to anything.
pub(crate) struct HostBuffer {
    ptr: NonNull<u8>,
    owner: Owner,
}

enum Owner {
    Block(Block),
    /// Kept alive as long as this buffer.
    External(#[allow(dead_code)] Box<dyn Send + Sync>),
}

// SAFETY: the buffer owns its memory, or shares it with an owner that is itself Send and Sync.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; the memory is only written through `&mut` or before it is shared.
unsafe impl Sync for HostBuffer {}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostBuffer").field("ptr", &self.ptr).finish_non_exhaustive()
    }
}

impl HostBuffer {
    /// `bytes` of memory, aligned to a cache line. What is in it is unspecified.
    pub(crate) fn new(bytes: u128) -> Result<Self> {
        let bytes = usize::try_from(bytes)
            .ok()
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| out_of_memory(u64::try_from(bytes).unwrap_or(u64::MAX)))?;
        let bytes = size_class(bytes);
        let kept = if bytes >= CACHE_FROM { cache().and_then(|mut c| c.take(bytes)) } else { None };
        let block = match kept {
            Some(block) => block,
            None => Block::new(bytes)?,
        };
        Ok(Self { ptr: block.ptr, owner: Owner::Block(block) })
    }

    /// Memory of `owner`, which keeps it valid.
    ///
    /// # Safety
    ///
    /// The memory at `ptr` must stay readable, and written to by nobody in an unordered way, until
    /// `owner` is dropped.
    pub(crate) unsafe fn external(ptr: NonNull<u8>, owner: Box<dyn Send + Sync>) -> Self {
        Self { ptr, owner: Owner::External(owner) }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        let nothing = Owner::External(Box::new(()));
        if let Owner::Block(block) = std::mem::replace(&mut self.owner, nothing)
            && block.bytes >= CACHE_FROM
        {
            let limit = cache_limit();
            let evicted = match cache() {
                Some(mut cache) => cache.put(block, limit),
                None => vec![block],
            };
            drop(evicted); // not under the lock: giving memory back takes a while
        }
    }
}

/// Sizes are rounded up by at most an eighth, so that calls of about one size share blocks.
fn size_class(bytes: usize) -> usize {
    if bytes < CACHE_FROM {
        return bytes.max(ALIGN);
    }
    let step = (bytes.next_power_of_two() >> 3).min(8 << 20);
    bytes.next_multiple_of(step)
}

/// Memory of our own, from the allocator or, in large pages, straight from the system.
struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a block owns its memory and nobody else knows it.
unsafe impl Send for Block {}

impl Block {
    /// Zeroed memory.
    fn new(bytes: usize) -> Result<Self> {
        let no_room = || out_of_memory(bytes as u64);
        let fits = || system_memory().1.is_none_or(|available| bytes as u64 <= available);
        if bytes > CHECK_BYTES && !fits() {
            // What is kept for other sizes is free, too.
            let kept = cache().map(|mut cache| cache.shrink(0));
            drop(kept);
            if !fits() {
                return Err(no_room());
            }
        }
        if bytes >= MAP_BYTES {
            return Self::mapped(bytes).ok_or_else(no_room);
        }
        let layout = Self::layout(bytes).ok_or_else(no_room)?;
        // SAFETY: the layout's size is at least ALIGN, so not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        Ok(Self { ptr: NonNull::new(ptr).ok_or_else(no_room)?, bytes })
    }

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes, ALIGN).ok()
    }

    fn mapped(bytes: usize) -> Option<Self> {
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
            return None;
        }
        #[cfg(all(target_os = "linux", not(miri)))]
        // SAFETY: the range is the mapping made above. The advice may be refused; it is no error.
        unsafe {
            libc::madvise(ptr, bytes, libc::MADV_HUGEPAGE);
        }
        NonNull::new(ptr.cast()).map(|ptr| Self { ptr, bytes })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.bytes >= MAP_BYTES {
            // SAFETY: mapped in `mapped` with this size, and nothing borrows it any more.
            unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.bytes) };
        } else if let Some(layout) = Self::layout(self.bytes) {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { std::alloc::dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

/// A sixteenth of the machine's memory, and no more than a gibibyte.
fn cache_limit() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| ((system_memory().0 / 16) as usize).min(1 << 30))
}

/// Freed blocks, oldest first.
struct Cache {
    blocks: Vec<Block>,
    bytes: usize,
}

static CACHE: Mutex<Cache> = Mutex::new(Cache { blocks: Vec::new(), bytes: 0 });

impl Cache {
    fn take(&mut self, bytes: usize) -> Option<Block> {
        // The newest of that size: its pages are the likeliest to be in a processor's cache.
        let index = self.blocks.iter().rposition(|block| block.bytes == bytes)?;
        self.bytes -= bytes;
        Some(self.blocks.remove(index))
    }

    /// Keeps a block; returns those that there is no room for any more.
    fn put(&mut self, block: Block, limit: usize) -> Vec<Block> {
        self.bytes += block.bytes;
        self.blocks.push(block);
        self.shrink(limit)
    }

    /// Takes the oldest blocks out, until what is left is within the limit.
    fn shrink(&mut self, limit: usize) -> Vec<Block> {
        let mut evicted = Vec::new();
        while self.bytes > limit {
            let oldest = self.blocks.remove(0);
            self.bytes -= oldest.bytes;
            evicted.push(oldest);
        }
        evicted
    }
}

/// The cache, if nobody else has it. Nobody waits for it: a process may have been forked while a
/// thread that it does not have held it.
fn cache() -> Option<MutexGuard<'static, Cache>> {
    CACHE.try_lock()
}

/// Bytes of freed blocks that are kept.
pub(crate) fn cached_bytes() -> usize {
    cache().map_or(0, |cache| cache.bytes)
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
    fn blocks_of_every_size_are_aligned_and_writable() {
        for bytes in [0, 1, 4096, CACHE_FROM, MAP_BYTES - 1, MAP_BYTES, MAP_BYTES + 1] {
            for _ in 0..2 {
                let buffer = HostBuffer::new(bytes as u128).unwrap();
                assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
                // SAFETY: the buffer holds `bytes` initialised bytes and is not shared.
                let slice = unsafe { std::slice::from_raw_parts_mut(buffer.as_ptr(), bytes) };
                slice.fill(7);
                assert!(slice.iter().all(|&byte| byte == 7));
            }
        }
    }

    #[test]
    fn size_classes_waste_little() {
        for bytes in [0, 1, CACHE_FROM - 1, CACHE_FROM, CACHE_FROM + 1, 5 << 20, (1 << 30) + 1] {
            let class = size_class(bytes);
            assert!(class >= bytes && class <= bytes + bytes / 4 + ALIGN, "{bytes}: {class}");
        }
    }

    #[test]
    fn the_cache_is_bounded() {
        let mut cache = Cache { blocks: Vec::new(), bytes: 0 };
        let block = || Block::new(CACHE_FROM).unwrap();
        let limit = 2 * CACHE_FROM;
        assert!(cache.put(block(), limit).is_empty());
        assert!(cache.put(block(), limit).is_empty());
        assert_eq!(cache.put(block(), limit).len(), 1);
        assert!(cache.take(CACHE_FROM).is_some());
        assert!(cache.take(1).is_none());
        assert_eq!(cache.bytes, CACHE_FROM);
    }

    #[test]
    fn what_cannot_fit_is_refused_before_it_is_tried() {
        for needed in [1u128 << 54, 1 << 70] {
            let error = HostBuffer::new(needed).unwrap_err();
            assert!(matches!(error, Error::OutOfMemory { total, .. } if total > 0), "{error}");
        }
    }
}
