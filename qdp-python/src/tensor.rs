//! Tensor in, tensor out: the way under `qdp.torch.encode`.

use crate::affine::{AffineArgs, BorrowedMap, Map};
use crate::call::Call;
use crate::engine::{all_shared, shared};
use crate::errors::Result;
use crate::exchange::{Table, device_of};
use crate::input::Data;
use crate::layout;
use crate::options::{self, SpecArgs};
use crate::state::StateBatch;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;
use qdp_core::{Device, EncodeSpec, Encoding, Error, Precision};

/// The arguments of `encode` beside its samples, as Python values.
struct EncodeArgs<'a, 'py> {
    spec: SpecArgs<'a, 'py>,
    precision: Option<&'a str>,
    validate: &'a str,
    affine: AffineArgs<'a, 'py>,
    out: Option<&'a Bound<'py, PyAny>>,
}

/// What the arguments ask for, as the core's types.
struct Parsed {
    spec: EncodeSpec,
    precision: Option<Precision>,
    validate_now: bool,
}

impl EncodeArgs<'_, '_> {
    fn parse(&self) -> Result<Parsed> {
        Ok(Parsed {
            spec: self.spec.parse()?,
            precision: self.precision.map(options::precision).transpose()?,
            validate_now: options::validate_now(self.validate)?,
        })
    }
}

/// A function of Python's with the arguments of `encode`.
// Native without a Python function around it, which would cost a small call a thirtieth.
macro_rules! encode_function {
    ($(#[$attribute:meta])* $name:ident as $python_name:literal => $run:ident) => {
        $(#[$attribute])*
        #[pyfunction(name = $python_name)]
        #[pyo3(signature = (
            x, num_qubits, encoding="amplitude", *, rotation=None, reps=None, entanglement=None,
            convention="qdp", precision=None, validate="deferred", weight=None, bias=None, out=None,
        ))]
        #[allow(clippy::too_many_arguments)] // one per keyword of the public function
        pub(crate) fn $name<'py>(
            x: &Bound<'py, PyAny>,
            num_qubits: &Bound<'py, PyAny>,
            encoding: &str,
            rotation: Option<&str>,
            reps: Option<&Bound<'py, PyAny>>,
            entanglement: Option<&Bound<'py, PyAny>>,
            convention: &str,
            precision: Option<&str>,
            validate: &str,
            weight: Option<&Bound<'py, PyAny>>,
            bias: Option<&Bound<'py, PyAny>>,
            out: Option<&Bound<'py, PyAny>>,
        ) -> Result<Bound<'py, PyAny>> {
            let spec =
                SpecArgs { num_qubits, encoding, rotation, reps, entanglement, convention };
            let affine = AffineArgs { weight, bias };
            $run(x, &EncodeArgs { spec, precision, validate, affine, out })
        }
    };
}

encode_function! {
    /// Encode a tensor and return a tensor on the same device.
    ///
    /// `x` has shape `(features,)` or `(batch, features)`; the result has shape
    /// `(batch, 2**num_qubits)` and dtype complex64 or complex128. A CUDA tensor is encoded on
    /// torch's current stream as one more kernel: nothing waits, and the call is legal inside
    /// `torch.cuda.graph` capture. The result is `out`, or new; on CUDA it is made by torch's own
    /// allocator.
    ///
    /// The result is differentiable where `x` requires a gradient or has a tangent, and the
    /// function may be compiled, traced and transformed by `torch.func`: it is then the operator
    /// `torch.ops.qdp.encode`.
    ///
    /// With `weight` or `bias`, one value per feature of a real floating dtype on the device of
    /// `x`, the features `weight * x + bias` are encoded: mapped in double by the encode itself,
    /// but for "amplitude" by torch's operations first, in float32 or wider, as its map is as large
    /// as the state. Both are differentiable. "basis" takes none.
    ///
    /// See `qdp.Engine.encode` for the other arguments.
    encode_tensor as "encode" => encode_or_trace
}

encode_function! {
    /// `encode` without its operator: what the operator runs on a tensor that has values.
    encode_tensor_values as "encode_values" => encode_as_it_is
}

fn encode_or_trace<'py>(
    x: &Bound<'py, PyAny>,
    args: &EncodeArgs<'_, 'py>,
) -> Result<Bound<'py, PyAny>> {
    let parsed = args.parse()?;
    // A map as large as the state is torch's to compute.
    let torchs = *parsed.spec.encoding() == Encoding::Amplitude && !args.affine.is_none();
    if !torchs && let Borrowed::Values(data) = borrow(x)? {
        let map = match args.affine.borrow()? {
            BorrowedMap::None => Some(None),
            BorrowedMap::Values(map) => Some(Some(map)),
            BorrowedMap::Traced => None,
        };
        if let Some(map) = map {
            return encode_values(&parsed, data, map, x, args.out);
        }
    }
    // From what was parsed: an iterator of pairs has been read by now.
    let arguments = options::arguments(&parsed.spec, x.py())?;
    args.affine.add_to(&arguments)?;
    operator(x, &arguments, args.precision, args.validate, args.out)
}

fn encode_as_it_is<'py>(
    x: &Bound<'py, PyAny>,
    args: &EncodeArgs<'_, 'py>,
) -> Result<Bound<'py, PyAny>> {
    let parsed = args.parse()?;
    let data = torch_table(x)?.map(|table| Data::from_table(table, x)).transpose()?.flatten();
    let map = args.affine.values()?;
    encode_values(&parsed, data, map, x, args.out)
}

fn encode_values<'py>(
    parsed: &Parsed,
    borrowed: Option<Data<'py>>,
    map: Option<Box<Map<'py>>>,
    x: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    let borrowed = match (borrowed, map) {
        (borrowed, None) => borrowed,
        (Some(data), Some(map)) => Some(data.with_map(map)?),
        (None, Some(_)) => {
            let expected = "a tensor of torch 2.10 or later, for weight and bias".to_owned();
            let got = x.get_type().name()?.to_string();
            return Err(Error::DType { argument: "x", expected, got }.into());
        }
    };
    // An older torch, or something else than a tensor, has to be asked for its device.
    let device = match &borrowed {
        Some(data) => data.layout.device,
        None => layout::device_of_dlpack("data", device_of(x)?)?,
    };
    let engine = shared(device)?;
    let Parsed { ref spec, precision, validate_now } = *parsed;
    let call = Call { engine, spec, precision, stream: None, validate_now, leave_overdue: false };
    encode(&call, borrowed, x, out)
}

/// Lower than any address that a tensor's values have: a tensor that another one stands for may
/// describe itself as lying here.
pub(crate) const LOWEST: usize = 1 << 32;

/// What an encode of a tensor starts from.
pub(crate) enum Borrowed<'py> {
    /// Values in memory, described where the exchange table does that.
    Values(Option<Data<'py>>),
    /// A tensor whose encoding torch has to know of: it wants a gradient, or has no values now.
    Traced,
}

/// Borrows a tensor of torch's through the exchange table, where that works.
pub(crate) fn borrow<'py>(x: &Bound<'py, PyAny>) -> Result<Borrowed<'py>> {
    let Some(table) = torch_table(x)? else { return Ok(Borrowed::Values(None)) };
    if modes_active(x.py())? {
        return Ok(Borrowed::Traced);
    }
    match Data::from_table(table, x) {
        Ok(Some(data)) if data.layout.ptr.addr() < LOWEST && is_traced(x)? => Ok(Borrowed::Traced),
        Ok(data) => Ok(Borrowed::Values(data)),
        // It asks for a gradient, or has no memory to describe.
        Err(_) if is_traced(x)? => Ok(Borrowed::Traced),
        Err(failure) => Err(failure),
    }
}

/// torch's exchange table, where `x` is a tensor of torch's.
pub(crate) fn torch_table(x: &Bound<'_, PyAny>) -> PyResult<Option<Table>> {
    Ok(match Table::of(x)? {
        Some(table) if Table::torch(x.py())? == Some(table) => Some(table),
        _ => None,
    })
}

/// Whether torch may watch what is called with its tensors, whatever they look like: a dispatch mode
/// (tracing to a graph, counting operations), `torch.jit.trace`, or forward-mode differentiation,
/// here or in another thread.
fn modes_active(py: Python<'_>) -> PyResult<bool> {
    // Private names of torch's. Where one is gone, what it told of is not noticed here.
    struct Modes {
        dispatch: Option<Py<PyAny>>,
        tracing: Option<Py<PyAny>>,
        forward: Py<PyDict>,
        outside: Py<PyAny>,
    }
    static MODES: PyOnceLock<Modes> = PyOnceLock::new();
    let modes = MODES.get_or_try_init(py, || {
        let torch = py.import(intern!(py, "torch._C"))?;
        let function = |name| torch.getattr_opt(name).map(|found| found.map(Bound::unbind));
        let dispatch = function(intern!(py, "_len_torch_dispatch_stack"))?;
        let tracing = function(intern!(py, "_is_tracing"))?;
        let forward = py.import(intern!(py, "torch.autograd.forward_ad"))?.dict().unbind();
        // Levels count from zero. Python has this integer but once, so it is known by its address.
        let outside = (-1_i64).into_pyobject(py)?.into_any().unbind();
        Ok::<_, PyErr>(Modes { dispatch, tracing, forward, outside })
    })?;
    for mode in [&modes.dispatch, &modes.tracing].into_iter().flatten() {
        if mode.bind(py).call0()?.is_truthy()? {
            return Ok(true);
        }
    }
    let level = modes.forward.bind(py).get_item(intern!(py, "_current_level"))?;
    Ok(level.is_some_and(|level| !level.is(&modes.outside)))
}

pub(crate) fn is_traced(x: &Bound<'_, PyAny>) -> PyResult<bool> {
    static IS_TRACED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    IS_TRACED.import(x.py(), "qdp.torch.ops", "is_traced")?.call1((x,))?.is_truthy()
}

/// `encode` by torch's dispatcher; `arguments` are those of [`SpecArgs`].
pub(crate) fn operator<'py>(
    x: &Bound<'py, PyAny>,
    arguments: &Bound<'py, PyDict>,
    precision: Option<&str>,
    validate: &str,
    out: Option<&Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyAny>> {
    static ENCODE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = x.py();
    arguments.set_item(intern!(py, "precision"), precision)?;
    arguments.set_item(intern!(py, "validate"), validate)?;
    arguments.set_item(intern!(py, "out"), out)?;
    let encode = ENCODE.import(py, "qdp.torch.ops", "encode")?;
    Ok(encode.call((x,), Some(arguments))?)
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
            Some(borrowed) if borrowed.has_map() => {
                let expected = "a tensor of torch's, with weight and bias";
                return Err(Error::invalid("out", expected, out.get_type().name()?).into());
            }
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
    let state = match borrowed {
        Some(borrowed) if borrowed.has_map() => call.encode_to(py, borrowed, None)?,
        _ => call.encode(data, None)?,
    };
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
