//! The token ring: who may touch which slot.
//!
//! A slot's token walks Host -> Copy -> Compute and the slot is the host's again when its copy is
//! done: what the kernel then still reads is the slot's device memory, which the next copy waits for
//! on the device. A token is handed on by moving it, so a step cannot be taken twice, left out or
//! taken by somebody else.
#![forbid(unsafe_code)]

use super::plan::{Chunk, Piece};
use crate::error::Result;
use std::marker::PhantomData;

/// What the ring drives.
pub(crate) trait Lane: Sync {
    /// Copies a piece of the input to the slot's host memory, validated; returns its sum of
    /// squares. Called by any thread, while the host holds the slot's token.
    fn stage(&self, slot: usize, piece: &Piece) -> Result<f64>;

    /// Enqueues the copy of a chunk to the slot's device memory, behind what reads that now.
    fn copy(&self, slot: usize, chunk: &Chunk) -> Result<()>;

    /// Enqueues what encodes the chunk, behind its copy.
    fn compute(&self, slot: usize, chunk: &Chunk) -> Result<()>;

    /// Whether the last copy from the slot's host memory is done.
    fn is_copied(&self, slot: usize) -> Result<bool>;

    /// Waits until it is.
    fn wait_copied(&self, slot: usize) -> Result<()>;

    /// Waits until nothing enqueued uses any slot.
    fn drain(&self) -> Result<()>;
}

/// The host holds the slot: it may be staged into.
#[derive(Debug)]
pub(crate) enum Host {}
/// Its copy is enqueued.
#[derive(Debug)]
pub(crate) enum Copy {}
/// Its kernel is enqueued.
#[derive(Debug)]
pub(crate) enum Compute {}

/// The right to take the slot's next step.
#[derive(Debug)]
#[must_use = "a slot whose token is lost is not used again before the run ends"]
pub(crate) struct Token<Holder> {
    slot: usize,
    holder: PhantomData<Holder>,
}

impl<Holder> Token<Holder> {
    fn new(slot: usize) -> Self {
        Self { slot, holder: PhantomData }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody's.
    Free,
    /// The host's; nothing is enqueued.
    Host,
    /// Its copy is enqueued, and maybe its kernel. The slot is the host's when the copy is done.
    InFlight,
    /// A step failed: what of it is enqueued is not known.
    Failed,
}

/// The slots of an engine, used in turn.
#[derive(Debug)]
pub(crate) struct Ring {
    states: Vec<State>,
    next: usize,
}

impl Ring {
    pub(crate) fn new(slots: usize) -> Self {
        Self { states: vec![State::Free; slots], next: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.states.len()
    }

    /// The slot that the next chunk will have.
    pub(crate) fn next_slot(&self) -> usize {
        self.next
    }

    /// The slots for the chunks of one round.
    pub(crate) fn run<'r, L: Lane>(&'r mut self, lane: &'r L) -> Result<Run<'r, L>> {
        self.settle(lane)?;
        Ok(Run { ring: self, lane })
    }

    /// Where a step of a run failed, waits until nothing uses any slot.
    pub(crate) fn settle(&mut self, lane: &impl Lane) -> Result<()> {
        if self.states.contains(&State::Failed) {
            lane.drain()?;
            self.states.fill(State::Free);
        }
        Ok(())
    }
}

/// A run of chunks through the ring.
///
/// Tokens are taken by value, as whoever takes a step has no right to it any more.
pub(crate) struct Run<'r, L> {
    ring: &'r mut Ring,
    lane: &'r L,
}

#[allow(clippy::needless_pass_by_value)]
impl<L: Lane> Run<'_, L> {
    /// Slots that are held or in flight, as far as the host knows.
    pub(crate) fn occupied(&self) -> usize {
        self.ring.states.iter().filter(|&&state| state != State::Free).count()
    }

    /// The next slot, if the host may have it now; `wait` says whether to wait for it.
    ///
    /// `None` also where its token is still out.
    pub(crate) fn take(&mut self, wait: bool) -> Result<Option<Token<Host>>> {
        let slot = self.ring.next;
        match self.ring.states[slot] {
            State::Free => {}
            State::InFlight if wait => self.lane.wait_copied(slot)?,
            State::InFlight if self.lane.is_copied(slot)? => {}
            State::InFlight | State::Host | State::Failed => return Ok(None),
        }
        self.ring.states[slot] = State::Host;
        self.ring.next = (slot + 1) % self.ring.len();
        Ok(Some(Token::new(slot)))
    }

    pub(crate) fn copy(&mut self, token: Token<Host>, chunk: &Chunk) -> Result<Token<Copy>> {
        self.step(token.slot, |lane| lane.copy(token.slot, chunk))?;
        Ok(Token::new(token.slot))
    }

    pub(crate) fn compute(&mut self, token: Token<Copy>, chunk: &Chunk) -> Result<Token<Compute>> {
        self.step(token.slot, |lane| lane.compute(token.slot, chunk))?;
        Ok(Token::new(token.slot))
    }

    /// Lets a slot go its way.
    pub(crate) fn send_off(&mut self, token: Token<Compute>) {
        debug_assert_eq!(self.ring.states[token.slot], State::InFlight);
    }

    fn step(&mut self, slot: usize, step: impl FnOnce(&L) -> Result<()>) -> Result<()> {
        // Until it is done, as it may also panic.
        self.ring.states[slot] = State::Failed;
        step(self.lane)?;
        self.ring.states[slot] = State::InFlight;
        Ok(())
    }
}

impl<L> Drop for Run<'_, L> {
    fn drop(&mut self) {
        // The tokens are gone with the run, and nobody stages any more.
        for state in &mut self.ring.states {
            if *state == State::Host {
                *state = State::Free;
            }
        }
    }
}
