//! What ends a caller's wait before its batch does.

use super::{Failure, State, Work};
use std::time::{Duration, Instant};

/// How often a caller is asked whether to go on: soon enough for a person, and rare enough to cost
/// nothing.
const PERIOD: Duration = Duration::from_millis(20);

/// Asks a caller whether to go on.
pub(crate) type Ask<'a, E> = &'a dyn Fn() -> Result<(), E>;

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
        let next = self.ask.map(|_| self.asked + PERIOD);
        let next = if self.over.is_some() { Some(self.asked) } else { next };
        self.deadline.into_iter().chain(next).min()
    }

    /// Fails where it is over. The caller is asked, which may run any code of its: never under a
    /// lock.
    pub(super) fn look(&mut self) -> Result<(), Failure<E>> {
        if let Some(failure) = self.over.take() {
            return Err(failure);
        }
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Failure::Expired);
        }
        if let Some(ask) = self.ask
            && self.asked.elapsed() >= PERIOD
        {
            let answer = ask();
            self.asked = Instant::now();
            answer.map_err(Failure::Failed)?;
        }
        Ok(())
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
