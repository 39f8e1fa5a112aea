//! Taking the interpreter's lock back, one thread after the other.
//!
//! A batch ends for all of its callers at once, and all of them want the lock. Those that find it
//! taken sleep, and to be woken takes ten times as long as what each then does with it. So they take
//! turns before they ask for it: a thread whose turn it is finds it free, and lets the next one pass
//! when it gives it up at its next request. Whoever has not come back by then, or is kept by other
//! Python code, is not waited for: turns make things faster, and nothing depends on them.

use pyo3::prelude::*;
use std::cell::Cell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a thread waits for those before it without any of them passing: several times what a
/// loop over requests does between two of them.
const PATIENCE: Duration = Duration::from_micros(20);

/// The next number that a thread draws.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// The highest number that may pass.
static TURN: AtomicU64 = AtomicU64::new(0);
/// Threads that wait for their turn.
static WAITING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The number of the turn that this thread has the lock by.
    static HELD: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `work` without the interpreter's lock, and takes it back in turn.
pub(crate) fn detach<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(|| {
        if let Some(number) = HELD.take() {
            TURN.fetch_max(number + 1, Ordering::Release);
        }
        let result = work();
        wait();
        result
    })
}

/// Waits for this thread's turn.
fn wait() {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    HELD.set(Some(number));
    if TURN.load(Ordering::Acquire) >= number {
        return;
    }
    // They keep as many processors busy, apart from those of who has the lock and of who encodes.
    let many = qdp_core::Engine::num_threads().saturating_sub(2);
    if WAITING.fetch_add(1, Ordering::Relaxed) < many {
        look(number);
    }
    WAITING.fetch_sub(1, Ordering::Relaxed);
    TURN.fetch_max(number, Ordering::Release);
}

fn look(number: u64) {
    let (mut before, mut since) = (0, None);
    loop {
        for _ in 0..16 {
            if TURN.load(Ordering::Acquire) >= number {
                return;
            }
            spin_loop();
        }
        let (turn, now) = (TURN.load(Ordering::Acquire), Instant::now());
        if turn != before || since.is_none() {
            (before, since) = (turn, Some(now));
        } else if since.is_some_and(|since| now.duration_since(since) > PATIENCE) {
            return;
        }
    }
}
