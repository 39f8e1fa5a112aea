//! Hints to the processor's caches, for memory that is read once or handed to the copy engine.

/// A line of every processor's caches that these hints are for.
const LINE: usize = 64;

/// Begins to bring `values` to the cache. The processor's own prefetching stops at the end of each
/// memory page.
#[inline]
pub(super) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = values.as_ptr().cast::<i8>();
        for offset in (0..size_of_val(values)).step_by(LINE) {
            // SAFETY: a hint, which reads nothing and faults nowhere.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(offset)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, LINE);
}

/// Moves written memory from this core's caches to the shared one, where the copy engine, and the
/// core that writes it next, find it sooner than in another core's cache.
#[inline]
pub(super) fn demote(written: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..written.len()).step_by(LINE) {
        let line = written.as_ptr().wrapping_add(offset);
        // SAFETY: a hint that changes no memory; processors that do not know it do nothing.
        unsafe {
            std::arch::asm!("cldemote [{}]", in(reg) line, options(nostack, preserves_flags));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = written;
}
