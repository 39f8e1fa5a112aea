//! Data of the caller's, borrowed as the core's [`Input`].

use crate::affine::Map;
use crate::arrow::{self, Samples};
use crate::errors::{Failure, Result, because, first_line, invalid_because};
use crate::exchange::{Table, resolve_torch};
use crate::interrupt::refusal;
use crate::layout::{Layout, SHAPES, device_of_dlpack, unusable};
use dlpark::ffi::{DLDevice, DLDeviceType};
use dlpark::python::consumer::stream::cuda;
use dlpark::python::{DlpackStream, ImportRequest, ImportedDlpack, StreamArg};
use numpy::npyffi::flags::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS};
use numpy::{PyUntypedArray, PyUntypedArrayMethods, npyffi};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyTuple};
use qdp_core::cuda::RawStream;
use qdp_core::{DType, Device, Engine, Error, Input, OwnedInput};
use std::ffi::{c_char, c_long, c_void};
use std::ops::RangeInclusive;
use std::ptr;

const ARGUMENT: &str = "data";

/// Data of the caller's: where it lies, and what keeps it there.
pub(crate) struct Data<'py> {
    pub(crate) layout: Layout,
    /// Where data on a device is ready.
    pub(crate) stream: Option<RawStream>,
    /// The exchange table that describes the data, where one does.
    pub(crate) table: Option<Table>,
    owner: Owner<'py>,
    /// Fits the data: checked where it was taken.
    map: Option<Box<Map<'py>>>,
}

/// What keeps the described memory valid: held, never looked at.
enum Owner<'py> {
    Object(#[allow(dead_code)] Bound<'py, PyAny>),
    Dlpack(ImportedDlpack),
    Arrow(#[allow(dead_code)] Samples),
}

impl<'py> Data<'py> {
    /// Borrows whatever a caller may pass as data for `engine`. Data on a device is made ready on
    /// `stream`, or where that is `None`, on its producer's stream or the engine's.
    pub(crate) fn import(
        object: &Bound<'py, PyAny>,
        engine: &Engine,
        stream: Option<RawStream>,
    ) -> Result<Self> {
        let data = Self::find(object, engine, stream)?;
        let device = data.layout.device;
        if device == Device::Cpu || device == engine.device() {
            return Ok(data);
        }
        Err(Error::DeviceMismatch {
            argument: ARGUMENT,
            expected: engine.device().to_string(),
            got: device.to_string(),
        }
        .into())
    }

    fn find(
        object: &Bound<'py, PyAny>,
        engine: &Engine,
        stream: Option<RawStream>,
    ) -> Result<Self> {
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            return Self::from_numpy(array);
        }
        if let Some(table) = Table::of(object)?
            && let Some(data) = Self::from_table(table, object)?
        {
            // The memory is ordered with its producer's stream. For work on another one the
            // producer has to be asked, which is what `__dlpack__` does.
            return match (data.stream, stream, &data.owner) {
                (Some(ready), Some(wanted), Owner::Object(object)) if ready != wanted => {
                    Self::from_dlpack(object, engine, stream).map_err(|failure| match failure {
                        Failure::Python(error) => undescribable(object.py(), error),
                        core @ Failure::Core(_) => core,
                    })
                }
                _ => Ok(data),
            };
        }
        if let Some(data) = Self::from_arrow(object)? {
            return Ok(data);
        }
        if object.hasattr(intern!(object.py(), "__dlpack__"))? {
            match Self::from_dlpack(object, engine, stream) {
                Ok(data) => return Ok(data),
                // A producer that cannot export (an array that is read-only, say) may have values
                // nonetheless.
                Err(Failure::Python(error)) => {
                    let py = object.py();
                    let error = refusal(py, error)?;
                    if !object.hasattr(intern!(py, "__array__"))? {
                        return Err(undescribable(py, error));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Self::from_values(object)
    }

    fn from_numpy(array: &Bound<'py, PyUntypedArray>) -> Result<Self> {
        let py = array.py();
        refuse_mask(array)?;
        let (layout, array) = if let Some(layout) = Layout::of_numpy(ARGUMENT, array)? {
            (layout, array.clone())
        } else {
            let native = array.dtype().call_method1(intern!(py, "newbyteorder"), ("=",))?;
            let copy = array.call_method1(intern!(py, "astype"), (native,))?;
            let copy = copy.cast_into::<PyUntypedArray>().map_err(PyErr::from)?;
            let layout = Layout::of_numpy(ARGUMENT, &copy)?
                .ok_or_else(|| unusable(ARGUMENT, copy.dtype().to_string()))?;
            (layout, copy)
        };
        Ok(Self {
            layout,
            stream: None,
            table: None,
            owner: Owner::Object(array.into_any()),
            map: None,
        })
    }

    /// Borrows through an exchange table; `None` where it only exports.
    pub(crate) fn from_table(table: Table, object: &Bound<'py, PyAny>) -> Result<Option<Self>> {
        let Some(mut layout) = table.layout(ARGUMENT, object)? else { return Ok(None) };
        let mut object = object.clone();
        if Table::torch(object.py())? == Some(table)
            && let Some(resolved) = resolve_torch(ARGUMENT, &object, &layout)?
        {
            let Some(plain) = table.layout(ARGUMENT, &resolved)? else { return Ok(None) };
            (layout, object) = (plain, resolved);
        }
        let ready = match layout.device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => Some(table.current_stream(object.py(), ordinal)?),
        };
        Ok(Some(Self {
            layout,
            stream: ready,
            table: Some(table),
            owner: Owner::Object(object),
            map: None,
        }))
    }

    fn from_arrow(object: &Bound<'py, PyAny>) -> Result<Option<Self>> {
        let py = object.py();
        if !object.hasattr(intern!(py, "__arrow_c_array__"))?
            && !object.hasattr(intern!(py, "__arrow_c_stream__"))?
        {
            return Ok(None);
        }
        // pandas hands its index over as one more column, so its values are taken instead.
        let module = object.get_type().module()?;
        if module.to_str().is_ok_and(|name| name == "pandas" || name.starts_with("pandas.")) {
            return Ok(None);
        }
        let samples = arrow::import(object).map_err(|failure| match failure {
            Failure::Python(error) => {
                invalid_because(py, ARGUMENT, "Arrow data that can be read", error)
            }
            core @ Failure::Core(_) => core,
        })?;
        let source = (samples.as_ptr().cast_mut(), samples.dtype, Device::Cpu);
        let features = samples.features;
        let layout = match samples.batch {
            None => Layout::new(ARGUMENT, source, &[features], &[1])?,
            Some(batch) => {
                Layout::new(ARGUMENT, source, &[batch, features], &[features as isize, 1])?
            }
        };
        Ok(Some(Self {
            layout,
            stream: None,
            table: None,
            owner: Owner::Arrow(samples),
            map: None,
        }))
    }

    fn from_dlpack(
        object: &Bound<'py, PyAny>,
        engine: &Engine,
        stream: Option<RawStream>,
    ) -> Result<Self> {
        let (layout, imported, stream) = import_dlpack(ARGUMENT, object, engine, stream)?;
        Ok(Self { layout, stream, table: None, owner: Owner::Dlpack(imported), map: None })
    }

    /// Lists, tuples, numbers and whatever else NumPy makes an array of.
    fn from_values(object: &Bound<'py, PyAny>) -> Result<Self> {
        static ASARRAY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = object.py();
        // NumPy would take the hidden values of its elements.
        if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
            for item in object.try_iter()? {
                if let Ok(array) = item?.cast_into::<PyUntypedArray>() {
                    refuse_mask(&array)?;
                }
            }
        }
        let asarray = ASARRAY.import(py, "numpy", "asarray")?;
        let array = asarray.call1((object,)).map_err(|error| {
            if !first_line(py, &error).contains("inhomogeneous") {
                return invalid_because(py, ARGUMENT, "numbers", error);
            }
            let ragged = Error::Shape {
                argument: ARGUMENT,
                expected: SHAPES.to_owned(),
                got: "samples of different lengths".to_owned(),
            };
            because(py, ragged, error)
        })?;
        Self::from_numpy(array.cast::<PyUntypedArray>()?)
    }

    /// The data as the core reads it.
    pub(crate) fn input(&self) -> Input<'_> {
        // SAFETY: the layout came from a producer that vouches for it, with alignment checked
        // where it is not the producer's to keep; `owner` keeps the memory for as long as `self`
        // is borrowed. That nobody writes meanwhile is the caller's side of passing an array.
        let input = unsafe { self.layout.input() };
        match &self.map {
            None => input,
            Some(map) => input.with_affine(map.affine()).expect("checked where it was taken"),
        }
    }

    /// The data with its features mapped where they are read.
    pub(crate) fn with_map(self, map: Box<Map<'py>>) -> Result<Self> {
        let _ = self.input().with_affine(map.affine())?;
        Ok(Self { map: Some(map), ..self })
    }

    pub(crate) fn has_map(&self) -> bool {
        self.map.is_some()
    }

    /// The data for somebody who reads it later, on another thread.
    pub(crate) fn into_owned(self) -> OwnedInput {
        let owner: Box<dyn Send> = match self.owner {
            Owner::Object(object) => Box::new(object.unbind()),
            Owner::Dlpack(tensor) => Box::new(tensor),
            Owner::Arrow(samples) => Box::new(samples),
        };
        // SAFETY: as in `input`; the owner goes along.
        unsafe { OwnedInput::from_raw(self.layout.input(), owner) }
    }

    /// What has to live until the device has read the data; nothing where the producer frees in
    /// the order of its stream.
    pub(crate) fn into_device_owner(self) -> Option<Box<dyn Send>> {
        match self.owner {
            Owner::Dlpack(tensor) if self.layout.device != Device::Cpu => Some(Box::new(tensor)),
            _ => None,
        }
    }
}

/// One sample that a NumPy array holds without gaps in one of the usual types: what
/// [`Data::import`] finds, at a tenth of the cost.
pub(crate) fn plain_sample<'a>(object: &'a Bound<'_, PyAny>) -> Option<Input<'a>> {
    plain(object, 1..=1)
}

/// [`plain_sample`] for one or several.
pub(crate) fn plain_array<'a>(object: &'a Bound<'_, PyAny>) -> Option<Input<'a>> {
    plain(object, 1..=2)
}

fn plain<'a>(object: &'a Bound<'_, PyAny>, ndim: RangeInclusive<i32>) -> Option<Input<'a>> {
    let ptr = object.as_ptr();
    // SAFETY: a NumPy array, as is asked first, has these fields, and is alive.
    unsafe {
        if npyffi::PyArray_CheckExact(object.py(), ptr) == 0 {
            return None;
        }
        let array = &(*ptr.cast::<npyffi::PyArrayObject>()).fields;
        let descr = &(*array.descr).fields;
        let usable = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;
        let native = descr.byteorder == NATIVE || descr.byteorder == ONE_BYTE;
        if !ndim.contains(&array.nd) || array.flags & usable != usable || !native {
            return None;
        }
        let dtype = match NPY_TYPES.get(usize::try_from(descr.type_num).ok()?)? {
            Some(dtype) => *dtype,
            None => return None,
        };
        let shape = match array.nd {
            1 => (1, *array.dimensions as usize),
            _ => (*array.dimensions as usize, *array.dimensions.add(1) as usize),
        };
        let strides = (shape.1 as isize, 1);
        Some(Input::from_raw(array.data.cast::<u8>(), dtype, Device::Cpu, shape, strides))
    }
}

/// NumPy's mark of the machine's own byte order, and of types that have none.
const NATIVE: c_char = b'=' as c_char;
const ONE_BYTE: c_char = b'|' as c_char;

/// The types of a [`plain_sample`] by NumPy's numbers: those whose numbers mean the same
/// everywhere.
const NPY_TYPES: [Option<DType>; 16] = {
    let mut types = [None; 16];
    types[npyffi::NPY_TYPES::NPY_BOOL as usize] = Some(DType::U8);
    types[npyffi::NPY_TYPES::NPY_UBYTE as usize] = Some(DType::U8);
    types[npyffi::NPY_TYPES::NPY_BYTE as usize] = Some(DType::I8);
    types[npyffi::NPY_TYPES::NPY_SHORT as usize] = Some(DType::I16);
    types[npyffi::NPY_TYPES::NPY_INT as usize] = Some(DType::I32);
    types[npyffi::NPY_TYPES::NPY_LONGLONG as usize] = Some(DType::I64);
    types[npyffi::NPY_TYPES::NPY_LONG as usize] =
        Some(if size_of::<c_long>() == 8 { DType::I64 } else { DType::I32 });
    types[npyffi::NPY_TYPES::NPY_FLOAT as usize] = Some(DType::F32);
    types[npyffi::NPY_TYPES::NPY_DOUBLE as usize] = Some(DType::F64);
    types[npyffi::NPY_TYPES::NPY_CFLOAT as usize] = Some(DType::C64);
    types[npyffi::NPY_TYPES::NPY_CDOUBLE as usize] = Some(DType::C128);
    types
};

fn undescribable(py: Python<'_>, cause: PyErr) -> Failure {
    invalid_because(py, ARGUMENT, "an array that DLPack can describe", cause)
}

/// Imports by `__dlpack__`; a device's tensor is made ready on `stream` or the engine's own, which
/// is named in the answer.
pub(crate) fn import_dlpack(
    argument: &'static str,
    object: &Bound<'_, PyAny>,
    engine: &Engine,
    stream: Option<RawStream>,
) -> Result<(Layout, ImportedDlpack, Option<RawStream>)> {
    let request = ImportRequest::new(object.as_borrowed())?;
    // A producer too old to say where it is can only be on the host.
    let device_type = request.device().map_or(DLDeviceType::CPU, |device| device.device_type);
    let on_device = matches!(device_type, DLDeviceType::CUDA | DLDeviceType::CUDAMANAGED);
    let stream = stream.or_else(|| engine.stream()).filter(|_| on_device);
    if on_device {
        // Asked first, as the engine's stream means nothing to another device.
        let device = device_of_dlpack(argument, request.device()?)?;
        if device != engine.device() {
            return Err(Error::DeviceMismatch {
                argument,
                expected: engine.device().to_string(),
                got: device.to_string(),
            }
            .into());
        }
    }
    let consumer = stream.map(ConsumerStream);
    let imported = match request.import(consumer.as_ref().map(|s| s as &dyn DlpackStream), None) {
        // A producer from before DLPack 1.0 does not know all arguments.
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            import_old_dlpack(object, stream)?
        }
        imported => imported?,
    };
    let layout = {
        let tensor = imported
            .validate()
            .map_err(|error| Error::invalid(argument, "a valid DLPack tensor", error))?;
        Layout::of_dlpack(argument, &tensor)?
    };
    Ok((layout, imported, stream))
}

/// Imports by the first form of `__dlpack__`, whose only argument is the stream.
fn import_old_dlpack(
    object: &Bound<'_, PyAny>,
    stream: Option<RawStream>,
) -> PyResult<ImportedDlpack> {
    let py = object.py();
    let arguments = PyDict::new(py);
    if let Some(stream) = stream {
        arguments.set_item(intern!(py, "stream"), stream.handle())?;
    }
    let capsule = object.call_method(intern!(py, "__dlpack__"), (), Some(&arguments))?;
    ImportRequest::new(capsule.as_borrowed())?.import(None, None)
}

/// The stream that a producer is asked to make its tensor ready on.
struct ConsumerStream(RawStream);

// SAFETY: the handle is the engine's own stream, or one that the caller vouches for, and CUDA's
// convention for it is the one that `cuda` writes.
unsafe impl DlpackStream for ConsumerStream {
    fn as_python_arg(&self, _py: Python<'_>, _device: DLDevice) -> PyResult<StreamArg> {
        Ok(cuda(ptr::with_exposed_provenance_mut::<c_void>(self.0.handle())))
    }
}

/// A masked array's hidden values are no data.
fn refuse_mask(array: &Bound<'_, PyUntypedArray>) -> Result<()> {
    let py = array.py();
    if array.get_type().is(py.get_type::<PyUntypedArray>()) {
        return Ok(());
    }
    let Some(mask) = array.getattr_opt(intern!(py, "mask"))? else { return Ok(()) };
    let any = py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "any"), (mask,))?;
    if any.is_truthy()? {
        return Err(Error::invalid(ARGUMENT, "no masked values", "some").into());
    }
    Ok(())
}
