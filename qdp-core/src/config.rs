//! The one place that reads the environment. Parsed once, at first use.

use crate::error::{Error, Result};
use crate::pipeline::config::PipelineConfig;
use std::cell::RefCell;
use std::str::FromStr;
use std::sync::OnceLock;

/// Settings of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Threads of the CPU backend and of host staging (`QDP_NUM_THREADS`; default: as many as the
    /// process may use).
    pub num_threads: usize,
    /// Defaults of an engine's pipeline (`QDP_PIPELINE_*`).
    pub pipeline: PipelineConfig,
    /// What is wrong with a variable, which then counts as not set.
    problem: Option<Error>,
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

    /// Raises what is wrong with the first variable that is not what it may be.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] names the variable.
    pub fn check(&self) -> Result<()> {
        self.problem.clone().map_or(Ok(()), Err)
    }

    fn parse(read: impl Fn(&str) -> Option<String>) -> Self {
        let variables = Variables { read, problem: RefCell::default() };
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        // More would only exhaust the system.
        let num_threads =
            variables.positive("QDP_NUM_THREADS").map_or_else(available, |n| n.min(1024));
        let built_in = PipelineConfig::built_in(num_threads);
        let number = |name, usual| variables.positive(name).unwrap_or(usual);
        let largest = number("QDP_PIPELINE_MAX_CHUNK_BYTES", built_in.max_chunk_bytes);
        let usual = built_in.clone().within(largest);
        let pipeline = PipelineConfig {
            slots: number("QDP_PIPELINE_SLOTS", built_in.slots),
            min_chunk_bytes: number("QDP_PIPELINE_MIN_CHUNK_BYTES", usual.min_chunk_bytes),
            max_chunk_bytes: largest,
            direct_bytes: variables
                .parsed("QDP_PIPELINE_DIRECT_BYTES", "a number of bytes", |_| true)
                .unwrap_or(usual.direct_bytes),
            staging_threads: number("QDP_PIPELINE_STAGING_THREADS", built_in.staging_threads)
                .min(1024),
            max_batch_bytes: variables.positive("QDP_PIPELINE_MAX_BATCH_BYTES"),
            max_batch_samples: variables.positive("QDP_PIPELINE_MAX_BATCH_SAMPLES"),
            timing: variables.parsed("QDP_PIPELINE_TIMING", "0 or 1", |&on: &u8| on <= 1)
                == Some(1),
        };
        let mut problem = variables.problem.into_inner();
        let pipeline = match pipeline.validate() {
            Ok(()) => pipeline,
            Err(error) => {
                let expected = "settings that go together";
                problem.get_or_insert_with(|| Error::invalid("QDP_PIPELINE_*", expected, error));
                built_in
            }
        };
        Self { num_threads, pipeline, problem }
    }
}

/// The environment, and the first thing that is wrong with it.
struct Variables<R> {
    read: R,
    problem: RefCell<Option<Error>>,
}

impl<R: Fn(&str) -> Option<String>> Variables<R> {
    fn positive(&self, name: &'static str) -> Option<usize> {
        self.parsed(name, "a positive integer", |&number| number >= 1)
    }

    /// The variable's value; `None` where it has none that is valid.
    fn parsed<T: FromStr>(
        &self,
        name: &'static str,
        expected: &str,
        valid: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let text = (self.read)(name)?;
        let value = text.trim().parse().ok().filter(valid);
        if value.is_none() {
            let error = || Error::invalid(name, expected, format!("{text:?}"));
            self.problem.borrow_mut().get_or_insert_with(error);
        }
        value
    }
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
        for wrong in ["0", "many", "-1", ""] {
            let config = with(&[("QDP_NUM_THREADS", wrong)]);
            assert_eq!(config.num_threads, available);
            let error = config.check().unwrap_err();
            assert!(
                matches!(error, Error::InvalidArgument { argument: "QDP_NUM_THREADS", .. }),
                "{error}"
            );
        }
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
        assert!(wrong.check().is_err() && with(&[]).check().is_ok());
        let wrong = with(&[("QDP_PIPELINE_SLOTS", "x"), ("QDP_PIPELINE_TIMING", "1")]);
        assert_eq!(wrong.pipeline, with(&[("QDP_PIPELINE_TIMING", "1")]).pipeline);
        assert!(wrong.check().unwrap_err().to_string().starts_with("QDP_PIPELINE_SLOTS"));
    }
}
