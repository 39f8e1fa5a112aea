//! Where the gradient of a loss by the features goes.

use crate::element::{DType, Floating, Precision};
use crate::encoding::{EncodeSpec, Encoding};
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::input::Input;
use crate::output::RowsMut;
use crate::shape::{check_shape, whole_rows};
use std::marker::PhantomData;

/// A batch of gradients to write: shape `(batch, features)`, the element type of the samples, rows
/// without gaps, on any device.
#[derive(Debug)]
pub struct Gradient<'a> {
    ptr: *mut u8,
    dtype: DType,
    device: Device,
    batch: usize,
    features: usize,
    /// In elements.
    row_stride: usize,
    data: PhantomData<&'a mut [u8]>,
}

// SAFETY: a Gradient is an exclusive borrow of plain values.
unsafe impl Send for Gradient<'_> {}

impl<'a> Gradient<'a> {
    /// Consecutive rows of `features` values each in host memory.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if they are not a whole number of rows.
    pub fn rows<T: Floating>(values: &'a mut [T], features: usize) -> Result<Self> {
        let batch = whole_rows("out", values.len(), features, ("rows", "values"))?;
        Ok(Self {
            ptr: values.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            device: Device::Cpu,
            batch,
            features,
            row_stride: features,
            data: PhantomData,
        })
    }

    /// A view of memory that somebody else describes.
    ///
    /// # Safety
    ///
    /// For the lifetime `'a`, `features` elements from each `ptr + i * row_stride * size`,
    /// `i < batch`, must be writable on `device`, initialised (to anything), aligned to their type
    /// (complex ones on a device to their size), in rows that do not overlap, and not touched by
    /// anybody else in an unordered way.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        dtype: DType,
        device: Device,
        (batch, features): (usize, usize),
        row_stride: usize,
    ) -> Self {
        Self { ptr, dtype, device, batch, features, row_stride, data: PhantomData }
    }

    /// Address of the first value, on [`Self::device`].
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the values lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Number of samples.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Values per sample.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Distance between rows, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The rows of a gradient on the host.
    pub(crate) fn rows_mut<T: Floating>(&mut self) -> RowsMut<'_, T> {
        assert_eq!(self.dtype, T::DTYPE);
        assert_eq!(self.device, Device::Cpu);
        let (ptr, stride) = (self.ptr.cast(), self.row_stride);
        // SAFETY: what `from_raw` was promised, or the slice borrowed.
        unsafe { RowsMut::from_raw(ptr, self.batch, self.features, stride) }
    }

    /// Refuses what has no gradient, and arrays that do not fit; answers the precision to compute
    /// in, that of the cotangent.
    pub(crate) fn check(
        &self,
        device: Device,
        spec: &EncodeSpec,
        input: &Input<'_>,
        cotangent: &Input<'_>,
    ) -> Result<Precision> {
        if *spec.encoding() == Encoding::Basis {
            return Err(no_gradient_of(spec));
        }
        if input.dtype().is_integer() {
            return Err(no_gradient_by(input.dtype()));
        }
        let dtype = |argument, expected: &str, got: DType| Error::DType {
            argument,
            expected: expected.to_owned(),
            got: got.to_string(),
        };
        if !cotangent.dtype().is_complex() {
            return Err(dtype("grad", "complex64 or complex128", cotangent.dtype()));
        }
        if self.dtype != input.dtype() {
            return Err(dtype("out", input.dtype().name(), self.dtype));
        }
        let samples = (input.batch(), input.features());
        check_shape("grad", (cotangent.batch(), cotangent.features()), (samples.0, spec.dim()))?;
        check_shape("out", (self.batch, self.features), samples)?;
        for (argument, got) in
            [("data", input.device()), ("grad", cotangent.device()), ("out", self.device)]
        {
            device.check_holds(argument, got)?;
        }
        Ok(cotangent.dtype().natural_precision())
    }
}

/// The error for an encoding that is constant wherever it is continuous.
pub(crate) fn no_gradient_of(spec: &EncodeSpec) -> Error {
    let name = spec.encoding().name();
    Error::invalid("encoding", "one that has a gradient", format!("{name:?}"))
}

/// The error for samples of a type that nothing can be differentiated by.
pub(crate) fn no_gradient_by(dtype: DType) -> Error {
    Error::DType {
        argument: "data",
        expected: "a floating type: there is no gradient by integers".to_owned(),
        got: dtype.to_string(),
    }
}
