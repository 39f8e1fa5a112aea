//! What a batcher has done.

use std::time::Duration;

/// Classes of batch sizes: 1, 2 to 3, 4 to 7, and so on.
pub const SIZE_CLASSES: usize = 32;

/// Why a batch was started when it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Nothing was in flight.
    Idle,
    /// The batch before it was over.
    Next,
    /// Its oldest request had waited for the longest delay.
    Delay,
    /// There was no room for another request.
    Full,
    /// The batcher was closed.
    Close,
}

/// What a batcher has done since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatcherStats {
    /// Requests that were encoded, alone or in a batch. One that was alone counts whatever came of
    /// it.
    pub requests: u64,
    /// Calls of the engine for them.
    pub batches: u64,
    /// By the logarithm of their samples, rounded down, how many batches there were.
    pub batch_sizes: [u64; SIZE_CLASSES],
    /// Nanoseconds from the arrival of a request until its batch was started, over all requests.
    pub queue_wait_ns: u64,
    /// The longest that a request has waited for its batch to start.
    pub max_queue_wait_ns: u64,
    /// Batches that were started because nothing was in flight.
    pub started_idle: u64,
    /// Batches that were started because the one before was over.
    pub started_next: u64,
    /// Batches that were started because their oldest request had waited for the longest delay.
    pub started_delay: u64,
    /// Batches that were started because they were full.
    pub started_full: u64,
    /// Batches that were started because the batcher was closed.
    pub started_close: u64,
    /// Requests that went straight to the engine: too large for a batch, or on a device.
    pub direct: u64,
    /// Requests that were refused because the queue was full.
    pub refused: u64,
    /// Requests whose deadline passed before they were started.
    pub expired: u64,
    /// Requests that were cancelled before they were started.
    pub cancelled: u64,
    /// Requests that failed by themselves: their values name no state.
    pub invalid: u64,
}

impl BatcherStats {
    /// A batch starts, whose oldest request has waited for `oldest` and all of them for `wait`.
    pub(crate) fn start(
        &mut self,
        (requests, rows): (usize, usize),
        reason: Reason,
        oldest: Duration,
        wait: Duration,
    ) {
        self.requests += requests as u64;
        self.batches += 1;
        let class = rows.max(1).ilog2() as usize;
        self.batch_sizes[class.min(SIZE_CLASSES - 1)] += 1;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.queue_wait_ns = self.queue_wait_ns.saturating_add(nanos(wait));
        self.max_queue_wait_ns = self.max_queue_wait_ns.max(nanos(oldest));
        *match reason {
            Reason::Idle => &mut self.started_idle,
            Reason::Next => &mut self.started_next,
            Reason::Delay => &mut self.started_delay,
            Reason::Full => &mut self.started_full,
            Reason::Close => &mut self.started_close,
        } += 1;
    }

    /// The numbers by name, but for the batch sizes.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("requests", self.requests),
            ("batches", self.batches),
            ("queue_wait_ns", self.queue_wait_ns),
            ("max_queue_wait_ns", self.max_queue_wait_ns),
            ("started_idle", self.started_idle),
            ("started_next", self.started_next),
            ("started_delay", self.started_delay),
            ("started_full", self.started_full),
            ("started_close", self.started_close),
            ("direct", self.direct),
            ("refused", self.refused),
            ("expired", self.expired),
            ("cancelled", self.cancelled),
            ("invalid", self.invalid),
        ]
        .into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_counted_by_their_logarithm() {
        let mut stats = BatcherStats::default();
        for rows in [1, 2, 3, 4, 1023, usize::MAX] {
            let wait = Duration::from_nanos(rows.min(7) as u64);
            stats.start((1, rows), Reason::Idle, wait, 2 * wait);
        }
        assert_eq!(stats.batch_sizes[..3], [1, 2, 1]);
        assert_eq!((stats.batch_sizes[9], stats.batch_sizes[SIZE_CLASSES - 1]), (1, 1));
        assert_eq!((stats.batches, stats.requests, stats.started_idle), (6, 6, 6));
        assert_eq!(
            (stats.max_queue_wait_ns, stats.queue_wait_ns),
            (7, 2 * (1 + 2 + 3 + 4 + 7 + 7))
        );
    }
}
