//! The DLPack C exchange table that a tensor type may publish (torch from 2.10 on): borrowing a
//! tensor's description, its current stream and its allocator are plain C calls.
//!
//! Written here rather than taken from dlpark, which has neither the allocator nor a cache of the
//! table.

use crate::call::out_of_memory;
use crate::errors::{Result, invalid_because};
use crate::layout::{Layout, dlpack_device, dlpack_dtype};
use dlpark::ffi::{
    DLDevice, DLDeviceType, DLPACK_MAJOR_VERSION, DLPackExchangeAPI, DLPackExchangeAPIHeader,
    DLTensor,
};
use dlpark::versioned::Dlpack;
use dlpark::{Managed, TensorRef};
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi::{self, descrgetfunc};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use qdp_core::cuda::RawStream;
use qdp_core::{Engine, Error, Precision};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{self, NonNull};

const CAPSULE_NAME: &CStr = c"dlpack_exchange_api";

/// A framework's exchange table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Table(NonNull<DLPackExchangeAPI>);

// SAFETY: the protocol makes the table immutable and immortal.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// The table of the object's type, if it has one that we can read.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        // The one type that nearly every call is about. Holding it keeps its address from being
        // used again for another type.
        static USUAL: PyOnceLock<(Py<PyType>, Table)> = PyOnceLock::new();
        let py = object.py();
        if let Some((usual, table)) = USUAL.get(py)
            && usual.as_ptr() == object.get_type_ptr().cast()
        {
            return Ok(Some(*table));
        }
        let class = object.get_type();
        let table = Self::of_type(&class)?;
        if let Some(table) = table {
            // Whoever is first stays.
            let _ = USUAL.set(py, (class.unbind(), table));
        }
        Ok(table)
    }

    fn of_type(class: &Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let name = intern!(class.py(), "__dlpack_c_exchange_api__");
        let Some(attribute) = class.getattr_opt(name)? else { return Ok(None) };
        let Ok(capsule) = attribute.cast::<PyCapsule>() else { return Ok(None) };
        let mut table = capsule.pointer_checked(Some(CAPSULE_NAME))?.cast::<DLPackExchangeAPI>();
        // A table of a later major version may lead to older ones; a chain longer than this one
        // is a cycle.
        for _ in 0..16 {
            // SAFETY: a capsule of this name holds a table that lives as long as the process, and
            // every link of its chain is one; the header's layout is the same in all versions.
            let header = unsafe { table.cast::<DLPackExchangeAPIHeader>().as_ref() };
            if header.version.major == DLPACK_MAJOR_VERSION {
                return Ok(Some(Self(table)));
            }
            match NonNull::new(header.prev_api) {
                Some(previous) => table = previous.cast(),
                None => break,
            }
        }
        Ok(None)
    }

    /// torch's table, where torch was imported and has one.
    pub(crate) fn torch(py: Python<'_>) -> PyResult<Option<Self>> {
        static TORCH: PyOnceLock<Table> = PyOnceLock::new();
        if let Some(table) = TORCH.get(py) {
            return Ok(Some(*table));
        }
        let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
        let Ok(torch) = modules.get_item(intern!(py, "torch")) else { return Ok(None) };
        // A half-imported torch has no Tensor yet.
        let Some(tensor) = torch.getattr_opt(intern!(py, "Tensor"))? else { return Ok(None) };
        let table = Self::of_type(tensor.cast::<PyType>()?)?;
        if let Some(table) = table {
            let _ = TORCH.set(py, table);
        }
        Ok(table)
    }

    /// Describes the object's memory. The layout is valid while the object lives and its memory is
    /// not replaced. `None` where the framework cannot describe without exporting.
    pub(crate) fn layout(
        self,
        argument: &'static str,
        object: &Bound<'_, PyAny>,
    ) -> Result<Option<Layout>> {
        // SAFETY: see `of_type`.
        let Some(describe) = (unsafe { self.0.as_ref() }).dltensor_from_py_object_no_sync else {
            return Ok(None);
        };
        let mut tensor = DLTensor::default();
        // SAFETY: the object is of the type that the table was found on, and alive; the GIL is
        // held; `tensor` has room for what is written.
        let status = unsafe { describe(object.as_ptr().cast(), &raw mut tensor) };
        if status != 0 {
            let error = fetch(object.py());
            return Err(invalid_because(
                object.py(),
                argument,
                "an array that DLPack can describe",
                error,
            ));
        }
        // SAFETY: the shape and strides belong to the object, which is alive and, with the GIL
        // held, not changed meanwhile.
        let tensor = unsafe { TensorRef::from_raw(&tensor) }
            .map_err(|error| Error::invalid(argument, "a valid DLPack tensor", error))?;
        Layout::of_dlpack(argument, &tensor).map(Some)
    }

    /// The framework's current stream on a CUDA device.
    pub(crate) fn current_stream(self, py: Python<'_>, ordinal: u32) -> Result<RawStream> {
        // SAFETY: see `of_type`.
        let Some(current) = (unsafe { self.0.as_ref() }).current_work_stream else {
            return Err(PyRuntimeError::new_err("the exchange table has no stream").into());
        };
        let mut stream = ptr::null_mut();
        // SAFETY: the GIL is held and `stream` has room for what is written.
        let status = unsafe { current(DLDeviceType::CUDA, ordinal as i32, &raw mut stream) };
        if status != 0 {
            return Err(fetch(py).into());
        }
        // SAFETY: it is the framework's current stream of this device, which it keeps alive.
        Ok(unsafe { RawStream::from_handle(stream.expose_provenance()) })
    }

    /// New memory of the framework's own on the engine's device, shape `(batch, dim)`, rows without gaps.
    pub(crate) fn allocate(
        self,
        engine: &Engine,
        precision: Precision,
        (batch, dim): (usize, usize),
    ) -> Result<Dlpack> {
        // SAFETY: see `of_type`.
        let Some(allocate) = (unsafe { self.0.as_ref() }).managed_tensor_allocator else {
            return Err(PyRuntimeError::new_err("the exchange table has no allocator").into());
        };
        let mut shape = [batch as i64, dim as i64];
        let mut strides = [dim as i64, 1];
        let mut prototype = DLTensor {
            data: ptr::null_mut(),
            device: dlpack_device(engine.device()),
            ndim: 2,
            dtype: dlpack_dtype(precision),
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut_ptr(),
            byte_offset: 0,
        };
        let mut message: Option<String> = None;
        let mut tensor = ptr::null_mut();
        // SAFETY: the prototype and what it points to live through the call, `tensor` has room for
        // what is written, and `keep_message` is given the pointer that it expects.
        let status = unsafe {
            allocate(
                &raw mut prototype,
                &raw mut tensor,
                (&raw mut message).cast::<c_void>(),
                Some(keep_message),
            )
        };
        if status == 0 {
            // SAFETY: on success the tensor is ours, new and initialised.
            return unsafe { Managed::from_raw(tensor) }
                .map_err(|error| PyRuntimeError::new_err(error.to_string()).into());
        }
        // The message is all that the framework says of the reason.
        let message = message.unwrap_or_default();
        let reasons = ["out of memory", "not enough memory", "can't allocate memory", "overflow"];
        if reasons.iter().any(|reason| message.contains(reason)) {
            let needed = batch as u128 * dim as u128 * precision.size() as u128;
            return Err(out_of_memory(engine, needed));
        }
        let text = format!("the framework could not allocate the result: {message}");
        Err(PyRuntimeError::new_err(text).into())
    }

    /// Makes a tensor of the framework's of `tensor`.
    pub(crate) fn to_python(self, py: Python<'_>, tensor: Dlpack) -> PyResult<Bound<'_, PyAny>> {
        // SAFETY: see `of_type`.
        let Some(convert) = (unsafe { self.0.as_ref() }).managed_tensor_to_py_object_no_sync else {
            return Err(PyRuntimeError::new_err("the exchange table makes no tensors"));
        };
        let mut object = ptr::null_mut();
        // SAFETY: the call takes the tensor over, also where it fails; the GIL is held; `object`
        // has room for what is written.
        let status = unsafe { convert(tensor.into_raw(), &raw mut object) };
        if status != 0 {
            return Err(fetch(py));
        }
        // SAFETY: on success it is a new reference.
        unsafe { Bound::from_owned_ptr_or_err(py, object.cast()) }
    }
}

/// The exception that a C call left; never panics where it left none.
fn fetch(py: Python<'_>) -> PyErr {
    PyErr::take(py)
        .unwrap_or_else(|| PyRuntimeError::new_err("the exchange call failed without a reason"))
}

/// Receives an allocator's error: `context` is the `Option<String>` that [`Table::allocate`] made.
unsafe extern "C" fn keep_message(context: *mut c_void, _: *const c_char, text: *const c_char) {
    if text.is_null() {
        return;
    }
    // SAFETY: the protocol hands back our own context, and a C string.
    unsafe {
        let text = CStr::from_ptr(text).to_string_lossy();
        *context.cast::<Option<String>>() = text.lines().next().map(str::to_owned);
    }
}

/// What torch's tensors are asked, as found on their type: called without looking it up again.
struct TensorFlags {
    requires_grad: Py<PyAny>,
    get_requires_grad: descrgetfunc,
    is_conj: Py<PyAny>,
    is_neg: Py<PyAny>,
}

impl TensorFlags {
    fn of<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<&'py Self> {
        static FLAGS: PyOnceLock<TensorFlags> = PyOnceLock::new();
        let py = tensor.py();
        FLAGS.get_or_try_init(py, || {
            let class = py.import(intern!(py, "torch"))?.getattr(intern!(py, "Tensor"))?;
            let requires_grad = class.getattr(intern!(py, "requires_grad"))?;
            // SAFETY: the type is that of a live object, and this slot holds such a function.
            let get_requires_grad = unsafe {
                let slot = ffi::PyType_GetSlot(requires_grad.get_type_ptr(), ffi::Py_tp_descr_get);
                std::mem::transmute::<*mut c_void, Option<descrgetfunc>>(slot)
            };
            let Some(get_requires_grad) = get_requires_grad else {
                return Err(PyRuntimeError::new_err("torch.Tensor.requires_grad is no property"));
            };
            Ok(Self {
                requires_grad: requires_grad.unbind(),
                get_requires_grad,
                is_conj: class.getattr(intern!(py, "is_conj"))?.unbind(),
                is_neg: class.getattr(intern!(py, "is_neg"))?.unbind(),
            })
        })
    }

    fn requires_grad(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        // SAFETY: the slot of the descriptor's own type, called as the interpreter does; it
        // answers a new reference or sets an exception.
        unsafe {
            let class = tensor.get_type_ptr().cast();
            let answer =
                (self.get_requires_grad)(self.requires_grad.as_ptr(), tensor.as_ptr(), class);
            Bound::from_owned_ptr_or_err(tensor.py(), answer)?.is_truthy()
        }
    }

    fn ask(method: &Py<PyAny>, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        // SAFETY: a callable and its one argument, both alive, then the end of the arguments; it
        // answers a new reference or sets an exception.
        unsafe {
            let end = ptr::null_mut::<ffi::PyObject>();
            let answer = ffi::PyObject_CallFunctionObjArgs(method.as_ptr(), tensor.as_ptr(), end);
            Bound::from_owned_ptr_or_err(tensor.py(), answer)?.is_truthy()
        }
    }
}

/// A torch tensor's values where its bytes are not its values; `None` where they are.
///
/// The exchange table describes memory, and so says nothing of what torch does lazily: a tensor
/// that is to be conjugated or negated when it is read (`x.conj().imag`) is resolved here, and one
/// that wants a gradient is refused rather than cut out of its graph in silence.
pub(crate) fn resolve_torch<'py>(
    argument: &'static str,
    tensor: &Bound<'py, PyAny>,
    layout: &Layout,
) -> Result<Option<Bound<'py, PyAny>>> {
    let py = tensor.py();
    let flags = TensorFlags::of(tensor)?;
    if flags.requires_grad(tensor)? {
        let expected = "a tensor that requires no gradient (call x.detach() first)";
        return Err(Error::invalid(argument, expected, "one that requires a gradient").into());
    }
    let conjugated = layout.dtype.is_complex() && TensorFlags::ask(&flags.is_conj, tensor)?;
    let negated = !layout.dtype.is_integer() && TensorFlags::ask(&flags.is_neg, tensor)?;
    if !conjugated && !negated {
        return Ok(None);
    }
    if argument == "out" {
        let expected = "a tensor that is not a lazily conjugated or negated view";
        return Err(Error::invalid(argument, expected, "one that is").into());
    }
    let resolved = tensor.call_method0(intern!(py, "resolve_conj"))?;
    Ok(Some(resolved.call_method0(intern!(py, "resolve_neg"))?))
}

/// The device that a DLPack producer names, without exporting; the host for anything else.
pub(crate) fn device_of(object: &Bound<'_, PyAny>) -> PyResult<DLDevice> {
    match object.getattr_opt(intern!(object.py(), "__dlpack_device__"))? {
        Some(method) => {
            let (device_type, device_id): (u32, i32) = method.call0()?.extract()?;
            Ok(DLDevice { device_type: DLDeviceType(device_type), device_id })
        }
        None => Ok(DLDevice::CPU),
    }
}
