//! Failures as Python exceptions: every core error has a class in `qdp.exceptions`, with the
//! numbers of its message as attributes.

use crate::interrupt::{self, refusal};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule};
use qdp_core::{Error, Unavailable};

/// What a function of this crate fails with. `PyO3` raises it through [`PyErr`].
#[derive(Debug)]
pub(crate) enum Failure {
    /// The core refused; raised as the class that belongs to the error.
    Core(Error),
    /// Raised as it is.
    Python(PyErr),
}

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Core(error)
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl<'a, 'py> From<pyo3::CastError<'a, 'py>> for Failure {
    fn from(error: pyo3::CastError<'a, 'py>) -> Self {
        Self::Python(error.into())
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Python(error) => error,
            Failure::Core(Error::Interrupted) => interrupt::raised(),
            Failure::Core(Error::Cancelled) => cancelled(),
            Failure::Core(error) => Python::attach(|py| {
                // An exception about the exception (a broken installation, say) is better than
                // none; the message is in it either way.
                instance(py, &error).unwrap_or_else(|_| PyRuntimeError::new_err(error.to_string()))
            }),
        }
    }
}

/// What futures raise that were cancelled.
fn cancelled() -> PyErr {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Python::attach(|py| {
        let raised =
            CLASS.import(py, "concurrent.futures", "CancelledError").and_then(PyAnyMethods::call0);
        raised.map_or_else(|error| error, PyErr::from_value)
    })
}

/// [`Error::InvalidArgument`] that a Python exception is the reason for, if that is a
/// [`refusal`].
pub(crate) fn invalid_because(
    py: Python<'_>,
    argument: &'static str,
    expected: &str,
    cause: PyErr,
) -> Failure {
    let cause = match refusal(py, cause) {
        Ok(cause) => cause,
        Err(other) => return Failure::Python(other),
    };
    because(py, Error::invalid(argument, expected, first_line(py, &cause)), cause)
}

/// `error`, with the Python exception that is the reason for it as its `__cause__`.
pub(crate) fn because(py: Python<'_>, error: Error, cause: PyErr) -> Failure {
    let error = PyErr::from(Failure::Core(error));
    error.set_cause(py, Some(cause));
    error.into()
}

/// The first line of an exception's message: the rest may be a native backtrace.
pub(crate) fn first_line(py: Python<'_>, error: &PyErr) -> String {
    let text = error.value(py).to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn instance(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    static EXCEPTIONS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = EXCEPTIONS
        .get_or_try_init(py, || PyModule::import(py, "qdp.exceptions").map(Bound::unbind))?
        .bind(py);
    let attributes = PyDict::new(py);
    let class = describe(error, &attributes)?;
    let exception = module.getattr(class)?.call1((error.to_string(),))?;
    for (name, value) in attributes {
        exception.setattr(name.cast::<pyo3::types::PyString>()?, value)?;
    }
    Ok(PyErr::from_value(exception))
}

/// The class of an error and, into `attributes`, what it carries.
fn describe(error: &Error, attributes: &Bound<'_, PyDict>) -> PyResult<&'static str> {
    let described = |argument: &str, expected: &str, got: &str| -> PyResult<()> {
        attributes.set_item("argument", argument)?;
        attributes.set_item("expected", expected)?;
        attributes.set_item("got", got)
    };
    Ok(match error {
        Error::InvalidArgument { argument, expected, got } => {
            described(argument, expected, got)?;
            "InvalidArgumentError"
        }
        Error::Shape { argument, expected, got } => {
            described(argument, expected, got)?;
            "ShapeError"
        }
        Error::DType { argument, expected, got } => {
            described(argument, expected, got)?;
            "DTypeError"
        }
        Error::DeviceMismatch { argument, expected, got } => {
            described(argument, expected, got)?;
            "DeviceMismatchError"
        }
        Error::FeatureCount { encoding, num_qubits, expected, got } => {
            attributes.set_item("encoding", encoding)?;
            attributes.set_item("num_qubits", num_qubits)?;
            attributes.set_item("expected", expected)?;
            attributes.set_item("got", got)?;
            "FeatureCountError"
        }
        Error::ZeroNorm { sample } => {
            attributes.set_item("sample", sample)?;
            "ZeroNormError"
        }
        Error::NormOverflow { sample } => {
            attributes.set_item("sample", sample)?;
            "NormOverflowError"
        }
        Error::NonFinite { sample, position, .. } => {
            attributes.set_item("sample", sample)?;
            attributes.set_item("position", position)?;
            "NonFiniteError"
        }
        Error::BasisValue { sample, position, num_qubits, .. } => {
            attributes.set_item("sample", sample)?;
            attributes.set_item("position", position)?;
            attributes.set_item("num_qubits", num_qubits)?;
            "BasisValueError"
        }
        Error::DeviceUnavailable { device, reason } => {
            attributes.set_item("device", device)?;
            attributes.set_item("reason", reason_code(reason))?;
            "DeviceUnavailableError"
        }
        Error::OutOfMemory { device, needed, free, total, .. } => {
            attributes.set_item("device", device)?;
            attributes.set_item("needed", needed)?;
            attributes.set_item("free", free)?;
            attributes.set_item("total", total)?;
            "OutOfMemoryError"
        }
        Error::QueueFull { queue } => {
            attributes.set_item("queue", queue)?;
            "QueueFullError"
        }
        Error::DeadlineExceeded => "DeadlineExceededError",
        Error::BatcherClosed { .. } => "BatcherClosedError",
        Error::Capturing { .. } => "CaptureError",
        Error::Driver { call, name, .. } => {
            attributes.set_item("call", call)?;
            attributes.set_item("name", name)?;
            "DriverError"
        }
        _ => "QdpError",
    })
}

fn reason_code(reason: &Unavailable) -> &'static str {
    match reason {
        Unavailable::NoDriver => "no-driver",
        Unavailable::DriverTooOld { .. } => "driver-too-old",
        Unavailable::NoSuchDevice { .. } => "no-such-device",
        Unavailable::KernelsNotBuilt => "kernels-not-built",
        Unavailable::NoKernelImage { .. } => "no-kernel-image",
        _ => "driver",
    }
}
