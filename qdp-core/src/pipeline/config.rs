//! How host input is brought to a device.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Most slots that make sense: with more, memory is held that no copy ever waits for.
const MAX_SLOTS: usize = 1024;
/// A copy of less costs more to enqueue than to do.
const LEAST_CHUNK: usize = 4 << 10;
/// A part of a split sample of any type fits.
const LEAST_SLOT: usize = 16 * super::plan::SPLIT_ALIGN;
const MOST_CHUNK: usize = 1 << 30;

/// Settings of an engine's pipeline. [`PipelineConfig::default`] takes them from the environment where
/// that names others than the built-in ones (`QDP_PIPELINE_SLOTS`, `QDP_PIPELINE_MIN_CHUNK_BYTES`,
/// `QDP_PIPELINE_MAX_CHUNK_BYTES`, `QDP_PIPELINE_DIRECT_BYTES`, `QDP_PIPELINE_STAGING_THREADS`,
/// `QDP_PIPELINE_MAX_BATCH_BYTES`, `QDP_PIPELINE_MAX_BATCH_SAMPLES`, `QDP_PIPELINE_TIMING`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineConfig {
    /// Slots of the ring, each one staging buffer in page-locked memory and one in device memory.
    pub slots: usize,
    /// Bytes of the first chunk of a call; chunks double up to the largest, so that the link has
    /// something to do early.
    pub min_chunk_bytes: usize,
    /// Bytes of the largest chunk, and of a slot. A longer sample is split.
    pub max_chunk_bytes: usize,
    /// Input of up to so many bytes takes the direct path: one chunk, copied and encoded on one
    /// stream.
    pub direct_bytes: usize,
    /// Threads that stage, with the calling thread as one of them; at most as many as the default,
    /// which the environment may set, says: the process's engines share them.
    pub staging_threads: usize,
    /// Most bytes of input in one round; `None` is a quarter of the device's free memory, at least
    /// 256 MiB and at most 1 GiB. Between rounds other calls have their turn.
    pub max_batch_bytes: Option<usize>,
    /// Most samples in one round; `None` is as many as the bytes allow.
    pub max_batch_samples: Option<usize>,
    /// Whether to measure how far copies and kernels overlap: two more events for each of them.
    pub timing: bool,
}

impl Default for PipelineConfig {
    fn default() -> Self {
        crate::config::Config::get().pipeline.clone()
    }
}

impl PipelineConfig {
    /// The built-in defaults, whatever the environment says, for a process of so many threads.
    pub(crate) fn built_in(num_threads: usize) -> Self {
        Self {
            slots: 16,
            min_chunk_bytes: 512 << 10,
            max_chunk_bytes: 4 << 20,
            direct_bytes: 512 << 10,
            staging_threads: staging_threads(num_threads),
            max_batch_bytes: None,
            max_batch_samples: None,
            timing: false,
        }
    }

    /// The same for chunks of at most so many bytes: what is larger is lowered to that.
    #[must_use]
    pub fn within(self, max_chunk_bytes: usize) -> Self {
        Self {
            min_chunk_bytes: self.min_chunk_bytes.min(max_chunk_bytes),
            direct_bytes: self.direct_bytes.min(max_chunk_bytes),
            max_chunk_bytes,
            ..self
        }
    }

    /// Checks that the settings go together.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] names the setting.
    pub fn validate(&self) -> Result<()> {
        let check = |fine: bool, argument, expected: String, got: usize| {
            if fine { Ok(()) } else { Err(Error::invalid(argument, expected, got)) }
        };
        check(
            (2..=MAX_SLOTS).contains(&self.slots),
            "slots",
            format!("2 to {MAX_SLOTS}"),
            self.slots,
        )?;
        check(
            (LEAST_SLOT..=MOST_CHUNK).contains(&self.max_chunk_bytes),
            "max_chunk_bytes",
            format!("{LEAST_SLOT} to {MOST_CHUNK}"),
            self.max_chunk_bytes,
        )?;
        check(
            (LEAST_CHUNK..=self.max_chunk_bytes).contains(&self.min_chunk_bytes),
            "min_chunk_bytes",
            format!("{LEAST_CHUNK} to max_chunk_bytes ({})", self.max_chunk_bytes),
            self.min_chunk_bytes,
        )?;
        check(
            self.direct_bytes <= self.max_chunk_bytes,
            "direct_bytes",
            format!("at most max_chunk_bytes ({})", self.max_chunk_bytes),
            self.direct_bytes,
        )?;
        check(
            self.staging_threads >= 1,
            "staging_threads",
            "1 or more".to_owned(),
            self.staging_threads,
        )?;
        for (argument, value) in [
            ("max_batch_bytes", self.max_batch_bytes),
            ("max_batch_samples", self.max_batch_samples),
        ] {
            check(value != Some(0), argument, "1 or more".to_owned(), 0)?;
        }
        Ok(())
    }
}

/// Copies saturate the memory before they run out of cores; with as many threads as cores they slow
/// each other, and everybody else, down.
fn staging_threads(num_threads: usize) -> usize {
    (num_threads * 3 / 4).clamp(1, 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        let config = PipelineConfig::built_in(16);
        assert_eq!(config.validate(), Ok(()));
        let refused = |config: PipelineConfig| match config.validate() {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        let base = || config.clone();
        assert_eq!(refused(PipelineConfig { slots: 1, ..base() }), "slots");
        assert_eq!(refused(PipelineConfig { max_chunk_bytes: 0, ..base() }), "max_chunk_bytes");
        assert_eq!(
            refused(PipelineConfig { min_chunk_bytes: 8 << 20, ..base() }),
            "min_chunk_bytes"
        );
        assert_eq!(refused(PipelineConfig { direct_bytes: 5 << 20, ..base() }), "direct_bytes");
        assert_eq!(refused(PipelineConfig { staging_threads: 0, ..base() }), "staging_threads");
        assert_eq!(
            refused(PipelineConfig { max_batch_bytes: Some(0), ..base() }),
            "max_batch_bytes"
        );
        assert_eq!(
            refused(PipelineConfig { max_batch_samples: Some(0), ..base() }),
            "max_batch_samples"
        );
    }

    #[test]
    fn smaller_chunks_take_the_others_along() {
        let config = PipelineConfig::built_in(16).within(256 << 10);
        assert_eq!(config.validate(), Ok(()));
        assert_eq!((config.min_chunk_bytes, config.direct_bytes), (256 << 10, 256 << 10));
        let config = PipelineConfig::built_in(16);
        assert_eq!(config.clone().within(8 << 20).min_chunk_bytes, config.min_chunk_bytes);
    }

    #[test]
    fn a_core_is_left_to_others() {
        assert_eq!([1, 2, 4, 16, 64].map(staging_threads), [1, 1, 3, 12, 12]);
    }
}
