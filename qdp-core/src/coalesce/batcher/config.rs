//! How a batcher is run.

use crate::error::{Error, Result};
use std::time::Duration;

/// What becomes of a request that the queue has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// It waits until there is room, behind those that wait already.
    #[default]
    Wait,
    /// It fails with [`Error::QueueFull`].
    Refuse,
}

/// How a [`Batcher`](super::Batcher) is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatcherConfig {
    /// How long the oldest request waits for others where nothing is in flight.
    pub max_delay: Duration,
    /// The most bytes of the input of a batch, and of its states. A request beyond it goes straight
    /// to the engine.
    pub max_batch_bytes: usize,
    /// The most samples of a batch, likewise.
    pub max_batch_samples: usize,
    /// How many requests may wait for their batch to start.
    pub queue: usize,
    /// What becomes of others.
    pub when_full: WhenFull,
}

impl Default for BatcherConfig {
    fn default() -> Self {
        Self {
            max_delay: Duration::ZERO,
            max_batch_bytes: 16 << 20,
            max_batch_samples: usize::MAX,
            queue: 1024,
            when_full: WhenFull::Wait,
        }
    }
}

/// A delay is for the sake of throughput; one of hours is a mistake in its unit.
const MAX_DELAY: Duration = Duration::from_mins(1);

impl BatcherConfig {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`].
    pub fn validate(&self) -> Result<()> {
        let positive = |argument, value: usize| match value {
            0 => Err(Error::invalid(argument, "a positive integer", value)),
            _ => Ok(()),
        };
        positive("max_batch_bytes", self.max_batch_bytes)?;
        positive("max_batch_samples", self.max_batch_samples)?;
        positive("queue", self.queue)?;
        if self.max_delay > MAX_DELAY {
            let (expected, got) = (MAX_DELAY.as_micros(), self.max_delay.as_micros());
            return Err(Error::invalid("max_delay_us", format!("at most {expected}"), got));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        let good = BatcherConfig::default();
        assert_eq!(good.validate(), Ok(()));
        let bad = [
            ("max_batch_bytes", BatcherConfig { max_batch_bytes: 0, ..good.clone() }),
            ("max_batch_samples", BatcherConfig { max_batch_samples: 0, ..good.clone() }),
            ("queue", BatcherConfig { queue: 0, ..good.clone() }),
            ("max_delay_us", BatcherConfig { max_delay: Duration::MAX, ..good.clone() }),
        ];
        for (name, config) in bad {
            let error = config.validate().unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument, .. } if argument == name));
        }
    }
}
