//! The gradient by a tensor that was encoded: the way under the backward of `qdp.torch.encode`.

use crate::affine::AffineArgs;
use crate::engine::shared;
use crate::errors::Result;
use crate::exchange::{Table, resolve_torch};
use crate::interrupt::interrupt;
use crate::layout::Layout;
use crate::options::SpecArgs;
use crate::output::check_rows;
use pyo3::intern;
use pyo3::prelude::*;
use qdp_core::cuda::RawStream;
use qdp_core::{Device, EncodeOptions, Error, Gradient};

/// A tensor's memory, and what keeps it.
pub(crate) struct Borrowed<'py> {
    pub(crate) layout: Layout,
    /// torch's current stream of a CUDA tensor's device.
    stream: Option<RawStream>,
    _owner: Bound<'py, PyAny>,
}

/// The gradient of a loss by a tensor, given its gradient by the states that encoding it gives.
///
/// `grad` has shape `(batch, 2**num_qubits)` and dtype complex64 or complex128, which is also the
/// precision of the computation: as torch's gradients of complex tensors,
/// `dL/d(real part) + i dL/d(imaginary part)`. `x` is what was encoded, shape `(features,)` or
/// `(batch, features)`, of a floating dtype. The result is `out`, or new, with the shape, dtype and
/// device of `x`; a complex `x` has a complex gradient of the same kind. All are tensors on one
/// device and may have any strides; the rows of `out` are without gaps. On CUDA the work is
/// enqueued on torch's current stream and nothing waits; the call is legal inside
/// `torch.cuda.graph` capture.
///
/// A sample that has no state (a value that is not finite, or a norm of zero) gets a gradient of
/// NaN.
///
/// With `weight` or `bias` the samples were mapped (see `qdp.torch.encode`), and the gradient is that
/// by the mapped ones, `weight * x + bias`.
///
/// See `qdp.Engine.encode` for the other arguments.
#[pyfunction]
#[pyo3(signature = (
    grad, x, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
    convention="qdp", weight=None, bias=None, out=None,
))]
#[allow(clippy::too_many_arguments)] // one per keyword of the function
pub(crate) fn encode_backward<'py>(
    grad: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    num_qubits: &Bound<'py, PyAny>,
    encoding: &str,
    rotation: Option<&str>,
    reps: Option<&Bound<'py, PyAny>>,
    entanglement: Option<&Bound<'py, PyAny>>,
    convention: &str,
    weight: Option<&Bound<'py, PyAny>>,
    bias: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let py = x.py();
    let spec =
        SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention }.parse()?;
    let (data, cotangent) = (borrow("data", x)?, borrow("grad", grad)?);
    let map = AffineArgs { weight, bias }.values()?;
    let out = match out {
        Some(out) => out.clone(),
        None => x.call_method1(intern!(py, "new_empty"), (x.getattr(intern!(py, "shape"))?,))?,
    };
    let target = borrow("out", &out)?;
    let layout = target.layout;
    if layout.single != data.layout.single {
        let dimensions = |layout: Layout| if layout.single { "one dimension" } else { "two" };
        let (expected, got) = (dimensions(data.layout).to_owned(), dimensions(layout).to_owned());
        return Err(Error::Shape { argument: "out", expected, got }.into());
    }
    check_rows(&layout)?;
    let maps = map.iter().flat_map(|map| map.layouts());
    if maps.chain([&data.layout, &cotangent.layout]).any(|other| layout.may_overlap(other)) {
        let expected = "memory apart from that of the other tensors";
        return Err(Error::invalid("out", expected, "an overlap").into());
    }
    let device = data.layout.device;
    let engine = shared(device)?;
    let options = EncodeOptions {
        stream: data.stream,
        interrupt: Some(interrupt),
        ..EncodeOptions::default()
    };
    // SAFETY: torch vouches for its tensors, which are held here and on CUDA freed in the order of
    // the stream; their rows are without gaps and do not overlap where they are written
    // (`check_rows`). That nobody writes meanwhile is the caller's side of passing a tensor.
    let (mut input, cotangent, mut gradient) = unsafe {
        let (ptr, dtype, stride) = (layout.ptr, layout.dtype, layout.strides.0 as usize);
        let gradient = Gradient::from_raw(ptr, dtype, layout.device, layout.shape, stride);
        (data.layout.input(), cotangent.layout.input(), gradient)
    };
    if let Some(map) = &map {
        input = input.with_affine(map.affine())?;
    }
    let mut run = || engine.backward(&input, &spec, &cotangent, &mut gradient, &options);
    // As for an encode: enqueueing is over sooner than the GIL would be given up and taken back.
    let done = if device == Device::Cpu { py.detach(run) } else { run() };
    done?;
    Ok(out)
}

/// Borrows a tensor through torch's exchange table.
pub(crate) fn borrow<'py>(
    argument: &'static str,
    tensor: &Bound<'py, PyAny>,
) -> Result<Borrowed<'py>> {
    let py = tensor.py();
    let table = Table::of(tensor)?.filter(|&table| Table::torch(py).ok().flatten() == Some(table));
    let no_tensor = || -> Result<Error> {
        Ok(Error::DType {
            argument,
            expected: "a tensor of torch 2.10 or later".to_owned(),
            got: tensor.get_type().name()?.to_string(),
        })
    };
    let Some(table) = table else { return Err(no_tensor()?.into()) };
    let Some(mut layout) = table.layout(argument, tensor)? else { return Err(no_tensor()?.into()) };
    let mut owner = tensor.clone();
    if let Some(resolved) = resolve_torch(argument, tensor, &layout)? {
        let Some(plain) = table.layout(argument, &resolved)? else {
            return Err(no_tensor()?.into());
        };
        (layout, owner) = (plain, resolved);
    }
    let stream = match layout.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(table.current_stream(py, ordinal)?),
    };
    Ok(Borrowed { layout, stream, _owner: owner })
}
