//! What the processor's caches are told about memory that is read once or handed to the copy engine.

/// A line of every processor's caches that these are for.
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

/// What a processor writes to memory at a time.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line(pub(super) [u32; LINE / 4]);

impl Line {
    /// Writes past the caches, to memory: the copy engine reads that faster than what is newest in
    /// some core's cache. [`fence`] comes between this and the copy engine.
    // Into functions of several versions, or their values go through memory.
    #[allow(clippy::inline_always)]
    #[inline(always)]
    pub(super) fn stream(&mut self, line: Self) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
            let from = (&raw const line).cast::<__m128i>();
            let to = (&raw mut *self).cast::<__m128i>();
            for i in 0..LINE / size_of::<__m128i>() {
                // SAFETY: both are lines, of so many vectors and aligned to more than one.
                unsafe { _mm_stream_si128(to.add(i), _mm_loadu_si128(from.add(i))) };
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        {
            *self = line;
        }
    }
}

/// The whole lines of some memory, and what is before and behind them.
pub(super) fn lines(target: &mut [u8]) -> (&mut [u8], &mut [Line], &mut [u8]) {
    // SAFETY: every pattern of bits is an integer.
    unsafe { target.align_to_mut() }
}

/// Copies with [`Line::stream`].
///
/// # Panics
///
/// Where the lengths differ.
pub(super) fn stream(source: &[u8], target: &mut [u8]) {
    assert_eq!(source.len(), target.len());
    let (head, lines, tail) = lines(target);
    let (first, source) = source.split_at(head.len());
    head.copy_from_slice(first);
    let sources = source.chunks_exact(LINE);
    tail.copy_from_slice(sources.remainder());
    for (line, source) in lines.iter_mut().zip(sources) {
        // SAFETY: a line's bytes, of which every pattern is integers.
        line.stream(unsafe { source.as_ptr().cast::<Line>().read_unaligned() });
    }
}

/// Whatever was streamed is in memory before anything that this thread does next.
#[inline]
pub(super) fn fence() {
    // SAFETY: part of every x86-64 processor; it orders writes.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
