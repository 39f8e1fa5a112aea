//! The piece queue under loom: every order in which threads may run, and every value that an atomic
//! may be seen to have, within a bound on preemptions.
//!
//! The queue's own source is compiled here against loom's primitives instead of those in
//! `pipeline/sync.rs`. Staged memory is loom's too, which finds whoever touches it without having
//! seen what others did to it. A thread that sleeps for ever is a deadlock, which loom reports.

#[allow(clippy::reversed_empty_ranges)] // nobody spins here: SPINS is zero
#[path = "../../qdp-core/src/pipeline/queue.rs"]
mod queue;

/// In the place of `pipeline/sync.rs`.
mod sync {
    pub(super) use loom::hint::spin_loop;
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    /// Looking again before sleeping adds orders but nothing that can happen in them.
    pub(super) const SPINS: usize = 0;

    /// `parking_lot`'s interface; it knows no poison.
    pub(super) struct Mutex<T>(loom::sync::Mutex<T>);

    /// `None` only while its thread sleeps.
    pub(super) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    pub(super) struct Condvar(loom::sync::Condvar);

    impl<T> Mutex<T> {
        pub(super) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap()))
        }
    }

    impl Condvar {
        pub(super) fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        pub(super) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            guard.0 = guard.0.take().map(|held| self.0.wait(held).unwrap());
        }

        pub(super) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use queue::{CloseOnPanic, Queue};
use std::ops::Range;

/// What is in a slot where no piece is staged.
const EMPTY: usize = usize::MAX;

/// A queue and the memory of one or more slots, which the chunks use in turn.
struct Ring {
    queue: Queue,
    /// The pieces of each chunk.
    chunks: Vec<Range<usize>>,
    /// For each slot, a place for each piece of a chunk.
    slots: Vec<Vec<UnsafeCell<usize>>>,
}

// SAFETY: loom checks every access to the cells, which is what these tests are for.
unsafe impl Sync for Ring {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Ring {}

impl Ring {
    fn new(pieces_of_chunks: &[usize], slots: usize) -> Arc<Self> {
        let mut pieces = 0;
        let chunks = pieces_of_chunks.iter().map(|&count| {
            pieces += count;
            pieces - count..pieces
        });
        let slot = || (0..pieces_of_chunks.len().max(2)).map(|_| UnsafeCell::new(EMPTY)).collect();
        Arc::new(Self {
            queue: Queue::new(pieces_of_chunks.iter().copied()),
            chunks: chunks.collect(),
            slots: (0..slots).map(|_| slot()).collect(),
        })
    }

    fn cell(&self, chunk: usize, piece: usize) -> &UnsafeCell<usize> {
        &self.slots[chunk % self.slots.len()][piece - self.chunks[chunk].start]
    }

    /// Gives the chunk its slot, emptied.
    fn open(&self, chunk: usize) {
        for piece in self.chunks[chunk].clone() {
            // SAFETY: loom checks that nobody else is at the cell.
            self.cell(chunk, piece).with_mut(|cell| unsafe { *cell = EMPTY });
        }
        self.queue.open(self.chunks[chunk].end);
    }

    fn stage(&self, piece: usize) {
        let chunk = self.chunks.iter().position(|chunk| chunk.contains(&piece)).unwrap();
        self.cell(chunk, piece).with_mut(|cell| {
            // SAFETY: as above.
            let before = unsafe { std::mem::replace(&mut *cell, piece) };
            assert_eq!(before, EMPTY, "piece {piece} was handed out before");
        });
        self.queue.done(chunk);
    }

    /// Stages until there will be nothing more; returns how many pieces.
    fn help(&self) -> usize {
        let mut staged = 0;
        while let Some(piece) = self.queue.take() {
            self.stage(piece);
            staged += 1;
        }
        staged
    }

    fn assert_staged(&self, chunk: usize) {
        for piece in self.chunks[chunk].clone() {
            // SAFETY: as above.
            self.cell(chunk, piece).with(|cell| assert_eq!(unsafe { *cell }, piece));
        }
    }
}

/// Runs `test` in all orders with up to so many preemptions.
fn model(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

/// A thread that helps with `ring`.
fn helper(ring: &Arc<Ring>) -> thread::JoinHandle<usize> {
    let ring = Arc::clone(ring);
    thread::spawn(move || ring.help())
}

#[test]
fn a_chunk_is_staged_when_all_its_pieces_are() {
    model(2, || {
        let ring = Ring::new(&[2], 1);
        let helpers = [helper(&ring), helper(&ring)];
        ring.open(0);
        assert!(ring.queue.wait_staged(0));
        ring.assert_staged(0);
        // Nobody closes: the last piece is the end.
        assert_eq!(helpers.map(|helper| helper.join().unwrap()).iter().sum::<usize>(), 2);
    });
}

/// Each chunk gets the slot of the one before, so that each side must see what the other did to it.
#[test]
fn chunks_take_turns_in_a_slot() {
    model(3, || {
        let ring = Ring::new(&[1, 2], 1);
        let helper = helper(&ring);
        for chunk in 0..2 {
            ring.open(chunk);
            assert!(ring.queue.wait_staged(chunk));
            ring.assert_staged(chunk);
        }
        assert_eq!(helper.join().unwrap(), 3);
    });
}

/// As `drive` leads: it never waits where it can stage.
#[test]
fn the_leader_stages_along() {
    model(3, || {
        let ring = Ring::new(&[2, 1], 2);
        let helper = helper(&ring);
        ring.open(0);
        ring.open(1);
        let mut staged = 0;
        for chunk in 0..2 {
            while !ring.queue.is_staged(chunk) {
                if let Some(piece) = ring.queue.try_take() {
                    ring.stage(piece);
                    staged += 1;
                } else {
                    assert!(ring.queue.wait_staged(chunk));
                }
            }
            ring.assert_staged(chunk);
        }
        assert_eq!(ring.queue.try_take(), None);
        assert_eq!(staged + helper.join().unwrap(), 3);
    });
}

/// The helpers wait, find pieces, or come when it is over; all leave.
#[test]
fn closing_lets_everybody_go() {
    for open in [false, true] {
        model(2, move || {
            let ring = Ring::new(&[1, 1], 2);
            let helpers = [helper(&ring), helper(&ring)];
            if open {
                ring.open(0);
            }
            ring.queue.close();
            assert!(ring.queue.is_closed());
            assert_eq!(ring.queue.try_take(), None);
            assert_eq!(ring.queue.take(), None);
            let staged: usize = helpers.map(|helper| helper.join().unwrap()).iter().sum();
            assert!(staged <= usize::from(open));
            assert_eq!(ring.queue.is_staged(0), staged == 1);
            if staged == 1 {
                ring.assert_staged(0);
            }
        });
    }
}

/// A piece is bad: whoever finds that closes the queue while the leader waits and others take.
#[test]
fn a_helper_that_closes_wakes_the_leader() {
    model(2, || {
        let ring = Ring::new(&[2], 1);
        let own = Arc::clone(&ring);
        let bad = thread::spawn(move || {
            let taken = own.queue.take();
            if taken.is_some() {
                own.queue.close(); // its chunk is never staged
                assert_eq!(own.queue.take(), None);
            }
            taken
        });
        let good = helper(&ring);
        ring.open(0);
        let staged = ring.queue.wait_staged(0);
        if staged {
            ring.assert_staged(0);
        } else {
            assert!(ring.queue.is_closed());
            assert_eq!(ring.queue.try_take(), None);
        }
        let (bad, good) = (bad.join().unwrap(), good.join().unwrap());
        if bad.is_none() {
            assert!(staged && good == 2);
        } else {
            assert!(!staged && good <= 1);
        }
    });
}

/// As above, where it panics.
#[test]
fn a_guard_closes_only_on_a_panic() {
    model(2, || {
        let ring = Ring::new(&[1], 1);
        drop(CloseOnPanic(&ring.queue));
        assert!(!ring.queue.is_closed());
        let helper = helper(&ring);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _guard = CloseOnPanic(&ring.queue);
            std::panic::resume_unwind(Box::new(())); // without a message
        }));
        assert!(panicked.is_err() && ring.queue.is_closed());
        assert_eq!(helper.join().unwrap(), 0);
    });
}
