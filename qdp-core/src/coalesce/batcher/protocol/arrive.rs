//! Requests come: callers who wait for the result, and asynchronous ones.

use super::super::sync::look_until;
use super::lead::Leading;
use super::patience::{Ask, Patience};
use super::ticket::Place;
use super::{
    Arc, Batch, CHANGED, Claim, Failure, Finished, Leader, Listening, MutexGuard, Ordering, Parked,
    Phase, Protocol, Reason, Share, State, Ticket, Unwritten, Work,
};
use std::ops::Range;
use std::time::{Duration, Instant};

/// What is asked for, but for the values.
pub(crate) struct Request<W: Work> {
    pub(crate) key: W::Key,
    /// Higher levels start first.
    pub(crate) level: i32,
    /// No more than a buffer holds.
    pub(crate) rows: usize,
    /// It fails where it has not started by then.
    pub(crate) deadline: Option<Instant>,
}

/// The result of a call.
pub(crate) enum Called<W: Work, R> {
    /// Nothing was in flight: what the caller computed by itself.
    Alone(R),
    /// Some rows of a batch.
    Shared(Share<W>),
}

/// A request that is queued, and whether whoever made it is to lead.
pub(crate) type Submitted<W> = (Arc<Ticket<W>>, bool);

/// A caller's place in a batch: given up where it is dropped.
struct Seat<'a, W: Work> {
    protocol: &'a Protocol<W>,
    batch: Arc<Batch<W>>,
    rows: Range<usize>,
    taken: bool,
}

impl<W: Work> Drop for Seat<'_, W> {
    fn drop(&mut self) {
        if self.taken {
            self.protocol.leave(&self.batch, |_| {});
        }
    }
}

/// A caller of a batch who does something else meanwhile, and is not to lead.
pub(super) struct Away<'a, W: Work> {
    protocol: &'a Protocol<W>,
    batch: &'a Arc<Batch<W>>,
}

impl<'a, W: Work> Away<'a, W> {
    pub(super) fn new(protocol: &'a Protocol<W>, batch: &'a Arc<Batch<W>>) -> Self {
        let mut state = protocol.state.lock();
        if let Some(index) = state.find(batch) {
            state.pending[index].callers -= 1;
            let callers = state.pending[index].callers;
            protocol.pass_offer(&mut state, batch, callers);
        }
        protocol.unlock(state);
        Self { protocol, batch }
    }
}

impl<W: Work> Drop for Away<'_, W> {
    fn drop(&mut self) {
        let mut state = self.protocol.state.lock();
        if let Some(index) = state.find(self.batch) {
            state.pending[index].callers += 1;
        }
    }
}

impl<W: Work> Protocol<W> {
    /// Encodes a request and waits for it: `alone` where nothing is in flight, else as rows of a
    /// batch, which `write` writes. While it waits, `ask` is asked now and then whether to go on.
    pub(crate) fn call<R>(
        &self,
        request: Request<W>,
        ask: Option<Ask<'_, W::Error>>,
        alone: impl FnOnce() -> R,
        write: impl FnOnce(&W::Buffer, Range<usize>) -> Result<(), W::Error>,
    ) -> Result<Called<W, R>, Failure<W::Error>> {
        let mut state = self.enter(&request)?;
        if state.leader == Leader::Nobody && self.limits.delay.is_zero() {
            state.leader = Leader::Somebody;
            let (none, size) = (Duration::ZERO, (1, request.rows));
            state.stats.start(size, Reason::Idle, none, none);
            drop(state);
            let _leading = Leading::new(self);
            return Ok(Called::Alone(alone()));
        }
        let mut patience = Patience::new(request.deadline, ask);
        let shared = self.share(state, request, &mut patience, write);
        // Who was called away learns of it, whatever came in between.
        patience.called_away()?;
        shared.map(Called::Shared)
    }

    /// A caller's request as rows of a batch.
    fn share(
        &self,
        state: MutexGuard<'_, State<W>>,
        request: Request<W>,
        patience: &mut Patience<'_, W::Error>,
        write: impl FnOnce(&W::Buffer, Range<usize>) -> Result<(), W::Error>,
    ) -> Result<Share<W>, Failure<W::Error>> {
        let deadline = request.deadline;
        let claim = self.take_place(state, request)?;
        let (batch, rows) = (Arc::clone(&claim.batch), claim.rows.clone());
        let mut seat = Seat { protocol: self, batch, rows, taken: true };
        if let Err(error) = write(&claim.batch.buffer, claim.rows.clone()) {
            drop(claim);
            seat.taken = false;
            self.leave(&seat.batch, |_| {});
            self.state.lock().stats.invalid += 1;
            return Err(Failure::Failed(error));
        }
        drop(claim);
        self.wait(&mut seat, deadline, patience)
    }

    /// Queues a request that nobody waits for in a call. Where there is room, `write` writes the
    /// rows of `data` before this returns; else `source` says what is written later.
    ///
    /// Who `promises` to call [`Protocol::lead_promised`] soon is told whether to; else the worker
    /// leads, where nobody does. Where this fails, nobody is told.
    pub(crate) fn submit<D>(
        &self,
        request: Request<W>,
        listener: Option<W::Listener>,
        promises: bool,
        data: D,
        write: impl FnOnce(&D, &W::Buffer, Range<usize>) -> Result<(), W::Error>,
        source: impl FnOnce(D) -> W::Source,
    ) -> Result<Submitted<W>, Failure<W::Error>> {
        let mut state = self.enter(&request)?;
        let arrived = Instant::now();
        let ticket = Arc::new(Ticket::new());
        if !self.has_room(&mut state)? {
            let source = Some((source(data), listener));
            state.park(Parked { ticket: Arc::clone(&ticket), request, arrived, source });
            return Ok((ticket, false));
        }
        let (claim, index) = self.claim(&mut state, &request, arrived).map_err(Failure::Failed)?;
        ticket.set(Place::Placed(Arc::clone(&claim.batch), claim.rows.clone()));
        state.pending[index].requests.push(Listening {
            ticket: Arc::clone(&ticket),
            rows: claim.rows.clone(),
            deadline: request.deadline,
            listener,
        });
        let promised = matches!(state.leader, Leader::Nobody | Leader::Promised)
            && promises
            && self.limits.delay.is_zero();
        if promised {
            state.leader = Leader::Promised;
        } else if matches!(state.leader, Leader::Nobody | Leader::Promised) {
            self.leave_to_worker(&mut state);
        }
        drop(state);
        if let Err(error) = write(&data, &claim.batch.buffer, claim.rows.clone()) {
            // Before the claim is let go: its leader tells nobody, then.
            ticket.set(Place::Taken);
            let batch = Arc::clone(&claim.batch);
            drop(claim);
            self.leave_asynchronous(&ticket, &batch);
            self.state.lock().stats.invalid += 1;
            return Err(Failure::Failed(error));
        }
        Ok((ticket, promised))
    }

    /// Keeps an asynchronous request from starting, if it has not started. Only the call that does
    /// so answers true, and its listener is not told.
    pub(crate) fn cancel(&self, ticket: &Arc<Ticket<W>>) -> bool {
        let mut state = self.state.lock();
        let is_it = |parked: &Parked<W>| Arc::ptr_eq(&parked.ticket, ticket);
        if let Some(index) = state.parked.iter().position(is_it) {
            let parked = state.parked.remove(index);
            ticket.set(Place::Ended(Failure::Cancelled));
            state.stats.cancelled += 1;
            drop(state);
            drop(parked); // the caller's data: not under the lock
            return true;
        }
        drop(state);
        let Some(batch) = ticket.batch() else { return false };
        let left = self.leave_asynchronous(ticket, &batch);
        if left {
            self.state.lock().stats.cancelled += 1;
        }
        left
    }

    /// The state, for a request that may come.
    fn enter(&self, request: &Request<W>) -> Result<MutexGuard<'_, State<W>>, Failure<W::Error>> {
        let late = request.deadline.is_some_and(|deadline| deadline <= Instant::now());
        let mut state = self.state.lock();
        if state.closed {
            return Err(Failure::Closed);
        }
        if late {
            state.stats.expired += 1;
            return Err(Failure::Expired);
        }
        Ok(state)
    }

    /// Whether a request may claim its rows now, rather than be parked.
    fn has_room(&self, state: &mut State<W>) -> Result<bool, Failure<W::Error>> {
        let room = state.waiting < self.limits.queue && state.parked.is_empty();
        if !room && state.leader == Leader::Promised {
            // Whoever promised may be the one who is about to wait for room.
            self.leave_to_worker(state);
        }
        if !room && self.limits.refuse {
            state.stats.refused += 1;
            return Err(Failure::Full);
        }
        Ok(room)
    }

    /// A caller's claim, as soon as there is room.
    fn take_place(
        &self,
        mut state: MutexGuard<'_, State<W>>,
        request: Request<W>,
    ) -> Result<Claim<W>, Failure<W::Error>> {
        let arrived = Instant::now();
        if self.has_room(&mut state)? {
            let (claim, index) =
                self.claim(&mut state, &request, arrived).map_err(Failure::Failed)?;
            state.pending[index].callers += 1;
            if matches!(state.leader, Leader::Nobody | Leader::Promised) {
                state.leader = Leader::Somebody;
                claim.batch.set(Phase::Lead);
            }
            return Ok(claim);
        }
        let deadline = request.deadline;
        let ticket = Arc::new(Ticket::new());
        state.park(Parked { ticket: Arc::clone(&ticket), request, arrived, source: None });
        drop(state);
        // Not asked meanwhile: rows that it was given would not be written, and a leader wait.
        if let Some(claim) = ticket.wait_granted(deadline) {
            return claim;
        }
        let mut state = self.state.lock();
        let is_it = |parked: &Parked<W>| Arc::ptr_eq(&parked.ticket, &ticket);
        if let Some(index) = state.parked.iter().position(is_it) {
            state.parked.remove(index);
            state.stats.expired += 1;
            return Err(Failure::Expired);
        }
        drop(state);
        // It got its place just now.
        ticket.wait_granted(None).unwrap_or(Err(Failure::Expired))
    }

    /// Gives room in the queue to those who wait for it.
    pub(super) fn grant(&self, state: &mut MutexGuard<'_, State<W>>) -> Vec<Finished<W>> {
        let mut news = Vec::new();
        while state.waiting < self.limits.queue
            && let Some(parked) = state.parked.pop_front()
        {
            let Parked { ticket, request, arrived, source } = parked;
            let late = request.deadline.is_some_and(|deadline| deadline <= Instant::now());
            let claimed = if late {
                state.stats.expired += 1;
                Err(Failure::Expired)
            } else {
                self.claim(state, &request, arrived).map_err(Failure::Failed)
            };
            match (claimed, source) {
                (Ok((claim, index)), None) => {
                    state.pending[index].callers += 1;
                    ticket.set(Place::Granted(claim));
                }
                (Ok((claim, index)), Some((source, listener))) => {
                    let (batch, rows) = (Arc::clone(&claim.batch), claim.rows.clone());
                    ticket.set(Place::Placed(batch, rows.clone()));
                    let pending = &mut state.pending[index];
                    pending.unwritten.push(Unwritten {
                        claim,
                        source,
                        ticket: Arc::clone(&ticket),
                    });
                    let deadline = request.deadline;
                    pending.requests.push(Listening { ticket, rows, deadline, listener });
                }
                (Err(failure), source) => {
                    ticket.set(Place::Ended(failure.clone()));
                    let (source, listener) = source.unzip();
                    state.spent.extend(source);
                    if let Some(listener) = listener.flatten() {
                        news.push(Finished { listener, outcome: Err(failure) });
                    }
                }
            }
        }
        news
    }

    /// Waits for a caller's batch, and leads where it is asked to.
    fn wait(
        &self,
        seat: &mut Seat<'_, W>,
        deadline: Option<Instant>,
        patience: &mut Patience<'_, W::Error>,
    ) -> Result<Share<W>, Failure<W::Error>> {
        let batch = Arc::clone(&seat.batch);
        self.look(&batch);
        let mut phase = batch.phase.lock();
        loop {
            match &*phase {
                Phase::Done { started, output } => {
                    let (late, output) =
                        (deadline.is_some_and(|deadline| deadline < *started), output.clone());
                    drop(phase);
                    seat.taken = false;
                    if late {
                        self.state.lock().stats.expired += 1;
                        return Err(Failure::Expired);
                    }
                    return Ok((output, seat.rows.clone()));
                }
                Phase::Lead => {
                    drop(phase);
                    if batch.take_lead() {
                        if let Err(failure) = self.lead(Some((&batch, patience))) {
                            seat.taken = false;
                            return Err(failure);
                        }
                    } else {
                        self.look(&batch); // somebody else leads
                    }
                    phase = batch.phase.lock();
                }
                Phase::Waiting => match patience.until() {
                    None => phase = batch.changed.wait(phase),
                    Some(end) if Instant::now() < end => {
                        phase = batch.changed.wait_until(phase, end);
                    }
                    Some(_) => {
                        drop(phase);
                        let mut looked = patience.look();
                        if looked.is_ok() && patience.may_ask() {
                            let _away = Away::new(self, &batch);
                            looked = patience.ask();
                        }
                        if let Err(failure) = looked {
                            let left = self.leave(&batch, |state| state.count_given_up(&failure));
                            if left || !matches!(failure, Failure::Expired) {
                                seat.taken = false;
                                return Err(failure);
                            }
                            // It has started, in time or not: its start is compared above.
                            patience.forget_deadline();
                        }
                        phase = batch.phase.lock();
                    }
                },
            }
        }
    }

    /// Looks at a batch for a while before sleeping, unless many do.
    fn look(&self, batch: &Batch<W>) {
        if self.looking.fetch_add(1, Ordering::Relaxed) < self.max_looking {
            look_until(|| batch.hint.load(Ordering::Acquire) == CHANGED);
        }
        self.looking.fetch_sub(1, Ordering::Relaxed);
    }

    /// A caller gives its place up, if its batch has not started: only then is it noted.
    pub(super) fn leave(&self, batch: &Arc<Batch<W>>, note: impl FnOnce(&mut State<W>)) -> bool {
        let mut state = self.state.lock();
        let Some(index) = state.find(batch) else { return false };
        let pending = &mut state.pending[index];
        pending.callers -= 1;
        pending.live -= 1;
        let callers = pending.callers;
        state.waiting -= 1;
        note(&mut state);
        let news = self.grant(&mut state);
        self.pass_offer(&mut state, batch, callers);
        self.unlock(state);
        self.deliver(news);
        true
    }

    /// A caller of a batch has gone, and so many are left: it may be the one who was asked to lead.
    fn pass_offer(&self, state: &mut State<W>, batch: &Batch<W>, callers: usize) {
        if callers > 0 {
            batch.changed.notify_one();
        } else if batch.take_lead() {
            self.hand_over(state, Leader::Worker);
        }
    }

    /// An asynchronous request leaves its batch, if that has not started.
    fn leave_asynchronous(&self, ticket: &Arc<Ticket<W>>, batch: &Arc<Batch<W>>) -> bool {
        let mut state = self.state.lock();
        let Some(index) = state.find(batch) else { return false };
        let pending = &mut state.pending[index];
        let is_it = |request: &Listening<W>| Arc::ptr_eq(&request.ticket, ticket);
        let Some(place) = pending.requests.iter().position(is_it) else { return false };
        let left = pending.requests.remove(place);
        pending.live -= 1;
        state.waiting -= 1;
        ticket.set(Place::Ended(Failure::Cancelled));
        let news = self.grant(&mut state);
        self.unlock(state);
        drop(left);
        self.deliver(news);
        true
    }
}
