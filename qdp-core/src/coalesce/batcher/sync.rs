//! What [`super::protocol`] is built of. Its loom test puts loom's in the place of these.
//!
//! The standard library's locks rather than `parking_lot`'s: a batch wakes all of its callers at
//! once, and these wake them side by side, where `parking_lot` wakes one after the other.

pub(super) use std::sync::Arc;
pub(super) use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use std::hint::spin_loop;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// How long a caller looks before it sleeps: a few times as long as a small batch takes, and no
/// longer than to be woken does.
const LOOKING: Duration = Duration::from_micros(50);

/// Looks until it is so, for a while.
pub(super) fn look_until(is_so: impl Fn() -> bool) -> bool {
    let mut began = None;
    loop {
        for _ in 0..32 {
            if is_so() {
                return true;
            }
            spin_loop();
        }
        let now = Instant::now();
        if now.duration_since(*began.get_or_insert(now)) > LOOKING {
            return false;
        }
    }
}

/// A lock that knows no poison: what it guards is whole between any two statements.
#[derive(Debug, Default)]
pub(super) struct Mutex<T>(std::sync::Mutex<T>);

pub(super) use std::sync::MutexGuard;

impl<T> Mutex<T> {
    pub(super) fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits on such a lock.
#[derive(Debug, Default)]
pub(super) struct Condvar(std::sync::Condvar);

impl Condvar {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `end` at most.
    pub(super) fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        end: Instant,
    ) -> MutexGuard<'a, T> {
        let left = end.saturating_duration_since(Instant::now());
        self.0.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(super) fn notify_all(&self) {
        self.0.notify_all();
    }
}
