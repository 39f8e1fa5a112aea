//! Leading: which batch is next, running it, and who leads then.

use super::super::sync::look_until;
use super::arrive::Away;
use super::patience::Patience;
use super::ticket::Place;
use super::{
    Arc, Batch, Failure, Finished, Leader, Ordering, Pending, Phase, Protocol, SEALED, State,
    Unwritten, WAITING, Work,
};
use std::time::Instant;

/// Leadership: handed over where it is dropped, by a panic, too.
pub(super) struct Leading<'a, W: Work> {
    protocol: &'a Protocol<W>,
    held: bool,
    /// Who leads what nobody waits for in a call.
    otherwise: Leader,
}

impl<'a, W: Work> Leading<'a, W> {
    pub(super) fn new(protocol: &'a Protocol<W>) -> Self {
        Self::otherwise(protocol, Leader::Worker)
    }

    fn otherwise(protocol: &'a Protocol<W>, otherwise: Leader) -> Self {
        Self { protocol, held: true, otherwise }
    }
}

impl<W: Work> Drop for Leading<'_, W> {
    fn drop(&mut self) {
        if self.held {
            let mut state = self.protocol.state.lock();
            state.busy = true;
            self.protocol.hand_over(&mut state, self.otherwise);
            self.protocol.unlock(state);
        }
    }
}

/// The batch that a caller waits for, and for how long.
pub(super) type Own<'a, 'ask, W> = (&'a Arc<Batch<W>>, &'a mut Patience<'ask, <W as Work>::Error>);

/// What a leader does next.
enum Next<W: Work> {
    /// Run a batch, which started at this instant.
    Run(Pending<W>, Instant),
    /// Nothing: whoever asked leads no more.
    Nothing,
    /// Look whether to leave.
    Leave,
}

impl<W: Work> Batch<W> {
    /// Takes leadership, where it is offered to whoever waits for this batch.
    pub(super) fn take_lead(&self) -> bool {
        let mut phase = self.phase.lock();
        let offered = matches!(*phase, Phase::Lead);
        if offered {
            *phase = Phase::Waiting;
            self.hint.store(WAITING, Ordering::Release);
        }
        offered
    }

    /// Waits until every claim is written. None are added, as the batch has started.
    fn wait_written(&self) {
        if self.unwritten.fetch_or(SEALED, Ordering::AcqRel) == 0 {
            return;
        }
        let is_written = || self.unwritten.load(Ordering::Acquire) == SEALED;
        if look_until(is_written) {
            return;
        }
        let mut phase = self.phase.lock();
        while !is_written() {
            phase = self.written.wait(phase);
        }
    }
}

impl<W: Work> Protocol<W> {
    /// Leads until `own` is done; where there is none, for one batch. Fails where the patience of
    /// `own` ended before: it has left its batch, then.
    pub(super) fn lead(&self, own: Option<Own<'_, '_, W>>) -> Result<(), Failure<W::Error>> {
        self.lead_as(Leading::new(self), own)
    }

    fn lead_as(
        &self,
        mut leading: Leading<'_, W>,
        mut own: Option<Own<'_, '_, W>>,
    ) -> Result<(), Failure<W::Error>> {
        // Who leads as promised has tasks of its own, none of which runs meanwhile.
        let promised = leading.otherwise == Leader::Promised;
        let finished = loop {
            let until = own.as_ref().and_then(|(_, patience)| patience.until());
            let finished = match self.next(until, promised) {
                Next::Run(pending, at) => self.run(pending, at, !promised),
                Next::Leave => {
                    let Some((batch, patience)) = &mut own else { continue };
                    let given_up = |patience: &mut Patience<'_, _>, failure| {
                        if self.leave(batch, |state| state.count_given_up(&failure)) {
                            return Err(failure);
                        }
                        patience.end(failure);
                        Ok(())
                    };
                    if let Err(failure) = patience.look() {
                        given_up(patience, failure)?;
                    } else if patience.may_ask() {
                        let away = Away::new(self, batch);
                        drop(leading);
                        let asked = patience.ask();
                        drop(away);
                        // Somebody else leads now.
                        return asked.or_else(|failure| given_up(patience, failure));
                    }
                    continue;
                }
                Next::Nothing => {
                    leading.held = false;
                    return Ok(());
                }
            };
            if own.as_ref().is_none_or(|(batch, _)| batch.is_done()) {
                break finished;
            }
            self.state.lock().busy = true;
            self.deliver(finished);
        };
        if finished.is_empty() {
            return Ok(());
        }
        // The next batch first: those who listen may be slow.
        self.state.lock().telling += 1;
        drop(leading);
        self.deliver(finished);
        let mut state = self.state.lock();
        state.telling -= 1;
        if state.closed {
            self.idle.notify_all();
        }
        Ok(())
    }

    /// Leads what is pending now, as was promised, unless somebody else does. What takes long is
    /// left to the worker.
    pub(crate) fn lead_promised(&self) {
        let mut batches = self.state.lock().pending.len().max(1);
        loop {
            let mut state = self.state.lock();
            if state.leader != Leader::Promised {
                return;
            }
            if batches == 0 {
                return self.leave_to_worker(&mut state);
            }
            batches -= 1;
            state.leader = Leader::Somebody;
            drop(state);
            // It waits for nothing of its own.
            let _ = self.lead_as(Leading::otherwise(self, Leader::Promised), None);
        }
    }

    pub(super) fn leave_to_worker(&self, state: &mut State<W>) {
        state.leader = Leader::Worker;
        self.worker.notify_all();
    }

    /// Takes the batch that is next out of the pending ones, once it is due; waits for that `until`
    /// then at most. Only a `short` one: another is left to the worker.
    fn next(&self, until: Option<Instant>, short: bool) -> Next<W> {
        let mut state = self.state.lock();
        loop {
            self.drop_abandoned(&mut state);
            if !state.spent.is_empty() {
                self.unlock(state);
                state = self.state.lock();
                continue;
            }
            let now = Instant::now();
            let (closed, busy) = (state.closed, state.busy);
            let due = |pending: &Pending<W>| pending.due(self.limits.delay, closed, busy, now);
            let is_due = |pending: &Pending<W>| due(pending).is_ok();
            if let Some(index) = first(&state.pending, is_due) {
                let next = &state.pending[index];
                if short && !self.work.is_short(&next.batch.key, next.rows) {
                    self.leave_to_worker(&mut state);
                    self.unlock(state);
                    return Next::Nothing;
                }
                let pending = state.pending.remove(index);
                if let Ok(reason) = due(&pending) {
                    let waited = now.saturating_duration_since(pending.arrived);
                    let claims = u32::try_from(pending.claims).unwrap_or(u32::MAX);
                    let wait = waited.saturating_mul(claims).saturating_sub(pending.later);
                    let size = (pending.live, pending.rows);
                    state.stats.start(size, reason, waited, wait);
                }
                state.waiting -= pending.live;
                let news = self.grant(&mut state);
                self.unlock(state);
                self.deliver(news);
                return Next::Run(pending, now);
            }
            match state.pending.iter().filter_map(|pending| due(pending).err()).min() {
                None => {
                    self.release(&mut state);
                    return Next::Nothing;
                }
                Some(_) if until.is_some_and(|until| until <= now) => return Next::Leave,
                Some(time) => {
                    let time = until.map_or(time, |until| until.min(time));
                    state = self.due.wait_until(state, time);
                }
            }
        }
    }

    /// Runs a batch and publishes its result; returns what its listeners are to be told.
    fn run(&self, pending: Pending<W>, at: Instant, gather: bool) -> Vec<Finished<W>> {
        let Pending { batch, rows, requests, unwritten, full, .. } = pending;
        let (mut invalid, mut expired) = (0, 0);
        for Unwritten { claim, source, ticket } in unwritten {
            let rows = claim.rows.clone();
            if let Err(error) = self.work.write(&batch.key, &batch.buffer, rows, source)
                && ticket.batch().is_some()
            {
                invalid += 1;
                ticket.set(Place::Ended(Failure::Failed(error)));
            }
            drop(claim);
        }
        batch.wait_written();
        let output = self.work.run(&batch.key, &batch.buffer, rows, gather);
        let mut finished = Vec::new();
        for request in requests {
            let late = request.deadline.is_some_and(|deadline| deadline < at);
            if late && request.ticket.batch().is_some() {
                expired += 1;
                request.ticket.set(Place::Ended(Failure::Expired));
            }
            let outcome = request.ticket.outcome(|| (output.clone(), request.rows));
            if let (Some(listener), Some(outcome)) = (request.listener, outcome) {
                finished.push(Finished { listener, outcome });
            }
        }
        batch.set(Phase::Done { started: at, output });
        batch.changed.notify_all();
        batch.done.notify_all();
        if expired + invalid > 0 {
            let mut state = self.state.lock();
            state.stats.expired += expired;
            state.stats.invalid += invalid;
        }
        self.work.recycle(&batch.buffer, full);
        finished
    }

    /// Gives leadership to somebody who waits for the batch that is next, where nobody does to
    /// `otherwise`, and where nothing is pending, to nobody.
    pub(super) fn hand_over(&self, state: &mut State<W>, otherwise: Leader) {
        self.drop_abandoned(state);
        match first(&state.pending, |_| true).map(|index| &state.pending[index]) {
            None => self.release(state),
            Some(next) if next.callers > 0 => {
                next.batch.set(Phase::Lead);
                next.batch.changed.notify_one();
                state.leader = Leader::Somebody;
            }
            Some(_) => {
                // A promise is not kept to what is closed: whoever waits for its end might wait in
                // the way of that.
                if state.closed || otherwise == Leader::Worker {
                    self.leave_to_worker(state);
                } else {
                    state.leader = otherwise;
                }
            }
        }
    }

    fn release(&self, state: &mut State<W>) {
        state.leader = Leader::Nobody;
        state.busy = false;
        if state.closed {
            self.idle.notify_all();
            self.worker.notify_all();
        }
    }

    /// Lets go of batches that nobody wants any more.
    fn drop_abandoned(&self, state: &mut State<W>) {
        let is_abandoned = |pending: &mut Pending<W>| pending.live == 0;
        for Pending { batch, unwritten, .. } in state.pending.extract_if(.., is_abandoned) {
            state.spent.extend(unwritten.into_iter().map(|Unwritten { source, .. }| source));
            if batch.unwritten.load(Ordering::Acquire) == 0 {
                self.work.recycle(&batch.buffer, false);
            }
        }
    }
}

/// The first of the highest level, of those that are `ready`.
fn first<W: Work>(pending: &[Pending<W>], ready: impl Fn(&Pending<W>) -> bool) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (index, candidate) in pending.iter().enumerate() {
        let higher = best.is_none_or(|best| pending[best].batch.level < candidate.batch.level);
        if higher && ready(candidate) {
            best = Some(index);
        }
    }
    best
}
