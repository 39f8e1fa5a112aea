//! The one place that reads the environment. Parsed once, at first use.

use std::sync::OnceLock;

/// Settings of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Threads of the CPU backend and of host staging (`QDP_NUM_THREADS`; default: as many as the
    /// process may use).
    pub num_threads: usize,
}

impl Config {
    /// The process's configuration.
    pub fn get() -> &'static Self {
        static CONFIG: OnceLock<Config> = OnceLock::new();
        CONFIG.get_or_init(|| {
            #[allow(clippy::disallowed_methods)] // this is the module that reads the environment
            let threads = std::env::var("QDP_NUM_THREADS").ok();
            Self::parse(threads.as_deref())
        })
    }

    fn parse(num_threads: Option<&str>) -> Self {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let num_threads = match num_threads.map(|text| (text, text.trim().parse::<usize>())) {
            None => available(),
            // More would only exhaust the system.
            Some((_, Ok(n))) if n >= 1 => n.min(1024),
            Some((text, _)) => {
                tracing::warn!("QDP_NUM_THREADS={text:?} is not a positive integer; ignored");
                available()
            }
        };
        Self { num_threads }
    }
}

#[cfg(test)]
mod tests {
    use super::Config;

    #[test]
    fn thread_count_is_parsed_or_falls_back() {
        let available = Config::parse(None).num_threads;
        assert_eq!(Config::parse(Some(" 3 ")).num_threads, 3);
        assert_eq!(Config::parse(Some("0")).num_threads, available);
        assert_eq!(Config::parse(Some("many")).num_threads, available);
    }
}
