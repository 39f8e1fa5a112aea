//! The one place that reads the environment. Parsed once, at first use.

use crate::pipeline::config::PipelineConfig;
use std::str::FromStr;
use std::sync::OnceLock;

/// Settings of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Threads of the CPU backend and of host staging (`QDP_NUM_THREADS`; default: as many as the
    /// process may use).
    pub num_threads: usize,
    /// Defaults of an engine's pipeline (`QDP_PIPELINE_*`).
    pub pipeline: PipelineConfig,
}

impl Config {
    /// The process's configuration.
    pub fn get() -> &'static Self {
        static CONFIG: OnceLock<Config> = OnceLock::new();
        CONFIG.get_or_init(|| {
            #[allow(clippy::disallowed_methods)] // this is the module that reads the environment
            Self::parse(|name| std::env::var(name).ok())
        })
    }

    fn parse(read: impl Fn(&str) -> Option<String>) -> Self {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        // More would only exhaust the system.
        let num_threads =
            positive(&read, "QDP_NUM_THREADS").map_or_else(available, |n| n.min(1024));
        let built_in = PipelineConfig::built_in(num_threads);
        let bytes = |name, usual| positive(&read, name).unwrap_or(usual);
        let largest = bytes("QDP_PIPELINE_MAX_CHUNK_BYTES", built_in.max_chunk_bytes);
        let usual = built_in.clone().within(largest);
        let pipeline = PipelineConfig {
            slots: bytes("QDP_PIPELINE_SLOTS", built_in.slots),
            min_chunk_bytes: bytes("QDP_PIPELINE_MIN_CHUNK_BYTES", usual.min_chunk_bytes),
            max_chunk_bytes: largest,
            direct_bytes: parsed(&read, "QDP_PIPELINE_DIRECT_BYTES", |_| true)
                .unwrap_or(usual.direct_bytes),
            staging_threads: bytes("QDP_PIPELINE_STAGING_THREADS", built_in.staging_threads)
                .min(1024),
            max_batch_bytes: positive(&read, "QDP_PIPELINE_MAX_BATCH_BYTES"),
            max_batch_samples: positive(&read, "QDP_PIPELINE_MAX_BATCH_SAMPLES"),
            timing: parsed(&read, "QDP_PIPELINE_TIMING", |&on: &u8| on <= 1) == Some(1),
        };
        let pipeline = match pipeline.validate() {
            Ok(()) => pipeline,
            Err(error) => {
                tracing::warn!("the QDP_PIPELINE_* settings do not go together ({error}); ignored");
                built_in
            }
        };
        Self { num_threads, pipeline }
    }
}

fn positive(read: &impl Fn(&str) -> Option<String>, name: &str) -> Option<usize> {
    parsed(read, name, |&number| number >= 1)
}

/// The variable's value; `None` where it has none, or, with a warning, none that is valid.
fn parsed<T: FromStr>(
    read: &impl Fn(&str) -> Option<String>,
    name: &str,
    valid: impl Fn(&T) -> bool,
) -> Option<T> {
    let text = read(name)?;
    let value = text.trim().parse().ok().filter(valid);
    if value.is_none() {
        tracing::warn!("{name}={text:?} is not a number that it may be; ignored");
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Config {
        Config::parse(|name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn thread_count_is_parsed_or_falls_back() {
        let available = with(&[]).num_threads;
        assert_eq!(with(&[("QDP_NUM_THREADS", " 3 ")]).num_threads, 3);
        assert_eq!(with(&[("QDP_NUM_THREADS", "0")]).num_threads, available);
        assert_eq!(with(&[("QDP_NUM_THREADS", "many")]).num_threads, available);
    }

    #[test]
    fn pipeline_settings_are_taken_together_or_not_at_all() {
        let pipeline = with(&[
            ("QDP_PIPELINE_SLOTS", "8"),
            ("QDP_PIPELINE_DIRECT_BYTES", "0"),
            ("QDP_PIPELINE_MAX_BATCH_SAMPLES", "100"),
            ("QDP_PIPELINE_TIMING", "1"),
        ])
        .pipeline;
        assert_eq!((pipeline.slots, pipeline.direct_bytes, pipeline.timing), (8, 0, true));
        assert_eq!((pipeline.max_batch_samples, pipeline.max_batch_bytes), (Some(100), None));
        let wrong = with(&[("QDP_PIPELINE_SLOTS", "8"), ("QDP_PIPELINE_MAX_CHUNK_BYTES", "5")]);
        assert_eq!(wrong.pipeline, with(&[]).pipeline);
        assert_eq!(with(&[("QDP_PIPELINE_SLOTS", "x")]).pipeline, with(&[]).pipeline);
    }
}
