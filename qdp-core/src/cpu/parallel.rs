//! Threads for host work, with the caller as one of them.
//!
//! A sleeping thread takes longer to wake than many a call takes. So nobody waits for one: the
//! caller announces its work and begins; a thread that comes joins in, and one that comes when the
//! caller is done is not waited for. Threads that ran out of work look out for more for a moment
//! before they sleep, so one call after another finds them awake.
//!
//! A process forked from one that has a pool has the pool but not its threads (torch's data loader
//! makes such processes). It works alone, as waiting for threads that are not there never ends.

use crate::config::Config;
use parking_lot::{Condvar, Mutex};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// A pool that is made when there is first enough to do.
pub(crate) struct Pool {
    /// With the process that the threads belong to.
    threads: OnceLock<(Arc<Threads>, u32)>,
    count: fn() -> usize,
    /// How long a thread looks out for work before it sleeps.
    patience: Duration,
}

/// For the states of the CPU backend.
pub(crate) static ENCODE: Pool = Pool {
    threads: OnceLock::new(),
    count: || Config::get().num_threads,
    patience: Duration::from_micros(100),
};

/// For copying host input on its way to a device.
pub(crate) static STAGE: Pool = Pool {
    threads: OnceLock::new(),
    count: || Config::get().pipeline.staging_threads,
    patience: Duration::from_millis(1),
};

impl Pool {
    /// Runs `body` on every item, in any order; with `parallel` on all threads.
    ///
    /// The caller takes items from the front and the others from the back, so that of one call
    /// after another on the same memory each finds its part in its cache.
    pub(crate) fn for_each<I>(&self, parallel: bool, items: I, body: impl Fn(I::Item) + Sync)
    where
        I: DoubleEndedIterator + ExactSizeIterator + Send,
    {
        if !parallel || items.len() <= 1 {
            return items.for_each(body);
        }
        let helpers = items.len() - 1;
        let items = Mutex::new(items);
        let help = || {
            while let Some(item) = { items.lock().next_back() } {
                body(item);
            }
        };
        let lead = || {
            while let Some(item) = { items.lock().next() } {
                body(item);
            }
        };
        self.lead(helpers, help, lead);
    }

    /// Runs `lead` here, and `help` on those of the other threads, up to `most`, that come before
    /// `lead` is done; returns when all are done.
    ///
    /// Panics where one of them does.
    pub(crate) fn lead<T>(
        &self,
        most: usize,
        help: impl Fn() + Sync,
        lead: impl FnOnce() -> T,
    ) -> T {
        match (most > 0).then(|| self.threads()).flatten() {
            Some(threads) => threads.lead(most, &help, lead),
            None => lead(),
        }
    }

    /// The threads beside the caller; `None` where there are none.
    fn threads(&self) -> Option<&Arc<Threads>> {
        let make = || (Threads::spawn((self.count)() - 1, self.patience), std::process::id());
        let (threads, process) = self.threads.get_or_init(make);
        (threads.count > 0 && *process == std::process::id()).then_some(threads)
    }
}

struct Threads {
    count: usize,
    patience: Duration,
    queue: Mutex<Queue>,
    /// Places in the queue's jobs: what an awake thread looks at.
    places: AtomicUsize,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Jobs with the number of threads that may still join.
    open: VecDeque<(Arc<Job>, usize)>,
    asleep: usize,
}

/// What a caller shares with the threads that help it.
struct Job {
    /// Borrowed from the caller, who does not return before `inside` is zero and nobody can join.
    help: *const (dyn Fn() + Sync),
    inside: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `help` is Sync, and is only called while the caller keeps it alive.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Threads {
    fn spawn(count: usize, patience: Duration) -> Arc<Self> {
        let mut threads = Self {
            count: 0,
            patience,
            queue: Mutex::default(),
            places: AtomicUsize::new(0),
            changed: Condvar::new(),
        };
        threads.count = count;
        let threads = Arc::new(threads);
        for index in 0..count {
            let own = Arc::clone(&threads);
            let work = move || {
                loop {
                    own.next_job().help();
                }
            };
            let spawned = std::thread::Builder::new().name(format!("qdp-{index}")).spawn(work);
            if let Err(error) = spawned {
                tracing::warn!("{index} instead of {count} threads: {error}");
                break;
            }
        }
        threads
    }

    fn lead<T>(&self, most: usize, help: &(dyn Fn() + Sync), lead: impl FnOnce() -> T) -> T {
        // SAFETY: only the lifetime changes. `Leading` is dropped before `help` goes out of scope,
        // and when it is, nobody calls `help` any more.
        let help: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(help) };
        let job = Arc::new(Job {
            help,
            inside: AtomicUsize::new(0),
            caller: std::thread::current(),
            panic: Mutex::new(None),
        });
        let leading = Leading::start(self, &job, most.min(self.count));
        let result = lead();
        drop(leading);
        let panic = job.panic.lock().take();
        match panic {
            Some(panic) => resume_unwind(panic),
            None => result,
        }
    }

    /// Waits for a job and joins it.
    fn next_job(&self) -> Arc<Job> {
        let mut began = None;
        while self.places.load(Ordering::Relaxed) == 0 {
            if began.get_or_insert_with(Instant::now).elapsed() >= self.patience {
                break;
            }
            for _ in 0..16 {
                std::hint::spin_loop();
            }
        }
        let mut queue = self.queue.lock();
        loop {
            if let Some((job, places)) = queue.open.front_mut() {
                let job = Arc::clone(job);
                // Under the lock, so that a caller who has closed its job knows of everybody.
                job.inside.fetch_add(1, Ordering::Relaxed);
                *places -= 1;
                if *places == 0 {
                    queue.open.pop_front();
                }
                let left = self.places.fetch_sub(1, Ordering::Relaxed) - 1;
                // Each wakes two, so that waking many costs the caller no more than one, and them
                // little more.
                for _ in 0..left.min(queue.asleep).min(2) {
                    self.changed.notify_one();
                }
                return job;
            }
            queue.asleep += 1;
            self.changed.wait(&mut queue);
            queue.asleep -= 1;
        }
    }
}

impl Job {
    fn help(&self) {
        // SAFETY: this thread is counted in `inside`, so the caller keeps `help` alive.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.help)() }));
        if let Err(panic) = result {
            *self.panic.lock() = Some(panic);
        }
        // Whatever this thread wrote is seen by the caller when it sees the count.
        if self.inside.fetch_sub(1, Ordering::Release) == 1 {
            self.caller.unpark();
        }
    }
}

/// A job that others may join, until this is dropped.
struct Leading<'a> {
    threads: &'a Threads,
    job: &'a Arc<Job>,
}

impl<'a> Leading<'a> {
    fn start(threads: &'a Threads, job: &'a Arc<Job>, places: usize) -> Self {
        let mut queue = threads.queue.lock();
        queue.open.push_back((Arc::clone(job), places));
        threads.places.fetch_add(places, Ordering::Relaxed);
        let wake = queue.asleep > 0;
        drop(queue);
        if wake {
            threads.changed.notify_one();
        }
        Self { threads, job }
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let mut queue = self.threads.queue.lock();
        if let Some(at) = queue.open.iter().position(|(job, _)| Arc::ptr_eq(job, self.job)) {
            let places = queue.open.remove(at).map_or(0, |(_, places)| places);
            self.threads.places.fetch_sub(places, Ordering::Relaxed);
        }
        drop(queue);
        // Whoever is still inside is on its last item, so it is soon done.
        let mut spins = 0u32;
        while self.job.inside.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 10_000 {
                std::hint::spin_loop();
            } else {
                std::thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        Pool { threads: OnceLock::new(), count: || 4, patience: Duration::from_micros(20) }
    }

    #[test]
    fn every_item_is_seen_once() {
        let pool = pool();
        for count in [0, 1, 2, 1000] {
            for parallel in [false, true] {
                let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(parallel, seen.iter(), |item| {
                    item.fetch_add(1, Ordering::Relaxed);
                });
                assert!(seen.iter().all(|item| item.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn callers_share_the_threads() {
        let pool = pool();
        let total = AtomicUsize::new(0);
        let rounds = if cfg!(miri) { 10 } else { 200 };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..rounds {
                        pool.for_each(true, 0..round, |item: usize| {
                            total.fetch_add(item, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        let once: usize = (0..rounds).map(|round| (0..round).sum::<usize>()).sum();
        assert_eq!(total.into_inner(), 4 * once);
    }

    #[test]
    fn helpers_come_while_the_caller_leads() {
        let pool = pool();
        let helpers = AtomicUsize::new(0);
        let help = || {
            helpers.fetch_add(1, Ordering::Relaxed);
        };
        pool.lead(2, help, || {
            while helpers.load(Ordering::Relaxed) < 2 {
                std::thread::yield_now();
            }
        });
        assert_eq!(helpers.into_inner(), 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool();
        for bad in [0, 500, 999] {
            let run = || pool.for_each(true, 0..1000, |item| assert_ne!(item, bad));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let seen = AtomicUsize::new(0);
        pool.for_each(true, 0..100, |_| {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(seen.into_inner(), 100);
    }
}
