//! Taking the interpreter's lock back, one thread after the other.
//!
//! A batch ends for all of its callers at once, and all of them want the lock. Those that find it
//! taken sleep, and to be woken takes ten times as long as what each then does with it. So they take
//! turns before they ask for it: a thread whose turn it is finds it free, and lets the next one pass
//! when it gives the lock up at its next request. The few whose turn is near look for it; each wakes
//! one that sleeps farther behind. Who is kept by other Python code is not waited for: turns make
//! things faster, and nothing depends on them.

use parking_lot::Mutex;
use pyo3::prelude::*;
use std::cell::Cell;
use std::hint::spin_loop;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a thread waits for the one before it without anybody passing: several times what a loop
/// over requests does between two of them. Whoever keeps its turn and then does something else costs
/// the next thread as long.
const PATIENCE: Duration = Duration::from_micros(20);
/// Who last came back sooner than this is expected to again, and keeps its turn until then.
const SOON: Duration = PATIENCE;
/// Threads that look for their turn at most: measured with 16 and 24 threads on 16 processors, where
/// four were as good as ten for the former, and kept the latter from taking processors from those
/// who have the lock.
const MAX_NEAR: u64 = 4;

/// How many turns before its own a thread looks, rather than sleeps; 0 where there are not enough
/// processors for anybody to look.
static NEAR: LazyLock<u64> =
    LazyLock::new(|| (qdp_core::Engine::num_threads() as u64 / 4).min(MAX_NEAR));
/// Threads that take turns at a time, at most: among more of them those near their turn wake too
/// late, and it is better for some to crowd around the lock.
static MANY: LazyLock<usize> =
    LazyLock::new(|| (2 * qdp_core::Engine::num_threads()).min(SLEEPERS.len()));
/// Threads that have drawn a number and wait.
static WAITING: AtomicUsize = AtomicUsize::new(0);
/// The next number that a thread draws.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// The highest number that may pass.
static TURN: AtomicU64 = AtomicU64::new(0);

/// Threads that sleep, and their numbers: each in the place of its number. Nobody waits for one of
/// these locks: in a process that was forked meanwhile they may be held by a thread that is not there.
static SLEEPERS: [Mutex<Option<(u64, Thread)>>; 256] = [const { Mutex::new(None) }; 256];

fn sleeper(number: u64) -> &'static Mutex<Option<(u64, Thread)>> {
    &SLEEPERS[(number % SLEEPERS.len() as u64) as usize]
}

/// A thread's turn, and when it had the last one.
struct Own {
    /// The number that it has the lock by, until it lets the next thread pass.
    number: Cell<Option<u64>>,
    returned: Cell<Option<Instant>>,
    /// In the middle of a call: one that a signal's handler makes meanwhile keeps no turn.
    away: Cell<bool>,
}

impl Own {
    fn pass(&self) {
        if let Some(number) = self.number.take() {
            TURN.fetch_max(number + 1, Ordering::AcqRel);
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.pass();
    }
}

thread_local! {
    static OWN: Own = const {
        Own { number: Cell::new(None), returned: Cell::new(None), away: Cell::new(false) }
    };
}

/// Runs `work` without the interpreter's lock, and takes it back in turn.
pub(crate) fn detach<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    if *NEAR == 0 {
        return py.detach(work);
    }
    let (returned, nested) = OWN.with(|own| (own.returned.get(), own.away.replace(true)));
    let is_soon = !nested && returned.is_some_and(|returned| returned.elapsed() < SOON);
    let result = py.detach(|| {
        OWN.with(Own::pass); // behind the lock: it is free for whoever is next
        let result = work();
        if WAITING.fetch_add(1, Ordering::Relaxed) < *MANY {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            wait(number);
            TURN.fetch_max(number, Ordering::AcqRel);
            OWN.with(|own| own.number.set(Some(number)));
        }
        WAITING.fetch_sub(1, Ordering::Relaxed);
        result
    });
    OWN.with(|own| {
        if !is_soon {
            own.pass();
        }
        own.returned.set(Some(Instant::now()));
        own.away.set(nested);
    });
    result
}

/// Waits until it is the turn of `number`, or nobody passes for too long.
fn wait(number: u64) {
    let mut last = None;
    let mut has_woken = false;
    loop {
        let turn = TURN.load(Ordering::Acquire);
        let ahead = number.saturating_sub(turn);
        // Not at its turn, which is to be short.
        if ahead <= 1 && !has_woken {
            has_woken = true;
            wake(number + *NEAR);
        }
        if ahead == 0 {
            return;
        }
        let now = Instant::now();
        let (_, since) =
            *last.insert(last.filter(|&(before, _)| before == turn).unwrap_or((turn, now)));
        // Those behind wait for longer: one who passes out of turn lets all before it pass.
        let patience = PATIENCE * ahead.min(64) as u32;
        let waited = now.duration_since(since);
        if waited > patience {
            return;
        }
        if ahead > *NEAR + 1 {
            sleep(number, patience.saturating_sub(waited));
        } else {
            for _ in 0..16 {
                if TURN.load(Ordering::Acquire) != turn {
                    break;
                }
                spin_loop();
            }
        }
    }
}

/// Sleeps until woken, unless whoever would wake it has looked already.
fn sleep(number: u64, at_most: Duration) {
    let Some(mut place) = sleeper(number).try_lock() else { return spin_loop() };
    *place = Some((number, std::thread::current()));
    drop(place);
    if TURN.load(Ordering::Acquire) + *NEAR + 1 < number {
        std::thread::park_timeout(at_most);
    }
    take(number);
}

/// The thread that sleeps under a number, which is not woken by anybody else then.
fn take(number: u64) -> Option<Thread> {
    let mut place = sleeper(number).try_lock()?;
    place.take_if(|(other, _)| *other == number).map(|(_, thread)| thread)
}

fn wake(number: u64) {
    if let Some(thread) = take(number) {
        thread.unpark();
    }
}
