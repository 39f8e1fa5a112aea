//! Hands the pieces of a call to the threads that stage them.
//!
//! Pieces go out in order, those of a chunk only once the chunk has a slot. Taking a piece and
//! handing it back are one atomic step each; the lock is only for those who sleep.
#![forbid(unsafe_code)]

use super::sync::{AtomicBool, AtomicUsize, Condvar, Mutex, Ordering, SPINS, spin_loop};

/// The pieces of one call, chunk after chunk.
pub(crate) struct Queue {
    /// The next piece to hand out.
    next: AtomicUsize,
    /// Pieces from here on have no slot yet.
    open: AtomicUsize,
    /// Nothing more is handed out.
    closed: AtomicBool,
    /// For each chunk, how many of its pieces are not staged yet.
    missing: Vec<AtomicUsize>,
    pieces: usize,
    sleep: Mutex<()>,
    changed: Condvar,
}

impl Queue {
    /// A queue of chunks of so many pieces.
    pub(crate) fn new(pieces_of_chunks: impl Iterator<Item = usize>) -> Self {
        let missing: Vec<usize> = pieces_of_chunks.collect();
        Self {
            next: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            pieces: missing.iter().sum(),
            missing: missing.into_iter().map(AtomicUsize::new).collect(),
            sleep: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// The next piece, if one is open now.
    pub(crate) fn try_take(&self) -> Option<usize> {
        let mut next = self.next.load(Ordering::Relaxed);
        loop {
            // With `open` comes whatever the leader did to the slots before.
            if self.closed.load(Ordering::Relaxed) || next >= self.open.load(Ordering::Acquire) {
                return None;
            }
            let (order, taken) = (Ordering::Relaxed, next + 1);
            match self.next.compare_exchange_weak(next, taken, order, order) {
                Ok(_) => return Some(next),
                Err(other) => next = other,
            }
        }
    }

    /// The next piece, once it is open; `None` when there will be none.
    pub(crate) fn take(&self) -> Option<usize> {
        let over = || {
            self.closed.load(Ordering::Acquire) || self.next.load(Ordering::Relaxed) >= self.pieces
        };
        loop {
            let mut taken = self.try_take();
            for _ in 0..SPINS {
                if taken.is_some() || over() {
                    break;
                }
                spin_loop();
                taken = self.try_take();
            }
            if taken.is_some() || over() {
                return taken;
            }
            let mut guard = self.sleep.lock();
            // Whoever opens does it before it locks to wake, so none is missed.
            if self.next.load(Ordering::Relaxed) >= self.open.load(Ordering::Acquire) && !over() {
                self.changed.wait(&mut guard);
            }
        }
    }

    /// Hands a piece of `chunk` back, staged.
    pub(crate) fn done(&self, chunk: usize) {
        // Whoever finds nothing missing sees what every thread staged.
        if self.missing[chunk].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake();
        }
    }

    /// The pieces before `piece` may be taken.
    pub(crate) fn open(&self, piece: usize) {
        self.open.store(piece, Ordering::Release);
        self.wake();
    }

    /// Whether every piece of the chunk is staged.
    pub(crate) fn is_staged(&self, chunk: usize) -> bool {
        self.missing[chunk].load(Ordering::Acquire) == 0
    }

    /// Waits until the chunk is staged; false where the queue was closed before.
    pub(crate) fn wait_staged(&self, chunk: usize) -> bool {
        let over = || self.is_staged(chunk) || self.closed.load(Ordering::Acquire);
        for _ in 0..SPINS {
            if over() {
                break;
            }
            spin_loop();
        }
        if !over() {
            let mut guard = self.sleep.lock();
            while !over() {
                self.changed.wait(&mut guard);
            }
        }
        self.is_staged(chunk)
    }

    /// Hands out nothing more, and lets those go who wait.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    /// Whether the queue was closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn wake(&self) {
        drop(self.sleep.lock());
        self.changed.notify_all();
    }
}

/// Closes a queue where the thread that works on it panics, so that nobody waits for it.
pub(crate) struct CloseOnPanic<'a>(pub(crate) &'a Queue);

impl Drop for CloseOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
        }
    }
}
