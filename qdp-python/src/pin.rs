//! `qdp.pin`: the caller's memory, page-locked in place.

use crate::engine::all_shared;
use crate::errors::{Result, invalid_because};
use crate::exchange::device_of;
use crate::layout::device_of_dlpack;
use dlpark::python::{ImportRequest, ImportedDlpack};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use parking_lot::Mutex;
use pyo3::intern;
use pyo3::prelude::*;
use qdp_core::cuda::{Context, RegisteredMemory};
use qdp_core::{Device, Error, Unavailable};
use std::ptr;
use std::sync::Arc;

const ARGUMENT: &str = "array";

/// An array whose memory is page-locked: made by :func:`qdp.pin`.
///
/// Attributes: ``array``, the array as it was given; ``nbytes``; ``pinned``, whether its memory is
/// page-locked now: not after :meth:`close`, and never on a machine without a usable GPU.
///
/// A context manager: leaving it closes it.
#[pyclass(frozen, module = "qdp")]
pub(crate) struct Pinned {
    // Let go before the memory is.
    held: Mutex<Option<Held>>,
    array: Py<PyAny>,
    nbytes: usize,
}

struct Held {
    registered: Option<RegisteredMemory>,
    // What keeps the memory where it is: NumPy and torch would free or move it otherwise.
    _memory: Memory,
}

/// Keeps an array's memory mapped: held, never looked at.
enum Memory {
    Array(#[allow(dead_code)] Py<PyUntypedArray>),
    Dlpack(#[allow(dead_code)] ImportedDlpack),
}

/// Page-locks an array's memory in place, so that a GPU copies from it at the speed of the link.
///
/// ``array`` is a NumPy array, a CPU tensor of torch's, or anything else on the host with
/// ``__dlpack__``, of any shape and element type, whose elements fill one range of memory without
/// gaps (in any order of dimensions). Encoding it, or a part of it, then skips the copy to a
/// staging buffer.
///
/// Locking takes time in proportion to the memory, so it pays for arrays that are encoded more than
/// once. The pages stay locked until :meth:`Pinned.close`, until a ``with`` block around it is left,
/// or until the :class:`Pinned` is dropped; a call that is copying from the array then keeps them
/// locked until it is done. It keeps the array alive. The memory must stay where it is meanwhile: do
/// not resize the array in place.
///
/// On a machine without a usable GPU nothing is locked: the result says ``pinned == False``, and
/// works the same otherwise.
///
/// Raises :class:`qdp.InvalidArgumentError` for anything that is no array, an array with gaps, an
/// empty one, and one that is page-locked already (by torch or by another ``pin``);
/// :class:`qdp.DeviceMismatchError` for one on a device; :class:`qdp.OutOfMemoryError` where the
/// system does not lock as much; :class:`qdp.DriverError` for memory that cannot be locked, as that
/// of some mapped files.
#[pyfunction]
pub(crate) fn pin(py: Python<'_>, array: &Bound<'_, PyAny>) -> Result<Pinned> {
    let (start, nbytes, memory) = find(array)?;
    if nbytes == 0 {
        return Err(Error::invalid(ARGUMENT, "at least one byte", "an empty array").into());
    }
    let start = start.expose_provenance();
    let lock = || {
        let start = ptr::with_exposed_provenance_mut(start);
        // SAFETY: `memory` keeps the range mapped until after the registration is dropped: they
        // are fields of one struct, in this order, and calls keep what they copy from.
        unsafe { RegisteredMemory::new(&context()?, start, nbytes) }
    };
    let registered = match py.detach(lock) {
        Ok(registered) => Some(registered),
        Err(Error::DeviceUnavailable { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let held = Mutex::new(Some(Held { registered, _memory: memory }));
    Ok(Pinned { held, array: array.clone().unbind(), nbytes })
}

#[pymethods]
impl Pinned {
    /// The array, as it was given.
    #[getter]
    fn array(&self, py: Python<'_>) -> Py<PyAny> {
        self.array.clone_ref(py)
    }

    /// Bytes of the array.
    #[getter]
    fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// Whether its memory is page-locked now.
    #[getter]
    fn pinned(&self) -> bool {
        self.held.lock().as_ref().is_some_and(|held| held.registered.is_some())
    }

    /// Lets the pages go. Closing twice is allowed.
    fn close(&self, py: Python<'_>) {
        let held = self.held.lock().take();
        // Without the GIL, as the driver may take a while; the array is let go with it again.
        if let Some(Held { registered, _memory }) = held {
            py.detach(|| drop(registered));
        }
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        let pinned = if self.pinned() { "True" } else { "False" };
        format!("<qdp.Pinned: {} bytes, pinned={pinned}>", self.nbytes)
    }
}

/// The context to lock pages with: that of a device in use, else of the first one. They are locked
/// for all.
fn context() -> qdp_core::Result<Arc<Context>> {
    if qdp_kernels::IMAGE.is_none() {
        let (device, reason) = ("cuda".to_owned(), Unavailable::KernelsNotBuilt);
        return Err(Error::DeviceUnavailable { device, reason });
    }
    let in_use = all_shared().find_map(|engine| match engine.device() {
        Device::Cuda(ordinal) => Some(ordinal as i32),
        Device::Cpu => None,
    });
    Context::open(in_use.unwrap_or(0))
}

/// Where an array's memory begins, its bytes, and what keeps it there.
fn find(array: &Bound<'_, PyAny>) -> Result<(*mut u8, usize, Memory)> {
    if let Ok(array) = array.cast::<PyUntypedArray>() {
        let size = array.dtype().itemsize();
        let strides: Vec<isize> = array.strides().to_vec();
        // SAFETY: the array is alive while it is borrowed, and NumPy keeps the pointer in it.
        let first = unsafe { (*array.as_array_ptr()).fields.data.cast::<u8>() };
        let (start, bytes) = range(first, size, array.shape(), &strides)?;
        return Ok((start, bytes, Memory::Array(array.clone().unbind())));
    }
    if !array.hasattr(intern!(array.py(), "__dlpack__"))? {
        let got = array.get_type().name()?;
        let expected = "a NumPy array, a tensor, or anything else with __dlpack__";
        return Err(Error::invalid(ARGUMENT, expected, got).into());
    }
    let device = device_of_dlpack(ARGUMENT, device_of(array)?)?;
    if device != Device::Cpu {
        let (expected, got) = ("the host".to_owned(), device.to_string());
        return Err(Error::DeviceMismatch { argument: ARGUMENT, expected, got }.into());
    }
    let undescribable =
        |error| invalid_because(array.py(), ARGUMENT, "an array that DLPack can describe", error);
    let imported =
        ImportRequest::new(array.as_borrowed()).and_then(|request| request.import(None, None));
    let imported = imported.map_err(undescribable)?;
    let (start, bytes) = {
        let tensor = imported
            .validate()
            .map_err(|error| Error::invalid(ARGUMENT, "a valid DLPack tensor", error))?;
        let size = usize::from(tensor.dtype().bits) * usize::from(tensor.dtype().lanes) / 8;
        let shape: Vec<usize> = tensor.shape().iter().map(|&n| n as usize).collect();
        let strides = tensor
            .strides_or_compact()
            .map_err(|error| Error::invalid(ARGUMENT, "a tensor with strides of 64 bits", error))?;
        let strides: Vec<isize> = strides.iter().map(|&s| s as isize * size as isize).collect();
        let first = tensor.data_ptr().cast::<u8>().cast_mut();
        range(first.wrapping_add(tensor.byte_offset() as usize), size, &shape, &strides)?
    };
    Ok((start, bytes, Memory::Dlpack(imported)))
}

/// The range of memory that elements fill without gaps or overlaps, from the address of the first
/// one and the strides in bytes; of no bytes for no elements.
fn range(
    first: *mut u8,
    size: usize,
    shape: &[usize],
    strides: &[isize],
) -> Result<(*mut u8, usize)> {
    if shape.contains(&0) {
        return Ok((first, 0));
    }
    let mut dimensions: Vec<(usize, isize)> =
        shape.iter().copied().zip(strides.iter().copied()).filter(|&(n, _)| n > 1).collect();
    dimensions.sort_unstable_by_key(|&(_, stride)| stride.unsigned_abs());
    let (mut start, mut bytes) = (first, size);
    for (n, stride) in dimensions {
        if stride.unsigned_abs() != bytes {
            let got = format!("shape {shape:?} with strides of {strides:?} bytes");
            return Err(Error::invalid(ARGUMENT, "memory without gaps", got).into());
        }
        if stride < 0 {
            start = start.wrapping_sub((n - 1) * bytes);
        }
        bytes *= n;
    }
    Ok((start, bytes))
}
