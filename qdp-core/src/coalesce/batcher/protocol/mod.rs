//! Who puts which rows where, who encodes them, and who learns of it.
//!
//! A request *claims* rows of the open batch of its key, under the lock; whoever made it *writes*
//! them, outside; a leader *starts* the batch, waits until every claim is written, runs it and
//! *publishes* one result for all. Whatever a claim is dropped for, an error or a panic included,
//! it counts as written then, so a leader never waits for somebody who is gone.
//!
//! There is at most one leader, and while anything waits there is one: [`State::leader`]. It is the
//! first caller to come when nothing is in flight; afterwards, a caller of the batch that is next,
//! and where nobody waits in a call, the worker. Leadership is offered through the batch
//! ([`Phase::Lead`]), so that whichever caller looks first takes it; one who leaves without looking
//! passes it on.
//!
//! What is beyond the bound of the queue is parked, and claims its rows, by level and in order,
//! when a batch starts and makes room. Whether a request has started is decided under the lock: it
//! has, as soon as its batch is out of [`State::pending`]. Until then it can be withdrawn; its rows
//! stay in the batch, and nobody asks for their states.
#![forbid(unsafe_code)]

mod arrive;
mod lead;
mod patience;
pub(super) mod stats;
mod ticket;

use super::sync::{Arc, AtomicU8, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering};
use stats::{BatcherStats, Reason};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

pub(crate) use arrive::{Called, Request};
pub(crate) use patience::Ask;
pub(crate) use ticket::Ticket;

/// What batches are made of and done with.
pub(crate) trait Work: Send + Sync + Sized {
    /// What requests of one batch have in common.
    type Key: PartialEq + Clone + Send + Sync;
    /// Memory for the rows of a batch, which threads write side by side.
    type Buffer: Send + Sync;
    /// Data that is written later, by somebody else than who brought it.
    type Source: Send;
    /// Where the result of an asynchronous request goes.
    type Listener: Send;
    /// The result of a batch, shared by its requests.
    type Output: Clone + Send;
    /// Why a request failed by itself.
    type Error: Clone + Send;

    /// Memory for at least `rows` rows, and for how many.
    fn buffer(&self, key: &Self::Key, rows: usize) -> Result<(Self::Buffer, usize), Self::Error>;
    /// Writes rows that were parked.
    fn write(
        &self,
        key: &Self::Key,
        buffer: &Self::Buffer,
        rows: Range<usize>,
        source: Self::Source,
    ) -> Result<(), Self::Error>;
    /// Computes the first `rows` rows, all written. Does not panic. Where others `gather` meanwhile,
    /// it may take until the device is done: the next batch is the larger for it.
    fn run(
        &self,
        key: &Self::Key,
        buffer: &Self::Buffer,
        rows: usize,
        gather: bool,
    ) -> Self::Output;
    /// Whether these rows take no longer than a thread may be kept that has other things to do.
    fn is_short(&self, key: &Self::Key, rows: usize) -> bool;
    /// The memory of a batch is not used any more: neither read nor written through it. `full`:
    /// there was no room for another request.
    fn recycle(&self, buffer: &Self::Buffer, full: bool);
    /// Lets go of data that nobody will write. Does not panic.
    fn discard(&self, sources: Vec<Self::Source>);
    /// Tells those who listen for requests, all of a batch, that they are done. Does not panic.
    fn deliver(&self, finished: Vec<Finished<Self>>);
}

/// Why a request is not encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure<E> {
    /// The queue is full.
    Full,
    /// Its deadline has passed.
    Expired,
    /// It was cancelled.
    Cancelled,
    /// The batcher is closed.
    Closed,
    /// It failed by itself.
    Failed(E),
}

/// The rows of a batch's result that are a request's.
pub(crate) type Share<W> = (<W as Work>::Output, Range<usize>);

/// What became of a request.
pub(crate) type Outcome<W> = Result<Share<W>, Failure<<W as Work>::Error>>;

/// A request that is done, and who listens for it.
pub(crate) struct Finished<W: Work> {
    pub(crate) listener: W::Listener,
    pub(crate) outcome: Outcome<W>,
}

/// How a protocol is run.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// How long the oldest request waits for others where nothing is in flight.
    pub(crate) delay: Duration,
    /// Requests that may wait in batches.
    pub(crate) queue: usize,
    /// Whether requests beyond it are refused rather than parked.
    pub(crate) refuse: bool,
}

/// Of [`Batch::unwritten`]: no claims will be added, and the leader waits.
const SEALED: usize = 1 << (usize::BITS - 1);

const WAITING: u8 = 0;
const CHANGED: u8 = 1;

/// Where a batch is, for those who wait for it.
enum Phase<T> {
    Waiting,
    /// Whichever caller looks first is to lead.
    Lead,
    Done {
        started: Instant,
        output: T,
    },
}

/// Rows of one key that are encoded together.
pub(crate) struct Batch<W: Work> {
    key: W::Key,
    level: i32,
    buffer: W::Buffer,
    /// Rows that there are.
    capacity: usize,
    /// Claims that are not written yet, and [`SEALED`].
    unwritten: AtomicUsize,
    phase: Mutex<Phase<W::Output>>,
    /// Whether to look at the phase: asked without its lock.
    hint: AtomicU8,
    /// Callers wait for any phase but `Waiting`.
    changed: Condvar,
    /// Those who wait without leading.
    done: Condvar,
    /// The leader waits for the last claim.
    written: Condvar,
}

impl<W: Work> Batch<W> {
    fn set(&self, phase: Phase<W::Output>) {
        let hint = if matches!(phase, Phase::Waiting) { WAITING } else { CHANGED };
        let mut guard = self.phase.lock();
        *guard = phase;
        self.hint.store(hint, Ordering::Release);
    }

    /// Whether the result is there.
    fn is_done(&self) -> bool {
        matches!(*self.phase.lock(), Phase::Done { .. })
    }
}

/// Rows of a batch that are to be written: by the time this is dropped.
pub(crate) struct Claim<W: Work> {
    batch: Arc<Batch<W>>,
    rows: Range<usize>,
}

impl<W: Work> Drop for Claim<W> {
    fn drop(&mut self) {
        // Whoever finds none missing sees what everybody wrote.
        if self.batch.unwritten.fetch_sub(1, Ordering::AcqRel) == SEALED + 1 {
            drop(self.batch.phase.lock());
            self.batch.written.notify_all();
        }
    }
}

/// An asynchronous request of a batch.
struct Listening<W: Work> {
    ticket: Arc<Ticket<W>>,
    rows: Range<usize>,
    deadline: Option<Instant>,
    listener: Option<W::Listener>,
}

/// A claim that its leader is to write.
struct Unwritten<W: Work> {
    claim: Claim<W>,
    source: W::Source,
    ticket: Arc<Ticket<W>>,
}

/// A batch that has not started.
struct Pending<W: Work> {
    batch: Arc<Batch<W>>,
    /// Rows that are claimed.
    rows: usize,
    /// Claims so far.
    claims: usize,
    /// Requests that want the result.
    live: usize,
    /// Of these, those that wait in a call.
    callers: usize,
    requests: Vec<Listening<W>>,
    unwritten: Vec<Unwritten<W>>,
    /// When the oldest came.
    arrived: Instant,
    /// How much later than the oldest the others came, in all.
    later: Duration,
    full: bool,
}

/// A request that waits for room in the queue.
struct Parked<W: Work> {
    ticket: Arc<Ticket<W>>,
    request: Request<W>,
    arrived: Instant,
    /// What to write and whom to tell, where nobody waits in a call.
    source: Option<(W::Source, Option<W::Listener>)>,
}

/// Who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leader {
    /// Never while anything is pending.
    Nobody,
    /// A thread does, or a batch's callers are asked to.
    Somebody,
    /// Whoever submitted something said that it will ([`Protocol::lead_promised`]). A caller who
    /// comes first does so instead: nobody depends on a promise.
    Promised,
    /// The worker is asked to.
    Worker,
}

/// What the lock guards.
struct State<W: Work> {
    /// In the order in which they were opened.
    pending: Vec<Pending<W>>,
    /// Those of higher levels first, and each level's in the order in which they came.
    parked: VecDeque<Parked<W>>,
    /// Requests that wait in batches.
    waiting: usize,
    leader: Leader,
    /// The batch before is over, rather than nothing was in flight.
    busy: bool,
    /// Threads that tell listeners though they lead no more.
    telling: usize,
    /// Data that nobody will write any more. It may be anybody's, and so may what its destructor
    /// does: it is dropped behind the lock, see [`Protocol::unlock`].
    spent: Vec<W::Source>,
    /// No more requests.
    closed: bool,
    /// The worker is to end.
    stopped: bool,
    stats: BatcherStats,
}

/// Requests of any number of threads, batch by batch.
pub(crate) struct Protocol<W: Work> {
    pub(crate) work: W,
    limits: Limits,
    state: Mutex<State<W>>,
    /// The leader waits until a batch is due.
    due: Condvar,
    /// The worker waits until it is to lead.
    worker: Condvar,
    /// Whoever closes waits until nothing is left.
    idle: Condvar,
    /// Callers that look before they sleep.
    looking: AtomicUsize,
    /// How many may: they take processors from those who have work.
    max_looking: usize,
}

impl<W: Work> Protocol<W> {
    pub(crate) fn new(work: W, limits: Limits, max_looking: usize) -> Self {
        let state = State {
            pending: Vec::new(),
            parked: VecDeque::new(),
            waiting: 0,
            leader: Leader::Nobody,
            spent: Vec::new(),
            busy: false,
            telling: 0,
            closed: false,
            stopped: false,
            stats: BatcherStats::default(),
        };
        Self {
            work,
            limits,
            state: Mutex::new(state),
            due: Condvar::new(),
            worker: Condvar::new(),
            idle: Condvar::new(),
            looking: AtomicUsize::new(0),
            max_looking,
        }
    }

    pub(crate) fn stats(&self) -> BatcherStats {
        self.state.lock().stats.clone()
    }

    /// Requests that wait: in batches that have not started, and for room.
    pub(crate) fn waiting(&self) -> usize {
        let state = self.state.lock();
        state.waiting + state.parked.len()
    }

    /// Counts a request that goes another way; refuses it after the end.
    pub(crate) fn count_direct(&self) -> Result<(), Failure<W::Error>> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(Failure::Closed);
        }
        state.stats.direct += 1;
        Ok(())
    }

    /// Requests that may wait.
    pub(crate) fn queue(&self) -> usize {
        self.limits.queue
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Refuses further requests. With `drain`, waits until those that there are have been encoded:
    /// never so on the worker, which may have to encode them.
    pub(crate) fn close(&self, drain: bool) {
        let mut state = self.state.lock();
        state.closed = true;
        self.due.notify_all();
        if state.leader == Leader::Promised {
            self.leave_to_worker(&mut state);
        }
        while drain && (state.leader != Leader::Nobody || state.telling > 0) {
            state = self.idle.wait(state);
        }
    }

    /// Ends the worker, once nothing is left to do.
    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.worker.notify_all();
    }

    /// What the worker's thread does.
    pub(crate) fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if state.leader == Leader::Worker {
                state.leader = Leader::Somebody;
                drop(state);
                let _ = self.lead(None); // it waits for nothing of its own
                state = self.state.lock();
            } else if state.stopped && state.leader == Leader::Nobody {
                return;
            } else {
                state = self.worker.wait(state);
            }
        }
    }

    /// Lets go of the lock, and then of what is dropped behind it.
    fn unlock(&self, mut state: MutexGuard<'_, State<W>>) {
        let spent = std::mem::take(&mut state.spent);
        drop(state);
        if !spent.is_empty() {
            self.work.discard(spent);
        }
    }

    /// Never under the lock.
    fn deliver(&self, finished: Vec<Finished<W>>) {
        if !finished.is_empty() {
            self.work.deliver(finished);
        }
    }

    /// Claims rows in a batch that is open, or in a new one; says where it is among the pending.
    fn claim(
        &self,
        state: &mut MutexGuard<'_, State<W>>,
        request: &Request<W>,
        arrived: Instant,
    ) -> Result<(Claim<W>, usize), W::Error> {
        let Request { key, level, rows, .. } = request;
        // Only the newest of a key: what comes later is not to start before.
        let open = state
            .pending
            .iter()
            .rposition(|pending| pending.batch.level == *level && pending.batch.key == *key);
        let open = open.filter(|&index| {
            let pending = &mut state.pending[index];
            let fits = !pending.full && pending.rows + rows <= pending.batch.capacity;
            // It is due now, and its leader may be waiting.
            if !fits && !pending.full {
                pending.full = true;
                self.due.notify_all();
            }
            fits
        });
        let index = open.unwrap_or(state.pending.len());
        if open.is_none() {
            let (buffer, capacity) = self.work.buffer(key, *rows)?;
            state.pending.push(Pending::new(key, *level, buffer, capacity, arrived));
        }
        let pending = &mut state.pending[index];
        let claim =
            Claim { batch: Arc::clone(&pending.batch), rows: pending.rows..pending.rows + rows };
        pending.batch.unwritten.fetch_add(1, Ordering::Relaxed);
        pending.rows += rows;
        pending.claims += 1;
        pending.live += 1;
        pending.later += arrived.saturating_duration_since(pending.arrived);
        if pending.rows == pending.batch.capacity {
            pending.full = true;
            self.due.notify_all();
        }
        state.waiting += 1;
        Ok((claim, index))
    }
}

impl<W: Work> Pending<W> {
    fn new(key: &W::Key, level: i32, buffer: W::Buffer, capacity: usize, arrived: Instant) -> Self {
        let batch = Batch {
            key: key.clone(),
            level,
            buffer,
            capacity,
            unwritten: AtomicUsize::new(0),
            phase: Mutex::new(Phase::Waiting),
            hint: AtomicU8::new(WAITING),
            changed: Condvar::new(),
            done: Condvar::new(),
            written: Condvar::new(),
        };
        Self {
            batch: Arc::new(batch),
            rows: 0,
            claims: 0,
            live: 0,
            callers: 0,
            requests: Vec::new(),
            unwritten: Vec::new(),
            arrived,
            later: Duration::ZERO,
            full: false,
        }
    }
}

impl<W: Work> State<W> {
    /// Has a request wait for room.
    fn park(&mut self, parked: Parked<W>) {
        let level = parked.request.level;
        let before = self.parked.iter().rposition(|other| other.request.level >= level);
        self.parked.insert(before.map_or(0, |index| index + 1), parked);
    }

    /// The place of a batch that has not started.
    fn find(&self, batch: &Arc<Batch<W>>) -> Option<usize> {
        self.pending.iter().position(|pending| Arc::ptr_eq(&pending.batch, batch))
    }
}

impl<W: Work> Pending<W> {
    /// Why it is to start now, if it is; else, when it will be.
    fn due(
        &self,
        delay: Duration,
        closed: bool,
        busy: bool,
        now: Instant,
    ) -> Result<Reason, Instant> {
        let waited = now.saturating_duration_since(self.arrived);
        if self.full {
            Ok(Reason::Full)
        } else if delay.is_zero() {
            Ok(if busy { Reason::Next } else { Reason::Idle })
        } else if waited >= delay {
            Ok(Reason::Delay)
        } else if closed {
            Ok(Reason::Close)
        } else {
            Err(self.arrived + delay)
        }
    }
}
