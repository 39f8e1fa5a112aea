//! `StateBatch`: a batch of states and the ways out of it.

use crate::dlpack;
use crate::errors::{Failure, Result};
use crate::exchange::Table;
use dlpark::DlpackFlags;
use dlpark::python::{CudaStreamRequest, ExportAbi, ExportRequest};
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::npyffi::{NpyTypes, PY_ARRAY_API, get_type_object, npy_intp};
use numpy::{Complex32, Complex64, PyArrayDescr, PyArrayDescrMethods, dtype};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PySlice, PyTuple};
use pyo3::{IntoPyObjectExt, intern};
use qdp_core::cuda::RawStream;
use qdp_core::{Device, Error, Precision};
use std::ffi::c_int;

use crate::options;

/// A batch of state vectors, shape `(batch, 2**num_qubits)`, complex64 or complex128.
///
/// Slicing gives views; an integer index gives one state, shape `(2**num_qubits,)`. On a CUDA device
/// the states may not be written yet: whoever imports them waits on its stream, and the host waits
/// only where it reads a value.
#[pyclass(frozen, module = "qdp", name = "StateBatch")]
pub(crate) struct StateBatch {
    state: qdp_core::StateBatch,
    /// One state, shown without the batch dimension.
    single: bool,
    /// Shape and strides as DLPack has them, here so that a borrowed view can point at them.
    shape: [i64; 2],
    strides: [i64; 2],
}

impl StateBatch {
    pub(crate) fn new(state: qdp_core::StateBatch, single: bool) -> Self {
        let shape = [state.batch() as i64, state.dim() as i64];
        let strides = [state.row_stride() as i64, 1];
        Self { state, single, shape, strides }
    }

    pub(crate) fn state(&self) -> &qdp_core::StateBatch {
        &self.state
    }

    /// Shape, as DLPack has it.
    pub(crate) fn dims(&self) -> &[i64] {
        &self.shape[usize::from(self.single)..]
    }

    /// Strides in amplitudes, as DLPack has them.
    pub(crate) fn strides(&self) -> &[i64] {
        &self.strides[usize::from(self.single)..]
    }

    /// These states in other memory.
    fn with_state(&self, state: qdp_core::StateBatch) -> Self {
        Self::new(state, self.single)
    }

    fn descr<'py>(&self, py: Python<'py>) -> Bound<'py, PyArrayDescr> {
        match self.state.precision() {
            Precision::Complex64 => dtype::<Complex32>(py),
            Precision::Complex128 => dtype::<Complex64>(py),
        }
    }

    /// Raises what validation found, after waiting for the states.
    fn checked(&self, py: Python<'_>) -> Result<()> {
        match self.state.device() {
            Device::Cpu => Ok(self.state.check()?),
            Device::Cuda(_) => Ok(py.detach(|| self.state.check())?),
        }
    }

    /// These states in host memory, checked.
    fn on_host(slf: &Bound<'_, Self>) -> Result<Py<Self>> {
        let (py, this) = (slf.py(), slf.get());
        this.checked(py)?;
        if this.state.device() == Device::Cpu {
            return Ok(slf.clone().unbind());
        }
        let host = py.detach(|| this.state.to_host())?;
        Ok(Py::new(py, this.with_state(host))?)
    }

    /// A NumPy array over states in host memory, which it keeps.
    fn host_array<'py>(host: &Bound<'py, Self>) -> Result<Bound<'py, PyAny>> {
        let (py, this) = (host.py(), host.get());
        let size = this.state.precision().size() as npy_intp;
        let mut shape: Vec<npy_intp> = this.dims().iter().map(|&n| n as npy_intp).collect();
        let mut strides: Vec<npy_intp> =
            this.strides().iter().map(|&n| n as npy_intp * size).collect();
        // SAFETY: the GIL is held. The memory holds the described elements, initialised and
        // aligned, for as long as `host`, which becomes the array's base and so lives as long as
        // the array. NumPy takes over the references to the dtype and to the base.
        unsafe {
            let array = PY_ARRAY_API.PyArray_NewFromDescr(
                py,
                get_type_object(py, NpyTypes::PyArray_Type),
                this.descr(py).into_dtype_ptr(),
                shape.len() as c_int,
                shape.as_mut_ptr(),
                strides.as_mut_ptr(),
                this.state.as_ptr().cast(),
                NPY_ARRAY_WRITEABLE,
                std::ptr::null_mut(),
            );
            let array = Bound::from_owned_ptr_or_err(py, array)?;
            let base = host.clone().into_ptr();
            if PY_ARRAY_API.PyArray_SetBaseObject(py, array.as_ptr().cast(), base) != 0 {
                return Err(PyErr::fetch(py).into());
            }
            Ok(array)
        }
    }

    /// Makes the states ready for a consumer that passed `stream` to `__dlpack__`.
    fn make_ready_for(&self, py: Python<'_>, request: &ExportRequest<'_>) -> Result<()> {
        if self.state.device() == Device::Cpu && request.stream().is_none() {
            return self.checked(py);
        }
        make_ready_for(self.state.device(), request, |stream| self.state.make_ready_on(stream))
    }
}

/// Makes memory on `device` ready, by `make_ready_on`, for a consumer that passed `stream` to
/// `__dlpack__`.
pub(crate) fn make_ready_for(
    device: Device,
    request: &ExportRequest<'_>,
    make_ready_on: impl FnOnce(RawStream) -> qdp_core::Result<()>,
) -> Result<()> {
    if device == Device::Cpu {
        if request.stream().is_some() {
            let text = "states on the CPU have no stream; pass stream=None";
            return Err(PyBufferError::new_err(text).into());
        }
        return Ok(());
    }
    let handle = |handle: usize| {
        // SAFETY: a consumer names a stream of its own that lives, by the protocol.
        unsafe { RawStream::from_handle(handle) }
    };
    let stream = match request.stream() {
        Some(object) if object.extract::<i64>().is_err() => options::stream(object)?,
        _ => match request.cuda_stream()? {
            CudaStreamRequest::NoSync => return Ok(()),
            CudaStreamRequest::Omitted | CudaStreamRequest::LegacyDefault => handle(1),
            CudaStreamRequest::PerThreadDefault => handle(2),
            CudaStreamRequest::Pointer(pointer) => handle(pointer),
        },
    };
    Ok(make_ready_on(stream)?)
}

#[pymethods]
impl StateBatch {
    /// Shape of the states, `(batch, 2**num_qubits)` or `(2**num_qubits,)`.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.dims())
    }

    /// Number of dimensions, 2 or 1.
    #[getter]
    fn ndim(&self) -> usize {
        self.dims().len()
    }

    /// NumPy's dtype of an amplitude: complex64 or complex128.
    #[getter]
    fn dtype<'py>(&self, py: Python<'py>) -> Bound<'py, PyArrayDescr> {
        self.descr(py)
    }

    /// Where the states lie, `"cpu"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> String {
        self.state.device().to_string()
    }

    /// Number of qubits of each state.
    #[getter]
    fn num_qubits(&self) -> u32 {
        self.state.num_qubits()
    }

    /// Bytes of the amplitudes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.state.num_bytes()
    }

    fn __len__(&self) -> PyResult<usize> {
        if self.single {
            return Err(PyTypeError::new_err("a single state has no length; index the batch"));
        }
        Ok(self.state.batch())
    }

    fn __getitem__(&self, index: &Bound<'_, PyAny>) -> Result<Self> {
        if self.single {
            return Err(PyTypeError::new_err(
                "a single state cannot be indexed; read its amplitudes through numpy() or torch()",
            )
            .into());
        }
        let batch = self.state.batch();
        if let Ok(slice) = index.cast::<PySlice>() {
            let range = slice.indices(batch as isize)?;
            if range.step != 1 {
                return Err(Error::invalid("index", "a slice with step 1", range.step).into());
            }
            let start = range.start as usize;
            return Ok(Self::new(self.state.slice(start..start + range.slicelength)?, false));
        }
        let number = index.extract::<isize>().or_else(|error| {
            // An integer beyond the machine's is beyond every batch.
            let integer = error.is_instance_of::<PyOverflowError>(index.py());
            if integer { Ok(isize::MIN) } else { Err(error) }
        })?;
        let row = if number < 0 { number.saturating_add(batch as isize) } else { number };
        if row < 0 || row as usize >= batch {
            let text = format!("index {index} is out of range for a batch of {batch}");
            return Err(PyIndexError::new_err(text).into());
        }
        let row = row as usize;
        Ok(Self::new(self.state.slice(row..row + 1)?, true))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (shape, device) = (self.shape(py)?.repr()?, self.device());
        let dtype = self.state.precision();
        Ok(format!("StateBatch(shape={shape}, dtype={dtype}, device='{device}')"))
    }

    /// Wait for the states and raise what validation found about the data they were made of.
    fn check(&self, py: Python<'_>) -> Result<()> {
        self.checked(py)
    }

    /// Wait until the states are written.
    fn synchronize(&self, py: Python<'_>) -> Result<()> {
        Ok(py.detach(|| self.state.synchronize())?)
    }

    /// The states as a NumPy array: without a copy on the CPU, after waiting and a copy on CUDA.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> Result<Bound<'py, PyAny>> {
        Self::host_array(Self::on_host(slf)?.bind(slf.py()))
    }

    /// The states as a torch tensor on the same device, without a copy, ready on torch's current
    /// stream.
    pub(crate) fn torch<'py>(slf: &Bound<'py, Self>) -> Result<Bound<'py, PyAny>> {
        let py = slf.py();
        let torch = py.import(intern!(py, "torch"))?;
        let this = slf.get();
        let Some(table) = Table::torch(py)? else {
            return Ok(torch.call_method1(intern!(py, "from_dlpack"), (slf,))?);
        };
        match this.state.device() {
            Device::Cpu => this.state.check()?,
            Device::Cuda(ordinal) => {
                this.state.make_ready_on(table.current_stream(py, ordinal)?)?;
            }
        }
        Ok(table.to_python(py, dlpack::export(this, DlpackFlags::empty())?)?)
    }

    #[pyo3(signature = (dtype=None, copy=None))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        dtype: Option<&Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> Result<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let wanted = dtype.map(|dtype| PyArrayDescr::new(py, dtype)).transpose()?;
        let converts = wanted.as_ref().is_some_and(|wanted| !wanted.is_equiv_to(&this.descr(py)));
        let on_device = this.state.device() != Device::Cpu;
        if copy == Some(false) && (converts || on_device) {
            let text = format!("states as {} on {} need a copy", this.descr(py), this.device());
            return Err(PyValueError::new_err(text).into());
        }
        let array = Self::numpy(slf)?;
        match wanted {
            Some(wanted) if converts => Ok(array.call_method1(intern!(py, "astype"), (wanted,))?),
            _ if copy == Some(true) && !on_device => Ok(array.call_method0(intern!(py, "copy"))?),
            _ => Ok(array),
        }
    }

    /// The states as a DLPack capsule; see the Python array API standard for the arguments.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        slf: &Bound<'py, Self>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> Result<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let request = ExportRequest::parse(stream, max_version, dl_device, copy)?;
        let own = crate::layout::dlpack_device(this.state.device());
        let to_host = request.device().is_some_and(|device| device != own);
        if to_host && request.device() != Some(dlpark::ffi::DLDevice::CPU) {
            let text = format!("states on {} cannot be copied to that device", this.device());
            return Err(PyBufferError::new_err(text).into());
        }
        if to_host && copy == Some(false) {
            let text = format!("states on {} need a copy to be read on the CPU", this.device());
            return Err(PyBufferError::new_err(text).into());
        }
        if to_host {
            // The copy is over when it is exported, so the consumer's stream does not matter.
            let host = Self::on_host(slf)?;
            return capsule(py, host.get(), &request, DlpackFlags::IS_COPIED);
        }
        if copy == Some(true) {
            let copied = this.with_state(py.detach(|| this.state.copy())?);
            copied.make_ready_for(py, &request)?;
            return capsule(py, &copied, &request, DlpackFlags::IS_COPIED);
        }
        this.make_ready_for(py, &request)?;
        capsule(py, this, &request, DlpackFlags::empty())
    }

    /// DLPack's type and number of the device.
    fn __dlpack_device__(&self) -> (u32, i32) {
        crate::layout::dlpack_device(self.state.device()).into()
    }
}

/// A capsule of the kind that the consumer can read. The older kind has no flags.
fn capsule<'py>(
    py: Python<'py>,
    state: &StateBatch,
    request: &ExportRequest<'_>,
    flags: DlpackFlags,
) -> Result<Bound<'py, PyAny>> {
    let capsule = match request.abi() {
        ExportAbi::Versioned => {
            dlpack::export::<dlpark::ffi::DLManagedTensorVersioned>(state, flags)?
                .into_bound_py_any(py)
        }
        ExportAbi::Legacy => {
            let none = DlpackFlags::empty();
            dlpack::export::<dlpark::ffi::DLManagedTensor>(state, none)?.into_bound_py_any(py)
        }
    };
    capsule.map_err(Failure::Python)
}
