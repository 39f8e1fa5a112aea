//! Where a request is that is not simply a caller in a batch.

use super::{Arc, Batch, Claim, Condvar, Failure, Mutex, Outcome, Phase, Share, Work};
use std::ops::Range;
use std::time::Instant;

/// Where a request is.
pub(super) enum Place<W: Work> {
    /// It waits for room in the queue.
    Parked,
    /// A caller's rows, for it to write.
    Granted(Claim<W>),
    /// Whoever made the request knows the rest.
    Taken,
    /// In a batch.
    Placed(Arc<Batch<W>>, Range<usize>),
    /// It has no result.
    Ended(Failure<W::Error>),
}

/// A request that is asynchronous, or was parked.
pub(crate) struct Ticket<W: Work> {
    place: Mutex<Place<W>>,
    changed: Condvar,
}

impl<W: Work> Ticket<W> {
    pub(super) fn new() -> Self {
        Self { place: Mutex::new(Place::Parked), changed: Condvar::new() }
    }

    pub(super) fn set(&self, place: Place<W>) {
        let before = std::mem::replace(&mut *self.place.lock(), place);
        self.changed.notify_all();
        drop(before); // not under the lock
    }

    /// What became of an asynchronous request whose batch is done; `None` where whoever made it
    /// knows already.
    pub(super) fn outcome(&self, share: impl FnOnce() -> Share<W>) -> Option<Outcome<W>> {
        match &*self.place.lock() {
            Place::Placed(..) => Some(Ok(share())),
            Place::Ended(failure) => Some(Err(failure.clone())),
            _ => None,
        }
    }

    pub(super) fn batch(&self) -> Option<Arc<Batch<W>>> {
        match &*self.place.lock() {
            Place::Placed(batch, _) => Some(Arc::clone(batch)),
            _ => None,
        }
    }

    /// Waits for room; `None` where there was none until the deadline.
    pub(super) fn wait_granted(
        &self,
        deadline: Option<Instant>,
    ) -> Option<Result<Claim<W>, Failure<W::Error>>> {
        let mut place = self.place.lock();
        loop {
            match std::mem::replace(&mut *place, Place::Taken) {
                Place::Granted(claim) => return Some(Ok(claim)),
                Place::Ended(failure) => return Some(Err(failure)),
                other => *place = other,
            }
            place = match deadline {
                None => self.changed.wait(place),
                Some(end) if Instant::now() < end => self.changed.wait_until(place, end),
                Some(_) => return None,
            };
        }
    }

    /// Whether an asynchronous request is done, one way or another.
    pub(crate) fn is_done(&self) -> bool {
        match &*self.place.lock() {
            Place::Placed(batch, _) => batch.is_done(),
            Place::Ended(_) => true,
            _ => false,
        }
    }

    /// Waits until an asynchronous request is done.
    pub(crate) fn wait(&self) -> Outcome<W> {
        let mut place = self.place.lock();
        let (batch, rows) = loop {
            match &*place {
                Place::Placed(batch, rows) => break (Arc::clone(batch), rows.clone()),
                Place::Ended(failure) => return Err(failure.clone()),
                _ => place = self.changed.wait(place),
            }
        };
        drop(place);
        let mut phase = batch.phase.lock();
        let output = loop {
            match &*phase {
                Phase::Done { output, .. } => break output.clone(),
                _ => phase = batch.done.wait(phase),
            }
        };
        drop(phase);
        // Its leader says so first where the request alone failed.
        match &*self.place.lock() {
            Place::Ended(failure) => Err(failure.clone()),
            _ => Ok((output, rows)),
        }
    }
}
