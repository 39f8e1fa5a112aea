//! `PipelineConfig`: how host input is brought to a device.

use crate::errors::Result;
use crate::options;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qdp_core::Estimate;
use qdp_core::config::Config;

/// How host input is brought to a device. Whatever is not named keeps its default, or
/// what the environment names (`QDP_PIPELINE_SLOTS` and so on).
///
/// `slots` of the ring, each `max_chunk_bytes` of page-locked and of device memory; `min_chunk_bytes`
/// of a call's first chunk (they double); `direct_bytes`, up to which input takes one copy and one
/// kernel on one stream; `staging_threads`, with the calling one; `max_batch_bytes` and
/// `max_batch_samples` of input in a round, after which other calls have their turn; `timing`, to
/// measure in `Engine.stats()` how far copies and kernels overlap.
///
/// Raises `InvalidArgumentError` where the settings do not go together, and where a variable of the
/// environment is not what it may be.
#[pyclass(frozen, eq, module = "qdp", name = "PipelineConfig")]
#[derive(Clone, PartialEq)]
pub(crate) struct PipelineConfig {
    config: qdp_core::PipelineConfig,
}

impl PipelineConfig {
    pub(crate) fn get(&self) -> qdp_core::PipelineConfig {
        self.config.clone()
    }
}

#[pymethods]
impl PipelineConfig {
    #[new]
    #[pyo3(signature = (
        *, slots=None, min_chunk_bytes=None, max_chunk_bytes=None, direct_bytes=None,
        staging_threads=None, max_batch_bytes=None, max_batch_samples=None, timing=None,
    ))]
    #[allow(clippy::too_many_arguments)] // one per setting
    fn new(
        slots: Option<&Bound<'_, PyAny>>,
        min_chunk_bytes: Option<&Bound<'_, PyAny>>,
        max_chunk_bytes: Option<&Bound<'_, PyAny>>,
        direct_bytes: Option<&Bound<'_, PyAny>>,
        staging_threads: Option<&Bound<'_, PyAny>>,
        max_batch_bytes: Option<&Bound<'_, PyAny>>,
        max_batch_samples: Option<&Bound<'_, PyAny>>,
        timing: Option<bool>,
    ) -> Result<Self> {
        Config::get().check()?;
        let count = |argument, value: Option<&Bound<'_, PyAny>>| {
            value.map(|value| options::count(argument, value)).transpose()
        };
        let usual = qdp_core::PipelineConfig::default();
        let largest = count("max_chunk_bytes", max_chunk_bytes)?.unwrap_or(usual.max_chunk_bytes);
        let usual = usual.within(largest);
        let direct = count("direct_bytes", direct_bytes)?;
        let threads = count("staging_threads", staging_threads)?;
        let config = qdp_core::PipelineConfig {
            slots: count("slots", slots)?.unwrap_or(usual.slots),
            min_chunk_bytes: count("min_chunk_bytes", min_chunk_bytes)?
                .unwrap_or(usual.min_chunk_bytes),
            max_chunk_bytes: largest,
            direct_bytes: direct.unwrap_or(usual.direct_bytes),
            staging_threads: threads.unwrap_or(usual.staging_threads),
            max_batch_bytes: count("max_batch_bytes", max_batch_bytes)?.or(usual.max_batch_bytes),
            max_batch_samples: count("max_batch_samples", max_batch_samples)?
                .or(usual.max_batch_samples),
            timing: timing.unwrap_or(usual.timing),
        };
        config.validate()?;
        Ok(Self { config })
    }

    /// Slots of the ring.
    #[getter]
    fn slots(&self) -> usize {
        self.config.slots
    }

    /// Bytes of a call's first chunk.
    #[getter]
    fn min_chunk_bytes(&self) -> usize {
        self.config.min_chunk_bytes
    }

    /// Bytes of the largest chunk, and of a slot.
    #[getter]
    fn max_chunk_bytes(&self) -> usize {
        self.config.max_chunk_bytes
    }

    /// Bytes of input up to which it takes the direct path.
    #[getter]
    fn direct_bytes(&self) -> usize {
        self.config.direct_bytes
    }

    /// Threads that stage.
    #[getter]
    fn staging_threads(&self) -> usize {
        self.config.staging_threads
    }

    /// Most bytes of input in a round, or `None` where the device's memory decides.
    #[getter]
    fn max_batch_bytes(&self) -> Option<usize> {
        self.config.max_batch_bytes
    }

    /// Most samples in a round, or `None` for as many as the bytes allow.
    #[getter]
    fn max_batch_samples(&self) -> Option<usize> {
        self.config.max_batch_samples
    }

    /// Whether copies and kernels are timed.
    #[getter]
    fn timing(&self) -> bool {
        self.config.timing
    }

    fn __repr__(&self) -> String {
        let option = |value: Option<usize>| value.map_or("None".to_owned(), |n| n.to_string());
        let c = &self.config;
        format!(
            "PipelineConfig(slots={}, min_chunk_bytes={}, max_chunk_bytes={}, direct_bytes={}, \
             staging_threads={}, max_batch_bytes={}, max_batch_samples={}, timing={})",
            c.slots,
            c.min_chunk_bytes,
            c.max_chunk_bytes,
            c.direct_bytes,
            c.staging_threads,
            option(c.max_batch_bytes),
            option(c.max_batch_samples),
            if c.timing { "True" } else { "False" },
        )
    }
}

/// An estimate by names.
pub(crate) fn estimate<'py>(py: Python<'py>, of: &Estimate) -> Result<Bound<'py, PyDict>> {
    let info = PyDict::new(py);
    for (name, value) in [
        ("input_bytes", of.input_bytes),
        ("output_bytes", of.output_bytes),
        ("copied_bytes", of.copied_bytes),
        ("workspace_bytes", of.workspace_bytes),
        ("slot_bytes", of.slot_bytes),
        ("slots", of.slots),
        ("rounds", of.rounds),
        ("chunks", of.chunks),
        ("free_bytes", of.free_bytes),
    ] {
        info.set_item(name, value)?;
    }
    info.set_item("direct", of.direct)?;
    info.set_item("fits", of.fits)?;
    Ok(info)
}
