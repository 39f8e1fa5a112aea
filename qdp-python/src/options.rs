//! Arguments of the public functions, from Python values to the core's types.

use crate::errors::{Failure, Result};
use crate::interrupt::refusal;
use pyo3::exceptions::PyOverflowError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyInt, PyString};
use qdp_core::cuda::RawStream;
use qdp_core::{
    Convention, Device, EncodeSpec, Encoding, Engine, Entanglement, Error, Precision, Rotation,
};

/// What an encode is asked to compute, as Python values.
pub(crate) struct SpecArgs<'a, 'py> {
    pub(crate) num_qubits: &'a Bound<'py, PyAny>,
    pub(crate) encoding: &'a str,
    pub(crate) rotation: Option<&'a str>,
    pub(crate) reps: Option<&'a Bound<'py, PyAny>>,
    pub(crate) entanglement: Option<&'a Bound<'py, PyAny>>,
    pub(crate) convention: &'a str,
}

impl SpecArgs<'_, '_> {
    pub(crate) fn parse(&self) -> Result<EncodeSpec> {
        let reps = |value| positive("reps", value);
        let encoding = Encoding::parse(
            self.encoding,
            self.rotation.map(rotation).transpose()?,
            self.reps.map(reps).transpose()?,
            self.entanglement.map(entanglement).transpose()?.as_ref(),
        )?;
        let spec = EncodeSpec::new(encoding, num_qubits(self.num_qubits)?)?;
        Ok(spec.with_convention(convention(self.convention)?))
    }
}

/// The arguments that [`SpecArgs`] reads a spec from, as keywords: what may be iterated but once has
/// become a list.
pub(crate) fn arguments<'py>(spec: &EncodeSpec, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
    let arguments = PyDict::new(py);
    arguments.set_item(intern!(py, "num_qubits"), spec.num_qubits())?;
    arguments.set_item(intern!(py, "encoding"), spec.encoding().name())?;
    match spec.encoding() {
        Encoding::Angle { rotation } => {
            let axis = match rotation {
                Rotation::X => "x",
                Rotation::Y => "y",
                Rotation::Z => "z",
            };
            arguments.set_item(intern!(py, "rotation"), axis)?;
        }
        Encoding::Zz { reps, entanglement } | Encoding::IqpEmbedding { reps, entanglement } => {
            arguments.set_item(intern!(py, "reps"), reps)?;
            let name = intern!(py, "entanglement");
            match entanglement {
                Entanglement::Full => arguments.set_item(name, "full")?,
                Entanglement::Linear => arguments.set_item(name, "linear")?,
                Entanglement::Circular => arguments.set_item(name, "circular")?,
                Entanglement::Pairs(pairs) => arguments.set_item(name, pairs)?,
            }
        }
        _ => {}
    }
    arguments.set_item(intern!(py, "convention"), spec.convention().name())?;
    Ok(arguments)
}

pub(crate) fn num_qubits(value: &Bound<'_, PyAny>) -> Result<u32> {
    let range = 1..=EncodeSpec::MAX_QUBITS;
    let expected = || format!("an integer from 1 to {}", EncodeSpec::MAX_QUBITS);
    integer("num_qubits", expected, range, value)
}

pub(crate) fn positive(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<u32> {
    integer(argument, || format!("an integer from 1 to {}", u32::MAX), 1..=u32::MAX, value)
}

/// An integer that is no smaller than zero. Another type is a plain `TypeError`.
pub(crate) fn count(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<usize> {
    value.extract::<usize>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            let expected = format!("an integer from 0 to {}", usize::MAX);
            return invalid(argument, &expected, value);
        }
        error.into()
    })
}

/// A number of bytes or samples.
pub(crate) fn size(argument: &'static str, value: &Bound<'_, PyAny>) -> Result<usize> {
    integer(argument, || "a positive integer".into(), 1..=usize::MAX, value)
}

/// A Python integer, or what counts as one (`numpy.int64`); no `bool`, no float.
fn integer<T: TryFrom<i64> + PartialOrd>(
    argument: &'static str,
    expected: impl Fn() -> String,
    range: std::ops::RangeInclusive<T>,
    value: &Bound<'_, PyAny>,
) -> Result<T> {
    let boolean = value.is_instance_of::<PyBool>();
    let number = if boolean { None } else { accepted(value.py(), value.extract::<i64>())? };
    number
        .and_then(|number| T::try_from(number).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| invalid(argument, &expected(), value))
}

/// What Python code made of a value; `None` where it [refused](refusal) it.
pub(crate) fn accepted<T>(py: Python<'_>, answer: PyResult<T>) -> PyResult<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) => refusal(py, error).map(|_| None),
    }
}

pub(crate) fn invalid(argument: &'static str, expected: &str, got: &Bound<'_, PyAny>) -> Failure {
    let got = got.repr().map_or_else(|_| got.get_type().to_string(), |repr| repr.to_string());
    Error::invalid(argument, expected, got).into()
}

fn rotation(name: &str) -> Result<Rotation> {
    match name {
        "x" | "X" => Ok(Rotation::X),
        "y" | "Y" => Ok(Rotation::Y),
        "z" | "Z" => Ok(Rotation::Z),
        _ => Err(unknown("rotation", "\"x\", \"y\" or \"z\"", name)),
    }
}

fn convention(name: &str) -> Result<Convention> {
    match name {
        "qdp" => Ok(Convention::Qdp),
        "qiskit" => Ok(Convention::Qiskit),
        "pennylane" => Ok(Convention::PennyLane),
        _ => Err(unknown("convention", "\"qdp\", \"qiskit\" or \"pennylane\"", name)),
    }
}

pub(crate) fn precision(name: &str) -> Result<Precision> {
    match name {
        "complex64" => Ok(Precision::Complex64),
        "complex128" => Ok(Precision::Complex128),
        _ => Err(unknown("precision", "\"complex64\", \"complex128\" or None", name)),
    }
}

/// Whether `validate=` asks for an answer at the call.
pub(crate) fn validate_now(name: &str) -> Result<bool> {
    match name {
        "deferred" => Ok(false),
        "now" => Ok(true),
        _ => Err(unknown("validate", "\"deferred\" or \"now\"", name)),
    }
}

pub(crate) fn unknown(argument: &'static str, expected: &str, got: &str) -> Failure {
    Error::invalid(argument, expected, format!("{got:?}")).into()
}

fn entanglement(value: &Bound<'_, PyAny>) -> Result<Entanglement> {
    let expected = "\"full\", \"linear\", \"reverse_linear\", \"circular\", \"pairwise\", \"sca\", \
                    \"none\" or a sequence of pairs of qubits";
    if let Ok(name) = value.cast::<PyString>() {
        // All couplings of a layer commute, so an order of the same pairs is the same layer.
        return match name.to_str().unwrap_or_default() {
            "full" => Ok(Entanglement::Full),
            "linear" | "reverse_linear" | "pairwise" => Ok(Entanglement::Linear),
            "circular" | "sca" => Ok(Entanglement::Circular),
            "none" => Ok(Entanglement::Pairs(Vec::new())),
            _ => Err(invalid("entanglement", expected, value)),
        };
    }
    let pair = |item: PyResult<Bound<'_, PyAny>>| -> Result<(u32, u32)> {
        let qubits: Vec<Bound<'_, PyAny>> = item?.try_iter()?.collect::<PyResult<_>>()?;
        let [j, k] = qubits.as_slice() else {
            return Err(invalid("entanglement", expected, value));
        };
        let qubit = |q| integer("entanglement", || expected.into(), 0..=EncodeSpec::MAX_QUBITS, q);
        Ok((qubit(j)?, qubit(k)?))
    };
    let refused = |error| match refusal(value.py(), error) {
        Ok(_) => invalid("entanglement", expected, value),
        Err(other) => other.into(),
    };
    let items = value.try_iter().map_err(refused)?;
    let pairs = items.map(pair).collect::<Result<Vec<_>>>().map_err(|failure| match failure {
        Failure::Core(error) => error.into(),
        Failure::Python(error) => refused(error),
    })?;
    Ok(Entanglement::Pairs(pairs))
}

/// A CUDA stream: its handle as an integer, or an object that has one, torch's (`cuda_stream`),
/// `CuPy`'s (`ptr`) or any with the `__cuda_stream__` protocol.
pub(crate) fn stream(value: &Bound<'_, PyAny>) -> Result<RawStream> {
    let expected = "None, a stream handle or a stream object of torch, CuPy or __cuda_stream__";
    let handle = stream_handle(value)?
        .and_then(|handle| usize::try_from(handle).ok())
        .ok_or_else(|| invalid("stream", expected, value))?;
    // SAFETY: whoever passes a stream says that it lives and belongs to the engine's device, as
    // for every function of Python that takes one; there is no way to ask the driver.
    Ok(unsafe { RawStream::from_handle(handle) })
}

/// The stream that a call names, on an engine that has streams.
pub(crate) fn stream_for(
    engine: &Engine,
    value: Option<&Bound<'_, PyAny>>,
) -> Result<Option<RawStream>> {
    match value {
        Some(value) if engine.device() == Device::Cpu => {
            Err(invalid("stream", "None on the CPU", value))
        }
        value => value.map(stream).transpose(),
    }
}

fn stream_handle(value: &Bound<'_, PyAny>) -> Result<Option<i64>> {
    let py = value.py();
    let as_handle = |value: &Bound<'_, PyAny>| -> Option<i64> {
        let number = value.cast::<PyInt>().ok().filter(|n| !n.is_instance_of::<PyBool>());
        number.and_then(|number| number.extract().ok())
    };
    if let Some(handle) = as_handle(value) {
        return Ok(Some(handle));
    }
    for name in [intern!(py, "cuda_stream"), intern!(py, "ptr")] {
        if let Some(attribute) = value.getattr_opt(name)? {
            return Ok(as_handle(&attribute));
        }
    }
    match value.getattr_opt(intern!(py, "__cuda_stream__"))? {
        Some(method) => {
            let answer = method.call0()?;
            Ok(answer.get_item(1).ok().as_ref().and_then(as_handle))
        }
        None => Ok(None),
    }
}
