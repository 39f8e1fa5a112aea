//! `Plan`: an encoding resolved once.

use crate::call::Call;
use crate::engine::shared;
use crate::errors::Result;
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use crate::tensor::{self, Borrowed};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};
use qdp_core::{Device, EncodeSpec, Precision};

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
            leave_overdue: false,
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
            leave_overdue: false,
        };
        match tensor::borrow(data)? {
            Borrowed::Values(values) => tensor::encode(&call, values, data, out),
            Borrowed::Traced => {
                let precision = self.precision.map(Precision::name);
                let arguments = options::arguments(&self.spec, data.py())?;
                tensor::operator(data, &arguments, precision, validate, out)
            }
        }
    }

    /// Pickles as the encoding and the name of the device, whose shared engine (that of
    /// qdp.torch.encode) the copy uses.
    fn __reduce__<'py>(&self, py: Python<'py>) -> Result<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        static RESTORE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let restore = RESTORE.import(py, "qdp._qdp", "restore_plan")?;
        let precision = self.precision.map(Precision::name);
        let device = self.engine.device().to_string();
        let arguments = options::arguments(&self.spec, py)?;
        Ok((restore.clone(), (device, precision, arguments).into_pyobject(py)?))
    }
}

/// The plan that was pickled.
#[pyfunction]
pub(crate) fn restore_plan(
    py: Python<'_>,
    device: &str,
    precision: Option<&str>,
    arguments: &Bound<'_, PyDict>,
) -> Result<Plan> {
    let device: Device = device.parse()?;
    let engine = py.detach(|| shared(device))?.clone();
    let precision = precision.map(options::precision).transpose()?;
    let get = |name| arguments.get_item(name);
    let text =
        |name| -> PyResult<Option<String>> { get(name)?.map(|value| value.extract()).transpose() };
    let required = |name| text(name)?.ok_or_else(|| PyKeyError::new_err(name));
    let spec = SpecArgs {
        num_qubits: &arguments.as_any().get_item("num_qubits")?,
        encoding: &required("encoding")?,
        rotation: text("rotation")?.as_deref(),
        reps: get("reps")?.as_ref(),
        entanglement: get("entanglement")?.as_ref(),
        convention: &required("convention")?,
    }
    .parse()?;
    Ok(Plan { engine, precision, spec })
}
