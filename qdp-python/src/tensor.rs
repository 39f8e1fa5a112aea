//! Tensor in, tensor out: the way under `qdp.torch.encode`.

use crate::call::Call;
use crate::engine::{all_shared, shared};
use crate::errors::Result;
use crate::exchange::{Table, device_of};
use crate::input::Data;
use crate::layout;
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use pyo3::prelude::*;
use qdp_core::Device;

/// Encode a tensor and return a tensor on the same device.
///
/// `x` has shape `(features,)` or `(batch, features)`; the result has shape
/// `(batch, 2**num_qubits)` and dtype complex64 or complex128. A CUDA tensor is encoded on torch's
/// current stream as one more kernel: nothing waits, and the call is legal inside
/// `torch.cuda.graph` capture. The result is `out`, or new; on CUDA it is made by torch's own
/// allocator.
///
/// See `qdp.Engine.encode` for the other arguments.
// Native without a Python function around it, which would cost a small call a thirtieth.
#[pyfunction(name = "encode")]
#[pyo3(signature = (
    x, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
    convention="qdp", precision=None, validate="deferred", out=None,
))]
#[allow(clippy::too_many_arguments)] // one per keyword of the public function
pub(crate) fn encode_tensor<'py>(
    x: &Bound<'py, PyAny>,
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
    let borrowed = borrow(x)?;
    // An older torch, or something else than a tensor, has to be asked for its device.
    let device = match &borrowed {
        Some(data) => data.layout.device,
        None => layout::device_of_dlpack("data", device_of(x)?)?,
    };
    let engine = shared(device)?;
    let call = Call { engine, spec: &spec, precision, stream: None, validate_now };
    encode(&call, borrowed, x, out)
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

/// Wait for every `encode` so far and raise the first bad value that one of them met.
///
/// A CUDA tensor is validated where it is encoded, and nothing waits for what is found: it raises
/// at a later call. This is the way to ask now, after a training step, say. It raises what
/// `qdp.Engine.check` raises.
#[pyfunction(name = "check")]
pub(crate) fn check_tensors(py: Python<'_>) -> Result<()> {
    for engine in all_shared() {
        py.detach(|| engine.check())?;
    }
    Ok(())
}
