//! Threads for host work: rayon's, with the caller as one of them.
//!
//! A caller outside the pool would hand everything over and sleep, which costs more than many a
//! call takes. Here it works along, so a worker that wakes late finds less to do.
//!
//! A process forked from one that has a pool has the pool but not its threads (torch's data loader
//! makes such processes). It works alone, as waiting for threads that are not there never ends.

use crate::config::Config;
use parking_lot::Mutex;
use std::sync::OnceLock;

/// A pool that is made when there is first enough to do.
pub(crate) struct Pool {
    /// With the process that the threads belong to.
    threads: OnceLock<Option<(rayon::ThreadPool, u32)>>,
    count: fn() -> usize,
}

/// For the states of the CPU backend.
pub(crate) static ENCODE: Pool =
    Pool { threads: OnceLock::new(), count: || Config::get().num_threads };

/// For copying host input on its way to a device. Copies saturate the memory before they run out
/// of cores; with as many threads as cores they slow each other down.
pub(crate) static STAGE: Pool =
    Pool { threads: OnceLock::new(), count: || (Config::get().num_threads * 3 / 4).clamp(1, 12) };

impl Pool {
    /// Runs `body` on every item, in any order; with `parallel` on all threads.
    pub(crate) fn for_each<I>(&self, parallel: bool, items: I, body: impl Fn(I::Item) + Sync)
    where
        I: Iterator + Send,
    {
        if !parallel {
            return items.for_each(body);
        }
        let helpers = items.size_hint().1.unwrap_or(usize::MAX).saturating_sub(1);
        let items = Mutex::new(items);
        let work = || {
            loop {
                let item = items.lock().next();
                match item {
                    Some(item) => body(item),
                    None => break,
                }
            }
        };
        self.lead(helpers, work, work);
    }

    /// Runs `help` on the other threads, as many as there are up to `most`, while `lead` runs here;
    /// returns when all are done.
    pub(crate) fn lead<T>(
        &self,
        most: usize,
        help: impl Fn() + Sync,
        lead: impl FnOnce() -> T,
    ) -> T {
        let Some(threads) = (most > 0).then(|| self.threads()).flatten() else { return lead() };
        threads.in_place_scope(|scope| {
            for _ in 0..threads.current_num_threads().min(most) {
                scope.spawn(|_| help());
            }
            lead()
        })
    }

    /// The threads beside the caller; `None` where there are none.
    fn threads(&self) -> Option<&rayon::ThreadPool> {
        let make = || {
            let beside = (self.count)() - 1;
            if beside == 0 {
                return None;
            }
            rayon::ThreadPoolBuilder::new()
                .num_threads(beside)
                .thread_name(|index| format!("qdp-{index}"))
                .build()
                .map_err(|error| tracing::warn!("no thread pool, running on one thread: {error}"))
                .ok()
                .map(|threads| (threads, std::process::id()))
        };
        let (threads, process) = self.threads.get_or_init(make).as_ref()?;
        (*process == std::process::id()).then_some(threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_item_is_seen_once() {
        for count in [0, 1, 2, 1000] {
            for parallel in [false, true] {
                let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                ENCODE.for_each(parallel, seen.iter(), |item| {
                    item.fetch_add(1, Ordering::Relaxed);
                });
                assert!(seen.iter().all(|item| item.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
