//! Tensor in, tensor out: the way under `qdp.torch.encode`.

use crate::engine::{Call, all_shared, shared};
use crate::errors::Result;
use crate::exchange::{Table, device_of};
use crate::input::Data;
use crate::layout;
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use pyo3::prelude::*;
use qdp_core::Device;

/// Tensor in, tensor out: see qdp.torch.encode.
#[pyfunction]
#[pyo3(signature = (
    data, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
    convention="qdp", precision=None, validate="deferred", out=None,
))]
#[allow(clippy::too_many_arguments)] // one per keyword of the public function
pub(crate) fn encode_tensor<'py>(
    data: &Bound<'py, PyAny>,
    num_qubits: &Bound<'py, PyAny>,
    encoding: &str,
    rotation: Option<&str>,
    reps: Option<&Bound<'py, PyAny>>,
    entanglement: Option<&Bound<'py, PyAny>>,
    convention: &str,
    precision: Option<&str>,
    validate: &str,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let spec =
        SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
    let precision = precision.map(options::precision).transpose()?;
    let validate_now = options::validate_now(validate)?;
    let borrowed = borrow(data)?;
    // An older torch, or something else than a tensor, has to be asked for its device.
    let device = match &borrowed {
        Some(data) => data.layout.device,
        None => layout::device_of_dlpack("data", device_of(data)?)?,
    };
    let engine = shared(device)?;
    let call = Call { engine, spec: &spec, precision, stream: None, validate_now };
    encode(&call, borrowed, data, out)
}

/// Borrows a tensor of torch's through the exchange table, where that works.
pub(crate) fn borrow<'py>(data: &Bound<'py, PyAny>) -> Result<Option<Data<'py>>> {
    match Table::of(data)? {
        Some(table) if Table::torch(data.py())? == Some(table) => Data::from_table(table, data),
        _ => Ok(None),
    }
}

/// Encodes `data`, which is `borrowed` where it could be, to a tensor: `out`, or new.
pub(crate) fn encode<'py>(
    call: &Call<'_>,
    borrowed: Option<Data<'py>>,
    data: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let py = data.py();
    if let Some(out) = out {
        let mut target = call.target(data, out)?;
        let data = match borrowed {
            Some(borrowed) if borrowed.stream == target.stream => borrowed,
            _ => Data::import(data, call.engine, target.stream)?,
        };
        // Nobody holds these states here, so what validation finds later is the engine's to tell.
        let _ = call.write(py, data, &mut target)?;
        return Ok(out.clone());
    }
    // On the CPU the engine's memory serves as well, and has its pages already.
    if let Some(borrowed) = &borrowed
        && let Some(table) = borrowed.table
        && borrowed.layout.device == call.engine.device()
        && borrowed.layout.device != Device::Cpu
    {
        let options = call.options(borrowed, None);
        let tensor = call.encode_tensor(py, borrowed, table, &options)?;
        return Ok(table.to_python(py, tensor.memory)?);
    }
    let state = call.encode(data, None)?;
    StateBatch::torch(&Bound::new(py, state)?)
}

/// Wait for what `encode_tensor` enqueued and raise the first thing that validation found.
#[pyfunction]
pub(crate) fn check_tensors(py: Python<'_>) -> Result<()> {
    for engine in all_shared() {
        py.detach(|| engine.check())?;
    }
    Ok(())
}
