//! Tensor in, tensor out: the way under `qdp.torch.encode`.

use crate::engine::{Call, shared};
use crate::errors::Result;
use crate::exchange::{Table, device_of};
use crate::input::Data;
use crate::layout;
use crate::options::{self, SpecArgs};
use crate::output::Target;
use crate::state::StateBatch;
use pyo3::prelude::*;

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
    let py = data.py();
    let spec =
        SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
    let precision = precision.map(options::precision).transpose()?;
    let validate_now = options::validate_now(validate)?;
    let call = |engine| Call { engine, spec: &spec, precision, stream: None, validate_now };

    let torch = Table::torch(py)?;
    let table = Table::of(data)?.filter(|&table| Some(table) == torch);
    let borrowed = match table {
        Some(table) => Data::from_table(table, data, None)?.map(|data| (table, data)),
        None => None,
    };
    match (borrowed, out) {
        (Some((table, data)), None) => {
            let engine = shared(data.layout.device)?;
            let call = call(&engine);
            let options = call.options(&data, None);
            let tensor = call.encode_tensor(py, &data, table, &options)?;
            Ok(table.to_python(py, tensor.memory)?)
        }
        // An older torch, or a tensor that it does not describe; and `out=`, whose memory may be
        // anybody's.
        (borrowed, out) => {
            let device = match &borrowed {
                Some((_, data)) => data.layout.device,
                None => layout::device_of_dlpack("data", device_of(data)?)?,
            };
            let engine = shared(device)?;
            match out {
                Some(out) => {
                    let mut target = Target::import(out, &engine, None)?;
                    // Nobody holds these states here, so what validation finds later is the
                    // engine's to tell.
                    let _ = call(&engine).write(data, &mut target)?;
                    Ok(out.clone())
                }
                None => {
                    let state = call(&engine).encode(data, None)?;
                    StateBatch::torch(&Bound::new(py, state)?)
                }
            }
        }
    }
}
