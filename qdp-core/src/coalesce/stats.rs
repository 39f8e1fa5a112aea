//! What a coalescer has done.

#![forbid(unsafe_code)]

use std::time::Duration;

/// Why queued requests were encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlushReason {
    /// The end of the scope, or somebody asked.
    Demand,
    /// As many samples as may wait.
    Samples,
    /// As many bytes as may wait.
    Bytes,
    /// A request came that is not queued: it is large, or on a device.
    Order,
}

/// Buckets of the histogram: flushes of 1, 2 to 3, 4 to 7, ... samples.
pub const BUCKETS: usize = 32;

/// What a coalescer has done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CoalesceStats {
    /// Requests that were handed in.
    pub requests: u64,
    /// Their samples.
    pub samples: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that were encoded by themselves.
    pub passed_through: u64,
    /// Flushes by reason, in the order of [`FlushReason`].
    pub flushes: [u64; 4],
    /// Flushes by their samples: bucket `k` counts those of `2^k` to `2^(k+1) - 1`.
    pub flushed_samples: [u64; BUCKETS],
    /// How long the first request of each flush waited, in all.
    pub waited: Duration,
    /// How long the first request of a flush waited at most.
    pub longest_wait: Duration,
}

impl CoalesceStats {
    pub(super) fn flushed(&mut self, reason: FlushReason, samples: usize, waited: Duration) {
        self.flushes[reason as usize] += 1;
        let bucket = samples.max(1).ilog2() as usize;
        self.flushed_samples[bucket.min(BUCKETS - 1)] += 1;
        self.waited += waited;
        self.longest_wait = self.longest_wait.max(waited);
    }
}
