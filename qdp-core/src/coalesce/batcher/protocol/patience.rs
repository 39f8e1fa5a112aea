//! What ends a caller's wait before its batch does.

use super::{Failure, State, Work};
use std::time::{Duration, Instant};

/// How often a caller is asked whether to go on: soon enough for a person, and rare enough to cost
/// nothing.
const PERIOD: Duration = Duration::from_millis(20);

/// Asks a caller whether to go on.
pub(crate) struct Ask<'a, E> {
    /// Makes sure that there is a worker, who leads while the caller is asked.
    pub(crate) prepare: &'a dyn Fn() -> Result<(), E>,
    pub(crate) ask: &'a dyn Fn() -> Result<(), E>,
}

/// Until when a caller waits.
pub(super) struct Patience<'a, E> {
    deadline: Option<Instant>,
    ask: Option<Ask<'a, E>>,
    asked: Instant,
    /// Why it waits no longer, where that could not be said yet.
    over: Option<Failure<E>>,
}

impl<'a, E: Clone> Patience<'a, E> {
    pub(super) fn new(deadline: Option<Instant>, ask: Option<Ask<'a, E>>) -> Self {
        Self { deadline, ask, asked: Instant::now(), over: None }
    }

    /// When to look whether it is over.
    pub(super) fn until(&self) -> Option<Instant> {
        let next = self.ask.as_ref().map(|_| self.asked + PERIOD);
        let next = if self.over.is_some() { Some(self.asked) } else { next };
        self.deadline.into_iter().chain(next).min()
    }

    /// Fails where the deadline has passed.
    pub(super) fn look(&mut self) -> Result<(), Failure<E>> {
        if let Some(failure) = self.over.take() {
            return Err(failure);
        }
        match self.deadline {
            Some(deadline) if deadline <= Instant::now() => Err(Failure::Expired),
            _ => Ok(()),
        }
    }

    /// Whether to ask the caller now, if somebody can lead meanwhile.
    pub(super) fn may_ask(&mut self) -> bool {
        let Some(ask) = self.ask.as_ref().filter(|_| self.asked.elapsed() >= PERIOD) else {
            return false;
        };
        self.asked = Instant::now();
        (ask.prepare)().is_ok()
    }

    /// Asks the caller, which may run any code of its: never under a lock, nor by a leader, nor by
    /// somebody who might be offered to lead.
    pub(super) fn ask(&mut self) -> Result<(), Failure<E>> {
        let answer = self.ask.as_ref().map_or(Ok(()), |ask| (ask.ask)());
        self.asked = Instant::now();
        answer.map_err(Failure::Failed)
    }

    /// It is over, and whoever waits next is to be told why.
    pub(super) fn end(&mut self, failure: Failure<E>) {
        self.over = Some(failure);
    }

    /// Fails where the caller was called away and has not been told.
    pub(super) fn called_away(&mut self) -> Result<(), Failure<E>> {
        match self.over.take() {
            Some(failure @ Failure::Failed(_)) => Err(failure),
            _ => Ok(()),
        }
    }

    /// The deadline has no meaning any more.
    pub(super) fn forget_deadline(&mut self) {
        self.deadline = None;
    }
}

impl<W: Work> State<W> {
    /// Counts a request that was given up.
    pub(super) fn count_given_up(&mut self, failure: &Failure<W::Error>) {
        match failure {
            Failure::Expired => self.stats.expired += 1,
            _ => self.stats.cancelled += 1,
        }
    }
}
