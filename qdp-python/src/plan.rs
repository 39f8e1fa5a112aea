//! `Plan`: an encoding resolved once.

use crate::call::Call;
use crate::errors::Result;
use crate::options;
use crate::state::StateBatch;
use crate::tensor;
use pyo3::prelude::*;
use qdp_core::{EncodeSpec, Precision};

/// An encoding resolved once: call it on one batch after another.
#[pyclass(frozen, module = "qdp", name = "Plan")]
pub(crate) struct Plan {
    pub(crate) engine: qdp_core::Engine,
    pub(crate) precision: Option<Precision>,
    pub(crate) spec: EncodeSpec,
}

#[pymethods]
impl Plan {
    /// Number of qubits.
    #[getter]
    fn num_qubits(&self) -> u32 {
        self.spec.num_qubits()
    }

    /// Name of the encoding.
    #[getter]
    fn encoding(&self) -> &'static str {
        self.spec.encoding().name()
    }

    /// Name of the convention.
    #[getter]
    fn convention(&self) -> &'static str {
        self.spec.convention().name()
    }

    fn __repr__(&self) -> String {
        format!(
            "Plan(num_qubits={}, encoding='{}', convention='{}', device='{}')",
            self.num_qubits(),
            self.encoding(),
            self.convention(),
            self.engine.device()
        )
    }

    /// Encode data, as Engine.encode does.
    #[pyo3(signature = (data, *, validate="deferred", stream=None, out=None))]
    fn encode(
        &self,
        data: &Bound<'_, PyAny>,
        validate: &str,
        stream: Option<&Bound<'_, PyAny>>,
        out: Option<&Bound<'_, PyAny>>,
    ) -> Result<StateBatch> {
        let call = Call {
            engine: &self.engine,
            spec: &self.spec,
            precision: self.precision,
            stream: options::stream_for(&self.engine, stream)?,
            validate_now: options::validate_now(validate)?,
        };
        call.encode(data, out)
    }

    /// Encode a tensor and return a tensor on the same device, as qdp.torch.encode does.
    #[pyo3(signature = (data, *, validate="deferred", out=None))]
    fn torch<'py>(
        &self,
        data: &Bound<'py, PyAny>,
        validate: &str,
        out: Option<&Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyAny>> {
        let call = Call {
            engine: &self.engine,
            spec: &self.spec,
            precision: self.precision,
            stream: None,
            validate_now: options::validate_now(validate)?,
        };
        tensor::encode(&call, tensor::borrow(data)?, data, out)
    }
}
