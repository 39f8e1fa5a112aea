//! Whether a long call should go on.

#![forbid(unsafe_code)]

use crate::engine::EncodeOptions;
use crate::error::Result;
use std::time::{Duration, Instant};

/// Soon enough for a person, and rare enough to cost nothing.
const PERIOD: Duration = Duration::from_millis(20);

/// Asks the caller of a long call, now and then, whether to go on.
#[derive(Debug)]
pub(crate) struct Interrupt {
    ask: Option<fn() -> Result<()>>,
    asked: Instant,
}

impl Interrupt {
    pub(crate) fn new(options: &EncodeOptions) -> Self {
        Self { ask: options.interrupt, asked: Instant::now() }
    }

    /// Whether there is anybody to ask.
    pub(crate) fn is_asked(&self) -> bool {
        self.ask.is_some()
    }

    /// Whether it is time to ask.
    pub(crate) fn is_due(&self) -> bool {
        self.ask.is_some() && self.asked.elapsed() >= PERIOD
    }

    /// Asks, unless it is too soon; on the caller's thread, which may run any code of the caller's:
    /// nobody who holds a lock asks.
    ///
    /// # Errors
    ///
    /// What the caller answers: [`Error::Interrupted`](crate::Error::Interrupted).
    pub(crate) fn poll(&mut self) -> Result<()> {
        let Some(ask) = self.ask.filter(|_| self.is_due()) else {
            return Ok(());
        };
        let answer = ask();
        self.asked = Instant::now();
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    fn long_ago(ask: Option<fn() -> Result<()>>) -> Interrupt {
        let asked = Instant::now().checked_sub(PERIOD).expect("the clock runs for longer");
        Interrupt { ask, asked }
    }

    #[test]
    fn the_answer_ends_the_call_once_it_is_time() {
        let stop = || Err(Error::Interrupted);
        assert_eq!(long_ago(Some(stop)).poll(), Err(Error::Interrupted));
        assert_eq!(long_ago(None).poll(), Ok(()));
        let options = EncodeOptions { interrupt: Some(stop), ..EncodeOptions::default() };
        let soon = Interrupt { asked: Instant::now() + PERIOD, ..Interrupt::new(&options) };
        assert!(soon.is_asked());
        assert_eq!({ soon }.poll(), Ok(()));
    }
}
