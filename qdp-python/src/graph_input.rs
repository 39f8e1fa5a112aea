//! `GraphInput`: arrays that come with a replay.

use crate::dlpack;
use crate::errors::{Failure, Result};
use crate::exchange::Table;
use crate::layout::dlpack_of_dtype;
use crate::state::make_ready_for;
use dlpark::DlpackFlags;
use dlpark::ffi::DLDataType;
use dlpark::python::{ExportAbi, ExportRequest};
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::npyffi::{NpyTypes, PY_ARRAY_API, get_type_object, npy_intp};
use numpy::{PyArrayDescr, PyArrayDescrMethods};
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{IntoPyObjectExt, intern};
use qdp_core::Device;
use qdp_core::graph::Array;
use std::ffi::c_int;

/// An input of a replay, or a constant of its graph, on the graph's device.
///
/// On a CUDA device it may not be there yet: whoever imports it waits on its stream.
#[pyclass(frozen, module = "qdp", name = "GraphInput")]
pub(crate) struct GraphInput {
    array: Array,
    /// Its bytes are truth values.
    boolean: bool,
    /// All replays share it, so nobody may write to it.
    constant: bool,
    /// Shape and strides as DLPack has them.
    shape: Vec<i64>,
    strides: Vec<i64>,
}

impl GraphInput {
    pub(crate) fn new(array: Array, boolean: bool) -> Self {
        let shape: Vec<i64> = array.shape().iter().map(|&size| size as i64).collect();
        let strides = if let [_, columns] = *shape { vec![columns, 1] } else { vec![1] };
        Self { array, boolean, constant: false, shape, strides }
    }

    /// The same, of all replays.
    pub(crate) fn constant(self) -> Self {
        Self { constant: true, ..self }
    }

    /// Whether its memory is on the host and others see it: whoever may write gets a copy.
    fn copied(&self) -> bool {
        self.constant && self.array.device() == Device::Cpu
    }

    pub(crate) fn dlpack_dtype(&self) -> DLDataType {
        if self.boolean { DLDataType::BOOL } else { dlpack_of_dtype(self.array.dtype()) }
    }

    fn capsule<'py>(
        &self,
        py: Python<'py>,
        request: &ExportRequest<'_>,
        flags: DlpackFlags,
    ) -> Result<Bound<'py, PyAny>> {
        let capsule = match request.abi() {
            ExportAbi::Versioned => {
                dlpack::export_input::<dlpark::ffi::DLManagedTensorVersioned>(self, flags)?
                    .into_bound_py_any(py)
            }
            ExportAbi::Legacy => dlpack::export_input::<dlpark::ffi::DLManagedTensor>(self, flags)?
                .into_bound_py_any(py),
        };
        capsule.map_err(Failure::Python)
    }

    pub(crate) fn array(&self) -> &Array {
        &self.array
    }

    pub(crate) fn dims(&self) -> (&[i64], &[i64]) {
        (&self.shape, &self.strides)
    }
}

#[pymethods]
impl GraphInput {
    /// Its shape.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// Name of its element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        if self.boolean { "bool" } else { self.array.dtype().name() }
    }

    /// Where it lies, `"cpu"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> String {
        self.array.device().to_string()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let shape = self.shape(py)?.repr()?;
        Ok(format!("GraphInput(shape={shape}, dtype={}, device='{}')", self.dtype(), self.device()))
    }

    /// As a NumPy array: without a copy on the CPU, where constants are read-only, after waiting and
    /// a copy on CUDA.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> Result<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let host = if this.array.device() == Device::Cpu {
            slf.clone()
        } else {
            Bound::new(py, Self::new(py.detach(|| this.array.to_host())?, this.boolean))?
        };
        let this = host.get();
        let name = this.dtype();
        if name == "bfloat16" {
            return Err(PyTypeError::new_err("NumPy has no bfloat16").into());
        }
        let descr = PyArrayDescr::new(py, name)?;
        let size = this.array.dtype().size() as npy_intp;
        let mut shape: Vec<npy_intp> = this.shape.iter().map(|&n| n as npy_intp).collect();
        let mut strides: Vec<npy_intp> =
            this.strides.iter().map(|&n| n as npy_intp * size).collect();
        let flags = if this.constant { 0 } else { NPY_ARRAY_WRITEABLE };
        // SAFETY: the GIL is held. The memory holds the described elements, initialised and
        // aligned, for as long as `host`, which becomes the array's base and so lives as long as
        // the array. That nobody reads what is written is up to who holds the replay, whose own
        // the memory is; of a constant it is not, and the base lets nobody make the array writable.
        // NumPy takes over the references to the dtype and to the base.
        unsafe {
            let array = PY_ARRAY_API.PyArray_NewFromDescr(
                py,
                get_type_object(py, NpyTypes::PyArray_Type),
                descr.into_dtype_ptr(),
                shape.len() as c_int,
                shape.as_mut_ptr(),
                strides.as_mut_ptr(),
                this.array.as_ptr().cast(),
                flags,
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

    /// As a torch tensor on the same device, ready on torch's current stream: without a copy, but
    /// of a constant, which all replays share.
    fn torch<'py>(slf: &Bound<'py, Self>) -> Result<Bound<'py, PyAny>> {
        let py = slf.py();
        let torch = py.import(intern!(py, "torch"))?;
        let this = slf.get();
        let tensor = if let Some(table) = Table::torch(py)? {
            if let Device::Cuda(ordinal) = this.array.device() {
                this.array.make_ready_on(table.current_stream(py, ordinal)?)?;
            }
            table.to_python(py, dlpack::export_input(this, DlpackFlags::empty())?)?
        } else {
            torch.call_method1(intern!(py, "from_dlpack"), (slf,))?
        };
        if this.constant { Ok(tensor.call_method0(intern!(py, "clone"))?) } else { Ok(tensor) }
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> Result<Bound<'py, PyAny>> {
        let request = ExportRequest::parse(stream, max_version, dl_device, copy)?;
        let own = crate::layout::dlpack_device(self.array.device());
        let copied = self.copied();
        if copy == Some(!copied) || request.device().is_some_and(|device| device != own) {
            let text = if copied {
                "a constant of a graph is exported as a copy"
            } else {
                "an input of a graph is exported as it lies; copy the tensor made of it"
            };
            return Err(PyBufferError::new_err(text).into());
        }
        make_ready_for(self.array.device(), &request, |stream| self.array.make_ready_on(stream))?;
        if copied {
            let own = Self::new(self.array.copied_to_host()?, self.boolean);
            return own.capsule(py, &request, DlpackFlags::IS_COPIED);
        }
        let shared = if self.constant { DlpackFlags::READ_ONLY } else { DlpackFlags::empty() };
        self.capsule(py, &request, shared)
    }

    /// DLPack's type and number of the device.
    fn __dlpack_device__(&self) -> (u32, i32) {
        crate::layout::dlpack_device(self.array.device()).into()
    }
}
