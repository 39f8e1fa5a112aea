//! Counters of an engine's pipeline.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What an engine's pipeline has done so far.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct PipelineStats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl PipelineStats {
            /// Names and values.
            pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }

        /// The counters behind [`PipelineStats`].
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            /// All of them now.
            pub(crate) fn snapshot(&self) -> PipelineStats {
                PipelineStats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Calls with host input.
    calls,
    /// Of these, calls that took the direct path.
    direct_calls,
    /// Rounds.
    rounds,
    /// Chunks.
    chunks,
    /// Bytes of input that threads copied to page-locked memory.
    staged_bytes,
    /// Bytes that were copied to the device.
    copied_bytes,
    /// How often the host waited for a slot.
    host_waits,
    /// How long, in nanoseconds.
    host_wait_ns,
    /// Slots not known to be free when a chunk took one, with its own, summed over all chunks:
    /// divided by `chunks`, the mean. The host looks at a slot only when it needs it.
    occupied_slots,
    /// The most of them.
    max_occupied_slots,
    /// Time in which at least one copy was under way, in nanoseconds; measured only with `timing`.
    copy_ns,
    /// Time in which at least one kernel was under way, likewise.
    compute_ns,
    /// Time in which both were, likewise.
    overlap_ns,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: usize) {
        counter.fetch_add(amount as u64, Ordering::Relaxed);
    }

    pub(crate) fn waited(&self, time: Duration) {
        Self::add(&self.host_waits, 1);
        Self::add(&self.host_wait_ns, time.as_nanos() as usize);
    }

    pub(crate) fn occupied(&self, slots: usize) {
        Self::add(&self.occupied_slots, slots);
        self.max_occupied_slots.fetch_max(slots as u64, Ordering::Relaxed);
    }
}
