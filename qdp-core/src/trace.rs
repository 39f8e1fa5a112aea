//! Ranges on a profiler's timeline (NVTX), such as Nsight Systems shows.

use std::marker::PhantomData;
use std::sync::LazyLock;

/// Whether a tool listens. NVTX looks for one at the first call of the process, and never again; a
/// range that nobody listens to has a negative level.
static ATTACHED: LazyLock<bool> = LazyLock::new(|| {
    let level = nvtx::range_push!("qdp");
    nvtx::range_pop!();
    level >= 0
});

/// A range of this thread's that ends when it is dropped.
#[must_use = "the range ends as soon as this is dropped"]
#[derive(Debug)]
pub(crate) struct Range {
    open: bool,
    // Ranges nest per thread, so one has to end where it began.
    thread_bound: PhantomData<*const ()>,
}

/// Begins a range. Where no tool listens this is one load.
#[inline]
pub(crate) fn range(name: &'static str) -> Range {
    let open = *ATTACHED;
    if open {
        begin(name);
    }
    Range { open, thread_bound: PhantomData }
}

#[cold]
fn begin(name: &'static str) {
    nvtx::range_push!("{name}");
}

impl Drop for Range {
    #[inline]
    fn drop(&mut self) {
        if self.open {
            nvtx::range_pop!();
        }
    }
}
