//! What an array looks like in memory, whatever it came from: two dimensions, strides in elements.

use crate::errors::Result;
use dlpark::TensorRef;
use dlpark::ffi::{DLDataType, DLDevice, DLDeviceType};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use qdp_core::{DType, Device, Error, Input, Output, Precision};
use std::ops::Range;

/// The shapes that arrays may have.
pub(crate) const SHAPES: &str = "(features,) or (batch, features)";

/// Dimensions of a batch.
const MAX_NDIM: usize = 2;

/// A described array. It owns nothing and says nothing about how long the memory is valid.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) ptr: *mut u8,
    pub(crate) dtype: DType,
    /// The bytes that `dtype` names are truth values.
    pub(crate) boolean: bool,
    pub(crate) device: Device,
    /// Samples and values per sample.
    pub(crate) shape: (usize, usize),
    /// In elements.
    pub(crate) strides: (isize, isize),
    /// The array has one dimension: it is one sample.
    pub(crate) single: bool,
}

impl Layout {
    pub(crate) fn new(
        argument: &'static str,
        (ptr, dtype, device): (*mut u8, DType, Device),
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let (batch, values, mut rows, mut columns) = match (shape, strides) {
            (&[values], &[columns]) => (1, values, 0, columns),
            (&[batch, values], &[rows, columns]) => (batch, values, rows, columns),
            _ => return Err(wrong_dimensions(argument, shape)),
        };
        // The stride of a dimension that nobody steps along means nothing; named as if the array
        // had no gaps, it does not hide that it has none.
        if values <= 1 {
            columns = 1;
        }
        if batch <= 1 {
            rows = columns.saturating_mul(values as isize);
        }
        // As of tensors that only stand for others, which a compiler follows.
        if ptr.is_null() && batch > 0 && values > 0 {
            return Err(Error::invalid(argument, "values in memory", "none at all").into());
        }
        let single = shape.len() == 1;
        let (shape, strides) = ((batch, values), (rows, columns));
        Ok(Self { ptr, dtype, boolean: false, device, shape, strides, single })
    }

    /// The layout of a DLPack tensor.
    pub(crate) fn of_dlpack(argument: &'static str, tensor: &TensorRef<'_>) -> Result<Self> {
        let dtype = dtype_of_dlpack(argument, tensor.dtype())?;
        let device = device_of_dlpack(argument, tensor.device())?;
        // DLPack's numbers are i64 and were validated; this crate is for 64-bit hosts. On the
        // stack, as every call comes here: what has more dimensions is refused by their number.
        let numbers = tensor.shape();
        let steps = tensor
            .strides_or_compact()
            .map_err(|error| Error::invalid(argument, "a tensor with strides of 64 bits", error))?;
        let mut shape = [0; MAX_NDIM];
        let mut strides = [0; MAX_NDIM];
        let ndim = numbers.len();
        if ndim > MAX_NDIM {
            let shape: Vec<usize> = numbers.iter().map(|&n| n as usize).collect();
            return Err(wrong_dimensions(argument, &shape));
        }
        for (dimension, (&size, &step)) in numbers.iter().zip(steps.iter()).enumerate() {
            (shape[dimension], strides[dimension]) = (size as usize, step as isize);
        }
        let ptr = tensor.data_ptr().cast::<u8>().cast_mut();
        let offset = if ptr.is_null() { 0 } else { tensor.byte_offset() as usize };
        let ptr = ptr.wrapping_add(offset);
        let source = (ptr, dtype, device);
        let boolean = DLDataType::BOOL.matches(tensor.dtype());
        let layout = Self::new(argument, source, &shape[..ndim], &strides[..ndim])?;
        let layout = Self { boolean, ..layout };
        layout.check_alignment(argument, layout.natural_alignment())?;
        Ok(layout)
    }

    /// The layout of a NumPy array; `None` where its elements are not aligned, not in native byte
    /// order, or not a whole number of elements apart.
    pub(crate) fn of_numpy(
        argument: &'static str,
        array: &Bound<'_, PyUntypedArray>,
    ) -> Result<Option<Self>> {
        let descr = array.dtype();
        let dtype = match (descr.kind(), descr.itemsize()) {
            (b'b' | b'u', 1) => DType::U8,
            (b'u', 2) => DType::U16,
            (b'u', 4) => DType::U32,
            (b'u', 8) => DType::U64,
            (b'i', 1) => DType::I8,
            (b'i', 2) => DType::I16,
            (b'i', 4) => DType::I32,
            (b'i', 8) => DType::I64,
            (b'f', 2) => DType::F16,
            (b'f', 4) => DType::F32,
            (b'f', 8) => DType::F64,
            (b'c', 8) => DType::C64,
            (b'c', 16) => DType::C128,
            // NumPy has no bfloat16 of its own; the ml_dtypes package (JAX's) registers one.
            (_, 2) if descr.to_string() == "bfloat16" => DType::BF16,
            _ => return Err(unusable(argument, descr.to_string())),
        };
        let size = dtype.size() as isize;
        let whole = array.strides().iter().all(|stride| stride % size == 0);
        if !whole || !array.is_aligned() || descr.is_native_byteorder() == Some(false) {
            return Ok(None);
        }
        // SAFETY: the array is alive while it is borrowed, and NumPy keeps the pointer in it.
        let ptr = unsafe { (*array.as_array_ptr()).fields.data.cast::<u8>() };
        let strides: Vec<isize> = array.strides().iter().map(|stride| stride / size).collect();
        let layout = Self::new(argument, (ptr, dtype, Device::Cpu), array.shape(), &strides)?;
        Ok(Some(Self { boolean: descr.kind() == b'b', ..layout }))
    }

    /// The element type as that of a state.
    pub(crate) fn precision(&self, argument: &'static str) -> Result<Precision> {
        match self.dtype {
            DType::C64 => Ok(Precision::Complex64),
            DType::C128 => Ok(Precision::Complex128),
            other => Err(Error::DType {
                argument,
                expected: "complex64 or complex128".to_owned(),
                got: other.to_string(),
            }
            .into()),
        }
    }

    /// The array as the core reads it.
    ///
    /// # Safety
    ///
    /// As for [`Input::from_raw`], with this layout.
    pub(crate) unsafe fn input<'a>(&self) -> Input<'a> {
        // SAFETY: passed on to the caller.
        unsafe { Input::from_raw(self.ptr, self.dtype, self.device, self.shape, self.strides) }
    }

    /// The array as the core writes it.
    ///
    /// # Safety
    ///
    /// As for [`Output::from_raw`], with rows that are this layout's.
    pub(crate) unsafe fn output<'a>(&self, precision: Precision) -> Output<'a> {
        // SAFETY: passed on to the caller.
        unsafe {
            Output::from_raw(self.ptr, precision, self.device, self.shape, self.strides.0 as usize)
        }
    }

    /// What a backend needs to load an element: on a device, complex values in one piece.
    pub(crate) fn natural_alignment(&self) -> usize {
        let size = self.dtype.size();
        if self.dtype.is_complex() && self.device == Device::Cpu { size / 2 } else { size }
    }

    pub(crate) fn check_alignment(&self, argument: &'static str, align: usize) -> Result<()> {
        if self.ptr.addr().is_multiple_of(align) || self.is_empty() {
            return Ok(());
        }
        let expected = format!("memory aligned to {align} bytes");
        Err(Error::invalid(argument, expected, format!("address {:p}", self.ptr)).into())
    }

    /// Whether rows or values lie apart.
    pub(crate) fn has_gaps(&self) -> bool {
        let ((batch, values), (rows, columns)) = (self.shape, self.strides);
        (values > 1 && columns != 1) || (batch > 1 && rows != values as isize)
    }

    fn is_empty(&self) -> bool {
        self.shape.0 == 0 || self.shape.1 == 0
    }

    /// Whether the two may have bytes in common.
    pub(crate) fn may_overlap(&self, other: &Self) -> bool {
        let (a, b) = (self.extent(), other.extent());
        self.device == other.device
            && !self.is_empty()
            && !other.is_empty()
            && a.start < b.end
            && b.start < a.end
    }

    /// The addresses from the first byte to the last.
    fn extent(&self) -> Range<usize> {
        let size = self.dtype.size() as isize;
        let last = |n: usize, stride: isize| (n as isize - 1).saturating_mul(stride * size);
        let (rows, columns) =
            (last(self.shape.0, self.strides.0), last(self.shape.1, self.strides.1));
        let start = self.ptr.addr() as isize;
        let low = start.saturating_add(rows.min(0)).saturating_add(columns.min(0));
        let high = start.saturating_add(rows.max(0)).saturating_add(columns.max(0));
        low as usize..high.saturating_add(size) as usize
    }
}

/// The error for an element type that cannot be used.
pub(crate) fn unusable(argument: &'static str, got: String) -> crate::errors::Failure {
    let expected = if argument == "out" {
        "complex64 or complex128"
    } else {
        "bool, an integer, float16, bfloat16, float32, float64 or complex"
    };
    Error::DType { argument, expected: expected.to_owned(), got }.into()
}

fn wrong_dimensions(argument: &'static str, shape: &[usize]) -> crate::errors::Failure {
    Error::Shape { argument, expected: SHAPES.to_owned(), got: shape_text(shape) }.into()
}

fn shape_text(shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(ToString::to_string).collect();
    if let [size] = sizes.as_slice() {
        format!("({size},)")
    } else {
        format!("({})", sizes.join(", "))
    }
}

/// Of two with one meaning here, the last is the type's own.
const TYPES: [(DLDataType, DType); 15] = [
    (DLDataType::BOOL, DType::U8),
    (DLDataType::U8, DType::U8),
    (DLDataType::U16, DType::U16),
    (DLDataType::U32, DType::U32),
    (DLDataType::U64, DType::U64),
    (DLDataType::I8, DType::I8),
    (DLDataType::I16, DType::I16),
    (DLDataType::I32, DType::I32),
    (DLDataType::I64, DType::I64),
    (DLDataType::F16, DType::F16),
    (DLDataType::BF16, DType::BF16),
    (DLDataType::F32, DType::F32),
    (DLDataType::F64, DType::F64),
    (DLDataType::C64, DType::C64),
    (DLDataType::C128, DType::C128),
];

/// DLPack's name of an element type.
pub(crate) fn dlpack_of_dtype(dtype: DType) -> DLDataType {
    let known = TYPES.iter().rev().find(|(_, candidate)| *candidate == dtype);
    known.map_or(DLDataType::U8, |&(name, _)| name)
}

fn dtype_of_dlpack(argument: &'static str, dtype: DLDataType) -> Result<DType> {
    let known = TYPES.iter().find(|(candidate, _)| candidate.matches(dtype));
    known.map(|&(_, dtype)| dtype).ok_or_else(|| {
        let DLDataType { code, bits, lanes } = dtype;
        unusable(argument, format!("DLPack type code {} of {bits} bits, {lanes} lane(s)", code.0))
    })
}

pub(crate) fn device_of_dlpack(argument: &'static str, device: DLDevice) -> Result<Device> {
    match (device.device_type, u32::try_from(device.device_id)) {
        // Pinned memory is host memory.
        (DLDeviceType::CPU | DLDeviceType::CUDAHOST, _) => Ok(Device::Cpu),
        (DLDeviceType::CUDA | DLDeviceType::CUDAMANAGED, Ok(ordinal)) => Ok(Device::Cuda(ordinal)),
        _ => Err(Error::DeviceMismatch {
            argument,
            expected: "cpu or cuda".to_owned(),
            got: format!("DLPack device type {}:{}", device.device_type.0, device.device_id),
        }
        .into()),
    }
}

/// DLPack's name of a device.
pub(crate) fn dlpack_device(device: Device) -> DLDevice {
    match device {
        Device::Cpu => DLDevice::CPU,
        Device::Cuda(ordinal) => DLDevice::cuda(ordinal as i32),
    }
}

/// DLPack's name of a state's element type.
pub(crate) fn dlpack_dtype(precision: Precision) -> DLDataType {
    match precision {
        Precision::Complex64 => DLDataType::C64,
        Precision::Complex128 => DLDataType::C128,
    }
}
